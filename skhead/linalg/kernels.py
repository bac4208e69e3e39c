"""All-pairs squared overlaps of head factors: the one product behind every kernel.

A head gives a factor Y of shape ``(d_model, r)``, and with ``M = Y Y^T``

    ||Y^T Z||_F^2 = <M_Y, M_Z>_F .

For orthonormal factors this is the projection kernel; for factors of the QK and OV maps it is the
numerator of a squared composition score. It can be computed

* directly, from the cross-Gram ``Y^T Z``: ``2 r s d`` flops a pair;
* packed, as an inner product of the upper triangles of M: ``d^2`` flops a pair, after ``d^2 r``
flops a
  head to form M block by block.

Packing wins when ``2 r s > d``, as it is for full-rank heads of every common model; the direct
product wins for truncated ranks. Neither forms a ``d x d`` matrix or the cross-Gram of all heads at
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from skhead.exceptions import MemoryBudgetError
from skhead.linalg.precision import fast_float32_matmul, wide
from skhead.linalg.stacks import (
    Stack,
    StoredStack,
    copy_panel,
    copy_transposed,
    new_empty,
    stack_norms,
)

__all__ = ["OverlapPlan", "overlap_blocks", "plan_overlaps"]

#: Widest residual-space block of the packed product; 128 x 128 blocks keep both of its GEMMs at
#: full speed.
_WIDEST_PANEL = 128
_NARROWEST_PANEL = 8
#: Rows of a tile of the direct product beyond which a GEMM gains nothing.
_WIDEST_TILE = 4096

Block = tuple[int, int]


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
    wide_sums: bool
    scratch_bytes: int
    flops: float


def plan_overlaps(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    blocks: Sequence[Block],
    max_memory: int,
    method: str = "auto",
) -> OverlapPlan:
    """Choose the cheaper algorithm by its flop count and fit it into the memory budget.

    Parameters
    ----------
    rows, columns, blocks
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
    plans = []
    if method in ("auto", "packed"):
        plans.append(_plan_packed(rows, columns, blocks, max_memory))
    if method in ("auto", "direct"):
        plans.append(_plan_direct(rows, columns or rows, blocks, max_memory))
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
    max_memory: int = 2**30,
    method: str = "auto",
    progress: Callable[[float], None] | None = None,
) -> dict[Block, torch.Tensor]:
    """``||Y_h^T Z_k||_F^2`` for all heads h of a row stack and k of a column stack.

    Parameters
    ----------
    rows : sequence of Tensor or StoredStack of shape (n_heads_i, d_model, rank_i)
        Factor stacks, one per role; a head of smaller rank has zero columns. Of a stack that lies
        in files, a panel of rows (packed) or a tile of heads (direct) is in memory at a time.
    columns : sequence of Tensor or StoredStack, or None
        As `rows`; None compares `rows` with themselves and computes each unordered block once.
    blocks : sequence of (int, int)
        Which row stack against which column stack.
    max_memory : int
        Bytes of scratch beyond the inputs and the result.
    method : {"auto", "packed", "direct"}
        See `plan_overlaps`.
    progress : callable, optional
        Called with the fraction done, from time to time.

    Returns
    -------
    dict of (int, int) -> Tensor of shape (n_row_heads, n_column_heads)
    """
    plan = plan_overlaps(rows, columns, blocks, max_memory, method)
    report = progress if progress is not None else _silent
    run = _packed if plan.method == "packed" else _direct
    with fast_float32_matmul(rows[0].device):
        return run(rows, columns, blocks, plan, report)


def _silent(fraction: float) -> None:
    """Report progress to nobody."""


def _unordered(blocks: Sequence[Block], symmetric: bool) -> list[Block]:
    """Blocks to compute: each once, and one of each mirrored pair if rows are columns."""
    wanted = {(min(b), max(b)) if symmetric else b for b in blocks}
    return sorted(wanted)


def _as_asked(
    blocks: Sequence[Block], done: dict[Block, torch.Tensor]
) -> dict[Block, torch.Tensor]:
    return {b: done[b] if b in done else done[b[1], b[0]].T for b in blocks}


def _runs(todo: Sequence[Block]) -> list[tuple[int, int, int]]:
    """Blocks as (row stack, first column stack, last column stack + 1) with consecutive columns."""
    runs: list[tuple[int, int, int]] = []
    for row, column in todo:
        if runs and runs[-1][0] == row and runs[-1][2] == column:
            runs[-1] = (row, runs[-1][1], column + 1)
        else:
            runs.append((row, column, column + 1))
    return runs


