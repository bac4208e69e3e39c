"""ProjectionKernel and CompositionScore against float64 loops, and what they refuse."""

from __future__ import annotations

import dataclasses
import pickle

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from toys import random_weights, registered, toy_heads

from skhead import (
    CompositionScore,
    ProjectionKernel,
    SimpleComposition,
    SubspaceExtractor,
    hub_table,
    load_heads,
    load_weights,
)
from skhead.exceptions import DegenerateHeadError, HeadShapeError, ProvenanceMismatchError

ALL = [a + b for a in "QKVO" for b in "QKVO"]


def reference_kernel(heads, pair):
    """Sum of squared cosines of principal angles, by float64 singular values, head by head."""
    bases = [
        [np.linalg.svd(w.astype(float), full_matrices=False)[0] for w in load_weights(heads, role)]
        for role in pair
    ]
    return np.array(
        [[np.square(np.linalg.svd(u.T @ v)[1]).sum() for v in bases[1]] for u in bases[0]]
    )


def reference_composition(heads, pair):
    w = {role: load_weights(heads, role).astype(float) for role in "QKVO"}
    ov = [v @ o.T for v, o in zip(w["V"], w["O"], strict=True)]
    qk = [q @ k.T for q, k in zip(w["Q"], w["K"], strict=True)]
    readers = {"OQ": qk, "OK": [m.T for m in qk], "OV": ov}[pair]
    norm = np.linalg.norm
    return np.array([[norm(m @ a) / (norm(m) * norm(a)) for a in readers] for m in ov])


def test_all_sixteen_pairs_equal_principal_angles():
    with toy_heads(n_heads=4, n_kv_heads=2) as heads:
        found = ProjectionKernel(pairs=ALL, layer_order="all").fit_transform(heads)
        for p, pair in enumerate(ALL):
            expected = reference_kernel(heads, pair)
            if pair[0] == pair[1]:
                assert np.isnan(found.values[:, :, p].diagonal()).all()
                np.fill_diagonal(expected, np.nan)
            np.testing.assert_allclose(found.values[:, :, p], expected, atol=1e-5)


@pytest.mark.parametrize("kv", [None, 2])
def test_composition_equals_dense_maps(kv):
    with toy_heads(n_kv_heads=kv) as heads:
        found = CompositionScore(layer_order="all").fit_transform(heads)
        for p, pair in enumerate(found.pairs):
            expected = reference_composition(heads, pair)
            np.testing.assert_allclose(found.values[:, :, p], expected, atol=1e-6)


