"""All-pairs squared overlaps of head factors: the one product behind every kernel.

A head gives a factor Y of shape ``(d_model, r)``, and with ``M = Y Y^T``

    ||Y^T Z||_F^2 = <M_Y, M_Z>_F .

For orthonormal factors this is the projection kernel; for factors of the QK and OV maps it is the
numerator of a squared composition score. It can be computed

* directly, from the cross-Gram ``Y^T Z``: ``2 r s d`` flops a pair;
* packed, as an inner product of the upper triangles of M: ``d^2`` flops a pair, after ``d^2 r``
  flops a head to form M block by block.

Packing wins when ``2 r s > d``, as it is for full-rank heads of every common model; the direct
product wins for truncated ranks. Neither forms a ``d x d`` matrix or the cross-Gram of all heads at
once, and both leave out what no pair asks for: of heads ordered by layer, the pairs whose row does
not lie below its column, the writers of the last layer and the readers of the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from skhead.exceptions import MemoryBudgetError
from skhead.linalg.bands import (
    Band,
    Block,
    Spans,
    UsedHeads,
    band_area,
    bands_of_blocks,
    used_heads,
)
from skhead.linalg.precision import MATMUL_PRECISIONS, matmul_precision, product, wide
from skhead.linalg.stacks import (
    Stack,
    StoredStack,
    copy_transposed,
    new_empty,
    stack_norms,
)

__all__ = ["OverlapPlan", "overlap_blocks", "plan_overlaps"]

#: Widest residual-space block of the packed product; 128 x 128 blocks keep both of its GEMMs at
#: full speed.
_WIDEST_PANEL = 128
_NARROWEST_PANEL = 8
#: Devices on which a product of a strided batch is slow (meta tensors stand for those of a CPU).
_COPYING = ("cpu", "meta")
#: Rows of a tile of the direct product beyond which a GEMM gains nothing.
_WIDEST_TILE = 4096
#: Numbers of each factor that a CPU multiplies at a time, few enough to stay in its cache.
_CHUNK_NUMBERS = 2**18
#: Heads whose blocks are rounded to bfloat16 at a time.
_ROUNDED_HEADS = 32


@dataclass(frozen=True)
class OverlapPlan:
    """How a set of overlap blocks will be computed.

    Attributes
    ----------
    method : {"packed", "direct"}
    width : int
        Residual-space block width (packed) or heads per row tile (direct).
    column_width : int
        Heads per column tile (direct); 0 for packed.
    group : int
        Panels of rows of stored stacks held at once (packed), so often are they read less; 0 for
        direct.
    wide_sums : bool
        Whether the blocks' contributions are added up in float64 (packed), which takes the largest
        error of a projection kernel from 1e-5 to 2e-6; only where memory allows.
    scratch_bytes : int
        Largest scratch that the plan allocates at once, results not counted.
    flops : float
        Floating-point operations of the plan.
    """

    method: str
    width: int
    column_width: int
    group: int
    wide_sums: bool
    scratch_bytes: int
    flops: float


def plan_overlaps(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    blocks: Sequence[Block],
    max_memory: int,
    method: str = "auto",
    spans: Spans | None = None,
    precision: str = "highest",
) -> OverlapPlan:
    """Choose the cheaper algorithm by its flop count and fit it into the memory budget.

    Parameters
    ----------
    rows, columns, blocks, spans, precision
        As for `overlap_blocks`.
    max_memory : int
        Bytes of scratch allowed.
    method : {"auto", "packed", "direct"}
        "auto" takes the one with fewer flops among those that fit.

    Returns
    -------
    OverlapPlan

    Raises
    ------
    MemoryBudgetError
        If not even the smallest tiles fit.
    """
    bands = bands_of_blocks(rows, columns, blocks, spans)
    plans = []
    if method in ("auto", "packed"):
        plans.append(_plan_packed(rows, columns, bands, max_memory, precision))
    if method in ("auto", "direct"):
        plans.append(_plan_direct(rows, columns or rows, bands, max_memory))
    fitting = [plan for plan in plans if plan.scratch_bytes <= max_memory]
    if not fitting:
        need = min(plan.scratch_bytes for plan in plans)
        raise MemoryBudgetError(
            f"max_memory is {max_memory} bytes, but the smallest tiles need {need}; "
            "raise max_memory or compare fewer heads at once"
        )
    return min(fitting, key=lambda plan: plan.flops)


def overlap_blocks(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    blocks: Sequence[Block],
    *,
    spans: Spans | None = None,
    max_memory: int = 2**30,
    method: str = "auto",
    precision: str = "highest",
    progress: Callable[[float], None] | None = None,
) -> dict[Block, torch.Tensor]:
    """``||Y_h^T Z_k||_F^2`` for all heads h of a row stack and k of a column stack.

    Parameters
    ----------
    rows : sequence of Tensor or StoredStack of shape (n_heads_i, d_model, rank_i)
        Factor stacks, one per role; a head of smaller rank has zero columns. Of a stack that lies
        in files, some panels of rows (packed) or a tile of heads (direct) are in memory at a time.
    columns : sequence of Tensor or StoredStack, or None
        As `rows`; None compares `rows` with themselves and computes each unordered pair once.
    blocks : sequence of (int, int)
        Which row stack against which column stack.
    spans : mapping of (int, int) to ndarray of shape (n_row_heads, 2), int64, optional
        Of a block, the column heads ``first`` to ``stop - 1`` that each row head asks for; a block
        that is not in the mapping is computed whole.
    max_memory : int
        Bytes of scratch beyond the inputs and the result.
    method : {"auto", "packed", "direct"}
        See `plan_overlaps`.
    precision : {"highest", "high", "medium"}
        Of float32 products, see `matmul_precision`. With "medium" the packed product multiplies
        trace-free blocks that are rounded to bfloat16.
    progress : callable, optional
        Called with the fraction done, from time to time.

    Returns
    -------
    dict of (int, int) -> Tensor of shape (n_row_heads, n_column_heads)
        NaN where nothing was computed, which is only where nothing was asked for.
    """
    if precision not in MATMUL_PRECISIONS:
        raise ValueError(f"precision is {precision!r}; give one of {MATMUL_PRECISIONS}")
    bands = bands_of_blocks(rows, columns, blocks, spans)
    plan = plan_overlaps(rows, columns, blocks, max_memory, method, spans, precision)
    report = progress if progress is not None else _silent
    with matmul_precision(rows[0].device, precision):
        if plan.method == "packed":
            done = _packed(rows, columns, bands, plan, precision, report)
        else:
            done = _direct(rows, columns or rows, bands, plan, report)
    for i, j in done:
        if columns is None and i == j:
            done[i, j] = _mirrored(done[i, j])
    return {b: done[b] if b in done else done[b[1], b[0]].T for b in blocks}


def _mirrored(values: torch.Tensor) -> torch.Tensor:
    """A square table with the upper triangle below the diagonal too, to the last digit."""
    n_heads, device = len(values), values.device
    below = torch.ones(n_heads, n_heads, dtype=torch.bool, device=device).tril(-1)
    mirror = values.T
    return torch.where(values.isnan() | (below & ~mirror.isnan()), mirror, values)


def _silent(fraction: float) -> None:
    """Report progress to nobody."""


def _plan_packed(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    bands: Mapping[Block, Sequence[Band]],
    max_memory: int,
    precision: str,
) -> OverlapPlan:
    sides = used_heads(rows, columns, bands)
    stacks = [stack for side in sides for stack in side.stacks]
    d_model, itemsize = rows[0].shape[1], rows[0].element_size()
    n_heads = sum(len(stack) for stack in stacks)
    total_rank, stored_rank = _total_rank(stacks), _total_rank(_stored(stacks))
    areas = [band_area(band) for parts in bands.values() for band in parts]
    flops = float(d_model) * (d_model + _WIDEST_PANEL) * (total_rank + sum(areas))
    width = min(_WIDEST_PANEL, d_model)
    while True:
        panels = -(-d_model // width)
        width = -(-d_model // panels)
        panel = itemsize * stored_rank * width
        chunks = sum(_chunk_numbers(side.stacks, width) for side in sides)
        scratch = itemsize * (n_heads * width**2 + 2 * chunks) + 2 * panel
        if scratch <= max_memory or width <= _NARROWEST_PANEL:
            break
        width = max(width // 2, _NARROWEST_PANEL)
    product, sums = itemsize * max(areas, default=0), 8 * sum(areas)
    wide_sums = scratch + sums + product <= max_memory
    scratch += sums + product if wide_sums else product * (precision == "medium")
    group = 1
    if panel:
        group = min(panels, 1 + max(max_memory - scratch, 0) // panel)
        scratch += (group - 1) * panel
    return OverlapPlan("packed", width, 0, group, wide_sums, scratch, flops)


def _stored(stacks: Sequence[Stack]) -> list[Stack]:
    """The stacks that lie in files."""
    return [stack for stack in stacks if isinstance(stack, StoredStack)]


def _total_rank(stacks: Sequence[Stack]) -> int:
    """Columns of all heads together."""
    return sum(len(stack) * stack.shape[2] for stack in stacks)


def _chunk_numbers(stacks: Sequence[Stack], width: int) -> int:
    """Numbers of a contiguous copy of some heads' panels; GPUs multiply panels where they lie."""
    in_memory = [stack for stack in stacks if isinstance(stack, torch.Tensor)]
    if not in_memory or in_memory[0].device.type not in _COPYING:
        return 0
    widest = width * max(stack.shape[2] for stack in in_memory)
    largest = width * max(len(stack) * stack.shape[2] for stack in in_memory)
    return min(largest, max(_CHUNK_NUMBERS, widest))


