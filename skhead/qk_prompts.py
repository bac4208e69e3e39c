"""Prompts of which one query and some keys are looked at, and what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from skhead._checks import label_array
from skhead._frozen import row_positions
from skhead._html import SHOWN, Listing, ShowsSummary, Summary, span

__all__ = ["QKPrompts"]


@dataclass(frozen=True, eq=False)
class QKPrompts(ShowsSummary):
    """Token sequences, each with the position of one query and those of its keys, labelled.

    Made by the prompt builders of ``skhead.datasets``, and taken by `collect_qk`, which turns them
    into the `QKPairs` of a head. Indexing selects prompts.

    Parameters
    ----------
    tokens : sequence of sequences of int
        Token ids of each prompt, special tokens included.
    query_positions : sequence of int
        Position of the query in each prompt; negative ones count from its end.
    key_positions : sequence of sequences of int
        Positions of the keys in each prompt, none behind its query; negative ones count from its
        end.
    query_labels : array of shape (n_prompts,) or (n_prompts, n_features)
    key_labels : sequence, by prompt, of arrays of shape (n_keys,) or (n_keys, n_features)
        Labels of the keys of each prompt.
    key_groups : sequence, by prompt, of such arrays, or None, default=None
        Nuisance strata; see `QKPairs`.
    features : sequence of str, default=()
        Names of the features.
    key_names : sequence, by prompt, of sequences of str, or None, default=None
        Texts of the keys.
    texts : sequence of str or None, default=None
        Texts of the prompts, for a person to read.

    Attributes
    ----------
    tokens : tuple of tuple of int
    query_positions : tuple of int
        From 0.
    key_positions : tuple of tuple of int
        From 0.
    query_labels : ndarray of shape (n_prompts, ...)
    key_labels : tuple of ndarray
    key_groups : tuple of ndarray or None
    features : tuple of str
    key_names : tuple of tuple of str, or None
    texts : tuple of str or None

    Raises
    ------
    ValueError
        If the parts are not equally many, or a position lies outside of its prompt.

    Examples
    --------
    >>> import skhead
    >>> prompts = skhead.QKPrompts(
    ...     tokens=[[5, 7, 9, 5], [8, 6, 8]],
    ...     query_positions=[-1, -1],
    ...     key_positions=[[0, 1, 2], [0, 1]],
    ...     query_labels=[5, 8],
    ...     key_labels=[[5, 7, 9], [8, 6]],
    ... )
    >>> prompts
    QKPrompts(2 prompts of 3 to 4 tokens, 5 keys)
    >>> prompts.query_positions
    (3, 2)
    """

    tokens: Sequence[Sequence[int]]
    query_positions: Sequence[int]
    key_positions: Sequence[Sequence[int]]
    query_labels: Any
    key_labels: Sequence[Any]
    key_groups: Sequence[Any] | None = None
    features: Sequence[str] = ()
    key_names: Sequence[Sequence[str]] | None = None
    texts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        tokens = tuple(tuple(int(token) for token in prompt) for prompt in self.tokens)
        self._check_lengths(len(tokens))
        queries = tuple(
            _position(at, tokens[i], i, "query") for i, at in enumerate(self.query_positions)
        )
        keys = tuple(
            tuple(_position(at, tokens[i], i, "key") for at in listed)
            for i, listed in enumerate(self.key_positions)
        )
        for i, (query, listed) in enumerate(zip(queries, keys, strict=True)):
            if not listed or max(listed) > query:
                raise ValueError(
                    f"QKPrompts: the query of prompt {i} stands at {query} and its keys at "
                    f"{listed}; give at least one key, and none behind the query"
                )
        values = {
            "tokens": tokens,
            "query_positions": queries,
            "key_positions": keys,
            "query_labels": label_array(self.query_labels),
            "key_labels": self._by_key(self.key_labels, keys, "key_labels"),
            "key_groups": self._by_key(self.key_groups, keys, "key_groups"),
            "features": (self.features,) if isinstance(self.features, str) else (*self.features,),
            "key_names": _tuples(self.key_names),
            "texts": None if self.texts is None else tuple(self.texts),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_lengths(self, n_prompts: int) -> None:
        if n_prompts == 0:
            raise ValueError("QKPrompts: there is no prompt; give at least one")
        for name in _BY_PROMPT:
            values = getattr(self, name)
            if values is not None and len(values) != n_prompts:
                raise ValueError(
                    f"QKPrompts: there are {n_prompts} prompts, and {name} of {len(values)}"
                )

    def _by_key(
        self, values: Any, keys: Sequence[Sequence[int]], name: str
    ) -> tuple[NDArray[Any], ...] | None:
        if values is None:
            return None
        arrays = tuple(label_array(part) for part in values)
        for i, (part, listed) in enumerate(zip(arrays, keys, strict=True)):
            if len(part) != len(listed):
                raise ValueError(
                    f"QKPrompts: prompt {i} has {len(listed)} keys, and {len(part)} of {name}"
                )
        return arrays

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, key: Any) -> QKPrompts:
        rows = row_positions(key, len(self), "prompts", "").tolist()
        parts = {name: getattr(self, name) for name in _BY_PROMPT}
        taken: dict[str, Any] = {
            name: None if values is None else [values[row] for row in rows]
            for name, values in parts.items()
        }
        taken["query_labels"] = self.query_labels[rows]
        return replace(self, **taken)

    @property
    def n_keys(self) -> int:
        """Number of keys of all prompts."""
        return sum(len(listed) for listed in self.key_positions)

    def _summary(self) -> Summary:
        first = min(len(self), SHOWN)
        facts = {
            "prompts": f"{len(self):,}",
            "tokens of a prompt": span([len(prompt) for prompt in self.tokens]),
            "keys": f"{self.n_keys:,}, of a prompt {span([len(at) for at in self.key_positions])}",
            "features": ", ".join(self.features) or "not named",
            "groups": "none" if self.key_groups is None else "of every key",
        }
        if self.texts is None:
            return Summary(facts)
        shown = pd.DataFrame({"prompt": range(first), "text": self.texts[:first]})
        return Summary(facts, [Listing("first prompts", shown)])

    def __repr__(self) -> str:
        lengths = sorted({len(prompt) for prompt in self.tokens})
        length = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
        return f"QKPrompts({len(self)} prompts of {length} tokens, {self.n_keys} keys)"


_BY_PROMPT = (
    "tokens", "query_positions", "key_positions", "query_labels", "key_labels", "key_groups",
    "key_names", "texts",
)  # fmt: skip


def _position(at: int, prompt: Sequence[int], number: int, what: str) -> int:
    place = int(at) + len(prompt) if at < 0 else int(at)
    if not 0 <= place < len(prompt):
        raise ValueError(
            f"QKPrompts: the {what} of prompt {number} stands at {at}, and the prompt has "
            f"{len(prompt)} tokens"
        )
    return place


def _tuples(values: Sequence[Sequence[str]] | None) -> tuple[tuple[str, ...], ...] | None:
    return None if values is None else tuple(tuple(part) for part in values)
