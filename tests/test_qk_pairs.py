"""The container of queries and keys."""

from __future__ import annotations

import pickle

import joblib
import numpy as np
import pytest
import torch
from contrasts import feature_pairs
from sklearn.model_selection import GroupKFold, train_test_split
from sklearn.utils import _safe_indexing

import skhead
from skhead import QKPairs
from skhead.exceptions import HeadShapeError

RNG = np.random.default_rng(0)
Q, K = RNG.normal(size=(3, 4)), RNG.normal(size=(6, 4))
INDEX = [2, 0, 1, 0, 2, 2]


def small(**changes):
    fields = {
        "queries": Q,
        "keys": K,
        "query_index": INDEX,
        "query_labels": ["a", "b", None],
        "key_labels": ["a", "a", "c", "b", "a", "c"],
    }
    return QKPairs(**{**fields, **changes})


def test_agreement_of_labels_and_missing_ones():
    assert small().agreement.ravel().tolist() == [-1, 1, 0, 0, -1, -1]
    numbers = small(query_labels=[0.0, 1.0, np.nan], key_labels=[0, 0, np.nan, 1, 0, 2.0])
    assert numbers.agreement.ravel().tolist() == [-1, 1, -1, 0, -1, -1]


def test_the_summary_counts_pairs_without_a_label():
    pairs = small()
    counts = pairs._summary().listings[0].frame
    assert counts[["positive", "negative", "not labelled"]].values.tolist() == [[1, 2, 3]]


def test_a_missing_label_among_texts_is_missing():
    pairs = small(
        query_labels=["a", float("nan"), "b"], key_labels=["b", np.nan, None, "a", "b", "c"]
    )
    assert pairs.agreement.ravel().tolist() == [1, -1, -1, 1, 1, 0]
    prompts = skhead.QKPrompts(
        [[1, 2]] * 3, [-1] * 3, [[0]] * 3, ["a", np.nan, "b"], [["a"], [None], ["b"]],
        features="word",
    )  # fmt: skip
    part = prompts[[0, 1]]
    assert part.query_labels[0] == "a" and np.isnan(part.query_labels[1])
    assert part.key_labels[1][0] is None
    assert part.features == ("word",)


def test_slicing_takes_queries_with_all_their_keys_in_order():
    part = small()[[2, 0]]
    assert np.array_equal(part.queries, Q[[2, 0]])
    assert np.array_equal(part.keys, K[[0, 4, 5, 1, 3]])
    assert part.query_index.tolist() == [0, 0, 0, 1, 1]
    twice = small()[[0, 0]]
    assert twice.query_index.tolist() == [0, 0, 1, 1]
    assert np.array_equal(twice.keys, K[[1, 3, 1, 3]])


@pytest.mark.parametrize("key", [1, slice(1, 2), [1], np.array([False, True, False])])
def test_every_kind_of_index(key):
    assert np.array_equal(small()[key].keys, K[[2]])


def test_slices_keep_scores_and_all_fields():
    pairs = feature_pairs(
        20, query_names=[f"q{i}" for i in range(20)], key_names=[f"k{i}" for i in range(240)]
    )
    rows = np.array([3, 17, 5])
    part = pairs[rows]
    keys = np.concatenate([np.flatnonzero(pairs.query_index == row) for row in rows])
    assert np.allclose(part.logits(), pairs.logits()[keys])
    assert np.array_equal(part.agreement, pairs.agreement[keys])
    assert np.array_equal(part.key_groups, pairs.key_groups[keys])
    assert part.key_names.tolist() == pairs.key_names[keys].tolist()
    assert part.query_names.tolist() == ["q3", "q17", "q5"]


