"""What the report says of classes, induction pairs and pairs that stand out."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from pages import Tables, summary_of, words_of
from safetensors.numpy import save_file
from sklearn.model_selection import StratifiedKFold

import skhead
from skhead._report.classes import EVIDENCE, guess_from_labels, guess_from_zoo
from skhead._report.head_section import strongest_partner
from skhead._report.labels import HeadClasses
from skhead._report.scores import HeadScores
from skhead.induction import induction_pairs
from skhead.report import write_report

MODEL = "skhead/induction-2l"
RAW = {"fold_norm": False, "center": False, "device": None}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(MODEL, tmp_path_factory.mktemp("report"))


def scores_of(source):
    table = skhead.CircuitScorer(EVIDENCE).fit_transform(skhead.load_heads(source))
    return HeadScores(table, {})


def test_the_zoo_finds_the_circuit_of_the_bundled_model():
    found = guess_from_zoo(scores_of(MODEL), MODEL, RAW)
    assert found.probabilities.idxmax().to_dict() == {"Induction": "L1H1", "Previous Token": "L0H0"}
    assert (found.probabilities.max() > 0.9).all()
    assert found.models == 8
    assert found.learned == {"Induction": 30, "Previous Token": 19}


def test_a_model_of_the_zoo_is_not_learned_from():
    source = "skhead/zoo/rope-attn-1"
    zoo = skhead.datasets.load_head_zoo()
    found = guess_from_zoo(scores_of(source), source, RAW)
    others = zoo.heads["source"] != source
    assert found.models == 7
    assert found.learned["Induction"] == (zoo.target[others.to_numpy()] == "Induction").sum()


def test_missing_evidence_is_refused_with_its_reason():
    scores = HeadScores(pd.DataFrame(index=["L0H0"]), {"ov_copying": "there is no unembedding"})
    found = guess_from_zoo(scores, MODEL, RAW)
    assert found.probabilities is None
    assert found.refusal == "it takes ov_copying, and there is no unembedding"


def test_labelled_heads_are_judged_by_models_that_have_not_seen_them():
    heads = skhead.load_heads(MODEL)
    values = heads["layer"].map({0: "early", 1: "None"}).astype(object)
    y = values.to_numpy()
    subspaces = skhead.SubspaceExtractor().fit_transform(heads)
    found = guess_from_labels(subspaces, HeadClasses("layers", "", values, False))
    kernel = skhead.ProjectionKernel(pairs=("QQ", "KK", "VV", "OO"), layer_order="all")
    expected = pd.Series(np.nan, index=heads.index)
    parts = StratifiedKFold(3, shuffle=True, random_state=0)
    for known, asked in parts.split(heads, y):
        model = skhead.HeadClassifier().fit(kernel.fit_transform(subspaces[known]), y[known])
        told = model.predict_proba(kernel.transform(subspaces[asked]))
        expected.iloc[asked] = told[:, list(model.classes_).index("early")]
    np.testing.assert_allclose(found.probabilities["early"], expected, rtol=1e-4, atol=1e-6)
    assert found.precisions["n_heads"].to_dict() == {"early": 8}


def test_too_few_labels_are_told(page):
    told = summary_of(page)["predicted_classes"]
    assert told["labels"]["probabilities"] is None
    assert "no class of induction-2l has the 3 heads" in words_of(page)
    assert told["zoo"]["probabilities"]["L1H1"]["Induction"] > 0.9
    heads = pd.read_csv(page.with_name("heads.csv"), index_col="label")
    assert heads["p_zoo: Induction"].idxmax() == "L1H1"


@pytest.mark.parametrize("outside", [0, 1, 2, 3])
def test_labels_of_nearly_all_heads_do_not_stop_the_report(outside, tmp_path):
    table = skhead.load_heads(MODEL)[["layer", "head"]]
    table["class"] = ["one"] * (16 - outside) + [""] * outside
    table.to_csv(tmp_path / "labels.csv", index=False)
    page = write_report(MODEL, tmp_path, labels=tmp_path / "labels.csv", composition=False)
    told = summary_of(page)["predicted_classes"]["labels"]
    if outside < 3:
        assert told["refused"].startswith("no class of labels has the 3 heads, with as many heads")
        assert told["refused"] in words_of(page)
    else:
        assert told["learned"] == {"one": 13}
        assert len(told["probabilities"]) == 16


def test_a_single_head_without_a_class_is_judged_without_a_warning():
    heads = skhead.load_heads(MODEL)
    values = heads["layer"].map({0: "early", 1: "late"}).astype(object)
    values.iloc[-1] = "None"
    subspaces = skhead.SubspaceExtractor().fit_transform(heads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = guess_from_labels(subspaces, HeadClasses("layers", "", values, False))
    assert found.learned == {"early": 8, "late": 7}
    assert found.probabilities.notna().all(axis=None)


def test_induction_pairs_are_those_of_the_function(page):
    expected = induction_pairs(skhead.load_heads(MODEL), top=200)
    rows = Tables(page).tables["induction-table"][1:]
    assert [row[:2] for row in rows] == expected[
        ["previous_head", "induction_head"]
    ].values.tolist()
    np.testing.assert_allclose([float(row[2]) for row in rows], expected["score"])
    assert [row[-1] for row in rows] == ["yes", "no"]
    assert "1 pair reaches a score of 0.5" in words_of(page)


def test_missing_embedding_is_told_for_induction(gpt2_page):
    assert "no tensor 'wte.weight'" in summary_of(gpt2_page)["induction"]["refused"]
    told = summary_of(gpt2_page)["predicted_classes"]["labels"]
    assert told["learned"] == {"Backup Name Mover": 5, "Induction": 6, "Previous Token": 9}
    assert told["average_precision"]["Induction"] == pytest.approx(0.9, abs=0.1)


def test_pairs_that_stand_out_are_those_of_the_empirical_null(page):
    kernel = skhead.ProjectionKernel().fit_transform(skhead.load_heads(MODEL))
    frame = skhead.NullCalibrator(null="empirical").fit_transform(kernel).to_frame()
    rows = Tables(page).tables["furthest-table"][1:]
    for pair, among in frame[frame["z"] > 0].groupby("pair"):
        best = among.nlargest(20, "z")
        shown = [row for row in rows if row[0] == pair]
        assert [row[2:4] for row in shown] == best[["source", "target"]].values.tolist()
        np.testing.assert_allclose([float(row[7]) for row in shown], best["log10_p"])
        np.testing.assert_allclose([float(row[8]) for row in shown], best["q"])


def test_gpt2_pairs_that_stand_out_are_not_those_of_hubs(gpt2_page):
    best = summary_of(gpt2_page)["outstanding_pairs"][0]
    found = (best["pair"], best["source"], best["target"])
    assert found == ("OQ", "L9H9", "L10H7")
    edges = summary_of(gpt2_page)["top_pairs"]
    assert found not in {(edge["pair"], edge["source"], edge["target"]) for edge in edges}


def test_all_heads_have_a_row_with_their_strongest_partner(page):
    kernel = skhead.ProjectionKernel().fit_transform(skhead.load_heads(MODEL))
    frame = skhead.NullCalibrator(null="anisotropic").fit_transform(kernel).to_frame()
    rows = {row[0]: row for row in Tables(page).tables["head-table"][1:]}
    assert list(rows) == kernel.row_labels
    for label, row in rows.items():
        own = frame[(frame["source"] == label) | (frame["target"] == label)]
        best = own.loc[own["z"].idxmax()]
        reads = best["source"] == label
        partner = best["target"] if reads else best["source"]
        assert row[-3] == f"{best['pair']} {'→' if reads else '←'} {partner}"
        assert float(row[-2]) == pytest.approx(best["z"])


def test_strongest_partner_without_a_null_law_is_by_ratio():
    kernel = skhead.ProjectionKernel(pairs=["OQ"]).fit_transform(skhead.load_heads(MODEL))
    best = strongest_partner(kernel)["L1H0"]
    column = kernel.pair("OQ")["L1H0"]
    assert (best.label, best.reads) == (column.idxmax(), False)
    assert best.strength == pytest.approx(column.max() / 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("n_layers,n_heads", [(25, 8), (24, 16), (37, 16)])
def test_page_of_a_larger_model_stays_small(n_layers, n_heads, tmp_path):
    draw = np.random.default_rng(0)
    shapes = dict.fromkeys(("W_Q", "W_K", "W_V"), (n_heads, 64, 8)) | {"W_O": (n_heads, 8, 64)}
    tensors = {
        f"blocks.{layer}.attn.{name}": draw.normal(size=shape).astype(np.float32)
        for layer in range(n_layers)
        for name, shape in shapes.items()
    }
    tensors["embed.W_E"] = draw.normal(size=(50, 64)).astype(np.float32)
    tensors["pos_embed.W_pos"] = draw.normal(size=(32, 64)).astype(np.float32)
    tensors["unembed.W_U"] = draw.normal(size=(64, 50)).astype(np.float32)
    save_file(tensors, tmp_path / "large.safetensors")
    page = write_report(tmp_path / "large.safetensors", tmp_path / "out")
    assert page.stat().st_size < 3_000_000
