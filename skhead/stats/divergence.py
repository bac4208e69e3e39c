"""How far a sample of kernel values is from its reference law."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import rel_entr

__all__ = ["gaussian_divergence"]

#: Share of the values that an empty bin counts as holding.
_EMPTY_SHARE = 1e-12


def gaussian_divergence(
    values: ArrayLike, mean: float, variance: float, upper: float, bins: int = 255
) -> float:
    """Kullback-Leibler divergence from a binned normal law to a histogram of values.

    ``KL(normal || values)`` over `bins` equal bins on ``[0, upper]``. The direction asks how little
    of the data lies where the reference has its mass; the value depends on the width of the bins.
    An empty bin counts as holding 1e-12 of the values, which keeps the divergence finite: above
    about 20 it says only that values and reference hardly meet.

    Parameters
    ----------
    values : array-like of shape (n_values,)
        Observed kernel values in ``[0, upper]``.
    mean, variance : float
        Of the reference.
    upper : float
        Largest value possible.
    bins : int, default=255
        Number of bins.

    Returns
    -------
    float
        In nats.

    Raises
    ------
    ValueError
        If there is no value, a value lies outside the range, or the variance is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import gaussian_divergence
    >>> values = np.random.default_rng(0).normal(5.0, 0.5, 100_000)
    >>> gaussian_divergence(values, 5.0, 0.25, upper=10.0, bins=20) < 0.001
    True
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    if values.size == 0:
        raise ValueError("gaussian_divergence: there are no values")
    if not variance > 0:
        raise ValueError(f"gaussian_divergence: the variance must be positive, got {variance}")
    slack = 1e-4 * upper
    if not (values.min() >= -slack and values.max() <= upper + slack):
        raise ValueError(
            f"gaussian_divergence: values must lie in [0, {upper}], got "
            f"[{values.min():.6g}, {values.max():.6g}]"
        )
    edges = np.linspace(0, upper, bins + 1)
    counts = np.histogram(values.clip(0, upper), edges)[0]
    reference = np.diff(stats.norm.cdf(edges, mean, np.sqrt(variance)))
    observed = np.maximum(counts / counts.sum(), _EMPTY_SHARE)
    return float(rel_entr(reference, observed).sum())