def test_scikit_learn_splits_it_by_query():
    pairs = feature_pairs(30)
    train, test = train_test_split(pairs, random_state=0)
    assert len(train) + len(test) == 30
    folds = GroupKFold(3).split(pairs, groups=np.arange(30) // 5)
    assert sum(len(_safe_indexing(pairs, rows)) for _, rows in folds) == 30


def test_pickles_and_hashes_by_content():
    pairs = feature_pairs(10)
    again = pickle.loads(pickle.dumps(pairs))
    assert joblib.hash(again) == joblib.hash(pairs) == joblib.hash(pairs[np.arange(10)])
    assert joblib.hash(again[:9]) != joblib.hash(pairs)
    assert repr(again) == repr(pairs)


def test_pickle_of_a_slice_does_not_hold_the_whole():
    pairs = feature_pairs(400)
    assert len(pickle.dumps(pairs[:4])) < len(pickle.dumps(pairs)) / 20


def test_logits_are_scaled_inner_products():
    pairs = small(scale=0.7)
    expected = [0.7 * Q[i] @ k for i, k in zip(INDEX, K, strict=True)]
    assert np.allclose(pairs.logits(), expected)
    assert np.allclose(small().logits(), np.array(expected) / 0.7 / 2)


def test_pairs_with_queries_of_their_own():
    pairs = QKPairs.from_pairs(Q, K[:3], Q[:2], K[3:5], feature="used")
    assert pairs.agreement.ravel().tolist() == [1, 1, 1, 0, 0]
    assert pairs.features == ("used",)
    assert np.array_equal(pairs.queries[pairs.query_index], np.concatenate([Q, Q[:2]]))


def test_torch_and_sixteen_bits_come_in():
    pairs = small(queries=torch.from_numpy(Q).to(torch.bfloat16), keys=K.astype(np.float16))
    assert pairs.queries.dtype == pairs.keys.dtype == np.float32
    mixed = small(queries=Q.astype(np.float32), keys=K.round().astype(int))
    assert mixed.queries.dtype == mixed.keys.dtype == np.float64


def test_one_feature_of_several():
    pairs = feature_pairs(10)
    second = pairs.feature("z2")
    assert second.features == ("z2",)
    assert np.array_equal(second.agreement[:, 0], pairs.agreement[:, 1])
    with pytest.raises(ValueError, match="has the features z1, z2, not 'z3'"):
        pairs.feature("z3")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": K[:, :3]}, HeadShapeError, "queries have d_head 4 and keys 3"),
        ({"queries": Q[0]}, HeadShapeError, r"shape \(n, d_head\), got shape \(4,\)"),
        ({"query_index": [0] * 5}, ValueError, "query_index must be 6 integers"),
        ({"query_index": [0.5] * 6}, ValueError, "query_index must be 6 integers"),
        ({"query_index": [0, 1, 2, 3, 0, 0]}, ValueError, "key 3 belongs to query 3, .* 3 queries"),
        ({"query_labels": ["a", "b"]}, ValueError, "label for each of the 3 queries"),
        ({"key_labels": ["a"] * 7}, ValueError, "label for each of the 6 keys"),
        ({"key_labels": [["a", "b"]] * 6}, ValueError, "have 1 features and key_labels 2"),
        ({"key_groups": [[1, 2, 3]] * 6}, ValueError, "key_groups have 3 columns"),
        ({"features": ("x", "y")}, ValueError, "features must be 1 distinct names"),
        ({"key_names": ["x"]}, ValueError, "key_names must be 6 texts"),
    ],
)
def test_clear_errors(changes, error, message):
    with pytest.raises(error, match=message):
        small(**changes)


def test_errors_of_indices_and_arrays():
    with pytest.raises(IndexError, match="queries are selected by an integer.*keys along"):
        small()["a"]
    with pytest.raises(ValueError, match="always a new array|is a copy"):
        np.array(small(), copy=False)
    with pytest.raises(HeadShapeError, match="Q_neg and K_neg must have one shape"):
        QKPairs.from_pairs(Q, K[:3], Q, K[:2])
    assert np.array_equal(np.asarray(small()), Q)


def test_prompts_count_from_both_ends_and_slice():
    prompts = skhead.QKPrompts(
        [[1, 2, 3], [4, 5, 6, 7]], [-1, 2], [[0, -2], [1]], ["x", "y"], [["x", "y"], ["y"]],
        texts=["one", "two"], key_names=[["a", "b"], ["c"]],
    )  # fmt: skip
    assert prompts.query_positions == (2, 2)
    assert prompts.key_positions == ((0, 1), (1,))
    second = prompts[[1]]
    assert second.tokens == ((4, 5, 6, 7),)
    assert (second.texts, second.key_names, second.n_keys) == (("two",), (("c",),), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "there is no prompt"),
        ({"query_positions": [5]}, "the query of prompt 0 stands at 5, and the prompt has 3"),
        ({"key_positions": [[0, -4]]}, "the key of prompt 0 stands at -4"),
        ({"key_positions": [[]]}, "give at least one key"),
        ({"query_positions": [0]}, "none behind the query"),
        ({"key_labels": [["x"]]}, "prompt 0 has 2 keys, and 1 of key_labels"),
        ({"query_labels": ["x", "y"]}, "there are 1 prompts, and query_labels of 2"),
    ],
)
def test_clear_errors_of_prompts(changes, message):
    fields = {
        "tokens": [[1, 2, 3]],
        "query_positions": [-1],
        "key_positions": [[0, 1]],
        "query_labels": ["x"],
        "key_labels": [["x", "y"]],
    }
    with pytest.raises(ValueError, match=message):
        skhead.QKPrompts(**{**fields, **changes})
