"""Which tensors of a checkpoint hold its tokens and positions, and what is not there."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from skhead.exceptions import ConfigMismatchError
from skhead.weights.files import Checkpoint
from skhead.weights.lens import has_lens_names
from skhead.weights.lens_tokens import lens_tokens
from skhead.weights.planning import find_prefix, resolve
from skhead.weights.readers import TensorReader
from skhead.weights.token_layouts import Tokens

__all__ = ["TokenSources", "find_tokens"]


@dataclass
class TokenSources:
    """The tensors at both ends of a model's stream, by their whole names.

    Attributes
    ----------
    reader : TensorReader
    config : mapping
        Of the language model.
    tokens : Tokens
        What the architecture says.
    prefix : str
        What stands in front of the names in `tokens`.
    said_to_tie : bool
        The configuration, or the architecture's default, ties both ends.
    embedding, unembedding, positions, final_gain, embedding_gain : str or None
        Names of the tensors; None where there is none.
    tied : bool
        One tensor stands for both ends.
    missing : dict of str to str
        Why a name is None.
    """

    reader: TensorReader
    config: Mapping[str, Any]
    tokens: Tokens
    prefix: str
    said_to_tie: bool
    embedding: str | None = None
    unembedding: str | None = None
    positions: str | None = None
    final_gain: str | None = None
    embedding_gain: str | None = None
    tied: bool = False
    missing: dict[str, str] = field(default_factory=dict)

    def skip(self) -> int:
        """Return how many rows in front of the table of positions stand for no position."""
        positions = self.tokens.positions
        if positions.skip_through is None:
            return positions.skip
        key, default = positions.skip_through
        value = self.config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigMismatchError(
                f"{self.reader.label}: the configuration's {key}={reprlib.repr(value)} is not a "
                "whole number, and the table of positions begins after it."
            )
        return value + 1

    def first(self, what: str, candidates: list[str], projection: str | None = None) -> str | None:
        """Return the first of the names that is there; else say what was looked for, and where."""
        present = self.reader.names()
        if projection is not None and self.prefix + projection not in present:
            candidates = [self.prefix + projection]
        for name in candidates:
            if name in present:
                return name
        looked_for = " or ".join(map(repr, candidates))
        self.missing[what] = f"there is no tensor {looked_for} in {self.reader.label}"
        return None


def find_tokens(checkpoint: Checkpoint, part: str | None, compare: bool) -> TokenSources:
    """Find the tensors at both ends of a model's stream.

    Parameters
    ----------
    checkpoint : Checkpoint
    part : {"encoder", "decoder", "cross"} or None
    compare : bool
        Read both ends where the configuration ties them and both are stored: they are tied only
        if they are equal. If False, the configuration is believed.

    Returns
    -------
    TokenSources
    """
    found = _facts(checkpoint, part)
    tokens, prefix = found.tokens, found.prefix
    found.embedding = found.first(
        "embedding", [prefix + name for name in tokens.embedding], tokens.into
    )
    if tokens.no_unembedding is None:
        found.unembedding = found.first("unembedding", list(tokens.unembedding), tokens.out_of)
    else:
        found.missing["unembedding"] = f"{tokens.no_unembedding} ({found.reader.label})"
    found.positions = _find_positions(found)
    found.final_gain = _find_final_gain(found)
    if tokens.embedding_norm is not None:
        found.embedding_gain = found.first("embedding_gain", [prefix + tokens.embedding_norm.gain])
    _settle_ties(found, compare)
    return found


def _facts(checkpoint: Checkpoint, part: str | None) -> TokenSources:
    reader, outer = checkpoint.reader, checkpoint.config or {}
    if has_lens_names(reader.names()):
        tokens = checkpoint.tokens or lens_tokens(reader, checkpoint.config)
        return TokenSources(reader, outer, tokens, "", said_to_tie=False)
    family, config, chosen = resolve(outer, reader, part)
    prefix = find_prefix(family, chosen, reader)
    stated = outer.get("tie_word_embeddings")
    said_to_tie = bool(chosen.tokens.tied if stated is None else stated)
    return TokenSources(reader, config, chosen.tokens, prefix, said_to_tie)


def _find_positions(found: TokenSources) -> str | None:
    positions, label = found.tokens.positions, found.reader.label
    if positions.absent is not None:
        found.missing["positions"] = f"{positions.absent} ({label})"
    elif positions.kind == "unknown":
        found.missing["positions"] = (
            f"neither a tensor nor a configuration says how {label} knows positions"
        )
    elif positions.table is not None:
        projection = found.tokens.into if positions.projected else None
        return found.first("positions", [found.prefix + positions.table], projection)
    return None


def _find_final_gain(found: TokenSources) -> str | None:
    norm = found.tokens.final_norm
    if norm is not None:
        return found.first("final_gain", [found.prefix + norm.gain])
    if found.tokens.final_kind == "unknown":
        found.missing["final_gain"] = (
            f"there is no tensor 'ln_final.w' in {found.reader.label}: it has no final norm, or "
            "its gain was folded before it was saved"
        )
    return None


def _settle_ties(found: TokenSources, compare: bool) -> None:
    """Let one stored tensor stand for both ends where they are tied.

    A configuration that ties them does not count if both are stored and differ.
    """
    embedding, unembedding = found.embedding, found.unembedding
    stored = embedding is not None and unembedding is not None
    if found.tokens.columns:
        found.tied = stored and _share_memory(found.reader, str(embedding), str(unembedding))
        return
    if found.tokens.no_unembedding is not None or not found.said_to_tie:
        return
    if stored and compare and not _are_equal(found.reader, str(embedding), str(unembedding)):
        return
    found.tied = True
    found.embedding = found.unembedding = embedding or unembedding
    if found.embedding is None:
        other = found.prefix + found.tokens.embedding[0]
        found.missing["unembedding"] += f", nor {other!r}, to which it is tied"
    else:
        found.missing.pop("embedding", None)
        found.missing.pop("unembedding", None)


def _share_memory(reader: TensorReader, embedding: str, unembedding: str) -> bool:
    """Whether an unembedding, stored as columns, is the embedding turned round."""
    one, other = reader.tensor(embedding), reader.tensor(unembedding)
    turned = one.shape == other.shape[::-1] and one.stride() == other.stride()[::-1]
    return turned and one.data_ptr() == other.data_ptr()


def _are_equal(reader: TensorReader, embedding: str, unembedding: str) -> bool:
    one, other = reader.tensor(embedding), reader.tensor(unembedding)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.data_ptr() == other.data_ptr() or bool(torch.equal(one, other))
