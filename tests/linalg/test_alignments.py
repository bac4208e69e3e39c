"""Nuclear norms, spectra and principal angles against float64 references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skhead.linalg.alignments import (
    cross_measures,
    gram_sizes,
    map_singular_values,
    nuclear_norms,
    singular_values,
    unit_stack,
)
from skhead.linalg.angles import (
    GRASSMANN_METRICS,
    AngleDistance,
    grassmann_distance,
    largest_distance,
)
from skhead.linalg.bases import orthonormal_bases


def random_stack(n_heads, d_model, rank, seed, dtype=torch.float32):
    return torch.randn(
        n_heads, d_model, rank, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def every_pair(rows, columns):
    return torch.ones(len(rows), len(columns), dtype=torch.bool)


def reference_distance(u, v, metric):
    """From SciPy's angles, by the definitions."""
    angles = np.sort(scipy.linalg.subspace_angles(u, v))
    cosines = np.cos(angles)
    return {
        "chordal": np.sqrt(np.square(np.sin(angles)).sum()),
        "geodesic": np.linalg.norm(angles),
        "procrustes": np.sqrt(np.square(2 * np.sin(angles / 2)).sum()),
        "binet-cauchy": np.sqrt(1 - np.prod(np.square(cosines))),
        "martin": np.sqrt(-np.log(np.square(cosines)).sum()),
        "max-angle": angles[-1],
    }[metric]


def distances(rows, columns, metric, **options):
    """Distances of all pairs of stacks of full or deficient rank."""
    bases = [orthonormal_bases(stack) for stack in (rows, columns)]
    stacks = [found.vectors for found in bases]
    measure = AngleDistance(metric, *stacks, *(found.ranks for found in bases))
    reserved = measure.scratch_bytes
    return cross_measures(*stacks, every_pair(*stacks), measure, reserved=reserved, **options)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_nuclear_norms_of_unequal_widths(dtype, error):
    rows, columns = random_stack(5, 40, 7, 0, dtype), random_stack(70, 40, 4, 1, dtype)
    found = cross_measures(rows, columns, every_pair(rows, columns), nuclear_norms)
    a, b = (stack.numpy().astype(np.float64) for stack in (rows, columns))
    expected = [[np.linalg.norm(x.T @ z, "nuc") for z in b] for x in a]
    np.testing.assert_allclose(found.numpy(), expected, rtol=error)


@pytest.mark.parametrize("budget", [6_000, 40_000, 2**30])
def test_tile_size_does_not_change_the_result(budget):
    rows, columns = random_stack(40, 24, 5, 0), random_stack(37, 24, 5, 1)
    wanted = torch.rand(40, 37, generator=torch.Generator().manual_seed(2)) < 0.3
    found = cross_measures(rows, columns, wanted, nuclear_norms, max_memory=budget)
    whole = cross_measures(rows, columns, every_pair(rows, columns), nuclear_norms)
    assert torch.equal(~torch.isnan(found), wanted)
    assert torch.allclose(found[wanted], whole[wanted], rtol=2e-6)


def test_only_wanted_pairs_are_measured():
    rows = random_stack(80, 12, 3, 0)
    wanted = torch.zeros(80, 80, dtype=torch.bool)
    wanted[70, 2] = wanted[3, 41] = True
    seen = []

    def measure(cross, i, j):
        seen.extend(zip(i.tolist(), j.tolist(), strict=True))
        return nuclear_norms(cross)

    cross_measures(rows, rows, wanted, measure)
    assert sorted(seen) == [(3, 41), (70, 2)]
    assert torch.isnan(cross_measures(rows, rows, wanted & False, measure)).all()


def test_too_small_a_budget_is_refused_with_the_need():
    rows = random_stack(3, 64, 8, 0)
    wanted = every_pair(rows, rows)
    with pytest.raises(MemoryError, match=r"max_memory is 100 bytes, but the smallest .* 4864;"):
        cross_measures(rows, rows, wanted, nuclear_norms, max_memory=100)
    with pytest.raises(MemoryError, match="max_memory is 5000 bytes"):
        cross_measures(rows, rows, wanted, nuclear_norms, max_memory=5000, reserved=200)


