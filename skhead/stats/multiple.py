"""False discovery rates from logarithms of p-values."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["adjust_log_p"]


def adjust_log_p(log_p: ArrayLike, method: str = "bh") -> NDArray[np.float64]:
    """Turn log p-values into log q-values, the false discovery rates at which each is called.

    All entries count as one family of tests. Logarithms throughout, so that p-values far below the
    smallest float keep their order.

    Parameters
    ----------
    log_p : array-like of float
        Natural logarithms of p-values, at most 0; minus infinity is allowed, NaN is no test: it
        does not count and stays NaN.
    method : str, default="bh"
        "bh" (Benjamini and Hochberg) for independent or positively dependent tests, "by"
        (Benjamini and Yekutieli) for tests that depend in any way.

    Returns
    -------
    ndarray of the shape of `log_p`
        float64, natural logarithms of the q-values, at most 0.

    Raises
    ------
    ValueError
        If the method is unknown or an entry is above 0.

    References
    ----------
    .. [1] Y. Benjamini and Y. Hochberg, "Controlling the false discovery rate", Journal of the
       Royal Statistical Society B 57 (1995).
    .. [2] Y. Benjamini and D. Yekutieli, "The control of the false discovery rate in multiple
       testing under dependency", Annals of Statistics 29 (2001).

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import adjust_log_p
    >>> np.exp(adjust_log_p(np.log([0.01, 0.02, 0.5]))).round(3)
    array([0.03, 0.03, 0.5 ])
    """
    if method not in ("bh", "by"):
        raise ValueError(f"adjust_log_p: method must be 'bh' or 'by', got {method!r}")
    given = np.asarray(log_p, dtype=np.float64)
    adjusted = np.full(given.shape, np.nan)
    tested = ~np.isnan(given)
    values = given[tested]
    if values.size == 0:
        return adjusted
    if values.max() > 0:
        raise ValueError(
            f"adjust_log_p: logarithms of p-values are at most 0, got {values.max():.6g}; "
            "give natural logarithms, not p-values"
        )
    ranks = np.arange(1, values.size + 1)
    penalty = np.log(values.size) - np.log(ranks)
    if method == "by":
        penalty += np.log(np.sum(1 / ranks))
    order = np.argsort(values, kind="stable")
    raised = values[order] + penalty
    smallest_above = np.minimum.accumulate(raised[::-1])[::-1]
    result = np.empty_like(values)
    result[order] = np.minimum(smallest_above, 0.0)
    adjusted[tested] = result
    return adjusted
