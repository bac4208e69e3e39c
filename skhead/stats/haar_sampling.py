"""Exact draws of the projection kernel between Haar subspaces, without drawing a subspace."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ReducedLaw", "check_ranks", "haar_sample", "reduce_law"]

#: Draws made together: a few vectors of this length stay in a core's cache.
_CHUNK = 2**15


class ReducedLaw(NamedTuple):
    """A law as ``offset + sign * kernel`` with ``r <= s <= d / 2``."""

    r: int
    s: int
    d: int
    offset: int
    sign: int


def check_ranks(
    caller: str, r: NDArray[np.int64], s: NDArray[np.int64], d: NDArray[np.int64]
) -> None:
    """Raise ValueError unless every rank lies between 0 and its dimension."""
    bad = (d < 1) | (r < 0) | (s < 0) | (r > d) | (s > d)
    if np.any(bad):
        r, s, d = (np.broadcast_to(x, bad.shape)[bad][0] for x in (r, s, d))
        raise ValueError(
            f"{caller}: ranks must lie between 0 and the dimension, which must be at least 1; "
            f"got r={r}, s={s}, d={d}"
        )


def reduce_law(r: int, s: int, d: int) -> ReducedLaw:
    """Exchange every subspace above half the dimension for its complement.

    A subspace and its complement share the kernel with a third one: the two add up to its rank.
    """
    offset, sign = 0, 1
    if 2 * s > d:
        offset, sign, s = r, -1, d - s
    if 2 * r > d:
        offset, sign, r = offset + sign * s, -sign, d - r
    return ReducedLaw(min(r, s), max(r, s), d, offset, sign)


def haar_sample(
    r: int,
    s: int,
    d: int,
    size: int | tuple[int, ...] | None = None,
    random_state: int | np.random.Generator | None = None,
) -> NDArray[np.float64] | float:
    """Draw projection kernels of two independent uniformly random subspaces, exactly.

    The squared cosines of the principal angles are those of a bidiagonal matrix of independent Beta
    variates. The kernel is their sum, a trace, for which no matrix is needed: a draw costs
    ``2 min(r, s) - 1`` Beta variates, whatever the dimension.

    Parameters
    ----------
    r, s : int
        Ranks of the two subspaces, 0 to `d`.
    d : int
        Dimension of the space, at least 1.
    size : int or tuple of int, default=None
        Shape of the sample; None draws one number.
    random_state : int or Generator, default=None
        Seed or source of the random numbers; None draws other numbers at every call.

    Returns
    -------
    float or ndarray of shape `size`
        float64, sums of squared cosines.

    Raises
    ------
    ValueError
        If a rank is negative or above `d`.

    References
    ----------
    .. [1] A. Edelman and B. D. Sutton, "The beta-Jacobi matrix model, the CS decomposition, and
       generalized singular value problems", Foundations of Computational Mathematics 8 (2008).

    Examples
    --------
    >>> from skhead.stats import haar_sample
    >>> sample = haar_sample(64, 64, 768, size=10_000, random_state=0)
    >>> sample.shape, round(float(sample.mean()), 1), round(float(sample.std()), 2)
    ((10000,), 5.3, 0.11)
    """
    check_ranks("haar_sample", np.asarray(r), np.asarray(s), np.asarray(d))
    law = reduce_law(int(r), int(s), int(d))
    shape = (size,) if isinstance(size, int | np.integer) else tuple(size or ())
    generator = np.random.default_rng(random_state)
    sample = np.empty(prod(shape))
    for start in range(0, sample.size, _CHUNK):
        part = sample[start : start + _CHUNK]
        part[:] = law.offset + law.sign * _trace(law, part.size, generator)
    return float(sample[0]) if size is None else sample.reshape(shape)


def _trace(law: ReducedLaw, n: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Traces of `n` beta-Jacobi matrices, diagonal element by diagonal element."""
    trace = np.zeros(n)
    above: NDArray[np.float64] | None = None
    a, b = law.s - law.r, law.d - law.s - law.r
    for k in range(law.r, 0, -1):
        cosine = generator.beta((a + k) / 2, (b + k) / 2, n)
        if above is None:
            trace += cosine
        else:
            tilt = generator.beta(k / 2, (a + b + 1 + k) / 2, n)
            trace += cosine * (1 - tilt) + (1 - above) * tilt
        above = cosine
    return trace