def _packed(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    bands: Mapping[Block, Sequence[Band]],
    plan: OverlapPlan,
    precision: str,
    report: Callable[[float], None],
) -> dict[Block, torch.Tensor]:
    sides = [_PackedSide(used, plan, precision) for used in used_heads(rows, columns, bands)]
    left, right = sides[0], sides[-1]
    results = {
        (i, j): new_empty(rows[i], len(rows[i]), len((columns or rows)[j])).fill_(math.nan)
        for i, j in bands
    }
    sums = _BandSums(left, right, bands, results, plan.wide_sums)
    total, done = left.n_panels * (left.n_panels + 1) // 2, 0
    for start in range(0, left.n_panels, plan.group):
        group = range(start, min(start + plan.group, left.n_panels))
        for side in sides:
            side.load_rows(group)
        for q in range(start, left.n_panels):
            for side in sides:
                side.load_columns(q)
            for p in range(start, min(q + 1, group.stop)):
                packed = [side.pack(p, q) for side in sides]
                sums.add(packed[0], packed[-1], 1.0 if p == q else 2.0)
                done += 1
                report(done / total)
    sums.finish()
    return results


class _BandSums:
    """The inner products of all bands, growing block by block of the residual space."""

    def __init__(
        self,
        left: _PackedSide,
        right: _PackedSide,
        bands: Mapping[Block, Sequence[Band]],
        results: Mapping[Block, torch.Tensor],
        wide_sums: bool,
    ) -> None:
        self._wide = wide_sums
        self._parts = []
        for (i, j), parts in bands.items():
            for band in parts:
                result = results[i, j][band]
                heads = left.span(i, band[0]), right.span(j, band[1])
                total = left.identity_part(right, *heads)
                if wide_sums:
                    total = total.mT.contiguous()
                else:
                    result.copy_(total)
                self._parts.append((*heads, total if wide_sums else result, result))

    def add(self, left: torch.Tensor, right: torch.Tensor, weight: float) -> None:
        """Add the products of one residual-space block, of all heads of both sides."""
        for rows, columns, total, _ in self._parts:
            a, b = left[rows], right[columns]
            # A band has few rows, which is faster as the short side of the product on its right.
            if self._wide:
                total.add_(product(b, a.mT), alpha=weight)
            elif a.dtype == torch.bfloat16:
                total.add_(product(a, b.mT), alpha=weight)
            else:
                total.addmm_(a, b.mT, alpha=weight)

    def finish(self) -> None:
        """Put the sums into the results, once."""
        while self._parts:
            *_, total, result = self._parts.pop()
            if total is not result:
                result.copy_(total.mT)