def test_progress_ends_at_one():
    rows = random_stack(70, 8, 2, 0)
    seen = []
    cross_measures(rows, rows, every_pair(rows, rows), nuclear_norms, progress=seen.append)
    assert seen[-1] == 1.0 and seen == sorted(seen) and len(seen) == 9


def test_spectra_of_matrices_and_maps():
    left, right = random_stack(40, 30, 6, 0), random_stack(40, 30, 6, 1)
    left[3, :, 2:] = 0
    for i, (found, matrix) in enumerate(zip(singular_values(left), left.double(), strict=True)):
        expected = torch.linalg.svdvals(matrix)
        assert torch.allclose(found, expected, atol=1e-7 * float(expected[0])), i
    pairs = zip(left.double(), right.double(), strict=True)
    for found, (a, b) in zip(map_singular_values(left, right), pairs, strict=True):
        assert torch.allclose(found, torch.linalg.svdvals(a @ b.T)[:6], atol=1e-13 * 40)


def test_spectra_of_heads_wider_than_the_model():
    stack = random_stack(3, 4, 9, 0, torch.float64)
    assert singular_values(stack).shape == map_singular_values(stack, stack).shape == (3, 4)
    squared = torch.linalg.svdvals(stack).square()
    assert torch.allclose(map_singular_values(stack, stack), squared)


def test_map_of_cancelling_sides_is_zero():
    """The two sides use orthogonal directions of a rotated head space."""
    rotation = torch.linalg.qr(random_stack(1, 6, 6, 0, torch.float64)[0])[0]
    left, right = random_stack(2, 20, 6, 1, torch.float64).unbind(0)
    left, right = (left[:, :3] @ rotation[:3])[None], (right[:, 3:] @ rotation[3:])[None]
    assert float(map_singular_values(left, right).max()) < 1e-13


def test_gram_sizes():
    stack = random_stack(20, 30, 6, 0)
    expected = [np.linalg.norm(x.numpy().astype(float).T @ x.numpy().astype(float)) for x in stack]
    np.testing.assert_allclose(gram_sizes(stack).numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e18, 1e37])
def test_unit_stack_at_any_scale(scale):
    stack = random_stack(3, 20, 4, 0) / 8 * torch.tensor(scale, dtype=torch.float32)
    stack[1] = 0
    before = stack.clone()
    unit, zero = unit_stack(stack)
    assert zero.tolist() == [False, True, False]
    norms = torch.linalg.matrix_norm(unit.double())
    assert torch.allclose(norms, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), atol=1e-6)
    assert torch.equal(stack, before)


@pytest.mark.parametrize("metric", GRASSMANN_METRICS)
def test_distances_of_unequal_ranks(metric):
    rows, columns = random_stack(4, 20, 5, 0), random_stack(6, 20, 3, 1)
    rows[2, :, 2:] = 0
    columns[5, :, 1:] = 0
    found = distances(rows, columns, metric)
    ranks = [5, 5, 2, 5], [3, 3, 3, 3, 3, 1]
    for i, x in enumerate(rows.double()):
        for j, z in enumerate(columns.double()):
            expected = reference_distance(x[:, : ranks[0][i]], z[:, : ranks[1][j]], metric)
            assert float(found[i, j]) == pytest.approx(expected, abs=2e-6), (i, j)


