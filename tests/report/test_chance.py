from __future__ import annotations

import json

import networkx
import numpy as np
import pandas as pd
import pytest
from pages import Tables, summary_of, words_of
from safetensors.numpy import load_file, save_file

import skhead
from skhead._report.questions import QUESTIONS
from skhead.calibration import NULLS
from skhead.datasets import bundled_path
from skhead.report import write_report

MODEL = "skhead/induction-2l"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(MODEL, tmp_path_factory.mktemp("chance"))


@pytest.fixture(scope="module")
def similarity():
    return skhead.ProjectionKernel().fit_transform(skhead.load_heads(MODEL))


def test_every_null_has_its_question():
    assert set(QUESTIONS) == set(NULLS)


@pytest.mark.parametrize("null", ["haar", "anisotropic", "empirical"])
def test_counts_are_those_of_the_calibrator(page, similarity, null):
    frame = skhead.NullCalibrator(null=null).fit_transform(similarity).to_frame()
    told = summary_of(page)["nulls"]
    assert (told["chosen"], told["fdr"]) == ("anisotropic", 0.05)
    rows = {row[1]: row for row in Tables(page).tables["null-table"][1:] if row[0] == null}
    assert list(rows) == ["OQ", "OK", "OV"]
    for pair, among in frame.groupby("pair"):
        called = among["q"] <= 0.05
        more, less = (called & (among["z"] > 0)).sum(), (called & (among["z"] < 0)).sum()
        found = told["laws"][null]["calls"][pair]
        assert [found[name] for name in ("pairs", "more", "less")] == [64, more, less]
        assert found["ratio"] == pytest.approx(among["ratio"].median())
        assert [int(cell) for cell in rows[pair][2:6]] == [more, less, 64 - more - less, 64]


def test_questions_are_on_the_page(page):
    words = words_of(page)
    for null in ("haar", "anisotropic", "empirical"):
        assert all(text in words for text in QUESTIONS[null])
    assert QUESTIONS["signflip"][0] not in words


@pytest.mark.parametrize("null", NULLS)
def test_edges_are_held_against_the_chosen_null(similarity, null, tmp_path):
    page = write_report(MODEL, tmp_path, k=4, null=null)
    judged = skhead.NullCalibrator(null=null).fit_transform(similarity).to_frame()
    judged = judged.set_index(["pair", "source", "target"])
    best = similarity.top_pairs(4)
    edges = pd.read_csv(page.with_name("edges.csv"))
    assert edges[["source", "target"]].values.tolist() == best[["source", "target"]].values.tolist()
    expected = judged.loc[list(zip(best["pair"], best["source"], best["target"], strict=True))]
    for name in ("ratio", "z", "q"):
        np.testing.assert_allclose(edges[f"{name}_{null}"], expected[name], rtol=1e-6)
    rows = Tables(page).tables["edge-table"][1:]
    np.testing.assert_allclose([float(row[8]) for row in rows], expected["z"], rtol=1e-6)
    assert f"q ({null})" in words_of(page)
    graph = networkx.read_graphml(page.with_name("graph.graphml"), force_multigraph=True)
    assert graph.graph["null"] == null
    for source, target, data in graph.edges(data=True):
        found = judged.loc[(data["pair"], source, target)]
        assert data["log10_p"] == pytest.approx(found["log10_p"])
    pairs = pd.read_csv(page.with_name("pairs.csv"))
    np.testing.assert_allclose(pairs[f"z_{null}"], judged["z"], rtol=1e-5)


def test_overlaps_fixed_by_ranks_are_no_discoveries(models_dir, tmp_path):
    page = write_report(models_dir / "induction-1head" / "perfect.safetensors", tmp_path)
    for law in summary_of(page)["nulls"]["laws"].values():
        assert "the ranks alone fix every overlap" in law["refused"]
        assert law["calls"] == {}
    words = words_of(page)
    assert words.count("No null law can judge these heads: the ranks alone fix every overlap") == 1
    assert "Not computed here" not in words
    assert "null-table" not in Tables(page).tables
    assert "(anisotropic)" not in words
    edges = pd.read_csv(page.with_name("edges.csv"))
    assert edges[["ratio_anisotropic", "z_anisotropic", "q_anisotropic"]].isna().all(axis=None)
    json.loads(page.with_name("summary.json").read_text(), parse_constant=pytest.fail)


def test_nulls_that_two_heads_cannot_answer_say_why(tmp_path):
    tensors = load_file(bundled_path(MODEL) / "model.safetensors")
    path = tmp_path / "pair.safetensors"
    save_file(
        {
            name: np.ascontiguousarray(t[:1]) if ".attn.W_" in name else t
            for name, t in tensors.items()
            if ".attn.b_" not in name
        },
        path,
    )
    page = write_report(path, tmp_path / "out")
    laws = summary_of(page)["nulls"]["laws"]
    assert laws["haar"]["refused"] is None
    assert laws["haar"]["calls"]["OQ"]["pairs"] == 1
    assert "2 distinct heads are too few; it takes 4" in laws["anisotropic"]["refused"]
    assert "at least 20 finite values, got 1" in laws["empirical"]["refused"]
    words = words_of(page)
    assert words.count("Not computed here:") == 2
    assert "Not computed here: NullCalibrator: null='empirical' cannot be fitted to the OQ" in words
    assert "needs at least 20 finite values" in words
    assert "largest ratio to random subspaces, drawn or not; → reads what the head writes" in words
    assert "← writes what it reads" in words


def test_an_overlap_beyond_the_law_has_a_p_value_of_zero(tmp_path):
    """Random subspaces are never one inside the other, and constructed ones may be."""
    rng = np.random.default_rng(0)
    shape = {"Q": (4, 32, 4), "K": (4, 32, 4), "V": (4, 32, 4), "O": (4, 4, 32)}
    tensors = {
        f"blocks.{layer}.attn.W_{role}": rng.normal(size=size).astype(np.float32)
        for layer in range(2)
        for role, size in shape.items()
    }
    axes = np.eye(32, dtype=np.float32)[:4]
    tensors["blocks.0.attn.W_O"][1], tensors["blocks.1.attn.W_Q"][2] = axes, axes.T
    save_file(tensors, tmp_path / "model.safetensors")
    page = write_report(tmp_path / "model.safetensors", tmp_path / "out", null="haar", k=3)
    edges = pd.read_csv(page.with_name("edges.csv"))
    first = edges[edges["pair"] == "OQ"].iloc[0]
    assert (first["source"], first["target"]) == ("L0H1", "L1H2")
    assert first["log10_p_haar"] == -np.inf
    assert '<td class="n" data-v="-Infinity">0</td>' in page.read_text()


def test_unknown_null_is_refused_before_reading(tmp_path):
    with pytest.raises(ValueError, match=r"write_report: null must be one of 'haar', .*'beta'"):
        write_report("no/such/model", tmp_path / "out", null="beta")
    assert not (tmp_path / "out").exists()


def test_gpt2_counts(gpt2_page):
    laws = summary_of(gpt2_page)["nulls"]["laws"]
    haar = laws["haar"]["calls"]["OQ"]
    assert haar["pairs"] == 9504
    assert haar["more"] / haar["pairs"] == pytest.approx(0.73, abs=0.005)
    empirical = laws["empirical"]["calls"]["OQ"]
    assert 0 < empirical["more"] + empirical["less"] < 0.1 * 9504
    told = f"more overlap are {empirical['more']} of 9,504 for OQ, "
    assert told in words_of(gpt2_page)
    assert laws["anisotropic"]["calls"]["OQ"]["ratio"] == pytest.approx(1.0, abs=0.1)
