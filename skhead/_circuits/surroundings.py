"""Reading what the heads of a model stand in: tokens, positions, and which of them are missing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch

from skhead._circuits.scores import GROUPS, HeadStacks, Surroundings, TokenEnds
from skhead.linalg.positions import unit_rows
from skhead.linalg.stacks import expand
from skhead.linalg.vocabulary import Vocabulary, row_products
from skhead.weights import describe_sources, read_role
from skhead.weights.tokens import Rotary, TokenSpace, read_token_space

__all__ = ["ModelReader", "Reading"]

_NEEDS_EMBEDDING = ("qk_matching", "qk_diagonal", "qk_top1_self", *GROUPS["induction"])
_NEEDS_UNEMBEDDING = ("ov_copying", "ov_diagonal", "ov_top1_self", "induction_strength")
_NEEDS_POSITIONS = (*GROUPS["positions"], "induction_strength")
_TOKENS = {*GROUPS["tokens"], *GROUPS["induction"]}
_POSITIONS = set(_NEEDS_POSITIONS)
#: What the norm behind the embedding acts on.
_STREAM_TABLES = ("embedding", "positions")
#: Fewest positions among which the first, the previous and the current one differ.
_FEWEST_POSITIONS = 3


@dataclass(frozen=True)
class Reading:
    """How the weights of a model are read.

    Attributes
    ----------
    fold_norm, center : bool
    device : torch.device or str
    n_positions : int
    position_scale : float
    n_tokens : int or None
    relative_position : int
    """

    fold_norm: bool
    center: bool
    device: torch.device | str
    n_positions: int
    position_scale: float
    n_tokens: int | None
    relative_position: int

    @property
    def processing(self) -> dict[str, Any]:
        """Arguments of everything that reads weights."""
        return {"fold_norm": self.fold_norm, "center": self.center, "device": self.device}


class ModelReader:
    """Reads heads of one source, some layers at a time, and what they stand in.

    Parameters
    ----------
    heads : DataFrame
        Heads table of the source.
    reading : Reading
    """

    def __init__(self, heads: pd.DataFrame, reading: Reading) -> None:
        self.heads = heads
        self.reading = reading
        self.source = str(heads["source"].iloc[0])
        self._space: TokenSpace = read_token_space(self.source, tables=())
        self._unfoldable = _unfoldable(self._space) if reading.fold_norm else {}

    def read(self, rows: pd.DataFrame) -> HeadStacks:
        """All four matrices of heads, of whatever layers.

        Parameters
        ----------
        rows : DataFrame
            Rows of a heads table.
        """
        roles, eps = {}, {}
        for role in "QKVO":
            read = read_role(rows, role, **self.reading.processing)
            roles[role] = expand(read.tensor, read.index)
            eps[role] = torch.from_numpy(read.eps[read.index])
        return HeadStacks(roles, eps)

    def by_layer(self, rows: pd.DataFrame, stacks: HeadStacks) -> Iterator[HeadStacks]:
        """The same heads layer by layer, each with the layer's rotary positions.

        Parameters
        ----------
        rows : DataFrame
            Rows of a heads table, those of a layer next to each other.
        stacks : HeadStacks
            What `read` returned for them.
        """
        layers = rows["layer"].to_numpy()
        starts = np.flatnonzero(np.r_[True, layers[1:] != layers[:-1]]).tolist()
        for start, end in pairwise([*starts, len(layers)]):
            yield replace(stacks[start:end], rotary=self._rotary(int(layers[start])))

    def queries(self, rows: pd.DataFrame, stacks: HeadStacks) -> torch.Tensor:
        """W_Q of heads for keys that lie ``relative_position`` positions back.

        Parameters
        ----------
        rows, stacks
            As for `by_layer`.
        """
        offset = self.reading.relative_position
        if offset == 0 or self._space.position_kind != "rotary":
            return stacks.roles["Q"]
        return torch.cat([part.queries_at(offset) for part in self.by_layer(rows, stacks)])

    def _rotary(self, layer: int) -> Rotary | None:
        if self._space.position_kind != "rotary" or "rotary" in self._space.missing:
            return None
        return self._space.rotary_at(layer)

    def missing(self, names: Collection[str]) -> dict[str, str]:
        """By score, which ingredient the model lacks.

        Parameters
        ----------
        names : collection of str
        """
        return self._missing(self._read_space(names), names)

    def surroundings(self, names: Collection[str]) -> Surroundings:
        """What the given scores need beside the heads.

        Parameters
        ----------
        names : collection of str
        """
        space = self._read_space(names)
        missing = self._missing(space, names)
        present = [name for name in names if name not in missing]
        matching, copying = self._token_ends(space, present)
        normed = describe_sources(self.heads.iloc[:1])[0].norm != "none"
        positions, mean_token = None, None
        if any(name in _POSITIONS for name in present):
            if space.positions is not None:
                rows = space.positions[: self.reading.n_positions]
                positions = rows.double()
                if normed:
                    positions = self.reading.position_scale * unit_rows(rows)
            elif space.embedding is not None:
                mean_token = _mean_row(space.embedding, normed)
        n_positions = self.reading.n_positions if positions is None else len(positions)
        return Surroundings(matching, copying, positions, mean_token, n_positions, missing)

    def _read_space(self, names: Collection[str]) -> TokenSpace:
        """The tables that the scores need, and no others."""
        tables = []
        rotary = self._space.position_kind == "rotary"
        if _TOKENS & set(names) or (rotary and _POSITIONS & set(names)):
            tables.append("embedding")
        if set(_NEEDS_UNEMBEDDING) & set(names):
            tables.append("unembedding")
        if _POSITIONS & set(names):
            tables.append("positions")
        tables = [table for table in tables if table not in self._unfoldable]
        if not tables:
            return self._space
        return read_token_space(self.source, tables=tables, **self.reading.processing)

    def _token_ends(
        self, space: TokenSpace, names: Collection[str]
    ) -> tuple[TokenEnds | None, TokenEnds | None]:
        """The ends of QK circuits and of OV circuits."""
        if not _TOKENS & set(names) or space.embedding is None:
            return None, None
        inputs = Vocabulary.of(space.embedding)
        asked = self._asked(space.embedding)
        matching = TokenEnds(inputs, inputs, inputs.gram, asked)
        if space.unembedding is None or not set(_NEEDS_UNEMBEDDING) & set(names):
            return matching, None
        if space.unembedding is space.embedding:
            return matching, matching
        cross = row_products(space.unembedding, space.embedding)
        return matching, TokenEnds(inputs, Vocabulary.of(space.unembedding), cross, asked)

    def _asked(self, embedding: torch.Tensor) -> torch.Tensor:
        """Tokens for the top-1 shares, evenly spread over the vocabulary."""
        n_vocab, limit = len(embedding), self.reading.n_tokens
        count = n_vocab if limit is None else min(limit, n_vocab)
        places = np.floor(np.linspace(0, n_vocab, count, endpoint=False)).astype(np.int64)
        return torch.as_tensor(places, device=embedding.device)

    def _missing(self, space: TokenSpace, names: Collection[str]) -> dict[str, str]:
        """By score, which ingredient is not there."""
        reasons: dict[str, str] = {}
        for ingredient, needing in (
            (self._lacks(space, "embedding"), _NEEDS_EMBEDDING + _NEEDS_UNEMBEDDING),
            (self._lacks(space, "unembedding"), _NEEDS_UNEMBEDDING),
            (self._lacks_positions(space), _NEEDS_POSITIONS),
        ):
            if ingredient is not None:
                reasons |= {n: ingredient for n in needing if n in names and n not in reasons}
        return {name: reasons[name] for name in names if name in reasons}

    def _lacks(self, space: TokenSpace, table: str) -> str | None:
        vectors = getattr(space, table)
        if vectors is None:
            return self._unfoldable.get(table, space.missing.get(table))
        other = space.embedding
        if table == "unembedding" and other is not None and len(other) != len(vectors):
            return (
                f"its unembedding has {len(vectors)} tokens and its embedding {len(other)}, so "
                "that no circuit leads from each token to itself"
            )
        return None

    def _lacks_positions(self, space: TokenSpace) -> str | None:
        kind = space.position_kind
        if kind == "learned":
            if space.positions is None:
                return self._lacks(space, "positions")
            if len(space.positions) < _FEWEST_POSITIONS:
                return f"it has {len(space.positions)} positions, too few to tell apart"
            return None
        if kind == "rotary":
            return space.missing.get("rotary", self._lacks(space, "embedding"))
        return f"its positions are of the kind {kind!r}, of which no positional circuit is known"


def _unfoldable(space: TokenSpace) -> dict[str, str]:
    """By table that is there, why the gain to fold into it is not."""
    reasons: dict[str, str] = {}
    for gain, norm, kind, tables in (
        ("final_gain", "in front of the unembedding", space.final_norm, ("unembedding",)),
        ("embedding_gain", "behind the embedding", space.embedding_norm, _STREAM_TABLES),
    ):
        if gain in space.missing and kind != "unknown":
            why = f"{space.missing[gain]}, the gain of the norm {norm} to fold with fold_norm=True"
            reasons |= {table: why for table in tables if table not in space.missing}
    return reasons


def _mean_row(vectors: torch.Tensor, normed: bool) -> torch.Tensor:
    """Mean of the rows in float64, each brought to root mean square 1 before if asked."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for rows in vectors.split(4096):
        total += (unit_rows(rows) if normed else rows.double()).sum(0)
    return total / len(vectors)
