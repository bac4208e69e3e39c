"""Second moments of pairs, their contrast, and how scores are split along it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skhead.linalg.contrast import (
    ContrastMoments,
    PermutedMoments,
    contrast_spectrum,
    energy_rank,
    inverse_root,
    oblique_logits,
    sequential_logits,
    union_basis,
)

CPU = torch.device("cpu")
D = 6


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def summed(queries, keys, kinds, weights=None, parts=1, whiten=True, center=True):
    moments = ContrastMoments(queries.shape[1], center, whiten, CPU)
    for rows in torch.arange(len(queries)).chunk(parts):
        kind = torch.full_like(kinds, -1)
        kind[rows] = kinds[rows]
        moments.add(queries, keys, torch.arange(len(queries)), kind, weights)
    return moments


def test_moments_are_weighted_means_of_outer_products():
    queries, keys = draw(50, D), draw(50, D, seed=1)
    kinds, weights = (draw(50, seed=2) > 0).long(), draw(50, seed=3).abs()
    for center in (False, True):
        found = summed(queries, keys, kinds, weights, center=center).means()
        for place, kind in enumerate((1, 0)):
            own = kinds == kind
            w = weights[own] / weights[own].sum()
            expected = torch.einsum("n,nd,ne->de", w, queries[own], keys[own])
            if center:
                expected -= torch.outer(w @ queries[own], w @ keys[own])
            torch.testing.assert_close(found[place], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_do_not_depend_on_how_pairs_arrive(dtype):
    queries, keys = draw(9000, D, dtype=dtype), draw(9000, D, seed=1, dtype=dtype)
    kinds = (draw(9000, seed=2) > 0).long()
    whole, parts = (summed(queries, keys, kinds, parts=n) for n in (1, 7))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for found, expected in ((parts.means(), whole.means()), *zip(
        parts.squares(), whole.squares(), strict=True
    )):  # fmt: skip
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_squares_do_not_depend_on_kinds():
    queries, keys = draw(40, D), draw(40, D, seed=1)
    kinds = torch.arange(40) % 4 // 3
    found, other = summed(queries, keys, kinds, center=False).squares()
    torch.testing.assert_close(found, queries.T @ queries / 40)
    torch.testing.assert_close(other, keys.T @ keys / 40)
    centred, _ = summed(queries, keys, kinds).squares()
    torch.testing.assert_close(centred, torch.cov(queries.T, correction=0))
    with pytest.raises(ValueError, match="squares were not summed"):
        summed(queries, keys, kinds, whiten=False).squares()


def test_moments_that_whiten_are_summed_in_float64():
    queries, keys = draw(400, D, dtype=torch.float32), draw(400, D, seed=1, dtype=torch.float32)
    kinds = torch.arange(400) % 2
    found = summed(100 + queries, 100 + keys, kinds)
    exact = summed((100 + queries).double(), (100 + keys).double(), kinds)
    pairs = zip((*found.squares(), found.means()), (*exact.squares(), exact.means()), strict=True)
    for values, expected in pairs:
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)


def test_sums_over_parts_merge():
    queries, keys = draw(60, D), draw(60, D, seed=1)
    kinds = (draw(60, seed=2) > 0).long()
    whole, first = summed(queries, keys, kinds), summed(queries[:20], keys[:20], kinds[:20])
    first.merge(summed(queries[20:], keys[20:], kinds[20:]))
    for name in ("cross", "queries", "keys", "weights", "query_squares", "key_squares"):
        torch.testing.assert_close(getattr(first, name), getattr(whole, name))


def test_permuted_moments_are_moments_of_permuted_kinds():
    queries, keys = draw(30, D), draw(30, D, seed=1)
    weights = torch.zeros(3, 2, 30, dtype=torch.float64)
    kinds = [(draw(30, seed=5 + i) > 0).long() for i in range(3)]
    for i, kind in enumerate(kinds):
        weights[i, 0], weights[i, 1] = kind, 1 - kind
    permuted, part = PermutedMoments(5, D, CPU), PermutedMoments(5, D, CPU)
    permuted.add(slice(2, 5), queries[:10], keys[:10], weights[..., :10])
    part.add(slice(2, 5), queries[10:], keys[10:], weights[..., 10:])
    permuted.merge(part)
    for i, kind in enumerate(kinds):
        single = summed(queries, keys, kind)
        expected = single.means()[0] - single.means()[1]
        found = permuted.contrasts(True)[2 + i]
        torch.testing.assert_close(found, expected)


def test_spectrum_rebuilds_the_contrast_with_fixed_signs():
    contrast = draw(D, D)
    found = contrast_spectrum(contrast)
    rebuilt = found.query_vectors * found.singular_values @ found.key_vectors.mT
    torch.testing.assert_close(rebuilt, contrast)
    largest = found.query_vectors.gather(0, found.query_vectors.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_whitened_spectrum_is_the_same_in_every_basis():
    queries, keys = draw(500, D), draw(500, D, seed=1)
    keys[:250] += queries[:250]
    kinds = (torch.arange(500) < 250).long()
    matrix = draw(D, D, seed=4) * torch.logspace(0, 2, D, dtype=torch.float64)
    inverse = torch.linalg.inv(matrix)
    plain, other = (
        summed(q, k, kinds, center=False)
        for q, k in ((queries, keys), (queries @ matrix, keys @ inverse.T))
    )
    spectra = []
    for moments in (plain, other):
        means = moments.means()
        spectra.append(contrast_spectrum(means[0] - means[1], *moments.squares()))
    torch.testing.assert_close(spectra[1].singular_values, spectra[0].singular_values)
    for rank in (1, 3):
        bases = [spectrum.bases(rank) for spectrum in spectra]
        moved = torch.linalg.qr(matrix.T @ bases[0][0])[0]
        torch.testing.assert_close(moved @ moved.T, bases[1][0] @ bases[1][0].T)
        moved = torch.linalg.qr(inverse @ bases[0][1])[0]
        torch.testing.assert_close(moved @ moved.T, bases[1][1] @ bases[1][1].T)


def test_inverse_root_leaves_directions_without_variance_out():
    factor = draw(D, 2)
    root, inverse = inverse_root(factor @ factor.T)
    projector = factor @ torch.linalg.pinv(factor)
    torch.testing.assert_close(root @ root, factor @ factor.T)
    torch.testing.assert_close(root @ inverse, projector, rtol=1e-6, atol=1e-6)


def test_energy_rank_is_the_least_that_reaches_the_share():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    shares = values.square().cumsum(0) / values.square().sum()
    assert [energy_rank(values, float(share)) for share in shares[:3]] == [1, 2, 3]
    assert energy_rank(values, 0.01) == 1
    assert energy_rank(values, 1.0) == 3


def test_oblique_parts_are_exact_for_cross_orthogonal_features():
    """Two features whose query subspaces are not orthogonal, but see only their own keys."""
    basis = draw(D, D)
    dual = torch.linalg.inv(basis).T
    queries, keys = draw(20, D, seed=2) @ basis.T, draw(20, D, seed=3) @ dual.T
    total = torch.zeros(20, dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 6)):
        found = oblique_logits(queries, keys, basis[:, part], dual[:, part])
        own = ((queries @ dual[:, part]) * (keys @ basis[:, part])).sum(1)
        torch.testing.assert_close(found, own)
        total += found
    torch.testing.assert_close(total, (queries * keys).sum(1))


def test_oblique_parts_depend_on_subspaces_alone_and_on_no_basis():
    queries, keys, u, v = draw(20, D), draw(20, D, seed=1), draw(D, 2, seed=2), draw(D, 2, seed=3)
    found = oblique_logits(queries, keys, u, v)
    torch.testing.assert_close(oblique_logits(queries, keys, u @ draw(2, 2), v), found)
    matrix = draw(D, D, seed=9)
    inverse = torch.linalg.inv(matrix)
    moved = oblique_logits(queries @ matrix, keys @ inverse.T, matrix.T @ u, inverse @ v)
    torch.testing.assert_close(moved, found)


def test_sequential_parts_depend_on_the_order():
    queries, keys = draw(20, D), draw(20, D, seed=1)
    bases = [torch.linalg.qr(draw(D, 2, seed=seed))[0] for seed in (2, 3)]
    found = sequential_logits(queries, keys, bases)
    first = queries @ bases[0] @ bases[0].T
    torch.testing.assert_close(found[:, 0], (first * keys).sum(1))
    other = sequential_logits(queries, keys, bases[::-1])[:, [1, 0]]
    assert not torch.allclose(found, other)


def test_union_of_bases_drops_what_is_there_already():
    bases = [torch.linalg.qr(draw(D, 2, seed=seed))[0] for seed in (0, 1)]
    mixed = torch.linalg.qr(bases[0][:, :1] + bases[1][:, :1])[0]
    found = union_basis([*bases, mixed], 1e-8)
    assert found.shape == (D, 4)
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-12)
    for basis in (*bases, mixed):
        torch.testing.assert_close(found @ found.T @ basis, basis)
    assert union_basis([bases[0][:, :0]], 0.1).shape == (D, 0)
