"""Kernel between independent subspaces with preferred directions: closed forms against draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import skhead
from skhead.exceptions import DegenerateHeadError, HeadShapeError
from skhead.stats import anisotropic as module
from skhead.stats.anisotropic import (
    anisotropic_moments,
    mean_projector,
    projector_traces,
    shrink_projector,
)
from skhead.stats.haar import haar_moments
from skhead.stats.leave_out import leave_one_out_means
from skhead.stats.macg import (
    covariance_from_projector,
    projector_from_covariance,
    sample_macg,
)


def power_law(d, power):
    return np.diag(np.arange(1, d + 1, dtype=float) ** -power)


def rotated(matrix, rng):
    q = np.linalg.qr(rng.standard_normal(matrix.shape))[0]
    return q @ matrix @ q.T


def random_bases(ranks, d, rng):
    bases = np.zeros((len(ranks), d, max(ranks)))
    for basis, rank in zip(bases, ranks, strict=True):
        basis[:, :rank] = np.linalg.qr(rng.standard_normal((d, rank)))[0]
    return bases


def kernels(a, b):
    return np.square(np.einsum("idr,jds->ijrs", a, b, optimize=True)).sum((2, 3))


def crossed(covariances, ranks, n, seed):
    """Kernels of n row subspaces with n column subspaces, and the exact moments' estimate."""
    rng = np.random.default_rng(seed)
    drawn = [sample_macg(c, r, n, rng) for c, r in zip(covariances, ranks, strict=True)]
    means = [projector_from_covariance(c, r) for c, r in zip(covariances, ranks, strict=True)]
    return kernels(*drawn), anisotropic_moments(*means)


rng0 = np.random.default_rng(0)


@pytest.mark.parametrize(
    "covariances, ranks, mean_tolerance, sd_tolerance",
    [
        pytest.param((power_law(256, 0.5),) * 2, (16, 16), 0.01, 0.04, id="power 0.5"),
        pytest.param((power_law(256, 1),) * 2, (16, 16), 0.03, 0.07, id="power 1"),
        pytest.param((power_law(256, 2),) * 2, (16, 16), 0.03, 0.15, id="power 2"),
        pytest.param(
            (power_law(256, 1), power_law(256, 1)[::-1, ::-1].copy()),
            (16, 24),
            0.02,
            0.05,
            id="opposed spectra, unequal ranks",
        ),
        pytest.param(
            (power_law(256, 1), rotated(power_law(256, 1), rng0)),
            (16, 24),
            0.01,
            0.05,
            id="rotated",
        ),
        pytest.param(
            (power_law(48, 0.5), rotated(power_law(48, 1), rng0)), (4, 6), 0.03, 0.05, id="small"
        ),
        pytest.param((np.eye(96), power_law(96, 1)), (8, 24), 0.01, 0.05, id="isotropic rows"),
    ],
)
def test_moments_against_draws(covariances, ranks, mean_tolerance, sd_tolerance):
    values, moments = crossed(covariances, ranks, n=250, seed=2)
    assert values.mean() == pytest.approx(moments.mean, rel=mean_tolerance)
    assert values.std() == pytest.approx(np.sqrt(moments.variance), rel=sd_tolerance)


@pytest.mark.parametrize("swap", [False, True])
def test_row_and_column_effects_against_draws(swap):
    sides = [(power_law(96, 1), 12), (rotated(power_law(96, 0.5), np.random.default_rng(3)), 16)]
    (a, r), (b, s) = sides[::-1] if swap else sides
    values, moments = crossed((a, b), (r, s), n=300, seed=2)
    residual = values - values.mean(0) - values.mean(1)[:, None] + values.mean()
    noise = residual.var() / 300
    rows, columns = values.mean(1).var() - noise, values.mean(0).var() - noise
    assert np.sqrt(rows) == pytest.approx(moments.row_sd, rel=0.12)
    assert np.sqrt(columns) == pytest.approx(moments.column_sd, rel=0.12)


