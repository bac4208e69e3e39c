"""Similarities that go to other programs and come back."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import networkx
import numpy as np
import pandas as pd
import pytest
from test_peer import bridge_and_heads, flat  # noqa: F401

import skhead
from skhead.exceptions import HeadShapeError, HeadTableError

pytest.importorskip("transformer_lens")

KINDS = ("OQ", "OK", "OV")


@pytest.fixture(scope="module")
def heads():
    return skhead.load_heads("skhead/induction-2l")


@pytest.mark.parametrize("layer_order", ["forward", "all"])
def test_kernels_become_what_transformer_lens_computes(bridge_and_heads, layer_order):  # noqa: F811
    from transformer_lens.tools.analysis.projection_kernel import attention_head_subspace_affinity

    bridge, heads = bridge_and_heads
    similarity = skhead.ProjectionKernel(KINDS, layer_order=layer_order).fit_transform(heads)
    for kind in KINDS:
        theirs = attention_head_subspace_affinity(
            bridge, target_role=kind[1], layer_order=layer_order
        )
        mine = similarity.to_transformer_lens(kind)
        assert type(mine) is type(theirs)
        for name in ("scores", "normalized"):
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), atol=2e-5)
        for name in ("valid_mask", "source_ranks", "target_ranks"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        for name in (
            "source_role", "target_role", "source_layer_indices", "target_layer_indices",
            "source_head_kind", "target_head_kind", "source_rank", "target_rank", "rank",
        ):  # fmt: skip
            assert getattr(mine, name) == getattr(theirs, name), name
        best = mine.top_pairs(1)[0]
        assert best.source.label == theirs.top_pairs(1)[0].source.label


@pytest.mark.parametrize("layer_order", ["forward", "all"])
def test_kernels_come_back_as_they_were(bridge_and_heads, layer_order):  # noqa: F811
    _, heads = bridge_and_heads
    similarity = skhead.ProjectionKernel(KINDS, layer_order=layer_order).fit_transform(heads)
    for p, kind in enumerate(KINDS):
        again = skhead.Similarity.from_transformer_lens(similarity.to_transformer_lens(kind), heads)
        assert again.pairs == (kind,) and again.unit == "pk"
        np.testing.assert_array_equal(again.values[:, :, 0], similarity.values[:, :, p])
        np.testing.assert_array_equal(again.row_ranks[:, 0], similarity.row_ranks[:, p])
        np.testing.assert_array_equal(again.null_mean[..., 0], similarity.null_mean[..., p])
        np.testing.assert_array_equal(again.null_sd[..., 0], similarity.null_sd[..., p])
        assert again.record == similarity.record
        pd.testing.assert_frame_equal(again.rows, similarity.rows)


def test_their_kernels_are_calibrated_like_ours(bridge_and_heads):  # noqa: F811
    from transformer_lens.tools.analysis.projection_kernel import attention_head_subspace_affinity

    bridge, heads = bridge_and_heads
    theirs = skhead.Similarity.from_transformer_lens(
        attention_head_subspace_affinity(bridge, target_role="K"), heads
    )
    mine = skhead.ProjectionKernel(["OK"]).fit_transform(heads)
    found, expected = (skhead.NullCalibrator().fit_transform(x).values for x in (theirs, mine))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_composition_scores_go_there_and_back(bridge_and_heads):  # noqa: F811
    bridge, heads = bridge_and_heads
    similarity = skhead.CompositionScore(KINDS).fit_transform(heads)
    for p, kind in enumerate(KINDS):
        theirs = bridge.all_composition_scores(kind[1])
        mine = similarity.to_transformer_lens(kind)
        assert type(mine) is type(theirs)
        np.testing.assert_allclose(mine.scores, theirs.scores.detach(), atol=1e-6)
        assert (mine.layer_indices, mine.head_labels) == (theirs.layer_indices, theirs.head_labels)
        again = skhead.Similarity.from_transformer_lens(mine, heads, pair=kind)
        np.testing.assert_array_equal(again.values[:, :, 0], similarity.values[:, :, p])
        assert again.unit == similarity.unit
        np.testing.assert_array_equal(
            np.asarray(again), np.asarray(similarity[:])[:, _of(p, heads)]
        )


def _of(p, heads):
    return slice(p * len(heads), (p + 1) * len(heads))


def test_layers_without_attention_keep_their_numbers(heads):
    table = heads.assign(layer=heads["layer"] * 5 + 2, n_layers=9)
    similarity = skhead.ProjectionKernel(["OK"]).fit_transform(heads)
    similarity = replace(similarity, rows=table, columns=table)
    result = similarity.to_transformer_lens()
    assert result.source_layer_indices == (2, 7)
    shuffled = table.sample(frac=1, random_state=0)
    again = skhead.Similarity.from_transformer_lens(result, shuffled)
    expected = similarity.pair("OK").loc[again.row_labels, again.column_labels]
    pd.testing.assert_frame_equal(again.pair("OK"), expected)


def test_what_transformer_lens_cannot_hold_is_refused(heads):
    kernel = skhead.ProjectionKernel(["OQ", "OK"])
    similarity = kernel.fit_transform(heads)
    with pytest.raises(HeadShapeError, match="pair='OQ'"):
        similarity.to_transformer_lens()
    with pytest.raises(HeadShapeError, match="OQ OK, not 'OV'"):
        similarity.to_transformer_lens("OV")
    with pytest.raises(ValueError, match="these numbers are in 'z'"):
        skhead.NullCalibrator().fit_transform(similarity).to_transformer_lens("OK")
    with pytest.raises(HeadTableError, match="L0H3 is missing"):
        kernel.fit_transform(heads.drop(index="L0H3")).to_transformer_lens("OK")
    subspaces = skhead.SubspaceExtractor(rank=0.9).fit_transform(heads)
    with pytest.raises(ValueError, match="those of O go from 12 to 14"):
        kernel.fit_transform(subspaces).to_transformer_lens("OK")
    two = pd.concat([heads, heads.assign(source="other")])
    rows = replace(similarity, rows=two.iloc[8:24])
    with pytest.raises(HeadTableError, match="2 sources"):
        rows.to_transformer_lens("OK")


def test_results_that_do_not_fit_are_refused(heads):
    result = skhead.ProjectionKernel(["OK"]).fit_transform(heads).to_transformer_lens()
    take = skhead.Similarity.from_transformer_lens
    with pytest.raises(TypeError, match="got dict"):
        take({}, heads)
    with pytest.raises(ValueError, match="the result is of OK"):
        take(result, heads, pair="OQ")
    with pytest.raises(HeadTableError, match="layers differ"):
        take(result, heads[heads["layer"] == 0])
    with pytest.raises(HeadTableError, match="head L1H0 is not in it"):
        take(result, heads.assign(layer=heads["layer"] * 2, n_layers=3))
    scores = SimpleNamespace(scores=result.scores, layer_indices=[0, 1])
    with pytest.raises(ValueError, match="pass pair='OQ'"):
        take(scores, heads)


def test_numpy_and_pandas_hold_the_same_numbers(heads):
    similarity = skhead.ProjectionKernel(["OQ", "OK"]).fit_transform(heads)
    wide = pd.DataFrame(np.asarray(similarity), similarity.row_labels, similarity.feature_names)
    frame = similarity.to_frame()
    for pair, source, target, score in frame.itertuples(index=False):
        assert wide.loc[source, f"{pair}:{target}"] == np.float32(score)
    assert len(frame) == np.count_nonzero(~np.isnan(similarity.values))
    pd.testing.assert_frame_equal(
        similarity.to_features().reset_index(drop=True), wide.reset_index(drop=True)
    )


@pytest.mark.parametrize("calibrated", [False, True])
def test_graphml_comes_back_with_every_attribute(heads, calibrated, tmp_path):
    similarity = skhead.ProjectionKernel().fit_transform(heads)
    if calibrated:
        similarity = skhead.NullCalibrator().fit_transform(similarity)
    graph = similarity.to_graph(5)
    skhead.write_graphml(graph, tmp_path / "graph.graphml")
    again = networkx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True)
    assert again.is_directed() and again.graph["unit"] == similarity.unit
    for node, data in again.nodes(data=True):
        assert data == {**graph.nodes[node], "label": node}
    edges = list(again.edges(keys=True, data=True))
    assert len({key for *_, key, _ in edges}) == len(edges) == graph.number_of_edges()
    for source, target, _, data in edges:
        mine = graph.edges[source, target, data["pair"]]
        assert data.pop("label") == data["pair"]
        assert data.pop("weight") == mine["score"]
        assert data == {name: x for name, x in mine.items() if not _endless(x)}


def _endless(value):
    return isinstance(value, float) and not np.isfinite(value)


def test_distances_and_negative_scores_are_no_weights(heads, tmp_path):
    path = tmp_path / "graph.graphml"
    distance = skhead.GrassmannDistance(pairs=["OK"]).fit_transform(heads)
    signed = skhead.CompositionScore(["OK"], baseline="difference").fit_transform(heads)
    for similarity in (distance, signed):
        skhead.write_graphml(similarity.to_graph(64), path)
        again = networkx.read_graphml(path, force_multigraph=True)
        assert not any("weight" in data for *_, data in again.edges(data=True))
