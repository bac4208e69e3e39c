"""Exact draws from the law of the projection kernel."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp

from skhead.stats import haar_moments, haar_sample
from skhead.stats.haar_sampling import reduce_law


def kernels_of_subspaces(r, s, d, n, seed):
    """Kernels of `n` pairs of subspaces, by QR; one of each pair is fixed."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, d, s)))[0]
    return np.square(basis[:, :r]).sum(axis=(1, 2))


@pytest.mark.parametrize(
    "r, s, d", [(1, 1, 2), (1, 3, 5), (3, 5, 12), (5, 3, 12), (6, 7, 10), (8, 8, 32), (2, 9, 12)]
)
def test_same_law_as_subspaces_drawn_by_qr(r, s, d):
    drawn = haar_sample(r, s, d, 20_000, random_state=1)
    assert ks_2samp(drawn, kernels_of_subspaces(r, s, d, 20_000, seed=2)).pvalue > 1e-3


@pytest.mark.parametrize("r, s, d", [(4, 6, 20), (12, 5, 20), (15, 18, 20), (64, 64, 768)])
def test_moments(r, s, d):
    n = 200_000
    drawn, exact = haar_sample(r, s, d, n, random_state=0), haar_moments(r, s, d)
    sd = float(exact.variance) ** 0.5
    assert drawn.mean() == pytest.approx(float(exact.mean), abs=4 * sd / n**0.5)
    assert drawn.var() == pytest.approx(float(exact.variance), rel=0.02)
    skewness = float(exact.third_central) / sd**3
    assert np.mean((drawn - drawn.mean()) ** 3) / sd**3 == pytest.approx(skewness, abs=0.025)


@pytest.mark.parametrize(
    "r, s, d", [(3, 4, 20), (3, 17, 20), (17, 4, 20), (17, 16, 20), (10, 10, 20)]
)
def test_reduced_law_keeps_mean_and_range(r, s, d):
    law = reduce_law(r, s, d)
    assert law.r <= law.s <= d / 2
    assert law.offset + law.sign * law.r * law.s / d == pytest.approx(r * s / d)
    ends = sorted([law.offset, law.offset + law.sign * law.r])
    assert ends == [max(0, r + s - d), min(r, s)]


@pytest.mark.parametrize("r, s, d, only", [(0, 3, 5, 0), (5, 3, 5, 3), (4, 5, 5, 4), (1, 1, 1, 1)])
def test_trivial_ranks_leave_one_value(r, s, d, only):
    assert haar_sample(r, s, d, 4, random_state=0).tolist() == [only] * 4


def test_shapes_and_seeds():
    assert isinstance(haar_sample(2, 3, 9, random_state=0), float)
    assert haar_sample(2, 3, 9, (3, 5), random_state=0).shape == (3, 5)
    assert haar_sample(2, 3, 9, 0, random_state=0).shape == (0,)
    generator = np.random.default_rng(7)
    first, second = (haar_sample(2, 3, 9, 40_000, generator) for _ in range(2))
    assert np.array_equal(first, haar_sample(2, 3, 9, 40_000, random_state=7))
    assert not np.array_equal(first, second)


def test_ranks_above_the_dimension_are_refused():
    with pytest.raises(ValueError, match=r"haar_sample: ranks must lie between .* r=5, s=2, d=4"):
        haar_sample(5, 2, 4, 10)
