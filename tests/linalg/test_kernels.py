"""The all-pairs overlap against a float64 double loop, at any tile size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skhead.linalg.bases import orthonormal_bases
from skhead.linalg.factored import (
    facing_factors,
    gram_roots,
    map_factors,
    product_norms,
    signed_identity,
)
from skhead.linalg.kernels import overlap_blocks, plan_overlaps
from skhead.linalg.precision import fast_float32_matmul
from skhead.stats.haar import haar_moments


def random_stack(n_heads, d_model, rank, seed, dtype=torch.float32):
    return torch.randn(
        n_heads, d_model, rank, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def reference(a, b):
    a, b = a.double(), b.double()
    return torch.stack([torch.stack([(x.T @ z).square().sum() for z in b]) for x in a])


def assert_close(found, expected, relative=2e-6):
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < relative


@pytest.mark.parametrize("method", ["packed", "direct", "auto"])
@pytest.mark.parametrize("d_model", [64, 97, 300])
def test_two_sides_of_unequal_rank(method, d_model):
    rows = [random_stack(5, d_model, 7, 0), random_stack(3, d_model, 4, 1)]
    columns = [random_stack(6, d_model, 9, 2), random_stack(2, d_model, 1, 3)]
    blocks = [(1, 0), (0, 1), (0, 0)]
    found = overlap_blocks(rows, columns, blocks, method=method)
    assert list(found) == blocks
    for i, j in blocks:
        assert_close(found[i, j], reference(rows[i], columns[j]))


@pytest.mark.parametrize("method", ["packed", "direct"])
def test_comparison_with_itself_fills_mirrored_blocks(method):
    stacks = [random_stack(n, 60, r, n) for n, r in ((4, 8), (3, 5), (6, 2))]
    blocks = [(2, 0), (1, 1), (0, 2), (1, 2), (0, 0)]
    found = overlap_blocks(stacks, None, blocks, method=method)
    for i, j in blocks:
        assert_close(found[i, j], reference(stacks[i], stacks[j]))
    for i in (0, 1):
        torch.testing.assert_close(found[i, i], found[i, i].T, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["packed", "direct"])
@pytest.mark.parametrize("n_heads", [5, 24, 50, 97])
def test_a_role_against_itself_is_symmetric_to_the_last_digit(method, n_heads):
    stack = random_stack(n_heads, 60, 8, 0)
    found = overlap_blocks([stack], None, [(0, 0)], method=method)[0, 0]
    assert torch.equal(found, found.T)
    assert_close(found, reference(stack, stack))


@pytest.mark.parametrize("rank", [1, 33])
@pytest.mark.parametrize("d_model", [2, 7, 30, 129, 2100])
def test_blocks_of_every_width(d_model, rank):
    """Also of odd ones, whose diagonal blocks are not folded, and of those of large models."""
    stacks = [random_stack(3, d_model, rank, seed) for seed in range(2)]
    widths = set()
    for max_memory in (2**14, 2**18, 2**22, 2**30):
        options = {"method": "packed", "max_memory": max_memory}
        widths.add(plan_overlaps(stacks, None, [(0, 0), (0, 1)], **options).width)
        found = overlap_blocks(stacks, None, [(0, 0), (0, 1)], **options)
        for (i, j), values in found.items():
            assert_close(values, reference(stacks[i], stacks[j]))
    assert max(widths) == {2100: 240, 129: 80}.get(d_model, d_model)
    assert len(widths) > (d_model > 100)


def test_heads_on_one_side_only_are_not_compared_with_themselves():
    stacks = [random_stack(20, 300, 16, seed) for seed in range(3)]
    sides = overlap_blocks(stacks[:1], stacks[1:], [(0, 0), (0, 1)], method="packed")
    found = overlap_blocks(stacks, None, [(0, 1), (0, 2)], method="packed")
    for j in range(2):
        assert torch.equal(found[0, j + 1], sides[0, j])


@pytest.mark.parametrize("method", ["packed", "direct"])
@pytest.mark.parametrize("max_memory", [40_000, 200_000, 2**30])
def test_tile_size_does_not_change_the_result(method, max_memory):
    stacks = [random_stack(12, 96, 8, 0), random_stack(9, 96, 8, 1)]
    blocks = [(0, 1), (0, 0)]
    plan = plan_overlaps(stacks, None, blocks, max_memory, method)
    assert plan.scratch_bytes <= max_memory
    found = overlap_blocks(stacks, None, blocks, method=method, max_memory=max_memory)
    whole = overlap_blocks(stacks, None, blocks, method=method)
    for block in blocks:
        assert_close(found[block], whole[block].double(), relative=1e-6)


def test_budget_selects_narrower_panels():
    stacks = [random_stack(40, 512, 64, 0)]
    roomy = plan_overlaps(stacks, None, [(0, 0)], 2**30, "packed")
    tight = plan_overlaps(stacks, None, [(0, 0)], 2**20, "packed")
    assert tight.width < roomy.width
    assert tight.scratch_bytes <= 2**20 < roomy.scratch_bytes


@pytest.mark.parametrize("method", ["packed", "direct"])
def test_float32_error_of_the_kernel(method):
    """Against float64 bases, in units of the spread that random subspaces have."""
    stacks = [orthonormal_bases(random_stack(60, 768, 64, seed)).vectors for seed in range(2)]
    exact = overlap_blocks([s.double() for s in stacks], None, [(0, 1)])[0, 1]
    found = overlap_blocks(stacks, None, [(0, 1)], method=method)[0, 1]
    assert float((found.double() - exact).abs().max()) < 1e-4 * 0.108


def test_sums_are_narrow_only_where_memory_is_short():
    stacks = [random_stack(300, 64, 32, 0)]
    assert plan_overlaps(stacks, None, [(0, 0)], 2**30, "packed").wide_sums
    tight = plan_overlaps(stacks, None, [(0, 0)], 700_000, "packed")
    assert not tight.wide_sums
    narrow = overlap_blocks(stacks, None, [(0, 0)], method="packed", max_memory=700_000)[0, 0]
    assert_close(narrow, reference(stacks[0], stacks[0]))


def test_too_small_a_budget_is_refused_with_the_need():
    stacks = [random_stack(40, 512, 64, 0)]
    with pytest.raises(
        MemoryError, match=r"max_memory is 100 bytes, but the smallest tiles need \d+"
    ):
        overlap_blocks(stacks, None, [(0, 0)], max_memory=100)


def test_cheaper_method_is_chosen():
    full, thin = random_stack(64, 768, 64, 0), random_stack(64, 768, 4, 0)
    assert plan_overlaps([full], None, [(0, 0)], 2**30).method == "packed"
    assert plan_overlaps([thin], None, [(0, 0)], 2**30).method == "direct"


def test_nearly_orthogonal_subspaces_keep_their_digits():
    basis = torch.linalg.qr(random_stack(1, 256, 128, 0, torch.float64)[0])[0]
    a, b = basis[:, :64].float()[None], basis[:, 64:].float()[None]
    for method in ("packed", "direct"):
        found = overlap_blocks([a], [b], [(0, 0)], method=method)[0, 0]
        assert float(found.abs()) < 5e-5


def test_projection_kernel_of_a_basis_with_itself_is_its_rank():
    bases = orthonormal_bases(random_stack(4, 200, 16, 0)).vectors
    for method in ("packed", "direct"):
        found = overlap_blocks([bases], None, [(0, 0)], method=method)[0, 0]
        assert torch.allclose(found.diagonal(), torch.full((4,), 16.0), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    d_model=st.integers(2, 40), rank=st.integers(1, 12), n_heads=st.integers(1, 6),
    seed=st.integers(0, 999), packed=st.booleans(),
)  # fmt: skip
def test_invariances(d_model, rank, n_heads, seed, packed):
    """Symmetric, blind to a joint rotation, and equivariant under a permutation of heads."""
    method = "packed" if packed else "direct"
    stack = random_stack(n_heads, d_model, rank, seed, torch.float64)
    rotation = torch.linalg.qr(random_stack(1, d_model, d_model, seed + 1, torch.float64)[0])[0]
    order = torch.randperm(n_heads, generator=torch.Generator().manual_seed(seed))
    plain = overlap_blocks([stack], None, [(0, 0)], method=method)[0, 0]
    rotated = overlap_blocks([rotation @ stack], None, [(0, 0)], method=method)[0, 0]
    permuted = overlap_blocks([stack[order]], None, [(0, 0)], method=method)[0, 0]
    scale = float(plain.abs().max())
    assert torch.allclose(plain, plain.T, atol=1e-9 * scale)
    assert torch.allclose(plain, rotated, atol=1e-9 * scale)
    assert torch.allclose(plain[order][:, order], permuted, atol=1e-9 * scale)


def asked_pairs(spans, n_columns):
    columns = np.arange(n_columns)
    return torch.from_numpy((spans[:, :1] <= columns) & (columns < spans[:, 1:]))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 130), st.integers(1, 40)),
    method=st.sampled_from(["packed", "direct"]),
    max_memory=st.sampled_from([150_000, 2**30]),
    seed=st.integers(0, 2**31 - 1),
)
def test_spans_are_filled_and_cost_no_more_than_whole_blocks(shape, method, max_memory, seed):
    stacks = [random_stack(n, 40, 3, seed + i) for i, n in enumerate(shape)]
    spans = np.random.default_rng(seed).integers(0, shape[1] + 1, (shape[0], 2))
    options = {"max_memory": max_memory, "method": method}
    found = overlap_blocks(stacks[:1], stacks[1:], [(0, 0)], spans={(0, 0): spans}, **options)[0, 0]
    asked = asked_pairs(spans, shape[1])
    assert found.shape == shape
    assert not found[asked].isnan().any()
    expected = reference(*stacks)
    computed = ~found.isnan()
    if asked.any():
        assert_close(found[computed], expected[computed])
    whole = plan_overlaps(stacks[:1], stacks[1:], [(0, 0)], **options)
    plan = plan_overlaps(stacks[:1], stacks[1:], [(0, 0)], spans={(0, 0): spans}, **options)
    assert plan.flops <= whole.flops


@pytest.mark.parametrize("method", ["packed", "direct"])
@pytest.mark.parametrize("blocks", [[(0, 1), (1, 0)], [(1, 0)], [(0, 0)], [(0, 0), (0, 1), (1, 1)]])
def test_spans_of_heads_compared_with_themselves(method, blocks):
    """Layers of ten heads; each head asks for the layers behind its own."""
    stacks = [random_stack(120, 30, 4, seed) for seed in range(2)]
    layers = np.arange(120) // 10
    spans = np.stack([10 * (layers + 1), np.full(120, 120)], axis=1)
    found = overlap_blocks(stacks, None, blocks, spans=dict.fromkeys(blocks, spans), method=method)
    asked = asked_pairs(spans, 120)
    for i, j in blocks:
        assert_close(found[i, j][asked], reference(stacks[i], stacks[j])[asked])


def test_half_the_work_is_left_out_of_ordered_layers():
    stacks = [random_stack(1536, 8, 8, seed) for seed in range(2)]
    rows = np.arange(1536)
    spans = np.stack([rows + 1, np.full(1536, 1536)], axis=1)
    found = overlap_blocks(stacks, None, [(0, 1)], spans={(0, 1): spans})[0, 1]
    # Bands of 48 columns but the first, with three numbers of rows taken as the largest of them.
    stops = np.minimum(48 * np.arange(1, 33), 1535)
    kept = stops[::-3][::-1]
    widths = np.diff(stops, prepend=0)
    left_out = 1 - widths @ kept[np.searchsorted(kept, stops)] / 1536**2
    assert float(found.isnan().float().mean()) == pytest.approx(left_out)
    assert left_out > 0.45
    triangle = plan_overlaps(stacks, None, [(0, 0)], 2**30, "direct").flops
    square = plan_overlaps(stacks, None, [(0, 1)], 2**30, "direct").flops
    assert triangle / square == pytest.approx(0.5 + 3 / 64, abs=0.001)


@pytest.mark.parametrize("themselves", [True, False])
def test_heads_of_no_pair_are_not_packed(themselves):
    """Of four layers of 60 heads, the last writes for nobody and the first reads nobody."""
    whole = [random_stack(240, 40, 8, seed) for seed in range(2)]
    spans = np.stack([60 * (np.arange(240) // 60 + 1), np.full(240, 240)], axis=1)
    used = [whole[0][:180], whole[1][60:]]
    used_spans = {(0, 1): spans[:180] - 60} if themselves else {(0, 0): spans[:180] - 60}
    if themselves:
        args, few, spans = (whole, None, [(0, 1)]), (used, None, [(0, 1)]), {(0, 1): spans}
    else:
        args, few = (whole[:1], whole[1:], [(0, 0)]), (used[:1], used[1:], [(0, 0)])
        spans = {(0, 0): spans}
    options = {"method": "packed", "max_memory": 2**24}
    assert plan_overlaps(*args, **options, spans=spans) == plan_overlaps(
        *few, **options, spans=used_spans
    )
    (block,) = spans
    found = overlap_blocks(*args, **options, spans=spans)[block]
    expected = overlap_blocks(*few, **options, spans=used_spans)[block]
    torch.testing.assert_close(found[:180, 60:], expected, rtol=0, atol=0, equal_nan=True)
    assert found[180:].isnan().all() and found[:, :60].isnan().all()


def test_nothing_asked_is_nothing_computed():
    stack = random_stack(3, 20, 2, 0)
    nothing = {(0, 0): np.zeros((3, 2), dtype=np.int64)}
    for method in ("packed", "direct"):
        found = overlap_blocks([stack], [stack], [(0, 0)], spans=nothing, method=method)
        assert found[0, 0].isnan().all()


@pytest.mark.parametrize("shape", [(48, 768, 64), (40, 512, 16), (3, 256, 64)])
@pytest.mark.parametrize("max_memory", [2**30, 2**22])
def test_error_of_bfloat16_is_as_stated(shape, max_memory):
    """.05 of the spread of random subspaces and 2^-7 of the distance from their mean."""
    n_heads, d_model, rank = shape
    bases = [orthonormal_bases(random_stack(*shape, seed)).vectors for seed in range(2)]
    bases[1][: n_heads // 2, :, : rank // 2] = bases[0][: n_heads // 2, :, : rank // 2]
    bases[1] = torch.linalg.qr(bases[1])[0]
    options = {"method": "packed", "max_memory": max_memory}
    exact = overlap_blocks([b.double() for b in bases], None, [(0, 1)])[0, 1]
    found = overlap_blocks(bases, None, [(0, 1)], precision="medium", **options)[0, 1]
    moments = haar_moments(rank, rank, d_model)
    error, distance = (found.double() - exact).abs(), (exact - moments.mean).abs()
    assert float((error - 2**-7 * distance).max()) < 0.05 * moments.variance**0.5
    assert float(error.max()) > 1e-5
    doubles = overlap_blocks([b.double() for b in bases], None, [(0, 1)], precision="medium")[0, 1]
    assert torch.equal(doubles, exact)


def test_high_is_float32_on_the_cpu():
    stacks = [random_stack(8, 100, 16, seed) for seed in range(2)]
    exact, high = (
        overlap_blocks(stacks, None, [(0, 1)], precision=precision)[0, 1]
        for precision in ("highest", "high")
    )
    assert torch.equal(exact, high)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision is 'low'; give one of \('highest', 'high'"):
        overlap_blocks([random_stack(2, 8, 2, 0)], None, [(0, 0)], precision="low")


def test_progress_ends_at_one():
    seen = []
    for method in ("packed", "direct"):
        overlap_blocks(
            [random_stack(3, 300, 4, 0)], None, [(0, 0)], method=method, progress=seen.append
        )
        assert seen[-1] == 1.0
        assert seen == sorted(seen)
        seen.clear()


def test_fast_path_leaves_the_setting_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_float32_matmul(torch.device("cpu")):
        a, b = random_stack(2, 300, 300, 5)
        error = (a @ b).double() - a.double() @ b.double()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert float(error.norm() / (a.double() @ b.double()).norm()) < 2e-6


def test_map_factors_carry_the_norm_of_the_map():
    w_v, w_o = random_stack(4, 30, 6, 0), random_stack(4, 30, 6, 1)
    w_v[3, :, 2:] = 0
    norms = torch.stack([(v @ o.T).norm() for v, o in zip(w_v.double(), w_o.double(), strict=True)])
    factors, scale = map_factors(w_o, w_v)
    assert torch.allclose(factors.double().flatten(1).norm(dim=1), scale, rtol=1e-5)
    x = random_stack(1, 30, 1, 2)[0].double()
    pairs = zip(w_v.double(), w_o.double(), strict=True)
    through = torch.stack([(v @ (o.T @ x)).norm() for v, o in pairs])
    seen = (factors.double().mT @ x).flatten(1).norm(dim=1)
    assert torch.allclose(seen / scale, through / norms, rtol=1e-5)
    assert torch.allclose(product_norms(w_v, w_o), norms, rtol=1e-9)
    roots = gram_roots(w_v).double()
    assert torch.allclose(roots @ roots.mT, w_v.double().mT @ w_v.double(), atol=1e-3)


@pytest.mark.parametrize("overwrite", [False, True])
def test_factors_of_both_sides_are_those_of_either(overwrite):
    q, k = random_stack(40, 90, 9, 0), random_stack(40, 90, 9, 1)
    q[3], k[5], q[7] = 0, 1e12 * k[5], 1e-12 * q[7]
    # Sides that nearly cancel: their product lies in what float32 Gram matrices lose.
    basis = torch.linalg.qr(random_stack(1, 9, 9, 2, torch.float64)[0])[0]
    strong = torch.tensor([1.0] * 4 + [1e-6] * 5, dtype=torch.float64)
    q[11] = (q[11].double() @ (basis * strong) @ basis.T).float()
    k[11] = (k[11].double() @ (basis * strong.flip(0)) @ basis.T).float()
    expected = [map_factors(q, k), map_factors(k, q)]
    sides = q.clone(), k.clone()
    found = facing_factors(*sides, overwrite=overwrite)
    for side, before, (factors, norms), (alone, alone_norms) in zip(
        sides, (q, k), found, expected, strict=True
    ):
        torch.testing.assert_close(factors, alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norms, alone_norms, rtol=1e-5, atol=0)
        assert norms[3] == 0 and norms[11] == 1
        assert overwrite or torch.equal(side, before)


def test_factors_take_the_place_of_sides_that_need_no_scaling():
    q, k = random_stack(4, 30, 3, 0), random_stack(4, 30, 3, 1)
    expected = [map_factors(q, k), map_factors(k, q)]
    for (factors, _), (alone, _), side in zip(
        facing_factors(q, k, overwrite=True), expected, (q, k), strict=True
    ):
        assert factors.data_ptr() == side.data_ptr()
        torch.testing.assert_close(factors, alone)


def test_signed_identity_of_projectors_and_their_negatives():
    basis = torch.linalg.qr(random_stack(1, 40, 8, 0, torch.float64)[0])[0][None]
    stack = torch.cat([basis, basis])
    signs = torch.tensor([1.0, -2.5], dtype=torch.float64)[:, None, None]
    scores = signed_identity(stack, stack * signs, torch.tensor([8, 8]))
    assert scores.tolist() == pytest.approx([1.0, -1.0])
