"""Classes of heads: planted ones are found, and nothing leaks."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import softmax
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedKFold,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from toys import random_weights, registered, toy_heads

import skhead
from skhead import ClassAffinity, HeadClassifier
from skhead.exceptions import HeadShapeError, ProvenanceMismatchError
from skhead.metrics import macro_average_precision

SAME_ROLE = ("QQ", "KK", "VV", "OO")


def planted(n_layers=6, n_heads=8, seed=0):
    """A model in which the first heads of every layer are of two classes, alike in one role each.

    "Reader" heads share part of what their queries read, "Writer" heads part of what they write.
    """
    tensors = random_weights(n_layers=n_layers, n_heads=n_heads, d_model=40, d_head=6, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    common = torch.randn(2, 40, 3, generator=generator) * 2
    for layer in range(n_layers):
        tensors[f"blocks.{layer}.attn.W_Q"][0, :, :3] += common[0]
        tensors[f"blocks.{layer}.attn.W_O"][1, :3] += common[1].T
    return tensors


def classes_of(heads):
    return heads["head"].map({0: "Reader", 1: "Writer"}).fillna("None")


@pytest.fixture(scope="module")
def heads():
    with registered(planted()) as table:
        yield table


@pytest.fixture(scope="module")
def y(heads):
    return classes_of(heads)


def pipeline(**options):
    kernel = skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all")
    return make_pipeline(skhead.SubspaceExtractor(), kernel, HeadClassifier(**options))


@pytest.fixture(scope="module")
def similarity(heads):
    kernel = skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all")
    return kernel.fit_transform(heads)


FOLDS = StratifiedKFold(3, shuffle=True, random_state=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregate": "max"},
        {"aggregate": "topk", "k": 2, "features": "all"},
        {"contrast": False},
        {"estimator": LogisticRegression(class_weight="balanced")},
        {"estimator": RandomForestClassifier(50, random_state=0), "features": "all"},
    ],
)
def test_planted_classes_are_found_in_unseen_heads(heads, y, options):
    scores = cross_val_score(
        pipeline(**options), heads, y, cv=FOLDS, scoring=macro_average_precision,
        error_score="raise",
    )  # fmt: skip
    assert scores.mean() > 0.9


def test_weights_name_the_role_that_was_planted(similarity, y):
    model = HeadClassifier().fit(similarity, y)
    assert model.coef_.loc["Reader"].idxmax() == "QQ"
    assert model.coef_.loc["Writer"].idxmax() == "OO"
    assert (model.coef_.to_numpy() >= 0).all()
    assert model.classes_.tolist() == ["None", "Reader", "Writer"]


def test_shuffled_labels_score_at_chance(heads, y):
    rng = np.random.default_rng(0)
    scores = [
        cross_val_score(
            pipeline(), heads, rng.permutation(y.to_numpy()), cv=FOLDS,
            scoring=macro_average_precision, error_score="raise",
        ).mean()
        for _ in range(12)
    ]  # fmt: skip
    chance = 6 / 48
    assert chance - 0.05 < np.mean(scores) < chance + 0.15


def test_probabilities_are_calibrated(heads, y):
    model = pipeline()
    found = cross_val_predict(model, heads, y, cv=FOLDS, method="predict_proba")
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    names = np.unique(y)
    shares = pd.Series(found.mean(axis=0), names)
    assert shares["Reader"] == pytest.approx(6 / 48, abs=0.07)
    truth = (y.to_numpy()[:, None] == names).astype(float)
    brier = ((found - truth) ** 2).sum(axis=1).mean()
    prior = truth.mean(axis=0)
    assert brier < 0.5 * ((prior - truth) ** 2).sum(axis=1).mean()
    rng = np.random.default_rng(1)
    noise = rng.permutation(y.to_numpy())
    guessed = cross_val_predict(model, heads, noise, cv=FOLDS, method="predict_proba")
    off = (noise[:, None] == names).astype(float)
    assert ((guessed - off) ** 2).sum(1).mean() < 1.25 * ((prior - off) ** 2).sum(1).mean()


def test_a_training_head_is_never_compared_with_itself(heads, y, similarity):
    """A head that is given again gets the scores that leaving it out gave."""
    model = HeadClassifier().fit(similarity, y)
    values = similarity.values.copy()
    own = np.eye(len(heads), dtype=bool)
    values[own] = 1e3
    tainted = replace(similarity, values=values)
    np.testing.assert_array_equal(
        model.decision_function(tainted), model.decision_function(similarity)
    )
    again = HeadClassifier().fit(tainted, y)
    np.testing.assert_array_equal(
        again.decision_function(similarity), model.decision_function(similarity)
    )


def test_a_duplicate_in_the_test_set_scores_through_others(heads, y):
    """Training heads given as test heads score as their leave-one-out affinities say."""
    train = np.arange(len(heads)) % 3 != 0
    kernel = skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all").fit(heads[train])
    model = HeadClassifier().fit(kernel.transform(heads[train]), y[train])
    label = heads.index[train][0]
    twice = pd.concat([heads.loc[[label]]] * 2)
    given = model.decision_function(kernel.transform(twice))
    np.testing.assert_array_equal(given[0], given[1])
    affinity = ClassAffinity().fit(kernel.transform(heads[train]), y[train])
    np.testing.assert_allclose(
        affinity.transform(kernel.transform(twice))[0], affinity.affinity_.loc[label], rtol=1e-6
    )


def test_references_and_calibration_come_from_the_training_fold(heads, y):
    """Test heads may be anything: what was fitted does not change."""
    train, test = np.arange(len(heads)) % 3 != 0, np.arange(len(heads)) % 3 == 0
    steps = make_pipeline(
        skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all"),
        skhead.NullCalibrator(null="empirical"),
        HeadClassifier(),
    )
    steps.fit(heads[train], y[train])
    assert steps[0].reference_heads_.index.tolist() == heads.index[train].tolist()
    one = steps.predict_proba(heads[test].iloc[:1])
    many = steps.predict_proba(heads[test])
    np.testing.assert_allclose(one[0], many[0], rtol=1e-6)


def test_permuting_heads_permutes_predictions(heads, y):
    order = np.random.default_rng(3).permutation(len(heads))
    a = pipeline().fit(heads, y).decision_function(heads)
    b = pipeline().fit(heads.iloc[order], y.iloc[order]).decision_function(heads)
    np.testing.assert_allclose(a, b, atol=0.35)
    assert np.corrcoef(a[:, 1], b[:, 1])[0, 1] > 0.999


def test_explanation_adds_up(similarity, y):
    for options in ({}, {"aggregate": "max"}, {"aggregate": "topk", "contrast": False}):
        model = HeadClassifier(**options).fit(similarity, y)
        scores = pd.DataFrame(model.decision_function(similarity), y.index, model.classes_)
        for label in ("L2H0", "L3H5"):
            told = model.explain(label)
            total = told.groupby("class")["contribution"].sum() + model.intercept_
            for name in ("Reader", "Writer"):
                assert total[name] == pytest.approx(scores.loc[label, name], abs=1e-5)
            assert label not in set(told["reference"])
            assert told["contribution"].abs().is_monotonic_decreasing
    told = HeadClassifier().fit(similarity, y).explain("L2H0")
    best = told[told["class"] == "Reader"].iloc[0]
    assert best["pair"] == "QQ" and best["member"] and best["reference"].endswith("H0")


def test_explanation_of_new_heads_and_of_other_models(heads, y):
    train, test = np.arange(len(heads)) % 3 != 0, np.arange(len(heads)) % 3 == 0
    kernel = skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all").fit(heads[train])
    new = kernel.transform(heads[test])
    model = HeadClassifier(estimator=LogisticRegression())
    model.fit(kernel.transform(heads[train]), y[train])
    told = model.explain(new.row_labels[0], new)
    assert "contribution" not in told and model.coef_ is None
    affinity = ClassAffinity().fit(kernel.transform(heads[train]), y[train]).transform(new)[0]
    total = told[told["class"] == "Reader"].groupby("pair")["affinity"].sum()
    np.testing.assert_allclose(total[list(SAME_ROLE)], affinity[:4], atol=1e-6)
    with pytest.raises(ValueError, match="no head 'L9H9' among 16 heads"):
        model.explain("L9H9", new)
    flat = HeadClassifier().fit(np.asarray(new), y[test])
    with pytest.raises(ValueError, match="fitted on a 2-D matrix"):
        flat.explain(0)


def test_affinities_as_features_beside_others(heads, y):
    """As in target encoding, training features leave the head out and test features need not."""
    norms = FunctionTransformer(lambda table: table[["layer"]].to_numpy(dtype=float))
    affinity = make_pipeline(
        skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all"), ClassAffinity()
    )
    both = FeatureUnion([("affinity", affinity), ("layer", norms)])
    model = make_pipeline(both, StandardScaler(), HeadClassifier())
    scores = cross_val_score(
        model, heads, y, cv=FOLDS, scoring=macro_average_precision, error_score="raise"
    )
    assert scores.mean() > 0.85
    affinity[-1].set_output(transform="pandas")
    shown = affinity.fit_transform(heads, y)
    assert shown.columns[:2].tolist() == ["Reader:QQ", "Reader:KK"]
    assert shown.index.tolist() == heads.index.tolist()


def test_grid_search_in_parallel(tmp_path):
    save_file(planted(), tmp_path / "planted.safetensors")
    heads = skhead.load_heads(tmp_path / "planted.safetensors")
    steps = Pipeline(
        [
            ("subspaces", skhead.SubspaceExtractor()),
            ("kernel", skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all")),
            ("null", skhead.NullCalibrator()),
            ("classes", HeadClassifier()),
        ],
        memory=str(tmp_path / "cache"),
    )
    grid = {"subspaces__rank": [None, 3], "classes__aggregate": ["mean", "max"]}
    search = GridSearchCV(
        steps, grid, cv=FOLDS, scoring=macro_average_precision, n_jobs=2, error_score="raise"
    ).fit(heads, classes_of(heads))
    assert search.best_score_ > 0.9
    # Three folds and the refit, two ranks, three steps; candidates that differ in the last share.
    stored = len(list(tmp_path.rglob("output.pkl")))
    assert stored == 3 * 2 * 3 + 3


def test_multilabel(similarity, heads):
    y = pd.DataFrame(
        {"Reader": heads["head"] == 0, "Early": (heads["head"] == 0) & (heads["layer"] < 3)}
    )
    model = HeadClassifier().fit(similarity, y.astype(int))
    assert model.classes_.tolist() == ["Reader", "Early"]
    assert model.predict(similarity).shape == (48, 2)
    found = model.predict_proba(similarity)
    assert (found[y["Reader"].to_numpy(), 0].mean() > 0.6) and (found <= 1).all()
    assert (model.predict(similarity) == (found > 0.5)).all()


def test_columns_of_an_indicator_name_the_classes_of_a_matrix_too():
    rng = np.random.default_rng(0)
    y = pd.DataFrame({"Reader": [1, 0] * 8, "Writer": [0, 0, 1, 1] * 4})
    classifier = HeadClassifier().fit(rng.normal(size=(16, 4)), y)
    assert classifier.classes_.tolist() == list(classifier.models_) == ["Reader", "Writer"]


def test_two_classes_without_unclassed_heads(similarity, heads):
    y = np.where(heads["layer"] < 3, "early", "late")
    model = HeadClassifier().fit(similarity, y)
    score = model.decision_function(similarity)
    assert score.shape == (48,)
    assert ((score > 0) == (model.predict(similarity) == "late")).all()
    np.testing.assert_allclose(model.predict_proba(similarity).sum(1), 1)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_probabilities_of_classes_that_share_all_heads(n_classes):
    """One verdict a class says the same thing twice, which must not count twice."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(4000, n_classes - 1))
    truth = softmax(np.column_stack([np.zeros(len(X)), X]), axis=1)
    drawn = (rng.random(len(X))[:, None] > truth.cumsum(axis=1)).sum(axis=1)
    found = HeadClassifier().fit(X, drawn).predict_proba(X)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert np.abs(found - truth).mean() < 0.03
    assert found.max(axis=1).mean() == pytest.approx(truth.max(axis=1).mean(), abs=0.02)