@pytest.mark.parametrize("r, s, d", [(64, 64, 768), (8, 24, 96), (16, 64, 256), (200, 30, 256)])
def test_isotropic_means_give_the_haar_law(r, s, d):
    moments = anisotropic_moments(np.eye(d) * r / d, np.eye(d) * s / d)
    exact = haar_moments(r, s, d)
    assert moments.mean == pytest.approx(float(exact.mean))
    assert moments.variance == pytest.approx(float(exact.variance), rel=2 / d)
    assert moments.row_sd == pytest.approx(0, abs=1e-9)
    assert moments.column_sd == pytest.approx(0, abs=1e-9)
    assert moments.effective_dimension == pytest.approx(d)


def test_moments_do_not_depend_on_the_coordinates():
    rng = np.random.default_rng(4)
    a = projector_from_covariance(power_law(40, 1), 5)
    b = projector_from_covariance(rotated(power_law(40, 1), rng), 8)
    q = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    plain, turned = anisotropic_moments(a, b), anisotropic_moments(q @ a @ q.T, q @ b @ q.T)
    mirrored = anisotropic_moments(b, a)
    assert turned.mean == pytest.approx(plain.mean)
    assert turned.variance == pytest.approx(plain.variance)
    assert (mirrored.row_sd, mirrored.column_sd) == pytest.approx((plain.column_sd, plain.row_sd))


def test_effective_dimension_of_one_mean_is_its_participation_ratio():
    mean = projector_from_covariance(power_law(64, 1), 8)
    expected = np.trace(mean) ** 2 / np.square(mean).sum()
    assert anisotropic_moments(mean, mean).effective_dimension == pytest.approx(expected)


def test_a_fixed_subspace_has_no_spread_of_its_own():
    fixed = np.diag([1.0] * 4 + [0.0] * 16)
    moments = anisotropic_moments(fixed, projector_from_covariance(power_law(20, 1), 5))
    assert moments.row_sd == 0
    assert moments.variance == pytest.approx(moments.column_sd**2)
    assert anisotropic_moments(fixed, fixed).variance == 0


@pytest.mark.parametrize("columns", [1, 7, 4096])
def test_mean_and_traces_against_single_projectors(monkeypatch, columns):
    monkeypatch.setattr(module, "_COLUMNS", columns)
    rng = np.random.default_rng(5)
    bases = random_bases([3, 5, 2, 5], 12, rng)
    projectors = bases @ bases.mT
    weights = np.array([1.0, 0.0, 2.0, 3.0])
    mean = mean_projector(bases, weights)
    expected = np.einsum("h,hij->ij", weights, projectors) / 6
    np.testing.assert_allclose(mean.matrix, expected, atol=1e-12)
    assert mean.ranks.tolist() == [3, 5, 2, 5]
    found = projector_traces(bases, mean.matrix)
    np.testing.assert_allclose(found, np.einsum("hij,ij->h", projectors, expected), atol=1e-12)


def test_float32_bases_lose_nothing_that_matters():
    bases = random_bases([16] * 60, 128, np.random.default_rng(6))
    wide, narrow = mean_projector(bases), mean_projector(torch.from_numpy(bases).float())
    assert narrow.matrix.dtype == torch.float64
    moments = [anisotropic_moments(mean.matrix, mean.matrix) for mean in (wide, narrow)]
    sd = np.sqrt(moments[0].variance)
    assert abs(moments[0].mean - moments[1].mean) < 1e-5 * sd
    assert np.sqrt(moments[1].variance) == pytest.approx(sd, rel=1e-5)


