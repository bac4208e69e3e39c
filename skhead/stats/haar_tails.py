"""Tail probabilities of the projection kernel between Haar subspaces, as logarithms."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from skhead.stats.haar import haar_moments
from skhead.stats.haar_sampling import ReducedLaw, check_ranks, haar_sample, reduce_law
from skhead.stats.log_tails import (
    beta_log_tail,
    log_difference,
    log_one_minus,
    pearson3_log_tail,
)

__all__ = ["haar_log_pvalue", "haar_logcdf", "haar_logsf"]

FloatArray = NDArray[np.float64]
Tail = Callable[[FloatArray, bool], FloatArray]

#: Reduced ranks up to which the law is sampled: cumulants describe its ends badly there.
_SAMPLED_RANK = 3
#: Probability beyond which the four-cumulant Beta law hands over to the decay of Pearson III.
_HANDOVER = 1e-10
#: Distance from the fourth cumulant of Pearson III, below which no Beta law is told apart from it.
_NO_GAP = 1e-6
#: Probabilities at which the tail of a sampled law is anchored, and its slope is measured.
_ANCHOR, _SLOPE = 1e-3, 1e-2
_FEWEST_DRAWS = 100_000
_GRID = 20_000
#: How far rounding may carry a kernel that can take one value only, relative to 1 or that value.
_ROUNDING = 1e-6


def haar_logsf(
    x: ArrayLike,
    r: ArrayLike,
    s: ArrayLike,
    d: ArrayLike,
    method: str = "auto",
    n_draws: int = 1_000_000,
    random_state: int = 0,
) -> FloatArray:
    """Log probability that two random subspaces overlap more than `x`.

    The natural logarithm, which stays finite where the probability itself would underflow. The law
    is first brought to ranks of at most half the dimension by exchanging subspaces for their
    complements; "rank" below means the smaller of these two.

    Parameters
    ----------
    x : array-like of float
        Projection kernels, sums of squared cosines. NaN gives NaN; outside the attainable range
        ``[max(0, r + s - d), min(r, s)]`` the answer is that of any distribution function.
    r, s : array-like of int
        Ranks of the two subspaces, 0 to `d`; all arguments broadcast.
    d : array-like of int
        Dimension of the space, at least 1.
    method : str, default="auto"
        - ``"beta"``: exact; only for rank 1.
        - ``"monte_carlo"``: `n_draws` exact draws, only for ranks 2 and 3. Beyond a probability of
          0.001 the tail is a product of two powers: of the distance to its end of the range, with
          the exponent that the law has there, and of the distance to the other end, with the
          exponent that the draws show between 0.01 and 0.001.
        - ``"pearson1"``: a Beta law with the four exact cumulants, down to 1e-10, where Pearson
          III takes over at the same value; for ranks of 2 and above. Where the fourth cumulant
          leaves no room for a Beta law, as for two halves of 8 dimensions, all is Pearson III.
        - ``"pearson3"``: a gamma law with the three exact cumulants.
        - ``"normal"``: with exact mean and variance; far too small in the upper tail.
        - ``"auto"``: "beta" for rank 1, "monte_carlo" for ranks 2 and 3, "pearson1" above.

        The last three laws are conditioned on the attainable range.
    n_draws : int, default=1_000_000
        Size of the sample of "monte_carlo", at least 100,000.
    random_state : int, default=0
        Seed of that sample, which is kept for later calls.

    Returns
    -------
    ndarray of the broadcast shape
        float64; 0 below and minus infinity from the end of the attainable range on.

    Raises
    ------
    ValueError
        If a rank is not a whole number between 0 and `d`, or the method is unknown or does not
        cover the ranks.

    See Also
    --------
    haar_log_pvalue : The same as one- and two-sided p-values.

    Notes
    -----
    Against exact draws, "pearson1" is within 10% down to a probability of 1e-4 in both tails for
    ranks of 8 and above; at ranks (8, 8) in 64 dimensions "pearson3" is 1.17 times (lower tail 1.34
    times) too large there. Beyond about 1e-6 every value but that of "beta" is nominal. If a rank
    is 0 or `d` the kernel can take one value only, which is recognised within 1e-6 of 1 or, if
    larger, of that value.

    References
    ----------
    .. [1] K. C. S. Pillai, "Some new test criteria in multivariate analysis", Annals of
       Mathematical Statistics 26 (1955).
    .. [2] N. M. Temme, "The asymptotic expansion of the incomplete gamma functions", SIAM Journal
       on Mathematical Analysis 10 (1979).

    Examples
    --------
    >>> from skhead.stats import haar_logsf
    >>> haar_logsf([5.3, 6.0, 8.0], 64, 64, 768).round(1)
    array([  -0.5,  -20.6, -244.9])
    """
    return _by_law("haar_logsf", x, r, s, d, _Settings(method, n_draws, random_state, True))


def haar_logcdf(
    x: ArrayLike,
    r: ArrayLike,
    s: ArrayLike,
    d: ArrayLike,
    method: str = "auto",
    n_draws: int = 1_000_000,
    random_state: int = 0,
) -> FloatArray:
    """Log probability that two random subspaces overlap by `x` or less.

    Parameters
    ----------
    x : array-like of float
        Projection kernels, sums of squared cosines. NaN gives NaN.
    r, s : array-like of int
        Ranks of the two subspaces, 0 to `d`; all arguments broadcast.
    d : array-like of int
        Dimension of the space, at least 1.
    method : str, default="auto"
        As for `haar_logsf`.
    n_draws : int, default=1_000_000
        Size of the sample of "monte_carlo", at least 100,000.
    random_state : int, default=0
        Seed of that sample, which is kept for later calls.

    Returns
    -------
    ndarray of the broadcast shape
        float64, natural logarithms.

    Raises
    ------
    ValueError
        If a rank is not a whole number between 0 and `d`, or the method is unknown or does not
        cover the ranks.

    See Also
    --------
    haar_logsf : The other tail, with the methods explained.

    Examples
    --------
    >>> from skhead.stats import haar_logcdf
    >>> haar_logcdf(0.25, 1, 2, 4)  # uniform on [0, 1]
    np.float64(-1.386294...)
    """
    return _by_law("haar_logcdf", x, r, s, d, _Settings(method, n_draws, random_state, False))


def haar_log_pvalue(
    x: ArrayLike,
    r: ArrayLike,
    s: ArrayLike,
    d: ArrayLike,
    side: str = "upper",
    method: str = "auto",
    n_draws: int = 1_000_000,
    random_state: int = 0,
) -> FloatArray:
    """Log p-value of an overlap under independent uniformly random subspaces.

    Parameters
    ----------
    x : array-like of float
        Projection kernels, sums of squared cosines. NaN gives NaN.
    r, s : array-like of int
        Ranks of the two subspaces, 0 to `d`; all arguments broadcast.
    d : array-like of int
        Dimension of the space, at least 1.
    side : str, default="upper"
        "upper": as much overlap or more; "lower": as much or less; "two": twice the smaller of
        these two, at most 1.
    method : str, default="auto"
        As for `haar_logsf`.
    n_draws : int, default=1_000_000
        Size of the sample of "monte_carlo", at least 100,000.
    random_state : int, default=0
        Seed of that sample, which is kept for later calls.

    Returns
    -------
    ndarray of the broadcast shape
        float64, natural logarithms; divide by ``log(10)`` for powers of ten.

    Raises
    ------
    ValueError
        If the side or the method is unknown, a rank is not a whole number between 0 and `d`, or the
        method does not cover the ranks.

    See Also
    --------
    haar_logsf : The upper tail, with the methods explained.
    adjust_log_p : For many p-values at once.

    Examples
    --------
    >>> from skhead.stats import haar_log_pvalue
    >>> log_p = haar_log_pvalue(39.3, 64, 64, 768, side="two")
    >>> bool(log_p < -3000)
    True
    """
    sides = {"upper": (True,), "lower": (False,), "two": (True, False)}
    if side not in sides:
        raise ValueError(f"haar_log_pvalue: side must be 'upper', 'lower' or 'two', got {side!r}")
    tails = [
        _by_law("haar_log_pvalue", x, r, s, d, _Settings(method, n_draws, random_state, up, True))
        for up in sides[side]
    ]
    if side != "two":
        return tails[0]
    both: FloatArray = np.minimum(np.minimum(*tails) + np.log(2), 0.0)
    return both


class _Settings(NamedTuple):
    """What to compute: one tail, with the atom of a degenerate law counted in it or not."""

    method: str
    n_draws: int
    random_state: int
    upper: bool
    inclusive: bool = False


def _by_law(
    caller: str, x: ArrayLike, r: ArrayLike, s: ArrayLike, d: ArrayLike, settings: _Settings
) -> FloatArray:
    """Evaluate each distinct law once, on all of its values."""
    if settings.method not in _METHODS:
        known = ", ".join(repr(name) for name in _METHODS)
        raise ValueError(f"{caller}: method must be one of {known}; got {settings.method!r}")
    if settings.n_draws < _FEWEST_DRAWS:
        raise ValueError(
            f"{caller}: n_draws must be at least {_FEWEST_DRAWS}, got {settings.n_draws}"
        )
    values = np.asarray(x, dtype=np.float64)
    ranks = np.broadcast_arrays(*(_whole_numbers(caller, n) for n in (r, s, d)))
    check_ranks(caller, *ranks)
    laws, which = np.unique(np.stack([n.ravel() for n in ranks]), axis=1, return_inverse=True)
    shape = np.broadcast_shapes(values.shape, ranks[0].shape)
    values = np.broadcast_to(values, shape).ravel()
    which = np.broadcast_to(which.reshape(ranks[0].shape), shape).ravel()
    found = np.full(values.size, np.nan)
    order = np.argsort(which, kind="stable")
    bounds = np.searchsorted(which[order], np.arange(laws.shape[1] + 1))
    for law, start, stop in zip(laws.T, bounds, bounds[1:], strict=False):
        part = order[start:stop]
        part = part[~np.isnan(values[part])]
        if part.size:
            reduced = reduce_law(*(int(n) for n in law))
            found[part] = _log_tail(caller, values[part], reduced, settings)
    result: FloatArray = found.reshape(shape)[()]
    return result


def _whole_numbers(caller: str, ranks: ArrayLike) -> NDArray[np.int64]:
    given = np.asarray(ranks)
    if given.dtype.kind not in "iuf" or np.any(given != np.floor(given)):
        raise ValueError(f"{caller}: ranks and dimension must be whole numbers, got {ranks!r}")
    return given.astype(np.int64)


def _log_tail(caller: str, x: FloatArray, law: ReducedLaw, settings: _Settings) -> FloatArray:
    """Tail of one law; `x` without NaN."""
    if law.r == 0:
        return _point_mass(x, law, settings)
    y, upper = law.sign * (x - law.offset), settings.upper == (law.sign > 0)
    tail = _tail(caller, law, settings)
    found = np.where((y <= 0) == upper, 0.0, -np.inf)
    inside = (y > 0) & (y < law.r)
    if inside.any():
        found[inside] = tail(y[inside], upper)
    return found


def _point_mass(x: FloatArray, law: ReducedLaw, settings: _Settings) -> FloatArray:
    slack = _ROUNDING * max(1, law.offset)
    if settings.upper:
        covers = x <= law.offset + slack if settings.inclusive else x < law.offset - slack
    else:
        covers = x >= law.offset - slack
    return np.where(covers, 0.0, -np.inf)


def _tail(caller: str, law: ReducedLaw, settings: _Settings) -> Tail:
    method = settings.method
    if method == "auto":
        method = "beta" if law.r == 1 else "monte_carlo" if law.r <= _SAMPLED_RANK else "pearson1"
    fewest, most = _METHODS[method]
    if not fewest <= law.r <= (most or law.r):
        raise ValueError(
            f"{caller}: method {method!r} covers ranks from {fewest} to {most or 'any'} after "
            f"exchanging subspaces for complements, got {law.r} and {law.s} in {law.d} dimensions; "
            "use method='auto'"
        )
    if method == "beta":
        return lambda y, upper: beta_log_tail(y, law.s / 2, (law.d - law.s) / 2, upper)
    if method == "monte_carlo":
        sampled = _sampled_law(law, settings.n_draws, settings.random_state)
        return lambda y, upper: _sampled_tail(y, upper, law, sampled)
    whole = {"normal": _normal, "pearson3": _pearson3, "pearson1": _pearson1}[method](law)
    return lambda y, upper: _conditioned(whole, law.r, y, upper)


#: Fewest and most reduced rank of each method; 0 for no limit.
_METHODS = {
    "auto": (0, 0),
    "beta": (1, 1),
    "monte_carlo": (2, _SAMPLED_RANK),
    "pearson1": (2, 0),
    "pearson3": (1, 0),
    "normal": (1, 0),
}


def _conditioned(tail: Tail, rank: int, y: FloatArray, upper: bool) -> FloatArray:
    """Tail of the same law given that it falls into ``[0, rank]``."""
    start, end = (0.0, float(rank)) if upper else (float(rank), 0.0)
    at_start, at_end = (tail(np.array([edge]), upper) for edge in (start, end))
    return log_difference(tail(y, upper), at_end) - log_difference(at_start, at_end)


def _cumulants(law: ReducedLaw) -> tuple[float, float, float, float]:
    """Mean, standard deviation, skewness and excess kurtosis."""
    mean, variance, third, fourth = (float(m) for m in haar_moments(law.r, law.s, law.d))
    return mean, variance**0.5, third / variance**1.5, fourth / variance**2


def _normal(law: ReducedLaw) -> Tail:
    mean, sd, _, _ = _cumulants(law)

    def tail(y: FloatArray, upper: bool) -> FloatArray:
        z = (y - mean) / sd
        logs: FloatArray = special.log_ndtr(-z if upper else z)
        return logs

    return tail


def _pearson3(law: ReducedLaw) -> Tail:
    mean, sd, skewness, _ = _cumulants(law)
    return lambda y, upper: pearson3_log_tail((y - mean) / sd, skewness, upper)


def _pearson1(law: ReducedLaw) -> Tail:
    """Beta law on the interval that four cumulants set, with Pearson III's decay far out."""
    mean, sd, skewness, excess = _cumulants(law)
    gamma_tail = _pearson3(law)
    gap = 3 * skewness**2 - 2 * excess
    if gap < _NO_GAP:
        return gamma_tail
    total = 6 * (excess + 2 - skewness**2) / gap
    spread = np.sqrt((total + 2) ** 2 * skewness**2 + 16 * (total + 1))
    a = total / 2 * (1 - (total + 2) * skewness / spread)
    b = total - a
    width = sd / 2 * spread
    low = mean - width * a / total
    ends = {
        True: low + width * float(special.betainccinv(a, b, _HANDOVER)),
        False: low + width * float(special.betaincinv(a, b, _HANDOVER)),
    }

    def far(y: FloatArray, upper: bool) -> FloatArray:
        at_end = float(gamma_tail(np.array([ends[upper]]), upper)[0])
        logs: FloatArray = np.log(_HANDOVER) + gamma_tail(y, upper) - at_end
        return logs

    def tail(y: FloatArray, upper: bool) -> FloatArray:
        found = beta_log_tail(np.clip((y - low) / width, 0, 1), a, b, upper)
        above, below = y > ends[True], y < ends[False]
        beyond, opposite = (above, below) if upper else (below, above)
        found[beyond] = far(y[beyond], upper)
        found[opposite] = log_one_minus(far(y[opposite], not upper))
        return found

    return tail


