"""How the pairs of heads are cut into tiles: so that workers finish soonest within their memory.

A tile forms the factors of its heads anew, which costs more the smaller the tiles are; larger ones
leave workers idle and ask for more memory. Cuts of several finenesses are priced in floating-point
operations and the one whose last worker finishes first is taken.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._base import defined_pairs
from skhead._callers import warn_user
from skhead.exceptions import MemoryBudgetError
from skhead.linalg.bands import Block
from skhead.linalg.kernels import plan_overlaps

__all__ = ["Factors", "Tile", "Tiling"]

#: What a factor costs before it meets another, in units of d_model * d_head^2, by measurement:
#: reading, and a basis in float64.
_PREPARATION = 40.0
#: What a task costs whatever it computes: some 10 ms of a core.
_TASK = 1e9
#: Tiles per worker up to which a cheaper cut is sought.
_TILES_PER_WORKER = 8
#: Rows to columns of groups, or the other way, up to which a cut is tried.
_LONGEST = 4
#: Work, relative to one process without limits, beyond which small tiles are worth a warning.
_MUCH_WORK = 1.5
#: Share of the memory that the heads' matrices leave to what is computed from them.
_SCRATCH_SHARE = 0.5
_ITEMSIZE = 4

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Factors:
    """What a kernel multiplies.

    Attributes
    ----------
    rows, columns : tuple of str
        Roles of the stacks of either side; in those of K and V, heads share matrices.
    blocks : tuple of (int, int)
        Which row stack against which column stack.
    copies : int
        Matrices held at once for each factor.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    blocks: tuple[Block, ...]
    copies: int

    @classmethod
    def of(cls, pairs: Sequence[str], copies: int) -> Factors:
        """One stack for every role on each side."""
        rows, columns = (tuple(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1))
        blocks = tuple((rows.index(pair[0]), columns.index(pair[1])) for pair in pairs)
        return cls(rows, columns, blocks, copies)


@dataclass(frozen=True)
class Tile:
    """Heads that one task compares.

    Attributes
    ----------
    rows, columns : ndarray of int64
        Positions in the heads tables; one object where the heads are compared with themselves.
    pairs : tuple of str
    max_memory : int
        Bytes that are left for scratch beside the matrices of the heads.
    flops : float
        What it costs.
    """

    rows: Positions
    columns: Positions
    pairs: tuple[str, ...]
    max_memory: int
    flops: float


