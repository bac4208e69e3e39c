"""Logarithms of tail probabilities that are far too small for a float."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special

__all__ = ["beta_log_tail", "log_difference", "log_one_minus", "normal_log_p", "pearson3_log_tail"]

FloatArray = NDArray[np.float64]

#: Probabilities below this are computed as logarithms from the start.
_SMALL = 1e-250
_TINY = 1e-300
_MAX_TERMS = 10_000
#: Skewness below which the gamma law is so close to normal that Temme's first correction is exact
#: to 1e-9.
_NEARLY_NORMAL = 0.02
#: Taylor coefficients of (u - log(1 + u)) / u^2, and of 1 / u - 1 / eta in powers of eta.
_EXPONENT_SERIES = np.array([(-1.0) ** k / (k + 2) for k in range(18)])
_CORRECTION_SERIES = np.array([-1 / 3, 1 / 12, -2 / 135, 1 / 864, 1 / 2835, -139 / 777600])


def log_one_minus(log_p: FloatArray) -> FloatArray:
    """Logarithm of ``1 - p`` without cancellation."""
    with np.errstate(divide="ignore"):
        return np.where(
            log_p > -np.log(2), np.log(-np.expm1(np.minimum(log_p, 0))), np.log1p(-np.exp(log_p))
        )


def log_difference(log_p: FloatArray, log_q: FloatArray | float) -> FloatArray:
    """Logarithm of ``p - q``; minus infinity where `q` is as large as `p`."""
    with np.errstate(invalid="ignore"):
        gap = np.where(np.isneginf(log_q), -np.inf, log_q - log_p)
    return log_p + log_one_minus(np.where(np.isneginf(log_p), 0.0, gap))


def normal_log_p(z: FloatArray, side: str) -> FloatArray:
    """Log p-value of a normal deviation; `side` is "two", "upper" or "lower"."""
    tail = -np.abs(z) if side == "two" else -z if side == "upper" else z
    logs: FloatArray = special.log_ndtr(tail)
    return np.minimum(logs + np.log(2), 0.0) if side == "two" else logs


def pearson3_log_tail(z: FloatArray, skewness: float, upper: bool) -> FloatArray:
    """Log tail of the Pearson III law of mean 0, variance 1 and a skewness of 0 or more.

    A shifted gamma law, normal at skewness 0.
    """
    if skewness < _NEARLY_NORMAL:
        return _nearly_normal_log_tail(z, skewness, upper)
    shape = 4 / skewness**2
    y = np.maximum(shape * (1 + z * (skewness / 2)), 0.0)
    wanted, other = special.gammaincc(shape, y), special.gammainc(shape, y)
    if not upper:
        wanted, other = other, wanted
    found = _log_of(wanted, other)
    deep = (wanted < _SMALL) & (y > 0) & np.isfinite(y)
    if deep.any():
        found[deep] = (_deep_gamma_upper if upper else _deep_gamma_lower)(shape, y[deep])
    return found


def beta_log_tail(x: FloatArray, a: float, b: float, upper: bool) -> FloatArray:
    """Log tail of the Beta law with shapes `a` and `b`; `x` in [0, 1]."""
    if upper:
        wanted, other = special.betainc(b, a, 1 - x), special.betainc(a, b, x)
        a, b, x = b, a, 1 - x
    else:
        wanted, other = special.betainc(a, b, x), special.betainc(b, a, 1 - x)
    found = _log_of(wanted, other)
    deep = (wanted < _SMALL) & (x > 0)
    if deep.any():
        found[deep] = _deep_beta_lower(x[deep], a, b)
    return found


def _log_of(wanted: FloatArray, other: FloatArray) -> FloatArray:
    """Logarithm of a probability, through its complement where that is the smaller one."""
    with np.errstate(divide="ignore"):
        return np.where(wanted < 0.5, np.log(wanted), np.log1p(-other))


def _nearly_normal_log_tail(z: FloatArray, skewness: float, upper: bool) -> FloatArray:
    """Temme's uniform expansion, cut after its first correction.

    ``exp(-E) (erfcx(sqrt(E)) / 2 +- T)`` with E the large-deviation exponent, which is z^2 / 2 for
    the normal law.
    """
    near = z >= 0 if upper else z <= 0
    u = z * (skewness / 2)
    inside = u > -1
    u = np.where(inside, u, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.where(
            np.abs(u) < 0.1,
            np.polynomial.polynomial.polyval(np.clip(u, -0.1, 0.1), _EXPONENT_SERIES),
            (u - np.log1p(u)) / u**2,
        )
        eta = u * np.sqrt(2 * exponent)
        correction = np.where(
            np.abs(eta) < 0.05,
            np.polynomial.polynomial.polyval(np.clip(eta, -0.05, 0.05), _CORRECTION_SERIES),
            1 / u - 1 / eta,
        )
    exponent = z**2 * exponent
    correction = correction * (skewness / np.sqrt(8 * np.pi))
    side = np.where(z == 0, 1.0 if upper else -1.0, np.sign(z))
    smaller = np.log(special.erfcx(np.sqrt(exponent)) / 2 + side * correction) - exponent
    smaller = np.where(inside, smaller, -np.inf)
    return np.where(near, smaller, log_one_minus(smaller))


def _deep_gamma_upper(shape: float, y: FloatArray) -> FloatArray:
    """Legendre's continued fraction, by Lentz' method."""
    b = y + 1 - shape
    c = np.full_like(y, 1 / _TINY)
    d = 1 / b
    fraction = d.copy()
    for n in range(1, _MAX_TERMS):
        b = b + 2
        a = -n * (n - shape)
        d = 1 / (a * d + b)
        c = b + a / c
        step = c * d
        fraction *= step
        if np.all(np.abs(step - 1) < 1e-15):
            break
    logs: FloatArray = shape * np.log(y) - y - special.gammaln(shape) + np.log(fraction)
    return logs


def _deep_gamma_lower(shape: float, y: FloatArray) -> FloatArray:
    """Power series, whose terms fall off at once far below the mean."""
    term = np.ones_like(y)
    total = np.ones_like(y)
    for n in range(1, _MAX_TERMS):
        term = term * y / (shape + n)
        total += term
        if np.all(term < 1e-16 * total):
            break
    logs: FloatArray = shape * np.log(y) - y - special.gammaln(shape + 1) + np.log(total)
    return logs


def _deep_beta_lower(x: FloatArray, a: float, b: float) -> FloatArray:
    """Continued fraction of the incomplete Beta function, by Lentz' method."""
    c = np.ones_like(x)
    d = 1 / (1 - (a + b) * x / (a + 1))
    fraction = d.copy()
    for n in range(1, _MAX_TERMS):
        even = n * (b - n) * x / ((a + 2 * n - 1) * (a + 2 * n))
        d = 1 / (1 + even * d)
        c = 1 + even / c
        fraction *= c * d
        odd = -(a + n) * (a + b + n) * x / ((a + 2 * n) * (a + 2 * n + 1))
        d = 1 / (1 + odd * d)
        c = 1 + odd / c
        fraction *= c * d
        if np.all(np.abs(c * d - 1) < 1e-15):
            break
    logs: FloatArray = (
        a * np.log(x) + b * np.log1p(-x) - np.log(a) - special.betaln(a, b) + np.log(fraction)
    )
    return logs
