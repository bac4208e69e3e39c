"""ContrastiveQKDecomposer on heads whose features are known: the payload-retrieval task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import skhead
from skhead import ContrastiveQKDecomposer
from skhead.datasets import (
    PayloadEmbeddings,
    load_payload_head,
    make_contrast_pairs,
    make_payload_retrieval,
    payload_head,
)

FACTORS = ("z1", "z2")
N_PAIRS = 40_960


def contrasts(head, latent="sign", **options):
    """One decomposer for each factor, fitted as published."""
    return [
        ContrastiveQKDecomposer(random_state=0, **options).fit(
            make_contrast_pairs(factor, N_PAIRS, head=head, latent=latent, random_state=seed)
        )
        for seed, factor in enumerate(FACTORS)
    ]


def analytic_contrast(head, factor):
    """``W_Q^T B A^T W_K``: what the contrast tends to, as latents are independent of unit size."""
    embeddings = head.embeddings
    into_queries = getattr(embeddings, f"B{factor[1]}").T @ head.W_Q
    into_keys = getattr(embeddings, f"A{factor[1]}").T @ head.W_K
    return into_queries.T @ into_keys


@pytest.mark.parametrize("rank", [0.99, "null"])
@pytest.mark.parametrize(
    ("name", "ranks"), [("d16-r3-r5", [3, 5]), ("d16-r7-r7", [7, 7]), ("d8-r3-r5", [3, 5])]
)
def test_true_ranks_with_a_gap(name, ranks, rank):
    found = contrasts(load_payload_head(name), rank=rank)
    assert [decomposer.rank_ for decomposer in found] == ranks
    for decomposer in found:
        if decomposer.rank_ < decomposer.d_head_:
            assert decomposer.spectral_gap_ > 100


@pytest.mark.parametrize("name", ["d16-r3-r5", "d16-r7-r7", "d8-r3-r5", "closed form"])
def test_contrast_is_the_analytic_one(name):
    if name == "closed form":
        head = payload_head(PayloadEmbeddings.draw(3, 5, random_state=0))
    else:
        head = load_payload_head(name)
    for factor, found in zip(FACTORS, contrasts(head), strict=True):
        truth = analytic_contrast(head, factor)
        error = np.linalg.norm(found.C_pos_ - found.C_neg_ - truth)
        assert error < 0.03 * np.linalg.norm(truth)
        assert np.linalg.norm(found.C_neg_) < 0.05 * np.linalg.norm(found.C_pos_)


def test_superposed_latents_are_reported_as_such():
    head = load_payload_head("d8-r5-r5")
    report = skhead.analyse_superposition(head)
    assert report.superposed and report.n_latents == 10 and report.d_head == 8
    assert sum(found.rank_ for found in contrasts(head)) < 10
    alone = skhead.analyse_superposition(load_payload_head("d8-r2-r3"))
    assert not alone.superposed
    assert report.diagonal_share < 0.9 < alone.diagonal_share
    assert report.cross_block_ratio > 2 * alone.cross_block_ratio


def test_exchanging_both_features_moves_all_attention_to_the_other_key():
    head = load_payload_head("d16-r3-r5")
    task = make_payload_retrieval(5000, embeddings=head.embeddings, random_state=5)
    pairs = task.pairs(head)
    found = ContrastiveQKDecomposer().fit(pairs)
    assert found.rank_.tolist() == [3, 5]
    table = found.intervene(pairs, original=task.i_star, random_state=0)
    assert table.loc["none", "attention_original"] == pytest.approx(0.963, abs=0.01)
    assert table.loc["none", "attention_target"] < 0.005
    assert table.loc["all", "attention_original"] < 0.005
    assert table.loc["all", "attention_target"] == pytest.approx(0.963, abs=0.01)
    assert table.loc["all", "flip_rate"] == pytest.approx(0.97, abs=0.01)
    for name, rank in (("z1", 3), ("z2", 5), ("all", 8)):
        assert table.loc[name, "rank"] == rank
        assert table.loc[name, "rank_share"] == rank / 16
        random = table.loc[f"random (rank {rank})"]
        assert table.loc[name, "attention_target"] > 2 * random["attention_target"]


def test_random_subspaces_do_as_much_where_the_rank_is_a_large_share():
    """At d_head 8, five random dimensions move as much attention as those of the feature."""
    head = load_payload_head("d8-r3-r5")
    task = make_payload_retrieval(5000, embeddings=head.embeddings, random_state=5)
    table = ContrastiveQKDecomposer().fit(task.pairs(head)).intervene(
        task.pairs(head), random_state=0
    )  # fmt: skip
    feature, random = table.loc["z2"], table.loc["random (rank 5)"]
    assert feature["rank_share"] == random["rank_share"] == 5 / 8
    assert random["attention_target"] > 0.7 * feature["attention_target"]


@pytest.mark.parametrize(
    ("name", "latent", "published"),
    [("d16-r3-r5", "sign", (0.942, 0.955)), ("d16-r3-r5-gaussian", "gaussian", (0.998, 0.998))],
)
def test_oblique_parts_are_the_true_ones(name, latent, published):
    head = load_payload_head(name)
    task = make_payload_retrieval(5000, embeddings=head.embeddings, latent=latent, random_state=5)
    pairs = task.pairs(head)
    true = pairs.scale * skhead.true_logits(head, task).reshape(-1, 2)
    first, second = contrasts(head, latent)
    table = first.attribute(pairs, others=[second])
    for factor, truth, least in zip(FACTORS, true.T, published, strict=True):
        left = np.sum((truth - table[factor]) ** 2) / np.sum((truth - truth.mean()) ** 2)
        assert 1 - left > least - 0.001


def test_oblique_parts_do_not_depend_on_the_basis_and_released_ones_do():
    head = load_payload_head("d16-r3-r5")
    task = make_payload_retrieval(5000, embeddings=head.embeddings, random_state=5)
    pairs = task.pairs(head)
    matrix = np.random.default_rng(0).normal(size=(16, 16))
    moved = replace(
        pairs, queries=pairs.queries @ matrix, keys=pairs.keys @ np.linalg.inv(matrix).T
    )
    parts = {}
    for attribution in ("oblique", "query"):
        options = {"rank": "null", "whiten": "qk", "random_state": 0, "attribution": attribution}
        parts[attribution] = [
            ContrastiveQKDecomposer(**options).fit(p).attribute(p)[["z1", "z2"]]
            for p in (pairs, moved)
        ]
    np.testing.assert_allclose(*parts["oblique"], atol=1e-3)
    assert not np.allclose(*parts["query"], atol=0.1)
