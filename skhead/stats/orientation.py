"""Overlaps of fixed spectra in random orientation.

Two positive semidefinite matrices M and N of trace 1, each turned at random: then the trace-free
parts of M and N are independent random elements of a space of dimension ``(d - 1)(d + 2) / 2``, on
which rotations act irreducibly, which gives the first two moments of ``tr(M N)``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import poch

__all__ = ["Moments", "oriented_overlap_moments", "root_moments"]

#: Relative variance below which the mean of a root is taken from its series.
_NARROW = 1e-8


class Moments(NamedTuple):
    """Mean and variance of a law.

    Attributes
    ----------
    mean, variance : ndarray
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


def oriented_overlap_moments(
    row_sizes: ArrayLike, column_sizes: ArrayLike, d_model: int
) -> Moments:
    """Moments of ``tr(M N)`` for matrices of trace 1, the one turned at random against the other.

    Parameters
    ----------
    row_sizes, column_sizes : array-like
        Frobenius norms of M and of N, broadcastable with each other.
    d_model : int
        Dimension of the space.

    Returns
    -------
    Moments
        Exact, for any spectra. With M and N multiplied by their ranks, projectors of ranks r and s
        have those of the projection kernel.
    """
    a, b = (np.square(np.asarray(x, dtype=np.float64)) for x in (row_sizes, column_sizes))
    uneven = np.maximum(a - 1 / d_model, 0.0) * np.maximum(b - 1 / d_model, 0.0)
    variance = 2 * uneven / max((d_model - 1) * (d_model + 2), 1)
    return Moments(np.full(variance.shape, 1 / d_model), variance)


def root_moments(mean: ArrayLike, variance: ArrayLike, upper: ArrayLike) -> Moments:
    """Moments of the square root of a variable between 0 and `upper`.

    As if it followed a scaled Beta law, which is exact for squared cosines of random lines.

    Parameters
    ----------
    mean, variance : array-like
        Of the variable.
    upper : array-like
        Its largest value; where this is 0, so is the root.

    Returns
    -------
    Moments
    """
    mean, variance, upper = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (mean, variance, upper))
    )
    scale = np.where(upper > 0, upper, 1.0)
    m, v = np.clip(mean / scale, 0.0, 1.0), variance / scale**2
    spread = np.divide(v, m**2, out=np.zeros_like(m), where=m > 0)
    series = np.sqrt(m) * (1 - spread / 8)
    wide = (spread > _NARROW) & (m < 1)
    total = np.divide(m * (1 - m), v, out=np.full_like(m, 2.0), where=wide) - 1
    total = np.maximum(total, np.finfo(np.float64).tiny)
    law = poch(m * total, 0.5) / poch(total, 0.5)
    root = np.where(wide, law, series)
    root_variance = np.where(wide, np.maximum(m - root**2, 0.0), v / np.where(m > 0, 4 * m, 1.0))
    return Moments(root * np.sqrt(scale), root_variance * scale)
