"""Prompts that ask a running model to carry out an operation on a source word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from skhead._checks import check_operation_names
from skhead._tokenizers import as_encoder, front_tokens
from skhead.weights.running import token_batches

__all__ = [
    "PLACEHOLDER",
    "Batch",
    "Prompt",
    "Prompter",
    "batches",
    "labelled_pairs",
    "token_groups",
]

#: Where the source word stands in a template.
PLACEHOLDER = "<X>"
_PAIR = 2


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, where the source word ends in it, and the token that is asked for."""

    tokens: tuple[int, ...]
    source: int
    target: int
    template: int = 0


@dataclass(frozen=True)
class Batch:
    """Prompts of one length: tokens ``(n, length)``, and per prompt what belongs to it."""

    tokens: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    templates: torch.Tensor


class Prompter:
    """Writes source words into templates, as token ids.

    Parameters
    ----------
    tokenizer : tokenizer object, path, callable or None
        Of the kinds that `skhead._tokenizers.as_encoder` takes; None where all is token ids.
    leading_space : bool
        Whether a space goes in front of targets, and of sources in templates of token ids.
    bos_token : int, "auto" or None
        Token in front of every prompt; "auto" takes those that a tokenizer object puts there.
    caller : str
        The function to name in errors.

    Raises
    ------
    TypeError
        If the tokenizer or `bos_token` is of a kind that is not known.
    """

    def __init__(
        self, tokenizer: Any, leading_space: bool, bos_token: int | str | None, caller: str
    ) -> None:
        self._caller = caller
        self._space = " " if leading_space else ""
        self._encode = None if tokenizer is None else as_encoder(tokenizer, caller)
        self._front = tuple(front_tokens(tokenizer, bos_token, caller))

    def write(self, operation: Any, templates: Sequence[Any], name: str) -> list[Prompt]:
        """Every source of an operation in every template, template by template.

        Parameters
        ----------
        operation : sequence of (source, target)
            Words, or token ids; a source of token ids may be several.
        templates : sequence of str or (before, after)
            Texts with one ``<X>``, or token ids before and after the source.
        name : str
            The operation to name in errors.

        Raises
        ------
        TypeError
            If pairs or templates have other types.
        ValueError
            If there are none, a target is not one token, or a source has no place of its own.
        """
        pairs = self._pairs(operation, name)
        if isinstance(templates, str) or not len(templates):
            raise ValueError(f"{self._caller}: give at least one template, in a list")
        return [
            self._prompt(template, number, source, target)
            for number, template in enumerate(templates)
            for source, target in pairs
        ]

    def target(self, word: Any, name: str) -> int:
        """The one token of a target."""
        if _is_id(word):
            return int(word)
        if not isinstance(word, str):
            raise TypeError(
                f"{self._caller}: targets of operation {name!r} must be words or token ids, got "
                f"{word!r}"
            )
        ids = self._encoded(self._space + word)
        if len(ids) != 1:
            raise ValueError(
                f"{self._caller}: target {self._space + word!r} of operation {name!r} is "
                f"{len(ids)} tokens of this tokenizer, and a target must be one; leave such pairs "
                "out, or change leading_space"
            )
        return ids[0]

    def _pairs(self, operation: Any, name: str) -> list[tuple[Any, int]]:
        if isinstance(operation, str | Mapping) or not isinstance(operation, Sequence | np.ndarray):
            raise TypeError(
                f"{self._caller}: operation {name!r} must be a list of (source, target) pairs, got "
                f"{type(operation).__name__}"
            )
        if not len(operation):
            raise ValueError(f"{self._caller}: operation {name!r} has no pairs")
        pairs = []
        for number, pair in enumerate(operation):
            listed = isinstance(pair, Sequence | np.ndarray) and not isinstance(pair, str)
            if not listed or len(pair) != _PAIR:
                raise ValueError(
                    f"{self._caller}: pair {number} of operation {name!r} is {pair!r}, not a "
                    "source and a target"
                )
            pairs.append((pair[0], self.target(pair[1], name)))
        return pairs

    def _prompt(self, template: Any, number: int, source: Any, target: int) -> Prompt:
        if isinstance(template, str):
            before, after = self._split(template)
            if isinstance(source, str):
                return self._text_prompt(before, source, after, number, target)
            front, back = self._encoded(before.rstrip(" ")), self._encoded(after)
        else:
            front, back = self._id_template(template)
        middle = (
            self._encoded(self._space + source) if isinstance(source, str) else self._ids(source)
        )
        if not middle:
            raise ValueError(f"{self._caller}: source {source!r} has no tokens")
        tokens = (*self._front, *front, *middle, *back)
        return Prompt(tokens, len(tokens) - len(back) - 1, target, number)

    def _text_prompt(
        self, before: str, source: str, after: str, number: int, target: int
    ) -> Prompt:
        """A prompt that is tokenised as a whole, checked to have a token where the source ends."""
        whole, head = self._encoded(before + source + after), self._encoded(before + source)
        start = len(self._encoded(before.rstrip(" ")))
        if whole[: len(head)] != head or len(head) <= start:
            raise ValueError(
                f"{self._caller}: in the prompt {before + source + after!r} no token ends where "
                f"the source {source!r} ends, so that it has no place of its own; change the "
                "template, or give it as token ids (before, after)"
            )
        return Prompt((*self._front, *whole), len(self._front) + len(head) - 1, target, number)

    def _split(self, template: str) -> tuple[str, str]:
        parts = template.split(PLACEHOLDER)
        if len(parts) != _PAIR:
            raise ValueError(
                f"{self._caller}: template {template!r} must hold {PLACEHOLDER} once, it holds it "
                f"{len(parts) - 1} times"
            )
        return parts[0], parts[1]

    def _id_template(self, template: Any) -> tuple[list[int], list[int]]:
        if not isinstance(template, Sequence) or len(template) != _PAIR:
            raise TypeError(
                f"{self._caller}: a template must be a text with {PLACEHOLDER} or a pair of lists "
                f"of token ids (before, after), got {template!r}"
            )
        return self._ids(template[0]), self._ids(template[1])

    def _encoded(self, text: str) -> list[int]:
        if not text:
            return []
        if self._encode is None:
            raise TypeError(
                f"{self._caller}: the text {text!r} needs a tokenizer: pass one, or give pairs and "
                "templates as token ids"
            )
        return self._encode(text)

    def _ids(self, values: Any) -> list[int]:
        listed = [values] if _is_id(values) or np.ndim(values) == 0 else list(values)
        wrong = [value for value in listed if not _is_id(value)]
        if wrong:
            raise TypeError(
                f"{self._caller}: token ids must be integers, and texts go with a tokenizer; got "
                f"{wrong[0]!r}"
            )
        return [int(value) for value in listed]


