"""Which pairs of heads a set of overlap blocks asks for, in bands that are computed at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from skhead.linalg.stacks import Stack

__all__ = [
    "Band",
    "Block",
    "ColumnBand",
    "Spans",
    "UsedHeads",
    "band_area",
    "column_bands",
    "row_bands",
    "used_heads",
]

#: Row heads of a band of rows come in multiples of this.
_ROW_STEP = 48
#: Beyond that many numbers of row heads little work is saved; CPU libraries keep almost a megabyte
#: for every size of product that they have met.
_MOST_ROW_SIZES = 12

Block = tuple[int, int]
#: By block, the first column head that each row head asks for, and the one after the last.
Spans = Mapping[Block, NDArray[np.int64]]
Band = tuple[slice, slice]
#: Neighbouring heads of a stack.
Segment = tuple[int, slice]
_Asked = dict[Block, NDArray[np.int64]]


def _asked(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    blocks: Sequence[Block],
    spans: Spans | None,
) -> _Asked:
    """Of every block to compute, the column heads that each row head asks for, as in `Spans`.

    Of two mirrored blocks one is computed, and of a block that is its own mirror one triangle.
    """
    right = rows if columns is None else columns
    found: _Asked = {}
    for i, j in sorted(set(blocks)):
        mirrored = columns is None and (j, i) in blocks
        if mirrored and (j, i) in found:
            continue
        asked = None if spans is None or (mirrored and i != j) else spans.get((i, j))
        if asked is None:
            first = np.arange(len(rows[i])) if mirrored and i == j else np.zeros(len(rows[i]))
            stop = np.full(len(rows[i]), len(right[j]))
            asked = np.stack([first, stop], axis=1).astype(np.int64)
        found[i, j] = asked
    return found


def row_bands(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    blocks: Sequence[Block],
    spans: Spans | None,
) -> dict[Block, list[Band]]:
    """Of every block to compute, bands of row heads with the column heads they ask for.

    Parameters
    ----------
    rows, columns, blocks, spans
        As for `skhead.linalg.kernels.overlap_blocks`.

    Returns
    -------
    dict of (int, int) -> list of (slice, slice)
        Of mirrored blocks one, and of a block that is its own mirror one triangle.
    """
    return {block: _cut(a) for block, a in _asked(rows, columns, blocks, spans).items()}


def _cut(asked: NDArray[np.int64]) -> list[Band]:
    """Bands of neighbouring rows, each with all columns from the first to the last asked for."""
    height = _ROW_STEP * max(-(-len(asked) // (_ROW_STEP * _MOST_ROW_SIZES)), 1)
    bands: list[Band] = []
    asking = asked[:, 0] < asked[:, 1]
    for start in range(0, len(asked), height):
        rows = start + np.flatnonzero(asking[start : start + height])
        if not len(rows):
            continue
        band = slice(int(rows[0]), int(rows[-1]) + 1)
        columns = slice(int(asked[rows, 0].min()), int(asked[rows, 1].max()))
        if bands and bands[-1][0].stop == band.start and bands[-1][1] == columns:
            band = slice(bands.pop()[0].start, band.stop)
        bands.append((band, columns))
    return bands


def band_area(band: Band) -> int:
    """Pairs of heads in a band."""
    return math.prod(map(_length, band))


def _length(heads: slice) -> int:
    """Heads in a slice."""
    return int(heads.stop - heads.start)


@dataclass(frozen=True)
class ColumnBand:
    """Column heads of all stacks, and the row heads from the first to the last they ask for.

    Attributes
    ----------
    rows, columns : tuple of (int, slice)
        Stacks and neighbouring heads of them.
    """

    rows: tuple[Segment, ...]
    columns: tuple[Segment, ...]

    @property
    def width(self) -> int:
        """Column heads."""
        return sum(_length(heads) for _, heads in self.columns)

    @property
    def area(self) -> int:
        """Pairs of heads."""
        return self.width * sum(_length(heads) for _, heads in self.rows)


def column_bands(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    blocks: Sequence[Block],
    spans: Spans | None,
    step: int,
) -> list[ColumnBand]:
    """Bands of `step` column heads, of all stacks, that ask for nearly the same row heads.

    Parameters
    ----------
    rows, columns, blocks, spans
        As for `skhead.linalg.kernels.overlap_blocks`.
    step : int
        Column heads of a band; there are fewer in the last one, in the last before columns that
        ask for heads of other row stacks, and, where `columns` is None, in the last before columns
        that ask for nothing.

    Returns
    -------
    list of ColumnBand
        Where `columns` is None, a band is of columns that follow each other in and across stacks;
        of mirrored blocks one is in the bands, and of a block that is its own mirror one triangle.
    """
    runs = list(_runs(rows, columns, _asked(rows, columns, blocks, spans)))
    if columns is not None:
        runs.sort(key=lambda run: run.hulls.tolist())
    groups: list[list[_Run]] = []
    room = 0
    for run in runs:
        rest: _Run | None = run
        while rest is not None:
            last = groups[-1][-1] if groups else None
            joins = last is not None and np.array_equal(rest.asking, last.asking)
            if columns is None and last is not None:
                joins = joins and rest.follows(last, rows)
            if not joins or not room:
                groups.append([])
                room = step
            part, rest = rest.split(room)
            groups[-1].append(part)
            room -= _length(part.heads)
    return _alike([_band(group) for group in groups])


def _alike(bands: Sequence[ColumnBand]) -> list[ColumnBand]:
    """Bands with few numbers of row heads, some of which take in more than they ask for."""
    ends: dict[tuple[int, int], set[int]] = {}
    for band in bands:
        for i, heads in band.rows:
            ends.setdefault((i, heads.start), set()).add(heads.stop)
    kept = {
        place: np.array(sorted(stops)[:: -_thinning(stops)][::-1]) for place, stops in ends.items()
    }

    def widened(i: int, heads: slice) -> Segment:
        stops = kept[i, heads.start]
        return i, slice(heads.start, int(stops[np.searchsorted(stops, heads.stop)]))

    return [
        ColumnBand(tuple(widened(*segment) for segment in band.rows), band.columns)
        for band in bands
    ]


def _thinning(stops: Collection[int]) -> int:
    """Of how many different ends one is kept."""
    return -(-len(stops) // _MOST_ROW_SIZES)


@dataclass(frozen=True)
class _Run:
    """Neighbouring heads of a column stack that ask for the same heads of every row stack."""

    stack: int
    heads: slice
    hulls: NDArray[np.int64]

    @property
    def asking(self) -> NDArray[np.bool_]:
        """Which row stacks it asks for."""
        return self.hulls[:, 0] < self.hulls[:, 1]

    def split(self, count: int) -> tuple[_Run, _Run | None]:
        """Its first heads, at most so many, and the others."""
        start, stop = self.heads.start, self.heads.stop
        if stop - start <= count:
            return self, None
        middle = start + count
        first, second = slice(start, middle), slice(middle, stop)
        return _Run(self.stack, first, self.hulls), _Run(self.stack, second, self.hulls)

    def follows(self, other: _Run, stacks: Sequence[Stack]) -> bool:
        """Whether its first head comes after the other's last, of all heads in a row."""
        if self.stack == other.stack:
            return bool(self.heads.start == other.heads.stop)
        ends = other.heads.stop == len(stacks[other.stack]) and self.heads.start == 0
        return bool(self.stack == other.stack + 1 and ends)


