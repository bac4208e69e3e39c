"""Orthonormal bases against a float64 singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation import emulated

from skhead.linalg.bases import orthonormal_bases, rank_tolerance


def with_spectrum(sigma, d_model, seed=0, dtype=torch.float32):
    """One matrix (1, d_model, len(sigma)) of the given singular values in random directions."""
    generator = torch.Generator().manual_seed(seed)
    k = len(sigma)
    left = torch.linalg.qr(torch.randn(d_model, k, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0]
    values = torch.as_tensor(np.asarray(sigma), dtype=torch.float64)
    return ((left * values) @ right.T).to(dtype)[None]


def projector(vectors):
    return vectors.double() @ vectors.double().mT


def reference_projector(stack, rank):
    left = torch.linalg.svd(stack.double(), full_matrices=False)[0][..., :rank]
    return left @ left.mT


@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("shape", [(768, 64), (96, 16)])
def test_projector_equals_float64_svd(condition, shape):
    d_model, d_head = shape
    stack = with_spectrum(np.geomspace(1, 1 / condition, d_head), d_model)
    bases = orthonormal_bases(stack)
    assert int(bases.ranks[0]) == d_head
    error = projector(bases.vectors[0]) - reference_projector(stack[0], d_head)
    assert float(error.norm()) < 1e-5


def test_flat_spectrum_with_one_direction_at_one_millionth_is_kept():
    sigma = np.ones(64)
    sigma[-1] = 1e-6
    stack = with_spectrum(sigma, 768)
    bases = orthonormal_bases(stack)
    assert int(bases.ranks[0]) == 64
    assert float((projector(bases.vectors[0]) - reference_projector(stack[0], 64)).norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("true_rank", [1, 5, 15])
def test_rank_deficiency_is_measured_in_the_stored_format(dtype, true_rank):
    generator = torch.Generator().manual_seed(true_rank)
    factors = torch.randn(20, 96, true_rank, generator=generator) @ torch.randn(
        20, true_rank, 16, generator=generator
    )
    stored = factors.to(dtype)
    bases = orthonormal_bases(stored.float(), eps=torch.finfo(dtype).eps)
    assert bases.numerical_ranks.tolist() == [true_rank] * 20
    assert bases.vectors.shape == (20, 96, true_rank)


def test_heads_of_unequal_rank_share_a_stack():
    full = with_spectrum(np.ones(8), 40)
    deficient = full.clone()
    deficient[:, :, 3:] = 0
    bases = orthonormal_bases(torch.cat([full, deficient]))
    assert bases.ranks.tolist() == [8, 3]
    assert bool((bases.vectors[1, :, 3:] == 0).all())
    gram = bases.vectors[1].T @ bases.vectors[1]
    assert torch.allclose(gram, torch.diag(torch.tensor([1.0] * 3 + [0.0] * 5)), atol=1e-6)


def test_zero_head_has_rank_zero():
    stack = torch.cat([with_spectrum(np.ones(4), 12), torch.zeros(1, 12, 4)])
    assert orthonormal_bases(stack).ranks.tolist() == [4, 0]


def test_integer_rank_truncates_to_leading_directions():
    stack = with_spectrum(np.geomspace(1, 0.1, 8), 40)
    bases = orthonormal_bases(stack, rank=3)
    assert bases.ranks.tolist() == [3]
    assert bases.numerical_ranks.tolist() == [8]
    assert float((projector(bases.vectors[0]) - reference_projector(stack[0], 3)).norm()) < 1e-5


@pytest.mark.parametrize("share, expected", [(0.5, 2), (0.9, 4), (0.51, 3), (0.999, 4)])
def test_energy_rank_is_the_fewest_directions_with_the_share(share, expected):
    stack = with_spectrum(np.ones(4), 20, dtype=torch.float64)
    assert orthonormal_bases(stack, rank=share).ranks.tolist() == [expected]


def test_rotation_of_head_space_changes_nothing():
    generator = torch.Generator().manual_seed(3)
    stack = torch.randn(5, 48, 8, generator=generator)
    mix = torch.randn(5, 8, 8, generator=generator)
    before, after = (projector(orthonormal_bases(x).vectors) for x in (stack, stack @ mix))
    assert float((before - after).norm()) < 1e-4


def test_more_columns_than_dimensions():
    stack = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    bases = orthonormal_bases(stack)
    assert bases.ranks.tolist() == [4, 4, 4]
    whole = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    assert torch.allclose(projector(bases.vectors), whole, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dtype_is_kept(dtype):
    assert orthonormal_bases(torch.eye(6, 2, dtype=dtype)[None]).vectors.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_input_is_promoted(dtype):
    bases = orthonormal_bases(torch.eye(6, 2, dtype=dtype)[None])
    assert bases.vectors.dtype == torch.float32


def test_result_does_not_depend_on_neighbours_or_order():
    stack = torch.randn(21, 32, 4, generator=torch.Generator().manual_seed(1))
    whole = orthonormal_bases(stack).vectors
    assert torch.equal(whole[::2], orthonormal_bases(stack[::2]).vectors)


def gram_error(vectors):
    gram = vectors.double().mT @ vectors.double()
    return float((gram - torch.eye(vectors.shape[-1], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("condition", [1, 10, 30, 60, 85, 125, 1000])
@pytest.mark.parametrize("shape", [(768, 64), (1024, 128), (768, 256)])
def test_bases_are_orthonormal_to_float32_rounding(condition, shape):
    """Also where one direction is weak, for which a float32 product is at its worst."""
    d_model, d_head = shape
    flat = np.ones(d_head)
    flat[-1] = 1 / condition
    for sigma in (flat, np.geomspace(1, 1 / condition, d_head)):
        stack = torch.cat([with_spectrum(sigma, d_model, seed) for seed in range(3)])
        vectors = orthonormal_bases(stack).vectors
        assert gram_error(vectors) < 4e-6
        for matrix, found in zip(stack, vectors, strict=True):
            error = projector(found) - reference_projector(matrix, d_head)
            assert float(error.norm()) < 1.5e-5


def test_well_conditioned_heads_are_multiplied_in_float32(monkeypatch):
    """Whatever heads are beside them, and only they."""
    stack = torch.cat(
        [with_spectrum(np.geomspace(1, 1 / c, 16), 96, c) for c in (2, 5, 900, 30, 7)]
    )
    alone = torch.cat([orthonormal_bases(head[None]).vectors for head in stack])
    for overwrite in (False, True):
        found = orthonormal_bases(stack.clone(), overwrite=overwrite).vectors
        torch.testing.assert_close(found, alone, rtol=0, atol=2e-6)
    real, products = torch.bmm, []

    def bmm(a, b, **options):
        products.append(a.dtype)
        return real(a, b, **options)

    monkeypatch.setattr(torch, "bmm", bmm)
    for given in (stack[:2], stack[2:3], stack, stack.double(), torch.randn(3, 20, 4)):
        orthonormal_bases(given)
    double, single = torch.float64, torch.float32
    assert products == [single, double, single, double, double]


def test_tolerance_scales_with_the_matrix():
    small, large = (float(rank_tolerance(torch.tensor(n), 100, 4, 1e-7)) for n in (5.0, 50.0))
    assert small == pytest.approx(2e-7 * 5 * (0.1 + 0.5))
    assert large == pytest.approx(10 * small)


def test_overwriting_saves_the_memory_and_changes_no_number():
    stack = torch.randn(11, 32, 4, generator=torch.Generator().manual_seed(1))
    expected = orthonormal_bases(stack).vectors
    found = orthonormal_bases(stack, overwrite=True).vectors
    assert torch.equal(found, expected)
    assert found.data_ptr() == stack.data_ptr()


@pytest.mark.parametrize("condition", [3e4, 1e5, 4e5])
def test_a_head_of_full_rank_is_not_decomposed_where_two_rounds_do(condition, monkeypatch):
    """Orthonormal twice over, from Cholesky factors, which GPUs do in large batches."""
    stacks = [with_spectrum(np.geomspace(1, 1 / condition, 24), 200, seed) for seed in range(5)]
    stack = torch.cat([*stacks, torch.randn(3, 200, 24, generator=torch.Generator())]).double()
    expected = [reference_projector(matrix, 24) for matrix in stack]

    def decompose(*_arguments, **_options):
        raise AssertionError("a head was decomposed")

    monkeypatch.setattr(torch.linalg, "eigh", decompose)
    monkeypatch.setattr(torch.linalg, "svd", decompose)
    found = orthonormal_bases(stack).vectors
    identity = torch.eye(24, dtype=torch.float64).expand(8, 24, 24)
    torch.testing.assert_close(found.mT @ found, identity, rtol=0, atol=1e-9)
    for vectors, projection in zip(found, expected, strict=True):
        assert float((vectors @ vectors.T - projection).norm()) < 1e-9


@pytest.mark.parametrize("n_heads", [1, 40])
def test_a_gpu_is_waited_for_once_for_all_heads(n_heads):
    stack = torch.randn(n_heads, 60, 8, generator=torch.Generator().manual_seed(0))
    with emulated("cuda") as gpu:
        there = stack.to("cuda")
        found = orthonormal_bases(there)
        assert gpu.syncs == ["to the host", "aten._local_scalar_dense.default"]
        vectors = found.vectors.cpu()
    torch.testing.assert_close(vectors, orthonormal_bases(stack).vectors)


def test_only_the_heads_that_need_it_are_decomposed_on_a_gpu(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(30, 60, 8, generator=generator)
    stack[7, :, 0] = stack[7, :, 1]
    stack[9] = 0.0
    stack[20:21] = with_spectrum(np.geomspace(1, 1e-5, 8), 60)
    expected = orthonormal_bases(stack)
    real, decomposed = torch.linalg.eigh, []

    def eigh(gram):
        decomposed.append(len(gram))
        return real(gram)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with emulated("cuda") as gpu:
        found = orthonormal_bases(stack.to("cuda"))
        vectors, ranks = found.vectors.cpu(), found.ranks.cpu()
    assert decomposed == [2]
    assert len(gpu.syncs) < 12
    assert torch.equal(ranks, expected.ranks)
    torch.testing.assert_close(projector(vectors), projector(expected.vectors), atol=1e-6, rtol=0)