@pytest.mark.parametrize("metric", GRASSMANN_METRICS)
@pytest.mark.parametrize("tilt", [0.0, 1e-6, 1e-4, 0.02, 0.3])
def test_small_angles_keep_their_digits(metric, tilt):
    """Cosines in float32 cannot tell angles below 3e-4 from each other."""
    frame = torch.linalg.qr(random_stack(1, 40, 8, 0, torch.float64)[0])[0]
    angles = torch.tensor([0.0, tilt, 2 * tilt, 0.5], dtype=torch.float64)
    turned = frame[:, :4] * angles.cos() + frame[:, 4:] * angles.sin()
    for last in (4, 3):
        exact = grassmann_distance(angles[None, :last], torch.tensor([last]), metric)
        mixed = turned[:, :last] @ random_stack(1, last, last, 1, torch.float64)[0]
        found = distances(frame[None, :, :last].float(), mixed[None].float(), metric)
        assert float(found) == pytest.approx(float(exact), abs=2e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_small_angles_of_deficient_ranks(side):
    """Columns past a rank are zero and make no angle."""
    frame = torch.linalg.qr(random_stack(1, 30, 6, 0, torch.float64)[0])[0].float()
    tilt = torch.tensor([0.001, 0.002, 0.01])
    turned = frame[:, :3] * tilt.cos() + frame[:, 3:] * tilt.sin()
    padding = torch.zeros(30, 2)
    stacks = [torch.cat([frame[:, :3], padding], 1), torch.cat([turned, padding], 1)]
    ranks = [torch.tensor([3]), torch.tensor([3])]
    if side:
        stacks[0] = torch.cat([frame[:, :3], random_stack(1, 30, 2, 1)[0]], 1)
        stacks[0], ranks[0] = torch.linalg.qr(stacks[0])[0], torch.tensor([5])
        expected = reference_distance(stacks[0].double(), turned.double(), "geodesic")
    else:
        expected = float(tilt.norm())
    for order in (1, -1):
        rows, columns = (stack[None] for stack in stacks[::order])
        measure = AngleDistance("geodesic", rows, columns, *ranks[::order])
        found = cross_measures(rows, columns, every_pair(rows, columns), measure)
        assert float(found) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("metric", GRASSMANN_METRICS)
def test_contained_subspaces_are_at_distance_zero(metric):
    larger = random_stack(3, 30, 9, 0)
    smaller = larger[:, :, :4] @ random_stack(1, 4, 4, 1)[0]
    found = distances(larger, smaller, metric)
    assert float(found.diagonal().max()) < 3e-6
    assert torch.allclose(distances(smaller, larger, metric), found.T, atol=1e-6)
    assert float(found[0, 1]) > 0.5


@pytest.mark.parametrize("metric", GRASSMANN_METRICS)
def test_orthogonal_subspaces_are_farthest(metric):
    angles = torch.full((1, 5), math.pi / 2, dtype=torch.float64)
    found = grassmann_distance(angles, torch.tensor([3]), metric)
    most = largest_distance(torch.tensor([3]), metric)
    if metric == "martin":
        assert float(found) > 10 and math.isinf(float(most))
    else:
        assert float(found) == pytest.approx(float(most))


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric must be one of chordal, .*; got 'cosine'"):
        grassmann_distance(torch.zeros(1, 2), torch.tensor([2]), "cosine")


@settings(max_examples=25, deadline=None)
@given(
    d_model=st.integers(2, 20), rank=st.integers(1, 6), n_heads=st.integers(1, 5),
    seed=st.integers(0, 999), metric=st.sampled_from(["chordal", "geodesic", "procrustes"]),
)  # fmt: skip
def test_distances_are_a_metric_that_rotations_keep(d_model, rank, n_heads, seed, metric):
    rank = min(rank, d_model)
    stack = random_stack(n_heads, d_model, rank, seed, torch.float64)
    rotation = torch.linalg.qr(random_stack(1, d_model, d_model, seed + 1, torch.float64)[0])[0]
    mix = random_stack(n_heads, rank, rank, seed + 2, torch.float64)
    plain = distances(stack, stack, metric)
    assert torch.allclose(plain, distances(rotation @ stack, rotation @ stack, metric), atol=1e-6)
    assert torch.allclose(plain, distances(stack, stack @ mix, metric), atol=1e-5)
    assert torch.allclose(plain, plain.T, atol=1e-6)
    assert float(plain.diagonal().max()) < 1e-6
    detour = (plain[:, :, None] + plain[None]).amin(1)
    assert bool((plain <= detour + 1e-6).all())
