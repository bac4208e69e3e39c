"""Tails of gamma and Beta laws below the smallest float."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from scipy.special import log_ndtr

from skhead.stats.log_tails import (
    beta_log_tail,
    log_difference,
    log_one_minus,
    pearson3_log_tail,
)


def gamma_log_tail(z, skewness, upper):
    with mpmath.workdps(60):
        shape = 4 / mpmath.mpf(skewness) ** 2
        y = shape * (1 + mpmath.mpf(z) * mpmath.mpf(skewness) / 2)
        limits = (y, mpmath.inf) if upper else (0, y)
        return float(mpmath.log(mpmath.gammainc(shape, *limits, regularized=True)))


@pytest.mark.parametrize("skewness", [1.5, 0.5, 0.1, 0.03, 0.019])
@pytest.mark.parametrize("z", [0.0, 1.0, 2.0, 30.0, 300.0])
def test_pearson3_against_many_digits(skewness, z):
    expected = gamma_log_tail(z, skewness, True)
    assert pearson3_log_tail(np.array([z]), skewness, True)[0] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("skewness", [1.5, 0.5, 0.1, 0.03, 0.019])
@pytest.mark.parametrize("z, upper", [(-1.0, True), (1.0, False), (0.0, False), (-1.2, False)])
def test_pearson3_around_its_mean(skewness, z, upper):
    expected = gamma_log_tail(z, skewness, upper)
    assert pearson3_log_tail(np.array([z]), skewness, upper)[0] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("skewness", [1.5, 0.5, 0.1, 0.03])
@pytest.mark.parametrize("share, upper", [(None, True), (0.995, False), (0.9, False)])
def test_deep_gamma_tails_keep_the_digits_of_the_probability(skewness, share, upper):
    """An error of 1e-9 in the logarithm is one of 1e-9 in the probability, however small it is."""
    z = 300.0 if upper else -2 * share / skewness
    expected = gamma_log_tail(z, skewness, upper)
    found = pearson3_log_tail(np.array([z]), skewness, upper)[0]
    assert found == pytest.approx(expected, rel=0, abs=1e-9)


def test_deep_lower_gamma_tail():
    expected = gamma_log_tail(-39.0, 0.05, upper=False)
    assert pearson3_log_tail(np.array([-39.0]), 0.05, False)[0] == pytest.approx(expected, rel=1e-9)
    assert expected < -2000


@pytest.mark.parametrize("upper", [True, False])
def test_no_skewness_is_the_normal_law(upper):
    z = np.array([-200.0, -3, -1e-9, 0, 1e-9, 2, 50])
    expected = log_ndtr(-z if upper else z)
    np.testing.assert_allclose(pearson3_log_tail(z, 0.0, upper), expected, rtol=1e-12)
    np.testing.assert_allclose(pearson3_log_tail(z, 1e-9, upper), expected, rtol=1e-6)


def test_below_the_end_of_the_gamma_law():
    for skewness in (0.5, 0.01):
        z = np.array([-3 / skewness])
        assert pearson3_log_tail(z, skewness, True)[0] == 0
        assert pearson3_log_tail(z, skewness, False)[0] == -np.inf


@pytest.mark.parametrize("a, b", [(0.5, 700.0), (3.5, 40.0), (200.0, 9.0), (2000.0, 14000.0)])
def test_beta_mirror_and_depth(a, b):
    x = np.array([2.0**-30, 0.25, 0.5, 1 - 2.0**-30])
    np.testing.assert_allclose(
        beta_log_tail(x, a, b, True), beta_log_tail(1 - x, b, a, False), rtol=1e-12
    )
    assert np.isfinite(beta_log_tail(x, a, b, True)).all()


def test_deep_beta_tail_against_many_digits():
    with mpmath.workdps(60):
        expected = float(mpmath.log(mpmath.betainc(300, 40, 0, 0.001, regularized=True)))
    assert beta_log_tail(np.array([0.001]), 300.0, 40.0, False)[0] == pytest.approx(expected)
    assert expected < -1900


@pytest.mark.parametrize(
    "a, b, x",
    [(300, 40, 0.001), (150.5, 2.5, 0.01), (900, 900, 0.1), (2000, 500, 0.3), (120, 3000, 1e-4)],
)
def test_deep_beta_tails_keep_the_digits_of_the_probability(a, b, x):
    with mpmath.workdps(60):
        expected = float(mpmath.log(mpmath.betainc(a, b, 0, x, regularized=True)))
    found = beta_log_tail(np.array([x]), float(a), float(b), False)[0]
    assert found == pytest.approx(expected, rel=0, abs=1e-9)


def test_arithmetic_of_logarithms():
    p = np.array([1e-300, 0.3, 0.999])
    np.testing.assert_allclose(np.exp(log_one_minus(np.log(p))), 1 - p, rtol=1e-12)
    assert log_difference(np.array([-5000.0]), -5001.0)[0] == pytest.approx(
        -5000 + np.log1p(-np.exp(-1))
    )
    assert log_difference(np.array([-3.0, -np.inf]), -3.0).tolist() == [-np.inf, -np.inf]
    assert log_difference(np.array([-3.0]), -np.inf)[0] == -3
