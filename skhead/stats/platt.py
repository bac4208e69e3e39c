"""Probabilities from scores, by logistic curves."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit

from skhead.exceptions import HeadShapeError

__all__ = ["fit_sigmoids"]

#: Smallest common slope, for scores of standard deviation 1: it keeps their order.
_LEAST_SLOPE = 1e-3


def fit_sigmoids(
    scores: ArrayLike, positive: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logistic curves ``1 / (1 + exp(-(slope * score + intercept)))``, one for each class.

    Measured in standard deviations of their scores, all classes have one slope: how far a score
    is to be trusted cannot be told from the two or three heads of a class, but from those of all
    classes together. Targets are smoothed as by one more observation of either kind, so that a
    few positive scores do not claim certainty, and slopes are positive: scores that do not tell
    positives from negatives keep their order, at nearly the same probability.

    Parameters
    ----------
    scores : array-like of shape (n, n_classes)
        Of observations that the scoring model has not seen.
    positive : array-like of bool of shape (n, n_classes)

    Returns
    -------
    slopes, intercepts : ndarray of shape (n_classes,)

    Raises
    ------
    HeadShapeError
        If the shapes differ.
    ValueError
        If a score is not finite.

    References
    ----------
    .. [1] J. Platt, "Probabilistic outputs for support vector machines", Advances in Large Margin
       Classifiers (1999).

    Examples
    --------
    >>> from skhead.stats import fit_sigmoids
    >>> scores = [[-2.0], [-1.0], [1.0], [2.0]]
    >>> slopes, intercepts = fit_sigmoids(scores, [[False], [False], [True], [True]])
    >>> bool(slopes[0] > 0), bool(abs(intercepts[0]) < 1e-4)
    (True, True)
    """
    x = np.asarray(scores, dtype=np.float64)
    wanted = np.asarray(positive, dtype=bool)
    if x.ndim != 2 or x.shape != wanted.shape:
        raise HeadShapeError(
            "fit_sigmoids: scores and positive must both be (n, n_classes); got shapes "
            f"{x.shape} and {wanted.shape}"
        )
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise ValueError(
            f"fit_sigmoids: score {row} of class {column} is {x[row, column]}; every score must be "
            "finite"
        )
    centre, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    z = (x - centre) / spread
    n_positive = wanted.sum(axis=0)
    n_negative = len(wanted) - n_positive
    targets = np.where(wanted, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = parameters[0] * z + parameters[1:]
        value = np.logaddexp(0.0, logits) - targets * logits
        error = expit(logits) - targets
        return float(value.sum()), np.concatenate([[(error * z).sum()], error.sum(axis=0)])

    start = np.concatenate([[1.0], np.log((n_positive + 1) / (n_negative + 1))])
    bounds = [(_LEAST_SLOPE, None), *[(None, None)] * x.shape[1]]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    slopes = found[0] / spread
    return slopes, found[1:] - slopes * centre
