from __future__ import annotations

import re
import shutil

import networkx
import numpy as np
import pandas as pd
import pytest
from pages import Tables, summary_of, words_of
from safetensors.numpy import load_file, save_file

import skhead
from skhead.datasets import bundled_path
from skhead.report import write_report

MODEL = "skhead/induction-2l"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(MODEL, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def similarity():
    return skhead.ProjectionKernel().fit_transform(skhead.load_heads(MODEL))


def test_everything_is_written(page):
    names = {path.name for path in page.parent.iterdir()}
    assert names == {
        "report.html", "edges.csv", "heads.csv", "pairs.csv", "graph.graphml", "summary.json",
    }  # fmt: skip


def test_summary_holds_the_numbers_of_the_similarity(page, similarity):
    summary = summary_of(page)
    for p, pair in enumerate(similarity.pairs):
        values = similarity.values[:, :, p]
        values = values[~np.isnan(values)].astype(np.float64)
        found = summary["projection_kernel"][pair]
        assert found["pairs"] == values.size == 64
        assert found["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert found["quantiles"]["0.97"] == pytest.approx(np.quantile(values, 0.97), rel=1e-12)
        assert found["max"] == values.max()
        assert found["null_mean"] == pytest.approx(16 * 16 / 128)
        assert found["above"] == (values > 2.0 + 3 * found["null_sd"]).sum()
    divergence = skhead.informativeness(similarity)
    for pair, found in summary["projection_kernel"].items():
        told = np.inf if found["informativeness"] is None else found["informativeness"]
        assert told == pytest.approx(divergence[pair])


def test_tables_of_the_page_are_the_top_pairs(page, similarity):
    best = similarity.top_pairs(20)
    rows = Tables(page).tables["edge-table"][1:]
    assert len(rows) == len(best) == 60
    for row, edge in zip(rows, best.to_dict("records"), strict=True):
        assert row[0] == edge["pair"]
        assert [row[2], row[3]] == [edge["source"], edge["target"]]
        assert float(row[4]) == edge["score"]
        assert float(row[6]) == pytest.approx(edge["score"] / 2.0)


def test_composition_beside_an_edge_is_that_of_the_same_pair(page):
    scores = skhead.CompositionScore().fit_transform(skhead.load_heads(MODEL))
    for row in Tables(page).tables["edge-table"][1:]:
        assert float(row[12]) == pytest.approx(scores.pair(row[0]).loc[row[2], row[3]], rel=1e-6)


def test_csv_files_parse_back_to_the_same_numbers(page, similarity):
    edges = pd.read_csv(page.with_name("edges.csv"))
    columns = ["pair", "rank", "source", "target", "score", "expected", "ratio"]
    columns += ["ratio_anisotropic", "z_anisotropic", "log10_p_anisotropic"]
    columns += ["q_anisotropic", "q_empirical"]
    assert edges.columns.tolist() == columns
    best = similarity.top_pairs(20)
    np.testing.assert_array_equal(edges["score"].astype(np.float32), best["score"])
    np.testing.assert_allclose(edges["ratio"], edges["score"] / edges["expected"], rtol=1e-6)
    pairs = pd.read_csv(page.with_name("pairs.csv"))
    everything = similarity.to_frame()
    assert pairs[["pair", "source", "target"]].equals(
        everything[["pair", "source", "target"]].astype(pairs["pair"].dtype)
    )
    np.testing.assert_array_equal(pairs["score"].astype(np.float32), everything["score"])
    heads = pd.read_csv(page.with_name("heads.csv"), index_col="label", keep_default_na=False)
    hubs = skhead.hub_table(similarity, 20).reindex(heads.index)
    assert (heads["degree"] == hubs["degree"]).all()
    own = skhead.identity_scores(skhead.load_heads(MODEL))
    np.testing.assert_allclose(heads["pk_vo"], own["pk_vo"])
    np.testing.assert_allclose(heads["identity_signed"], own["identity_signed"])


def test_graph_file_is_the_wiring_graph(page):
    graph = networkx.read_graphml(page.with_name("graph.graphml"))
    assert graph.number_of_edges() == 60
    assert {data["pair"] for *_, data in graph.edges(data=True)} == {"OQ", "OK", "OV"}
    assert all("head_class" in data for _, data in graph.nodes(data=True))


def test_two_runs_give_the_same_bytes(page, tmp_path):
    again = write_report(MODEL, tmp_path)
    for path in again.parent.iterdir():
        assert path.read_bytes() == page.with_name(path.name).read_bytes(), path.name


def test_page_is_self_contained_and_small(page):
    text = page.read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    assert re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", text) == []
    assert "default-src 'none'" in text
    for name in ("edges.csv", "heads.csv", "summary.json"):
        assert f'download="{name}" href="data:' in text


def test_names_and_classes_are_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    path = tmp_path / f"{evil}.safetensors"
    shutil.copy(bundled_path(MODEL) / "model.safetensors", path)
    labels = tmp_path / "labels.csv"
    labels.write_text(f'layer,head,class\n0,0,"{evil}"\n1,1,"\'--></style><script>"\n')
    page = write_report(path, tmp_path / "out", labels=labels)
    text = page.read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "--></style><script>" not in text
    assert text.count("<script") == 1
    assert "&lt;img src=x onerror=alert(1)&gt;" in text


def test_pairs_file_is_left_out_when_too_long(tmp_path, monkeypatch):
    write_report(MODEL, tmp_path, k=2)
    assert (tmp_path / "pairs.csv").is_file()
    monkeypatch.setattr("skhead._report.files.MOST_PAIRS", 191)
    page = write_report(MODEL, tmp_path, k=2)
    assert not (tmp_path / "pairs.csv").exists()
    words = words_of(page)
    assert "pairs.csv is not written: 192 pairs are more than 191" in words


@pytest.mark.parametrize("k", [0, -3, 1.5, True, None, "5", float("nan"), float("inf")])
def test_k_is_checked(k, tmp_path):
    with pytest.raises(ValueError, match=r"write_report: k must be a positive integer, got"):
        write_report(MODEL, tmp_path, k=k)


@pytest.fixture
def one_layer(tmp_path):
    """The first layer of the bundled model, as a model of its own."""
    tensors = load_file(bundled_path(MODEL) / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith("blocks.1.")}
    path = tmp_path / "single.safetensors"
    save_file(kept, path)
    return path


def test_one_layer_compares_all_heads_and_says_so(one_layer, tmp_path):
    page = write_report(one_layer, tmp_path / "out")
    summary = summary_of(page)
    assert summary["comparison"]["scope"] == "all"
    assert summary["projection_kernel"]["OQ"]["pairs"] == 64
    assert "are in one layer" in words_of(page)
    assert len(Tables(page).tables["edge-table"]) == 61


def test_gpt2_report_says_what_is_published(gpt2_page):
    page, summary = gpt2_page, summary_of(gpt2_page)
    assert page.stat().st_size < 3_000_000
    assert summary["classes"]["nodes"] == 52
    assert summary["classes"]["in_class"] == 24
    assert (summary["hubs"][0]["label"], summary["hubs"][0]["degree"]) == ("L4H7", 19)
    cuts = [summary["projection_kernel"][p]["quantiles"]["0.97"] for p in ("OQ", "OK", "OV")]
    assert cuts == pytest.approx([12.257, 10.791, 10.441], abs=5e-4)
    cuts = [summary["composition"][p]["quantiles"]["0.97"] for p in ("OQ", "OK", "OV")]
    assert cuts == pytest.approx([0.0635, 0.0619, 0.0572], abs=5e-5)
    assert [row["label"] for row in summary["within_head"]["top"][:2]] == ["L4H7", "L1H11"]
    words = words_of(page)
    assert "L4H7 takes part in 19 of the 60 edges, followed by L4H11 with 12" in words
    assert "Of the 52 heads with an edge, 24 carry a class in yamagiwa2026" in words


def test_shared_layers_are_compared_once(models_dir, tmp_path):
    page = write_report(models_dir / "rxnmapper-albert", tmp_path)
    summary = summary_of(page)
    assert summary["comparison"]["scope"] == "shared"
    assert summary["projection_kernel"]["OK"]["pairs"] == 64
    assert summary["source"]["distinct_matrices"] == dict.fromkeys("QKVO", 8)
    edges = pd.read_csv(page.with_name("edges.csv"))
    assert edges["source"].str.startswith("L0H").all()
    assert edges["target"].str.startswith("L1H").all()
    assert "All 12 layers use one set of weights" in words_of(page)


def test_grouped_queries_are_told(models_dir, tmp_path):
    page = write_report(models_dir / "stories260k", tmp_path)
    assert summary_of(page)["source"]["distinct_matrices"] == {"Q": 40, "K": 20, "V": 20, "O": 40}
    assert "Groups of 2 query heads share their keys and values" in words_of(page)


@pytest.mark.parametrize("name,below", [("perfect", True), ("loose", False)])
def test_report_does_not_pretend_to_show_the_induction_circuit(models_dir, tmp_path, name, below):
    page = write_report(models_dir / "induction-1head" / f"{name}.safetensors", tmp_path)
    summary = summary_of(page)
    words = words_of(page)
    # The heads span all 64 dimensions, so that every overlap is 64 whatever the heads do.
    assert all(found["constant"] for found in summary["projection_kernel"].values())
    assert "No pair stands above the random reference" in words
    assert "can neither show nor rule out a circuit" in words
    assert "the edges are drawn for completeness and carry no information" in words
    found = summary["composition"]["OK"]
    assert (found["above_chance"] == 0) is below
    assert found["chance"] == 0.125
    if below:
        assert found["max"] == pytest.approx(0.06, abs=0.005)
        assert "No pair composes above the random 0.125 in OQ, OK and OV" in words
        assert "Composition below chance does not rule out a circuit" in words
    else:
        assert found["max"] == pytest.approx(0.48, abs=0.005)


def test_parts_of_an_encoder_decoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=32, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=3, d_ff=16, vocab_size=20
    )
    transformers.T5Model(config).save_pretrained(tmp_path / "t5")
    page = write_report(tmp_path / "t5", tmp_path / "cross", part="cross")
    summary = summary_of(page)
    assert list(summary["projection_kernel"]) == ["OQ"]
    assert summary["within_head"] is None
    assert "Cross-attention reads keys and values from the encoder's stream" in words_of(page)
    page = write_report(tmp_path / "t5", tmp_path / "decoder", part="decoder")
    assert summary_of(page)["source"]["n_layers"] == 3
