"""Heads in scikit-learn's pipelines, cross-validation and grid search."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    StratifiedKFold,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler
from toys import toy_heads

import skhead
from skhead import CompositionScore, ProjectionKernel, SubspaceExtractor
from skhead.similarities import (
    GrassmannDistance,
    LinearCKA,
    ProcrustesSimilarity,
    SimpleComposition,
)
from skhead.spectra import SpectrumSimilarity

BUNDLED = "skhead/induction-2l"
ESTIMATORS = [
    SubspaceExtractor(roles="OK", rank=0.9, fold_norm=True),
    ProjectionKernel(pairs=("VO",), layer_order="all", normalize="cosine"),
    CompositionScore(pairs=("OV",), baseline="ratio", center=True),
    ProcrustesSimilarity(pairs=("OO",), layer_order="all", fold_norm=True),
    LinearCKA(pairs=("KK",), center=True),
    SimpleComposition(pairs=("VO",), max_memory="10MB"),
    GrassmannDistance(pairs=("QK",), metric="geodesic", output="similarity"),
    SpectrumSimilarity(pairs=("OVOV", "QQ"), fold_norm=True),
]


@pytest.fixture(scope="module")
def heads():
    return skhead.load_heads(BUNDLED)


def pipeline(**options):
    kernel = ProjectionKernel(pairs=("OQ", "OK", "QQ", "VO"), layer_order="all")
    return make_pipeline(
        SubspaceExtractor(), kernel, StandardScaler(), LogisticRegression(), **options
    )


def test_grid_search_over_processing_and_normalisation(heads):
    y = heads["layer"].to_numpy()
    grid = {
        "subspaceextractor__fold_norm": [False, True],
        "subspaceextractor__center": [False, True],
        "projectionkernel__normalize": [None, "rank", "cosine"],
    }
    search = GridSearchCV(
        pipeline(), grid, cv=StratifiedKFold(4), n_jobs=2, error_score="raise"
    ).fit(heads, y)
    assert len(search.cv_results_["params"]) == 12
    assert search.best_score_ > 0.8
    assert search.predict(heads).shape == (16,)


def test_raw_folded_and_centred_are_different_statistics(heads):
    values = {
        (fold, center): SubspaceExtractor(fold_norm=fold, center=center).fit_transform(heads)
        for fold in (False, True)
        for center in (False, True)
    }
    kernel = ProjectionKernel()
    found = [np.asarray(kernel.fit_transform(subspaces)) for subspaces in values.values()]
    for i in range(4):
        for j in range(i):
            assert np.abs(found[i] - found[j]).max() > 1e-4


def test_chance_labels_score_at_chance(heads):
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    scores = [
        cross_val_score(
            pipeline(), heads, np.random.default_rng(seed).permutation(16) % 2, cv=folds
        )
        for seed in range(5)
    ]
    assert 0.3 < np.mean(scores) < 0.7


def test_cross_validation_across_models():
    """A fold's references come from the training models alone."""
    with toy_heads(seed=1) as a, toy_heads(seed=2) as b, toy_heads(seed=3) as c:
        heads = pd.concat([a, b, c])
        found = cross_validate(
            pipeline(), heads, heads["layer"], groups=heads["source"], cv=GroupKFold(3),
            error_score="raise", return_estimator=True, return_indices=True,
        )  # fmt: skip
    assert len(found["estimator"]) == 3
    for fitted, test in zip(found["estimator"], found["indices"]["test"], strict=True):
        tested = set(heads["source"].iloc[test])
        assert len(tested) == 1
        assert not tested & set(fitted[1].reference_heads_["source"])


def test_cached_steps_are_found_again(heads, tmp_path):
    """The memory hits because tables and containers hash by content."""
    first = pipeline(memory=str(tmp_path)).fit(heads, heads["layer"])
    count = len(list(tmp_path.rglob("output.pkl")))
    assert count == 3
    anew = skhead.load_heads(BUNDLED)
    again = pipeline(memory=str(tmp_path)).fit(anew, anew["layer"])
    assert len(list(tmp_path.rglob("output.pkl"))) == count
    np.testing.assert_array_equal(first.predict_proba(heads), again.predict_proba(heads))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_clone_pickle_and_representation(estimator, heads):
    copy = clone(estimator)
    assert copy.get_params() == estimator.get_params()
    fitted = copy.fit(heads)
    again = pickle.loads(pickle.dumps(fitted))
    first, second = (e.transform(heads) for e in (fitted, again))
    if isinstance(estimator, SubspaceExtractor):
        first, second = first.numpy("O"), second.numpy("O")
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert type(estimator).__name__ in repr(estimator)
    assert type(estimator).__name__ in fitted._repr_html_()


def test_set_output_on_a_whole_pipeline(heads):
    steps = make_pipeline(SubspaceExtractor(), ProjectionKernel()).set_output(transform="pandas")
    frame = steps.fit_transform(heads)
    assert frame.index.tolist() == heads.index.tolist()
    assert frame.columns[0] == "OQ:L0H0"
    with config_context(transform_output="pandas"):
        same = make_pipeline(SubspaceExtractor(), ProjectionKernel()).fit_transform(heads)
    assert frame.equals(same)


def test_kernels_side_by_side_in_a_union(heads):
    """Several similarities of the same heads as one feature matrix, in a search over both."""
    kinds = ("OQ", "VO")
    union = make_union(
        LinearCKA(pairs=kinds, layer_order="all"),
        GrassmannDistance(pairs=kinds, layer_order="all", metric="procrustes"),
        SpectrumSimilarity(pairs=("QKOV",)),
    )
    steps = make_pipeline(union, StandardScaler(), LogisticRegression())
    grid = {"featureunion__linearcka__center": [False, True]}
    search = GridSearchCV(steps, grid, cv=StratifiedKFold(4), error_score="raise")
    search.fit(heads, heads["layer"])
    assert search.best_score_ > 0.7
    assert union.fit_transform(heads).shape == (16, 5 * 16)
    frame = union.set_output(transform="pandas").fit_transform(heads)
    assert frame.index.tolist() == heads.index.tolist()
    assert frame.columns[[0, 32, 64]].tolist() == [
        "linearcka__OQ:L0H0",
        "grassmanndistance__OQ:L0H0",
        "spectrumsimilarity__QKOV:L0H0",
    ]


def test_spectra_classify_heads_of_models_without_a_common_basis():
    """Trained on two models, applied to a third of another width."""
    with toy_heads(seed=1) as a, toy_heads(seed=2) as b, toy_heads(d_model=32, seed=3) as c:
        heads = pd.concat([a, b, c])
        steps = make_pipeline(SpectrumSimilarity(pairs=("QKOV",)), LogisticRegression())
        scores = cross_val_score(
            steps, heads, heads["layer"], groups=heads["source"], cv=GroupKFold(3),
            error_score="raise",
        )  # fmt: skip
    assert np.isfinite(scores).all()


def test_pipeline_shows_as_html(heads):
    html = pipeline().fit(heads, heads["layer"])._repr_html_()
    assert "SubspaceExtractor" in html and "ProjectionKernel" in html
