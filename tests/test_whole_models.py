"""Kernels of whole models: the same numbers, computed once."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from toys import toy_heads

import skhead
from skhead import WholeModelSimilarity
from skhead.exceptions import HeadTableError

BUNDLED = "skhead/induction-2l"
KERNELS = [
    skhead.ProjectionKernel(pairs=("QQ", "OK"), layer_order="all"),
    skhead.ProjectionKernel(normalize="rank"),
    skhead.CompositionScore(fold_norm=True),
    make_pipeline(skhead.SubspaceExtractor(rank=4, center=True), skhead.GrassmannDistance()),
]


@pytest.fixture(scope="module")
def heads():
    return skhead.load_heads(BUNDLED)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
def test_parts_are_what_the_kernel_gives(kernel, heads):
    order = np.random.default_rng(0).permutation(len(heads))
    train, test = heads.iloc[order[:10]], heads.iloc[order[8:]]
    whole = WholeModelSimilarity(kernel).fit(train)
    direct = clone(kernel).fit(train)
    for table in (train, test, test.iloc[[0, 0]]):
        found, expected = whole.transform(table), direct.transform(table)
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-6)
        assert found.row_labels == expected.row_labels
        assert (found.unit, found.record) == (expected.unit, expected.record)
        np.testing.assert_array_equal(found.row_ranks, expected.row_ranks)
    names = direct[-1].get_feature_names_out() if hasattr(direct, "steps") else None
    names = direct.get_feature_names_out() if names is None else names
    assert whole.get_feature_names_out().tolist() == names.tolist()


def test_heads_of_several_models():
    with toy_heads(seed=1) as a, toy_heads(seed=2) as b:
        both = pd.concat([a, b])
        kernel = skhead.ProjectionKernel(pairs=["KK"], layer_order="all")
        whole = WholeModelSimilarity(kernel).fit(a)
        found = whole.transform(both.iloc[::3])
        expected = kernel.fit(a).transform(both.iloc[::3])
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)
        assert found.columns["source"].unique().tolist() == a["source"].unique().tolist()


def test_unequal_ranks_keep_their_expectations(heads):
    steps = make_pipeline(skhead.SubspaceExtractor(rank=0.6), skhead.ProjectionKernel())
    whole = WholeModelSimilarity(steps).fit(heads[::2]).transform(heads[1::2])
    direct = clone(steps).fit(heads[::2]).transform(heads[1::2])
    assert len(np.unique(whole.row_ranks)) > 1
    shape = whole.values.shape
    for name in ("null_mean", "null_sd"):
        np.testing.assert_allclose(
            np.broadcast_to(getattr(whole, name), shape),
            np.broadcast_to(getattr(direct, name), shape),
        )


def search(memory, heads, n_jobs=None):
    steps = make_pipeline(
        WholeModelSimilarity(
            make_pipeline(
                skhead.SubspaceExtractor(),
                skhead.ProjectionKernel(pairs=("QQ", "KK"), layer_order="all"),
            ),
            memory=memory,
        ),
        skhead.NullCalibrator(),
        LogisticRegression(),
    )
    grid = {
        "wholemodelsimilarity__estimator__subspaceextractor__fold_norm": [False, True],
        "nullcalibrator__null": ["haar", "empirical"],
        "logisticregression__C": [0.01, 1.0],
    }
    folds = StratifiedKFold(4)
    found = GridSearchCV(steps, grid, cv=folds, n_jobs=n_jobs, error_score="raise")
    return found.fit(heads, heads["layer"])


def test_a_grid_search_computes_each_kernel_once(heads, tmp_path):
    """8 candidates, 4 folds and a refit: two kernels."""
    with_memory = search(tmp_path, heads)
    assert len(list(tmp_path.rglob("output.pkl"))) == 2
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("output.pkl")}
    again = search(str(tmp_path), heads)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("output.pkl")} == stored
    parallel = search(str(tmp_path), heads, n_jobs=2)
    assert set(tmp_path.rglob("output.pkl")) == set(stored)
    plain = search(None, heads)
    for other in (again, parallel, plain):
        np.testing.assert_array_equal(
            with_memory.cv_results_["mean_test_score"], other.cv_results_["mean_test_score"]
        )
    assert sum(path.stat().st_size for path in stored) < 2e5


class ScaledKernel(skhead.ProjectionKernel):
    """A kernel with a parameter of its own."""

    def __init__(self, pairs=("KK",), layer_order="all", normalize=None, n_steps=1):
        super().__init__(pairs, layer_order, normalize)
        self.n_steps = n_steps

    def fit_transform(self, X, y=None):
        found = super().fit_transform(X)
        return replace(found, values=found.values * self.n_steps)


def test_every_parameter_counts_in_what_is_stored(heads, tmp_path):
    one, two = (
        WholeModelSimilarity(ScaledKernel(n_steps=n), memory=tmp_path).fit_transform(heads)
        for n in (1, 2)
    )
    np.testing.assert_array_equal(two.values, 2 * one.values)


def test_nothing_learned_comes_from_other_folds(heads):
    steps = make_pipeline(skhead.ProjectionKernel(), skhead.NullCalibrator())
    with pytest.raises(ValueError, match="plain Similarity of a kernel, got calibrated"):
        WholeModelSimilarity(steps).fit(heads)
    with pytest.raises(ValueError, match="plain Similarity of a kernel, got .*Subspaces"):
        WholeModelSimilarity(skhead.SubspaceExtractor()).fit(heads)
    with pytest.raises(ValueError, match="ends with one, got HeadClassifier"):
        WholeModelSimilarity(skhead.HeadClassifier()).fit(heads)


def test_clone_pickle_frames_and_representation(heads):
    whole = WholeModelSimilarity(skhead.ProjectionKernel(pairs=["KK"], layer_order="all"))
    fitted = clone(whole).fit(heads[:6])
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.transform(heads).values, fitted.transform(heads).values)
    frame = fitted.set_output(transform="pandas").transform(heads)
    assert frame.shape == (16, 6) and frame.columns[0] == "KK:L0H0"
    assert "WholeModelSimilarity" in fitted._repr_html_()


def test_bad_heads(heads):
    whole = WholeModelSimilarity(skhead.ProjectionKernel())
    with pytest.raises(HeadTableError, match="WholeModelSimilarity: expected a heads table"):
        whole.fit(np.zeros((3, 4, 2)))
    whole.fit(heads)
    stranger = heads.iloc[[0]].assign(head=12)
    with pytest.raises(
        HeadTableError, match="row L0H12 of the heads table does not exist in skhead/induction-2l"
    ):
        whole.transform(stranger)
