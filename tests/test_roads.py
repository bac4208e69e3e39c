"""The whole road on real models of other architectures than GPT-2."""

from __future__ import annotations

import numpy as np
import pytest

import skhead
from skhead import CompositionScore, ProjectionKernel, SubspaceExtractor

ALL = [a + b for a in "QKVO" for b in "QKVO"]


def road(source, **options):
    heads = skhead.load_heads(source, **options)
    subspaces = SubspaceExtractor().fit_transform(heads)
    return heads, subspaces, ProjectionKernel(pairs=ALL, layer_order="all").fit_transform(subspaces)


def check_against_principal_angles(heads, similarity, pair, rows, columns):
    a, b = (skhead.load_weights(heads, role).astype(float) for role in pair)
    for i in rows:
        for j in columns:
            u, v = (np.linalg.svd(w, full_matrices=False)[0] for w in (a[i], b[j]))
            assert similarity.values[i, j, ALL.index(pair)] == pytest.approx(
                np.square(u.T @ v).sum(), abs=2e-5
            )


def test_grouped_queries(models_dir):
    heads, subspaces, similarity = road(models_dir / "stories260k")
    assert len(heads) == 40
    assert heads["kv_head"].tolist()[:8] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(subspaces.role("K").vectors) == 20 and len(subspaces.role("Q").vectors) == 40
    check_against_principal_angles(heads, similarity, "OK", [0, 7, 39], [3, 21])
    check_against_principal_angles(heads, similarity, "VQ", [1, 20], [2, 38])
    values = similarity.pair("OK").to_numpy()
    np.testing.assert_array_equal(values[:, 2], values[:, 3])
    composition = CompositionScore(layer_order="all").fit_transform(heads)
    w = {role: skhead.load_weights(heads, role).astype(float) for role in "QKVO"}
    ov, qk = w["V"][3] @ w["O"][3].T, w["Q"][17] @ w["K"][17].T
    expected = np.linalg.norm(ov @ qk.T) / (np.linalg.norm(ov) * np.linalg.norm(qk))
    assert composition.values[3, 17, 1] == pytest.approx(expected, abs=1e-6)


def test_shared_layer(models_dir):
    heads, subspaces, similarity = road(models_dir / "rxnmapper-albert")
    assert len(heads) == 96 and heads["n_layers"].iloc[0] == 12
    assert all(len(subspaces.role(role).vectors) == 8 for role in "QKVO")
    values = similarity.pair("OQ").to_numpy()
    np.testing.assert_array_equal(values[:8, 8:16], values[16:24, 88:])
    check_against_principal_angles(heads, similarity, "OV", [0, 13], [5, 95])


@pytest.mark.parametrize("name, k_composition", [("perfect", 0.06), ("loose", 0.48)])
def test_induction_toy(models_dir, name, k_composition):
    """Composition is far above chance in one toy and below it in the other; both do induction."""
    source = models_dir / "induction-1head" / f"{name}.safetensors"
    heads, _, similarity = road(source)
    assert heads.index.tolist() == ["L0H0", "L1H0"]
    check_against_principal_angles(heads, similarity, "OK", [0], [1])
    composition = CompositionScore().fit_transform(heads)
    assert float(composition.null_mean[0, 0, 0]) == 0.125
    assert composition.pair("OK").loc["L0H0", "L1H0"] == pytest.approx(k_composition, abs=0.005)


def test_bundled_model_shows_its_circuit():
    heads, _, similarity = road("skhead/induction-2l")
    classes = skhead.datasets.load_head_classes("induction-2l", heads)
    previous = classes.index[classes == "Previous Token"].tolist()
    induction = classes.index[classes == "Induction"].tolist()
    assert previous and induction
    top = ProjectionKernel(pairs=["OK"]).fit_transform(heads).top_pairs(1).iloc[0]
    assert top["source"] in previous and top["target"] in induction
    top = CompositionScore(pairs=["OK"]).fit_transform(heads).top_pairs(1).iloc[0]
    assert top["source"] in previous and top["target"] in induction
    assert similarity.values.shape == (16, 16, 16)


def test_models_of_one_width_share_a_table(models_dir):
    sources = [models_dir / "induction-1head" / f"{n}.safetensors" for n in ("loose", "perfect")]
    heads = skhead.load_heads(sources)
    assert heads["source"].nunique() == 2 and heads.index.is_unique
    similarity = ProjectionKernel(pairs=["OK"]).fit_transform(heads)
    assert similarity.shape == (4, 4)
    rows, columns = np.nonzero(~np.isnan(similarity.values[:, :, 0]))
    assert list(zip(rows, columns, strict=True)) == [(0, 1), (2, 3)]
