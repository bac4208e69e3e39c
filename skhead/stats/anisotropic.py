"""Kernel between independent subspaces that prefer the same directions, in closed form.

Under the isotropic law the expected projector of a head is ``(r/d) I``; trained heads share
preferred directions, and their mean projector says which. For independent subspaces with mean
projectors ``M_A`` and ``M_B`` the projection kernel has mean ``tr(M_A M_B)``. Its variance under
the matrix angular central Gaussian law (`skhead.stats.sample_macg`) is a sum of three terms: what
the row head does to all its kernels, what the column head does, and the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from skhead.exceptions import DegenerateHeadError, HeadShapeError
from skhead.linalg.devices import supports_float64
from skhead.linalg.precision import fast_float32_matmul

__all__ = [
    "AnisotropicMoments",
    "MeanProjector",
    "anisotropic_moments",
    "mean_projector",
    "projector_traces",
    "shrink_projector",
]

#: Basis vectors per matrix product: enough for full speed, little memory.
_COLUMNS = 4096
#: How far the length of a basis vector may be from 1, or from 0 past the rank.
_LENGTH_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class MeanProjector:
    """Weighted mean of the orthogonal projectors onto some heads' subspaces.

    Attributes
    ----------
    matrix : Tensor of shape (d_model, d_model)
        Symmetric, eigenvalues in [0, 1]; its trace is the mean rank.
    weights : ndarray of shape (n_bases,), float64
        Heads that use each basis; 0 for a basis left out of the mean.
    ranks : ndarray of shape (n_bases,), int64

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import mean_projector
    >>> axes = np.eye(3)[:, :, None]
    >>> mean_projector(axes).matrix.trace().item()
    1.0
    """

    matrix: torch.Tensor
    weights: NDArray[np.float64]
    ranks: NDArray[np.int64]


@dataclass(frozen=True)
class AnisotropicMoments:
    """Moments of the kernel of two independent subspaces, in units of squared cosines.

    Attributes
    ----------
    mean, variance : float
    row_sd : float
        Standard deviation of the mean kernel of one row subspace with all column subspaces. An
        observed spread far above it says that the heads are no draws of one common law.
    column_sd : float
        The same of one column subspace.
    effective_dimension : float
        The dimension in which isotropic subspaces of the same ranks have this mean.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import anisotropic_moments
    >>> isotropic = np.eye(768) * 64 / 768
    >>> round(anisotropic_moments(isotropic, isotropic).mean, 4)
    5.3333
    """

    mean: float
    variance: float
    row_sd: float
    column_sd: float
    effective_dimension: float


def mean_projector(
    vectors: torch.Tensor | NDArray[np.floating], weights: ArrayLike | None = None
) -> MeanProjector:
    """Mean of the projectors ``U U^T``, without forming any single one.

    Parameters
    ----------
    vectors : Tensor or ndarray of shape (n_bases, d_model, max_rank)
        Orthonormal columns; those past a basis' rank are zero.
    weights : array-like of shape (n_bases,), default=None
        Weight of every basis, such as the number of heads that share it; None weighs all alike. A
        mean over a group of heads gives 0 to the others.

    Returns
    -------
    MeanProjector
        On the device of `vectors`; summed in float64 where the device has it.

    Raises
    ------
    HeadShapeError
        If the stack is not 3-D or there is not one weight per basis.
    DegenerateHeadError
        If a basis vector has neither length 1 nor length 0, or a basis with weight is empty.
    ValueError
        If a weight is negative or none is positive.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import mean_projector
    >>> axes = np.eye(3)[:, :, None]
    >>> mean_projector(axes, weights=[2, 1, 1]).matrix.diagonal().round(decimals=6).tolist()
    [0.5, 0.25, 0.25]
    """
    stack = _checked_stack(vectors, "mean_projector")
    ranks = _ranks(stack)
    shares = np.ones(len(stack)) if weights is None else np.asarray(weights, dtype=np.float64)
    if shares.shape != (len(stack),):
        raise HeadShapeError(
            f"mean_projector: {len(stack)} bases need as many weights, got shape {shares.shape}"
        )
    if not np.all(shares >= 0) or not 0 < shares.sum() < np.inf:
        raise ValueError(
            "mean_projector: weights must be finite and not negative, at least one positive; "
            f"got values from {shares.min()} to {shares.max()}"
        )
    empty = np.flatnonzero((ranks == 0) & (shares > 0))
    if len(empty):
        raise DegenerateHeadError(
            f"mean_projector: basis {empty[0]} has rank 0; give it weight 0 or leave it out"
        )
    d_model = stack.shape[1]
    total = stack.new_zeros(d_model, d_model, dtype=_wide_dtype(stack.device))
    scale = torch.as_tensor(np.sqrt(shares), dtype=stack.dtype, device=stack.device)
    with fast_float32_matmul(stack.device):
        for part in _parts(stack):
            columns = _side_by_side(stack[part] * scale[part, None, None])
            total += columns @ columns.T
    return MeanProjector(total / shares.sum(), shares, ranks)


def projector_traces(
    vectors: torch.Tensor | NDArray[np.floating], matrix: torch.Tensor
) -> NDArray[np.float64]:
    """``tr(U U^T M)`` of every basis: its mean kernel with the subspaces whose mean is `matrix`.

    Parameters
    ----------
    vectors : Tensor or ndarray of shape (n_bases, d_model, max_rank)
        Orthonormal columns; those past a basis' rank are zero.
    matrix : Tensor of shape (d_model, d_model)
        A mean projector.

    Returns
    -------
    ndarray of shape (n_bases,), float64

    Raises
    ------
    HeadShapeError
        If the widths differ.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import mean_projector, projector_traces
    >>> axes = np.eye(4)[:, :, None]
    >>> projector_traces(axes, mean_projector(axes).matrix)
    array([0.25, 0.25, 0.25, 0.25])
    """
    stack = _checked_stack(vectors, "projector_traces")
    if matrix.shape != (stack.shape[1],) * 2:
        raise HeadShapeError(
            f"projector_traces: bases of width {stack.shape[1]} need a square matrix of that "
            f"width, got shape {tuple(matrix.shape)}"
        )
    narrow = matrix.to(dtype=stack.dtype, device=stack.device)
    traces = []
    with fast_float32_matmul(stack.device):
        for part in _parts(stack):
            heads = stack[part]
            columns = _side_by_side(heads)
            sums = ((narrow @ columns) * columns).sum(0)
            wide = sums.to(_wide_dtype(stack.device)).view(len(heads), -1).sum(1)
            traces.append(wide.cpu().numpy().astype(np.float64))
    return np.concatenate(traces)


def shrink_projector(matrix: torch.Tensor, amount: float) -> torch.Tensor:
    """``(1 - amount) M + amount (tr M / d) I``: the mean projector drawn towards isotropy.

    A mean over few heads overstates their common directions; 12 heads of rank 64 can fill 768
    dimensions without sharing any.

    Parameters
    ----------
    matrix : Tensor of shape (d_model, d_model)
        A mean projector.
    amount : float
        0 keeps the matrix, 1 makes it isotropic.

    Returns
    -------
    Tensor of shape (d_model, d_model)

    Raises
    ------
    ValueError
        If the amount is outside [0, 1].

    Examples
    --------
    >>> import torch
    >>> from skhead.stats import shrink_projector
    >>> shrink_projector(torch.diag(torch.tensor([1.0, 0.0])), 0.5).diagonal().tolist()
    [0.75, 0.25]
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"shrink_projector: the amount must lie in [0, 1], got {amount!r}")
    level = amount * matrix.diagonal().mean()
    return (1 - amount) * matrix + level * torch.eye(len(matrix)).to(matrix)