def labelled_pairs(operation: Any, caller: str) -> dict[str, Any]:
    """One operation under the name "operation", or several under their own."""
    named = dict(operation) if isinstance(operation, Mapping) else {"operation": operation}
    if not named:
        raise ValueError(f"{caller}: there is no operation in the mapping; give at least one")
    check_operation_names(named, caller)
    return named


def batches(bridge: Any, prompts: Sequence[Prompt], caller: str, least: int = 1) -> Iterator[Batch]:
    """Prompts in batches of one length each that fit in memory.

    Parameters
    ----------
    bridge : TransformerBridge
    prompts : sequence of Prompt
    caller : str
        The function to name in errors.
    least : int, default=1
        Number of tokens that a prompt must have.

    Raises
    ------
    ValueError
        If a prompt does not fit the model, or its target is none of the model's tokens.
    """
    n_vocab = int(bridge.cfg.d_vocab)
    for prompt in prompts:
        if not 0 <= prompt.target < n_vocab:
            raise ValueError(
                f"{caller}: target {prompt.target} is none of the model's tokens, 0 to "
                f"{n_vocab - 1}; is the tokenizer that of the model?"
            )
    for tokens, places in token_groups(bridge, [p.tokens for p in prompts], caller, least):
        group = [prompts[place] for place in places]
        yield Batch(
            tokens,
            *(
                torch.tensor([getattr(p, field) for p in group], device=bridge.cfg.device)
                for field in ("source", "target", "template")
            ),
        )


def token_groups(
    bridge: Any, sequences: Sequence[Sequence[int]], caller: str, least: int = 1
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Sequences in batches of one length each that fit in memory, and where each was in the list.

    Parameters
    ----------
    bridge : TransformerBridge
    sequences : sequence of sequences of int
        Token ids.
    caller : str
        The function to name in errors.
    least : int, default=1
        Number of tokens that a sequence must have.

    Raises
    ------
    ValueError
        If a sequence does not fit the model.
    """
    lengths: dict[int, list[int]] = {}
    for place, sequence in enumerate(sequences):
        lengths.setdefault(len(sequence), []).append(place)
    ordered = iter([place for group in lengths.values() for place in group])
    for tokens in token_batches(bridge, [list(ids) for ids in sequences], caller, least=least):
        yield tokens.to(bridge.cfg.device), [next(ordered) for _ in range(len(tokens))]


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