def test_far_scores_keep_probabilities_defined():
    X = np.array([[-1.0], [-0.5], [0.5], [1.0]])
    model = HeadClassifier().fit(X, ["a", "a", "b", "b"])
    np.testing.assert_allclose(model.predict_proba([[-1e9], [1e9]]), [[1, 0], [0, 1]])


def test_clone_pickle_and_representation(similarity, y):
    model = HeadClassifier(alpha=10.0).fit(similarity, y)
    assert clone(model).get_params() == model.get_params()
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(
        again.decision_function(similarity), model.decision_function(similarity)
    )
    assert again.explain("L2H0").equals(model.explain("L2H0"))
    assert "HeadClassifier" in model._repr_html_()


def test_single_heads_of_a_class(similarity, y):
    lonely = y.copy()
    lonely["L4H6"] = "Odd"
    with pytest.raises(ValueError, match=r"class 'Odd' has one head \(L4H6\).*rare='none'"):
        HeadClassifier().fit(similarity, lonely)
    with pytest.warns(
        UserWarning, match="'Odd' have fewer than 2 heads each, which count as 'None'"
    ):
        model = HeadClassifier(rare="none").fit(similarity, lonely)
    assert "Odd" not in model.classes_
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = HeadClassifier().fit(similarity, y)
    np.testing.assert_array_equal(
        model.decision_function(similarity), plain.decision_function(similarity)
    )


