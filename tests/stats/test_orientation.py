"""Moments of overlaps in random orientation, against known laws and draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from skhead.stats.haar import haar_moments
from skhead.stats.orientation import oriented_overlap_moments, root_moments


def random_overlaps(first, second, n_draws, seed=0):
    """tr(M N) of diagonal M and turned diagonal N, both at trace 1."""
    rng = np.random.default_rng(seed)
    first, second = (np.asarray(x) / np.sum(x) for x in (first, second))
    turns, r = np.linalg.qr(rng.standard_normal((n_draws, len(first), len(first))))
    turns = turns * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    return np.einsum("i,nij,j->n", first, np.square(turns), second)


@pytest.mark.parametrize("r, s, d", [(1, 1, 5), (3, 5, 12), (64, 64, 768), (7, 2, 7)])
def test_projectors_have_the_moments_of_the_kernel(r, s, d):
    found = oriented_overlap_moments(r**-0.5, s**-0.5, d)
    kernel = haar_moments(r, s, d)
    assert float(found.mean) * r * s == pytest.approx(float(kernel.mean))
    assert float(found.variance) * (r * s) ** 2 == pytest.approx(float(kernel.variance), abs=1e-12)


@pytest.mark.parametrize("first", [[1, 0, 0, 0, 0, 0], [5, 3, 1, 0.1, 0, 0], [1, 1, 1, 1, 1, 1]])
def test_any_spectra_against_draws(first):
    second = [4, 1, 1, 0.5, 0, 0]
    drawn = random_overlaps(first, second, 40_000)
    sizes = (np.linalg.norm(np.asarray(x) / np.sum(x)) for x in (first, second))
    law = oriented_overlap_moments(*sizes, 6)
    assert drawn.mean() == pytest.approx(float(law.mean), rel=0.01)
    assert drawn.std() == pytest.approx(float(np.sqrt(law.variance)), rel=0.02, abs=1e-12)
    root = root_moments(*law, upper=1.0)
    assert np.sqrt(drawn).mean() == pytest.approx(float(root.mean), rel=0.005)
    assert np.sqrt(drawn).std() == pytest.approx(float(np.sqrt(root.variance)), rel=0.05, abs=1e-9)


@pytest.mark.parametrize("d", [3, 20, 500])
def test_roots_are_exact_for_lines(d):
    """The cosine of random lines: the square has a Beta law."""
    law = stats.beta(0.5, (d - 1) / 2)
    found = root_moments(law.mean(), law.var(), 1.0)
    exact = law.expect(np.sqrt)
    assert float(found.mean) == pytest.approx(exact, rel=1e-6)
    assert float(found.variance) == pytest.approx(1 / d - exact**2, rel=1e-5)


@pytest.mark.parametrize("unit", [0.25, 7.0])
@pytest.mark.parametrize("variance", [0.01, 1e-9])
def test_roots_do_not_depend_on_the_unit(unit, variance):
    once = root_moments(0.3, variance, 1.0)
    found = root_moments(0.3 * unit, variance * unit**2, unit)
    assert float(found.mean) == pytest.approx(float(once.mean) * unit**0.5, rel=1e-9)
    assert float(found.variance) == pytest.approx(float(once.variance) * unit, rel=1e-6)


def test_roots_of_narrow_laws_join_their_series():
    variances = np.array([2e-8, 0.9e-8]) * 0.25**2
    found = root_moments(0.25, variances, 1.0)
    np.testing.assert_allclose(found.mean, 0.5, rtol=1e-8)
    np.testing.assert_allclose(found.variance, variances, rtol=1e-5)


def test_constants_have_no_variance():
    assert [float(x) for x in root_moments(4.0, 0.0, 4.0)] == [2.0, 0.0]
    assert [float(x) for x in root_moments(0.0, 0.0, 0.0)] == [0.0, 0.0]
    assert [float(x) for x in oriented_overlap_moments(1.0, 1.0, 1)] == [1.0, 0.0]
