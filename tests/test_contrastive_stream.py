"""ContrastiveQKDecomposer on pairs that come in parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from contrasts import feature_pairs, one_kind_each, pairs_with
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from skhead import ContrastiveQKDecomposer, QKPairs
from skhead.exceptions import DegenerateHeadError

WAYS = [{}, {"center": True}, {"whiten": "qk"}, {"pair_weighting": "query"}]


@pytest.fixture(scope="module")
def pairs():
    return feature_pairs()


@pytest.mark.parametrize("way", [*WAYS, {"rank": "null", "n_permutations": 99}], ids=str)
def test_parts_of_a_stream_add_up_to_the_whole(pairs, way):
    whole = ContrastiveQKDecomposer(random_state=0, **way).fit(pairs)
    stream = ContrastiveQKDecomposer(random_state=0, **way)
    for part in np.array_split(np.arange(len(pairs)), 3):
        stream.partial_fit(pairs[part])
    assert stream.n_queries_seen_ == len(pairs)
    np.testing.assert_allclose(stream.C_neg_, whole.C_neg_, atol=1e-10)
    np.testing.assert_allclose(stream.singular_values_, whole.singular_values_, atol=1e-10)
    assert stream.rank_.tolist() == whole.rank_.tolist()


def test_a_stream_may_begin_with_one_kind_only(pairs):
    q_pos, k_pos, q_neg, k_neg = one_kind_each(pairs)
    stream = ContrastiveQKDecomposer()
    stream.partial_fit(QKPairs.from_pairs(q_pos, k_pos, q_neg[:0], k_neg[:0]))
    with pytest.raises(NotFittedError):
        stream.transform(q_pos)
    stream.partial_fit(QKPairs.from_pairs(q_pos[:0], k_pos[:0], q_neg, k_neg))
    direct = ContrastiveQKDecomposer().fit_pairs(q_pos, k_pos, q_neg, k_neg)
    np.testing.assert_allclose(stream.C_pos_, direct.C_pos_)
    np.testing.assert_allclose(stream.key_components_, direct.key_components_)


def test_pairs_that_are_refused_leave_the_sums_alone():
    pairs = feature_pairs(grouped=False)
    bad = pairs.keys.copy()
    bad[7, 2] = np.nan
    stream = ContrastiveQKDecomposer().partial_fit(pairs)
    with pytest.raises(DegenerateHeadError, match="row 7 of the keys holds NaN"):
        stream.partial_fit(pairs_with(pairs, pairs.queries, bad))
    assert stream.n_queries_seen_ == len(pairs)
    stream.partial_fit(pairs)
    np.testing.assert_allclose(stream.C_pos_, ContrastiveQKDecomposer().fit(pairs).C_pos_)
    few = ContrastiveQKDecomposer(rank=3)
    for part in (pairs[:2], pairs[2:]):
        few.partial_fit(part)
    assert few.n_queries_seen_ == len(pairs)
    assert few.rank_.tolist() == [3, 3]


@pytest.mark.parametrize(
    "change",
    [{"center": True}, {"whiten": "qk"}, {"rank": "null"}, {"pair_weighting": "query"},
     {"per_class": True}],
)  # fmt: skip
def test_parameters_of_a_stream_must_not_change(pairs, change):
    stream = ContrastiveQKDecomposer().fit(pairs)
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} was .* when the sums were begun, and is"):
        stream.set_params(**change).partial_fit(pairs)


def test_an_empty_part_changes_nothing(pairs):
    stream = ContrastiveQKDecomposer(rank="null", n_permutations=99, random_state=0)
    stream.partial_fit(pairs).partial_fit(pairs[[]])
    np.testing.assert_array_equal(stream.C_pos_, clone(stream).fit(pairs).C_pos_)


def test_classes_that_arrive_later_are_decomposed_when_they_can_be():
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(90, 5)), rng.normal(size=(360, 5))
    labels = rng.integers(0, 3, 90)
    own = QKPairs(queries, keys, np.repeat(np.arange(90), 4), labels, rng.integers(0, 3, 360))
    early = np.flatnonzero(labels < 2)
    stream = ContrastiveQKDecomposer(per_class=True).partial_fit(own[early])
    assert stream.feature_names_ == ["0", "1"]
    late = own[np.flatnonzero(labels == 2)]
    differing = replace(
        late, query_labels=np.full(len(late), 2.0), key_labels=np.zeros(len(late.keys))
    )
    stream.partial_fit(differing)
    assert stream.feature_names_ == ["0", "1"]
    assert stream.n_queries_seen_ == 90
    assert 0 <= stream.score(own) <= 1
    stream.partial_fit(late)
    assert stream.feature_names_ == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"two classes are called '1', .* give labels of one type"):
        stream.partial_fit(own, np.array(["1"] * 90, dtype=object))