@pytest.mark.parametrize("kind", [ProjectionKernel, CompositionScore, SimpleComposition])
@pytest.mark.parametrize("arrangement", ["in order", "shuffled", "two models", "some heads"])
def test_forward_values_are_those_of_all_pairs(kind, arrangement):
    """Only what is defined is computed, whatever the order of the heads."""
    with (
        toy_heads(n_layers=8, n_heads=16, n_kv_heads=4, seed=1) as first,
        toy_heads(n_layers=3, n_heads=8, seed=2) as second,
    ):
        heads = {
            "in order": first,
            "shuffled": first.sample(frac=1, random_state=0),
            "two models": pd.concat([first, second]).sample(frac=1, random_state=1),
            "some heads": first.iloc[[3, 70, 4, 127, 3 + 16]],
        }[arrangement]
        forward = kind().fit_transform(heads).values
        every = kind(layer_order="all").fit_transform(heads).values
        layers, sources = heads["layer"].to_numpy(), heads["source"].to_numpy()
        defined = (layers[:, None] < layers) & (sources[:, None] == sources)
        assert (np.isnan(forward) == ~defined[:, :, None]).all()
        np.testing.assert_allclose(forward[defined], every[defined], rtol=1e-5, atol=1e-6)
        split = kind().fit(heads.iloc[::2]).transform(heads.iloc[1::2]).values
        expected = forward[1::2, ::2]
        np.testing.assert_allclose(split, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_on_trained_weights_is_as_stated(gpt2_path):
    heads = load_heads(gpt2_path)
    exact, rounded = (
        CompositionScore(matmul_precision=name).fit_transform(heads).values
        for name in ("highest", "medium")
    )
    error = np.abs(rounded - exact)
    assert 1e-5 < np.nanmax(error) < 1e-3
    assert np.nanmax(error / exact) < 0.02
    kernels = [
        ProjectionKernel(matmul_precision=name).fit_transform(heads)
        for name in ("highest", "medium")
    ]
    error = np.abs(kernels[1].values - kernels[0].values)
    distance = np.abs(kernels[0].values - kernels[0].null_mean)
    assert np.nanmax(error - 2**-7 * distance) < 0.05 * np.min(kernels[0].null_sd)
    assert np.nanmax(error) > 1e-3


def test_layers_that_share_matrices_are_compared_forward():
    """A matrix of all layers lies before and behind itself."""
    with toy_heads(n_layers=1, n_heads=3) as heads:
        shared = SubspaceExtractor().fit_transform(heads)
        again = shared[np.array([0, 1, 2, 0, 1, 2])]
        table = again.heads.assign(layer=[0, 0, 0, 1, 1, 1])
        again = dataclasses.replace(again, heads=table)
        found = ProjectionKernel().fit_transform(again).values
        plain = ProjectionKernel(layer_order="all").fit_transform(shared).values
        np.testing.assert_allclose(found[:3, 3:], plain, rtol=1e-6)
        assert np.isnan(found[3:]).all() and np.isnan(found[:, :3]).all()


@pytest.mark.parametrize("kind", [ProjectionKernel, CompositionScore])
def test_reduced_precision_is_asked_for_by_name(kind):
    with toy_heads(n_layers=3, n_heads=32, d_model=64, d_head=16) as heads:
        exact, rounded = (
            kind(matmul_precision=name).fit_transform(heads).values
            for name in ("highest", "medium")
        )
        assert np.nanmax(np.abs(exact - rounded)) < 0.02
        assert np.nanmax(np.abs(exact - rounded)) > 1e-6
        with pytest.raises(ValueError, match=f"{kind.__name__}: matmul_precision"):
            kind(matmul_precision="bf16").fit(heads)


@pytest.mark.parametrize("estimator", [ProjectionKernel(), CompositionScore()])
def test_forward_order_leaves_the_rest_undefined(estimator):
    with toy_heads() as heads:
        found = estimator.fit_transform(heads)
    layers = heads["layer"].to_numpy()
    expected = layers[:, None] < layers[None, :]
    for p in range(3):
        np.testing.assert_array_equal(~np.isnan(found.values[:, :, p]), expected)


def test_normalisation_with_unequal_ranks():
    weights = random_weights(n_layers=2, n_heads=2, d_model=16, d_head=4)
    weights["blocks.0.attn.W_O"][1, 2:] = 0
    with registered(weights) as heads:
        plain, by_rank, cosine = (
            ProjectionKernel(pairs=["OQ"], normalize=n).fit_transform(heads)
            for n in (None, "rank", "cosine")
        )
    r = np.array([4, 2, 4, 4])[:, None]
    block = np.s_[:2, 2:, 0]
    np.testing.assert_allclose(
        by_rank.values[block], plain.values[block] / np.minimum(r, 4)[:2], rtol=1e-6
    )
    np.testing.assert_allclose(
        cosine.values[block], plain.values[block] / np.sqrt(4 * r)[:2], rtol=1e-6
    )
    assert plain.row_ranks[:, 0].tolist() == [4, 2, 4, 4]
    np.testing.assert_allclose(plain.null_mean[:2, 2:, 0], [[1.0, 1.0], [0.5, 0.5]])
    assert [s.unit for s in (plain, by_rank, cosine)] == ["pk", "pk/rank", "pk/cosine"]


def test_transform_compares_with_the_fitted_heads():
    with toy_heads() as heads:
        whole = ProjectionKernel(pairs=("OK", "QQ"), layer_order="all").fit_transform(heads)
        subspaces = SubspaceExtractor().fit_transform(heads)
        kernel = ProjectionKernel(pairs=("OK", "QQ"), layer_order="all").fit(subspaces[:8])
        found = kernel.transform(subspaces[4:])
    assert found.values.shape == (8, 8, 2)
    np.testing.assert_allclose(found.values, whole.values[4:, :8], atol=1e-5)
    assert np.isnan(found.values[0, 4, 1]) and not np.isnan(found.values[0, 4, 0])


def test_composition_transform_compares_with_the_fitted_heads():
    with toy_heads() as heads:
        whole = CompositionScore(layer_order="all").fit_transform(heads)
        found = CompositionScore(layer_order="all").fit(heads.iloc[::2]).transform(heads.iloc[3:5])
    np.testing.assert_allclose(found.values, whole.values[3:5, ::2], atol=1e-6)


@pytest.mark.parametrize("estimator", [ProjectionKernel, CompositionScore])
def test_memory_budget_does_not_change_the_numbers(estimator):
    with toy_heads(d_model=96, d_head=16) as heads:
        roomy = estimator().fit_transform(heads)
        tight = estimator(max_memory="300kB").fit_transform(heads)
        np.testing.assert_allclose(tight.values, roomy.values, rtol=1e-5)
        with pytest.raises(MemoryError, match=f"{estimator.__name__}: max_memory is 10 bytes"):
            estimator(max_memory=10).fit_transform(heads)


def test_permutation_of_heads_permutes_the_similarity():
    order = np.random.default_rng(0).permutation(12)
    with toy_heads() as heads:
        plain = ProjectionKernel(pairs=ALL).fit_transform(heads)
        permuted = ProjectionKernel(pairs=ALL).fit_transform(heads.iloc[order])
    np.testing.assert_allclose(permuted.values, plain.values[np.ix_(order, order)], atol=1e-5)


def test_rotation_of_the_residual_stream_changes_nothing():
    weights = random_weights()
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0]
    rotated = {
        name: (w.numpy() @ rotation.T if "W_O" in name else rotation @ w.numpy())
        for name, w in weights.items()
    }
    rotated = {name: torch.from_numpy(w.astype(np.float32)) for name, w in rotated.items()}
    for estimator in (ProjectionKernel(), CompositionScore()):
        with registered(weights) as heads, registered(rotated) as other:
            plain, turned = (estimator.fit_transform(table).values for table in (heads, other))
        np.testing.assert_allclose(plain, turned, atol=2e-5)