def test_bad_labels(similarity, y):
    with pytest.raises(ValueError, match=r"48 heads need as many labels, got y of shape \(47,\)"):
        HeadClassifier().fit(similarity, y[1:])
    with pytest.raises(ValueError, match="needs heads of two classes at least, got one class"):
        HeadClassifier().fit(similarity, ["Reader"] * 48)
    with pytest.raises(ValueError, match="needs heads of two classes at least, got one class"):
        HeadClassifier().fit(similarity, ["None"] * 48)
    missing = y.copy().astype(object)
    missing["L1H3"] = None
    with pytest.raises(ValueError, match="HeadClassifier: .*the label of L1H3 is missing"):
        HeadClassifier().fit(similarity, missing)
    with pytest.raises(ValueError, match="Unknown label type"):
        HeadClassifier().fit(similarity, np.linspace(0, 1, 48))
    with pytest.raises(ValueError, match="requires y to be passed"):
        HeadClassifier().fit(similarity, None)
    with pytest.raises(ValueError, match="HeadClassifier: class 1 has 1 of the heads, and needs 2"):
        HeadClassifier().fit(
            similarity, np.stack([y == "Reader", y.index == "L0H0"], 1).astype(int)
        )


def test_bad_similarities(heads, y, similarity):
    train = np.arange(len(heads)) % 3 != 0
    kernel = skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all").fit(heads[train])
    with pytest.raises(HeadShapeError, match="training head L0H0 is not among the reference heads"):
        HeadClassifier().fit(kernel.transform(heads), y)
    with pytest.raises(HeadShapeError, match="reference head L0H1 is not among the rows"):
        HeadClassifier().fit(kernel.transform(heads[~train]), y[~train])
    model = HeadClassifier().fit(kernel.transform(heads[train]), y[train])
    with pytest.raises(ProvenanceMismatchError, match="to 32 training heads, and these are to 48"):
        model.predict(similarity)
    calibrated = skhead.NullCalibrator().fit_transform(kernel.transform(heads[train]))
    with pytest.raises(ProvenanceMismatchError, match="unit 'pk', and these have 'z'"):
        model.predict(calibrated)
    with pytest.raises(HeadShapeError, match="fitted on a Similarity, and this is a ndarray"):
        model.predict(np.zeros((3, 4)))
    flat = HeadClassifier().fit(np.asarray(similarity), y)
    with pytest.raises(HeadShapeError, match="fitted on a 2-D matrix, and this is a Similarity"):
        flat.predict(similarity)


