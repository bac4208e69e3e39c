"""Ranks by permuted labels: what the null of ContrastiveQKDecomposer keeps."""

from __future__ import annotations

import numpy as np
import pytest
from contrasts import R1, R2, feature_pairs, one_kind_each

from skhead import ContrastiveQKDecomposer, QKPairs
from skhead.exceptions import NoContrastError


@pytest.fixture(scope="module")
def pairs():
    return feature_pairs()


def test_a_null_needs_both_kinds_at_once(pairs):
    q_pos, k_pos, q_neg, k_neg = one_kind_each(pairs)
    null = ContrastiveQKDecomposer(rank="null", random_state=0)
    with pytest.raises(NoContrastError, match="feature 'feature': labels cannot be permuted"):
        null.partial_fit(QKPairs.from_pairs(q_pos, k_pos, q_neg[:0], k_neg[:0]))
    halves = [np.arange(len(q_pos)) % 2 == i for i in range(2)]
    others = [np.arange(len(q_neg)) % 2 == i for i in range(2)]
    for a, b in zip(halves, others, strict=True):
        null.partial_fit(QKPairs.from_pairs(q_pos[a], k_pos[a], q_neg[b], k_neg[b]))
    assert null.rank_ == R1
    assert null.fit_pairs(q_pos, k_pos, q_neg, k_neg).rank_ == R1


def test_one_context_of_both_kinds_does_not_stop_the_others_from_being_permuted(pairs):
    q_pos, k_pos, q_neg, k_neg = one_kind_each(pairs)
    single = QKPairs.from_pairs(q_pos, k_pos, q_neg, k_neg)
    joined = QKPairs(
        np.concatenate([single.queries, single.queries[:1]]),
        np.concatenate([single.keys, single.keys[[0, -1]]]),
        np.concatenate([single.query_index, [len(single)] * 2]),
        np.ones(len(single) + 1),
        np.concatenate([single.key_labels[:, 0], [1, 0]]),
    )
    assert ContrastiveQKDecomposer(rank="null", random_state=0).fit(joined).rank_ == R1


@pytest.mark.parametrize("contexts", [True, False], ids=["contexts", "single keys"])
def test_null_keeps_nothing_where_labels_mean_nothing(contexts):
    kept = 0
    runs = 60
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        q, k = rng.normal(size=(60, 6)) + 1, rng.normal(size=(480, 6)) + 1
        if contexts:
            index = np.repeat(np.arange(60), 8)
            pairs = QKPairs(q, k, index, np.ones(60), rng.integers(0, 2, 480))
        else:
            labels = rng.integers(0, 2, 60)
            pairs = QKPairs(q, k[:60], np.arange(60), np.ones(60), labels)
        found = ContrastiveQKDecomposer(rank="null", n_permutations=99, random_state=seed)
        kept += found.fit(pairs).rank_ > 0
    assert kept <= 0.05 * runs


@pytest.mark.parametrize("whiten", [None, "qk"])
def test_null_of_queries_whose_keys_are_all_of_one_kind(whiten):
    """Keys of one context share their query, so that contexts are exchanged as wholes."""
    kept, runs = 0, 60
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        index = np.repeat(np.arange(40), 15)
        labels = rng.integers(0, 2, 40)
        pairs = QKPairs(
            rng.normal(size=(40, 6)) + 1, rng.normal(size=(600, 6)) + 1, index, np.ones(40),
            labels[index],
        )  # fmt: skip
        found = ContrastiveQKDecomposer(
            rank="null", n_permutations=99, whiten=whiten, random_state=seed
        )
        kept += found.fit(pairs).rank_ > 0
    assert kept <= 0.05 * runs


def test_whitening_keeps_the_power_of_the_null_where_kinds_are_unequal():
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        q, k = rng.normal(size=(2, 165, 8))
        k[:15, 0] += 3 * q[:15, 0]
        null = ContrastiveQKDecomposer("null", whiten="qk", n_permutations=99, random_state=seed)
        found += null.fit_pairs(q[:15], k[:15], q[15:], k[15:]).rank_ > 0
    assert found >= 14


def test_null_keeps_nothing_when_labels_of_features_are_shuffled(pairs):
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(pairs.key_labels.reshape(len(pairs), -1, 2), axis=1).reshape(-1, 2)
    noise = QKPairs(
        pairs.queries, pairs.keys, pairs.query_index, pairs.query_labels, shuffled,
    )  # fmt: skip
    found = ContrastiveQKDecomposer(rank="null", random_state=0).fit(noise)
    assert found.rank_.tolist() == [0, 0]
    assert found.transform(noise).shape == (len(noise), 0)
    assert found.score(noise) == 0.5
    table = found.attribute(noise)
    np.testing.assert_allclose(table["residual"], table["total"])


def test_null_finds_the_features_that_are_there(pairs):
    found = ContrastiveQKDecomposer(rank="null", random_state=0).fit(pairs)
    assert found.rank_.tolist() == [R1, R2]
    assert found.null_singular_values_.shape == (2, 199)
    assert (found.summary()["null_threshold"] > 0).all()