def test_stack_door_compares_one_role_without_layers():
    stack = np.random.default_rng(0).standard_normal((5, 12, 3))
    found = ProjectionKernel().fit_transform(stack)
    assert found.pairs == ("XX",)
    off = ~np.eye(5, dtype=bool)
    bases = [np.linalg.svd(w, full_matrices=False)[0] for w in stack]
    expected = np.array([[np.square(u.T @ v).sum() for v in bases] for u in bases])
    np.testing.assert_allclose(found.values[off, 0], expected[off], atol=1e-6)
    assert np.isnan(found.values[~off, 0]).all()


def test_composition_baselines():
    with toy_heads() as heads:
        plain, difference, ratio = (
            CompositionScore(baseline=b).fit_transform(heads) for b in (None, "difference", "ratio")
        )
    chance = 24**-0.5
    np.testing.assert_allclose(difference.values, plain.values - chance, atol=1e-6)
    np.testing.assert_allclose(ratio.values, plain.values / chance, rtol=1e-5)
    assert [float(s.null_mean[0, 0, 0]) for s in (plain, difference, ratio)] == pytest.approx(
        [chance, 0, 1]
    )


def test_chance_level_of_composition():
    """Independent random maps compose at 1/sqrt(d_model) in the root mean square."""
    with toy_heads(n_layers=2, n_heads=60, d_model=64, d_head=8) as heads:
        scores = CompositionScore().fit_transform(heads)
    for p in range(3):
        values = scores.values[:60, 60:, p]
        assert np.sqrt(np.square(values).mean()) == pytest.approx(64**-0.5, rel=0.01)


