"""Overlaps as inner products of the triangles of ``M = Y Y^T``, formed block by block.

A block of the residual space, ``width`` x ``width``, is formed for all heads, and its contribution
to all asked pairs is added before the next one. Of a block on the diagonal of M, which is
symmetric, only the triangle is kept: its two smaller diagonal blocks are folded into one square,
the upper triangle of one above the lower of the other. The diagonal of M goes into a product of its
own, in float64 where memory allows: it carries most of the sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from skhead.linalg.bands import Block, ColumnBand, Segment, UsedHeads, used_heads
from skhead.linalg.plans import OverlapPlan
from skhead.linalg.precision import product, wide
from skhead.linalg.stacks import Stack, StoredStack, new_empty

__all__ = ["packed_overlaps", "packed_step", "plan_packed"]

#: Width of a residual-space block, if memory allows; the factors are read from memory so often as
#: there are blocks in a row of M.
_PANEL = 128
_NARROWEST_PANEL = 8
#: From this d_model on, a block on the diagonal weighs little, and blocks are up to twice as wide.
_LARGE_MODEL = 2048
#: Numbers of a vector of AVX-512.
_VECTOR = 16
#: Devices on which a product of a strided batch is slow (meta tensors stand for those of a CPU).
_COPYING = ("cpu", "meta")
#: Numbers that are formed at a time: few enough to stay in a CPU's cache, and enough to keep
#: another device busy.
_CHUNK = 48 * 2**14
_DEVICE_CHUNK = 2**23
#: Of the memory budget, they get at most one part in so many, and so do blocks of more than _PANEL.
_SHARE = 8
#: Column heads of a band, of which there are to be few enough that their blocks stay in a CPU's
#: cache until they are multiplied.
_STEP = 48
#: What a CPU library keeps for a size of product, left free where panels would fill the budget.
_KEPT_BYTES = 2**20
_DEVICE_STEP = 256


def packed_step(device: torch.device) -> int:
    """Column heads of a band on a device, for `skhead.linalg.bands.column_bands`.

    Parameters
    ----------
    device : torch.device
    """
    return _STEP if device.type in _COPYING else _DEVICE_STEP


def plan_packed(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    bands: Sequence[ColumnBand],
    max_memory: int,
    precision: str,
) -> OverlapPlan:
    """Fit the packed product into a memory budget.

    Parameters
    ----------
    rows, columns, max_memory, precision
        As for `skhead.linalg.kernels.overlap_blocks`.
    bands : sequence of ColumnBand

    Returns
    -------
    OverlapPlan
        Its scratch is above `max_memory` where nothing fits.
    """
    sides = used_heads(rows, columns, bands)
    stacks = [stack for side in sides for stack in side.stacks]
    d_model, itemsize = rows[0].shape[1], rows[0].element_size()
    formed = sum(map(len, sides[0].stacks))
    if columns is not None:
        formed += max((band.width for band in bands), default=0)
    total_rank, stored_rank = _total_rank(stacks), _total_rank(_stored(stacks))
    areas = [band.area for band in bands]
    largest, sums = max(areas, default=0), 8 * sum(areas)
    # Diagonals are multiplied in float64, and what rounded blocks add is a table of its own.
    narrow = largest * (8 + itemsize * (precision == "medium"))
    chunk = _CHUNK if rows[0].device.type in _COPYING else _DEVICE_CHUNK
    chunk = min(chunk, max_memory // (_SHARE * itemsize))
    width = _PANEL
    if d_model >= _LARGE_MODEL:
        fitting = math.isqrt(max_memory // (_SHARE * itemsize * max(formed, 1)))
        width = min(max(fitting // _VECTOR * _VECTOR, _PANEL), 2 * _PANEL)
    while True:
        width = _even_width(d_model, width)
        panels = -(-d_model // width)
        panel = itemsize * stored_rank * width
        at_once = max((min(formed, _at_once(s, width, chunk)) for s in stacks), default=0)
        copied = sum(_copied_numbers(side.stacks, width, chunk) for side in sides)
        # A row of a diagonal lies there once, and twice in float64 while it is multiplied.
        blocks = formed * (width**2 + 5 * width) + at_once * width**2
        scratch = itemsize * (blocks + 2 * copied) + 2 * panel + narrow
        if scratch <= max_memory or width <= _NARROWEST_PANEL:
            break
        width = max(width // 2, _NARROWEST_PANEL)
    flops = float(d_model) * ((d_model + width / 2) * total_rank + (d_model + 2) * sum(areas))
    wider = sums + itemsize * largest
    wide_sums = scratch + wider <= max_memory
    scratch += wider * wide_sums
    group = 1
    if panel:
        kept = _KEPT_BYTES * len({str(band.rows) for band in bands})
        free = max_memory - scratch - min(kept, max_memory // _SHARE)
        group = min(panels, 1 + max(free, 0) // panel)
        scratch += (group - 1) * panel
    return OverlapPlan("packed", width, 0, group, chunk, wide_sums, scratch, flops)


def _even_width(d_model: int, widest: int) -> int:
    """Width of panels of nearly one size, that vectors divide and that can be folded."""
    share = -(-d_model // -(-d_model // widest))
    unit = _VECTOR if widest % _VECTOR == 0 else 2
    return min(-(-share // unit) * unit, widest, d_model)


def _stored(stacks: Sequence[Stack]) -> list[Stack]:
    """The stacks that lie in files."""
    return [stack for stack in stacks if isinstance(stack, StoredStack)]


def _total_rank(stacks: Sequence[Stack]) -> int:
    """Columns of all heads together."""
    return sum(len(stack) * stack.shape[2] for stack in stacks)


def _at_once(stack: Stack, width: int, chunk: int) -> int:
    """Heads of which a block is formed at a time."""
    return max(chunk // (width * max(width, stack.shape[2])), 1)


def _copied_numbers(stacks: Sequence[Stack], width: int, chunk: int) -> int:
    """Numbers of some heads' panels, of which a CPU makes contiguous copies."""
    n_heads = sum(map(len, stacks))
    sizes = [min(n_heads, _at_once(s, width, chunk)) * width * s.shape[2] for s in stacks]
    return max(sizes)