class Tiling:
    """The pairs of two heads tables, to be cut into tiles.

    Parameters
    ----------
    rows, columns : DataFrame
        Heads tables; None for columns that are the rows.
    pairs : tuple of str
        Pair kinds.
    layer_order : {"forward", "all"}
    factors_of : callable
        From pair kinds to what is multiplied for them.
    max_memory : int
        Bytes that a worker may hold.

    Attributes
    ----------
    right : DataFrame
        The heads table of the columns.
    mirrored : bool
        Whether a tile also gives the values of its mirror image.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        columns: pd.DataFrame | None,
        pairs: tuple[str, ...],
        layer_order: str,
        factors_of: Callable[[Sequence[str]], Factors],
        max_memory: int,
    ) -> None:
        self.rows, self.columns, self.pairs = rows, columns, pairs
        self.right = rows if columns is None else columns
        self.mirrored = columns is None and layer_order == "all"
        self._factors_of = factors_of
        self._max_memory = max_memory
        self._left_side = _Side(rows)
        self._right_side = self._left_side if columns is None else _Side(columns)
        self._defined = None
        if layer_order != "all":
            self._defined = defined_pairs(rows, self.right, False, layer_order)
        self._prices: dict[tuple[object, ...], tuple[int, float]] = {}

    def plan(self, workers: int, caller: str) -> list[Tile]:
        """Tiles of the cut whose last worker finishes first, the dearest tile first.

        Parameters
        ----------
        workers : int
        caller : str
            Estimator to name.

        Raises
        ------
        MemoryBudgetError
            If the tiles of single heads do not fit into the memory.
        """
        most = workers * _TILES_PER_WORKER
        best: list[Tile] = []
        soonest = math.inf
        for cut in self._cuts():
            if best and math.prod(cut) > most:
                break
            tiles = self._tiles(*cut)
            finished = _finish(tiles, workers)
            if finished < soonest:
                best, soonest = tiles, finished
        if not best:
            raise MemoryBudgetError(
                f"{caller}: max_memory is {self._max_memory} bytes, which is too little to "
                "compare one head with another; raise max_memory"
            )
        self._warn_of_small_tiles(best, most, caller)
        return sorted(best, key=lambda tile: -tile.flops)

    def _cuts(self) -> Iterator[tuple[int, int]]:
        """Numbers of row and column groups whose tiles fit into the memory, the fewest first."""
        left, right = (_finenesses(len(heads)) for heads in (self.rows, self.right))
        for cut in sorted(product(left, right), key=math.prod):
            if (self.mirrored and cut[0] != cut[1]) or max(cut) > _LONGEST * min(cut):
                continue
            rows = self._left_side.order[self._left_side.cut(cut[0])[0]]
            columns = self._right_side.order[self._right_side.cut(cut[1])[0]]
            if math.isfinite(self._price(rows, columns, self.pairs)[1]):
                yield cut

    def _tiles(self, n_rows: int, n_columns: int) -> list[Tile]:
        left, right = self._left_side.cut(n_rows), self._right_side.cut(n_columns)
        tiles = []
        for (i, rows), (j, columns) in product(enumerate(left), enumerate(right)):
            pairs = self.pairs
            if self.mirrored and i > j:
                pairs = tuple(pair for pair in pairs if pair[::-1] not in pairs)
            needed = self._needed(rows, columns)
            if pairs and needed[0].size:
                tiles.append(self._tile(*needed, pairs))
        return tiles + self._left_over(tiles, n_rows, n_columns)

    def _needed(self, rows: slice, columns: slice) -> tuple[Positions, Positions]:
        """The heads of which some pair is defined."""
        left, right = self._left_side.order[rows], self._right_side.order[columns]
        if self._defined is None:
            return (left, left) if self.mirrored and rows == columns else (left, right)
        defined = self._defined[np.ix_(left, right)]
        return left[defined.any(axis=1)], right[defined.any(axis=0)]

    def _left_over(self, tiles: list[Tile], n_rows: int, n_columns: int) -> list[Tile]:
        """Tiles for heads without any defined pair, of which rank and size are asked all the same.

        A head of one side meets one of the other side, as a tile has two sides.
        """
        missing = [
            side.order[~np.isin(side.order, np.concatenate([[], *seen]))]
            for side, seen in (
                (self._left_side, [tile.rows for tile in tiles]),
                (self._right_side, [tile.columns for tile in tiles]),
            )
        ]
        groups = [
            [group for group in np.array_split(heads, n) if group.size]
            for heads, n in zip(missing, (n_rows, n_columns), strict=True)
        ]
        any_row, any_column = self._left_side.order[:1], self._right_side.order[:1]
        return [
            self._tile(
                any_row if rows is None else rows,
                any_column if columns is None else columns,
                self.pairs,
            )
            for rows, columns in zip_longest(*groups)
        ]

    def _tile(self, rows: Positions, columns: Positions, pairs: tuple[str, ...]) -> Tile:
        return Tile(rows, columns, pairs, *self._price(rows, columns, pairs))

    def _price(
        self, rows: Positions, columns: Positions, pairs: tuple[str, ...]
    ) -> tuple[int, float]:
        """Bytes left for scratch, and operations; infinitely many if the tile does not fit."""
        factors = self._factors_of(pairs)
        left = self._left_side.shapes(factors.rows, rows)
        right = self._right_side.shapes(factors.columns, columns)
        share = 1.0
        if self._defined is not None:
            share = float(self._defined[np.ix_(rows, columns)].mean())
        key = (pairs, share, *left, *right)
        if key not in self._prices:
            self._prices[key] = self._new_price(factors, left, right, share, self._max_memory)
        return self._prices[key]

    def _new_price(
        self,
        factors: Factors,
        left: list[_Shape],
        right: list[_Shape],
        share: float,
        max_memory: int,
    ) -> tuple[int, float]:
        held = factors.copies * _ITEMSIZE * sum(math.prod(shape) for shape in left + right)
        scratch = max_memory - held
        if scratch < max_memory * _SCRATCH_SHARE:
            return scratch, math.inf
        rows, columns = (
            [torch.empty(shape, device="meta") for shape in side] for side in (left, right)
        )
        spans = {
            (i, j): np.tile([0, round(share * len(columns[j]))], (len(rows[i]), 1))
            for i, j in factors.blocks
        }
        try:
            overlaps = plan_overlaps(rows, columns, factors.blocks, scratch, spans=spans).flops
        except MemoryBudgetError:
            return scratch, math.inf
        preparation = sum(n * d_model * d_head**2 for n, d_model, d_head in left + right)
        return scratch, overlaps + _PREPARATION * preparation + _TASK

    def _warn_of_small_tiles(self, tiles: list[Tile], most: int, caller: str) -> None:
        if len(tiles) <= most:
            return
        factors = self._factors_of(self.pairs)
        left = self._left_side.shapes(factors.rows, self._left_side.order)
        right = self._right_side.shapes(factors.columns, self._right_side.order)
        work = sum(tile.flops - _TASK for tile in tiles)
        share = 1.0 if self._defined is None else float(self._defined.mean())
        work /= self._new_price(factors, left, right, share, sys.maxsize)[1]
        if work > _MUCH_WORK:
            warn_user(
                f"{caller}: within max_memory={self._max_memory} bytes a worker holds so few heads "
                f"that all workers together do {work:.1f} times the work of one process that "
                "holds all heads; raise max_memory where workers have more"
            )


_Shape = tuple[int, int, int]


class _Side:
    """Heads of one side, ordered so that neighbours are of one layer."""

    def __init__(self, heads: pd.DataFrame) -> None:
        self._size = int(heads["d_model"].iloc[0]), int(heads["d_head"].iloc[0])
        sources = pd.factorize(heads["source"])[0]
        keys = heads["head"].to_numpy(), heads["layer"].to_numpy(), sources
        self.order = np.lexsort(keys).astype(np.int64)
        shared = heads.groupby(["source", "layer", "kv_head"], sort=False)
        self._shared = shared.ngroup().to_numpy()

    def cut(self, n_groups: int) -> list[slice]:
        """Groups of neighbours whose sizes differ by one at most, the largest first."""
        size, larger = divmod(len(self.order), n_groups)
        ends = [size * k + min(k, larger) for k in range(n_groups + 1)]
        return [slice(*ends[k : k + 2]) for k in range(n_groups)]

    def shapes(self, roles: Sequence[str], heads: Positions) -> list[_Shape]:
        """Shapes of the stacks of distinct matrices."""
        shared = len(np.unique(self._shared[heads]))
        return [(shared if role in "KV" else len(heads), *self._size) for role in roles]


def _finenesses(n_heads: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to the number of heads."""
    powers = [2**k for k in range(n_heads.bit_length())]
    return sorted({n for p in powers for n in (p, 3 * p // 2) if n <= n_heads} | {n_heads})


def _finish(tiles: Sequence[Tile], workers: int) -> float:
    """When the last worker finishes, if each takes the dearest tile that is left."""
    ends = [0.0] * min(workers, len(tiles))
    for tile in sorted(tiles, key=lambda tile: -tile.flops):
        heapq.heappush(ends, heapq.heappop(ends) + tile.flops)
    return max(ends)
