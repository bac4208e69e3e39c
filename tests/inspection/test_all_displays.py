"""What holds of every display."""

from __future__ import annotations

import inspect

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt
from sklearn.pipeline import make_pipeline

import skhead
from skhead import inspection
from skhead.datasets import load_payload_head, make_payload_retrieval
from skhead.exceptions import HeadShapeError, HeadTableError
from skhead.inspection import (
    AttributionDisplay,
    DistributionDisplay,
    FeatureScatterDisplay,
    HeadClassDisplay,
    HeadScoreDisplay,
    NullDisplay,
    SimilarityDisplay,
    SpectrumDisplay,
)

#: Panels of the displays that have several.
PANELS = {"HeadClassDisplay": 2, "NullDisplay": 3}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


class Stages:
    """Fitted estimators and what they make."""

    def __init__(self) -> None:
        self.heads = skhead.load_heads("skhead/induction-2l")
        self.kernel = skhead.ProjectionKernel(pairs=["OK"]).fit(self.heads)
        self.similarity = self.kernel.transform(self.heads)
        calibrator = skhead.NullCalibrator()
        self.calibrator = make_pipeline(
            skhead.SubspaceExtractor(), skhead.ProjectionKernel(pairs=["OK"]), calibrator
        ).fit(self.heads)
        head = load_payload_head("d16-r3-r5")
        task = make_payload_retrieval(300, embeddings=head.embeddings, random_state=0)
        self.pairs = task.pairs(head)
        self.decomposer = skhead.ContrastiveQKDecomposer().fit(self.pairs)
        self.scorer = skhead.CircuitScorer(scores=["ov_copying"]).fit(self.heads)
        every = skhead.ProjectionKernel(pairs=["KK"], layer_order="all").fit(self.heads)
        self.classes = np.where(self.heads["layer"] == 0, "early", "late")
        self.classifier = skhead.HeadClassifier().fit(every.transform(self.heads), self.classes)
        self.every = every.transform(self.heads)


@pytest.fixture(scope="module")
def stages():
    return Stages()


def constructors(stages):
    """Calls that draw each display: by its estimator, and from what the estimator made."""
    s = stages
    of = s.pairs[:20]
    coordinates = [
        side[:, :2] for side in (s.decomposer.transform(of), s.decomposer.transform_keys(of))
    ]
    labels = of.query_labels[:, 0], of.key_labels[:, 0]
    scores = s.classifier.decision_function(s.every)
    scores = np.column_stack([-scores, scores]) if scores.ndim == 1 else scores
    return {
        AttributionDisplay: (
            ("from_estimator", (s.decomposer, s.pairs, 3), {}),
            ("from_attribution", (s.decomposer.attribute(s.pairs), s.pairs, 3), {}),
        ),
        DistributionDisplay: (
            ("from_estimator", (s.kernel, s.heads), {}),
            ("from_similarity", (s.similarity,), {}),
        ),
        FeatureScatterDisplay: (
            ("from_estimator", (s.decomposer, of, "z1"), {}),
            ("from_coordinates", (*coordinates, *labels), {"feature": "z1", "head": of.head}),
        ),
        HeadClassDisplay: (
            ("from_estimator", (s.classifier, s.every, s.classes), {}),
            (
                "from_predictions",
                (s.classes, scores, s.classifier.classes_, s.classifier.predict(s.every)),
                {},
            ),
        ),
        HeadScoreDisplay: (
            ("from_estimator", (s.scorer, s.heads), {}),
            ("from_scores", (s.scorer.transform(s.heads)["ov_copying"], s.heads, "ov_copying"), {}),
        ),
        NullDisplay: (
            ("from_estimator", (s.calibrator, s.heads), {}),
            ("from_similarity", (s.calibrator.transform(s.heads),), {}),
        ),
        SimilarityDisplay: (
            ("from_estimator", (s.kernel, s.heads), {}),
            ("from_similarity", (s.similarity,), {}),
        ),
        SpectrumDisplay: (
            ("from_estimator", (s.decomposer,), {}),
            ("from_decompositions", (s.decomposer.decompositions_, s.decomposer.head_), {}),
        ),
    }


DISPLAYS = [getattr(inspection, name) for name in inspection.__all__]


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def test_every_display_is_tested(stages):
    assert set(constructors(stages)) == set(DISPLAYS)