@pytest.mark.parametrize("d_model, center", [(64, False), (12, True)])
def test_random_subspaces_follow_the_reference(d_model, center):
    with toy_heads(n_layers=2, n_heads=60, d_model=d_model, d_head=d_model // 8) as heads:
        subspaces = SubspaceExtractor(center=center).fit_transform(heads)
        found = ProjectionKernel().fit_transform(subspaces)
    z = (found.values[:60, 60:] - found.null_mean) / found.null_sd
    assert abs(z.mean()) < 0.1
    assert z.std() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("estimator", [ProjectionKernel(), CompositionScore()])
def test_similarity_container(estimator):
    with toy_heads() as heads:
        found = estimator.fit_transform(heads)
        names = list(estimator.get_feature_names_out())
    flat = np.asarray(found)
    assert flat.shape == found.shape == (12, 36)
    assert found.feature_names == names
    assert not np.isnan(flat).any()
    column = names.index("OK:L2H1")
    assert flat[0, column] == found.values[0, heads.index.get_loc("L2H1"), 1]
    assert flat[11, column] == pytest.approx(float(found.null_mean[0, 0, 1]))
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.values, found.values)
    assert joblib.hash(again) == joblib.hash(found)
    np.testing.assert_array_equal(np.asarray(found[[3, 1]]), flat[[3, 1]])
    assert found[2:4].rows.index.tolist() == ["L0H2", "L0H3"]


def test_frames_and_top_pairs():
    with toy_heads() as heads:
        found = ProjectionKernel(pairs=("OQ", "OV")).fit_transform(heads)
    frame = found.to_frame()
    assert list(frame.columns) == ["pair", "source", "target", "score"]
    assert frame["pair"].value_counts().to_dict() == {"OQ": 48, "OV": 48}
    top = found.top_pairs(5)
    for pair in ("OQ", "OV"):
        best = frame[frame["pair"] == pair].nlargest(5, "score")
        mine = top[top["pair"] == pair]
        assert mine["rank"].tolist() == [1, 2, 3, 4, 5]
        assert mine["score"].tolist() == best["score"].tolist()
        assert mine["source"].tolist() == best["source"].tolist()
    for k in (0, 2.5, None):
        with pytest.raises(ValueError, match=f"k must be an integer of at least 1; got {k}"):
            found.top_pairs(k)


def test_symmetric_pairs_are_listed_once():
    with toy_heads() as heads:
        found = ProjectionKernel(pairs=("QQ", "OQ"), layer_order="all").fit_transform(heads)
    counts = found.to_frame()["pair"].value_counts()
    assert counts.to_dict() == {"QQ": 66, "OQ": 144}
    qq = found.top_pairs(66).query("pair == 'QQ'")
    assert len({frozenset(p) for p in zip(qq["source"], qq["target"], strict=True)}) == 66


def test_set_output_gives_frames():
    with toy_heads() as heads:
        kernel = ProjectionKernel().set_output(transform="pandas")
        frame = kernel.fit_transform(heads)
    assert isinstance(frame, pd.DataFrame)
    assert frame.index.tolist() == heads.index.tolist()
    assert frame.columns.tolist() == list(kernel.get_feature_names_out())


@pytest.mark.parametrize(
    "estimator, message",
    [
        (ProjectionKernel(pairs=["OZ"]), "ProjectionKernel: pairs must be distinct .*'OZ'"),
        (ProjectionKernel(pairs=[]), "pairs must be distinct"),
        (ProjectionKernel(pairs=["OQ", "OQ"]), "pairs must be distinct"),
        (ProjectionKernel(layer_order="backward"), "one of 'forward', 'all'; got 'backward'"),
        (ProjectionKernel(normalize="max"), "one of None, 'rank', 'cosine'; got 'max'"),
        (ProjectionKernel(max_memory="lots"), "max_memory must be a positive number .*got 'lots'"),
        (ProjectionKernel(max_memory=-1), "max_memory must be a positive number .*got -1"),
        (CompositionScore(pairs=["QQ"]), "pairs must be distinct names from OQ, OK, OV"),
        (CompositionScore(baseline="mean"), "baseline must be one of None, 'difference', 'ratio'"),
    ],
)  # fmt: skip
def test_parameters_are_checked(estimator, message):
    with toy_heads() as heads, pytest.raises(ValueError, match=message):
        estimator.fit(heads)


def test_differently_processed_heads_are_not_compared():
    with toy_heads() as heads:
        raw = SubspaceExtractor().fit_transform(heads)
        truncated = SubspaceExtractor(rank=2).fit_transform(heads)
        kernel = ProjectionKernel().fit(raw)
        with pytest.raises(ProvenanceMismatchError, match="rank=None against 2"):
            kernel.transform(truncated)


