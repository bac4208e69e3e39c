"""Numbers printed in papers, reproduced from the real weights of GPT-2 small, raw.

The sources are arXiv 2601.10266 (figures 1, 5 and 8 and the values read off them) and the
composition scores of "A Mathematical Framework for Transformer Circuits", as drawn in the same
figures.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import skhead

ROLES = "QKVO"
KINDS = ("OQ", "OK", "OV")
MEAN = {
    "Q": (8.467, 7.412, 5.169, 5.755),
    "K": (6.950, 8.303, 5.182, 5.550),
    "V": (6.334, 6.340, 6.121, 5.664),
    "O": (7.026, 6.527, 5.086, 6.786),
}
INFORMATIVENESS = {
    "Q": (2.876, 2.373, 1.493, 1.293),
    "K": (2.041, 2.559, 1.476, 1.263),
    "V": (1.686, 1.531, 1.659, 1.149),
    "O": (2.129, 2.194, 2.040, 1.704),
}


@pytest.fixture(scope="module")
def heads(gpt2_path):
    return skhead.load_heads(gpt2_path)


@pytest.fixture(scope="module")
def subspaces(heads):
    return skhead.SubspaceExtractor().fit_transform(heads)


@pytest.fixture(scope="module")
def all_pairs(subspaces):
    return skhead.ProjectionKernel(pairs=[a + b for a in ROLES for b in ROLES]).fit_transform(
        subspaces
    )


@pytest.fixture(scope="module")
def wiring(subspaces):
    return skhead.ProjectionKernel(pairs=KINDS).fit_transform(subspaces)


@pytest.fixture(scope="module")
def composition(heads):
    return skhead.CompositionScore(pairs=KINDS).fit_transform(heads)


def forward(similarity, pair):
    values = similarity.pair(pair).to_numpy(dtype=np.float64)
    return values[~np.isnan(values)]


def test_all_matrices_have_full_rank(subspaces):
    assert {int(r) for role in ROLES for r in subspaces.ranks(role)} == {64}


def test_mean_kernel_of_all_sixteen_pairs(all_pairs):
    for row, printed in MEAN.items():
        for column, expected in zip(ROLES, printed, strict=True):
            values = forward(all_pairs, row + column)
            assert len(values) == 9504
            assert f"{values.mean():.3f}" == f"{expected:.3f}", row + column


def test_informativeness_of_all_sixteen_pairs(all_pairs):
    found = skhead.informativeness(all_pairs)
    for row, printed in INFORMATIVENESS.items():
        for column, expected in zip(ROLES, printed, strict=True):
            assert found[row + column] == pytest.approx(expected, abs=0.002), row + column


def test_sixty_edges_of_figure_1(wiring, reference_dir):
    published = pd.read_csv(reference_dir / "gpt2_projection_kernel_edges.csv")
    found = wiring.top_pairs(20)
    for kind in KINDS:
        printed = published[published["kind"] == kind]
        mine = found[found["pair"] == kind]
        edges = set(zip(mine["source"], mine["target"], strict=True))
        assert edges == set(zip(printed["source"], printed["target"], strict=True))
        scores = mine.set_index(["source", "target"])["score"]
        expected = printed.set_index(["source", "target"])["score_from_weights"]
        assert (scores - expected.reindex(scores.index)).abs().max() < 1e-3


def test_nodes_and_classes_of_figure_1(wiring, heads):
    classes = skhead.datasets.load_head_classes("yamagiwa2026", heads)
    graph = skhead.wiring_graph(wiring, k=20, classes=classes)
    assert graph.number_of_edges() == 60
    counts = skhead.class_counts(graph)
    assert counts.to_dict() == {"in_class": 24, "out_of_class": 28, "nodes": 52}


def test_hub_is_head_4_7(wiring):
    table = skhead.hub_table(wiring, k=20)
    assert table.index[0] == "L4H7"
    assert table.loc["L4H7", ["degree", "out_degree", "in_degree"]].tolist() == [19, 14, 5]
    assert table.loc[["L4H11", "L8H10"], "degree"].tolist() == [12, 6]


@pytest.mark.parametrize("k, degree", [(10, 12), (50, 26), (100, 38)])
def test_hub_stays_first_at_other_k(wiring, k, degree):
    table = skhead.hub_table(wiring, k=k)
    assert table.index[0] == "L4H7"
    assert table["degree"].iloc[0] == degree


def test_quantiles_of_figure_5(wiring, composition):
    cut = [np.quantile(forward(wiring, kind), 0.97) for kind in KINDS]
    assert cut == pytest.approx([12.257, 10.791, 10.441], abs=6e-4)
    limit = [np.quantile(forward(wiring, kind), 0.9999) for kind in KINDS]
    assert limit == pytest.approx([25.678, 38.492, 21.621], abs=6e-4)
    cut = [np.quantile(forward(composition, kind), 0.97) for kind in KINDS]
    assert cut == pytest.approx([0.0635, 0.0619, 0.0572], abs=5.1e-5)
    limit = [np.quantile(forward(composition, kind), 0.9999) for kind in KINDS]
    assert limit == pytest.approx([0.1181, 0.1043, 0.1001], abs=5.1e-5)


def test_agreement_of_kernel_and_composition(wiring, composition):
    spearman = [
        pd.Series(forward(wiring, kind)).corr(pd.Series(forward(composition, kind)), "spearman")
        for kind in KINDS
    ]
    assert spearman == pytest.approx([0.885, 0.844, 0.866], abs=6e-4)
    tops = [
        {(e.pair, e.source, e.target) for e in s.top_pairs(20).itertuples()}
        for s in (wiring, composition)
    ]
    shared = [pair for pair, _, _ in tops[0] & tops[1]]
    assert [shared.count(kind) for kind in KINDS] == [2, 5, 5]


def test_largest_composition_scores(composition):
    ranked = composition.top_pairs(1).set_index("pair")
    assert ranked.loc["OK", "source"] == "L0H11" and ranked.loc["OK", "target"] == "L1H4"
    assert ranked.loc["OK", "score"] == pytest.approx(0.106, abs=6e-4)
    assert ranked.loc["OV", ["source", "target"]].tolist() == ["L1H10", "L11H8"]
    assert ranked.loc["OV", "score"] == pytest.approx(0.3628, abs=6e-5)
    k = composition.pair("OK").loc["L4H11", ["L6H9", "L5H1", "L5H5"]]
    assert k.tolist() == pytest.approx([0.103, 0.102, 0.098], abs=6e-4)


def test_folding_changes_the_ranking(heads):
    """With the norm's gains folded in, a few large residual dimensions dominate."""
    folded = skhead.CompositionScore(pairs=["OK"], fold_norm=True).fit_transform(heads)
    top = folded.top_pairs(1).iloc[0]
    assert (top["source"], top["target"]) == ("L1H8", "L10H9")
    assert top["score"] == pytest.approx(0.235, abs=6e-4)


def test_folded_and_centred_means(heads):
    extractor = skhead.SubspaceExtractor(fold_norm=True, center=True)
    kernel = skhead.ProjectionKernel(pairs=("QQ", "VO"))
    similarity = kernel.fit_transform(extractor.fit_transform(heads))
    means = [forward(similarity, pair).mean() for pair in ("QQ", "VO")]
    assert means == pytest.approx([8.404, 5.702], abs=6e-4)


def test_identity_heads(heads):
    scores = skhead.identity_scores(heads)
    ranked = scores.sort_values("pk_vo", ascending=False)
    assert ranked.index[:4].tolist() == ["L4H7", "L1H11", "L11H3", "L5H11"]
    assert ranked["pk_vo"].iloc[:4].tolist() == pytest.approx(
        [53.83, 48.53, 46.16, 42.73], abs=6e-3
    )
    assert scores["pk_vo"].mean() == pytest.approx(13.55, abs=6e-3)
    signed = scores["identity_signed"]
    assert signed.idxmin() == "L4H7"
    assert signed[["L4H7", "L1H11", "L11H3"]].tolist() == pytest.approx(
        [-0.867, -0.724, 0.825], abs=6e-4
    )