def anisotropic_moments(
    row_matrix: torch.Tensor | NDArray[np.floating],
    column_matrix: torch.Tensor | NDArray[np.floating],
) -> AnisotropicMoments:
    """Mean and variance of the kernel of independent angular central Gaussian subspaces.

    With ``C = M - M^2`` of both sides, ``a = tr(C_B M_A) / tr(C_B)`` and ``b`` likewise,

    .. code-block:: text

        Var = 2 tr(C_A C_B)^2 / (tr C_A tr C_B)
              + 2 tr[C_B (M_A - a I)]^2 / tr C_B
              + 2 tr[C_A (M_B - b I)]^2 / tr C_A

    The formula is an asymptotic one: for isotropic means it is the exact variance up to a factor
    ``1 + O(1/d)``, and it is off by up to a tenth of the standard deviation for steep spectra
    (eigenvalues falling as the inverse square of their rank).

    Parameters
    ----------
    row_matrix, column_matrix : Tensor or ndarray of shape (d_model, d_model)
        Mean projectors of the two sides.

    Returns
    -------
    AnisotropicMoments

    Raises
    ------
    HeadShapeError
        If the matrices are not square and of one width.
    ValueError
        If a matrix is no mean projector: a diagonal entry outside [0, 1], or not a number.

    References
    ----------
    .. [1] Y. Chikuse, "Statistics on Special Manifolds", Springer (2003), for the law.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import anisotropic_moments
    >>> isotropic = np.eye(768) * 64 / 768
    >>> moments = anisotropic_moments(isotropic, isotropic)
    >>> round(moments.mean, 4), round(moments.effective_dimension, 1)
    (5.3333, 768.0)
    """
    a, b = (_checked_matrix(matrix) for matrix in (row_matrix, column_matrix))
    if a.shape != b.shape:
        raise HeadShapeError(
            f"anisotropic_moments: widths differ: {tuple(a.shape)} and {tuple(b.shape)}"
        )
    b = b.to(a.device)
    mean = float((a * b).sum())
    spread_a, spread_b = a - a @ a, b - b @ b
    total_a, total_b = float(spread_a.trace()), float(spread_b.trace())
    column_variance = _effect_variance(spread_b, total_b, a)
    row_variance = _effect_variance(spread_a, total_a, b)
    rest = 0.0
    if total_a * total_b > 0:
        rest = 2 * float((spread_a * spread_b).sum()) ** 2 / (total_a * total_b)
    effective = float(a.trace() * b.trace()) / mean if mean > 0 else float("inf")
    return AnisotropicMoments(
        mean,
        rest + row_variance + column_variance,
        float(np.sqrt(row_variance)),
        float(np.sqrt(column_variance)),
        effective,
    )