def test_missing_role_is_named():
    with toy_heads() as heads:
        subspaces = SubspaceExtractor(roles="OQ").fit_transform(heads)
        with pytest.raises(HeadShapeError, match="holds the roles O Q, not 'K'"):
            ProjectionKernel().fit(subspaces)


def test_other_width_is_refused():
    with toy_heads() as heads, toy_heads(d_model=30) as wider:
        for estimator in (ProjectionKernel(), CompositionScore()):
            with pytest.raises(HeadShapeError, match="d_model 24.*d_model 30"):
                estimator.fit(heads).transform(wider)


def test_composition_needs_all_four_matrices():
    with pytest.raises(HeadShapeError, match="needs all four matrices"):
        CompositionScore().fit(np.ones((3, 8, 2)))


def test_composition_of_a_zero_map_is_refused():
    weights = random_weights()
    weights["blocks.1.attn.W_V"][2] = 0
    with (
        registered(weights) as heads,
        pytest.raises(DegenerateHeadError, match="OV map of L1H2 is zero"),
    ):
        CompositionScore().fit_transform(heads)


def test_rank_deficient_heads_compose():
    weights = random_weights()
    weights["blocks.1.attn.W_K"][2, :, 1:] = 0
    weights["blocks.0.attn.W_V"][1, :, 2:] = 0
    with registered(weights) as heads:
        found = CompositionScore(layer_order="all").fit_transform(heads)
        for p, pair in enumerate(found.pairs):
            expected = reference_composition(heads, pair)
            np.testing.assert_allclose(found.values[:, :, p], expected, atol=1e-6)


def test_budget_texts():
    from skhead._base import parse_bytes

    sizes = {"1GiB": 2**30, "1.5 MiB": 1.5 * 2**20, "2kB": 2000, "100": 100, "3g": 3e9}
    for text, expected in sizes.items():
        assert parse_bytes(text, "test") == expected
    for value in ("0", "0 GiB", "0.4", "", "-1", 0, True):
        with pytest.raises(ValueError, match=rf"test: max_memory must be .*got {value!r}"):
            parse_bytes(value, "test")


def test_heads_of_different_models_are_compared_only_on_request():
    with toy_heads(seed=1) as a, toy_heads(seed=2) as b:
        both = pd.concat([a, b])
        forward = ProjectionKernel(pairs=["OQ"]).fit_transform(both)
        every = ProjectionKernel(pairs=["OQ"], layer_order="all").fit_transform(both)
    assert len(forward.to_frame()) == 2 * 48
    assert np.isnan(forward.values[:12, 12:]).all()
    assert len(every.to_frame()) == 24 * 24


def test_labels_tell_models_apart_and_know_the_same_head_on_both_sides():
    with toy_heads(seed=1) as a, toy_heads(seed=2) as b:
        across = ProjectionKernel(pairs=["OQ"], layer_order="all").fit(a).transform(b)
        assert not set(across.row_labels) & set(across.column_labels)
        table = hub_table(across, k=5)
        assert len(table) == 24 and table.index.is_unique
        assert table["degree"].sum() == 10
        back = ProjectionKernel(pairs=["OQ"], layer_order="all").fit(pd.concat([a, b])).transform(a)
        assert back.row_labels == back.column_labels[:12]
        assert len(hub_table(back, k=5)) == 24


def test_unordered_pairs_are_listed_once_in_any_order_of_rows():
    with toy_heads() as heads:
        kernel = ProjectionKernel(pairs=["QQ"], layer_order="all").fit(heads)
        turned = kernel.transform(heads.iloc[::-1])
        half = kernel.transform(heads.iloc[:3])
    assert len(turned.to_frame()) == 66
    assert len(half.to_frame()) == 3 + 3 * 9
    known = np.where(np.isnan(turned.listed("QQ")), np.nan, turned.values[:, :, 0])
    np.testing.assert_allclose(turned.fill_mirrored("QQ", known), turned.values[:, :, 0], atol=1e-5)