@pytest.mark.parametrize("cls", DISPLAYS, ids=lambda cls: cls.__name__)
def test_both_roads_draw_the_same_picture(cls, stages):
    pictures = []
    for name, positional, named in constructors(stages)[cls]:
        display = getattr(cls, name)(*positional, **named)
        assert type(display) is cls
        pictures.append(pixels(display.figure_))
    np.testing.assert_array_equal(*pictures)
    assert pictures[0][..., :3].std() > 5


@pytest.mark.parametrize("cls", DISPLAYS, ids=lambda cls: cls.__name__)
def test_plot_draws_where_it_is_told_and_gives_the_display(cls, stages):
    name, positional, named = constructors(stages)[cls][0]
    display = getattr(cls, name)(*positional, **named)
    n_panels = PANELS.get(cls.__name__, 1)
    figure, axes = plt.subplots(1, n_panels, squeeze=False)
    n_figures = len(plt.get_fignums())
    if n_panels == 1:
        assert display.plot(ax=axes[0, 0]) is display
        assert display.ax_ is axes[0, 0]
    else:
        assert display.plot(axes=axes[0]) is display
        assert list(display.axes_) == list(axes[0])
    assert display.figure_ is figure
    assert len(plt.get_fignums()) == n_figures
    assert all(panel.has_data() for panel in axes[0])


@pytest.mark.parametrize("cls", DISPLAYS, ids=lambda cls: cls.__name__)
def test_init_stores_its_arguments_and_draws_nothing(cls):
    parameters = list(inspect.signature(cls).parameters)
    values = {name: object() for name in parameters}
    assert vars(cls(**values)) == values
    assert not plt.get_fignums()


def test_grid_has_each_score_in_its_place(stages):
    display = HeadScoreDisplay.from_estimator(stages.scorer, stages.heads)
    scores = stages.scorer.transform(stages.heads)["ov_copying"]
    for label, score in scores.items():
        row = stages.heads.loc[label]
        assert display.grid_.loc[row["layer"], row["head"]] == score
    assert display.im_.get_clim() == (-scores.abs().max(), scores.abs().max())


def test_grid_leaves_blank_what_is_not_there(stages):
    kept = stages.heads.drop(index=["L0H0", "L1H7"])
    kept = kept.assign(layer=kept["layer"] * 3, n_layers=4)
    display = HeadScoreDisplay.from_scores(np.arange(14.0), kept)
    assert list(display.grid_.index) == [0, 3]
    assert np.isnan(display.grid_.loc[0, 0]) and np.isnan(display.grid_.loc[3, 7])
    assert display.grid_.notna().to_numpy().sum() == 14


def test_class_affinity_is_drawn_of_a_similarity(stages):
    affinity = skhead.ClassAffinity().fit(stages.every, stages.classes)
    name = affinity.get_feature_names_out()[0]
    display = HeadScoreDisplay.from_estimator(affinity, stages.every, score=name)
    found = np.asarray(affinity.transform(stages.every))[:, 0]
    np.testing.assert_array_equal(display.grid_.to_numpy().ravel(), found)


@pytest.mark.parametrize(
    "draw, error, match",
    [
        (lambda s: SimilarityDisplay.from_estimator(s.scorer, s.heads), HeadShapeError, "kernel"),
        (lambda s: NullDisplay.from_estimator(s.kernel, s.heads), ValueError, "not calibrated"),
        (
            lambda s: HeadScoreDisplay.from_estimator(s.scorer, s.heads, "copying"),
            ValueError,
            "ov_copying, not 'copying'",
        ),
        (
            lambda s: HeadScoreDisplay.from_estimator(
                skhead.CircuitScorer(scores=["ov_norm", "qk_norm"]).fit(s.heads), s.heads
            ),
            ValueError,
            "score='ov_norm'",
        ),
        (lambda s: HeadScoreDisplay.from_scores([1.0], s.heads), HeadShapeError, "16 heads"),
        (
            lambda s: HeadScoreDisplay.from_scores(
                np.ones(32), pd.concat([s.heads, s.heads.assign(source="other")])
            ),
            HeadTableError,
            "one model, got 2",
        ),
        (lambda _: SpectrumDisplay.from_decompositions({}), ValueError, "at least one"),
        (
            lambda _: FeatureScatterDisplay.from_coordinates(
                np.ones((2, 3)), np.ones((2, 3)), [1, 2], [1, 2]
            ),
            HeadShapeError,
            "one or two coordinates",
        ),
        (
            lambda s: AttributionDisplay.from_attribution(
                s.decomposer.attribute(s.pairs[[1]]), s.pairs, 3
            ),
            ValueError,
            "0 keys of query 3",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, error, match, stages):
    with pytest.raises(error, match=match):
        draw(stages)
