"""Law of the projection kernel between independent uniformly random (Haar) subspaces."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["HaarMoments", "haar_moments"]


class HaarMoments(NamedTuple):
    """Exact moments of the projection kernel of two Haar subspaces.

    Attributes
    ----------
    mean, variance : ndarray
    third_central : ndarray
        Third central moment, equal to the third cumulant.
    fourth_cumulant : ndarray
        NaN where ``d < 4``, for which the closed form does not hold.

    Examples
    --------
    >>> from skhead.stats import haar_moments
    >>> moments = haar_moments(64, 64, 768)
    >>> moments.mean.round(4).item(), moments.variance.round(4).item()
    (5.3333, 0.0117)
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    third_central: NDArray[np.float64]
    fourth_cumulant: NDArray[np.float64]


def haar_moments(r: ArrayLike, s: ArrayLike, d: ArrayLike) -> HaarMoments:
    """Mean, variance, third central moment and fourth cumulant, exactly, for unequal ranks.

    With U fixed and V uniform, ``U^T V V^T U`` follows a matrix Beta law, so that the kernel is
    Pillai's trace, whose moments are sums over zonal polynomials.

    Parameters
    ----------
    r, s : array-like of int
        Ranks of the two subspaces, 0 to `d`; broadcast against each other.
    d : array-like of int
        Dimension of the space, at least 1.

    Returns
    -------
    HaarMoments
        Arrays of the broadcast shape, in units of the kernel (squared cosines) and its powers.

    Raises
    ------
    ValueError
        If a rank is negative or above `d`.

    References
    ----------
    .. [1] K. C. S. Pillai, "Some new test criteria in multivariate analysis", Annals of
       Mathematical Statistics 26 (1955).
    .. [2] R. J. Muirhead, "Aspects of Multivariate Statistical Theory", Wiley (1982), chapter 7.

    Examples
    --------
    >>> from skhead.stats import haar_moments
    >>> moments = haar_moments(64, 64, 768)
    >>> float(moments.mean), float(moments.variance)
    (5.333..., 0.011655...)
    """
    r, s, d = (np.asarray(x, dtype=np.float64) for x in (r, s, d))
    if np.any(d < 1) or np.any(r < 0) or np.any(s < 0) or np.any(r > d) or np.any(s > d):
        raise ValueError(
            f"haar_moments: ranks must lie between 0 and the dimension; got r={r}, s={s}, d={d}"
        )
    a, b = r * (d - r), s * (d - s)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = 2 * a * b / (d**2 * (d - 1) * (d + 2))
        third = (8 * a * b * (d - 2 * r) * (d - 2 * s)) / (
            d**3 * (d - 2) * (d - 1) * (d + 2) * (d + 4)
        )
        q0 = 48 * d**3 * (d - 1) * (d + 2) * (d**2 + d + 2)
        q1 = -48 * d**2 * (d - 1) * (d + 2) * (5 * d + 6)
        q2 = 48 * (24 * d**3 + 55 * d**2 - 42 * d - 72)
        fourth = (a * b * (q0 + q1 * (a + b) + q2 * a * b)) / (
            d**4 * (d - 1) ** 2 * (d + 2) ** 2 * (d - 3) * (d - 2) * (d + 1) * (d + 4) * (d + 6)
        )
    fixed = (a == 0) | (b == 0)
    variance, third = (np.where(fixed, 0.0, x) for x in (variance, third))
    third = np.where((d == 2) & ~fixed, 0.0, third)
    fourth = np.where(fixed, 0.0, np.where(d < 4, np.nan, fourth))
    return HaarMoments(r * s / d, variance, third, fourth)