class _SampledLaw(NamedTuple):
    """Distribution function on a grid that nobody can change, and the power law of each tail."""

    grid: FloatArray
    levels: FloatArray
    upper_power: float
    lower_power: float


@lru_cache(maxsize=64)
def _sampled_law(law: ReducedLaw, n_draws: int, seed: int) -> _SampledLaw:
    sample = np.sort(np.asarray(haar_sample(law.r, law.s, law.d, n_draws, seed)))
    levels = np.linspace(_ANCHOR, 1 - _ANCHOR, _GRID)
    grid = np.interp(levels, (np.arange(n_draws) + 0.5) / n_draws, sample)
    slopes = np.quantile(sample, [_SLOPE, 1 - _SLOPE])
    for shared in (grid, levels):
        shared.setflags(write=False)
    return _SampledLaw(
        grid,
        levels,
        _fitted_power(law.r - grid[-1], law.r - slopes[1], law.r, law.r * (law.d - law.s) / 2),
        _fitted_power(grid[0], slopes[0], law.r, law.r * law.s / 2),
    )


def _fitted_power(anchor: float, slope: float, rank: int, exponent: float) -> float:
    """Exponent of the distance to the far end, from two distances to the near end.

    The log tail is larger at the slope, farther in than the anchor, and concave where the exponent
    is positive, so that it falls from the anchor on.
    """
    drop = np.log(_SLOPE / _ANCHOR) - exponent * np.log(slope / anchor)
    return float(drop / np.log((rank - slope) / (rank - anchor)))


def _sampled_tail(y: FloatArray, upper: bool, law: ReducedLaw, sampled: _SampledLaw) -> FloatArray:
    grid, levels = sampled.grid, sampled.levels
    inner = np.interp(y, grid, levels)
    found: FloatArray = np.log(1 - inner if upper else inner)

    def far(distance: FloatArray, end: float, exponent: float, power: float) -> FloatArray:
        near_end, far_end = distance / end, (law.r - distance) / (law.r - end)
        logs: FloatArray = np.log(_ANCHOR) + exponent * np.log(near_end) + power * np.log(far_end)
        return logs

    above, below = y > grid[-1], y < grid[0]
    high = far(law.r - y[above], law.r - grid[-1], law.r * (law.d - law.s) / 2, sampled.upper_power)
    low = far(y[below], grid[0], law.r * law.s / 2, sampled.lower_power)
    found[above] = high if upper else log_one_minus(high)
    found[below] = log_one_minus(low) if upper else low
    return found
