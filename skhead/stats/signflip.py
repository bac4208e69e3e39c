"""Kernel of a pair after random reflections of one of its subspaces, in closed form."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from skhead.exceptions import HeadShapeError, MemoryBudgetError
from skhead.linalg.devices import exact_device
from skhead.linalg.precision import fast_float32_matmul, wide

__all__ = ["SignflipMoments", "pooled_eigenbasis", "signflip_moments"]

#: How far the axes may be from orthonormal.
_AXES_TOLERANCE = 1e-3
#: Scratch beyond which larger panels only miss the processor's cache.
_PANEL_BYTES = 2**26


class SignflipMoments(NamedTuple):
    """Moments of the kernel of every pair under random sign flips.

    Attributes
    ----------
    mean, variance : ndarray of shape (n_rows, n_columns), float64
        In units of squared cosines and their squares.

    Examples
    --------
    >>> import torch
    >>> from skhead.stats import signflip_moments
    >>> diagonal = torch.tensor([[[0.6], [0.8]]])
    >>> signflip_moments(diagonal, diagonal)._fields
    ('mean', 'variance')
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


def pooled_eigenbasis(*matrices: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of the average of some mean projectors, each scaled to trace 1.

    Parameters
    ----------
    *matrices : Tensor of shape (d_model, d_model)
        Mean projectors, such as those of the two roles of a pair kind.

    Returns
    -------
    Tensor of shape (d_model, d_model)
        One axis per column, the most shared direction last.

    Raises
    ------
    HeadShapeError
        If there is no matrix, or they are not square and of one width.

    Examples
    --------
    >>> import torch
    >>> from skhead.stats import pooled_eigenbasis
    >>> pooled_eigenbasis(torch.diag(torch.tensor([0.75, 0.25]))).abs()
    tensor([[0., 1.],
            [1., 0.]])
    """
    shapes = {tuple(matrix.shape) for matrix in matrices}
    square = len(shapes) == 1 and len(matrices[0].shape) == 2 and len(set(matrices[0].shape)) == 1
    if not square:
        raise HeadShapeError(
            f"pooled_eigenbasis: needs square matrices of one width, got shapes {sorted(shapes)}"
        )
    pooled = torch.stack([matrix / matrix.trace() for matrix in matrices]).mean(0)
    able = pooled.to(exact_device(pooled.device))
    axes: torch.Tensor = torch.linalg.eigh(able)[1]
    return axes.to(pooled.device)


def signflip_moments(
    rows: torch.Tensor,
    columns: torch.Tensor,
    axes: torch.Tensor | None = None,
    max_memory: int = 2**30,
) -> SignflipMoments:
    """Mean and variance of the kernel when one side's axes flip their signs at random.

    One subspace is replaced by its image under ``E D E^T``, with D diagonal of independent random
    signs. How much energy a head has on every axis stays as it is; how its directions combine the
    axes is what is randomised. With the projectors P and Q of a pair written in the axes,

        ``E = sum_k P_kk Q_kk`` and ``Var = 2 sum_{k != l} P_kl^2 Q_kl^2``.

    The result depends on the axes, which are arbitrary within a set of equal eigenvalues.

    Parameters
    ----------
    rows, columns : Tensor of shape (n_rows, d_model, max_rank), (n_columns, d_model, max_rank)
        Orthonormal bases; columns past the rank are zero.
    axes : Tensor of shape (d_model, d_model), default=None
        Orthonormal axes as columns, such as `pooled_eigenbasis`; None takes the residual stream's
        own coordinates.
    max_memory : int, default=1073741824
        Bytes of scratch beyond inputs, their copies in the axes, and results.

    Returns
    -------
    SignflipMoments

    Raises
    ------
    HeadShapeError
        If the widths differ or the axes are not orthonormal.
    MemoryBudgetError
        If the memory does not hold one line of every projector.

    Examples
    --------
    >>> import torch
    >>> from skhead.stats import signflip_moments
    >>> diagonal = torch.tensor([[[0.6], [0.8]]])
    >>> moments = signflip_moments(diagonal, diagonal)
    >>> moments.mean.round(4), moments.variance.round(4)
    (array([[0.5392]]), array([[0.2123]]))
    """
    left, right = (_in_axes(stack, axes) for stack in (rows, columns))
    if left.shape[1] != right.shape[1]:
        raise HeadShapeError(
            f"signflip_moments: widths differ: {left.shape[1]} (rows), {right.shape[1]} (columns)"
        )
    with fast_float32_matmul(left.device):
        energies = [stack.square().sum(2) for stack in (left, right)]
        mean = wide(energies[0]) @ wide(energies[1]).T
        variance = 4 * _upper_products(left, right, max_memory)
    return SignflipMoments(*(part.cpu().numpy().astype(np.float64) for part in (mean, variance)))


def _upper_products(left: torch.Tensor, right: torch.Tensor, max_memory: int) -> torch.Tensor:
    """``sum_{k < l} P_kl^2 Q_kl^2`` of all pairs, some lines of the projectors at a time."""
    d_model = left.shape[1]
    total = wide(left.new_zeros(len(left), len(right)))
    start = 0
    while start < d_model - 1:
        width = d_model - start
        line = (len(left) + len(right)) * width * left.element_size()
        if 2 * line > max_memory:
            raise MemoryBudgetError(
                f"signflip_moments: max_memory is {max_memory} bytes, but one line of every "
                f"projector needs {2 * line}; raise max_memory or compare fewer heads at once"
            )
        lines = min(max(min(max_memory, _PANEL_BYTES) // (2 * line), 1), width)
        squares = [_squared_lines(stack, start, start + lines) for stack in (left, right)]
        total += squares[0] @ squares[1].T
        start += lines
    return total


def _squared_lines(stack: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Squared entries right of the diagonal of some lines of every projector, one row a head."""
    lines = torch.bmm(stack[:, start:stop], stack[:, start:].mT)
    return lines.square_().triu_(1).flatten(1)


def _in_axes(stack: torch.Tensor, axes: torch.Tensor | None) -> torch.Tensor:
    if stack.ndim != 3 or 0 in stack.shape:
        raise HeadShapeError(
            "signflip_moments: bases must have shape (n_bases, d_model, max_rank), none of them 0; "
            f"got {tuple(stack.shape)}"
        )
    if axes is None:
        return stack
    d_model = stack.shape[1]
    if axes.shape != (d_model, d_model):
        raise HeadShapeError(
            f"signflip_moments: bases of width {d_model} need axes of shape ({d_model}, "
            f"{d_model}), got {tuple(axes.shape)}"
        )
    own = axes.to(stack)
    error = float((own.T @ own - torch.eye(d_model).to(own)).abs().max())
    if not error <= _AXES_TOLERANCE:
        raise HeadShapeError(
            f"signflip_moments: the axes are not orthonormal (off by {error:.3g}); pass "
            "eigenvectors, such as those of pooled_eigenbasis"
        )
    return own.T @ stack
