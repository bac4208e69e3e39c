"""Tail probabilities of the projection kernel."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import log_ndtr

from skhead.stats import haar_log_pvalue, haar_logcdf, haar_logsf, haar_moments, haar_sample

LAWS = [(8, 8, 64), (8, 16, 64), (32, 32, 256), (64, 64, 768)]


@lru_cache(maxsize=2)
def sorted_draws(r, s, d, n):
    return np.sort(haar_sample(r, s, d, n, random_state=20))


def ratios(law, n, level, method="auto"):
    """Computed over true probability of the tails beyond the draws' quantiles, upper and lower."""
    draws = sorted_draws(*law, n)
    upper, lower = draws[round(n * (1 - level))], draws[round(n * level)]
    return (
        np.exp(haar_logsf(upper, *law, method=method)) / level,
        np.exp(haar_logcdf(lower, *law, method=method)) / level,
    )


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("level", [0.1, 1e-2, 1e-3])
def test_both_tails_against_exact_draws(law, level):
    # 200 draws lie beyond the deepest level: one standard error is 7%.
    assert ratios(law, 200_000, level) == pytest.approx((1, 1), abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "law, n", list(zip(LAWS, [8_000_000, 8_000_000, 4_000_000, 4_000_000], strict=True))
)
def test_deep_tails_against_many_exact_draws(law, n):
    assert ratios(law, n, 1e-4) == pytest.approx((1, 1), abs=0.15)


@pytest.mark.parametrize("law", [(2, 2, 4), (2, 3, 12), (3, 6, 12), (2, 10, 12), (11, 10, 13)])
@pytest.mark.parametrize("level", [0.1, 1e-3, 1e-4])
def test_small_ranks_against_other_draws(law, level):
    assert ratios(law, 2_000_000, level) == pytest.approx((1, 1), abs=0.25)


def test_normal_law_is_too_small_and_pearson_3_too_large_in_the_upper_tail():
    normal, gamma = (ratios((8, 8, 64), 1_000_000, 1e-3, m)[0] for m in ("normal", "pearson3"))
    assert normal < 0.5
    assert 1.02 < gamma < 1.25


@pytest.mark.parametrize("method, n", [("normal", 2), ("pearson3", 3), ("pearson1", 4)])
@pytest.mark.parametrize("law", LAWS)
def test_a_law_has_as_many_moments_of_the_kernel_as_it_says(method, n, law):
    exact = [float(moment) for moment in haar_moments(*law)]
    x = np.linspace(0, law[0], 40_001)
    sf = np.exp(haar_logsf(x, *law, method=method))
    away = x - exact[0]
    # By parts: E (X - m)^k is k times the integral of (x - m)^(k - 1) P(X > x), from x = 0 on.
    found = [
        k * integrate.simpson(away ** (k - 1) * sf, x=x) + (-exact[0]) ** k for k in (1, 2, 3, 4)
    ]
    sd = exact[1] ** 0.5
    found[3] -= 3 * found[1] ** 2
    found = [moment / sd**k for k, moment in enumerate(found, start=1)]
    expected = [0, 1, exact[2] / sd**3, exact[3] / sd**4]
    assert found[:n] == pytest.approx(expected[:n], abs=1e-5)


@pytest.mark.parametrize("law", [(2, 2, 4), (3, 4, 8), (2, 2, 40)])
def test_normal_law_is_conditioned_on_the_range(law):
    mean, variance, *_ = (float(moment) for moment in haar_moments(*law))
    sd, x = variance**0.5, np.linspace(0, law[0], 9)[1:-1]
    expected = stats.truncnorm(-mean / sd, (law[0] - mean) / sd, mean, sd)
    np.testing.assert_allclose(haar_logsf(x, *law, method="normal"), expected.logsf(x), rtol=1e-9)
    np.testing.assert_allclose(
        haar_logcdf(x, *law, method="normal"), expected.logcdf(x), 1e-9, 1e-15
    )


