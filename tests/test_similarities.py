"""Siblings of the projection kernel against dense float64 references, and what they refuse."""

from __future__ import annotations

import pickle

import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from toys import random_weights, registered, toy_heads

import skhead
from skhead import CompositionScore, ProjectionKernel, SubspaceExtractor, load_weights
from skhead.exceptions import DegenerateHeadError, HeadShapeError, ProvenanceMismatchError
from skhead.similarities import (
    GrassmannDistance,
    LinearCKA,
    ProcrustesSimilarity,
    SimpleComposition,
)
from skhead.spectra import SpectrumSimilarity
from skhead.stats import head_average_precision

ALL = [a + b for a in "QKVO" for b in "QKVO"]
MATRIX = (ProcrustesSimilarity, LinearCKA, SimpleComposition)
METRICS = ("chordal", "geodesic", "procrustes", "binet-cauchy", "martin", "max-angle")
norm = np.linalg.norm


def angle_distance(x, y, metric):
    angles = np.sort(scipy.linalg.subspace_angles(x, y))
    kernel = np.prod(np.square(np.cos(angles)))
    return {
        "chordal": norm(np.sin(angles)),
        "geodesic": norm(angles),
        "procrustes": norm(2 * np.sin(angles / 2)),
        "binet-cauchy": np.sqrt(1 - kernel),
        "martin": np.sqrt(-np.log(kernel)),
        "max-angle": angles[-1],
    }[metric]


REFERENCES = {
    ProcrustesSimilarity: lambda x, y: norm(x.T @ y, "nuc") / (norm(x) * norm(y)),
    LinearCKA: lambda x, y: norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y)),
    SimpleComposition: lambda x, y: norm(x.T @ y) / (norm(x) * norm(y)),
}
#: Every sibling with a reference for two matrices.
SIBLINGS = [
    *[(cls(), reference) for cls, reference in REFERENCES.items()],
    *[
        (GrassmannDistance(metric=m), lambda x, y, m=m: angle_distance(x, y, m))
        for m in METRICS
    ],
]  # fmt: skip
EVERY = [estimator for estimator, _ in SIBLINGS] + [SpectrumSimilarity(pairs=["OO", "VO"])]


def named(estimator):
    """Name of a test's estimator; functions go without."""
    if callable(estimator):
        return ""
    return f"{type(estimator).__name__}-{getattr(estimator, 'metric', '')}".rstrip("-")


def tolerance(estimator, plain):
    """Martin's distance loses digits to angles near a right one: it takes logs of cosines."""
    return 1e-4 if getattr(estimator, "metric", "") == "martin" else plain


def reference(heads, pair, measure, **options):
    rows, columns = (load_weights(heads, role, **options).astype(float) for role in pair)
    return np.array([[measure(x, y) for y in columns] for x in rows])


def spectrum_cosine(x, y):
    a, b = (np.linalg.svd(m, compute_uv=False) for m in (x, y))
    k = min(len(a), len(b))
    return a[:k] @ b[:k] / (norm(a) * norm(b))


@pytest.mark.parametrize("estimator, measure", SIBLINGS, ids=named)
def test_all_sixteen_pairs_equal_their_formula(estimator, measure):
    with toy_heads(n_layers=2, n_kv_heads=2) as heads:
        found = estimator.set_params(pairs=ALL, layer_order="all").fit_transform(heads)
        for p, pair in enumerate(ALL):
            expected = reference(heads, pair, measure)
            if pair[0] == pair[1]:
                assert np.isnan(found.values[:, :, p].diagonal()).all()
                np.fill_diagonal(expected, np.nan)
            error = tolerance(estimator, 3e-6)
            np.testing.assert_allclose(found.values[:, :, p], expected, atol=error)
            mirrored = found.values[:, :, ALL.index(pair[::-1])].T
            np.testing.assert_allclose(found.values[:, :, p], mirrored, atol=1e-6)


