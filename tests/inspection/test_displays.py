from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

import skhead
from skhead.exceptions import HeadShapeError
from skhead.inspection import DistributionDisplay, SimilarityDisplay


@pytest.fixture(scope="module")
def similarity():
    return skhead.ProjectionKernel().fit_transform(skhead.load_heads("skhead/induction-2l"))


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_import_does_not_start_pyplot():
    code = "import sys, skhead.inspection; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_matrix_shows_the_values(similarity):
    display = SimilarityDisplay.from_similarity(similarity, pair="OV")
    shown = np.ma.filled(display.im_.get_array(), np.nan)
    np.testing.assert_array_equal(shown, similarity.values[:, :, 2])
    assert display.ax_.get_title() == "OV"
    assert [tick.get_text() for tick in display.ax_.get_yticklabels()] == ["L0", "L1"]
    assert list(display.ax_.get_yticks()) == [0.0, 8.0]


def test_matrix_draws_on_given_axes_and_passes_options(similarity):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    display = SimilarityDisplay.from_similarity(
        similarity, pair="OQ", ax=axes, im_kw={"cmap": "magma"}
    )
    assert display.ax_ is axes
    assert display.figure_ is figure
    assert display.im_.get_cmap().name == "magma"


def test_plot_of_a_similarity_is_the_display(similarity):
    assert isinstance(similarity.plot(pair="OK"), SimilarityDisplay)


def test_matrix_wants_one_pair_kind(similarity):
    with pytest.raises(HeadShapeError, match=r"holds OQ OK OV; say which one .* pair='OQ'"):
        SimilarityDisplay.from_similarity(similarity)
    with pytest.raises(HeadShapeError, match=r"holds OQ OK OV, not 'VV'"):
        SimilarityDisplay.from_similarity(similarity, pair="VV")


def test_axes_are_named_by_what_is_compared():
    heads = skhead.load_heads("skhead/induction-2l")
    spectra = skhead.SpectrumSimilarity(["QKQK"]).fit_transform(heads)
    ax = SimilarityDisplay.from_similarity(spectra).ax_
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("QK of head, by layer", "QK of head, by layer")


def test_many_layers_get_few_ticks():
    heads = skhead.load_heads("skhead/induction-2l").iloc[np.zeros(60, dtype=int)].copy()
    heads["layer"] = np.arange(60)
    display = SimilarityDisplay(np.zeros((60, 60)), heads, heads, pair="OQ").plot()
    names = [tick.get_text() for tick in display.ax_.get_yticklabels()]
    assert len(names) <= 16
    assert names[:2] == ["L0", "L4"]


def test_distribution_counts_every_pair_and_marks_the_reference(similarity):
    display = DistributionDisplay.from_similarity(similarity, bins=7)
    assert list(display.bars_) == ["OQ", "OK", "OV"]
    for values in display.samples.values():
        assert len(values) == 64
    # 16 x 16 / 128 is the mean overlap of random subspaces of rank 16 in 128 dimensions.
    assert {float(line.get_xdata()[0]) for line in display.lines_.values()} == {2.0}


def test_distribution_of_composition_has_a_line_and_no_band(similarity):
    heads = similarity.rows
    scores = skhead.CompositionScore(pairs=["OK"]).fit_transform(heads)
    display = DistributionDisplay.from_similarity(scores)
    assert display.lines_["OK"].get_xdata()[0] == pytest.approx(128**-0.5)
    # One polygon is the histogram; a band would be a second patch.
    assert len(display.ax_.patches) == 1


def test_distribution_refuses_an_unknown_pair(similarity):
    with pytest.raises(HeadShapeError, match=r"holds OQ OK OV, not 'QQ'"):
        DistributionDisplay.from_similarity(similarity, pairs=["QQ"])


def test_reference_of_unequal_ranks_is_the_mixture():
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(4, 20, 6)).astype(np.float32)
    stack[2:, :, 3:] = 0
    subspaces = skhead.SubspaceExtractor().fit_transform(stack)
    similarity = skhead.ProjectionKernel().fit_transform(subspaces)
    mean, sd = DistributionDisplay.from_similarity(similarity).references["XX"]
    # Unordered pairs: one of ranks 6 and 6, four of 6 and 3, one of 3 and 3.
    means = np.array([36.0, 18, 18, 18, 18, 9]) / 20
    assert mean == pytest.approx(means.mean())
    assert sd > means.std()
