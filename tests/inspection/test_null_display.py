from __future__ import annotations

from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

import skhead
from skhead.exceptions import HeadShapeError
from skhead.inspection import NullDisplay


@pytest.fixture(scope="module")
def similarity():
    return skhead.ProjectionKernel().fit_transform(skhead.load_heads("skhead/induction-2l"))


@pytest.fixture(scope="module")
def calibrated(similarity):
    return skhead.NullCalibrator().fit_transform(similarity)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_panels_show_the_calibration(calibrated):
    display = NullDisplay.from_similarity(calibrated, pair="OK", bins=9)
    frame = calibrated.to_frame().query("pair == 'OK'")
    assert len(display.axes_) == 3
    heights = [bar.get_height() * bar.get_width() for bar in display.bars_]
    assert len(heights) == 9
    assert sum(heights) == pytest.approx(1.0)
    at, density = display.normal_.get_data()
    assert density.max() == pytest.approx((2 * np.pi) ** -0.5)
    assert np.trapezoid(density, at) == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(
        sorted(display.quantiles_.get_ydata()), sorted(-frame["log10_p"]), rtol=1e-6
    )
    called = frame[frame["q"] <= 0.05]
    np.testing.assert_allclose(sorted(display.called_.get_xdata()), sorted(called["ratio"]))
    assert len(display.others_.get_xdata()) == len(frame) - len(called)
    assert display.axes_[1].get_title() == "OK against the null 'haar'"


def test_quantiles_follow_the_diagonal_where_the_null_holds():
    rng = np.random.default_rng(0)
    heads = rng.normal(size=(40, 64, 6)).astype(np.float32)
    similarity = skhead.ProjectionKernel().fit_transform(heads)
    display = NullDisplay.from_similarity(skhead.NullCalibrator().fit_transform(similarity))
    expected, observed = display.quantiles_.get_data()
    # Unordered pairs of distinct heads, each once.
    assert len(expected) == 40 * 39 // 2
    middle = slice(len(expected) // 20, None)
    np.testing.assert_allclose(observed[middle], expected[middle], atol=0.25)
    assert len(display.called_.get_xdata()) == 0


def test_pairs_without_a_finite_value_are_not_drawn(calibrated):
    log10_p = calibrated.calibration.log10_p.copy()
    row, column = np.argwhere(~np.isnan(log10_p[:, :, 0]))[0]
    log10_p[row, column, 0] = -np.inf
    broken = replace(calibrated, calibration=replace(calibrated.calibration, log10_p=log10_p))
    assert len(NullDisplay.from_similarity(broken, pair="OQ").z) == 63
    log10_p[:, :, 0] = np.nan
    with pytest.raises(HeadShapeError, match=r"no OQ pair has finite values .* 'haar'; choose"):
        NullDisplay.from_similarity(broken, pair="OQ")


def test_given_axes_are_used(calibrated):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3)
    display = NullDisplay.from_similarity(calibrated, pair="OQ", axes=axes)
    assert display.figure_ is figure
    assert display.axes_.tolist() == axes.tolist()
    with pytest.raises(ValueError, match="draws on three axes, got 2"):
        display.plot(axes=axes[:2])


def test_wrong_input_is_refused(similarity, calibrated):
    with pytest.raises(ValueError, match=r"\(unit 'pk'\) is not calibrated; pass NullCalibrator"):
        NullDisplay.from_similarity(similarity, pair="OQ")
    with pytest.raises(HeadShapeError, match=r"holds OQ OK OV; say which one .* pair='OQ'"):
        NullDisplay.from_similarity(calibrated)
    with pytest.raises(HeadShapeError, match=r"holds OQ OK OV, not 'VV'"):
        NullDisplay.from_similarity(calibrated, pair="VV")
