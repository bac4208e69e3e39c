"""All-pairs squared overlaps of head factors: the one product behind every kernel.

A head gives a factor Y of shape ``(d_model, r)``, and with ``M = Y Y^T``

    ||Y^T Z||_F^2 = <M_Y, M_Z>_F .

For orthonormal factors this is the projection kernel; for factors of the QK and OV maps it is the
numerator of a squared composition score. It can be computed

* directly, from the cross-Gram ``Y^T Z``: ``2 r s d`` flops a pair;
* packed, as an inner product of the upper triangles of M: ``d^2`` flops a pair, after ``d^2 r``
  flops a head to form M block by block; see `skhead.linalg.packed`.

Packing wins when ``2 r s > d``, as it is for full-rank heads of every common model; the direct
product wins for truncated ranks. Neither forms a ``d x d`` matrix or the cross-Gram of all heads at
once, and both leave out what no pair asks for: of heads ordered by layer, the pairs whose row does
not lie below its column, the writers of the last layer and the readers of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from skhead.exceptions import MemoryBudgetError
from skhead.linalg.bands import Band, Block, Spans, band_area, column_bands, row_bands
from skhead.linalg.packed import packed_overlaps, packed_step, plan_packed
from skhead.linalg.plans import OverlapPlan
from skhead.linalg.precision import MATMUL_PRECISIONS, matmul_precision
from skhead.linalg.stacks import Stack, StoredStack, copy_transposed, new_empty

__all__ = ["OverlapPlan", "overlap_blocks", "plan_overlaps"]

#: Rows of a tile of the direct product beyond which a GEMM gains nothing.
_WIDEST_TILE = 4096


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
    columns = _other_side(rows, columns, blocks)
    plans = []
    if method in ("auto", "packed"):
        bands = column_bands(rows, columns, blocks, spans, packed_step(rows[0].device))
        plans.append(plan_packed(rows, columns, bands, max_memory, precision))
    if method in ("auto", "direct"):
        tiles = row_bands(rows, columns, blocks, spans)
        plans.append(_plan_direct(rows, columns or rows, tiles, max_memory))
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
        blocks that are rounded to bfloat16, without their diagonal.
    progress : callable, optional
        Called with the fraction done, from time to time.

    Returns
    -------
    dict of (int, int) -> Tensor of shape (n_row_heads, n_column_heads)
        NaN where nothing was computed, which is only where nothing was asked for.
    """
    if precision not in MATMUL_PRECISIONS:
        raise ValueError(f"precision is {precision!r}; give one of {MATMUL_PRECISIONS}")
    columns = _other_side(rows, columns, blocks)
    plan = plan_overlaps(rows, columns, blocks, max_memory, method, spans, precision)
    report = progress if progress is not None else _silent
    right = columns or rows
    tiles = row_bands(rows, columns, blocks, spans)
    done = {(i, j): _nothing(rows[i], right[j]) for i, j in tiles}
    with matmul_precision(rows[0].device, precision):
        if plan.method == "packed":
            bands = column_bands(rows, columns, blocks, spans, packed_step(rows[0].device))
            packed_overlaps(rows, columns, bands, done, plan, precision, report)
        else:
            _direct(rows, right, tiles, done, plan, report)
    if columns is None:
        done = {(i, j): _mirrored(x) if i == j else x for (i, j), x in done.items()}
    return {b: done[b] if b in done else done[b[1], b[0]].T for b in blocks}


def _other_side(
    rows: Sequence[Stack], columns: Sequence[Stack] | None, blocks: Sequence[Block]
) -> Sequence[Stack] | None:
    """The column stacks; the row stacks themselves where none is on both sides of a product."""
    if columns is None and not {i for i, _ in blocks} & {j for _, j in blocks}:
        return rows
    return columns


def _mirrored(values: torch.Tensor) -> torch.Tensor:
    """A square table with the upper triangle below the diagonal too, to the last digit."""
    n_heads, device = len(values), values.device
    below = torch.ones(n_heads, n_heads, dtype=torch.bool, device=device).tril(-1)
    mirror = values.T
    return torch.where(values.isnan() | (below & ~mirror.isnan()), mirror, values)


def _nothing(rows: Stack, columns: Stack) -> torch.Tensor:
    """A table of pairs of which none is computed."""
    return new_empty(rows, len(rows), len(columns)).fill_(math.nan)


def _silent(fraction: float) -> None:
    """Report progress to nobody."""


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
    return OverlapPlan("direct", n_rows, n_columns, 0, 0, False, scratch(), flops)


def _direct(
    rows: Sequence[Stack],
    columns: Sequence[Stack],
    bands: Mapping[Block, Sequence[Band]],
    results: Mapping[Block, torch.Tensor],
    plan: OverlapPlan,
    report: Callable[[float], None],
) -> None:
    for done, ((i, j), parts) in enumerate(bands.items(), start=1):
        _direct_block(rows[i], columns[j], parts, results[i, j], plan)
        report(done / len(bands))


def _direct_block(
    a: Stack, b: Stack, bands: Sequence[Band], out: torch.Tensor, plan: OverlapPlan
) -> None:
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


def _tiles(bands: Sequence[Band], n_rows: int, n_columns: int) -> Iterator[tuple[Band, bool]]:
    """Tiles of the bands, and whether the rows are those of the tile before."""
    for rows, columns in bands:
        for start in range(rows.start, rows.stop, n_rows):
            tile = slice(start, min(start + n_rows, rows.stop))
            for first in range(columns.start, columns.stop, n_columns):
                others = slice(first, min(first + n_columns, columns.stop))
                yield (tile, others), first > columns.start
