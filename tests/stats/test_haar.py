"""Moments of the projection kernel between random subspaces."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import norm

from skhead.stats import gaussian_divergence, haar_moments


def beta_cumulants(a, b):
    """Mean, variance, third central moment and fourth cumulant of Beta(a, b), in rationals."""
    raw = [Fraction(1)]
    for k in range(4):
        raw.append(raw[-1] * (a + k) / (a + b + k))
    m = raw[1]
    mu2 = raw[2] - m**2
    mu3 = raw[3] - 3 * m * raw[2] + 2 * m**3
    mu4 = raw[4] - 4 * m * raw[3] + 6 * m**2 * raw[2] - 3 * m**4
    return m, mu2, mu3, mu4 - 3 * mu2**2


@pytest.mark.parametrize("s, d", [(1, 4), (3, 7), (5, 12), (64, 768), (11, 12)])
def test_rank_one_is_a_beta_law(s, d):
    expected = beta_cumulants(Fraction(s, 2), Fraction(d - s, 2))
    found = haar_moments(1, s, d)
    assert [float(x) for x in found] == pytest.approx([float(x) for x in expected], rel=1e-10)


@pytest.mark.parametrize("r, s, d", [(2, 3, 9), (3, 5, 12), (8, 24, 96), (64, 64, 768)])
def test_complement_reflects_the_law(r, s, d):
    plain, complement = haar_moments(r, s, d), haar_moments(r, d - s, d)
    assert float(plain.mean + complement.mean) == pytest.approx(r)
    assert float(plain.variance) == pytest.approx(float(complement.variance))
    assert float(plain.third_central) == pytest.approx(-float(complement.third_central))
    assert float(plain.fourth_cumulant) == pytest.approx(float(complement.fourth_cumulant))


@pytest.mark.parametrize(
    "r, s, d, mean, variance, skewness, excess",
    [
        (4, 6, 20, 1.2, 0.06430622, 0.175263, -0.036910),
        (2, 2, 7, 4 / 7, 0.07558579, 0.340112, -0.206350),
        (64, 64, 768, 5.333333, 0.0116554, 0.0334, 0.0013),
    ],
)
def test_known_cumulants(r, s, d, mean, variance, skewness, excess):
    found = haar_moments(r, s, d)
    assert float(found.mean) == pytest.approx(mean, rel=1e-6)
    assert float(found.variance) == pytest.approx(variance, rel=1e-5)
    assert float(found.third_central / found.variance**1.5) == pytest.approx(skewness, abs=5e-5)
    assert float(found.fourth_cumulant / found.variance**2) == pytest.approx(excess, abs=5e-5)


def test_moments_against_sampled_subspaces():
    r, s, d, n = 3, 5, 12, 40_000
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((n, d, s)))[0]
    sample = np.square(basis[:, :r]).sum(axis=(1, 2))
    found = haar_moments(r, s, d)
    sd = float(found.variance) ** 0.5
    assert sample.mean() == pytest.approx(float(found.mean), abs=5 * sd / n**0.5)
    assert sample.var() == pytest.approx(float(found.variance), rel=0.04)


def test_whole_space_and_nothing_have_no_spread():
    found = haar_moments([0, 6, 3], [4, 4, 6], 6)
    assert found.mean.tolist() == [0, 4, 3]
    assert found.variance.tolist() == [0, 0, 0]
    assert found.third_central.tolist() == [0, 0, 0]


def test_lines_of_a_plane_have_a_law_that_is_its_own_mirror_image():
    """The arcsine law, whose third moment is 0 / 0 in the general formula."""
    found = haar_moments(1, 1, 2)
    assert [float(x) for x in found[:3]] == [0.5, 0.125, 0.0]
    assert [float(x) for x in haar_moments(1, 2, 2)[:3]] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("r, s, d", [(5, 2, 4), (-1, 2, 4), (1, 5, 4), (1, 1, 0)])
def test_impossible_ranks_are_refused(r, s, d):
    with pytest.raises(ValueError, match="ranks must lie between 0 and the dimension"):
        haar_moments(r, s, d)


def test_divergence_of_the_reference_itself_vanishes():
    rng = np.random.default_rng(0)
    values = rng.normal(8, 1.0, 200_000)
    assert gaussian_divergence(values, 8.0, 1.0, 16.0, bins=12) < 1e-3
    assert gaussian_divergence(values, 7.0, 1.0, 16.0, bins=12) > 0.3


def test_divergence_forgives_rounding_at_both_ends():
    inside = gaussian_divergence([0.0, 8.0, 16.0], 8.0, 9.0, 16.0)
    assert gaussian_divergence([-1e-4, 8.0, 16.0 + 1e-4], 8.0, 9.0, 16.0) == inside
    for values in ([-0.01, 8.0], [8.0, 16.01]):
        with pytest.raises(ValueError, match=r"must lie in \[0, 16.0\]"):
            gaussian_divergence(values, 8.0, 9.0, 16.0)


def test_divergence_of_disjoint_values_is_large_and_finite():
    assert 20 < gaussian_divergence([1.0, 1.1], 8.0, 1.0, 16.0, bins=16) < 30


def test_divergence_equals_the_sum_over_bins():
    values = [0.5, 1.5, 1.6, 2.5]
    edges = np.linspace(0, 3, 4)
    mass = np.diff(norm.cdf(edges, 1.4, 0.5))
    expected = sum(p * np.log(p / q) for p, q in zip(mass, [0.25, 0.5, 0.25], strict=True))
    assert gaussian_divergence(values, 1.4, 0.25, 3.0, bins=3) == pytest.approx(expected)


@pytest.mark.parametrize(
    "values, variance, message",
    [
        ([], 1.0, "no values"),
        ([1.0], 0.0, "variance must be positive"),
        ([5.0, 17.0], 1.0, "must lie in"),
    ],
)
def test_divergence_refuses(values, variance, message):
    with pytest.raises(ValueError, match=message):
        gaussian_divergence(values, 8.0, variance, 16.0)
