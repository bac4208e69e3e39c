"""ContrastiveQKDecomposer: what it finds, splits and exchanges, and how it composes."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
from contrasts import R1, R2, codes, feature_pairs, mapped, matched_head, pairs_with, random_map
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skhead import ContrastiveQKDecomposer, QKPairs, QKTransformer
from skhead.exceptions import DegenerateHeadError, HeadShapeError, NoContrastError

WAYS = [{}, {"center": True}, {"whiten": "qk"}, {"pair_weighting": "query"}]


@pytest.fixture(scope="module")
def pairs():
    return feature_pairs()


def rows_of(pairs):
    """Pairs of one feature as rows of a matrix, with a verdict for each."""
    first = pairs.feature("z1")
    rows = np.concatenate([first.queries[first.query_index], first.keys], axis=1)
    return rows, first.agreement[:, 0]


def projector(rows):
    return rows.T @ rows


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_recovers_both_features_and_their_subspaces(pairs, way):
    found = ContrastiveQKDecomposer(**way).fit(pairs)
    assert found.rank_.tolist() == [R1, R2]
    assert (found.spectral_gap_ > 1e6).all()
    into_queries, into_keys = matched_head()
    for name, part in (("z1", slice(0, R1)), ("z2", slice(R1, None))):
        decomposition = found.decompositions_[name]
        for components, truth, limit in (
            (decomposition.key_components, into_keys[part], 1e-9),
            (decomposition.query_components, into_queries[part], 0.25),
        ):
            np.testing.assert_allclose(components @ components.T, np.eye(len(truth)), atol=1e-10)
            left = truth - truth @ projector(components)
            assert np.linalg.norm(left) < limit * np.linalg.norm(truth)


def test_moments_are_means_over_pairs(pairs):
    first = QKPairs(
        pairs.queries, pairs.keys, pairs.query_index, pairs.query_labels[:, 0],
        pairs.key_labels[:, 0],
    )  # fmt: skip
    found = ContrastiveQKDecomposer().fit(first)
    kinds = first.agreement[:, 0]
    q = first.queries[first.query_index]
    for kind, mean, n in ((1, found.C_pos_, found.n_pos_), (0, found.C_neg_, found.n_neg_)):
        own = kinds == kind
        np.testing.assert_allclose(mean, q[own].T @ first.keys[own] / own.sum(), atol=1e-12)
        assert n == own.sum()


def test_query_weighting_gives_every_query_the_same_say():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 3)), rng.normal(size=(6, 3))
    pairs = QKPairs(q, k, [0, 0, 0, 0, 1, 1], [1, 1], [1, 0, 0, 0, 1, 0])
    found = ContrastiveQKDecomposer(pair_weighting="query").fit(pairs)
    negative = (np.outer(q[0], k[1:4].mean(0)) + np.outer(q[1], k[5])) / 2
    np.testing.assert_allclose(found.C_neg_, negative)


def test_groups_hold_the_nuisance_fixed():
    """A nuisance that goes with the feature is taken for it, unless pairs are matched."""
    rng = np.random.default_rng(0)
    n, context = 500, 40
    asked = rng.choice([-1.0, 1.0], n)
    index = np.repeat(np.arange(n), context)
    feature = rng.choice([-1.0, 1.0], n * context)
    nuisance = np.where(rng.random(n * context) < 0.9, feature, -feature)
    queries = np.stack([asked, np.ones(n)], axis=1)
    keys = np.stack([feature, 3 * nuisance * asked[index]], axis=1)
    keys += 0.1 * rng.normal(size=keys.shape)
    fields = {"query_labels": asked, "key_labels": feature}
    naive = ContrastiveQKDecomposer(rank=1).fit(QKPairs(queries, keys, index, **fields))
    matched = ContrastiveQKDecomposer(rank=1).fit(
        QKPairs(queries, keys, index, **fields, key_groups=nuisance)
    )
    assert abs(naive.key_components_[0, 1]) > 0.9
    assert abs(matched.key_components_[0, 0]) > 0.99


def test_matched_negatives_weigh_as_much_as_the_positives_of_their_stratum():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 3)), rng.normal(size=(7, 3))
    index, groups = [0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 1]
    pairs = QKPairs(q, k, index, [1, 1], [1, 0, 1, 0, 0, 1, 0], key_groups=groups)
    found = ContrastiveQKDecomposer(rank=1).fit(pairs)
    np.testing.assert_allclose(found.C_pos_, np.outer(q[0], k[[0, 2]].mean(0)))
    np.testing.assert_allclose(found.C_neg_, np.outer(q[0], k[1] / 2 + k[[3, 4]].mean(0) / 2))
    assert (found.n_pos_, found.n_neg_) == (2, 3)


def test_released_weighting_finds_the_mean_key_instead_of_the_category():
    """Five categories with a shared mean key; a query has 5 keys that agree and 20 that differ."""
    rng = np.random.default_rng(0)
    d, n = 32, 400
    mean_key, offsets = rng.normal(size=d), 0.4 * rng.normal(size=(5, d))
    offsets -= offsets.mean(0)
    offsets -= np.outer(offsets @ mean_key, mean_key) / (mean_key @ mean_key)
    category = np.tile(np.repeat(np.arange(5), 5), (n, 1))
    keys = mean_key + offsets[category] + 0.3 * rng.normal(size=(n, 25, d))
    queries = rng.normal(size=d) + 0.3 * rng.normal(size=(n, d))
    pairs = QKPairs(
        queries, keys.reshape(-1, d), np.repeat(np.arange(n), 25), np.zeros(n), category.ravel()
    )
    cosine = {}
    unit = mean_key / np.linalg.norm(mean_key)
    contrast = offsets[0] - offsets[1:].mean(0)
    contrast /= np.linalg.norm(contrast)
    for weighting in ("pair", "released"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = ContrastiveQKDecomposer(rank=1, pair_weighting=weighting).fit(pairs)
        key = found.key_components_[0]
        cosine[weighting] = abs(key @ unit), abs(key @ contrast)
    assert cosine["released"][0] > 0.95
    assert cosine["released"][1] < 0.3
    assert cosine["pair"][0] < 0.1
    assert cosine["pair"][1] > 0.99
    with pytest.warns(UserWarning, match="divides sums over pairs by the number of queries"):
        ContrastiveQKDecomposer(pair_weighting="released").fit(pairs)


def test_classes_have_their_own_contrast_and_a_union_without_the_redundant_direction():
    rng = np.random.default_rng(0)
    d, n, classes = 16, 500, np.array(["a", "b", "c", "d", "e"])
    offsets = rng.normal(size=(5, d))
    asked = rng.integers(0, 5, n)
    category = np.tile(np.repeat(np.arange(5), 3), (n, 1))
    keys = rng.normal(size=d) + offsets[category] + 0.05 * rng.normal(size=(n, 15, d))
    queries = rng.normal(size=(5, d))[asked] + 0.05 * rng.normal(size=(n, d))
    pairs = QKPairs(
        queries, keys.reshape(-1, d), np.repeat(np.arange(n), 15), classes[asked],
        classes[category.ravel()],
    )  # fmt: skip
    found = ContrastiveQKDecomposer(per_class=True).fit(pairs)
    assert found.feature_names_ == list(classes)
    assert found.rank_.tolist() == [1] * 5
    assert len(found.union_key_components_) == 4
    spread = offsets - offsets.mean(0)
    np.testing.assert_allclose(
        spread @ projector(found.union_key_components_), spread, atol=0.1 * np.abs(spread).max()
    )
    halves = ContrastiveQKDecomposer(per_class=True)
    halves.partial_fit(pairs[:200]).partial_fit(pairs[200:])
    np.testing.assert_allclose(halves.C_pos_, found.C_pos_, atol=1e-10)
    assert 0.4 < found.score(pairs) <= 1
    rows = np.concatenate([pairs.queries[pairs.query_index], pairs.keys], axis=1)
    assert found.attribute(rows)["e"].equals(found.attribute(pairs)["e"])
    np.testing.assert_array_equal(found.transform_keys(rows), found.transform_keys(pairs))
    only = pairs[np.flatnonzero(asked == 2)]
    assert found.score(only) == ContrastiveQKDecomposer(per_class=True).fit(only).score(only)
    with pytest.raises(ValueError, match="no query looks for one of a, b, c, d, e"):
        found.score(pairs, np.full(n, "f"))


def test_rounding_is_no_feature_where_queries_span_few_directions():
    whole = feature_pairs(2000)
    single = pairs_with(whole, whole.queries.astype(np.float32), whole.keys.astype(np.float32))
    for pairs in (whole, single):
        assert ContrastiveQKDecomposer(whiten="qk").fit(pairs).rank_.tolist() == [R1, R2]


@pytest.mark.parametrize("attribution", ["oblique", "query"])
def test_parts_of_a_score_sum_to_it(pairs, attribution):
    table = ContrastiveQKDecomposer(attribution=attribution).fit(pairs).attribute(pairs)
    parts = table[["z1", "z2", "residual"]].sum(axis=1)
    np.testing.assert_allclose(parts, table["total"], atol=1e-5)
    np.testing.assert_allclose(table["total"], pairs.logits(), atol=1e-9)
    assert table["query"].tolist() == pairs.query_index.tolist()


def test_oblique_parts_are_those_of_the_features():
    noisy = feature_pairs(noise=0.05)
    found = ContrastiveQKDecomposer().fit(feature_pairs(n_queries=3000, seed=1, noise=0.05))
    z = np.random.default_rng(0).choice([-1.0, 1.0], size=(400, 12, R1 + R2))
    true = 2 * noisy.scale * np.einsum("nd,nkd->nkd", z[:, 0], z).reshape(-1, R1 + R2)
    assert np.array_equal(codes(z[..., :R1]).ravel(), noisy.key_labels[:, 0])
    table = found.attribute(noisy)
    for name, part in (("z1", slice(0, R1)), ("z2", slice(R1, None))):
        truth = true[:, part].sum(1)
        left = np.sum((truth - table[name]) ** 2) / np.sum((truth - truth.mean()) ** 2)
        assert left < 0.15
    assert found.explained_share(noisy).mean() > 0.9


@pytest.mark.parametrize("whiten", [None, "qk"])
def test_oblique_parts_do_not_depend_on_the_basis_of_the_head(pairs, whiten):
    matrix = random_map()
    other = mapped(pairs, matrix)
    plain, moved = (
        ContrastiveQKDecomposer(rank=1.0 if whiten is None else 0.99, whiten=whiten).fit(p)
        for p in (pairs, other)
    )
    a, b = plain.attribute(pairs), moved.attribute(other)
    if whiten is None:
        assert plain.rank_.tolist() == moved.rank_.tolist()
    else:
        np.testing.assert_allclose(plain.singular_values_, moved.singular_values_, atol=1e-6)
    np.testing.assert_allclose(a[["z1", "z2"]], b[["z1", "z2"]], atol=1e-5)


def test_ranks_in_a_bad_basis_hold_only_when_whitened(pairs):
    other = mapped(pairs, random_map(condition=300))
    assert ContrastiveQKDecomposer().fit(other).rank_.sum() < R1 + R2
    assert ContrastiveQKDecomposer(whiten="qk").fit(other).rank_.tolist() == [R1, R2]


def test_order_of_features_matters_to_the_released_formula_alone(pairs):
    queries = pairs.queries @ random_map(condition=3)
    keys = pairs.keys @ np.linalg.inv(random_map(condition=3)).T
    first, second = (pairs_with(pairs, queries, keys, order) for order in ([0, 1], [1, 0]))
    for attribution, same in (("oblique", True), ("query", False)):
        tables = [
            ContrastiveQKDecomposer(attribution=attribution).fit(p).attribute(p)
            for p in (first, second)
        ]
        assert np.allclose(tables[0]["z1"], tables[1]["z1"], atol=1e-8) == same


def test_features_of_several_decomposers_share_a_score(pairs):
    one, two = (ContrastiveQKDecomposer().fit(pairs.feature(name)) for name in ("z1", "z2"))
    both = ContrastiveQKDecomposer().fit(pairs).attribute(pairs)
    joined = one.attribute(pairs, others=[two])
    np.testing.assert_allclose(joined, both[joined.columns], atol=1e-9)
    with pytest.raises(ValueError, match="two decomposers have a feature 'z1'"):
        one.attribute(pairs, others=[one])
    narrow = ContrastiveQKDecomposer().fit(feature_pairs(d_head=12))
    with pytest.raises(ValueError, match="same head, unnamed of d_head 16"):
        one.attribute(pairs, others=[narrow])


def test_nearly_orthogonal_sides_are_warned_of():
    rng = np.random.default_rng(0)
    q, k = np.zeros((400, 3)), np.zeros((400, 3))
    sign = rng.choice([-1.0, 1.0], 400)
    q[:, 0], k[:, 1] = 1, sign
    q[:, 1] = 1e-6
    found = ContrastiveQKDecomposer(rank=1).fit_pairs(
        q[sign > 0], k[sign > 0], q[sign < 0], k[sign < 0]
    )
    with pytest.warns(UserWarning, match="nearly orthogonal"):
        found.attribute(np.concatenate([q, k], axis=1))


def test_score_is_the_area_under_the_curve(pairs):
    found = ContrastiveQKDecomposer().fit(pairs)
    assert found.score(pairs) == pytest.approx(1.0)
    noisy = feature_pairs(200, seed=3, grouped=False, noise=1.0)
    table, kinds = found.attribute(noisy), noisy.agreement
    areas = [roc_auc_score(kinds[:, i], table[name]) for i, name in enumerate(("z1", "z2"))]
    assert found.score(noisy) == pytest.approx(np.mean(areas))
    other = noisy.query_labels[np.random.default_rng(0).permutation(200)]
    assert abs(found.score(noisy, other) - 0.5) < 0.05


def test_names_of_features_are_no_names_of_columns_or_conditions(pairs):
    for names in (("query", "total"), ("residual", "z2"), ("none", "z2"), ("all", "z2")):
        called = replace(pairs, features=names)
        found, usual = (ContrastiveQKDecomposer().fit(given) for given in (called, pairs))
        assert found.score(called) == usual.score(pairs)
        np.testing.assert_array_equal(found.explained_share(called), usual.explained_share(pairs))
        if names[0] in ("none", "all"):
            with pytest.raises(ValueError, match="intervene: features must not be named 'none' or"):
                found.intervene(called)
        else:
            with pytest.raises(ValueError, match=f"attribute: feature '{names[0]}' has the name"):
                found.attribute(called)


def test_swap_exchanges_coordinates_and_nothing_else(pairs):
    found = ContrastiveQKDecomposer().fit(pairs)
    changed = found.swap(pairs.keys, [0, 5], [1, 7], features=["z1"])
    basis = found.key_subspace("z1")
    np.testing.assert_allclose(changed[[0, 1]] @ basis, pairs.keys[[1, 0]] @ basis)
    rest = np.eye(16) - basis @ basis.T
    np.testing.assert_allclose(changed @ rest, pairs.keys @ rest, atol=1e-12)
    np.testing.assert_array_equal(changed[8:], pairs.keys[8:])
    assert np.array_equal(found.swap(changed, [0, 5], [1, 7], ["z1"]).round(9), pairs.keys.round(9))
    with pytest.raises(ValueError, match="none of them twice"):
        found.swap(pairs.keys, [0, 1], [1, 2])
    with pytest.raises(ValueError, match="none of them twice"):
        found.swap(pairs.keys[:3], [0, -3], [1, 2])
    with pytest.raises(IndexError, match="out of bounds"):
        found.swap(pairs.keys[:3], 0, 3)
    with pytest.raises(ValueError, match="has the features z1, z2, not 'z9'"):
        found.swap(pairs.keys, 0, 1, ["z9"])
    whole = np.round(10 * pairs.keys)
    exact = found.swap(whole, 0, 1)
    np.testing.assert_array_equal(found.swap(whole.astype(int), 0, 1), exact)
    with pytest.raises(ValueError, match="contains NaN"):
        found.transform(np.full((2, 16), np.nan))


def test_exchanging_both_features_moves_attention_to_the_target():
    sharp = feature_pairs(600, context=8, grouped=False, scale=4.0)
    found = ContrastiveQKDecomposer().fit(feature_pairs(600))
    table = found.intervene(sharp, original=0, random_state=0)
    assert table.index.tolist() == [
        "none", "z1", "z2", "all", "random (rank 3)", "random (rank 5)", "random (rank 8)"
    ]  # fmt: skip
    none, both = table.loc["none"], table.loc["all"]
    assert both["attention_target"] == pytest.approx(none["attention_original"], abs=1e-9)
    assert both["flip_rate"] > 0.9
    assert none["flip_rate"] == 0
    assert table["rank_share"].tolist() == [0, 3 / 16, 5 / 16, 0.5, 3 / 16, 5 / 16, 0.5]
    assert table.loc["random (rank 8)", "attention_target"] < both["attention_target"]
    assert table["n_draws"].tolist() == [1, 1, 1, 1, 10, 10, 10]
    again = found.intervene(sharp, original=0, random_state=0)
    assert table.equals(again)


def test_attention_by_hand():
    rng = np.random.default_rng(0)
    pairs = feature_pairs(30, context=4, grouped=False)
    found = ContrastiveQKDecomposer().fit(feature_pairs(300))
    first, target = np.arange(30) * 4, rng.integers(1, 4, 30)
    table = found.intervene(pairs, 0, target, n_random=0)
    swapped = found.swap(pairs.keys, first, first + target, ["z2"])
    expected = []
    for i in range(30):
        logits = pairs.scale * swapped[4 * i : 4 * i + 4] @ pairs.queries[i]
        weights = np.exp(logits) / np.exp(logits).sum()
        expected.append([weights[0], weights[target[i]]])
    found = table.loc["z2", ["attention_original", "attention_target"]]
    np.testing.assert_allclose(found.astype(float), np.mean(expected, axis=0))


def test_the_original_may_have_to_agree():
    """Queries attend to a key that differs, and the one that agrees comes second."""
    queries, order = np.eye(3)[[0, 1]], [1, 0, 3, 2, 5, 4]
    keys = np.array([[3.0, 0, 0], [2, 0, 0], [0, 0, 1], [0, 3, 0], [0, 2, 0], [0, 0, 1]])
    labels = np.array(["b", "a", "c", "b", "a", "c"])
    index = np.array([0, 0, 0, 1, 1, 1])
    pairs = QKPairs(queries, keys[order], index[order], ["a", "a"], labels[order], scale=1.0)
    found = ContrastiveQKDecomposer(rank=1).fit(pairs)
    for original, key in (("attended", 3.0), ("agreeing", 2.0)):
        table = found.intervene(pairs, original, target=None, n_random=0, random_state=0)
        weights = np.exp([3.0, 2.0, 0.0])
        expected = np.exp(key) / weights.sum()
        assert table.loc["none", "attention_original"] == pytest.approx(expected)
        assert table.loc["none", "n_queries"] == 2


def test_errors_of_interventions(pairs):
    found = ContrastiveQKDecomposer().fit(pairs)
    with pytest.raises(TypeError, match="needs QKPairs, whose queries choose"):
        found.intervene(rows_of(pairs)[0])
    single = QKPairs(
        pairs.queries, pairs.queries, np.arange(400), pairs.query_labels, pairs.query_labels,
        features=("z1", "z2"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="no query has both a key to take for the original"):
        found.intervene(single)
    with pytest.raises(ValueError, match="original of query 0 is 12, and it has 12 keys"):
        found.intervene(pairs, original=12)
    with pytest.raises(ValueError, match="an integer, or one for each of the 400 queries"):
        found.intervene(pairs, target=[0])
    with pytest.raises(ValueError, match="original must be 'attended', 'agreeing' or places"):
        found.intervene(pairs, original="first")
    with pytest.raises(ValueError, match="original and target of query 0 are one key"):
        found.intervene(pairs, original=3, target=3)


def test_rows_of_a_matrix_are_pairs(pairs):
    X, kinds = rows_of(QKPairs(
        pairs.queries, pairs.keys, pairs.query_index, pairs.query_labels, pairs.key_labels,
        features=("z1", "z2"),
    ))  # fmt: skip
    found = ContrastiveQKDecomposer().fit(X, kinds)
    assert found.n_features_in_ == 32
    for labels_needed in (found.partial_fit, found.score):
        with pytest.raises(ValueError, match="requires y to be passed"):
            labels_needed(X)
    single = ContrastiveQKDecomposer().fit_pairs(
        X[kinds == 1, :16], X[kinds == 1, 16:], X[kinds == 0, :16], X[kinds == 0, 16:]
    )
    np.testing.assert_allclose(found.C_neg_, single.C_neg_)
    np.testing.assert_allclose(found.transform(X), found.transform(X[:, :16]))
    np.testing.assert_allclose(found.transform_keys(X), found.transform_keys(X[:, 16:]))
    scaled = make_pipeline(StandardScaler(), ContrastiveQKDecomposer(rank=3)).fit(X, kinds)
    assert scaled.score(X, kinds) > 0.9
    assert found.get_feature_names_out().tolist() == [f"feature_{i}" for i in range(found.rank_)]


def test_pandas_output_has_names(pairs):
    found = ContrastiveQKDecomposer().set_output(transform="pandas").fit(pairs)
    frame = found.transform(pairs)
    assert list(frame.columns) == [f"z1_{i}" for i in range(3)] + [f"z2_{i}" for i in range(5)]
    assert found.component_features_ == ["z1"] * 3 + ["z2"] * 5


def test_grid_search_never_parts_the_keys_of_a_query(pairs):
    grid = {"rank": [1, 3, 0.9], "center": [False, True], "whiten": [None, "qk"]}
    groups = np.arange(len(pairs)) // 10
    search = GridSearchCV(ContrastiveQKDecomposer(), grid, cv=GroupKFold(4), n_jobs=2)
    search.fit(pairs, groups=groups)
    assert search.best_params_["rank"] != 1
    assert search.best_score_ > 0.95
    scores = cross_val_score(ContrastiveQKDecomposer(), pairs, cv=4)
    assert (scores > 0.95).all()


def test_pipeline_with_a_scaler_in_front(pairs):
    model = make_pipeline(QKTransformer(keys="passthrough"), ContrastiveQKDecomposer())
    grid = {"qktransformer__queries": [None, StandardScaler(with_mean=False), "passthrough"]}
    search = GridSearchCV(model, grid, cv=3).fit(pairs)
    assert search.best_score_ > 0.9
    transformed = search.best_estimator_[0].transform(pairs)
    assert np.array_equal(transformed.keys, pairs.keys)
    scaled = QKTransformer().fit(pairs).transform(pairs)
    np.testing.assert_allclose(scaled.queries.std(0), 1)
    np.testing.assert_allclose(scaled.keys.mean(0), 0, atol=1e-12)
    assert pickle.loads(pickle.dumps(clone(QKTransformer().fit(pairs)))).queries is None
    with pytest.raises(TypeError, match="takes QKPairs, got ndarray"):
        QKTransformer().fit(pairs.queries)
    with pytest.raises(HeadShapeError, match="fitted on d_head 16, and these pairs have 12"):
        QKTransformer().fit(pairs).transform(feature_pairs(d_head=12))


def test_clone_and_pickle(pairs):
    found = ContrastiveQKDecomposer(rank="null", n_permutations=99, random_state=0).fit(pairs)
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.transform(pairs), found.transform(pairs))
    again.partial_fit(pairs)
    assert again.n_queries_seen_ == 2 * len(pairs)
    fresh = clone(found).fit(pairs)
    np.testing.assert_array_equal(fresh.null_singular_values_, found.null_singular_values_)
    assert "ContrastiveQKDecomposer" in found._repr_html_()


def test_a_second_fit_forgets_the_first(pairs):
    found = ContrastiveQKDecomposer(rank="null", n_permutations=99, random_state=0).fit(pairs)
    found.set_params(rank=0.99).fit(pairs.feature("z2"))
    assert found.rank_ == R2
    assert not hasattr(found, "null_singular_values_")


def test_float32_is_as_good_as_float64(pairs):
    single = pairs_with(pairs, pairs.queries.astype(np.float32), pairs.keys.astype(np.float32))
    found, exact = (ContrastiveQKDecomposer().fit(p) for p in (single, pairs))
    np.testing.assert_allclose(found.C_pos_, exact.C_pos_, atol=3e-6)
    np.testing.assert_allclose(
        projector(found.key_components_[:3]), projector(exact.key_components_[:3]), atol=1e-5
    )


def test_summary_says_what_was_found(pairs):
    table = ContrastiveQKDecomposer().fit(pairs).summary()
    assert table.index.tolist() == ["z1", "z2"]
    assert table["rank_share"].tolist() == [3 / 16, 5 / 16]
    assert (table["energy"] >= 0.99).all()
    assert table.loc["z1", "n_queries"] <= len(pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, a share of energy"),
        ({"rank": 1.5}, "rank must be a positive integer, a share of energy"),
        ({"rank": "all"}, "rank must be .* or 'null'; got 'all'"),
        ({"rank": True}, "rank must be a positive integer"),
        ({"rank": 9}, "rank=9 components of feature 'z1' .* has 3 directions; lower the rank"),
        ({"whiten": "q"}, "whiten must be one of None, 'qk'"),
        ({"pair_weighting": "key"}, "pair_weighting must be one of 'pair', 'query', 'released'"),
        ({"attribution": "key"}, "attribution must be one of 'oblique', 'query'"),
        ({"alpha": 0}, "alpha must be between 0 and 1"),
        ({"rank": "null", "n_permutations": 50}, "50 permutations cannot reach alpha=0.01"),
        ({"union_tol": "x"}, "union_tol must be a finite number"),
        ({"n_permutations": 99.5}, "n_permutations must be an integer of at least 1"),
    ],
)
def test_wrong_parameters(pairs, options, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveQKDecomposer(**options).fit(pairs)


def test_wrong_pairs(pairs):
    fit = ContrastiveQKDecomposer().fit
    with pytest.raises(ValueError, match="feature 'z1' has 0 pairs that agree and"):
        fit(pairs, np.full((400, 2), 999))
    with pytest.raises(ValueError, match="differ among keys of one context and group; a contrast"):
        fit(pairs, np.full((400, 2), 999))
    with pytest.raises(ValueError, match="label for each of the 400 queries"):
        fit(pairs, np.zeros((399, 2)))
    with pytest.raises(ValueError, match="too few queries, n_samples=1"):
        fit(pairs[:1])
    with pytest.raises(ValueError, match="no query has a label"):
        ContrastiveQKDecomposer(per_class=True).fit(pairs, np.full((400, 2), np.nan))
    pairs = feature_pairs(grouped=False)
    bad = pairs.keys.copy()
    bad[7, 2] = np.nan
    with pytest.raises(DegenerateHeadError, match="row 7 of the keys holds NaN"):
        fit(pairs_with(pairs, pairs.queries, bad))
    with pytest.raises(DegenerateHeadError, match="overflow; scale them down"):
        fit(pairs_with(pairs, 1e200 * pairs.queries, 1e200 * pairs.keys))
    same = QKPairs(np.ones((2, 3)), np.ones((4, 3)), [0, 0, 1, 1], [1, 1], [1, 0, 1, 0])
    for whiten in (None, "qk"):
        with pytest.raises(NoContrastError, match="feature 'feature' makes no difference"):
            ContrastiveQKDecomposer(whiten=whiten).fit(same)


def test_wrong_rows(pairs):
    X, kinds = rows_of(QKPairs(pairs.queries, pairs.keys, pairs.query_index, pairs.query_labels,
                               pairs.key_labels, features=("z1", "z2")))  # fmt: skip
    with pytest.raises(HeadShapeError, match="31 columns cannot be halved"):
        ContrastiveQKDecomposer().fit(X[:, :31], kinds)
    with pytest.raises(ValueError, match="needs y, whether each of them agrees"):
        ContrastiveQKDecomposer().fit(X)
    with pytest.raises(ValueError, match="verdict for each of the 4800 pairs"):
        ContrastiveQKDecomposer().fit(X, kinds[:-1])
    with pytest.raises(ValueError, match="per_class=True needs classes"):
        ContrastiveQKDecomposer(per_class=True).fit(X, kinds)
    with pytest.raises(ValueError, match="booleans, or 1 for pairs that agree and 0"):
        ContrastiveQKDecomposer().fit(X, kinds + 1)
    found = ContrastiveQKDecomposer().fit(X, kinds)
    with pytest.raises(ValueError, match="needs both"):
        found.score(X[kinds == 1], kinds[kinds == 1])


def test_other_pairs_than_fitted(pairs):
    found = ContrastiveQKDecomposer().fit(pairs)
    with pytest.raises(HeadShapeError, match="fitted on d_head 16, and these pairs have 12"):
        found.score(feature_pairs(d_head=12))
    with pytest.raises(ValueError, match="fitted on the features z1, z2, and these pairs have z2"):
        found.score(pairs.feature("z2"))
    with pytest.raises(ValueError, match="fit them on their own"):
        found.partial_fit(pairs.feature("z2"))
    named = ContrastiveQKDecomposer().fit(feature_pairs(head="L1H2"))
    assert named.score(pairs) == found.score(pairs)
    with pytest.raises(ValueError, match="fitted on L1H2, and these pairs are of L3H0"):
        named.score(feature_pairs(head="L3H0"))
    with pytest.raises(ValueError, match="n_random must be an integer of at least 0"):
        found.intervene(pairs, n_random=-1)
