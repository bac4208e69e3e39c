"""Out-of-fold scores, with labels as they are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneOut, ShuffleSplit, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from toys import toy_heads

import skhead
from skhead.exceptions import HeadShapeError
from skhead.metrics import cross_val_classes


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    y = np.repeat(["None", "Induction", "Name Mover"], [30, 6, 5])
    X = rng.normal(size=(41, 3)) + (y == "Induction")[:, None] * 2
    return X, y


@pytest.mark.parametrize("method", ["predict_proba", "decision_function"])
def test_is_cross_val_predict_where_labels_do_not_matter(problem, method):
    X, y = problem
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    found = cross_val_classes(LogisticRegression(), X, y, cv=folds, method=method, n_jobs=2)
    expected = cross_val_predict(LogisticRegression(), X, y, cv=folds, method=method)
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=1e-6)
    assert found.columns.tolist() == ["Induction", "Name Mover", "None"]


def test_the_unclassed_stay_unclassed():
    """scikit-learn's function hands the classifier numbers, among which it finds no "None"."""
    kernel = skhead.ProjectionKernel(pairs=["QQ"], layer_order="all")
    with toy_heads(n_layers=4, n_heads=6) as heads:
        y = heads["head"].map({0: "A", 1: "B"}).fillna("None")
        similarity = skhead.WholeModelSimilarity(kernel)
        seen = []

        class Spy(skhead.HeadClassifier):
            def fit(self, X, y):
                super().fit(X, y)
                seen.append(set(self.affinity_.columns.get_level_values("class")))
                return self

        found = cross_val_classes(make_pipeline(similarity, Spy()), heads, y, cv=2)
    assert seen == [{"A", "B"}] * 2
    assert found.index.tolist() == heads.index.tolist()
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_a_class_that_only_the_classifier_has_gets_a_column_of_its_own():
    """Its scores must not stand under the name of another class."""
    kernel = skhead.ProjectionKernel(pairs=["QQ", "KK"], layer_order="all")
    with toy_heads(n_layers=4, n_heads=4) as heads:
        y = np.repeat(["A", "B", "C"], [8, 6, 2])
        one = np.r_[0:4, 8:11, 14]
        other = np.setdiff1d(np.arange(16), one)
        steps = make_pipeline(kernel, skhead.HeadClassifier(rare="none"))
        with pytest.warns(UserWarning, match="'C' have fewer than 2 heads"):
            found = cross_val_classes(steps, heads, y, cv=[(one, other), (other, one)])
    assert found.columns.tolist() == ["A", "B", "C", "None"]
    assert (found["C"] == 0).all()
    assert (found["None"] > 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_a_class_that_a_fold_lacks(problem):
    X, y = problem
    lonely = y.copy()
    lonely[0] = "Odd"
    folds = [(np.arange(20, 41), np.arange(20)), (np.arange(20), np.arange(20, 41))]
    found = cross_val_classes(DummyClassifier(), X, lonely, cv=folds)
    assert (found["Odd"].iloc[:20] == 0).all() and (found["Odd"].iloc[20:] > 0).all()
    scores = cross_val_classes(
        LogisticRegression(), X[:36], y[:36], cv=3, method="decision_function"
    )
    assert (scores["None"] == -scores["Induction"]).all()


def test_refuses_folds_and_labels_that_do_not_fit(problem):
    X, y = problem
    with pytest.raises(ValueError, match="is tested in"):
        cross_val_classes(DummyClassifier(), X, y, cv=ShuffleSplit(3, random_state=0))
    with pytest.raises(HeadShapeError, match=r"41 heads need as many labels, got shape \(40,\)"):
        cross_val_classes(DummyClassifier(), X, y[1:], cv=LeaveOneOut())
    with pytest.raises(ValueError, match="method must be one of predict_proba, decision_function"):
        cross_val_classes(DummyClassifier(), X, y, cv=2, method="predict")
    assert isinstance(cross_val_classes(DummyClassifier(), X, list(y), cv=2), pd.DataFrame)
