"""Average precision of classes, and the scorer."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from skhead.exceptions import HeadShapeError
from skhead.metrics import (
    MacroAveragePrecision,
    class_average_precisions,
    macro_average_precision,
    macro_average_precision_score,
)

CLASSES = ["Induction", "Name Mover", "None"]


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    y = np.array(["None"] * 40 + ["Induction"] * 6 + ["Name Mover"] * 4, dtype=object)
    scores = rng.normal(size=(50, 3)) + 1.5 * (y[:, None] == np.array(CLASSES, dtype=object))
    return y, scores


def test_is_scikit_learns_average_precision_class_by_class(problem):
    y, scores = problem
    table = class_average_precisions(y, scores, CLASSES)
    assert table.index.tolist() == ["Induction", "Name Mover"]
    assert table["n_heads"].tolist() == [6, 4]
    assert table["base_rate"].tolist() == [0.12, 0.08]
    for k, name in enumerate(table.index):
        expected = average_precision_score(y == name, scores[:, k])
        assert table.loc[name, "average_precision"] == expected
    mean = table["average_precision"].mean()
    assert macro_average_precision_score(y, scores, CLASSES) == mean


def test_a_class_counts_the_same_whatever_its_size(problem):
    y, scores = problem
    before = macro_average_precision_score(y, scores, CLASSES)
    more = np.concatenate([y, y[40:46]])
    larger = np.vstack([scores, scores[40:46]])
    after = class_average_precisions(more, larger, CLASSES)
    assert after.loc["Induction", "n_heads"] == 12
    assert macro_average_precision_score(more, larger, CLASSES) == pytest.approx(
        (after.loc["Induction", "average_precision"] + after.loc["Name Mover", "average_precision"])
        / 2
    )
    assert 0 < before < 1


def test_a_class_without_a_column_scores_its_base_rate(problem):
    y, scores = problem
    table = class_average_precisions(y, scores[:, [0, 2]], ["Induction", "None"])
    assert table.loc["Name Mover", "average_precision"] == pytest.approx(0.08)
    assert table.loc["Name Mover", "roc_auc"] == 0.5


def test_multilabel_indicator(problem):
    y, scores = problem
    indicator = np.stack([y == "Induction", y == "Name Mover"], axis=1).astype(int)
    table = class_average_precisions(indicator, scores[:, :2], CLASSES[:2])
    expected = class_average_precisions(y, scores, CLASSES)
    assert table.equals(expected)


def test_scorer_ranks_by_any_score():
    rng = np.random.default_rng(1)
    y = np.repeat(["None", "Induction", "Name Mover"], [30, 6, 5])
    X = (
        rng.normal(size=(41, 4))
        + (y == "Induction")[:, None] * 3
        - (y == "Name Mover")[:, None] * 3
    )
    for model in (LogisticRegression(), LinearSVC()):
        assert macro_average_precision(model.fit(X, y), X, y) > 0.9
    only = MacroAveragePrecision(classes=("Induction",))
    model = DummyClassifier().fit(X, y)
    assert macro_average_precision(model, X, y) == pytest.approx((6 + 5) / 2 / 41)
    assert only(model, X, y) == pytest.approx(6 / 41)
    binary = y != "Name Mover"
    assert macro_average_precision(LogisticRegression().fit(X[binary], y[binary]), X, y) > 0.4


def test_scorer_in_cross_validation_and_pickled():
    rng = np.random.default_rng(2)
    y = np.repeat(["None", "Induction"], [30, 4])
    X = rng.normal(size=(34, 2)) + (y == "Induction")[:, None] * 4
    scorer = pickle.loads(pickle.dumps(MacroAveragePrecision(classes=("Induction",))))
    scores = cross_val_score(LogisticRegression(), X, y, cv=2, scoring=scorer, n_jobs=2)
    assert scores.min() > 0.9
    with pytest.raises(ValueError, match="none of the classes 'Name Mover' occurs"):
        MacroAveragePrecision(classes=("Name Mover",))(LogisticRegression().fit(X, y), X, y)


def test_refuses_what_does_not_fit(problem):
    y, scores = problem
    with pytest.raises(HeadShapeError, match=r"shape \(50, 3\), got \(49, 3\)"):
        class_average_precisions(y, scores[1:], CLASSES)
    with pytest.raises(
        HeadShapeError, match=r"indicator of shape \(50, 2\) does not fit 3 classes"
    ):
        class_average_precisions(np.zeros((50, 2)), scores, CLASSES)
    with pytest.raises(ValueError, match="no head has a class"):
        class_average_precisions(["None"] * 50, scores, CLASSES)
    with pytest.raises(ValueError, match="class_average_precisions: the label of head 7 is miss"):
        class_average_precisions([*y[:7], np.nan, *y[8:]], scores, CLASSES)
    with pytest.raises(ValueError, match=f"class {CLASSES[0]!r} has several columns"):
        class_average_precisions(y, scores, [CLASSES[0], *CLASSES[:2]])
    scores[3, 1] = np.nan
    with pytest.raises(ValueError, match="score of head 3 for class 'Name Mover' is nan"):
        class_average_precisions(y, scores, CLASSES)