def _plan_packed(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    blocks: Sequence[Block],
    max_memory: int,
) -> OverlapPlan:
    symmetric = columns is None
    sides = [*rows] if columns is None else [*rows, *columns]
    d_model, itemsize = rows[0].shape[1], rows[0].element_size()
    n_heads = sum(len(stack) for stack in sides)
    total_rank = sum(len(stack) * stack.shape[2] for stack in sides)
    flops = float(d_model) * (d_model + _WIDEST_PANEL) * total_rank
    right = rows if columns is None else columns
    n_pairs = sum(len(rows[i]) * len(right[j]) for i, j in _unordered(blocks, symmetric))
    flops += float(d_model) * (d_model + _WIDEST_PANEL) * n_pairs
    width = min(_WIDEST_PANEL, d_model)
    while True:
        panels = -(-d_model // width)
        width = -(-d_model // panels)
        scratch = itemsize * (n_heads * width**2 + 2 * total_rank * width)
        if scratch <= max_memory or width <= _NARROWEST_PANEL:
            sums = n_pairs * (8 + itemsize)
            wide_sums = scratch + sums <= max_memory
            scratch += sums if wide_sums else 0
            return OverlapPlan("packed", width, 0, wide_sums, scratch, flops)
        width = max(width // 2, _NARROWEST_PANEL)


def _packed(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    blocks: Sequence[Block],
    plan: OverlapPlan,
    report: Callable[[float], None],
) -> dict[Block, torch.Tensor]:
    left = _PackedSide(rows, plan)
    right = left if columns is None else _PackedSide(columns, plan)
    sides = [left] if right is left else [left, right]
    todo = _unordered(blocks, columns is None)
    runs = _runs(todo)
    dtype = rows[0].dtype
    sums = [left.identity_part(right, left.span(i, i + 1), right.span(j, k)) for i, j, k in runs]
    sums = sums if plan.wide_sums else [out.to(dtype) for out in sums]
    total, done = left.n_panels * (left.n_panels + 1) // 2, 0
    for p in range(left.n_panels):
        for side in sides:
            side.load_rows(p)
        for q in range(p, left.n_panels):
            packed = [side.pack(p, q) for side in sides]
            weight = 1.0 if p == q else 2.0
            for (i, j, k), out in zip(runs, sums, strict=True):
                a, b = packed[0][left.span(i, i + 1)], packed[-1][right.span(j, k)]
                if plan.wide_sums:
                    out.add_(a @ b.mT, alpha=weight)
                else:
                    out.addmm_(a, b.mT, alpha=weight)
            done += 1
            report(done / total)
    finished = {}
    for (i, j, k), out in zip(runs, sums, strict=True):
        for column, part in zip(range(j, k), out.split(right.counts[j:k], dim=1), strict=True):
            finished[i, column] = part.to(dtype)
    return _as_asked(blocks, finished)


class _PackedSide:
    """The factor stacks of one side, from which trace-free blocks of ``Y Y^T`` are formed.

    The multiple of the identity ``tr(M)/d`` is taken out of every M before the inner product and
    put back in closed form: it carries most of the sum, and rounding is then relative to the rest.
    """

    def __init__(self, stacks: Sequence[Stack], plan: OverlapPlan) -> None:
        self.stacks = stacks
        self.d_model = stacks[0].shape[1]
        self.counts = [len(stack) for stack in stacks]
        self.starts = [sum(self.counts[:i]) for i in range(len(stacks) + 1)]
        self.width = plan.width
        self.n_panels = -(-self.d_model // self.width)
        first = stacks[0]
        self._traces = torch.cat([stack_norms(stack) for stack in stacks]).square()
        self._levels = (self._traces / self.d_model).to(first.dtype)
        self._packed = new_empty(first, self.starts[-1] * self.width**2)
        total_rank = sum(len(stack) * stack.shape[2] for stack in stacks)
        self._copies = new_empty(first, 2, total_rank * self.width)
        self._rows: list[torch.Tensor] = []

    def span(self, first: int, stop: int) -> slice:
        """Heads of the stacks from `first` up to `stop`."""
        return slice(self.starts[first], self.starts[stop])

    def load_rows(self, p: int) -> None:
        """Lay out the factors' rows of block row `p`, for the calls of `pack` that follow."""
        self._rows = self._panels(p, 0)

    def pack(self, p: int, q: int) -> torch.Tensor:
        """Block (p, q) of every head's M, trace-free, as one row each."""
        columns = self._rows if p == q else self._panels(q, 1)
        n_rows, n_columns = self._rows[0].shape[1], columns[0].shape[1]
        packed = self._packed[: self.starts[-1] * n_rows * n_columns]
        packed = packed.view(self.starts[-1], n_rows, n_columns)
        for i, (a, b) in enumerate(zip(self._rows, columns, strict=True)):
            torch.bmm(a, b.mT, out=packed[self.span(i, i + 1)])
        if p == q:
            packed.diagonal(dim1=1, dim2=2).sub_(self._levels[:, None])
        return packed.flatten(1)

    def _panels(self, p: int, slot: int) -> list[torch.Tensor]:
        """Contiguous copies of some rows of every factor; a strided batch would slow the GEMM."""
        panels, start = [], 0
        rows = slice(p * self.width, min((p + 1) * self.width, self.d_model))
        for stack in self.stacks:
            shape = len(stack), rows.stop - rows.start, stack.shape[2]
            panel = self._copies[slot, start : start + math.prod(shape)].view(shape)
            copy_panel(stack, rows, panel)
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
    blocks: Sequence[Block],
    max_memory: int,
) -> OverlapPlan:
    d_model, itemsize = rows[0].shape[1], rows[0].element_size()
    todo = _unordered(blocks, columns is rows)

    def area(stack: Stack) -> int:
        return len(stack) * stack.shape[2]

    flops = sum(2.0 * d_model * area(rows[i]) * area(columns[j]) for i, j in todo)
    r = max(rows[i].shape[2] for i, _ in todo)
    s = max(columns[j].shape[2] for _, j in todo)
    single = max(r, s) if any(isinstance(x, StoredStack) for x in [*rows, *columns]) else 0
    n_rows = min(max(len(rows[i]) for i, _ in todo), max(_WIDEST_TILE // r, 1))
    n_columns = min(max(len(columns[j]) for _, j in todo), max(_WIDEST_TILE // s, 1))

    def scratch() -> int:
        tiles = d_model * (n_rows * r + n_columns * s + single)
        return itemsize * (tiles + n_rows * r * n_columns * (s + 1))

    while scratch() > max_memory and max(n_rows, n_columns) > 1:
        if n_rows >= n_columns:
            n_rows = -(-n_rows // 2)
        else:
            n_columns = -(-n_columns // 2)
    return OverlapPlan("direct", n_rows, n_columns, False, scratch(), flops)


def _direct(
    rows: Sequence[Stack],
    columns: Sequence[Stack] | None,
    blocks: Sequence[Block],
    plan: OverlapPlan,
    report: Callable[[float], None],
) -> dict[Block, torch.Tensor]:
    right = rows if columns is None else columns
    todo = _unordered(blocks, columns is None)
    finished = {}
    for done, (i, j) in enumerate(todo, start=1):
        finished[i, j] = _direct_block(rows[i], right[j], plan)
        report(done / len(todo))
    return _as_asked(blocks, finished)


def _direct_block(a: Stack, b: Stack, plan: OverlapPlan) -> torch.Tensor:
    out = new_empty(a, len(a), len(b))
    (_, d_model, r), s = a.shape, b.shape[2]
    n_rows, n_columns = min(plan.width, len(a)), min(plan.column_width, len(b))
    left_buffer = new_empty(a, n_rows, r, d_model)
    right_buffer = new_empty(a, n_columns, s, d_model)
    cross_buffer = new_empty(a, n_rows * r * n_columns * s)
    for start in range(0, len(a), n_rows):
        tile = slice(start, min(start + n_rows, len(a)))
        left = left_buffer[: tile.stop - start]
        copy_transposed(a, tile, left)
        for first in range(0, len(b), n_columns):
            other = slice(first, min(first + n_columns, len(b)))
            right = right_buffer[: other.stop - first]
            copy_transposed(b, other, right)
            cross = cross_buffer[: len(left) * r * len(right) * s].view(len(left) * r, -1)
            torch.mm(left.flatten(0, 1), right.flatten(0, 1).mT, out=cross)
            sums = cross.square_().view(len(left) * r, len(right), s).sum(2)
            out[tile, other] = sums.view(len(left), r, len(right)).sum(1)
    return out
