"""Tokens nearest what heads write, with their text where the model's directory holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from skhead.exceptions import SkheadError, UnsupportedLayoutError
from skhead.readout import SubspaceReadout

__all__ = ["MOST_TOKENS", "Nearest", "nearest_tokens", "read_vocabulary"]

#: Size of a vocabulary beyond which tokens are not read.
MOST_TOKENS = 100_000
_LISTED = 8


@dataclass(frozen=True)
class Nearest:
    """Tokens nearest the writing subspace of every head.

    Attributes
    ----------
    lists : mapping of str to tuple of (int, str or None, float)
        By label of the head: token id, text if known, and cosine.
    named : bool
        Whether texts are known.
    refusal : str or None
        Why there are no lists.
    """

    lists: Mapping[str, tuple[tuple[int, str | None, float], ...]]
    named: bool
    refusal: str | None


def nearest_tokens(heads: pd.DataFrame, processing: Mapping[str, Any]) -> Nearest:
    """Read tokens off the writing subspaces of heads, where the model allows it.

    Parameters
    ----------
    heads : DataFrame
        Some rows of the heads table of one source.
    processing : mapping
        ``fold_norm, center, device`` of `SubspaceReadout`.

    Returns
    -------
    Nearest
    """
    readout = SubspaceReadout(n_tokens=_LISTED, **processing)
    try:
        readout.fit(heads)
    except SkheadError as error:
        return Nearest({}, False, str(error).removeprefix("SubspaceReadout: "))
    if readout.n_vocab_ > MOST_TOKENS:
        why = f"its {readout.n_vocab_:,} tokens are more than the {MOST_TOKENS:,} that a page lists"
        return Nearest({}, False, why)
    try:
        texts = read_vocabulary(str(readout.source_), readout.n_vocab_)
    except UnsupportedLayoutError as error:
        return Nearest({}, False, str(error))
    lists: dict[str, list[tuple[int, str | None, float]]] = {}
    for row in readout.top_tokens(heads).to_dict("records"):
        token = int(row["token"])
        text = None if texts is None else texts.get(token)
        lists.setdefault(row["head"], []).append((token, text, float(row["score"])))
    return Nearest({k: tuple(v) for k, v in lists.items()}, texts is not None, None)


def read_vocabulary(source: str, n_vocab: int) -> dict[int, str] | None:
    """Text of tokens from the tokenizer's files beside a model.

    Parameters
    ----------
    source : str
        Directory or file of a model; another address has nothing beside it.
    n_vocab : int
        Tokens of the model.

    Returns
    -------
    dict of int to str, or None
        None where there is no such file, or where it has another number of tokens by far: one that
        names less than half of the model's tokens is not taken for its vocabulary.

    Raises
    ------
    UnsupportedLayoutError
        If a file is damaged.
    """
    place = Path(source)
    directory = place.parent if place.is_file() else place
    for name, read in (
        ("tokenizer.json", _from_tokenizer),
        ("vocab.json", _from_mapping),
        ("vocab.txt", _from_lines),
    ):
        path = directory / name
        if path.is_file():
            try:
                texts = read(path.read_text(encoding="utf-8"))
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                raise UnsupportedLayoutError(
                    f"{name} beside the model is damaged ({error}); repair or remove it"
                ) from error
            known = {token: text for token, text in texts.items() if 0 <= token < n_vocab}
            if 2 * len(known) >= n_vocab:
                return _readable(known)
    return None


def _from_tokenizer(content: str) -> dict[int, str]:
    stored = json.loads(content)
    vocabulary = stored.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):
        texts = {token: str(entry[0]) for token, entry in enumerate(vocabulary)}
    else:
        texts = {int(token): str(text) for text, token in vocabulary.items()}
    added = {int(entry["id"]): str(entry["content"]) for entry in stored.get("added_tokens", [])}
    return texts | added


def _from_mapping(content: str) -> dict[int, str]:
    return {int(token): str(text) for text, token in json.loads(content).items()}


def _from_lines(content: str) -> dict[int, str]:
    return dict(enumerate(content.splitlines()))


def _readable(texts: dict[int, str]) -> dict[int, str]:
    """Plain text where tokens stand for bytes by the letters of GPT-2; others as they are."""
    if not any(text.startswith("Ġ") for text in texts.values()):
        return {token: text.replace("▁", " ") for token, text in texts.items()}
    byte_of = _byte_letters()
    readable = {}
    for token, text in texts.items():
        if all(letter in byte_of for letter in text):
            text = bytes(map(byte_of.__getitem__, text)).decode("utf-8", errors="replace")
        readable[token] = text
    return readable


def _byte_letters() -> dict[str, int]:
    """Byte that each letter stands for: itself if it can be seen, else the next from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(256 + i): byte for i, byte in enumerate(unseen)
    }
