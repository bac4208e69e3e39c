"""Words for prompts, and texts with marked parts as token ids and positions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from skhead._tokenizers import as_encoder, front_tokens

if TYPE_CHECKING:
    from skhead.qk_prompts import QKPrompts

__all__ = [
    "MarkedText",
    "PromptWriter",
    "as_prompts",
    "checked_words",
    "joined",
    "load_prompt_words",
    "split_at",
]


def load_prompt_words() -> dict[str, Any]:
    """Words that the builders of prompts use by default.

    Returns
    -------
    dict
        ``"categories"``, a mapping from animal, fruit, liquid, vehicle and country to lists of
        words, none of them in two lists; and ``"objects"``, a list of household objects.

    Examples
    --------
    >>> from skhead.datasets import load_prompt_words
    >>> words = load_prompt_words()
    >>> list(words["categories"]), words["objects"][:2]
    (['animal', 'fruit', 'liquid', 'vehicle', 'country'], ['cup', 'lamp'])
    """
    file = files("skhead.datasets").joinpath("data", "prompt_words.json")
    return dict(json.loads(file.read_text(encoding="utf-8")))


class MarkedText(NamedTuple):
    """A text and where its marked parts begin and end, in characters."""

    text: str
    spans: list[tuple[int, int]]


def joined(pieces: Iterable[tuple[str, bool]]) -> MarkedText:
    """One text of pieces, each with whether it is marked."""
    text, spans = "", []
    for piece, marked in pieces:
        if marked:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return MarkedText(text, spans)


def split_at(template: Any, field: str, name: str, caller: str) -> tuple[str, str]:
    """What stands before and after a field of a template, which must hold it once."""
    parts = template.split(field) if isinstance(template, str) else []
    if len(parts) != 2:
        raise ValueError(
            f"{caller}: {name} must be a text that holds {field} once; got {template!r}"
        )
    return parts[0], parts[1]


def checked_words(words: Any, what: str, least: int, caller: str) -> list[str]:
    """Distinct words, at least so many; errors say what they are."""
    listed = [words] if isinstance(words, str) else list(words)
    for word in listed:
        if not isinstance(word, str) or not word or word != word.strip():
            raise ValueError(
                f"{caller}: {what} must be words without spaces around them; got {word!r}"
            )
    if len(set(listed)) < len(listed):
        twice = next(word for word in listed if listed.count(word) > 1)
        raise ValueError(f"{caller}: {what} holds {twice!r} twice; leave one out")
    if len(listed) < least:
        raise ValueError(
            f"{caller}: {what} must be {least} or more, got {len(listed)}; give more, or ask for "
            "fewer in a prompt"
        )
    return listed


class PromptWriter:
    """Writes texts as token ids and finds the token in which each marked part ends.

    Parameters
    ----------
    tokenizer : tokenizer object, path or callable
        Of the kinds that `skhead._tokenizers.as_encoder` takes.
    bos_token : int, "auto" or None
        Token in front of every prompt; "auto" takes those that a tokenizer object puts there.
    caller : str
        The function to name in errors.
    chat : bool
        Whether texts are what a user says, put into the chat template of the tokenizer.

    Raises
    ------
    TypeError
        If the tokenizer or `bos_token` is of a kind that is not known, or has no chat template.
    """

    def __init__(self, tokenizer: Any, bos_token: Any, caller: str, *, chat: bool = False) -> None:
        self._caller = caller
        self._encode = as_encoder(tokenizer, caller)
        self._template = _chat_template(tokenizer, caller) if chat else None
        # What a template writes brings its own special tokens along.
        front = None if chat and bos_token == "auto" else bos_token
        self._front = front_tokens(tokenizer, front, caller)

    def write(self, marked: MarkedText) -> tuple[str, list[int], list[int]]:
        """The whole text, its token ids, and the position of the token that ends each part.

        Raises
        ------
        ValueError
            If no token ends where a marked part ends, or a chat template changes the text.
        """
        text, spans = marked if self._template is None else self._in_chat(self._template, marked)
        whole = self._encoded(text)
        positions = [self._end(whole, text, span) + len(self._front) for span in spans]
        return text, [*self._front, *whole], positions

    def _end(self, whole: Sequence[int], text: str, span: tuple[int, int]) -> int:
        """Position of the token that ends a part: what stands up to there must be as if alone."""
        start, end = span
        head = self._encoded(text[:end])
        if whole[: len(head)] != head or head == self._encoded(text[:start]):
            raise ValueError(
                f"{self._caller}: no token of this tokenizer ends where {text[start:end]!r} ends "
                f"in {text[max(0, start - 20) : end + 20]!r}, so that it has no key of its own; "
                "leave it out of the words, or change the template"
            )
        return len(head) - 1

    def _in_chat(self, template: Any, marked: MarkedText) -> MarkedText:
        messages = [{"role": "user", "content": marked.text}]
        text = template(messages, tokenize=False, add_generation_prompt=True)
        if text.count(marked.text) != 1:
            raise ValueError(
                f"{self._caller}: the chat template of the tokenizer does not repeat the text "
                f"{marked.text!r} as it stands; let it neither begin nor end with a space, or "
                "write the turns of the chat into template and leave chat out"
            )
        shift = text.index(marked.text)
        return MarkedText(text, [(start + shift, end + shift) for start, end in marked.spans])

    def _encoded(self, text: str) -> list[int]:
        return self._encode(text) if text else []


def _chat_template(tokenizer: Any, caller: str) -> Any:
    if getattr(tokenizer, "chat_template", None) is None:
        raise TypeError(
            f"{caller}: chat=True needs a Hugging Face tokenizer with a chat template, and "
            f"{type(tokenizer).__name__} has none; open it with transformers.AutoTokenizer, or "
            "leave chat out"
        )
    return tokenizer.apply_chat_template


def as_prompts(
    writer: PromptWriter,
    marked: Sequence[MarkedText],
    query_labels: Sequence[Any],
    key_labels: Sequence[Sequence[Any]],
    feature: str,
) -> QKPrompts:
    """Prompts whose queries are the last tokens and whose keys end the marked parts."""
    from skhead.qk_prompts import QKPrompts

    texts, tokens, positions = zip(*(writer.write(part) for part in marked), strict=True)
    return QKPrompts(
        tokens,
        [-1] * len(tokens),
        positions,
        query_labels,
        key_labels,
        features=(feature,),
        key_names=[[part.text[start:end] for start, end in part.spans] for part in marked],
        texts=texts,
    )