def brute_force_between(p, q, wp, wq, i, j, shrinkage):
    wp, wq = wp.copy(), wq.copy()
    if i >= 0:
        wp[i] = 0
    if j >= 0:
        wq[j] = 0
    sides = [
        shrink_projector(torch.from_numpy(np.einsum("h,hij->ij", w, x) / w.sum()), shrinkage)
        for w, x in ((wp, p), (wq, q))
    ]
    return float((sides[0] * sides[1]).sum())


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_leaving_heads_out_between_roles(shrinkage):
    rng = np.random.default_rng(7)
    a, b = random_bases([3, 2, 4, 3], 10, rng), random_bases([2, 2, 3], 10, rng)
    wa, wb = np.array([1.0, 1, 2, 1]), np.array([2.0, 1, 1])
    means = mean_projector(a, wa), mean_projector(b, wb)
    newcomer = random_bases([4], 10, rng)
    rows, members = np.concatenate([a[[0, 2, 2]], newcomer]), [0, 2, 2, -1]
    found = leave_one_out_means(
        *means,
        kernels(rows, b),
        projector_traces(rows, means[1].matrix),
        projector_traces(b, means[0].matrix),
        members,
        range(3),
        shrinkage,
    )
    expected = [
        [brute_force_between(a @ a.mT, b @ b.mT, wa, wb, i, j, shrinkage) for j in range(3)]
        for i in members
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def brute_force_within(projectors, ranks, weights, i, j, shrinkage):
    weights = weights.copy()
    for k in {i, j} - {-1}:
        weights[k] = 0
    pairs = np.multiply.outer(weights, weights)
    np.fill_diagonal(pairs, 0)
    overlaps = np.einsum("hij,kij->hk", projectors, projectors)
    overlap = (pairs * overlaps).sum() / pairs.sum()
    rank = (weights * ranks).sum() / weights.sum()
    rest = shrinkage * (2 - shrinkage) * rank**2 / projectors.shape[1]
    return (1 - shrinkage) ** 2 * overlap + rest


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_leaving_heads_out_within_a_role(shrinkage):
    rng = np.random.default_rng(8)
    ranks = [3, 2, 4, 3, 2]
    bases, newcomer = random_bases(ranks, 10, rng), random_bases([4], 10, rng)
    weights = np.array([1.0, 1, 2, 1, 1])
    mean = mean_projector(bases, weights)
    rows = np.concatenate([bases[[0, 2, 4]], newcomer])
    row_members, column_members = [0, 2, 4, -1], [0, 1, 2, 2]
    columns = bases[column_members]
    values = kernels(rows, columns)
    found = leave_one_out_means(
        mean,
        mean,
        values,
        projector_traces(rows, mean.matrix),
        projector_traces(columns, mean.matrix),
        row_members,
        column_members,
        shrinkage,
    )
    expected = [
        [
            brute_force_within(bases @ bases.mT, ranks, weights, i, j, shrinkage)
            for j in column_members
        ]
        for i in row_members
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_leaving_heads_out_removes_the_bias_of_small_groups():
    d, r, n, runs = 32, 4, 6, 200
    rng = np.random.default_rng(9)
    plain, corrected = [], []
    for _ in range(runs):
        bases = sample_macg(np.eye(d), r, n, rng)
        mean = mean_projector(bases)
        values = kernels(bases, bases)
        np.fill_diagonal(values, np.nan)
        traces = projector_traces(bases, mean.matrix)
        found = leave_one_out_means(mean, mean, values, traces, traces, range(n), range(n))
        assert np.isnan(found.diagonal()).all()
        corrected.append(np.nanmean(found))
        plain.append(anisotropic_moments(mean.matrix, mean.matrix).mean)
    error = np.std(corrected) / np.sqrt(runs)
    assert abs(np.mean(corrected) - r * r / d) < 4 * error
    assert np.mean(plain) > 1.5 * r * r / d


@pytest.mark.parametrize("rank", [1, 5, 19])
def test_covariance_and_projector_are_inverse(rank):
    covariance = rotated(power_law(20, 1), np.random.default_rng(10))
    mean = projector_from_covariance(covariance, rank)
    assert np.trace(mean) == pytest.approx(rank)
    np.testing.assert_allclose(projector_from_covariance(7 * covariance, rank), mean, atol=1e-9)
    back = covariance_from_projector(mean)
    np.testing.assert_allclose(back / np.trace(back), covariance / np.trace(covariance), atol=1e-8)


def test_expected_projector_against_draws():
    covariance = power_law(64, 1)
    drawn = sample_macg(covariance, 8, 4000, random_state=11)
    found = mean_projector(drawn).matrix.numpy()
    expected = projector_from_covariance(covariance, 8)
    np.testing.assert_allclose(found.diagonal(), expected.diagonal(), atol=0.02)
    assert np.abs(found - np.diag(found.diagonal())).max() < 0.02


def test_a_covariance_of_just_enough_directions_fixes_the_subspace():
    covariance = np.diag([3.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(projector_from_covariance(covariance, 2), np.diag([1.0, 1, 0, 0]))
    drawn = sample_macg(covariance, 2, 3, random_state=0)
    np.testing.assert_allclose(drawn[:, 2:], 0, atol=1e-12)


def test_isotropic_draws_follow_the_haar_law():
    drawn = [sample_macg(np.eye(24), rank, 300, random_state=rank) for rank in (3, 5)]
    values, exact = kernels(*drawn), haar_moments(3, 5, 24)
    assert values.mean() == pytest.approx(float(exact.mean), rel=0.01)
    assert values.var() == pytest.approx(float(exact.variance), rel=0.03)


def test_draws_repeat_with_their_seed():
    first, second, other = (sample_macg(np.eye(6), 2, 3, random_state=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, other)


def test_shrinking_keeps_the_trace():
    mean = torch.from_numpy(projector_from_covariance(power_law(12, 1), 4))
    assert float(shrink_projector(mean, 0.4).trace()) == pytest.approx(4)
    whole = shrink_projector(mean, 1.0)
    np.testing.assert_allclose(whole, np.eye(12) / 3, atol=1e-12)


@pytest.mark.parametrize(
    "role, mean, sd, dimension",
    [("Q", 6.438, 0.1265, 636.3), ("K", 6.017, 0.1196, 680.8), ("V", 5.468, 0.1106, 749.0)],
)
def test_gpt2(gpt2_subspaces, role, mean, sd, dimension):
    bases = [gpt2_subspaces.role(name).vectors for name in ("O", role)]
    means = [mean_projector(stack) for stack in bases]
    moments = anisotropic_moments(means[0].matrix, means[1].matrix)
    assert moments.mean == pytest.approx(mean, abs=5e-4)
    assert np.sqrt(moments.variance) == pytest.approx(sd, abs=6e-5)
    assert moments.effective_dimension == pytest.approx(dimension, abs=0.05)


def test_gpt2_heads_are_no_draws_of_one_law(gpt2_subspaces):
    stacks = [gpt2_subspaces.role(name).vectors for name in "OQ"]
    means = [mean_projector(stack).matrix for stack in stacks]
    moments = anisotropic_moments(*means)
    rows, columns = projector_traces(stacks[0], means[1]), projector_traces(stacks[1], means[0])
    assert (moments.row_sd, moments.column_sd) == pytest.approx((0.038, 0.027), abs=5e-4)
    assert (rows.std(), columns.std()) == pytest.approx((0.974, 0.688), abs=5e-4)


@pytest.fixture(scope="module")
def gpt2_subspaces(gpt2_path):
    return skhead.SubspaceExtractor(roles="QKVO").fit_transform(skhead.load_heads(gpt2_path))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda b: b[0], HeadShapeError, r"mean_projector: bases must have shape"),
        (
            lambda b: b * [[[1.0]], [[1.0]], [[2.0]]],
            DegenerateHeadError,
            "basis 2 has a vector whose length is neither",
        ),
        (lambda b: b * np.nan, DegenerateHeadError, "length is neither 1 nor 0"),
        (lambda b: b * [[[1.0]], [[0.0]], [[1.0]]], DegenerateHeadError, "basis 1 has rank 0"),
    ],
)
def test_bases_that_are_none(change, error, message):
    bases = random_bases([2, 2, 2], 6, np.random.default_rng(0))
    with pytest.raises(error, match=message):
        mean_projector(change(bases))


@pytest.mark.parametrize("weights", [[1, -1, 1], [0, 0, 0], [1, np.nan, 1], [1, np.inf, 1]])
def test_weights_that_are_none(weights):
    bases = random_bases([2, 2, 2], 6, np.random.default_rng(0))
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        mean_projector(bases, weights)
    with pytest.raises(HeadShapeError, match="3 bases need as many weights"):
        mean_projector(bases, weights[:2])


def test_matrices_that_are_no_mean_projectors():
    with pytest.raises(HeadShapeError, match="is square"):
        anisotropic_moments(np.zeros((2, 3)), np.eye(3))
    with pytest.raises(HeadShapeError, match=r"widths differ: \(2, 2\) and \(3, 3\)"):
        anisotropic_moments(np.eye(2), np.eye(3))
    for matrix in (3 * np.eye(2), -np.eye(2), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match=r"lies in \[0, 1\].*not a covariance"):
            anisotropic_moments(matrix, np.eye(2))
    with pytest.raises(HeadShapeError, match="projector_traces: bases of width 6"):
        projector_traces(random_bases([2], 6, np.random.default_rng(0)), torch.eye(5))
    with pytest.raises(ValueError, match="amount must lie in"):
        shrink_projector(torch.eye(2), 1.5)


def leave_out(bases, values=None, shrinkage=0.0, other=None, mean=None):
    mean = mean_projector(bases) if mean is None else mean
    other = mean if other is None else other
    traces = projector_traces(bases, mean.matrix)
    values = kernels(bases, bases) if values is None else values
    heads = range(len(bases))
    return leave_one_out_means(mean, other, values, traces, traces, heads, heads, shrinkage)


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_leaving_heads_out_does_not_depend_on_the_unit_of_weights(unit):
    rng = np.random.default_rng(3)
    bases, weights = random_bases([2, 3, 1, 2, 2], 8, rng), np.array([1.0, 2, 1, 3, 1])
    once, found = (
        leave_out(bases, mean=mean_projector(bases, weights * scale)) for scale in (1.0, unit)
    )
    np.testing.assert_allclose(found, once, rtol=1e-9)
    with pytest.raises(ValueError, match="pool at least four heads"):
        leave_out(bases[:3], mean=mean_projector(bases[:3], weights[:3] * unit))


def test_groups_too_small_to_leave_heads_out():
    rng = np.random.default_rng(0)
    three, one = random_bases([2] * 3, 6, rng), random_bases([2], 6, rng)
    with pytest.raises(ValueError, match="pool at least four heads"):
        leave_out(three)
    with pytest.raises(ValueError, match="a group of one head"):
        leave_out(one, other=mean_projector(one))
    with pytest.raises(HeadShapeError, match=r"values of shape \(2, 3\).*on axis 0"):
        leave_out(three, values=np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"shrinkage must lie in \[0, 1\], got -0.1"):
        leave_out(three, shrinkage=-0.1)


def test_covariances_that_are_none():
    with pytest.raises(HeadShapeError, match="sample_macg: needs a square matrix"):
        sample_macg(np.ones((2, 3)), 1, 1)
    with pytest.raises(ValueError, match="must be symmetric and finite"):
        projector_from_covariance(np.array([[1.0, 1.0], [0.0, 1.0]]), 1)
    with pytest.raises(ValueError, match="must be symmetric and finite"):
        projector_from_covariance(np.diag([1.0, np.nan]), 1)
    with pytest.raises(ValueError, match="negative eigenvalue -1"):
        projector_from_covariance(np.diag([1.0, -1.0]), 1)
    with pytest.raises(ValueError, match="between 1 and the 2 directions .* got 3"):
        projector_from_covariance(np.diag([1.0, 1.0, 0.0]), 3)
    with pytest.raises(ValueError, match="eigenvalue 1,.*shrink_projector"):
        covariance_from_projector(np.diag([1.0, 0.5]))
