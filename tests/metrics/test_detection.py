"""Head-level and pair-level detection in a similarity."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

import skhead
from skhead.exceptions import HeadShapeError
from skhead.metrics import head_detection, pair_detection
from skhead.stats import head_average_precision, pair_average_precision


@pytest.fixture(scope="module")
def gpt2(gpt2_path):
    heads = skhead.load_heads(gpt2_path)
    kernel = skhead.ProjectionKernel(pairs=("OQ", "OK", "OV", "KK"))
    labels = skhead.datasets.load_head_classes("wang2022", heads)
    return kernel.fit_transform(heads), labels


def test_equals_the_statistics_of_single_tables(gpt2):
    similarity, labels = gpt2
    found = head_detection(similarity, labels)
    for p, pair in enumerate(similarity.pairs):
        expected = head_average_precision(similarity.values[:, :, p], labels != "None")
        assert found.loc[pair, "average_precision"] == pytest.approx(expected, abs=1e-9)
    assert found["n_positive"].tolist() == [26] * 4
    assert found["base_rate"].iloc[0] == pytest.approx(26 / 144)


def test_a_head_is_not_found_by_its_likeness_to_itself():
    heads = skhead.load_heads("skhead/induction-2l")
    labels = skhead.datasets.load_head_classes("induction-2l", heads)
    similarity = skhead.ProjectionKernel(("QK", "QQ"), layer_order="all").fit_transform(heads)
    found = head_detection(similarity, labels)
    values = similarity.values.copy()
    values[range(16), range(16)] = np.nan
    for p, pair in enumerate(similarity.pairs):
        expected = head_average_precision(values[:, :, p], labels != "None")
        assert found.loc[pair, "average_precision"] == pytest.approx(expected)
        whole = similarity.values[:, :, p]
        assert head_average_precision(whole, labels != "None") == pytest.approx(expected)
        scores = np.nanmax(np.maximum(values[:, :, p], values[:, :, p].T), axis=1)
        assert expected == pytest.approx(average_precision_score(labels != "None", scores))


def test_measured_figures_of_gpt2(gpt2):
    """Head-level average precision of the projection kernel, by the 26 heads of the circuit."""
    similarity, labels = gpt2
    found = head_detection(similarity, labels)["average_precision"]
    np.testing.assert_allclose(found[["OQ", "OK", "OV"]], [0.336, 0.302, 0.220], atol=1e-3)
    movers = ("Name Mover", "Negative Name Mover", "Backup Name Mover")
    wiring = {
        "OQ": [("S-Inhibition", mover) for mover in movers],
        "OK": [("Previous Token", "Induction")],
    }
    circuit = pair_detection(similarity, labels, wiring).set_index("pair")
    assert circuit["n_positive"].to_dict() == {"OQ": 52, "OK": 8}
    np.testing.assert_allclose(circuit["average_precision"], [0.053, 0.171], atol=2e-3)
    np.testing.assert_allclose(circuit["roc_auc"], [0.871, 0.796], atol=2e-3)


def test_pairs_of_one_class_count_once_where_symmetric(gpt2):
    _, labels = gpt2
    heads = skhead.load_heads(gpt2[0].rows["source"].iloc[0])
    similarity = skhead.ProjectionKernel(pairs=("KK", "OQ"), layer_order="all").fit_transform(heads)
    found = pair_detection(similarity, labels).set_index(["pair", "source"])
    assert found.loc[("KK", "Induction"), "n_positive"] == 6
    assert found.loc[("OQ", "Induction"), "n_positive"] == 16
    values = similarity.listed("KK")
    same = (labels == "Induction").to_numpy()
    expected = pair_average_precision(values, same[:, None] & same[None, :])
    assert found.loc[("KK", "Induction"), "average_precision"] == pytest.approx(expected)


@pytest.mark.parametrize("layer_order", ["all", "forward"])
def test_wiring_between_two_classes_does_not_depend_on_the_order_of_heads(layer_order):
    heads = skhead.load_heads("skhead/induction-2l")
    y = np.array(["A", "B"] * 2 + ["None"] * 8 + ["A", "B"] + ["None"] * 2)
    kernel = skhead.ProjectionKernel(pairs=["QQ", "OQ"], layer_order=layer_order)
    wiring = {"QQ": [("A", "B")], "OQ": [("A", "B")]}
    expected = pair_detection(kernel.fit_transform(heads), y, wiring)
    if layer_order == "all":
        assert expected["n_positive"].tolist() == [9, 9]
        assert expected["base_rate"].tolist() == [9 / 120, 9 / 256]
    for order in (np.arange(16)[::-1], np.random.default_rng(0).permutation(16)):
        found = pair_detection(kernel.fit_transform(heads.iloc[order]), y[order], wiring)
        pd.testing.assert_frame_equal(found, expected)


def test_distances_are_ranked_from_the_smallest():
    heads = skhead.load_heads("skhead/induction-2l")
    labels = skhead.datasets.load_head_classes("induction-2l", heads)
    calibrated = skhead.NullCalibrator(output="log_p", side="upper").fit_transform(
        skhead.ProjectionKernel(pairs=["OK"]).fit_transform(heads)
    )
    assert head_detection(calibrated, labels).loc["OK", "average_precision"] == 1.0


def test_refuses_what_does_not_fit():
    heads = skhead.load_heads("skhead/induction-2l")
    kernel = skhead.ProjectionKernel(pairs=["OK"]).fit(heads)
    similarity = kernel.transform(heads)
    labels = skhead.datasets.load_head_classes("induction-2l", heads)
    with pytest.raises(HeadShapeError, match="same heads in one order"):
        head_detection(kernel.transform(heads.iloc[::-1]), labels)
    with pytest.raises(HeadShapeError, match=r"16 heads need as many labels, got shape \(15,\)"):
        pair_detection(similarity, labels[1:])
    with pytest.raises(HeadShapeError, match="head_detection: expected a Similarity.*DataFrame"):
        head_detection(heads, labels)
    with pytest.raises(ValueError, match="pair_detection: the label of head 2 is missing"):
        pair_detection(similarity, ["a", "b", None, *["None"] * 13])
    with pytest.raises(ValueError, match="0 of 16 are to be found"):
        head_detection(similarity, ["None"] * 16)
    with pytest.raises(ValueError, match=r"pair_detection \(OK\): 0 of 64"):
        pair_detection(similarity, labels, {"OK": [("Induction", "Previous Token")]})