def packed_overlaps(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    bands: Sequence[ColumnBand],
    results: Mapping[Block, torch.Tensor],
    plan: OverlapPlan,
    precision: str,
    report: Callable[[float], None],
) -> None:
    """Put the overlaps of all bands into the results.

    Parameters
    ----------
    rows, columns, precision
        As for `skhead.linalg.kernels.overlap_blocks`.
    bands : sequence of ColumnBand
    results : mapping of (int, int) to Tensor of shape (n_row_heads, n_column_heads)
    plan : OverlapPlan
    report : callable
        Called with the fraction done.
    """
    used = used_heads(rows, columns, bands)
    rounded = precision == "medium" and rows[0].dtype == torch.float32
    sides = [_Side(heads, plan, rounded) for heads in used]
    left, right = sides[0], sides[-1]
    sums = [_Sum(band, left, right if right is left else None, results, plan) for band in bands]
    everyone = _Blocks(left, sum(map(len, left.stacks)))
    some = everyone
    if right is not left:
        some = _Blocks(right, max((band.width for band in bands), default=0))
    total, done = left.n_panels * (left.n_panels + 1) // 2, 0
    for start in range(0, left.n_panels, plan.group):
        group = range(start, min(start + plan.group, left.n_panels))
        for side in sides:
            side.load_rows(group)
        for q in range(start, left.n_panels):
            for side in sides:
                side.load_columns(q)
            for p in range(start, min(q + 1, group.stop)):
                everyone.form(left.everyone(), p, q)
                for band, found in zip(bands, sums, strict=True):
                    if some is not everyone:
                        some.form(band.columns, p, q)
                    found.add(everyone, some)
                done += 1
                report(done / total)
    for found in sums:
        found.finish()


@dataclass(frozen=True)
class _Piece:
    """Where the products of some row heads and column heads of a band belong."""

    rows: slice
    columns: slice
    result: torch.Tensor


class _Sum:
    """The inner products of one band, growing block by block of the residual space.

    Row heads are counted among all formed of the left side; column heads likewise where they are
    of the same side, or else within the band.
    """

    def __init__(
        self,
        band: ColumnBand,
        left: _Side,
        same: _Side | None,
        results: Mapping[Block, torch.Tensor],
        plan: OverlapPlan,
    ) -> None:
        first = same.span(*band.columns[0]).start if same is not None else 0
        self._columns = slice(first, first + band.width)
        self._parts: list[tuple[slice, torch.Tensor | None, list[_Piece]]] = []
        for segments in _neighbours(band.rows, left):
            spans = [left.span(*segment) for segment in segments]
            rows = slice(spans[0].start, spans[-1].stop)
            pieces = list(_pieces(segments, band, results))
            total = None
            if plan.wide_sums:
                total = wide(new_empty(left.stacks[0], rows.stop - rows.start, band.width)).zero_()
            else:
                for piece in pieces:
                    piece.result.zero_()
            self._parts.append((rows, total, pieces))

    def add(self, left: _Blocks, right: _Blocks) -> None:
        """Add the products of what is formed."""
        for rows, total, pieces in self._parts:
            if total is not None:
                a, b = left.numbers[rows], right.numbers[self._columns]
                total.add_(product(a, b.mT), alpha=left.weight)
                if left.diagonal is not None and right.diagonal is not None:
                    a, b = left.diagonal[rows], right.diagonal[self._columns]
                    total.addmm_(wide(a), wide(b).mT)
                continue
            for piece in pieces:
                self._add_piece(piece, rows.start, left, right)

    def _add_piece(self, piece: _Piece, first: int, left: _Blocks, right: _Blocks) -> None:
        """Add to a result itself."""
        rows = slice(first + piece.rows.start, first + piece.rows.stop)
        start = self._columns.start
        columns = slice(start + piece.columns.start, start + piece.columns.stop)
        a, b = left.numbers[rows], right.numbers[columns]
        if a.dtype == piece.result.dtype:
            piece.result.addmm_(a, b.mT, alpha=left.weight)
        else:
            piece.result.add_(product(a, b.mT), alpha=left.weight)
        if left.diagonal is not None and right.diagonal is not None:
            a, b = left.diagonal[rows], right.diagonal[columns]
            piece.result.add_(wide(a) @ wide(b).mT)

    def finish(self) -> None:
        """Put the sums into the results, once."""
        while self._parts:
            _, total, pieces = self._parts.pop()
            if total is not None:
                for piece in pieces:
                    piece.result.copy_(total[piece.rows, piece.columns])