def _runs(rows: Sequence[Stack], columns: Sequence[Stack] | None, asked: _Asked) -> Iterator[_Run]:
    """All column heads that ask for anything, in order."""
    for j, stack in enumerate(rows if columns is None else columns):
        hulls = np.zeros((len(stack), len(rows), 2), dtype=np.int64)
        for i in range(len(rows)):
            if (i, j) in asked:
                hulls[:, i] = _by_column(asked[i, j], len(stack))
        changes = np.flatnonzero((hulls[1:] != hulls[:-1]).any((1, 2))) + 1
        edges = [0, *changes.tolist(), len(stack)] if len(stack) else []
        for start, stop in itertools.pairwise(edges):
            run = _Run(j, slice(start, stop), hulls[start])
            if run.asking.any():
                yield run


def _by_column(asked: NDArray[np.int64], n_columns: int) -> NDArray[np.int64]:
    """Of each column head the first and the last row head that ask for it, plus one; 0 if none."""
    n_rows = len(asked)
    found = np.tile(np.array([n_rows, 0], dtype=np.int64), (n_columns, 1))
    ranges, places = np.unique(asked, axis=0, return_inverse=True)
    first, last = np.full(len(ranges), n_rows), np.zeros(len(ranges), dtype=np.int64)
    np.minimum.at(first, places.ravel(), np.arange(n_rows))
    np.maximum.at(last, places.ravel(), np.arange(n_rows) + 1)
    for (start, stop), low, high in zip(ranges.tolist(), first, last, strict=True):
        part = found[start:stop]
        np.minimum(part[:, 0], low, out=part[:, 0])
        np.maximum(part[:, 1], high, out=part[:, 1])
    found[found[:, 0] >= found[:, 1]] = 0
    return found


