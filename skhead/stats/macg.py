"""The matrix angular central Gaussian law: column spaces of correlated Gaussian matrices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from skhead.exceptions import HeadShapeError

__all__ = ["covariance_from_projector", "projector_from_covariance", "sample_macg"]

#: Eigenvalues this far below zero, or from one, relative to the largest, are rounding.
_ROUNDING = 1e-6


def projector_from_covariance(covariance: NDArray[np.floating], rank: int) -> NDArray[np.float64]:
    """Expected projector onto the column space of `rank` Gaussian vectors of the covariance.

    ``M = S (S + k I)^-1`` with k such that ``tr M = rank``: the deterministic equivalent, which
    errs by ``O(1/d)``. The covariance may come from activations, embeddings or pooled weights; its
    scale does not matter.

    Parameters
    ----------
    covariance : ndarray of shape (d_model, d_model)
        Symmetric and positive semi-definite.
    rank : int
        Dimension of the subspaces, at most the rank of the covariance.

    Returns
    -------
    ndarray of shape (d_model, d_model), float64

    Raises
    ------
    HeadShapeError
        If the matrix is not square.
    ValueError
        If it is not symmetric, has a negative eigenvalue or fewer directions than `rank`.

    References
    ----------
    .. [1] Z. Bai and J. Silverstein, "Spectral Analysis of Large Dimensional Random Matrices",
       Springer (2010), for deterministic equivalents.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import projector_from_covariance
    >>> projector_from_covariance(np.eye(4), rank=1).diagonal()
    array([0.25, 0.25, 0.25, 0.25])
    """
    values, directions = _spectrum(covariance, "projector_from_covariance")
    share = _fill(values, rank, "projector_from_covariance")
    return (directions * share) @ directions.T


def covariance_from_projector(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    """Covariance whose Gaussian subspaces have the given expected projector.

    The inverse of `projector_from_covariance`: an eigenvalue m of the projector becomes
    ``m / (1 - m)``. Together they turn the mean projector of heads of one rank into that of
    another.

    Parameters
    ----------
    matrix : ndarray of shape (d_model, d_model)
        Mean projector, eigenvalues in [0, 1).

    Returns
    -------
    ndarray of shape (d_model, d_model), float64

    Raises
    ------
    HeadShapeError
        If the matrix is not square.
    ValueError
        If it is not symmetric or an eigenvalue is outside [0, 1).

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import covariance_from_projector
    >>> covariance_from_projector(np.diag([0.5, 0.75])).diagonal()
    array([1., 3.])
    """
    values, directions = _spectrum(matrix, "covariance_from_projector")
    if values[-1] > 1 - _ROUNDING:
        raise ValueError(
            "covariance_from_projector: the mean projector has the eigenvalue "
            f"{values[-1]:.9g}, so that every subspace holds one direction; draw it towards "
            "isotropy with shrink_projector first"
        )
    return (directions * (values / (1 - values))) @ directions.T


def sample_macg(
    covariance: NDArray[np.floating],
    rank: int,
    size: int,
    random_state: int | np.random.Generator | None = None,
) -> NDArray[np.float64]:
    """Orthonormal bases of subspaces drawn from the matrix angular central Gaussian law.

    Parameters
    ----------
    covariance : ndarray of shape (d_model, d_model)
        Symmetric and positive semi-definite; the identity gives uniform (Haar) subspaces.
    rank : int
        Dimension of the subspaces, at most the rank of the covariance.
    size : int
        Number of draws.
    random_state : int, Generator or None, default=None
        None draws differently every time.

    Returns
    -------
    ndarray of shape (size, d_model, rank), float64

    Raises
    ------
    HeadShapeError
        If the matrix is not square.
    ValueError
        If it is not symmetric, has a negative eigenvalue or fewer directions than `rank`.

    References
    ----------
    .. [1] Y. Chikuse, "Statistics on Special Manifolds", Springer (2003), section 2.4.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import sample_macg
    >>> bases = sample_macg(np.diag([4.0, 1.0, 1.0]), rank=2, size=5, random_state=0)
    >>> np.allclose(bases.mT @ bases, np.eye(2))
    True
    """
    values, directions = _spectrum(covariance, "sample_macg")
    _check_rank(values, rank, "sample_macg")
    generator = np.random.default_rng(random_state)
    root = directions * np.sqrt(values)
    drawn = root @ generator.standard_normal((size, len(values), rank))
    return np.asarray(np.linalg.qr(drawn)[0], dtype=np.float64)


def _fill(values: NDArray[np.float64], rank: int, caller: str) -> NDArray[np.float64]:
    """Eigenvalues of the projector from those of the covariance."""
    positive = _check_rank(values, rank, caller)
    if len(positive) == rank:
        return np.where(values > 0, 1.0, 0.0)

    def missing(log_level: float) -> float:
        return float((positive / (positive + np.exp(log_level))).sum()) - rank

    lowest = np.log(positive.min() * (len(positive) - rank) / rank)
    highest = np.log(positive.sum() / rank)
    level = np.exp(brentq(missing, lowest - 1e-6, highest + 1e-6, xtol=1e-13))
    return np.asarray(values / (values + level))


def _check_rank(values: NDArray[np.float64], rank: int, caller: str) -> NDArray[np.float64]:
    positive = values[values > 0]
    if not 1 <= rank <= len(positive):
        raise ValueError(
            f"{caller}: the rank must lie between 1 and the {len(positive)} directions that the "
            f"covariance has, got {rank}"
        )
    return positive


def _spectrum(
    matrix: NDArray[np.floating], caller: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rising eigenvalues, those of rounding size exactly zero, and eigenvectors."""
    square = np.asarray(matrix, dtype=np.float64)
    if square.ndim != 2 or square.shape[0] != square.shape[1] or square.size == 0:
        raise HeadShapeError(f"{caller}: needs a square matrix, got shape {square.shape}")
    largest = np.abs(square).max()
    if not np.isfinite(largest) or np.abs(square - square.T).max() > _ROUNDING * largest:
        raise ValueError(f"{caller}: the matrix must be symmetric and finite")
    values, directions = np.linalg.eigh(square)
    if values[0] < -_ROUNDING * values[-1]:
        raise ValueError(f"{caller}: the matrix has the negative eigenvalue {values[0]:.6g}")
    noise = values[-1] * len(values) * np.finfo(np.float64).eps
    return np.where(values > noise, values, 0.0), directions