def _neighbours(segments: Sequence[Segment], side: _Side) -> Iterator[list[Segment]]:
    """Segments that follow each other where their blocks are formed."""
    group: list[Segment] = []
    for segment in segments:
        if group and side.span(*group[-1]).stop != side.span(*segment).start:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def _pieces(
    rows: Sequence[Segment], band: ColumnBand, results: Mapping[Block, torch.Tensor]
) -> Iterator[_Piece]:
    """Where every block's part of a band's products belongs."""
    top = 0
    for i, heads in rows:
        bottom, left = top + heads.stop - heads.start, 0
        for j, others in band.columns:
            right = left + others.stop - others.start
            yield _Piece(slice(top, bottom), slice(left, right), results[i, j][heads, others])
            left = right
        top = bottom


class _Blocks:
    """Memory for one block of the M of many heads, a row each.

    Attributes
    ----------
    numbers : Tensor of shape (n_heads, n_numbers)
        Entries above the diagonal of M, or a block of them.
    weight : float
        How often each of them occurs in M.
    diagonal : Tensor of shape (n_heads, width) or None
        Entries of the diagonal of M, if the block lies on it.
    """

    def __init__(self, side: _Side, n_heads: int) -> None:
        self._side = side
        first, width = side.stacks[0], side.width
        dtype = torch.bfloat16 if side.rounded else first.dtype
        self._numbers = torch.empty(n_heads * width**2, dtype=dtype, device=first.device)
        self._diagonal = new_empty(first, n_heads * width)
        self.numbers, self.weight = self._numbers, 2.0
        self.diagonal: torch.Tensor | None = None

    def form(self, segments: Sequence[Segment], p: int, q: int) -> None:
        """Form block (p, q) of some heads; q is the loaded panel of columns."""
        side, count = self._side, sum(heads.stop - heads.start for _, heads in segments)
        height, width = side.height(p), side.height(q)
        folded = p == q and width % 2 == 0
        size = height * width // (2 if folded else 1)
        self.numbers = self._numbers[: count * size].view(count, size)
        self.diagonal, self.weight = None, 2.0
        if p == q:
            self.diagonal = self._diagonal[: count * width].view(count, width)
            self.weight = 2.0 if folded else 1.0
        start = 0
        for a, b in side.factors(segments, p, folded):
            heads = slice(start, start + len(a))
            out, start = self.numbers[heads], heads.stop
            if self.diagonal is None:
                _multiply(a, b, out.view(-1, height, width))
            elif folded:
                _fold(a, b, out.view(-1, 2, width // 2, width // 2), self.diagonal[heads])
            else:
                _whole(a, out.view(-1, width, width), self.diagonal[heads])


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """The products of some panels of factors."""
    if a.dtype == out.dtype:
        torch.bmm(a, b.mT, out=out)
    else:
        out.copy_(torch.bmm(a, b.mT))


def _fold(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, diagonal: torch.Tensor) -> None:
    """What is above the diagonal of M, of whose factors these are halves; and the diagonal."""
    out[:, 0] = torch.bmm(a, b.mT)
    lower, upper = torch.bmm(a, a.mT), torch.bmm(b, b.mT)
    half = a.shape[1]
    diagonal[:, :half] = _diagonal(a, lower)
    diagonal[:, half:] = _diagonal(b, upper)
    out[:, 1] = lower.tril_(-1).add_(upper.triu_(1))


def _diagonal(a: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Diagonal of ``a a^T``, of which most of the sum comes: never of a product in TF32."""
    if a.device.type == "cuda":
        return a.square().sum(2)
    return square.diagonal(dim1=1, dim2=2)


def _whole(a: torch.Tensor, out: torch.Tensor, diagonal: torch.Tensor) -> None:
    """``a a^T`` without its diagonal, and the diagonal."""
    square = torch.bmm(a, a.mT)
    diagonal.copy_(_diagonal(a, square))
    square.diagonal(dim1=1, dim2=2).zero_()
    out.copy_(square)


class _Side:
    """The factor stacks of one side, of which panels of rows are laid out."""

    def __init__(self, used: UsedHeads, plan: OverlapPlan, rounded: bool) -> None:
        stacks = used.stacks
        self.stacks, self.rounded, self.width = stacks, rounded, plan.width
        self._chunk, self._firsts = plan.chunk, used.firsts
        self._d_model = stacks[0].shape[1]
        self._starts = [0, *itertools.accumulate(len(stack) for stack in stacks)]
        self.n_panels = -(-self._d_model // self.width)
        slots = plan.group + (plan.group < self.n_panels)
        self._read = new_empty(stacks[0], slots, _total_rank(_stored(stacks)) * self.width)
        copied = _copied_numbers(stacks, self.width, plan.chunk)
        self._copies = new_empty(stacks[0], 2, copied * (stacks[0].device.type in _COPYING))
        self._rows: dict[int, list[torch.Tensor]] = {}
        self._columns: list[torch.Tensor] = []

    def height(self, p: int) -> int:
        """Rows of a panel."""
        return min(self.width, self._d_model - p * self.width)

    def span(self, stack: int, heads: slice) -> slice:
        """Some heads of a whole stack among the used heads of all stacks."""
        start = self._starts[stack] - self._firsts[stack]
        return slice(start + heads.start, start + heads.stop)

    def everyone(self) -> list[Segment]:
        """All used heads."""
        firsts = zip(self._firsts, self.stacks, strict=True)
        return [(i, slice(first, first + len(stack))) for i, (first, stack) in enumerate(firsts)]

    def load_rows(self, group: range) -> None:
        """Lay out the factors' rows of some block rows, for the blocks that are formed next."""
        self._rows = {p: self._panels(p, slot) for slot, p in enumerate(group)}

    def load_columns(self, q: int) -> None:
        """Lay out the factors' rows of a block column, for the blocks that are formed next."""
        self._columns = self._rows[q] if q in self._rows else self._panels(q, -1)

    def factors(
        self, segments: Sequence[Segment], p: int, halves: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Panel p and the loaded one, or both halves of panel p, of some heads at a time."""
        rows, columns = self._rows[p], self._columns
        if halves:
            half = rows[0].shape[1] // 2
            rows, columns = [x[:, :half] for x in rows], [x[:, half:] for x in rows]
        for batch in self._batches(segments):
            left = self._gathered(0, rows, batch)
            yield left, left if rows is columns else self._gathered(1, columns, batch)

    def _batches(self, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
        """Used heads, counted in their stacks, as many together as are multiplied at once."""
        batch: list[Segment] = []
        room = 0
        for i, heads in segments:
            start, stop = heads.start - self._firsts[i], heads.stop - self._firsts[i]
            if batch and not self._joins(batch[-1][0], i):
                yield batch
                batch = []
            while start < stop:
                if not batch:
                    room = _at_once(self.stacks[i], self.width, self._chunk)
                end = min(start + room, stop)
                batch.append((i, slice(start, end)))
                start, room = end, room - (end - start)
                if not room:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _joins(self, i: int, j: int) -> bool:
        """Whether heads of two stacks are multiplied together."""
        return bool(self._copies.numel()) and self.stacks[i].shape[2] == self.stacks[j].shape[2]

    def _gathered(
        self, place: int, panels: Sequence[torch.Tensor], batch: Sequence[Segment]
    ) -> torch.Tensor:
        """Some heads' panels, next to each other where that is faster to multiply."""
        parts = [panels[i][heads] for i, heads in batch]
        if len(parts) == 1 and (not self._copies.numel() or parts[0].is_contiguous()):
            return parts[0]
        shape = sum(map(len, parts)), *parts[0].shape[1:]
        copy = self._copies[place, : math.prod(shape)].view(shape)
        return torch.cat(parts, out=copy)

    def _panels(self, p: int, slot: int) -> list[torch.Tensor]:
        """Some rows of every factor: views of those in memory, copies of those in files."""
        panels, start = [], 0
        rows = slice(p * self.width, p * self.width + self.height(p))
        for stack in self.stacks:
            if isinstance(stack, torch.Tensor):
                panels.append(stack[:, rows])
                continue
            shape = len(stack), rows.stop - rows.start, stack.shape[2]
            panel = self._read[slot, start : start + math.prod(shape)].view(shape)
            stack.read(slice(None), rows, panel)
            panels.append(panel)
            start += panel.numel()
        return panels
