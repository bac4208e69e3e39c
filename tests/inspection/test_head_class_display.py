from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

mpl.use("Agg")

from skhead.exceptions import HeadShapeError
from skhead.inspection import HeadClassDisplay
from skhead.metrics import class_average_precisions

CLASSES = ["Induction", "Name Mover", "None"]


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    y = np.array(["None"] * 20 + ["Induction"] * 6 + ["Name Mover"] * 4, dtype=object)
    scores = rng.normal(size=(30, 3)) + 2 * (y[:, None] == np.array(CLASSES, dtype=object))
    return y, scores


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_shows_what_the_scores_say(problem):
    y, scores = problem
    display = HeadClassDisplay.from_predictions(y, scores, CLASSES)
    assert display.table_.equals(class_average_precisions(y, scores, CLASSES))
    assert set(display.curves_) == {"Induction", "Name Mover"}
    for name, curve in display.curves_.items():
        recall, precision = curve.get_data()
        steps = -np.diff(recall) * precision[:-1]
        expected = display.table_.loc[name, "average_precision"]
        assert steps.sum() == pytest.approx(expected)
        assert f"{expected:.2f}" in curve.get_label()
    best = np.array(CLASSES, dtype=object)[scores.argmax(axis=1)]
    assert display.confusion_.loc["Induction", "None"] == np.sum(
        (y == "Induction") & (best == "None")
    )
    assert display.confusion_.to_numpy().sum() == 30
    assert display.confusion_.index[-1] == "None"
    shown = np.asarray(display.image_.get_array())
    np.testing.assert_allclose(shown.sum(axis=1), 1.0)


def test_of_an_estimator(problem):
    y, scores = problem
    model = LogisticRegression().fit(scores, y)
    display = HeadClassDisplay.from_estimator(model, scores, y)
    expected = class_average_precisions(y, model.decision_function(scores), model.classes_)
    assert display.table_.equals(expected)
    two = y != "Name Mover"
    model = LogisticRegression().fit(scores[two], y[two])
    display = HeadClassDisplay.from_estimator(model, scores[two], y[two])
    assert display.table_.loc["Induction", "average_precision"] > 0.9


def test_draws_on_given_axes_and_checks(problem):
    import matplotlib.pyplot as plt

    y, scores = problem
    _, axes = plt.subplots(1, 2)
    display = HeadClassDisplay.from_predictions(y, scores, CLASSES, axes=axes)
    assert display.figure_ is axes[0].figure
    with pytest.raises(ValueError, match="draws on two axes, got 1"):
        display.plot(axes[:1])
    with pytest.raises(HeadShapeError, match=r"scores of shape \(30, 3\), got \(30, 2\)"):
        HeadClassDisplay.from_predictions(y, scores[:, :2], CLASSES)
    with pytest.raises(HeadShapeError, match=r"as many predictions, got shape \(29,\)"):
        HeadClassDisplay.from_predictions(y, scores, CLASSES, y[1:])
    with pytest.raises(
        HeadShapeError, match=r"one class of every head, got labels of shape \(2, 2"
    ):
        HeadClassDisplay.from_predictions(np.eye(2), np.eye(2), ["a", "b"], np.eye(2))