@pytest.mark.parametrize("s, d", [(1, 2), (3, 7), (64, 768), (300, 301)])
def test_rank_one_is_the_beta_law(s, d):
    x = np.linspace(0.01, 0.99, 25)
    beta = stats.beta(s / 2, (d - s) / 2)
    x = x[(beta.sf(x) > 1e-280) & (beta.cdf(x) > 1e-280)]
    assert x.size > 3
    np.testing.assert_allclose(haar_logsf(x, 1, s, d), beta.logsf(x), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(haar_logcdf(x, s, 1, d), beta.logcdf(x), rtol=1e-8, atol=1e-12)


def test_rank_one_less_than_the_dimension_is_the_beta_law():
    x = np.linspace(0.05, 0.95, 9)
    found = haar_logsf(3 + x, 4, 11, 12)
    np.testing.assert_allclose(found, stats.beta(4 / 2, 8 / 2).logcdf(1 - x), rtol=1e-8, atol=1e-12)


def test_deep_beta_tail_in_closed_form():
    # Two subspaces of ranks 1 and 2 in d dimensions: P(kernel > x) = (1 - x)^((d - 2) / 2).
    x, d = 1 - 2.0**-40, 60_000
    assert haar_logsf(x, 1, 2, d) == pytest.approx((d - 2) / 2 * np.log1p(-x), rel=1e-12)
    assert haar_logsf(x, 1, 2, d) < -np.log(10) * 300_000


METHODS = {
    "beta": (1, 5, 12),
    "monte_carlo": (3, 5, 12),
    "pearson1": (8, 8, 64),
    "pearson3": (8, 16, 64),
    "normal": (8, 16, 64),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("complements", ["none", "one", "both"])
def test_law_is_a_distribution_function(method, complements):
    r, s, d = METHODS[method]
    r = d - r if complements == "both" else r
    s = d - s if complements != "none" else s
    low, high = max(0, r + s - d), min(r, s)
    x = np.linspace(low, high, 4001)
    sf, cdf = (f(x, r, s, d, method=method) for f in (haar_logsf, haar_logcdf))
    assert (np.diff(sf) <= 1e-12).all()
    assert (np.diff(cdf) >= -1e-12).all()
    np.testing.assert_allclose(np.exp(sf) + np.exp(cdf), 1, atol=1e-9)
    assert (sf[0], sf[-1], cdf[0], cdf[-1]) == (0, -np.inf, -np.inf, 0)
    assert np.isfinite(sf[1:-1]).all()
    assert np.isfinite(cdf[1:-1]).all()


@pytest.mark.parametrize("law", [(8, 8, 64), (64, 64, 768), (2, 3, 12), (4, 4, 8)])
def test_logs_have_no_steps(law):
    mean, variance, *_ = haar_moments(*law)
    sd = float(variance) ** 0.5
    x = np.linspace(
        max(float(mean) - 12 * sd, 0.05), min(float(mean) + 12 * sd, law[0] - 0.05), 6001
    )
    for logs in (haar_logsf(x, *law), haar_logcdf(x, *law)):
        steps = np.abs(np.diff(logs))
        around = np.maximum(steps[:-2], steps[2:])
        assert (steps[1:-1] <= 3 * around + 1e-3).all()


@pytest.mark.parametrize("r, s, d", [(1, 4, 9), (2, 3, 9), (8, 16, 64), (64, 64, 768)])
def test_complement_exchanges_the_tails(r, s, d):
    x = np.linspace(0, r, 31)[1:-1]
    np.testing.assert_allclose(haar_logsf(x, r, s, d), haar_logcdf(r - x, r, d - s, d), rtol=1e-6)


def test_logs_stay_finite_and_ordered_far_out():
    found = haar_logsf(np.linspace(6, 63.9, 200), 64, 64, 768)
    assert np.isfinite(found).all()
    assert (np.diff(found) < 0).all()
    assert found[-1] < -15_000


def test_no_room_for_a_beta_law_is_the_normal_law():
    sd = float(haar_moments(4, 4, 8).variance) ** 0.5
    assert haar_logsf(3.0, 4, 4, 8) == pytest.approx(log_ndtr(-1 / sd), rel=1e-4)


def test_outside_the_range_and_without_a_value():
    sf, cdf = (f([-1.0, 70.0, np.nan, np.inf], 64, 64, 768) for f in (haar_logsf, haar_logcdf))
    np.testing.assert_array_equal(sf, [0, -np.inf, np.nan, -np.inf])
    np.testing.assert_array_equal(cdf, [-np.inf, 0, np.nan, 0])


def test_single_valued_law_forgives_rounding():
    x = np.array([2.9, 3 - 1e-6, 3 + 1e-6, 3.1])
    inf = np.inf
    assert haar_logsf(x, 3, 6, 6).tolist() == [0, -inf, -inf, -inf]
    assert haar_logcdf(x, 3, 6, 6).tolist() == [-inf, 0, 0, 0]
    assert haar_log_pvalue(x, 3, 6, 6).tolist() == [0, 0, 0, -inf]
    assert haar_log_pvalue(x, 3, 6, 6, side="two").tolist() == [-inf, 0, 0, -inf]


def test_sides():
    x = np.linspace(4.8, 5.9, 12)
    upper, lower, two = (haar_log_pvalue(x, 64, 64, 768, side=s) for s in ("upper", "lower", "two"))
    np.testing.assert_array_equal(upper, haar_logsf(x, 64, 64, 768))
    np.testing.assert_array_equal(lower, haar_logcdf(x, 64, 64, 768))
    np.testing.assert_allclose(np.exp(two), np.minimum(1, 2 * np.exp(np.minimum(upper, lower))))


def test_p_values_of_random_subspaces_are_uniform():
    for law in [(1, 4, 9), (3, 6, 12), (8, 40, 64)]:
        p = np.exp(haar_log_pvalue(haar_sample(*law, 20_000, random_state=3), *law))
        assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_arguments_broadcast_and_laws_do_not_mix():
    x, ranks = np.array([[0.7], [1.1]]), np.array([1, 4, 8])
    found = haar_logsf(x, ranks, 8, 64)
    assert found.shape == (2, 3)
    alone = [[float(haar_logsf(v, r, 8, 64)) for r in ranks] for v in x[:, 0]]
    np.testing.assert_array_equal(found, alone)


def test_seed_decides_a_sampled_law():
    first, again, other = (haar_logsf(1.3, 2, 3, 12, random_state=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first == pytest.approx(other, abs=0.3)


@pytest.mark.parametrize(
    "law, options, message",
    [
        ((5, 2, 4), {}, "haar_logsf: ranks must lie between 0 and the dimension"),
        ((2.5, 2, 4), {}, "must be whole numbers"),
        ((np.nan, 2, 4), {}, "must be whole numbers"),
        ((2, 2, 8), {"method": "pillai"}, "method must be one of 'auto', .* got 'pillai'"),
        ((2, 3, 8), {"method": "beta"}, "'beta' covers ranks from 1 to 1 .* got 2 and 3 in 8"),
        ((5, 5, 20), {"method": "monte_carlo"}, "'monte_carlo' covers ranks from 2 to 3"),
        ((2, 3, 8), {"n_draws": 10}, "n_draws must be at least 100000, got 10"),
    ],
)
def test_bad_arguments_are_refused(law, options, message):
    with pytest.raises(ValueError, match=message):
        haar_logsf(1.0, *law, **options)


def test_unknown_side_is_refused():
    with pytest.raises(ValueError, match="side must be 'upper', 'lower' or 'two', got 'both'"):
        haar_log_pvalue(1.0, 2, 3, 12, side="both")
