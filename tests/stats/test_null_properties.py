"""What holds of every null: tails are monotone, p-values are probabilities, z is standard."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skhead import NullCalibrator, ProjectionKernel
from skhead.stats import (
    fit_empirical_null,
    haar_log_pvalue,
    haar_logcdf,
    haar_logsf,
    haar_moments,
    haar_sample,
    permutation_test,
)

NULLS = ("haar", "gaussian", "anisotropic", "signflip", "empirical")
SIDES = ("two", "upper", "lower")
every_null = pytest.mark.parametrize("null", NULLS)


@st.composite
def laws(draw):
    """Ranks and a dimension in which the kernel varies, and whose tails are not drawn."""
    d = draw(st.integers(12, 60))
    return draw(st.integers(4, d // 2)), draw(st.integers(4, d - 4)), d


#: Numbers of heads, dimensions, ranks and seeds.
SHAPES = st.tuples(
    st.integers(9, 14), st.integers(20, 40), st.integers(4, 7), st.integers(0, 10**6)
)


def random_stack(n_heads, d_model, width, seed):
    """Heads of independent Gaussian entries."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n_heads, d_model, width)).astype(np.float32)


@given(law=laws())
def test_haar_moments_are_those_of_a_bounded_law(law):
    r, s, d = law
    mean, variance = haar_moments(r, s, d)[:2]
    swapped = haar_moments(s, r, d)
    assert max(r + s - d, 0) <= mean <= min(r, s)
    assert 0 < variance <= (min(r, s) - mean) * (mean - max(r + s - d, 0)) + 1e-12
    np.testing.assert_allclose([mean, variance], swapped[:2], rtol=1e-10)


@given(law=laws())
def test_haar_tails_are_monotone_and_add_up(law):
    r, s, d = law
    low, high = max(r + s - d, 0), min(r, s)
    x = np.linspace(low, high, 41)
    above, below = haar_logsf(x, r, s, d), haar_logcdf(x, r, s, d)
    assert (above <= 1e-12).all() and (below <= 1e-12).all()
    assert (np.diff(above[np.isfinite(above)]) <= 1e-9).all()
    assert (np.diff(below[np.isfinite(below)]) >= -1e-9).all()
    np.testing.assert_allclose(np.exp(above) + np.exp(below), 1.0, atol=2e-2)


@pytest.mark.parametrize("side", SIDES)
@given(law=laws(), seed=st.integers(0, 10**6))
def test_haar_p_values_are_probabilities_of_draws(side, law, seed):
    """Draws of the law get p-values up to 1, of which a tenth are below a tenth."""
    draws = haar_sample(*law, size=1500, random_state=seed)
    p = np.exp(haar_log_pvalue(draws, *law, side=side))
    assert (p >= 0).all() and (p <= 1 + 1e-12).all()
    assert 0.06 < (p <= 0.1).mean() < 0.14


@given(law=laws(), seed=st.integers(0, 10**6))
def test_haar_draws_are_standard(law, seed):
    moments = haar_moments(*law)
    draws = haar_sample(*law, size=3000, random_state=seed)
    z = (draws - moments.mean) / np.sqrt(moments.variance)
    assert abs(z.mean()) < 0.1
    assert 0.8 < z.var() < 1.2


@every_null
@pytest.mark.parametrize("side", SIDES)
@given(shape=SHAPES)
def test_calibrated_pairs_are_probabilities_that_follow_z(null, side, shape):
    similarity = ProjectionKernel().fit_transform(random_stack(*shape))
    found = NullCalibrator(null=null, side=side).fit_transform(similarity).calibration
    defined = ~np.isnan(similarity.values)
    for part in (found.z, found.log10_p, found.q):
        assert np.array_equal(np.isnan(part), ~defined)
    log_p, q = found.log10_p[defined], found.q[defined]
    assert (log_p <= 1e-12).all()
    assert (q >= 0).all() and (q <= 1 + 1e-12).all()
    once = ~np.isnan(similarity.listed("XX"))[..., None]
    assert (np.log10(found.q[once]) >= found.log10_p[once] - 1e-6).all()
    if null in ("haar", "gaussian") and side != "two":
        falling = 1 if side == "upper" else -1
        order = np.argsort(falling * found.z[defined])
        assert (np.diff(log_p[order]) <= 1e-5).all()


@pytest.mark.parametrize("null", ["haar", "gaussian", "anisotropic", "signflip"])
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_null_follows_heads_and_not_coordinates(null, shape, seed):
    """Of few heads; the medians of the empirical null ask for more (test_null_calibrator.py)."""
    stack = random_stack(*shape)
    law, kernel = NullCalibrator(null=null), ProjectionKernel()
    plain = law.fit_transform(kernel.fit_transform(stack)).values[..., 0]
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(stack))
    turn = np.linalg.qr(generator.normal(size=(stack.shape[1],) * 2))[0].astype(np.float32)
    permuted = law.fit_transform(kernel.fit_transform(stack[order])).values[..., 0]
    rotated = law.fit_transform(kernel.fit_transform(turn @ stack)).values[..., 0]
    np.testing.assert_allclose(permuted, plain[np.ix_(order, order)], atol=5e-3)
    if null != "signflip":  # its axes are arbitrary where heads share no directions
        np.testing.assert_allclose(rotated, plain, atol=5e-3)


@pytest.mark.parametrize("null", ["haar", "gaussian", "anisotropic", "empirical"])
@given(seed=st.integers(0, 10**6))
def test_random_heads_are_standard_under_the_null(null, seed):
    stack = np.random.default_rng(seed).normal(size=(24, 48, 6)).astype(np.float32)
    z = NullCalibrator(null=null).fit_transform(ProjectionKernel().fit_transform(stack)).values
    z = z[~np.isnan(z)]
    assert abs(z.mean()) < 0.35
    assert 0.7 < z.std() < 1.3


@given(seed=st.integers(0, 10**6), shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_empirical_null_moves_with_the_values(seed, shift, scale):
    values = np.random.default_rng(seed).normal(size=800)
    first, second = fit_empirical_null(values), fit_empirical_null(shift + scale * values)
    np.testing.assert_allclose(first.z(values), second.z(shift + scale * values), atol=1e-6)
    assert abs(first.z(values).mean()) < 0.2
    assert 0.8 < first.z(values).std() < 1.2


@pytest.mark.parametrize("exchange", ["blocks", "within_rows", "rows", "both"])
@given(seed=st.integers(0, 10**6))
def test_permutation_p_values_are_probabilities_that_scale_cannot_move(exchange, seed):
    table = np.random.default_rng(seed).normal(size=(8, 8))
    layers = np.repeat([0, 1], 4)
    weights = np.linspace(0, 1, 8)

    def statistic(values):
        return values @ weights

    options = {"exchange": exchange, "n_permutations": 99, "random_state": seed}
    found = permutation_test(statistic, table, layers, layers, **options)
    scaled = permutation_test(statistic, 4 * table, layers, layers, **options)
    assert (found.p_value >= 0.01).all() and (found.p_value <= 1).all()
    assert (found.adjusted_p_value >= found.p_value - 1e-12).all()
    np.testing.assert_array_equal(found.p_value, scaled.p_value)