def test_equal_matrices_of_a_stack_are_two_heads():
    stack = np.random.default_rng(0).standard_normal((3, 20, 4))
    stack[1] = stack[0]
    found = ProjectionKernel().fit_transform(stack)
    assert found.values[0, 1, 0] == pytest.approx(4.0, abs=1e-5)
    assert np.isnan(found.values[:, :, 0].diagonal()).all()


def test_heads_of_a_stack_are_all_compared():
    four = np.random.default_rng(0).standard_normal((5, 4, 12, 3))
    for estimator in (ProjectionKernel(), CompositionScore()):
        assert not np.isnan(estimator.fit_transform(four).values).any()


def test_stacks_of_two_precisions_are_compared():
    stack = np.random.default_rng(0).standard_normal((64, 64, 32))
    wide = ProjectionKernel().fit(stack).transform(stack.astype(np.float32))
    narrow = ProjectionKernel().fit(stack.astype(np.float32)).transform(stack)
    np.testing.assert_allclose(wide.values, narrow.values, atol=1e-4)


def test_table_and_stack_are_not_mixed_silently():
    stack = np.random.default_rng(0).standard_normal((5, 24, 5))
    with toy_heads() as heads:
        with pytest.raises(HeadShapeError, match="ProjectionKernel: was fitted on the roles O Q"):
            ProjectionKernel(pairs=["OQ"]).fit(heads).transform(stack)
        with pytest.raises(HeadShapeError, match="ProjectionKernel: was fitted on the roles X"):
            ProjectionKernel().fit(stack).transform(heads)


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e5, 1e12])
def test_composition_does_not_depend_on_scale(scale):
    four = np.random.default_rng(0).standard_normal((6, 4, 64, 16)).astype(np.float32)
    plain, scaled = (
        CompositionScore().fit_transform(x).values for x in (four, four * np.float32(scale))
    )
    np.testing.assert_allclose(scaled, plain, rtol=2e-5)


def test_composition_through_nearly_cancelling_sides():
    """Strong directions of one factor face weak ones of the other."""
    rng = np.random.default_rng(0)
    gains = np.geomspace(1, 1e-4, 8)
    left, right = (np.linalg.qr(rng.standard_normal((2, 40, 8)))[0] for _ in range(2))
    four = np.stack([left * gains, right, left * gains, right * gains[::-1]], axis=1)
    found = CompositionScore(pairs=["OV"]).fit_transform(four.astype(np.float32)).values[:, :, 0]
    maps = [x[2] @ x[3].T for x in four]
    norm = np.linalg.norm
    expected = [[norm(m @ a) / (norm(m) * norm(a)) for a in maps] for m in maps]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_fitted_composition_keeps_its_own_copy():
    four = torch.randn(50, 4, 24, 5, generator=torch.Generator().manual_seed(0))[:3]
    score = CompositionScore().fit(four)
    before = score.transform(four.clone()).values
    again = CompositionScore().fit(four.clone())
    assert joblib.hash(score) == joblib.hash(again)
    assert len(pickle.dumps(score)) < 4 * four.numel() + 10_000
    rows = four.clone()
    four.zero_()
    np.testing.assert_array_equal(score.transform(rows).values, before)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(score)).transform(rows).values, before)


def test_pickled_similarity_does_not_carry_what_can_be_read_again():
    with toy_heads(d_model=64) as heads:
        found = ProjectionKernel().fit_transform(heads)
    assert found.row_subspaces is not None
    assert pickle.loads(pickle.dumps(found)).row_subspaces is None
    assert found[:2].row_subspaces is None
    stack = ProjectionKernel().fit_transform(np.random.default_rng(0).standard_normal((5, 12, 3)))
    assert len(pickle.loads(pickle.dumps(stack)).row_subspaces) == 5
    assert len(stack[:2].row_subspaces) == 2


def test_matrix_library_setting_survives_threads():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with toy_heads() as heads:
        run = joblib.delayed(ProjectionKernel(layer_order="all").fit_transform)
        joblib.Parallel(n_jobs=4, backend="threading")(run(heads) for _ in range(24))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_stack_has_no_norms_to_fold():
    stack = np.ones((3, 4, 6, 2)) + np.arange(3)[:, None, None, None]
    with pytest.raises(ValueError, match="CompositionScore: fold_norm and center need the model"):
        CompositionScore(fold_norm=True).fit(stack)