def test_bad_features_and_options(similarity, y):
    features = np.asarray(similarity).astype(float)
    features[3, 5] = np.nan
    with pytest.raises(ValueError, match="HeadClassifier does not accept missing values"):
        HeadClassifier().fit(features, y)
    with pytest.raises(ValueError, match="aggregate must be one of 'mean', 'max', 'topk'"):
        HeadClassifier(aggregate="sum").fit(similarity, y)
    with pytest.raises(ValueError, match="features must be one of 'own', 'all'"):
        HeadClassifier(features="each").fit(similarity, y)
    with pytest.raises(ValueError, match="rare must be one of"):
        HeadClassifier(rare="drop").fit(similarity, y)
    with pytest.raises(HeadShapeError, match="expected a Similarity.*got ndarray"):
        ClassAffinity().fit(features, y)


def test_no_heads_and_positions_that_are_none(similarity, y):
    nobody = similarity[np.arange(0)]
    assert ClassAffinity().fit(similarity, y).transform(nobody).shape == (0, 8)
    model = HeadClassifier().fit(similarity, y)
    with pytest.raises(ValueError, match=r"0 sample\(s\)"):
        model.predict(nobody)
    assert model.explain(np.int64(3)).equals(model.explain(3))
    for head in (1.5, None, 48):
        with pytest.raises(ValueError, match=rf"no head {head!r} among 48 heads"):
            model.explain(head)


