"""Sign flips against all flips there are; empirical nulls against values of a known law."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

import skhead
from skhead.exceptions import HeadShapeError, MemoryBudgetError
from skhead.stats.anisotropic import mean_projector
from skhead.stats.empirical import fit_empirical_null, local_fdr
from skhead.stats.multiple import adjust_log_p
from skhead.stats.polish import layer_block_scores, median_polish
from skhead.stats.signflip import pooled_eigenbasis, signflip_moments


def bases(n, d, r, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, d, r, generator=generator, dtype=torch.float64))[0]


def turned(stack, seed):
    return bases(1, stack.shape[1], stack.shape[1], seed)[0] @ stack


def kernel(a, b):
    return np.square(np.einsum("idr,jds->ijrs", a, b)).sum((2, 3))


@pytest.mark.parametrize("given_axes", [False, True])
def test_signflip_moments_are_those_of_all_flips(given_axes):
    d = 7
    rows, columns = bases(3, d, 2, 0), bases(4, d, 3, 1)
    rows[1, :, 1] = 0
    axes = bases(1, d, d, 2)[0] if given_axes else None
    own = torch.eye(d, dtype=torch.float64) if axes is None else axes
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=d)))
    every = [kernel(rows, own @ torch.diag(torch.from_numpy(s)) @ own.T @ columns) for s in signs]
    found = signflip_moments(rows, columns, axes)
    np.testing.assert_allclose(found.mean, np.mean(every, axis=0), atol=1e-12)
    np.testing.assert_allclose(found.variance, np.var(every, axis=0), atol=1e-12)


def test_signflip_moments_do_not_depend_on_memory_or_dtype():
    rows, columns = bases(5, 33, 4, 0), bases(6, 33, 3, 1)
    line = 2 * (5 + 6) * 33 * 8
    whole = signflip_moments(rows, columns)
    tight = signflip_moments(rows, columns, max_memory=line)
    np.testing.assert_allclose(tight.variance, whole.variance, rtol=1e-12)
    single = signflip_moments(rows.float(), columns.float())
    assert single.variance.dtype == np.float64
    np.testing.assert_allclose(single.mean, whole.mean, rtol=1e-5)
    np.testing.assert_allclose(single.variance, whole.variance, rtol=1e-5)
    with pytest.raises(MemoryBudgetError, match=f"one line of every projector needs {line}"):
        signflip_moments(rows, columns, max_memory=line - 1)


def test_one_head_has_the_moments_that_it_has_among_others():
    rows, columns = bases(3, 7, 2, 0), bases(4, 7, 3, 1)
    among, alone = signflip_moments(rows, columns), signflip_moments(rows[:1], columns[:1])
    np.testing.assert_allclose(alone.mean, among.mean[:1, :1])
    np.testing.assert_allclose(alone.variance, among.variance[:1, :1])
    with pytest.raises(HeadShapeError, match=r"none of them 0; got \(0, 7, 2\)"):
        signflip_moments(rows[:0], columns)


def test_signflip_in_the_pooled_eigenbasis_does_not_depend_on_coordinates():
    rows, columns = bases(6, 9, 2, 0), bases(6, 9, 3, 1)

    def moments(a, b):
        means = [mean_projector(stack).matrix for stack in (a, b)]
        return signflip_moments(a, b, pooled_eigenbasis(*means))

    plain, rotated = moments(rows, columns), moments(turned(rows, 5), turned(columns, 5))
    np.testing.assert_allclose(rotated.mean, plain.mean, atol=1e-10)
    np.testing.assert_allclose(rotated.variance, plain.variance, atol=1e-10)


def test_pooled_eigenbasis_weighs_roles_alike():
    narrow, wide = np.diag([1.0, 0, 0, 0]), np.diag([0.0, 3, 2.5, 2.4])
    axes = pooled_eigenbasis(torch.from_numpy(narrow), torch.from_numpy(wide))
    assert axes[:, -1].abs().tolist() == [1, 0, 0, 0]


def test_signflip_input_that_does_not_fit():
    stack = bases(2, 6, 2, 0)
    with pytest.raises(HeadShapeError, match=r"widths differ: 6 \(rows\), 5 \(columns\)"):
        signflip_moments(stack, bases(2, 5, 2, 0))
    with pytest.raises(HeadShapeError, match="bases must have shape"):
        signflip_moments(stack[0], stack)
    with pytest.raises(HeadShapeError, match=r"need axes of shape \(6, 6\)"):
        signflip_moments(stack, stack, torch.eye(5))
    with pytest.raises(HeadShapeError, match="the axes are not orthonormal"):
        signflip_moments(stack, stack, 2 * torch.eye(6))
    with pytest.raises(HeadShapeError, match="square matrices of one width"):
        pooled_eigenbasis(torch.eye(3), torch.eye(4))
    with pytest.raises(HeadShapeError, match="square matrices of one width"):
        pooled_eigenbasis()


def additive_table(seed, rows=30, columns=40, noise=0.0):
    rng = np.random.default_rng(seed)
    table = np.add.outer(rng.normal(size=rows), rng.normal(size=columns)) + 3
    return table + noise * rng.standard_normal((rows, columns))


def test_median_polish_leaves_only_what_is_not_additive():
    table = additive_table(0)
    table[4, 5] += 7
    table[8, 9] -= 6
    found = median_polish(table)
    expected = np.zeros_like(table)
    expected[4, 5], expected[8, 9] = 7, -6
    np.testing.assert_allclose(found.residuals, expected, atol=1e-5)
    assert found.converged


def test_median_polish_adds_up_around_holes():
    table = additive_table(1, 40, 40, noise=0.3)
    table[np.tril_indices(40)] = np.nan
    found = median_polish(table)
    effects = found.overall + found.row_effects[:, None] + found.column_effects
    np.testing.assert_allclose((effects + found.residuals)[:-1, 1:], table[:-1, 1:], atol=1e-9)
    assert np.isnan(found.residuals[np.tril_indices(40)]).all()
    assert np.isnan(found.row_effects[-1]) and np.isnan(found.column_effects[0])
    assert np.nanmedian(found.row_effects) == pytest.approx(0, abs=1e-9)
    for axis in (0, 1):
        medians = np.nanmedian(found.residuals[:-1, 1:], axis)
        assert np.abs(medians).max() < 1e-5
    assert 0.8 < found.explained < 1


def test_median_polish_follows_the_order_of_heads():
    table = additive_table(2, noise=0.5)
    rows, columns = (np.random.default_rng(3).permutation(n) for n in table.shape)
    plain, shuffled = median_polish(table), median_polish(table[rows][:, columns])
    np.testing.assert_allclose(shuffled.residuals, plain.residuals[rows][:, columns], atol=1e-9)


def test_symmetric_polish_has_one_effect_per_head():
    rng = np.random.default_rng(7)
    level, noise = rng.normal(size=41), 0.3 * rng.standard_normal((41, 41))
    table = np.add.outer(level, level) + (noise + noise.T)
    table[np.diag_indices(41)] = np.nan
    found = median_polish(table, symmetric=True, tol=1e-12)
    assert found.converged
    np.testing.assert_array_equal(found.row_effects, found.column_effects)
    np.testing.assert_array_equal(found.residuals, found.residuals.T)
    assert np.abs(np.nanmedian(found.residuals, axis=1)).max() < 1e-11
    effects = found.overall + found.row_effects[:, None] + found.column_effects
    np.testing.assert_allclose(effects + found.residuals, table, atol=1e-12)
    np.testing.assert_allclose(found.residuals_of(table), found.residuals, atol=1e-11)
    rows_first = median_polish(table)
    assert np.nanmax(np.abs(rows_first.residuals - rows_first.residuals.T)) > 1e-3
    assert np.nanmax(np.abs(rows_first.residuals - found.residuals)) < 0.1


def test_symmetric_polish_refuses_other_tables():
    with pytest.raises(ValueError, match="its own mirror image"):
        median_polish(additive_table(8, 5, 5), symmetric=True)


def test_new_rows_are_judged_one_by_one():
    fitted = median_polish(additive_table(4, noise=0.2))
    rng = np.random.default_rng(5)
    rows = 2 + fitted.column_effects + rng.standard_normal((3, 40))
    rows[:, 7] = np.nan
    together = fitted.residuals_of(rows)
    np.testing.assert_array_equal(together[:1], fitted.residuals_of(rows[:1]))
    np.testing.assert_allclose(np.nanmedian(together, axis=1), 0, atol=1e-12)
    assert np.isnan(together[:, 7]).all()
    with pytest.raises(HeadShapeError, match="fitted on 40 columns, got 39"):
        fitted.residuals_of(rows[:, 1:])


def test_tables_that_cannot_be_polished():
    with pytest.raises(HeadShapeError, match="median_polish: needs a 2-D table"):
        median_polish(np.zeros(3))
    with pytest.raises(ValueError, match=r"entry \(1, 0\) is -inf; the logarithm"):
        median_polish(np.array([[0.0, 1.0], [-np.inf, 2.0]]))
    with pytest.raises(ValueError, match="no entry of the table is defined"):
        median_polish(np.full((2, 2), np.nan))


def test_layer_blocks_are_scored_by_themselves():
    layers = np.repeat(np.arange(3), 20)
    rng = np.random.default_rng(6)
    scale, shift = rng.uniform(1, 9, (3, 3)), rng.uniform(-50, 50, (3, 3))
    noise = rng.standard_normal((60, 60))
    table = noise * scale[layers][:, layers] + shift[layers][:, layers]
    table[layers[:, None] >= layers] = np.nan
    scores = layer_block_scores(table, layers, layers)
    np.testing.assert_array_equal(np.isnan(scores), np.isnan(table))
    np.testing.assert_allclose(
        scores, layer_block_scores(np.where(np.isnan(table), np.nan, noise), layers, layers)
    )
    block = scores[:20, 20:40]
    assert np.median(block) == pytest.approx(0, abs=1e-12)
    assert np.median(np.abs(block)) == pytest.approx(stats.norm.ppf(0.75))


def test_layer_blocks_that_cannot_be_scored():
    with pytest.raises(ValueError, match="layer 0 against layer 1 has 1 defined pairs"):
        layer_block_scores([[1.0]], [0], [1])
    with pytest.raises(ValueError, match="4 defined pairs of spread 0"):
        layer_block_scores(np.ones((2, 2)), [0, 0], [1, 1])
    with pytest.raises(HeadShapeError, match="got 3 and 2"):
        layer_block_scores(np.ones((2, 2)), [0, 0, 0], [1, 1])


@pytest.mark.parametrize("method", ["mad", "iqr", "central"])
@pytest.mark.parametrize("tails", ["normal", "t"])
def test_null_of_a_known_law_is_recovered(method, tails):
    law = stats.norm if tails == "normal" else stats.t(4)
    values = 2 + 3 * law.rvs(size=40_000, random_state=7)
    null = fit_empirical_null(values, method)
    center, scale = (
        (null.center, null.scale) if tails == "normal" else (null.t_center, null.t_scale)
    )
    assert center == pytest.approx(2, abs=0.1)
    assert scale == pytest.approx(3, rel=0.06)
    assert stats.kstest(null.z(values, tails), "norm").statistic < 0.02


def test_planted_values_hardly_move_the_null():
    values = np.random.default_rng(8).standard_normal(20_000)
    values[:1000] += 8
    for method in ("mad", "iqr", "central"):
        null = fit_empirical_null(values, method)
        assert null.scale == pytest.approx(1, rel=0.12)
    assert null.excess_kurtosis > 2
    assert abs(null.center) < 0.05


def test_central_values_are_fitted_by_maximum_likelihood():
    values = np.random.default_rng(12).standard_t(3, 3000)
    null = fit_empirical_null(values, "central")
    low, high = np.quantile(values, [0.1, 0.9])
    inside = values[(values >= low) & (values <= high)]

    def likelihood(center, scale):
        ends = (low - center) / scale, (high - center) / scale
        return stats.truncnorm.logpdf(inside, *ends, center, scale).mean()

    best = likelihood(null.center, null.scale)
    for step in (-0.01, 0.01):
        assert likelihood(null.center + step, null.scale) < best
        assert likelihood(null.center, null.scale * (1 + step)) < best


def test_p_values_agree_with_their_law_and_do_not_underflow():
    null = fit_empirical_null(np.random.default_rng(9).standard_normal(1000))
    x = np.array([-3.0, -0.2, 0.0, 1.4, 5.0, np.nan])
    z = null.z(x)
    np.testing.assert_allclose(np.exp(null.log_p(x, "upper")), stats.norm.sf(z))
    np.testing.assert_allclose(np.exp(null.log_p(x, "lower")), stats.norm.cdf(z))
    np.testing.assert_allclose(np.exp(null.log_p(x)), 2 * stats.norm.sf(np.abs(z)))
    scaled = (x - null.t_center) / null.t_scale
    np.testing.assert_allclose(np.exp(null.log_p(x, "upper", "t")), stats.t.sf(scaled, 4))
    far = 1e4 * null.scale
    assert null.log_p(far, "upper") == pytest.approx(-5e7, rel=0.01)
    assert -40 < null.log_p(far, "upper", "t") < -30
    assert null.z(-far, "t") == pytest.approx(-null.z(2 * null.t_center + far, "t"))


def test_nulls_that_cannot_be_fitted():
    with pytest.raises(ValueError, match="at least 20 finite values, got 3, 0 of them infinite"):
        fit_empirical_null([1.0, 2.0, 3.0, np.nan])
    with pytest.raises(ValueError, match="got 30, 1 of them infinite"):
        fit_empirical_null([*range(29), np.inf])
    with pytest.raises(ValueError, match="half of the values equal 1"):
        fit_empirical_null(np.ones(30))
    with pytest.raises(ValueError, match="method must be one of mad, iqr, central, got 'sd'"):
        fit_empirical_null(range(30), "sd")
    with pytest.raises(ValueError, match="df must be positive, got 0"):
        fit_empirical_null(range(30), df=0)
    null = fit_empirical_null(range(30))
    with pytest.raises(ValueError, match="tails must be 'normal' or 't', got 'cauchy'"):
        null.z(1.0, "cauchy")
    with pytest.raises(ValueError, match="side must be .* got 'left'"):
        null.log_p(1.0, "left")


def test_local_rates_are_the_posterior_of_a_mixture():
    rng = np.random.default_rng(10)
    n, planted = 50_000, 5_000
    z = rng.standard_normal(n)
    z[:planted] += 3
    found = local_fdr(stats.norm.logsf(z))
    share = 1 - planted / n
    true = share * stats.norm.pdf(z)
    true = true / (true + (1 - share) * stats.norm.pdf(z, 3))
    assert found.null_share == pytest.approx(share, abs=0.02)
    rising = np.argsort(z)
    assert (np.diff(found.values[rising]) <= 1e-9).all()
    middle = (z > 1) & (z < 4)
    assert np.abs(found.values - true)[middle].mean() < 0.03
    called = found.values < 0.2
    assert called[:planted].sum() > 0.4 * planted
    assert (~np.isin(np.flatnonzero(called), np.arange(planted))).mean() < 0.1


def test_local_rates_of_pure_noise_call_nothing():
    called = 0
    for seed in range(20):
        p = np.random.default_rng(seed).random(2000)
        called += int((local_fdr(np.log(p)).values < 0.2).sum())
    assert called <= 20


def test_local_rates_at_the_ends():
    logs = np.array([-1e5, -800.0, np.nan, *np.log(np.linspace(0.01, 1, 100))])
    rates = local_fdr(logs).values
    assert rates[0] < 1e-10 and np.isnan(rates[2]) and rates[-1] > 0.9
    assert local_fdr([0.0, 0.0]).values.tolist() == [1.0, 1.0]
    for bad in ([0.1, -1.0], [np.nan], []):
        with pytest.raises(ValueError, match="none above 0 and at least one that is not NaN"):
            local_fdr(bad)


def test_polished_residuals_find_planted_pairs_among_hubs():
    rng = np.random.default_rng(11)
    table = np.exp(0.3 * additive_table(12, 80, 80, noise=0.3))
    planted = rng.random(table.shape) < 0.01
    table[planted] *= 2.5
    polish = median_polish(np.log(table))
    null = fit_empirical_null(polish.residuals)
    q = np.exp(adjust_log_p(null.log_p(polish.residuals, "upper")))
    called = q < 0.05
    assert (called & planted).sum() > 0.95 * planted.sum()
    assert (called & ~planted).sum() < 0.12 * called.sum()


@pytest.fixture(scope="module")
def gpt2(gpt2_path):
    subspaces = skhead.SubspaceExtractor(roles="QKVO").fit_transform(skhead.load_heads(gpt2_path))
    return subspaces, skhead.ProjectionKernel().fit_transform(subspaces)


def rejected(log_p):
    """Percentage of defined pairs called at a false discovery rate of 5%."""
    log_q = adjust_log_p(log_p[~np.isnan(log_p)])
    return 100 * float((log_q <= np.log(0.05)).mean())


@pytest.mark.parametrize("pair, share", [("OQ", 47), ("OK", 51), ("OV", 55)])
def test_gpt2_main_effects(gpt2, pair, share):
    polish = median_polish(np.log(gpt2[1].pair(pair).to_numpy()))
    assert polish.converged
    assert 100 * polish.explained == pytest.approx(share, abs=1)


@pytest.mark.parametrize(
    "pair, polished, block, raw, top",
    [
        ("OQ", 2.5, 1.1, 0.0, ("L9H9", "L10H7")),
        ("OK", 4.6, 3.0, 0.8, ("L4H11", "L6H9")),
        ("OV", 7.0, 5.0, 0.5, ("L10H0", "L11H3")),
    ],
)
def test_gpt2_discoveries_of_empirical_nulls(gpt2, pair, polished, block, raw, top):
    table = gpt2[1].pair(pair)
    residuals = median_polish(np.log(table.to_numpy())).residuals
    null = fit_empirical_null(residuals)
    assert rejected(null.log_p(residuals, "upper")) == pytest.approx(polished, abs=0.12)
    assert rejected(null.log_p(residuals, "upper", "t")) == 0
    assert 3 < null.excess_kurtosis < 10
    layers = gpt2[1].rows["layer"]
    scores = layer_block_scores(table, layers, layers)
    assert rejected(stats.norm.logsf(scores)) == pytest.approx(block, abs=0.06)
    logs = np.log(table.to_numpy())
    assert rejected(fit_empirical_null(logs).log_p(logs, "upper")) == pytest.approx(raw, abs=0.06)
    best = np.unravel_index(np.nanargmax(residuals), residuals.shape)
    assert (table.index[best[0]], table.columns[best[1]]) == top


@pytest.mark.parametrize("role, pooled", [("Q", 21.1), ("K", 13.0), ("V", 14.4)])
def test_gpt2_discoveries_of_sign_flips(gpt2, role, pooled):
    subspaces, similarity = gpt2
    rows, columns = (subspaces.role(name).vectors for name in ("O", role))
    axes = pooled_eigenbasis(*(mean_projector(stack).matrix for stack in (rows, columns)))
    moments = signflip_moments(rows, columns, axes)
    z = (similarity.pair("O" + role).to_numpy() - moments.mean) / np.sqrt(moments.variance)
    assert rejected(stats.norm.logsf(z)) == pytest.approx(pooled, abs=0.05)