class _PackedSide:
    """The factor stacks of one side, from which trace-free blocks of ``Y Y^T`` are formed.

    The multiple of the identity ``tr(M)/d`` is taken out of every M before the inner product and
    put back in closed form: it carries most of the sum, and rounding is then relative to the rest.
    """

    def __init__(self, used: UsedHeads, plan: OverlapPlan, precision: str) -> None:
        stacks = used.stacks
        self.stacks, self._firsts = stacks, used.firsts
        self.d_model = stacks[0].shape[1]
        self.starts = [0, *itertools.accumulate(len(stack) for stack in stacks)]
        self.width = plan.width
        self.n_panels = -(-self.d_model // self.width)
        first = stacks[0]
        self._traces = torch.cat([stack_norms(stack) for stack in stacks]).square()
        self._levels = (self._traces / self.d_model).to(first.dtype)
        self._rounded = precision == "medium" and first.dtype == torch.float32
        dtype = torch.bfloat16 if self._rounded else first.dtype
        size = self.starts[-1] * self.width**2
        self._packed = torch.empty(size, dtype=dtype, device=first.device)
        slots = plan.group + (plan.group < self.n_panels)
        self._copies = new_empty(first, slots, _total_rank(_stored(stacks)) * self.width)
        self._chunks = new_empty(first, 2, _chunk_numbers(stacks, self.width))
        self._rows: dict[int, list[torch.Tensor]] = {}
        self._columns: list[torch.Tensor] = []

    def span(self, stack: int, heads: slice) -> slice:
        """Some heads of a whole stack among the used heads of all stacks."""
        start = self.starts[stack] - self._firsts[stack]
        return slice(start + heads.start, start + heads.stop)

    def load_rows(self, group: range) -> None:
        """Lay out the factors' rows of some block rows, for the calls of `pack` that follow."""
        self._rows = {p: self._panels(p, slot) for slot, p in enumerate(group)}

    def load_columns(self, q: int) -> None:
        """Lay out the factors' rows of a block column, for the calls of `pack` that follow."""
        self._columns = self._rows[q] if q in self._rows else self._panels(q, -1)

    def pack(self, p: int, q: int) -> torch.Tensor:
        """Block (p, q) of every head's M, trace-free, as one row each; q is the loaded one."""
        rows, columns = self._rows[p], self._columns
        shape = rows[0].shape[1], columns[0].shape[1]
        packed = self._packed[: self.starts[-1] * math.prod(shape)].view(-1, *shape)
        for i, (a, b) in enumerate(zip(rows, columns, strict=True)):
            heads = slice(self.starts[i], self.starts[i + 1])
            self._form(a, b, self._levels[heads] if p == q else None, packed[heads])
        return packed.flatten(1)

    def _form(
        self, a: torch.Tensor, b: torch.Tensor, levels: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """Products of two panels, less the heads' levels on the diagonal if there are any."""
        step = max(len(a), 1)
        if self._chunks.numel() and not a.is_contiguous():
            step = max(self._chunks.shape[1] // max(a[0].numel(), b[0].numel()), 1)
        if self._rounded:
            step = min(step, _ROUNDED_HEADS, max(self.starts[-1] // 2, 1))
        for start in range(0, len(a), step):
            some = slice(start, start + step)
            exact = out[some] if not self._rounded else None
            left, right = self._chunk(0, a[some]), self._chunk(1, b[some])
            exact = torch.bmm(left, right.mT, out=exact)
            if levels is not None:
                exact.diagonal(dim1=1, dim2=2).sub_(levels[some, None])
            if self._rounded:
                out[some] = exact

    def _chunk(self, side: int, panel: torch.Tensor) -> torch.Tensor:
        """Some heads' panels, next to each other where that is faster to multiply."""
        if not self._chunks.numel() or panel.is_contiguous():
            return panel
        return self._chunks[side, : panel.numel()].view(panel.shape).copy_(panel)

    def _panels(self, p: int, slot: int) -> list[torch.Tensor]:
        """Some rows of every factor: views of those in memory, copies of those in files."""
        panels, start = [], 0
        rows = slice(p * self.width, min((p + 1) * self.width, self.d_model))
        for stack in self.stacks:
            if isinstance(stack, torch.Tensor):
                panels.append(stack[:, rows])
                continue
            shape = len(stack), rows.stop - rows.start, stack.shape[2]
            panel = self._copies[slot, start : start + math.prod(shape)].view(shape)
            stack.read(slice(None), rows, panel)
            panels.append(panel)
            start += panel.numel()
        return panels

    def identity_part(self, other: _PackedSide, rows: slice, columns: slice) -> torch.Tensor:
        """What taking the identity out of both sides has left out of their inner products."""
        a, b = wide(self._levels[rows, None]), wide(other._levels[None, columns])
        trace_a, trace_b = self._traces[rows, None], other._traces[None, columns]
        part: torch.Tensor = (a @ (trace_b - b * self.d_model)).addmm_(trace_a, b)
        return part


def _plan_direct(
    rows: Sequence[Stack],
    columns: Sequence[Stack],
    bands: Mapping[Block, Sequence[Band]],
    max_memory: int,
) -> OverlapPlan:
    d_model, itemsize = rows[0].shape[1], rows[0].element_size()
    flops, r, s, n_rows, n_columns = 0.0, 1, 1, 1, 1
    for (i, j), parts in bands.items():
        left, right = rows[i], columns[j]
        flops += 2.0 * d_model * left.shape[2] * right.shape[2] * sum(map(band_area, parts))
        r, s = max(r, left.shape[2]), max(s, right.shape[2])
        n_rows, n_columns = max(n_rows, len(left)), max(n_columns, len(right))
    single = max(r, s) if any(isinstance(x, StoredStack) for x in [*rows, *columns]) else 0
    n_rows = min(n_rows, max(_WIDEST_TILE // r, 1))
    n_columns = min(n_columns, max(_WIDEST_TILE // s, 1))

    def scratch() -> int:
        tiles = d_model * (n_rows * r + n_columns * s + single)
        return itemsize * (tiles + n_rows * r * n_columns * (s + 1))

    while scratch() > max_memory and max(n_rows, n_columns) > 1:
        if n_rows >= n_columns:
            n_rows = -(-n_rows // 2)
        else:
            n_columns = -(-n_columns // 2)
    return OverlapPlan("direct", n_rows, n_columns, 0, False, scratch(), flops)


def _direct(
    rows: Sequence[Stack],
    columns: Sequence[Stack],
    bands: Mapping[Block, Sequence[Band]],
    plan: OverlapPlan,
    report: Callable[[float], None],
) -> dict[Block, torch.Tensor]:
    finished = {}
    for done, ((i, j), parts) in enumerate(bands.items(), start=1):
        finished[i, j] = _direct_block(rows[i], columns[j], parts, plan)
        report(done / len(bands))
    return finished


def _direct_block(a: Stack, b: Stack, bands: Sequence[Band], plan: OverlapPlan) -> torch.Tensor:
    out = new_empty(a, len(a), len(b)).fill_(math.nan)
    (_, d_model, r), s = a.shape, b.shape[2]
    n_rows, n_columns = min(plan.width, len(a)), min(plan.column_width, len(b))
    left_buffer = new_empty(a, n_rows, r, d_model)
    right_buffer = new_empty(a, n_columns, s, d_model)
    cross_buffer = new_empty(a, n_rows * r * n_columns * s)
    for (tile, others), held in _tiles(bands, n_rows, n_columns):
        left = left_buffer[: tile.stop - tile.start]
        if not held:
            copy_transposed(a, tile, left)
        right = right_buffer[: others.stop - others.start]
        copy_transposed(b, others, right)
        cross = cross_buffer[: len(left) * r * len(right) * s].view(len(left) * r, -1)
        torch.mm(left.flatten(0, 1), right.flatten(0, 1).mT, out=cross)
        sums = cross.square_().view(len(left) * r, len(right), s).sum(2)
        out[tile, others] = sums.view(len(left), r, len(right)).sum(1)
    return out


def _tiles(bands: Sequence[Band], n_rows: int, n_columns: int) -> Iterator[tuple[Band, bool]]:
    """Tiles of the bands, and whether the rows are those of the tile before."""
    for rows, columns in bands:
        for start in range(rows.start, rows.stop, n_rows):
            tile = slice(start, min(start + n_rows, rows.stop))
            for first in range(columns.start, columns.stop, n_columns):
                others = slice(first, min(first + n_columns, columns.stop))
                yield (tile, others), first > columns.start