def test_spectra_equal_dense_maps():
    with toy_heads(n_layers=2, n_kv_heads=2) as heads:
        kernel = SpectrumSimilarity(pairs=["QKQK", "QKOV", "OVOV", "OO", "QV"])
        found = kernel.fit_transform(heads)
        w = {role: load_weights(heads, role).astype(float) for role in "QKVO"}
    maps = {
        "QK": [q @ k.T for q, k in zip(w["Q"], w["K"], strict=True)],
        "OV": [v @ o.T for v, o in zip(w["V"], w["O"], strict=True)],
        **w,
    }
    for p, pair in enumerate(found.pairs):
        half = len(pair) // 2
        rows, columns = maps[pair[:half]], maps[pair[half:]]
        expected = np.array([[spectrum_cosine(x, y) for y in columns] for x in rows])
        if pair[:half] == pair[half:]:
            np.fill_diagonal(expected, np.nan)
        np.testing.assert_allclose(found.values[:, :, p], expected, atol=1e-6)


def test_spectra_bound_every_alignment():
    """Von Neumann: no rotation of one stream aligns two matrices better than their spectra do."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 12, 4)) * [3, 1, 0.5, 0.1]
    bound = SpectrumSimilarity().fit(x[None]).transform(y[None]).values[0, 0, 0]
    a, b = (np.linalg.svd(m)[0] for m in (x, y))
    for turn in (*np.linalg.qr(rng.standard_normal((50, 12, 12)))[0], a @ b.T):
        reached = REFERENCES[ProcrustesSimilarity](x, turn @ y)
        assert reached <= bound + 1e-6
    assert reached == pytest.approx(float(bound), abs=1e-6)


@pytest.mark.parametrize("estimator", EVERY, ids=named)
def test_permutation_of_heads_permutes_the_similarity(estimator):
    order = np.random.default_rng(0).permutation(12)
    estimator = estimator.set_params(pairs=["OQ", "KK"], layer_order="forward")
    with toy_heads() as heads:
        plain = estimator.fit_transform(heads)
        permuted = estimator.fit_transform(heads.iloc[order])
    assert np.isfinite(plain.values).sum() == 2 * 48
    expected = plain.values[np.ix_(order, order)]
    np.testing.assert_allclose(permuted.values, expected, atol=tolerance(estimator, 1e-5))


@pytest.mark.parametrize("estimator", [*EVERY, ProjectionKernel()], ids=named)
def test_forward_order_leaves_the_rest_undefined(estimator):
    """Also of kinds that mirror each other, of which only one is computed."""
    with toy_heads(n_kv_heads=2) as heads:
        every, forward = (
            estimator.set_params(pairs=ALL, layer_order=order).fit_transform(heads).values
            for order in ("all", "forward")
        )
    layers = heads["layer"].to_numpy()
    defined = layers[:, None] < layers[None, :]
    assert np.isnan(forward[~defined]).all()
    error = tolerance(estimator, 1e-5)
    np.testing.assert_allclose(forward[defined], every[defined], atol=error)


def rotated(weights, rotation):
    found = {
        name: (w.numpy() @ rotation.T if "W_O" in name else rotation @ w.numpy())
        for name, w in weights.items()
    }
    return {name: torch.from_numpy(w.astype(np.float32)) for name, w in found.items()}


def remixed(weights, mix):
    """Another basis of every head space; the numbers of all heads stay but for it."""
    found = {
        name: (mix.T @ w.numpy() if "W_O" in name else w.numpy() @ mix)
        for name, w in weights.items()
    }
    return {name: torch.from_numpy(w.astype(np.float32)) for name, w in found.items()}


@pytest.mark.parametrize("estimator", EVERY, ids=named)
def test_rotations_and_scale_change_nothing(estimator):
    weights, rng = random_weights(), np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    head_turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    estimator = estimator.set_params(pairs=["OQ", "VO"], layer_order="all")
    variants = [rotated(weights, turn), remixed(weights, 3.0 * head_turn)]
    with registered(weights) as heads:
        plain = estimator.fit_transform(heads).values
    for changed in variants:
        with registered(changed) as heads:
            found = estimator.fit_transform(heads).values
        np.testing.assert_allclose(plain, found, atol=tolerance(estimator, 2e-5))


@pytest.mark.parametrize("estimator", EVERY, ids=named)
def test_only_subspaces_survive_any_change_of_head_basis(estimator):
    weights = random_weights()
    mix = np.diag([1.0, 2.0, 4.0, 8.0, 16.0]) + 0.1
    estimator = estimator.set_params(pairs=["OQ", "VO"], layer_order="all")
    values = []
    for each in (weights, remixed(weights, mix)):
        with registered(each) as heads:
            values.append(estimator.fit_transform(heads).values)
    difference = np.abs(values[0] - values[1]).max()
    if isinstance(estimator, GrassmannDistance):
        assert difference < tolerance(estimator, 2e-5)
    else:
        assert difference > 0.01


def test_spectra_of_maps_do_not_depend_on_the_head_basis():
    weights = random_weights()
    mix = np.eye(5) + 0.3 * np.random.default_rng(0).standard_normal((5, 5))
    back = np.linalg.inv(mix).T
    changed = {}
    for name, w in weights.items():
        change = mix if name.endswith(("W_Q", "W_O")) else back
        new = change.T @ w.numpy() if "W_O" in name else w.numpy() @ change
        changed[name] = torch.from_numpy(new.astype(np.float32))
    values = []
    for each in (weights, changed):
        with registered(each) as heads:
            values.append(SpectrumSimilarity(pairs=["QKQK", "OVOV", "VV"]).fit_transform(heads))
    np.testing.assert_allclose(values[0].values[..., :2], values[1].values[..., :2], atol=1e-6)
    assert np.nanmax(np.abs(values[0].values[..., 2] - values[1].values[..., 2])) > 1e-3


@pytest.mark.parametrize("cls", MATRIX)
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_scale_of_a_stack_changes_nothing(cls, scale):
    stack = np.random.default_rng(0).standard_normal((5, 20, 4)).astype(np.float32)
    plain, scaled = (cls().fit_transform(x).values for x in (stack, stack * np.float32(scale)))
    np.testing.assert_allclose(scaled, plain, rtol=1e-5)


@pytest.mark.parametrize("cls", [ProcrustesSimilarity, LinearCKA, SpectrumSimilarity])
def test_largest_value_is_one_and_is_reached(cls):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 6)) * np.geomspace(1, 0.1, 6)
    turned = 2.5 * x @ np.linalg.qr(rng.standard_normal((6, 6)))[0]
    found = cls().fit_transform(np.stack([x, turned])).values[0, 1, 0]
    assert found == pytest.approx(1.0, abs=1e-6)


def test_simple_composition_of_a_matrix_with_itself():
    """One over the root of the participation ratio: at most 1, and 1 only at rank one."""
    gains = np.array([3.0, 2.0, 1.0])
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 3)))[0]
    found = SimpleComposition().fit_transform(np.stack([basis * gains] * 2)).values[0, 1, 0]
    ratio = (gains**2).sum() ** 2 / (gains**4).sum()
    assert found == pytest.approx(ratio**-0.5, abs=1e-6)
    line = SimpleComposition().fit_transform(np.stack([basis[:, :1]] * 2)).values[0, 1, 0]
    assert line == pytest.approx(1.0, abs=1e-6)


def test_orthogonal_heads_have_nothing_in_common():
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 10)))[0]
    stack = np.stack([basis[:, :5], basis[:, 5:]])
    for cls in MATRIX:
        assert abs(cls().fit_transform(stack).values[0, 1, 0]) < 2e-4
    for metric in ("chordal", "geodesic", "procrustes", "binet-cauchy", "max-angle"):
        near = GrassmannDistance(metric=metric, output="similarity").fit_transform(stack)
        assert near.values[0, 1, 0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_and_contained_subspaces(metric):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 5))
    stack = np.stack([x, x @ rng.standard_normal((5, 5)), x])
    stack[2, :, 3:] = 0
    found = GrassmannDistance(metric=metric).fit_transform(stack)
    assert found.row_ranks[:, 0].tolist() == [5, 5, 3]
    off = ~np.eye(3, dtype=bool)
    assert np.abs(found.values[off]).max() < 3e-6
    assert found.unit == f"distance/{metric}"


def test_chordal_distance_is_what_the_kernel_leaves():
    with toy_heads() as heads:
        subspaces = SubspaceExtractor(rank=3).fit_transform(heads)
        kernel = ProjectionKernel().fit_transform(subspaces)
        found = GrassmannDistance().fit_transform(subspaces)
    np.testing.assert_allclose(np.square(found.values), 3 - kernel.values, atol=1e-5)


def test_close_subspaces_keep_their_chordal_distance():
    """As a difference of rank and kernel it would be off by a thousandth or more."""
    rng = np.random.default_rng(0)
    frame = np.linalg.qr(rng.standard_normal((300, 128)))[0]
    tilt = 1e-4 * np.arange(1, 65)
    turned = frame[:, :64] * np.cos(tilt) + frame[:, 64:] * np.sin(tilt)
    stack = np.stack([frame[:, :64], turned @ rng.standard_normal((64, 64))]).astype(np.float32)
    found = GrassmannDistance().fit_transform(stack).values[0, 1, 0]
    assert found == pytest.approx(norm(np.sin(tilt)), abs=1e-5)


def test_distance_as_similarity():
    with toy_heads() as heads:
        far, near = (
            GrassmannDistance(metric="geodesic", output=output).fit_transform(heads)
            for output in ("distance", "similarity")
        )
    np.testing.assert_allclose(near.values, 1 - far.values / (np.pi / 2 * np.sqrt(5)), atol=1e-6)
    assert near.unit == "similarity/geodesic"
    tops = [s.top_pairs(5)[["source", "target"]].values.tolist() for s in (far, near)]
    assert tops[0] == tops[1]


@pytest.mark.parametrize("output", ["distance", "similarity"])
@pytest.mark.parametrize("d_model, d_head, center", [(40, 1, False), (40, 8, False), (20, 8, True)])
def test_random_subspaces_are_as_far_as_stated(output, d_model, d_head, center):
    with toy_heads(n_layers=2, n_heads=60, d_model=d_model, d_head=d_head) as heads:
        subspaces = SubspaceExtractor(center=center).fit_transform(heads)
        found = GrassmannDistance(output=output).fit_transform(subspaces)
    values = found.values[:60, 60:]
    assert values.mean() == pytest.approx(float(found.null_mean.mean()), rel=0.003)
    assert values.std() == pytest.approx(float(found.null_sd.mean()), rel=0.04)


@pytest.mark.parametrize("cls", [LinearCKA, SimpleComposition])
@pytest.mark.parametrize("center", [False, True])
def test_heads_in_random_orientation_have_the_stated_moments(cls, center):
    """With spectra that differ from head to head."""
    weights = random_weights(n_layers=2, n_heads=100, d_model=12, d_head=4)
    gains = torch.rand(200, 4, generator=torch.Generator().manual_seed(1)) ** 3 + 0.02
    for layer in range(2):
        each = gains[100 * layer : 100 * layer + 100]
        weights[f"blocks.{layer}.attn.W_O"] *= each[:, :, None]
        weights[f"blocks.{layer}.attn.W_Q"] *= each[:, None, :]
    with registered(weights) as heads:
        found = cls(pairs=["OQ"], center=center).fit_transform(heads)
    block = np.s_[:100, 100:, 0]
    assert found.null_mean.shape == found.values.shape
    z = (found.values[block] - found.null_mean[block]) / found.null_sd[block]
    assert abs(z.mean()) < 0.05
    assert z.std() == pytest.approx(1.0, abs=0.04 if cls is LinearCKA else 0.08)
    assert not np.isnan(np.asarray(found)).any()


@pytest.mark.parametrize("cls", [*MATRIX, GrassmannDistance])
def test_memory_budget_does_not_change_the_numbers(cls):
    with toy_heads(n_heads=12, d_model=64, d_head=16) as heads:
        roomy = cls(layer_order="all").fit_transform(heads)
        tight = cls(layer_order="all", max_memory="300kB").fit_transform(heads)
        np.testing.assert_allclose(tight.values, roomy.values, rtol=1e-5)
        with pytest.raises(MemoryError, match=f"{cls.__name__}: max_memory is 10 bytes"):
            cls(max_memory=10).fit_transform(heads)


def test_memory_budget_of_angles():
    with toy_heads(n_heads=12, d_model=64, d_head=16) as heads:
        kernel = GrassmannDistance(metric="martin", layer_order="all")
        roomy = kernel.fit_transform(heads)
        tight = kernel.set_params(max_memory="300kB").fit_transform(heads)
        np.testing.assert_allclose(tight.values, roomy.values, rtol=1e-5)
        with pytest.raises(MemoryError, match="GrassmannDistance: max_memory is 5000 bytes"):
            kernel.set_params(max_memory=5000).fit_transform(heads)


@pytest.mark.parametrize("estimator", EVERY, ids=named)
def test_transform_compares_with_the_fitted_heads(estimator):
    estimator = estimator.set_params(pairs=("OK", "QQ"), layer_order="all")
    with toy_heads() as heads:
        whole = estimator.fit_transform(heads)
        found = estimator.fit(heads.iloc[:8]).transform(heads.iloc[4:])
        again = pickle.loads(pickle.dumps(estimator)).transform(heads.iloc[4:])
        names = list(estimator.get_feature_names_out())
    assert found.values.shape == (8, 8, 2)
    np.testing.assert_allclose(found.values, whole.values[4:, :8], atol=1e-5)
    assert np.isnan(found.values[0, 4, 1]) and not np.isnan(found.values[0, 4, 0])
    np.testing.assert_array_equal(again.values, found.values)
    assert found.feature_names == names and names[0] == "OK:L0H0"
    assert joblib.hash(pickle.loads(pickle.dumps(found))) == joblib.hash(found)


@pytest.mark.parametrize("estimator", EVERY, ids=named)
def test_stacks_of_one_role_and_of_four(estimator):
    four = np.random.default_rng(0).standard_normal((5, 4, 12, 3))
    estimator = estimator.set_params(pairs=["VO"], layer_order="forward")
    single = estimator.fit_transform(four[:, 0])
    assert single.pairs == ("XX",)
    assert np.isnan(single.values[:, :, 0].diagonal()).all()
    np.testing.assert_allclose(single.values, single.values.transpose(1, 0, 2), atol=1e-6)
    whole = estimator.fit_transform(four)
    assert whole.pairs == ("VO",) and not np.isnan(whole.values).any()
    with pytest.raises(HeadShapeError, match=f"{type(estimator).__name__}: was fitted on"):
        estimator.transform(four[:, 0])


@pytest.mark.parametrize("cls", [*MATRIX, SpectrumSimilarity])
def test_precisions_are_mixed_and_the_fit_keeps_its_copy(cls):
    stack = np.random.default_rng(0).standard_normal((6, 20, 4))
    given = torch.from_numpy(stack.copy())
    kernel = cls().fit(given)
    expected = kernel.transform(stack.astype(np.float32)).values
    given.zero_()
    np.testing.assert_array_equal(kernel.transform(stack.astype(np.float32)).values, expected)
    assert expected.shape == (6, 6, 1) and np.ptp(expected) > 1e-3
    off = ~np.eye(6, dtype=bool)
    wide = kernel.transform(stack).values
    np.testing.assert_allclose(wide[off], expected[off], atol=1e-6)


@pytest.mark.parametrize("cls", [*MATRIX, SpectrumSimilarity])
def test_processing_is_recorded_and_counts(cls):
    heads = skhead.load_heads("skhead/induction-2l")
    raw, folded = (cls(layer_order="all", fold_norm=f).fit_transform(heads) for f in (False, True))
    assert folded.record == {"fold_norm": True, "center": False, "rank": None}
    assert np.nanmax(np.abs(raw.values - folded.values)) > 1e-4


@pytest.mark.parametrize("cls", MATRIX)
def test_centring_is_that_of_the_residual_coordinates(cls):
    with toy_heads(n_layers=2) as heads:
        found = cls(pairs=["OQ"], layer_order="all", center=True).fit_transform(heads)
        expected = reference(heads, "OQ", REFERENCES[cls], center=True)
        plain = reference(heads, "OQ", REFERENCES[cls])
    np.testing.assert_allclose(found.values[:, :, 0], expected, atol=2e-6)
    assert np.abs(expected - plain).max() > 0.01


@pytest.mark.parametrize("cls", [*MATRIX, SpectrumSimilarity])
def test_weights_are_asked_for(cls):
    with toy_heads() as heads:
        subspaces = SubspaceExtractor().fit_transform(heads)
    name = cls.__name__
    with pytest.raises(
        HeadShapeError, match=f"{name}: .* Subspaces no longer hold; pass the heads"
    ):
        cls().fit(subspaces)
    with pytest.raises(ValueError, match=f"{name}: fold_norm and center need the model's norms"):
        cls(center=True).fit(np.ones((2, 5, 3)))


@pytest.mark.parametrize("cls", [*MATRIX, SpectrumSimilarity])
def test_zero_matrices_are_refused(cls):
    weights = random_weights()
    weights["blocks.1.attn.W_V"][2] = 0
    with (
        registered(weights) as heads,
        pytest.raises(DegenerateHeadError, match=f"{cls.__name__}: L1H2 W_V is zero"),
    ):
        cls(pairs=["VO"]).fit_transform(heads)
    stack = np.ones((3, 5, 2))
    stack[1] = 0
    with pytest.raises(DegenerateHeadError, match="H1 matrix is zero"):
        cls().fit_transform(stack)


def test_zero_maps_are_refused():
    weights = random_weights()
    weights["blocks.1.attn.W_Q"][2, :, 2:] = 0
    weights["blocks.1.attn.W_K"][2, :, :2] = 0
    with registered(weights) as heads:
        with pytest.raises(DegenerateHeadError, match="L1H2 QK map is zero"):
            SpectrumSimilarity().fit(heads)
        SpectrumSimilarity(pairs=["OVOV", "QQ"]).fit(heads)


@pytest.mark.parametrize("cls", [*MATRIX, GrassmannDistance, SpectrumSimilarity])
def test_bad_parameters_are_refused(cls):
    name = cls.__name__
    with toy_heads() as heads:
        with pytest.raises(ValueError, match=f"{name}: pairs must be .*; unknown pair 'OX'"):
            cls(pairs=["OX"]).fit(heads)
        with pytest.raises(ValueError, match=f"{name}: layer_order must be .*; got 'later'"):
            cls(layer_order="later").fit(heads)
        if cls is not SpectrumSimilarity:
            with pytest.raises(ValueError, match=f"{name}: max_memory must be .*; got 'much'"):
                cls(max_memory="much").fit(heads)
    with pytest.raises(ValueError, match="metric must be one of 'chordal'.*; got 'angle'"):
        GrassmannDistance(metric="angle").fit(heads)
    with pytest.raises(ValueError, match="metric='martin' has none"):
        GrassmannDistance(metric="martin", output="similarity").fit(heads)


@pytest.mark.parametrize("cls", [*MATRIX, GrassmannDistance])
def test_other_widths_are_refused(cls):
    with toy_heads() as heads, toy_heads(d_model=30) as wider:
        with pytest.raises(HeadShapeError, match=f"{cls.__name__}: .*d_model 24.*d_model 30"):
            cls().fit(heads).transform(wider)
        with pytest.raises(HeadShapeError, match="different d_model have no residual stream"):
            cls().fit(pd.concat([heads, wider]))


def test_distances_know_how_subspaces_were_made():
    with toy_heads() as heads:
        raw, short = (SubspaceExtractor(rank=r).fit_transform(heads) for r in (None, 2))
        with pytest.raises(ProvenanceMismatchError, match="GrassmannDistance: .*rank=None"):
            GrassmannDistance().fit(raw).transform(short)


def test_spectra_compare_models_of_different_widths():
    with toy_heads(seed=1) as a, toy_heads(d_model=40, d_head=7, seed=2) as b:
        both = pd.concat([a.iloc[:3], b, a.iloc[3:]])
        found = SpectrumSimilarity().fit_transform(both)
        across = SpectrumSimilarity().fit(a).transform(b)
        inside = SpectrumSimilarity().fit_transform(a)
    assert found.rows.index.tolist() == both.index.tolist()
    of_b = np.arange(3, 15)
    of_a = np.setdiff1d(np.arange(24), of_b)
    np.testing.assert_allclose(found.values[np.ix_(of_b, of_a)], across.values, atol=1e-6)
    np.testing.assert_allclose(found.values[np.ix_(of_a, of_a)], inside.values, atol=1e-6)
    assert across.values.max() <= 1 + 1e-6 and across.values.min() > 0.3


def test_spectrum_similarity_survives_a_change_of_basis_of_one_model():
    """Where kernels that need a common basis see two unrelated models."""
    weights = random_weights()
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0]
    with registered(weights) as a, registered(rotated(weights, turn)) as b:
        found = SpectrumSimilarity().fit(a).transform(b).values
        plain = ProcrustesSimilarity(pairs=["OO"], layer_order="all").fit(a).transform(b).values
    np.testing.assert_allclose(found[:, :, 0].diagonal(), 1.0, atol=1e-6)
    assert plain[:, :, 0].diagonal().max() < 0.7


@pytest.fixture(scope="module")
def gpt2(gpt2_path):
    heads = skhead.load_heads(gpt2_path)
    return heads, skhead.datasets.load_head_classes("wang2022", heads) != "None"


@pytest.mark.parametrize(
    "kernel, figures",
    [
        (ProjectionKernel(), (0.336, 0.302, 0.220)),
        (CompositionScore(), (0.158, 0.184, 0.191)),
        (SimpleComposition(), (0.181, 0.179, 0.238)),
        (LinearCKA(center=True), (0.282, 0.285, 0.235)),
        (ProcrustesSimilarity(center=True), (0.286, 0.321, 0.242)),
        (LinearCKA(), (0.275, 0.285, 0.236)),
        (GrassmannDistance(output="similarity"), (0.336, 0.302, 0.220)),
    ],
    ids=lambda x: named(x) if not isinstance(x, tuple) else "",
)
def test_circuit_heads_of_gpt2_by_their_strongest_pair(gpt2, kernel, figures):
    """Heads of the circuit of Wang et al. (2022) among all, by average precision."""
    heads, in_circuit = gpt2
    found = kernel.fit_transform(heads)
    for p, expected in enumerate(figures):
        precision = head_average_precision(found.values[:, :, p], in_circuit)
        assert precision == pytest.approx(expected, abs=6e-4), found.pairs[p]
