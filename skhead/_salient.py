"""Listings of what heads do best, and questions about them to a language model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from skhead._html import SHOWN, Listing, ShowsSummary, Summary

__all__ = ["DIRECTIONS", "SalientMappings"]

_VERBS = {"promote": "raises", "suppress": "lowers"}
DIRECTIONS = tuple(_VERBS)
_TASK = """\
An attention head of a language model was read from its parameters alone. Every line below shows \
one token that the head responds to strongly, the strongest first, and behind the arrow the tokens \
whose logits the head {verb} most when it attends to it. Tokens are quoted as they stand; many \
begin with a space, and some are parts of words.

{lines}

Describe what this head does, judging by these lines only:
- what the tokens in front of the arrows have in common;
- what leads from a token in front of an arrow to those behind it.
Single lines may be noise. If most lines follow no common pattern, write "unclear" in its place.

Answer with one JSON object that has three string values: "evidence" (the lines you rely on and \
why), "inputs" (what the tokens have in common, in at most ten words) and "operation" (what is \
done with them, in at most fifteen words)."""


@dataclass(frozen=True)
class SalientMappings(ShowsSummary):
    """The strongest mappings of heads, as a table, a text, JSON, or questions to a language model.

    Attributes
    ----------
    table : DataFrame
        One row for every head, salient token and target: ``head``, ``rank`` (of the token, from
        1), ``token``, ``text``, ``saliency``, ``target_rank`` (from 1), ``target``,
        ``target_text`` and ``logit``, which is that of the head's output for the token, negative
        if suppressed. Texts only if a vocabulary was given.
    direction : {"promote", "suppress"}
        Whether targets are those of largest or of smallest logit.

    See Also
    --------
    SalientOperations.mappings : Makes them.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> salient = skhead.SalientOperations(n_salient=1, n_targets=2, source_embedding="raw")
    >>> found = salient.fit(heads).mappings(heads.loc[["L1H1"]])
    >>> found.to_text().splitlines()[0], len(found.table)
    ('L1H1', 2)
    """

    table: pd.DataFrame
    direction: str

    def to_text(self) -> str:
        """A readable list: under the label of each head one line for every salient token.

        Returns
        -------
        str

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> words = [f"<{token}>" for token in range(67)]
        >>> salient = skhead.SalientOperations(1, 2, source_embedding="raw", vocabulary=words).fit(
        ...     heads
        ... )
        >>> found = salient.mappings(heads.loc[["L1H1"]])
        >>> found.to_text().splitlines()[0]
        'L1H1'
        """
        return "\n".join(
            line for head, rows in self._heads() for line in (head, *self._lines(rows, "  "), "")
        )

    def prompts(self) -> pd.Series:
        """One prompt for every head, which asks a language model to describe the head.

        Nothing is sent anywhere.

        Returns
        -------
        Series
            Prompts by the label of the head.

        Raises
        ------
        ValueError
            If there are no texts, as no vocabulary was given.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> words = [f"<{token}>" for token in range(67)]
        >>> salient = skhead.SalientOperations(1, 2, source_embedding="raw", vocabulary=words).fit(
        ...     heads
        ... )
        >>> found = salient.mappings(heads.loc[["L1H1"]])
        >>> found.prompts()["L1H1"].splitlines()[0][:60]
        'An attention head of a language model was read from its para'
        """
        if "text" not in self.table:
            raise ValueError(
                "SalientMappings: a prompt needs the texts of tokens; fit SalientOperations with "
                "vocabulary=, for example the model's tokenizer"
            )
        found = {head: self._prompt(rows) for head, rows in self._heads()}
        return pd.Series(found, name="prompt", dtype=object).rename_axis("head")

    def to_json(self) -> str:
        """Everything as one JSON document, with the prompts if there are texts.

        Returns
        -------
        str
            An object with ``direction`` and ``heads``, a list of ``head``, ``inputs`` (``token``,
            ``text``, ``saliency`` and ``outputs`` of ``token``, ``text`` and ``logit``) and
            ``prompt``.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> salient = skhead.SalientOperations(n_salient=1, n_targets=2, source_embedding="raw")
        >>> import json
        >>> found = salient.fit(heads).mappings(heads.loc[["L1H1"]])
        >>> list(json.loads(found.to_json()))
        ['direction', 'heads']
        """
        heads = []
        for head, rows in self._heads():
            entry: dict[str, Any] = {"head": head, "inputs": _nested(rows)}
            if "text" in rows:
                entry["prompt"] = self._prompt(rows)
            heads.append(entry)
        return json.dumps({"direction": self.direction, "heads": heads}, ensure_ascii=False)

    def _summary(self) -> Summary:
        facts = {
            "heads": f"{self.table['head'].nunique():,}",
            "direction": self.direction,
            "mappings": f"{len(self.table):,}",
            "texts": "yes" if "text" in self.table else "no, as no vocabulary was given",
        }
        first = self.table[(self.table["target_rank"] == 1) & (self.table["rank"] == 1)]
        return Summary(facts, [Listing("first target of the first token", first.head(SHOWN))])

    def __repr__(self) -> str:
        return (
            f"SalientMappings({self.table['head'].nunique()} heads, {len(self.table)} mappings, "
            f"direction {self.direction})"
        )

    def _heads(self) -> Iterator[tuple[str, pd.DataFrame]]:
        for head, rows in self.table.groupby("head", sort=False):
            yield str(head), rows

    def _prompt(self, rows: pd.DataFrame) -> str:
        lines = "\n".join(self._lines(rows, "", saliency=False))
        return _TASK.format(verb=_VERBS[self.direction], lines=lines)

    def _lines(self, rows: pd.DataFrame, indent: str, saliency: bool = True) -> list[str]:
        shown = ("text", "target_text") if "text" in rows else ("token", "target")
        lines = []
        for _, of_token in rows.groupby("rank"):
            token, targets = of_token[shown[0]].iloc[0], of_token[shown[1]]
            strength = f" ({of_token['saliency'].iloc[0]:.3g})" if saliency else ""
            listed = ", ".join(_quoted(target) for target in targets)
            lines.append(f"{indent}{_quoted(token)}{strength} -> {listed}")
        return lines


def _nested(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry for every salient token, with its targets."""
    entries = []
    for _, of_token in rows.groupby("rank"):
        first = of_token.iloc[0]
        entry: dict[str, Any] = {"token": int(first["token"])}
        outputs: list[dict[str, Any]] = [{"token": int(target)} for target in of_token["target"]]
        if "text" in rows:
            entry["text"] = first["text"]
            for output, text in zip(outputs, of_token["target_text"], strict=True):
                output["text"] = text
        for output, logit in zip(outputs, of_token["logit"], strict=True):
            output["logit"] = float(logit)
        entries.append(entry | {"saliency": float(first["saliency"]), "outputs": outputs})
    return entries


def _quoted(token: Any) -> str:
    return json.dumps(token, ensure_ascii=False) if isinstance(token, str) else str(token)