def _band(runs: Sequence[_Run]) -> ColumnBand:
    """Runs that ask for the same row stacks, joined."""
    columns: list[Segment] = []
    for run in sorted(runs, key=lambda run: (run.stack, run.heads.start)):
        if columns and columns[-1] == (run.stack, slice(columns[-1][1].start, run.heads.start)):
            columns[-1] = run.stack, slice(columns[-1][1].start, run.heads.stop)
        else:
            columns.append((run.stack, run.heads))
    first = np.min([run.hulls[:, 0] for run in runs], axis=0)
    last = np.max([run.hulls[:, 1] for run in runs], axis=0)
    asking = np.flatnonzero(runs[0].asking)
    rows = [(int(i), slice(int(first[i]), int(last[i]))) for i in asking]
    return ColumnBand(tuple(rows), tuple(columns))


@dataclass(frozen=True)
class UsedHeads:
    """Of the stacks of one side, the heads from the first to the last that a band uses.

    Of heads in layer order, those of the last layer write for nobody and those of the first read
    nobody.
    """

    stacks: Sequence[Stack]
    firsts: Sequence[int]


def used_heads(
    rows: Sequence[Stack], columns: Sequence[Stack] | None, bands: Sequence[ColumnBand]
) -> list[UsedHeads]:
    """Both sides of the products, which are one where stacks are compared with themselves."""
    left = [segment for band in bands for segment in band.rows]
    right = [segment for band in bands for segment in band.columns]
    if columns is None:
        return [_hulls(rows, left + right)]
    return [_hulls(rows, left), _hulls(columns, right)]


def _hulls(stacks: Sequence[Stack], parts: Sequence[tuple[int, slice]]) -> UsedHeads:
    """The shortest part of each stack in which all its given parts lie."""
    spans = [(len(stack), 0) for stack in stacks]
    for i, part in parts:
        spans[i] = min(spans[i][0], part.start), max(spans[i][1], part.stop)
    heads = [slice(min(first, stop), stop) for first, stop in spans]
    return UsedHeads(
        [_some(*pair) for pair in zip(stacks, heads, strict=True)], [h.start for h in heads]
    )


def _some(stack: Stack, heads: slice) -> Stack:
    """Some neighbouring heads of a stack, where they lie."""
    if isinstance(stack, torch.Tensor):
        return stack[heads]
    if heads == slice(0, len(stack)):
        return stack
    return stack.take(np.arange(heads.start, heads.stop))
