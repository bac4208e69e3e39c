"""What needs singular values of heads: nuclear norms of cross products, spectra of maps.

The squared overlaps of `skhead.linalg.kernels` are sums of squares and come from large matrix
products alone. Nuclear norms and principal angles do not: here the ``r x s`` cross products
``Y^T Z`` of many heads are formed tile by tile and decomposed in batches. float32 singular values
of the cross products themselves are used, as their Gram matrices would be hardly faster to
decompose in float64 and would lose half of the digits in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from skhead.exceptions import MemoryBudgetError
from skhead.linalg.devices import supports_float64
from skhead.linalg.factored import frobenius_norms
from skhead.linalg.precision import fast_float32_matmul, wide
from skhead.linalg.stacks import Stack

__all__ = [
    "Measure",
    "cross_measures",
    "decomposable",
    "gram_sizes",
    "map_singular_values",
    "nuclear_norms",
    "singular_values",
    "unit_stack",
]

#: Heads on each side of a tile; 32 heads of rank 64 keep the product at full speed.
_WIDEST_TILE = 32
#: Copies of the cross products that a tile holds: as multiplied, selected and decomposed.
_CROSS_COPIES = 3
#: Heads per float64 work block.
_CHUNK = 16
#: What becomes of cross products (n, r, s) of the heads at some row and column positions.
Measure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def unit_stack(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices brought to Frobenius norm 1, whatever their scale.

    Parameters
    ----------
    stack : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    unit : Tensor of shape (n_heads, d_model, d_head)
        A copy; a zero matrix stays zero.
    zero : Tensor of shape (n_heads,), bool
        Which matrices are zero.
    """
    peak = torch.maximum(stack.amax((1, 2)), -stack.amin((1, 2)))
    zero = peak == 0
    unit = stack / torch.where(zero, 1.0, peak)[:, None, None]
    norms = torch.where(zero, 1.0, frobenius_norms(unit))
    return unit.div_(norms[:, None, None].to(unit.dtype)), zero


def gram_sizes(stack: torch.Tensor) -> torch.Tensor:
    """Frobenius norms ``||W^T W||_F`` of the Gram matrices.

    Parameters
    ----------
    stack : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    Tensor of shape (n_heads,), float64
    """
    parts = []
    for block in stack.split(_CHUNK):
        exact = wide(block)
        parts.append(torch.linalg.matrix_norm(exact.mT @ exact))
    return torch.cat(parts)


def singular_values(stack: torch.Tensor) -> torch.Tensor:
    """Singular values of many matrices, the largest first.

    From float64 Gram matrices, which gives each to about 1e-8 of the largest.

    Parameters
    ----------
    stack : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    Tensor of shape (n_heads, min(d_model, d_head)), float64
    """
    width = min(stack.shape[1:])
    parts = []
    for block in stack.split(_CHUNK):
        exact = decomposable(wide(block))
        eigenvalues = torch.linalg.eigvalsh(exact.mT @ exact)
        parts.append(eigenvalues.flip(-1)[:, :width].clamp_min(0).sqrt())
    return torch.cat(parts)