def _effect_variance(spread: torch.Tensor, total: float, other: torch.Tensor) -> float:
    """Variance of ``tr(P M)`` over projectors P of the given spread, M being `other`."""
    if total <= 0:
        return 0.0
    level = (spread * other).sum() / total
    product = spread @ other - level * spread
    return 2 * float((product * product.T).sum()) / total


def _checked_stack(vectors: torch.Tensor | NDArray[np.floating], caller: str) -> torch.Tensor:
    stack = torch.as_tensor(vectors)
    if stack.ndim != 3 or 0 in stack.shape:
        raise HeadShapeError(
            f"{caller}: bases must have shape (n_bases, d_model, max_rank), none of them 0; "
            f"got {tuple(stack.shape)}"
        )
    return stack


def _ranks(stack: torch.Tensor) -> NDArray[np.int64]:
    lengths = torch.linalg.vector_norm(stack, dim=1)
    used = lengths > 0.5
    off = (lengths - used.to(lengths)).abs().amax(1)
    worst = int(off.argmax())
    if not float(off[worst]) <= _LENGTH_TOLERANCE:
        raise DegenerateHeadError(
            f"mean_projector: basis {worst} has a vector whose length is neither 1 nor 0 (off by "
            f"{float(off[worst]):.3g}); pass orthonormal bases, as SubspaceExtractor makes them"
        )
    return np.asarray(used.sum(1).cpu().numpy(), dtype=np.int64)


def _checked_matrix(matrix: torch.Tensor | NDArray[np.floating]) -> torch.Tensor:
    wide = torch.as_tensor(matrix)
    if wide.ndim != 2 or wide.shape[0] != wide.shape[1]:
        raise HeadShapeError(
            f"anisotropic_moments: a mean projector is square, got shape {tuple(wide.shape)}"
        )
    wide = wide.to(_wide_dtype(wide.device))
    low, high = float(wide.diagonal().min()), float(wide.diagonal().max())
    if not (low >= -_LENGTH_TOLERANCE and high <= 1 + _LENGTH_TOLERANCE):
        raise ValueError(
            "anisotropic_moments: the diagonal of a mean projector lies in [0, 1], got "
            f"[{low:.6g}, {high:.6g}]; pass the mean of projectors, not a covariance"
        )
    return wide


def _parts(stack: torch.Tensor) -> Iterator[slice]:
    step = max(_COLUMNS // stack.shape[2], 1)
    for start in range(0, len(stack), step):
        yield slice(start, start + step)


def _side_by_side(heads: torch.Tensor) -> torch.Tensor:
    """All basis vectors as columns of one matrix, head after head."""
    return heads.permute(1, 0, 2).reshape(heads.shape[1], -1)


def _wide_dtype(device: torch.device) -> torch.dtype:
    return torch.float64 if supports_float64(device) else torch.float32
