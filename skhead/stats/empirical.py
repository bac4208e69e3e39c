"""A null law read off the bulk of the pairs themselves, and local false discovery rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import isotonic_regression, minimize
from scipy.special import ndtri_exp

from skhead.stats.log_tails import normal_log_p

__all__ = ["EmpiricalNull", "LocalFDR", "fit_empirical_null", "local_fdr"]

#: Fewest values that a null is fitted on.
_FEWEST = 20
#: Share of the values that the central method looks at.
_CENTRAL = 0.8
#: p-values above it are taken to be null.
_NULL_FROM = 0.5


@dataclass(frozen=True)
class EmpiricalNull:
    """Location and scale of the bulk of some values, under normal and under Student t tails.

    Attributes
    ----------
    center, scale : float
        Of the normal law.
    t_center, t_scale : float
        Of the Student t law.
    df : float
        Degrees of freedom of the t law.
    excess_kurtosis : float
        Of the values; 0 for normal ones. Far above it, only calls that outlast t tails deserve
        trust.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import fit_empirical_null
    >>> null = fit_empirical_null(np.random.default_rng(0).normal(1.0, 2.0, 10_000))
    >>> round(null.center, 1), round(null.scale, 1)
    (1.0, 2.0)
    """

    center: float
    scale: float
    t_center: float
    t_scale: float
    df: float
    excess_kurtosis: float

    def z(self, values: ArrayLike, tails: str = "normal") -> NDArray[np.float64]:
        """Scores that are standard normal under the null.

        Parameters
        ----------
        values : array-like
            NaN stays NaN.
        tails : {"normal", "t"}, default="normal"
            Law of the null.

        Returns
        -------
        ndarray, float64

        Raises
        ------
        ValueError
            If the tails are unknown.

        Examples
        --------
        >>> from skhead.stats import EmpiricalNull
        >>> null = EmpiricalNull(1.0, 2.0, t_center=1.0, t_scale=2.0, df=30.0, excess_kurtosis=0.0)
        >>> null.z([1.0, 3.0, 5.0]).tolist()
        [0.0, 1.0, 2.0]
        """
        x = np.asarray(values, dtype=np.float64)
        if tails == "normal":
            return (x - self.center) / self.scale
        if tails == "t":
            scaled = (x - self.t_center) / self.t_scale
            log_tail = stats.t.logsf(np.abs(scaled), self.df)
            return np.asarray(-np.sign(scaled) * ndtri_exp(log_tail), dtype=np.float64)
        raise ValueError(f"EmpiricalNull.z: tails must be 'normal' or 't', got {tails!r}")

    def log_p(
        self, values: ArrayLike, side: str = "two", tails: str = "normal"
    ) -> NDArray[np.float64]:
        """Natural logarithms of p-values, which do not underflow.

        Parameters
        ----------
        values : array-like
            NaN stays NaN.
        side : {"two", "upper", "lower"}, default="two"
            Which deviations count as evidence.
        tails : {"normal", "t"}, default="normal"
            Law of the null.

        Returns
        -------
        ndarray, float64

        Raises
        ------
        ValueError
            If the side or the tails are unknown.

        Examples
        --------
        >>> from skhead.stats import EmpiricalNull
        >>> null = EmpiricalNull(1.0, 2.0, t_center=1.0, t_scale=2.0, df=30.0, excess_kurtosis=0.0)
        >>> null.log_p([1.0, 5.0], side="upper").round(2).tolist()
        [-0.69, -3.78]
        """
        if side not in ("two", "upper", "lower"):
            raise ValueError(
                f"EmpiricalNull.log_p: side must be 'two', 'upper' or 'lower', got {side!r}"
            )
        return normal_log_p(self.z(values, tails), side)


@dataclass(frozen=True, eq=False)
class LocalFDR:
    """Probability of every value to be null, given the value.

    Attributes
    ----------
    values : ndarray, float64
        NaN where the p-value is.
    null_share : float
        Estimated share of null values, at most 1.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import local_fdr
    >>> p = np.concatenate([np.full(20, 1e-6), np.linspace(0.001, 1, 980)])
    >>> local_fdr(np.log(p)).values.shape
    (1000,)
    """

    values: NDArray[np.float64]
    null_share: float


def fit_empirical_null(values: ArrayLike, method: str = "mad", df: float = 4.0) -> EmpiricalNull:
    """Fit the null to the bulk of the values, most of which are taken to be null.

    Parameters
    ----------
    values : array-like
        Such as the residuals of `median_polish`; NaN entries are left out.
    method : {"mad", "iqr", "central"}, default="mad"
        Median and median absolute deviation; middle and width of the central half; or maximum
        likelihood of a law cut off to the central four fifths, for a bulk that has the shape of
        the law. Residuals of a median polish pile up at 0, which "central" takes for a small scale.
    df : float, default=4.0
        Degrees of freedom of the t tails.

    Returns
    -------
    EmpiricalNull

    Raises
    ------
    ValueError
        If there are fewer than 20 values, one is infinite, their bulk has no spread, the method is
        unknown or the degrees of freedom are not positive.

    References
    ----------
    .. [1] B. Efron, "Large-scale simultaneous hypothesis testing: the choice of a null
       hypothesis", Journal of the American Statistical Association 99 (2004).

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import fit_empirical_null
    >>> values = np.random.default_rng(0).normal(1.0, 2.0, 10_000)
    >>> values[:200] += 20.0
    >>> null = fit_empirical_null(values)
    >>> round(null.center, 1), round(null.scale, 1)
    (1.1, 2.1)
    """
    x = np.asarray(values, dtype=np.float64).ravel()
    x = x[~np.isnan(x)]
    if len(x) < _FEWEST or not np.isfinite(x).all():
        raise ValueError(
            f"fit_empirical_null: needs at least {_FEWEST} finite values, got {len(x)}, "
            f"{np.count_nonzero(np.isinf(x))} of them infinite"
        )
    if not df > 0:
        raise ValueError(f"fit_empirical_null: df must be positive, got {df}")
    fits = {"mad": _fit_mad, "iqr": _fit_iqr, "central": _fit_central}
    if method not in fits:
        raise ValueError(
            f"fit_empirical_null: method must be one of {', '.join(fits)}, got {method!r}"
        )
    low, high = np.quantile(x, [0.25, 0.75])
    if not high > low:
        raise ValueError(
            f"fit_empirical_null: half of the values equal {low:.6g}, so that their bulk has no "
            "spread to measure deviations in"
        )
    parameters = [fits[method](x, law) for law in (stats.norm(), stats.t(df))]
    kurtosis = float(stats.kurtosis(x))
    return EmpiricalNull(*parameters[0], *parameters[1], float(df), kurtosis)


def local_fdr(log_p: ArrayLike) -> LocalFDR:
    """Local false discovery rates from p-values, without bins or bandwidths.

    The density of the p-values is the steepest decreasing one under which they have their observed
    distribution (Grenander's estimator); the share of nulls comes from the p-values above one half
    and is at most 1; the rate is their quotient, at most 1.

    Parameters
    ----------
    log_p : array-like
        Natural logarithms of p-values; NaN entries are left out.

    Returns
    -------
    LocalFDR

    Raises
    ------
    ValueError
        If no entry is defined, or one is above 0.

    References
    ----------
    .. [1] K. Strimmer, "A unified approach to false discovery rate estimation", BMC
       Bioinformatics 9 (2008).
    .. [2] J. D. Storey, "A direct approach to false discovery rates", Journal of the Royal
       Statistical Society B 64 (2002).

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import local_fdr
    >>> p = np.concatenate([np.full(20, 1e-6), np.linspace(0.001, 1, 980)])
    >>> rates = local_fdr(np.log(p)).values
    >>> bool(rates[0] < 0.01), bool(rates[-1] > 0.9)
    (True, True)
    """
    logs = np.asarray(log_p, dtype=np.float64)
    defined = ~np.isnan(logs)
    if not defined.any() or logs[defined].max() > 0:
        raise ValueError(
            "local_fdr: needs natural logarithms of p-values, none above 0 and at least one "
            "that is not NaN"
        )
    p = np.maximum(np.exp(logs[defined]), np.finfo(np.float64).tiny)
    share = min(1.0, float((p > _NULL_FROM).mean()) / (1 - _NULL_FROM))
    points, where, counts = np.unique(p, return_inverse=True, return_counts=True)
    gaps = np.diff(points, prepend=0.0)
    density = isotonic_regression(counts / len(p) / gaps, weights=gaps, increasing=False).x
    rates = np.full(logs.shape, np.nan)
    rates[defined] = np.minimum(share / density[where], 1.0)
    return LocalFDR(rates, share)


def _fit_mad(x: NDArray[np.float64], law: Any) -> tuple[float, float]:
    center = float(np.median(x))
    return center, float(np.median(np.abs(x - center))) / float(law.ppf(0.75))


def _fit_iqr(x: NDArray[np.float64], law: Any) -> tuple[float, float]:
    low, high = np.quantile(x, [0.25, 0.75])
    return float(low + high) / 2, float(high - low) / (2 * float(law.ppf(0.75)))


def _fit_central(x: NDArray[np.float64], law: Any) -> tuple[float, float]:
    """Maximum likelihood of the central values under the law cut off to their interval."""
    low, high = np.quantile(x, [(1 - _CENTRAL) / 2, (1 + _CENTRAL) / 2])
    inside = x[(x >= low) & (x <= high)]
    center, scale = _fit_iqr(x, law)

    def loss(parameters: NDArray[np.float64]) -> float:
        location, width = center + scale * parameters[0], scale * np.exp(parameters[1])
        mass = law.cdf((high - location) / width) - law.cdf((low - location) / width)
        if not mass > 0:
            return float("inf")
        density = law.logpdf((inside - location) / width).mean() - np.log(width)
        return float(np.log(mass) - density)

    found = minimize(loss, np.zeros(2), method="Nelder-Mead").x
    return float(center + scale * found[0]), float(scale * np.exp(found[1]))
