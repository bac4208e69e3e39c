"""How many hits a random one-to-one matching of sources to targets makes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

__all__ = ["matching_log_tail"]

FloatArray = NDArray[np.float64]

_BISECTIONS = 60
#: Probabilities below this have lost digits.
_UNDERFLOW = 1e-280
#: Largest tilt, under which everything that can hit does.
_MOST_TILT = 60.0


def matching_log_tail(
    n_hits: ArrayLike, row_shares: ArrayLike, column_shares: ArrayLike
) -> FloatArray:
    """Bound the probability that a random matching makes at least as many hits.

    Sources i are matched to targets by a random permutation, and ``B[i, j]`` says whether j is a
    hit for i. The bound holds for every B, and needs its row and column means only.

    Parameters
    ----------
    n_hits : array-like of shape (n_tables,)
        Hits of the matching at hand, at most n.
    row_shares : array-like of shape (n_tables, n)
        Means of B over targets, for every source.
    column_shares : array-like of shape (n_tables, n)
        Means over sources, for every target.

    Returns
    -------
    ndarray of shape (n_tables,), float64
        Natural logarithms, above minus infinity where the hits are possible; 0 where there are no
        more hits than expected.

    Raises
    ------
    ValueError
        If the shapes do not fit together, or a share is outside [0, 1].

    Notes
    -----
    With r_k the number of ways to choose k hits of which no two share a source or a target, the
    number of hits S of a random permutation has ``E C(S, k) = r_k (n - k)! / n!`` exactly [1]_, and
    r_k is at most the k-th elementary symmetric polynomial of the row sums, and of the column sums.
    By Markov's inequality ``P(S >= h) <= E C(S, k) / C(h, k)``, of which the smallest over k is
    returned. For rare hits that is above the exact probability by a small factor; if all sources
    hit the same targets it is 1, as it must be.

    References
    ----------
    .. [1] J. Riordan, "An Introduction to Combinatorial Analysis", Wiley (1958), chapter 7.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats.matching import matching_log_tail
    >>> shares = np.full((1, 40), 10 / 512)
    >>> matching_log_tail([30], shares, shares) < -80
    array([ True])
    >>> constant = np.array([[0.5, 0.5, 0.5, 0.5]])
    >>> float(matching_log_tail([2], constant, [[1.0, 1.0, 0.0, 0.0]])[0])
    0.0
    """
    hits = np.asarray(n_hits, dtype=np.float64)
    sides = [np.asarray(side, dtype=np.float64) for side in (row_shares, column_shares)]
    if hits.ndim != 1 or any(side.ndim != 2 or len(side) != len(hits) for side in sides):
        raise ValueError(
            f"matching_log_tail: {hits.shape} hits need as many rows of shares, got shapes "
            f"{sides[0].shape} and {sides[1].shape}"
        )
    for side in sides:
        if side.size and not (side.min() >= 0 and side.max() <= 1):
            raise ValueError(
                f"matching_log_tail: shares must be in [0, 1]; got {side.min():.6g} to "
                f"{side.max():.6g}"
            )
    return np.minimum(*(_moment_bound(hits, side) for side in sides))


def _moment_bound(hits: FloatArray, shares: FloatArray) -> FloatArray:
    """Log of the least of the bounds by binomial moments, from shares on one side."""
    bound = np.zeros(len(hits))
    extreme = hits > shares.sum(1)
    if not extreme.any():
        return bound
    hits, shares = hits[extreme], shares[extreme]
    n = shares.shape[1]
    k = np.arange(n + 1.0)
    fewer_than_n = gammaln(n - k + 1) - gammaln(n + 1) + k * np.log(n)
    with np.errstate(invalid="ignore"):
        ways = gammaln(hits[:, None] + 1) - gammaln(k + 1) - gammaln(hits[:, None] - k + 1)
    logs = _log_symmetric(hits, shares) + fewer_than_n - ways
    possible = (k > 0) & (k <= hits[:, None])
    bound[extreme] = np.minimum(np.where(possible, logs, np.inf).min(1), 0.0)
    return bound


def _log_symmetric(hits: FloatArray, shares: FloatArray) -> FloatArray:
    """Logs of the elementary symmetric polynomials of shares; infinite if too far from the hits.

    They are the law of a sum of independent indicators, tilted so that the hits are its mean.
    """
    tilt = _tilts(hits, shares)
    odds = shares * np.exp(tilt)[:, None]
    law = _sum_law(odds / (1 + odds))
    with np.errstate(divide="ignore"):
        logs = np.where(law > _UNDERFLOW, np.log(law), np.inf)
    result: FloatArray = (
        logs + np.log1p(odds).sum(1)[:, None] - tilt[:, None] * np.arange(law.shape[1])
    )
    return result


def _tilts(hits: FloatArray, shares: FloatArray) -> FloatArray:
    """Exponents that bring the mean of the tilted sum to the hits, as far as that is possible."""
    low, high = np.zeros(len(hits)), np.full(len(hits), _MOST_TILT)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        odds = shares * np.exp(middle)[:, None]
        above = (odds / (1 + odds)).sum(1) > hits
        high = np.where(above, middle, high)
        low = np.where(above, low, middle)
    result: FloatArray = (low + high) / 2
    return result


def _sum_law(shares: FloatArray) -> FloatArray:
    """Law of the number of hits among independent ones, one row per table."""
    n_tables, n = shares.shape
    law = np.zeros((n_tables, n + 1))
    law[:, 0] = 1.0
    for i in range(n):
        share = shares[:, i, None]
        law[:, 1 : i + 2] = law[:, 1 : i + 2] * (1 - share) + law[:, : i + 1] * share
        law[:, 0] *= 1 - share[:, 0]
    return law