def map_singular_values(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Singular values of the maps ``left right^T``, the largest first, without forming any.

    From triangular factors of both sides, which tell a map of cancelling sides from zero.

    Parameters
    ----------
    left, right : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    Tensor of shape (n_heads, min(d_model, d_head)), float64
    """
    parts = []
    for a, b in zip(left.split(_CHUNK), right.split(_CHUNK), strict=True):
        roots = [torch.linalg.qr(decomposable(wide(block)), mode="r").R for block in (a, b)]
        parts.append(torch.linalg.svdvals(roots[0] @ roots[1].mT))
    return torch.cat(parts)


def nuclear_norms(cross: torch.Tensor, *_positions: torch.Tensor) -> torch.Tensor:
    """Sums of the singular values of cross products; a measure for `cross_measures`.

    Parameters
    ----------
    cross : Tensor of shape (n, r, s)
    *_positions : Tensor of shape (n,)
        Whose products these are, which does not matter here.

    Returns
    -------
    Tensor of shape (n,), float64
    """
    return wide(torch.linalg.svdvals(decomposable(cross))).sum(-1)


def cross_measures(
    rows: Stack,
    columns: Stack,
    wanted: torch.Tensor,
    measure: Measure,
    *,
    max_memory: int = 2**30,
    reserved: int = 0,
    progress: Callable[[float], None] | None = None,
) -> torch.Tensor:
    """A number from the cross product ``Y_h^T Z_k`` of every wanted pair of heads.

    Parameters
    ----------
    rows, columns : Tensor or StoredStack, of shape (n_rows, d_model, r), (n_columns, d_model, s)
        Factors of the heads, of one dtype.
    wanted : Tensor of shape (n_rows, n_columns), bool
        Which pairs to measure.
    measure : callable
        From cross products (n, r, s) and the positions of their heads to n numbers.
    max_memory : int
        Bytes of scratch beyond the inputs and the result.
    reserved : int
        Bytes of these that the measure itself takes.
    progress : callable, optional
        Called with the fraction done, from time to time.

    Returns
    -------
    Tensor of shape (n_rows, n_columns), float64
        NaN where not wanted.

    Raises
    ------
    MemoryBudgetError
        If not even a single pair fits.
    """
    n_rows, n_columns = _tile(rows, columns, max_memory, reserved)
    out = torch.full(wanted.shape, math.nan, dtype=torch.float64)
    wanted = wanted.cpu()
    total, done = max(int(wanted.sum()), 1), 0
    with fast_float32_matmul(rows.device):
        for start in range(0, len(rows), n_rows):
            left = None
            for first in range(0, len(columns), n_columns):
                tile = wanted[start : start + n_rows, first : first + n_columns]
                i, j = tile.nonzero(as_tuple=True)
                if len(i) == 0:
                    continue
                if left is None:
                    left = rows[start : start + n_rows].mT.flatten(0, 1)
                cross = _cross(left, columns[first : first + n_columns], rows.shape[2], i, j)
                out[start + i, first + j] = measure(cross, start + i, first + j).cpu().double()
                done += len(i)
                if progress is not None:
                    progress(done / total)
    return out


def _tile(rows: Stack, columns: Stack, max_memory: int, reserved: int) -> tuple[int, int]:
    """Heads on each side of a tile that fits into the budget."""
    (_, d_model, r), s = rows.shape, columns.shape[2]
    itemsize = rows.element_size()
    n_rows, n_columns = (max(min(len(x), _WIDEST_TILE), 1) for x in (rows, columns))

    def scratch() -> int:
        copies = d_model * (n_rows * r + n_columns * s)
        return itemsize * (copies + _CROSS_COPIES * n_rows * r * n_columns * s) + reserved

    while scratch() > max_memory and max(n_rows, n_columns) > 1:
        if n_rows >= n_columns:
            n_rows = -(-n_rows // 2)
        else:
            n_columns = -(-n_columns // 2)
    if scratch() > max_memory:
        raise MemoryBudgetError(
            f"max_memory is {max_memory} bytes, but the smallest tiles need {scratch()}; "
            "raise max_memory"
        )
    return n_rows, n_columns


def _cross(
    left: torch.Tensor, columns: torch.Tensor, r: int, i: torch.Tensor, j: torch.Tensor
) -> torch.Tensor:
    """Cross products of chosen pairs of a tile, from one product of the whole tile."""
    n_columns, _, s = columns.shape
    product = left @ columns.mT.flatten(0, 1).mT
    i, j = i.to(product.device), j.to(product.device)
    return product.view(-1, r, n_columns, s)[i, :, j]


def decomposable(stack: torch.Tensor) -> torch.Tensor:
    """The same numbers where they can be decomposed, which Apple's GPUs cannot."""
    return stack if supports_float64(stack.device) else stack.cpu().double()
