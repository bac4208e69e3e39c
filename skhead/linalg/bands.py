"""Which pairs of heads a set of overlap blocks asks for: bands of rows with the same columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from skhead.linalg.stacks import Stack

__all__ = ["Band", "Block", "Spans", "UsedHeads", "band_area", "bands_of_blocks", "used_heads"]

#: Row heads of a band of the packed product come in multiples of this, three vectors of AVX-512, at
#: which its GEMM is as fast as any; beyond this number of bands little work is left to be saved.
_BAND_STEP = 48
_MOST_BANDS = 16

Block = tuple[int, int]
#: By block, the first column head that each row head asks for, and the one after the last.
Spans = Mapping[Block, NDArray[np.int64]]
Band = tuple[slice, slice]


def bands_of_blocks(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    blocks: Sequence[Block],
    spans: Spans | None,
) -> dict[Block, list[Band]]:
    """Of every block to compute, bands of row heads with the column heads they ask for.

    Of two mirrored blocks one is computed, and of a block that is its own mirror one triangle.
    """
    right = rows if columns is None else columns
    found: dict[Block, list[Band]] = {}
    for i, j in sorted(set(blocks)):
        mirrored = columns is None and (j, i) in blocks
        if mirrored and (j, i) in found:
            continue
        asked = None if spans is None or (mirrored and i != j) else spans.get((i, j))
        n_rows, n_columns = len(rows[i]), len(right[j])
        if asked is None and mirrored and i == j:
            first = np.arange(n_rows)
            asked = np.stack([first, np.full_like(first, n_rows)], axis=1)
        whole = [(slice(0, n_rows), slice(0, n_columns))]
        found[i, j] = whole if asked is None else _cut(asked)
    return found


def _cut(asked: NDArray[np.int64]) -> list[Band]:
    """Bands of neighbouring rows, each with all columns from the first to the last asked for."""
    height = _BAND_STEP * -(-len(asked) // (_BAND_STEP * _MOST_BANDS))
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
    return math.prod(part.stop - part.start for part in band)


@dataclass(frozen=True)
class UsedHeads:
    """Of the stacks of one side, the heads from the first to the last that a band uses.

    Of heads in layer order, those of the last layer write for nobody and those of the first read
    nobody.
    """

    stacks: Sequence[Stack]
    firsts: Sequence[int]


def used_heads(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    bands: Mapping[Block, Sequence[Band]],
) -> list[UsedHeads]:
    """Both sides of the products, which are one where stacks are compared with themselves."""
    left = [(i, band[0]) for (i, _), parts in bands.items() for band in parts]
    right = [(j, band[1]) for (_, j), parts in bands.items() for band in parts]
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
