"""Calibration curves: order kept, calibrated where scores are, cautious with a few positives."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from skhead.exceptions import HeadShapeError
from skhead.stats import fit_sigmoids


def test_finds_the_curve_that_made_the_labels():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20_000, 2))
    positive = rng.random(scores.shape) < expit(2.0 * scores + np.array([-1.0, 0.5]))
    slopes, intercepts = fit_sigmoids(scores, positive)
    np.testing.assert_allclose(slopes, 2.0, rtol=0.05)
    np.testing.assert_allclose(intercepts, [-1.0, 0.5], atol=0.06)


def test_scale_and_shift_of_scores_do_not_matter():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(200, 3))
    positive = rng.random(scores.shape) < expit(scores)
    slopes, intercepts = fit_sigmoids(scores, positive)
    again, moved = fit_sigmoids(scores * [2.0, 5.0, 0.1] + [1.0, -3.0, 7.0], positive)
    logits = scores * slopes + intercepts
    np.testing.assert_allclose(
        (scores * [2.0, 5.0, 0.1] + [1.0, -3.0, 7.0]) * again + moved, logits, atol=1e-3
    )


def test_scores_that_mislead_keep_their_order():
    scores = np.arange(20.0)[:, None]
    slopes, intercepts = fit_sigmoids(scores, scores < 10)
    probability = expit(scores * slopes + intercepts)
    assert (np.diff(probability[:, 0]) > 0).all()
    assert np.ptp(probability) < 0.01


def test_a_class_of_two_borrows_the_slope_and_not_the_rate():
    """Two heads that happen to score high do not make a class certain."""
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(100, 1))
    large = rng.random((100, 1)) < 0.4
    small = np.zeros((100, 1), dtype=bool)
    small[:2] = True
    lucky = noise.copy()
    lucky[:2] = 4.0
    alone = fit_sigmoids(lucky, small)
    together = fit_sigmoids(np.hstack([lucky, noise]), np.hstack([small, large]))
    at_four = [expit(4.0 * slopes[0] + intercepts[0]) for slopes, intercepts in (alone, together)]
    assert at_four[1] < 0.3 < at_four[0]
    mean = expit(lucky * together[0][0] + together[1][0]).mean()
    assert mean == pytest.approx(0.02, abs=0.015)


def test_refuses_what_does_not_fit():
    with pytest.raises(HeadShapeError, match=r"shapes \(3, 1\) and \(3, 2\)"):
        fit_sigmoids(np.zeros((3, 1)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="score 1 of class 0 is nan"):
        fit_sigmoids([[0.0], [np.nan], [1.0]], [[False], [True], [True]])