def test_heads_of_different_widths_make_no_similarity():
    with toy_heads(d_model=24) as narrow, toy_heads(d_model=32, seed=1) as wide:
        both = pd.concat([narrow, wide])
        with pytest.raises(HeadShapeError, match="d_model"):
            pipeline().fit(both, classes_of(both))


def test_data_frames_between_the_steps_change_nothing(heads, y):
    """With pandas output everywhere, the steps still know that these are similarities."""
    steps = make_pipeline(
        skhead.SubspaceExtractor(),
        skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all"),
        skhead.NullCalibrator(),
        HeadClassifier(),
    )
    train = np.arange(len(heads)) % 3 != 0
    expected = clone(steps).fit(heads[train], y[train]).decision_function(heads[~train])
    steps.set_output(transform="pandas").fit(heads[train], y[train])
    assert steps[-1].affinity_ is not None
    np.testing.assert_array_equal(steps.decision_function(heads[~train]), expected)
    frame = steps[:-1].transform(heads[~train])
    assert frame.columns[0] == "QQ:L0H1"
    with pytest.raises(HeadShapeError, match="fitted on a Similarity, and this is a DataFrame"):
        steps[-1].predict(frame + 1.0)


def test_heads_of_another_model_share_no_directions(heads, y):
    kernel = skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all").fit(heads)
    model = HeadClassifier().fit(kernel.transform(heads), y)
    with toy_heads(d_model=40, d_head=6, seed=9) as others:
        similarity = kernel.transform(others)
    with pytest.warns(UserWarning, match="HeadClassifier: toy-.* is not among the models of the"):
        model.predict(similarity)


def test_a_forward_kernel_leaves_much_undefined(heads, y):
    similarity = skhead.ProjectionKernel().fit_transform(heads)
    with pytest.warns(UserWarning, match=r"HeadClassifier: \d+% of the affinities .* undefined"):
        HeadClassifier().fit(similarity, y)


def test_too_few_heads_outside_a_class(similarity):
    everybody = np.where(np.arange(48) == 5, "None", "Reader")
    with pytest.raises(ValueError, match="47 of 48 heads are of class 'Reader'; to tell it from"):
        HeadClassifier().fit(similarity, everybody)
