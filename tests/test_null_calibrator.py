"""NullCalibrator: what each null says, what it learns from, and what it refuses."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from toys import random_weights, registered, toy_heads

import skhead
from skhead import (
    CompositionScore,
    GrassmannDistance,
    NullCalibrator,
    ProjectionKernel,
    SubspaceExtractor,
    _nulls,
    head_permutation_test,
)
from skhead.exceptions import HeadShapeError, ProvenanceMismatchError
from skhead.stats import haar_log_pvalue, haar_moments

NULLS = ("haar", "gaussian", "anisotropic", "signflip", "empirical")
ALL = [a + b for a in "QKVO" for b in "QKVO"]


def preferring(seed=0, n_layers=4, n_heads=6, d_model=48, d_head=6, decay=1.0):
    """Random heads that all prefer the same directions."""
    weights = random_weights(n_layers, n_heads, d_model, d_head, seed=seed)
    gains = torch.arange(1, d_model + 1).float() ** -(decay / 2)
    return {name: w * gains if "W_O" in name else w * gains[:, None] for name, w in weights.items()}


@pytest.fixture(scope="module")
def similarity():
    with toy_heads(n_layers=2, n_heads=40, d_model=64, d_head=8) as heads:
        return ProjectionKernel(pairs=("OQ", "OK", "QQ"), layer_order="all").fit_transform(heads)


def test_haar_equals_the_law_pair_by_pair(similarity):
    found = NullCalibrator(side="upper").fit_transform(similarity)
    moments = haar_moments(8, 8, 64)
    score = similarity.values.astype(float)
    np.testing.assert_allclose(
        found.values, (score - moments.mean) / moments.variance**0.5, atol=1e-4
    )
    calibration = found.calibration
    expected = haar_log_pvalue(score[:, :, 0], 8, 8, 64, side="upper") / np.log(10)
    np.testing.assert_allclose(calibration.log10_p[:, :, 0], expected)
    np.testing.assert_allclose(calibration.ratio, score / moments.mean, rtol=1e-5)
    np.testing.assert_allclose(calibration.excess, score - moments.mean, atol=1e-5)
    np.testing.assert_array_equal(calibration.score, similarity.values)


@pytest.mark.parametrize("null", ["haar", "gaussian", "anisotropic", "empirical"])
def test_random_heads_are_standard(similarity, null):
    """The positive control: heads without structure give uniform p-values and no discoveries."""
    found = NullCalibrator(null=null).fit_transform(similarity)
    for p in range(3):
        z = found.values[:, :, p][~np.isnan(found.values[:, :, p])]
        assert abs(z.mean()) < 0.1
        assert z.std() == pytest.approx(1.0, abs=0.1)
        log10_p = found.calibration.log10_p[:, :, p]
        upper = 10 ** log10_p[~np.isnan(log10_p)]
        assert stats.kstest(upper, "uniform").statistic < 0.06
    if null in ("haar", "anisotropic"):  # the others' normal tails are too thin at rank 8
        assert np.nanmin(found.calibration.q) > 0.02


def test_anisotropic_null_fits_heads_that_share_preferred_directions():
    with registered(preferring(n_layers=2, n_heads=60, d_model=96, decay=1.5)) as heads:
        similarity = ProjectionKernel(pairs=["OQ"]).fit_transform(heads)
    upper = {
        null: NullCalibrator(null=null, side="upper").fit_transform(similarity) for null in NULLS
    }
    called = {null: np.nanmean(found.calibration.q < 0.05) for null, found in upper.items()}
    assert called["haar"] > 0.2
    assert called["anisotropic"] < 0.01
    z = upper["anisotropic"].values
    assert abs(np.nanmean(z)) < 0.15
    assert np.nanstd(z) == pytest.approx(1.0, abs=0.15)


def test_a_planted_pair_is_found_above_a_common_background():
    weights = preferring(n_layers=2, n_heads=30)
    weights["blocks.1.attn.W_K"][7, :, :4] = weights["blocks.0.attn.W_O"][3, :4].T
    with registered(weights) as heads:
        similarity = ProjectionKernel(pairs=["OK"]).fit_transform(heads)
    found = NullCalibrator(null="anisotropic", side="upper", fdr="by").fit_transform(similarity)
    frame = found.to_frame()
    assert frame.loc[frame["q"] < 0.05, ["source", "target"]].values.tolist() == [["L0H3", "L1H7"]]
    haar = NullCalibrator(side="upper", fdr="by").fit_transform(similarity).to_frame()
    assert (haar["q"] < 0.05).sum() > 100


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("groups", [None, "layer"])
def test_a_fold_does_not_know_the_other_test_heads(null, groups):
    with registered(preferring()) as heads:
        train, test = heads.iloc[::2], heads.iloc[1::2]
        steps = make_pipeline(
            SubspaceExtractor(),
            ProjectionKernel(pairs=("OQ", "VV"), layer_order="all"),
            NullCalibrator(null=null, groups=groups),
        ).fit(train)
        together = steps.transform(test)
        alone = [steps.transform(test.iloc[[i]]) for i in range(len(test))]
    for name in ("z", "log10_p", "ratio"):
        expected = np.concatenate([getattr(part.calibration, name) for part in alone])
        np.testing.assert_allclose(getattr(together.calibration, name), expected, atol=1e-4)


def test_training_heads_are_judged_without_themselves():
    """Taking a head out of the training set leaves its own calibration as it was."""
    with registered(preferring()) as heads:
        subspaces = SubspaceExtractor().fit_transform(heads)
        kernel = ProjectionKernel(pairs=["OQ"], layer_order="all").fit(subspaces)
        found = NullCalibrator(null="anisotropic").fit_transform(kernel.transform(subspaces))
        rest = subspaces[1:]
        other = ProjectionKernel(pairs=["OQ"], layer_order="all").fit(rest)
        law = NullCalibrator(null="anisotropic").fit(other.transform(rest))
        outside = law.transform(other.transform(subspaces[:1]))
    ratio = found.calibration.ratio[0, 1:, 0] / outside.calibration.ratio[0, :, 0]
    np.testing.assert_allclose(ratio, 1.0, atol=2e-2)


@pytest.mark.parametrize("null", NULLS)
def test_invariances(null):
    weights = preferring()
    rotation = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(1)))[0]
    turned = {n: w @ rotation.T if "W_O" in n else rotation @ w for n, w in weights.items()}
    order = np.random.default_rng(0).permutation(24)
    kernel = ProjectionKernel(pairs=("OQ", "KK"), layer_order="all")
    law = NullCalibrator(null=null)
    with registered(weights) as heads, registered(turned) as other:
        plain = law.fit_transform(kernel.fit_transform(heads))
        rotated = law.fit_transform(kernel.fit_transform(other))
        permuted = law.fit_transform(kernel.fit_transform(heads.iloc[order]))
    at = np.ix_(order, order)
    np.testing.assert_allclose(plain.values, rotated.values, atol=2e-3)
    np.testing.assert_allclose(plain.values[at], permuted.values, atol=2e-3)
    np.testing.assert_allclose(plain.calibration.q[at], permuted.calibration.q, rtol=1e-2)


@pytest.mark.parametrize("normalize", ["rank", "cosine"])
def test_normalisation_of_the_kernel_does_not_matter(similarity, normalize):
    with toy_heads(n_layers=2, n_heads=6, d_model=30, d_head=4) as heads:
        plain, scaled = (
            NullCalibrator().fit_transform(ProjectionKernel(normalize=n).fit_transform(heads))
            for n in (None, normalize)
        )
    np.testing.assert_allclose(plain.values, scaled.values, atol=1e-4)


def test_centred_weights_live_in_one_dimension_less():
    import skhead

    heads = skhead.load_heads("skhead/induction-2l")
    subspaces = SubspaceExtractor(center=True).fit_transform(heads)
    similarity = ProjectionKernel().fit_transform(subspaces)
    assert similarity.null_mean.ravel().tolist() == pytest.approx([16 * 16 / 127] * 3)
    found = NullCalibrator().fit_transform(similarity)
    score = found.calibration.score[0, 8, 0]
    assert found.calibration.ratio[0, 8, 0] == pytest.approx(score / (16 * 16 / 127), rel=1e-5)


@pytest.mark.parametrize("output", ["z", "log_p", "q", "ratio", "excess"])
def test_outputs_are_features_without_holes(similarity, output):
    found = NullCalibrator(output=output).fit_transform(similarity)
    flat = np.asarray(found)
    assert flat.shape == similarity.shape and not np.isnan(flat).any()
    neutral = {"z": 0, "log_p": -1 / np.log(10), "q": 1, "ratio": 1, "excess": 0}[output]
    diagonal = found.feature_names.index("QQ:L0H0")
    assert flat[0, diagonal] == pytest.approx(neutral)
    names = ["pair", "source", "target", "score", "z", "log10_p", "q", "ratio", "excess"]
    assert found.to_frame().columns.tolist() == names


@pytest.mark.parametrize("output", ["z", "log_p", "ratio"])
def test_the_most_surprising_pairs_come_first(similarity, output):
    law = NullCalibrator(output=output, side="upper")
    top = law.fit_transform(similarity).top_pairs(5)
    plain = similarity.top_pairs(5)
    for pair in similarity.pairs:
        ours, theirs = (t.loc[t["pair"] == pair, "source"].tolist() for t in (top, plain))
        assert ours[0] == theirs[0]


def test_symmetric_kinds_count_each_pair_once(similarity):
    found = NullCalibrator().fit_transform(similarity)
    q, log10_p = (getattr(found.calibration, n)[:, :, 2] for n in ("q", "log10_p"))
    np.testing.assert_array_equal(q, q.T)
    listed = 10 ** log10_p[np.triu_indices(80, 1)]
    expected = stats.false_discovery_control(listed)
    np.testing.assert_allclose(q[np.triu_indices(80, 1)], expected, rtol=1e-5)


def test_a_pair_and_its_mirror_image_have_one_p_value():
    with toy_heads(n_layers=2, n_heads=10, d_model=30, d_head=4) as heads:
        similarity = ProjectionKernel(pairs=("QQ", "OK"), layer_order="all").fit_transform(heads)
    found = NullCalibrator(null="empirical").fit_transform(similarity).calibration
    np.testing.assert_allclose(found.z[:, :, 0], found.z[:, :, 0].T, atol=1e-6)
    log10_p, log10_q = found.log10_p[:, :, 0], np.log10(found.q[:, :, 0])
    assert (log10_q >= log10_p - 1e-9)[~np.isnan(log10_p)].all()


def test_plain_arrays():
    rng = np.random.default_rng(0)
    X = rng.uniform(3, 8, (7, 5))
    law = NullCalibrator(d_model=64, rank=(8, 16), output="ratio").fit(X)
    np.testing.assert_allclose(law.transform(X), X / 2.0, rtol=1e-6)
    with pytest.raises(ValueError, match="give d_model= and rank="):
        NullCalibrator().fit(X)
    for rank in (2.5, "8", (8, 8, 8)):
        with pytest.raises(ValueError, match="NullCalibrator: rank=.* must be one or two integers"):
            NullCalibrator(d_model=64, rank=rank).fit(X)
    with pytest.raises(ValueError, match="NullCalibrator: d_model must be an integer .* got 64.5"):
        NullCalibrator(d_model=64.5, rank=8).fit(X)
    with pytest.raises(
        ValueError, match="rank=70 must be one or two integers between 1 and d_model=64"
    ):
        NullCalibrator(d_model=64, rank=70).fit(X)
    with pytest.raises(ValueError, match="Negative values in data passed to NullCalibrator"):
        NullCalibrator(d_model=64, rank=8).fit_transform(np.where(np.arange(5) == 0, -1, X))
    with pytest.raises(HeadShapeError, match="XX of H0 and H0 is .*, .* lies between 0 and 2"):
        NullCalibrator(d_model=64, rank=2).fit_transform(X)
    with pytest.raises(HeadShapeError, match="only a Similarity from ProjectionKernel knows"):
        NullCalibrator(null="anisotropic", d_model=64, rank=8).fit(X)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"null": "uniform"},
            "null must be one of 'haar', .*; got 'uniform'",
        ),
        ({"output": "p"}, "output must be one of .*; got 'p'"),
        ({"side": "left"}, "side must be one of .*; got 'left'"),
        ({"fdr": "holm"}, "fdr must be one of .*; got 'holm'"),
        ({"groups": "head"}, "groups must be one of None, 'layer'; got 'head'"),
        ({"shrinkage": 2}, "shrinkage must lie between 0 and 1, got 2"),
    ],
)
def test_parameters_are_checked(similarity, options, message):
    with pytest.raises(ValueError, match=f"NullCalibrator: {message}"):
        NullCalibrator(**options).fit(similarity)


def test_only_the_fitted_reference_is_calibrated():
    with toy_heads() as heads:
        subspaces = SubspaceExtractor().fit_transform(heads)
        similarity = ProjectionKernel().fit_transform(subspaces)
        law = NullCalibrator().fit(similarity)
        fewer = ProjectionKernel().fit(subspaces[:6]).transform(subspaces)
        with pytest.raises(ProvenanceMismatchError, match="against 12 reference heads"):
            law.transform(fewer)
        truncated = SubspaceExtractor(rank=2).fit_transform(heads)
        with pytest.raises(ProvenanceMismatchError, match="rank=None against 2"):
            law.transform(ProjectionKernel().fit_transform(truncated))
        with pytest.raises(ValueError, match="unit 'z'"):
            NullCalibrator().fit(law.transform(similarity))


def test_a_layer_without_training_heads_has_no_null():
    with toy_heads() as heads:
        kernel = ProjectionKernel(layer_order="all").fit(heads.iloc[:8])
        law = NullCalibrator(null="anisotropic", groups="layer").fit(
            kernel.transform(heads.iloc[:8])
        )
        with pytest.raises(HeadShapeError, match="no training head lies in layer 2"):
            law.transform(kernel.transform(heads.iloc[8:]))


def test_pipeline_clone_pickle_and_grid_search():
    with registered(preferring()) as heads:
        steps = make_pipeline(
            SubspaceExtractor(),
            ProjectionKernel(pairs=("QQ", "OV"), layer_order="all"),
            NullCalibrator(),
            LogisticRegression(max_iter=2000),
        )
        grid = {
            "nullcalibrator__null": ["haar", "anisotropic", "empirical"],
            "nullcalibrator__output": ["z", "ratio"],
            "projectionkernel__normalize": [None, "cosine"],
        }
        y = heads["layer"] % 2
        search = GridSearchCV(steps, grid, cv=3, error_score="raise").fit(heads, y)
        assert len(search.cv_results_["params"]) == 12
        fitted = clone(steps).fit(heads, y)
        again = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(fitted.predict_proba(heads), again.predict_proba(heads))
        names = fitted[:-1].set_output(transform="default")[-1].get_feature_names_out()
        assert names[0] == "QQ:L0H0" and len(names) == 48


def test_calibration_after_pickling_reads_the_subspaces_again():
    import skhead

    heads = skhead.load_heads("skhead/induction-2l")
    subspaces = SubspaceExtractor(fold_norm=True, rank=8).fit_transform(heads)
    similarity = ProjectionKernel().fit_transform(subspaces)
    law = NullCalibrator(null="anisotropic")
    direct = law.fit_transform(similarity)
    anew = law.fit_transform(pickle.loads(pickle.dumps(similarity)))
    np.testing.assert_allclose(direct.values, anew.values, atol=1e-4)


def test_untrained_gpt2_shape_gives_no_discoveries(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_inner=8, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    import skhead

    heads = skhead.load_heads(tmp_path)
    similarity = ProjectionKernel(pairs=ALL).fit_transform(heads)
    found = NullCalibrator().fit_transform(similarity).to_frame()
    rates = (found["q"] < 0.05).groupby(found["pair"]).mean()
    assert len(rates) == 16 and (rates < 0.001).all()


def test_published_rates_on_gpt2(gpt2_path):
    import skhead

    similarity = ProjectionKernel().fit_transform(skhead.load_heads(gpt2_path))
    found = NullCalibrator(side="upper").fit_transform(similarity).to_frame()
    rates = (found["q"] < 0.05).groupby(found["pair"]).mean()
    assert rates[["OQ", "OK", "OV"]].tolist() == pytest.approx([0.735, 0.673, 0.290], abs=2e-3)
    law = NullCalibrator(null="anisotropic", side="upper").fit(similarity)
    moments = law.law_.moments("OQ")
    assert moments.mean == pytest.approx(6.438, abs=2e-3)
    assert moments.variance**0.5 == pytest.approx(0.1265, abs=3e-4)
    frame = law.transform(similarity).to_frame()
    rates = (frame["q"] < 0.05).groupby(frame["pair"]).mean()
    assert rates[["OQ", "OK", "OV"]].tolist() == pytest.approx([0.483, 0.508, 0.267], abs=5e-3)


def test_empirical_and_signflip_rates_on_gpt2(gpt2_path):
    """Only nulls that take heads as the unit give a sparse set."""
    import skhead

    similarity = ProjectionKernel().fit_transform(skhead.load_heads(gpt2_path))
    rates = {}
    for null, options in (
        ("signflip", {}),
        ("empirical", {}),
        ("empirical", {"tails": "t"}),
    ):
        law = NullCalibrator(null=null, side="upper", **options)
        frame = law.fit_transform(similarity).to_frame()
        rates[null, options.get("tails")] = (frame["q"] < 0.05).groupby(frame["pair"]).mean()
    signflip, normal, student = (rate[["OQ", "OK", "OV"]].tolist() for rate in rates.values())
    assert signflip == pytest.approx([0.211, 0.130, 0.144], abs=3e-3)
    assert normal == pytest.approx([0.025, 0.046, 0.070], abs=3e-3)
    assert student == [0, 0, 0]


def test_empirical_null_takes_composition_scores():
    with toy_heads(n_layers=3, n_heads=8) as heads:
        composition = CompositionScore().fit_transform(heads)
        found = NullCalibrator(null="empirical").fit_transform(composition)
        assert np.nanmedian(found.values) == pytest.approx(0, abs=0.1)
        with pytest.raises(ValueError, match="law of the projection kernel.*unit 'composition'"):
            NullCalibrator().fit(composition)
        below = CompositionScore(baseline="difference").fit_transform(heads)
        with pytest.raises(ValueError, match="unit 'composition/difference'"):
            NullCalibrator(null="empirical").fit(below)


def test_empirical_null_tells_of_medians_that_still_move(monkeypatch):
    heads = skhead.load_heads("skhead/induction-2l")
    similarity = ProjectionKernel().fit_transform(heads)
    polish = partial(_nulls.median_polish, max_iter=1)
    monkeypatch.setattr(_nulls, "median_polish", polish)
    with pytest.warns(UserWarning, match="NullCalibrator: medians of the OQ pairs still moved"):
        NullCalibrator(null="empirical").fit(similarity)


def test_errors_of_a_law_name_the_estimator():
    heads = skhead.load_heads("skhead/induction-2l")

    class MyCalibrator(NullCalibrator):
        """Of a user."""

    similarity = ProjectionKernel().fit_transform(heads)
    with pytest.raises(HeadShapeError, match="MyCalibrator: covariance has shape"):
        MyCalibrator(null="anisotropic", covariance=np.eye(3)).fit(similarity)


def test_empirical_null_refuses_logarithms_of_nothing():
    X = np.random.default_rng(0).uniform(1, 2, (8, 8))
    X[2, 3] = 0
    with pytest.raises(HeadShapeError, match="XX of H2 and H3 is 0; use another null"):
        NullCalibrator(null="empirical", d_model=64, rank=8).fit(X)


def test_hub_is_found_by_permutation():
    weights = random_weights(n_layers=3, n_heads=8, d_model=64, d_head=8)
    for head in range(8):
        weights["blocks.2.attn.W_K"][head, :, :4] = weights["blocks.0.attn.W_O"][5, :4].T
    with registered(weights) as heads:
        similarity = ProjectionKernel(pairs=["OK"]).fit_transform(heads)
        classes = pd.Series("None", index=heads.index)
        classes["L0H5"] = "Hub"
    options = {"n_permutations": 299, "random_state": 0}
    hubs = head_permutation_test(similarity, "hub_degree", k=8, **options)
    assert hubs.index[0] == "L0H5" and hubs["statistic"].iloc[0] == 8
    assert hubs["adjusted_p_value"].iloc[0] < 0.01
    assert (hubs["adjusted_p_value"].iloc[1:] > 0.05).all()
    again = head_permutation_test(similarity, "hub_degree", k=8, **options)
    pd.testing.assert_frame_equal(hubs, again)
    edges = [("L0H5", f"L2H{i}") for i in range(8)]
    circuit = head_permutation_test(similarity, "edge_mean", edges=edges, **options)
    assert circuit.loc["edge_mean", "p_value"] < 0.01
    found = head_permutation_test(similarity, "average_precision", classes=classes, **options)
    assert found["statistic"].iloc[0] >= 0.5  # first, or level with the head it meets best
    nodes = head_permutation_test(similarity, "in_class_nodes", classes=classes, k=8, **options)
    assert nodes["statistic"].iloc[0] == 1


def test_permutation_test_of_distances_takes_the_smallest():
    with toy_heads(n_layers=2, n_heads=6) as heads:
        distance = GrassmannDistance(pairs=["OK"]).fit_transform(heads)
        kernel = ProjectionKernel(pairs=["OK"]).fit_transform(heads)
    classes = pd.Series("None", index=heads.index).mask(heads["head"] < 2, "Low")
    edges = kernel.top_pairs(3)[["source", "target"]].values.tolist()
    options = {"n_permutations": 99, "random_state": 0, "classes": classes, "edges": edges, "k": 4}
    for statistic in ("hub_degree", "in_class_nodes", "average_precision"):
        found, expected = (
            head_permutation_test(one, statistic, **options) for one in (distance, kernel)
        )
        pd.testing.assert_frame_equal(found, expected)
    circuit = head_permutation_test(distance, "edge_mean", **options)
    assert circuit["statistic"].iloc[0] == pytest.approx(
        np.sort(distance.values[~np.isnan(distance.values)])[:3].mean()
    )
    assert circuit["p_value"].iloc[0] == 0.01


def test_permutation_test_exchanges_no_heads_of_different_models():
    """One model is all similar, the other not at all: within each, no circuit stands out."""
    with toy_heads(n_layers=2) as first, toy_heads(n_layers=2, seed=1) as second:
        found = ProjectionKernel(pairs=["OK"]).fit_transform(pd.concat([first, second]))
    level = np.where(found.rows["source"] == first["source"].iloc[0], 2.0, 1.0)
    equal = np.where(np.isnan(found.values), np.nan, level[:, None, None]).astype(np.float32)
    found = replace(found, values=equal)
    edges = found.top_pairs(3)[["source", "target"]].values.tolist()
    circuit = head_permutation_test(
        found, "edge_mean", edges=edges, n_permutations=99, random_state=0
    )
    assert circuit["p_value"].iloc[0] == 1
    with pytest.raises(ValueError, match="exchange"):
        head_permutation_test(
            ProjectionKernel().fit_transform(np.random.default_rng(0).normal(size=(1, 4, 9, 3))),
            "hub_degree",
        )


@pytest.mark.parametrize(
    "statistic, options, message",
    [
        ("degree", {}, "statistic must be one of 'hub_degree'"),
        ("edge_mean", {}, "needs edges="),
        ("edge_mean", {"edges": [("L0H0", "L9H9")]}, "no head is called 'L9H9'"),
        ("edge_mean", {"edges": [("L0H0", "L1H1")]}, "choose one pair= of OQ, OK, OV"),
        ("edge_mean", {"edges": [("L0H0", "L1H1")], "pair": "QQ"}, "there is no pair 'QQ'"),
        ("in_class_nodes", {}, "needs classes="),
    ],
)
def test_permutation_test_refuses(statistic, options, message):
    with toy_heads() as heads:
        similarity = ProjectionKernel().fit_transform(heads)
    with pytest.raises(ValueError, match=f"head_permutation_test: .*{message}"):
        head_permutation_test(similarity, statistic, **options)


@pytest.mark.parametrize(
    "null, n_heads, reason",
    [
        ("empirical", 2, "OK pairs .* 20 finite values, got 12"),
        ("empirical", 1, "OK pairs .* 20 finite values, got 3"),
        ("anisotropic", 1, "OK pairs .*a group of one head"),
    ],
)
def test_too_few_heads_for_a_null(null, n_heads, reason):
    with toy_heads(n_layers=3, n_heads=n_heads) as heads:
        found = ProjectionKernel(pairs=["OK"]).fit_transform(heads)
        groups = "layer" if null == "anisotropic" else None
        with pytest.raises(ValueError, match=f"NullCalibrator: null='{null}' .* {reason}"):
            NullCalibrator(null=null, groups=groups).fit_transform(found)


@pytest.mark.parametrize("null", NULLS)
def test_rows_without_a_defined_pair_stay_undefined(null):
    with toy_heads(n_layers=3, n_heads=6) as heads:
        similarity = ProjectionKernel(pairs=["OK"]).fit_transform(heads)
        last = NullCalibrator(null=null).fit(similarity).transform(similarity[-6:])
    assert last.values.shape == (6, 18, 1) and np.isnan(last.values).all()


@pytest.mark.parametrize(
    "options",
    [
        {"null": "anisotropic"},
        {"null": "anisotropic", "covariance": np.eye(8)},
        {"null": "signflip"},
    ],
)
def test_heads_that_fill_the_space_have_no_law(options):
    with toy_heads(n_layers=2, n_heads=6, d_model=8, d_head=8) as heads:
        similarity = ProjectionKernel().fit_transform(heads)
        with pytest.raises(HeadShapeError, match="cannot vary"):
            NullCalibrator(**options).fit_transform(similarity)


def test_families_of_dependent_pairs_keep_the_false_discovery_rate():
    """Pairs share heads; over 500 models without structure, few have any rejection at 5%."""
    rng = np.random.default_rng(0)
    calls = 0
    for _ in range(500):
        bases = np.linalg.qr(rng.standard_normal((48, 64, 8)))[0]
        left, right = bases[:24].transpose(0, 2, 1), bases[24:].transpose(1, 0, 2)
        cross = left.reshape(192, 64) @ right.reshape(64, 192)
        kernels = np.square(cross).reshape(24, 8, 24, 8).sum(axis=(1, 3))
        law = NullCalibrator(d_model=64, rank=8, output="q", side="upper")
        calls += bool((law.fit_transform(kernels) < 0.05).any())
    assert calls / 500 <= 0.06


def test_precision_of_z():
    """Float32 bases against float64 ones, in null standard deviations."""
    stack = np.random.default_rng(0).standard_normal((40, 768, 64))
    wide, narrow = (
        np.asarray(NullCalibrator().fit_transform(ProjectionKernel().fit_transform(x)))
        for x in (stack.astype(np.float32).astype(np.float64), stack.astype(np.float32))
    )
    assert np.abs(wide - narrow).max() < 1e-4


def test_given_covariance():
    """An isotropic one is the Haar law; that of the heads' own background explains them."""
    weights = preferring(n_layers=2, n_heads=40, d_model=96, decay=1.5)
    with registered(weights) as heads:
        similarity = ProjectionKernel(pairs=["OQ"]).fit_transform(heads)
    laws = {
        "haar": NullCalibrator(side="upper"),
        "identity": NullCalibrator("anisotropic", side="upper", covariance=np.eye(96)),
        "own": NullCalibrator(
            "anisotropic", side="upper", covariance=np.diag(np.arange(1.0, 97) ** -1.5)
        ),
    }
    z = {name: law.fit_transform(similarity).values for name, law in laws.items()}
    np.testing.assert_allclose(z["identity"], z["haar"], rtol=0.03, atol=0.02)
    assert abs(np.nanmean(z["own"])) < 0.7 < 1 < np.nanmean(z["haar"])
    with pytest.raises(HeadShapeError, match="covariance has shape .* live in 96 dimensions"):
        NullCalibrator("anisotropic", covariance=np.eye(5)).fit(similarity)


def test_drawn_tails_follow_the_seed():
    X = np.random.default_rng(0).uniform(0.1, 0.6, (4, 4))
    same = [
        NullCalibrator(output="log_p", d_model=20, rank=2, random_state=seed).fit_transform(X)
        for seed in (3, 3, None)
    ]
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_allclose(same[0], same[2], atol=0.05)


def test_a_layer_of_one_head_cannot_be_judged_without_itself():
    with toy_heads(n_layers=2, n_heads=5) as heads:
        rows = heads.drop(index=["L1H1", "L1H2", "L1H3", "L1H4"])
        similarity = ProjectionKernel(pairs=["OQ"]).fit_transform(rows)
        with pytest.raises(ValueError, match="leav"):
            NullCalibrator("anisotropic", groups="layer").fit_transform(similarity)
