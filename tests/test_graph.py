"""Wiring graphs, hubs, class counts and exports."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from toys import toy_heads

from skhead import (
    NullCalibrator,
    ProjectionKernel,
    class_counts,
    hub_table,
    wiring_graph,
    write_edges,
    write_graphml,
)
from skhead.exceptions import HeadTableError


@pytest.fixture(scope="module")
def similarity():
    with toy_heads() as heads:
        return ProjectionKernel().fit_transform(heads)


def test_graph_holds_the_top_pairs(similarity):
    graph = wiring_graph(similarity, k=7)
    top = similarity.top_pairs(7)
    edges = {(a, b, key): d["score"] for a, b, key, d in graph.edges(keys=True, data=True)}
    assert len(edges) == 21
    for edge in top.itertuples():
        assert edges[edge.source, edge.target, edge.pair] == pytest.approx(edge.score)
    assert set(graph.nodes) == set(top["source"]) | set(top["target"])
    for label, node in graph.nodes(data=True):
        assert label == f"L{node['layer']}H{node['head']}"
    assert nx.utils.graphs_equal(graph, similarity.to_graph(7))


def test_degrees_equal_the_graph_and_strengths_the_means(similarity):
    table = hub_table(similarity, k=7)
    graph = wiring_graph(similarity, k=7)
    for label, row in table.iterrows():
        degree = graph.degree(label) if label in graph else 0
        assert row["degree"] == degree == row["out_degree"] + row["in_degree"]
    assert table["degree"].is_monotonic_decreasing
    frame = similarity.to_frame()
    mean = frame[frame["pair"] == "OK"].groupby("source")["score"].mean()
    pd.testing.assert_series_equal(
        table["out_OK"].dropna().sort_index(), mean.sort_index(), check_names=False,
        check_dtype=False, check_index_type=False, rtol=1e-5,
    )  # fmt: skip
    assert table.loc["L2H0", "out_OK":"out_OK"].isna().all()


def test_class_counts(similarity):
    labels = pd.Series("None", index=similarity.rows.index)
    labels["L0H0"] = "Previous Token"
    graph = wiring_graph(similarity, k=48, classes=labels)
    assert class_counts(graph).to_dict() == {"in_class": 1, "out_of_class": 11, "nodes": 12}
    assert graph.nodes["L0H0"]["head_class"] == "Previous Token"
    unknown = labels.where(labels != "None")
    assert class_counts(wiring_graph(similarity, k=48, classes=unknown))["in_class"] == 1
    with pytest.raises(ValueError, match="the graph has no classes"):
        class_counts(wiring_graph(similarity, k=3))
    with pytest.raises(HeadTableError, match="no entry for head L0H0"):
        wiring_graph(similarity, k=3, classes=labels.iloc[1:])


def test_exports_read_back(similarity, tmp_path):
    graph = wiring_graph(similarity, k=5)
    write_graphml(graph, tmp_path / "graph.graphml")
    again = nx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True)
    assert set(again.nodes) == set(graph.nodes)
    scores = sorted(d["score"] for *_, d in again.edges(data=True))
    assert scores == pytest.approx(sorted(d["score"] for *_, d in graph.edges(data=True)))
    write_edges(graph, tmp_path / "edges.csv")
    table = pd.read_csv(tmp_path / "edges.csv")
    assert table.columns.tolist() == ["pair", "rank", "source", "target", "score"]
    expected = similarity.top_pairs(5).sort_values(["pair", "rank"])["score"].to_numpy()
    assert table.sort_values(["pair", "rank"])["score"].tolist() == pytest.approx(expected)


def test_edges_of_a_calibrated_similarity_carry_the_null(similarity, tmp_path):
    calibrated = NullCalibrator(output="q", side="upper").fit_transform(similarity)
    graph = wiring_graph(calibrated, k=5)
    assert (graph.graph["null"], graph.graph["side"]) == ("haar", "upper")
    names = ["score", "z", "log10_p", "q", "ratio", "excess"]
    top = calibrated.top_pairs(5)
    for edge in top.to_dict("records"):
        data = graph.edges[edge["source"], edge["target"], edge["pair"]]
        assert [data[name] for name in names] == pytest.approx([edge[name] for name in names])
        score = similarity.pair(edge["pair"]).loc[edge["source"], edge["target"]]
        assert data["score"] == pytest.approx(score)
    write_edges(graph, tmp_path / "edges.csv")
    table = pd.read_csv(tmp_path / "edges.csv")
    assert table.columns.tolist() == ["pair", "rank", "source", "target", *names, "null"]
    assert (table["null"] == "haar").all()
    expected = top.sort_values(["pair", "rank"])["log10_p"]
    found = table.sort_values(["pair", "rank"])["log10_p"]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_graphml_leaves_out_numbers_that_are_not_finite(similarity, tmp_path):
    calibrated = NullCalibrator().fit_transform(similarity)
    certain = replace(
        calibrated.calibration, log10_p=np.full_like(calibrated.calibration.log10_p, -np.inf)
    )
    graph = wiring_graph(replace(calibrated, calibration=certain), k=5)
    write_graphml(graph, tmp_path / "graph.graphml")
    assert all(data["log10_p"] == -np.inf for *_, data in graph.edges(data=True))
    assert "inf" not in (tmp_path / "graph.graphml").read_text().lower()
    again = nx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True)
    for source, target, data in again.edges(data=True):
        assert "log10_p" not in data
        assert data["z"] == pytest.approx(graph.edges[source, target, data["pair"]]["z"])
