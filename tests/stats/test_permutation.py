"""Permutation tests: exact under the null, powerful against what they are for."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score

import skhead
from skhead.exceptions import HeadShapeError
from skhead.stats.edge_statistics import (
    edge_mean,
    head_average_precision,
    in_class_nodes,
    pair_average_precision,
    top_degrees,
)
from skhead.stats.exchange import permute_heads
from skhead.stats.permutation import label_permutation_test, permutation_test

EXCHANGES = ["blocks", "within_rows", "within_columns", "rows", "columns", "both"]
LAYERS = np.repeat(np.arange(4), 6)


def forward_table(seed, n_pairs=None, layers=LAYERS):
    """Similarities whose level depends on the two layers and on nothing else."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(size=(4, 4)) * 3
    shape = (len(layers),) * 2 + (() if n_pairs is None else (n_pairs,))
    table = rng.standard_normal(shape)
    table += levels[layers][:, layers].reshape(table.shape[:2] + (1,) * (table.ndim - 2))
    table[layers[:, None] >= layers] = np.nan
    return table


def drawn_tables(table, exchange, n=5, layers=LAYERS):
    """The tables that a test looks at, the data first."""
    seen = []

    def statistic(values):
        seen.append(values.copy())
        return 0.0

    permutation_test(statistic, table, layers, layers, exchange, n, random_state=0)
    return seen


def block_contents(table, layers=LAYERS):
    return [
        np.sort(table[np.ix_(layers == a, layers == b)], axis=None)
        for a in range(4)
        for b in range(4)
    ]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_entries_stay_in_their_layers(exchange):
    layers = np.random.default_rng(0).permutation(LAYERS)
    table = forward_table(1, layers=layers)
    first, *others = drawn_tables(table, exchange, layers=layers)
    np.testing.assert_array_equal(first, table)
    for other in others:
        assert not np.array_equal(other, table, equal_nan=True)
        for before, after in zip(
            block_contents(table, layers), block_contents(other, layers), strict=True
        ):
            np.testing.assert_array_equal(before, after)


def test_two_pairs_are_enough_to_exchange():
    table = np.array([[1.0, 5.0, np.nan], [2.0, np.nan, np.nan]])
    seen = []
    permutation_test(
        lambda values: float(seen.append(values[:, 0].tolist()) or 0),
        table,
        [0, 0],
        [1, 2, 3],
        "blocks",
        20,
        random_state=0,
    )
    assert {tuple(column) for column in seen} == {(1.0, 2.0), (2.0, 1.0)}


def test_what_every_exchange_keeps():
    table = forward_table(2)
    sort = {axis: np.sort(table, axis) for axis in (0, 1)}
    for other in drawn_tables(table, "within_rows")[1:]:
        np.testing.assert_array_equal(np.sort(other, 1), sort[1])
        assert not np.array_equal(np.sort(other, 0), sort[0], equal_nan=True)
    for other in drawn_tables(table, "within_columns")[1:]:
        np.testing.assert_array_equal(np.sort(other, 0), sort[0])
    for other in drawn_tables(table, "columns")[1:]:
        np.testing.assert_array_equal(np.sort(other, 1), sort[1])
        columns = {tuple(column) for column in np.nan_to_num(other.T).tolist()}
        assert columns == {tuple(column) for column in np.nan_to_num(table.T).tolist()}
    for other in drawn_tables(table, "rows")[1:]:
        np.testing.assert_array_equal(np.sort(other, 0), sort[0])
    for other in drawn_tables(table, "both")[1:]:
        for axis in (0, 1):
            assert not np.array_equal(np.sort(other, axis), sort[axis], equal_nan=True)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_pair_kinds_are_permuted_together(exchange):
    one = forward_table(3)
    for other in drawn_tables(np.stack([one, 2 * one], axis=2), exchange)[1:]:
        np.testing.assert_allclose(other[:, :, 1], 2 * other[:, :, 0])


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_p_values_are_uniform_if_heads_of_a_layer_are_alike(exchange):
    layers = np.repeat(np.arange(2), 6)
    fixed = np.add.outer(np.sin(np.arange(12)), np.cos(np.arange(12)))
    p = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        table = rng.standard_normal((12, 12))
        table += 5 * layers[:, None] - 3 * layers
        result = permutation_test(
            lambda values: np.nansum(values * fixed),
            table,
            layers,
            layers,
            exchange,
            n_permutations=39,
            random_state=rng,
        )
        p.append(float(result.p_value))
    assert stats.kstest(np.array(p) - rng.random(300) / 40, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("side", ["upper", "lower", "two"])
def test_false_calls_of_any_head_are_bounded(side):
    runs, calls = 150, 0
    for seed in range(runs):
        result = permutation_test(
            lambda table: top_degrees(table, 15),
            forward_table(seed),
            LAYERS,
            LAYERS,
            n_permutations=39,
            side=side,
            random_state=seed,
        )
        calls += bool((result.adjusted_p_value <= 0.05).any())
    assert calls <= stats.binom.ppf(0.999, runs, 0.05)


def planted_hub(seed):
    table = forward_table(seed)
    table[3, 6:] += 6.0
    return table


def test_a_planted_hub_is_found_and_no_other():
    result = permutation_test(
        lambda table: top_degrees(table, 15),
        planted_hub(4),
        LAYERS,
        LAYERS,
        n_permutations=299,
        random_state=0,
    )
    assert np.flatnonzero(result.adjusted_p_value < 0.05).tolist() == [3]
    assert result.adjusted_p_value[3] == pytest.approx(1 / 300)
    assert (result.adjusted_p_value >= result.p_value).all()
    assert result.statistic[3] > result.null_max.mean() + 3
    assert result.null_mean.sum() == pytest.approx(30)


def test_renaming_heads_keeps_a_hub_a_hub():
    result = permutation_test(
        lambda table: top_degrees(table, 15, ends="rows").max(),
        planted_hub(5),
        LAYERS,
        LAYERS,
        exchange="rows",
        n_permutations=50,
        random_state=0,
    )
    assert float(result.p_value) == 1


def test_p_value_approaches_the_share_of_all_permutations():
    table = np.arange(16.0).reshape(4, 4) ** 2
    result = permutation_test(
        lambda values: edge_mean(values, [0, 1, 2, 3], [0, 1, 2, 3]),
        table,
        [0] * 4,
        [1] * 4,
        exchange="columns",
        n_permutations=20_000,
        random_state=1,
    )
    every = [sum(table[i, p[i]] for i in range(4)) for p in permutations(range(4))]
    assert float(result.p_value) == pytest.approx(np.mean(np.array(every) >= every[0]), abs=0.01)
    assert float(result.null_mean) == pytest.approx(np.mean(every) / 4, rel=0.01)


@pytest.mark.parametrize(
    "observed, side, expected",
    [
        (5.0, "upper", (1 + 2) / 5),
        (5.0, "lower", (1 + 3) / 5),
        (5.0, "two", 1.0),
        (8.0, "two", 2 * (1 + 1) / 5),
        (0.0, "two", 2 * (1 + 0) / 5),
    ],
)
def test_sides_and_counts_of_a_known_null(observed, side, expected):
    draws = iter([observed, 1.0, 2.0, 5.0, 9.0])
    result = permutation_test(
        lambda _: next(draws), np.eye(3), [0] * 3, [0] * 3, n_permutations=4, side=side
    )
    assert result.p_value.shape == result.null_mean.shape == ()
    assert result.p_value == result.adjusted_p_value == expected
    assert result.null_max.tolist() == result.null_min.tolist() == [1, 2, 5, 9]


def test_the_seed_decides_and_nothing_else():
    def p_values(seed, transform=lambda values: values):
        result = permutation_test(
            lambda values: top_degrees(values, 15),
            transform(forward_table(6)),
            LAYERS,
            LAYERS,
            n_permutations=40,
            random_state=seed,
        )
        return result.p_value.tolist(), result.null_max.tolist()

    assert p_values(1) == p_values(1)
    assert p_values(1) != p_values(2)
    assert p_values(1) == p_values(1, lambda values: np.exp(values) + 3)
    assert p_values(1) == p_values(np.random.default_rng(1))


def test_statistics_cannot_spoil_the_data():
    table = forward_table(7)
    kept = table.copy()

    def statistic(values):
        found = np.nansum(values)
        values[:] = 0
        return found

    result = permutation_test(statistic, table, LAYERS, LAYERS, n_permutations=5, random_state=0)
    np.testing.assert_array_equal(table, kept)
    np.testing.assert_allclose(result.null_max, result.statistic)
    assert float(result.p_value) == 1


def test_orders_of_heads_are_uniform_within_layers():
    layers = np.array([1, 0, 1, 0, 1])
    orders = permute_heads(layers, 6000, random_state=0)
    assert (layers[orders] == layers).all()
    assert (np.sort(orders, axis=1) == np.arange(5)).all()
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 12
    assert stats.chisquare(counts).pvalue > 1e-3


def test_labels_of_a_class_that_stands_out():
    table = forward_table(8)
    positive = np.isin(np.arange(24), [1, 2, 8, 14])
    table[np.ix_(positive, positive)] += 20
    result = label_permutation_test(
        lambda labels: head_average_precision(table, labels),
        positive,
        LAYERS,
        n_permutations=199,
        random_state=0,
    )
    assert float(result.statistic) == 1
    assert float(result.p_value) < 0.03


def test_labels_that_only_follow_their_layer():
    table = np.add.outer(-LAYERS, -LAYERS).astype(float)
    table += 0.01 * np.random.default_rng(9).standard_normal(table.shape)
    p = [
        float(
            label_permutation_test(
                lambda labels: head_average_precision(table, labels),
                np.isin(np.arange(24), np.random.default_rng(seed).choice(6, 3, replace=False)),
                LAYERS,
                n_permutations=39,
                random_state=seed,
            ).p_value
        )
        for seed in range(100)
    ]
    assert 0.35 < np.mean(p) < 0.68
    assert np.mean(np.array(p) <= 0.05) < 0.16


def test_labels_of_many_classes_keep_their_layers():
    labels = np.array(["a", "b", "a", "c", "c", "b"])
    layers = [0, 0, 0, 1, 1, 1]
    seen = []
    label_permutation_test(lambda y: seen.append(y.tolist()) or 0.0, labels, layers, 20)
    assert {tuple(sorted(y[:3])) for y in seen} == {("a", "a", "b")}
    assert len({tuple(y) for y in seen}) > 3


def test_degrees_of_a_small_graph():
    table = np.array([[np.nan, 9, 8, 1], [2, np.nan, 7, 1], [0, 0, np.nan, 6], [0, 0, 0, np.nan]])
    assert top_degrees(table, 3).tolist() == [2, 2, 2, 0]
    assert top_degrees(table, 3, "rows").tolist() == [2, 1, 0, 0]
    assert top_degrees(table, 3, "columns").tolist() == [0, 1, 2, 0]
    assert top_degrees(np.stack([table, -table], 2), 1).tolist() == [2, 1, 1, 0]
    assert in_class_nodes(table, [True, False, True, True], 3) == 2
    assert in_class_nodes(table, [False, False, False, True], 4) == 1


@pytest.mark.parametrize("decimals", [1, 6])
def test_average_precision_is_the_usual_one(decimals):
    rng = np.random.default_rng(10)
    table = rng.random((20, 20)).round(decimals)
    table[rng.random((20, 20)) < 0.2] = np.nan
    positive = rng.random((20, 20)) < 0.1
    defined = ~np.isnan(table)
    expected = average_precision_score(positive[defined], table[defined])
    assert pair_average_precision(table, positive) == pytest.approx(expected)
    heads = rng.random(20) < 0.3
    best = np.fmax(np.nanmax(table, 0), np.nanmax(table, 1))
    assert head_average_precision(table, heads) == pytest.approx(
        average_precision_score(heads, best)
    )
    both = np.stack([table, np.where(defined, table + 1, np.nan)], axis=2)
    assert head_average_precision(both, heads) == pytest.approx(
        average_precision_score(heads, best)
    )


def test_gpt2_hub(gpt2_path):
    heads = skhead.load_heads(gpt2_path)
    similarity = skhead.ProjectionKernel().fit_transform(
        skhead.SubspaceExtractor().fit_transform(heads)
    )
    layers = heads["layer"].to_numpy()
    result = permutation_test(
        lambda values: top_degrees(values, 20),
        similarity.values,
        layers,
        layers,
        n_permutations=199,
        random_state=0,
    )
    hubs = heads.index[result.adjusted_p_value <= 0.05].tolist()
    assert hubs == ["L4H7", "L4H11"]
    assert result.statistic[[55, 59]].tolist() == [19, 12]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"values": np.zeros(4)}, HeadShapeError, "table of 2 or 3 dimensions"),
        ({"row_layers": [0]}, HeadShapeError, r"shape \(4, 4\) needs a layer .* got 1 and 4"),
        ({"row_layers": [[0] * 4]}, HeadShapeError, "needs a layer for every head"),
        ({"exchange": "layers"}, ValueError, "exchange must be one of blocks, .* got 'layers'"),
        ({"side": "left"}, ValueError, "side must be 'upper', 'lower' or 'two', got 'left'"),
        ({"n_permutations": 0}, ValueError, "n_permutations must be a positive integer, got 0"),
        ({"row_layers": range(4), "exchange": "rows"}, ValueError, "two row heads to exchange"),
        (
            {"row_layers": range(4), "column_layers": range(4)},
            ValueError,
            "exchange='blocks' has no two defined pairs",
        ),
        (
            {"values": np.where(np.eye(4), np.nan, 1.0), "exchange": "columns"},
            ValueError,
            "defined or not by their layers alone; use exchange='blocks'",
        ),
        (
            {"values": np.where(np.eye(4)[:, :, None], [1.0, np.nan], 1.0)},
            ValueError,
            "test each kind by itself",
        ),
        ({"statistic": lambda _: np.nan}, ValueError, "not a number on the data: nan"),
        ({"statistic": lambda _: []}, ValueError, r"is empty or .* on the data: \[\]"),
        (
            {"statistic": lambda values: np.zeros(1 + int(values[0, 0] != 0))},
            ValueError,
            r"shape \(1,\) on the data and \(2,\) on permutation",
        ),
    ],
)
def test_tests_that_make_no_sense(change, error, message):
    given = {
        "statistic": lambda values: values[0, 0],
        "values": np.arange(16.0).reshape(4, 4),
        "row_layers": [0] * 4,
        "column_layers": [1] * 4,
        "n_permutations": 30,
        "random_state": 0,
    }
    with pytest.raises(error, match=message):
        permutation_test(**{**given, **change})


def test_label_tests_that_make_no_sense():
    with pytest.raises(HeadShapeError, match="2 heads need as many labels"):
        label_permutation_test(np.sum, [1, 0, 1], [0, 0])
    with pytest.raises(ValueError, match="every layer carries one label only"):
        label_permutation_test(np.sum, [1, 1, 0, 0], [0, 0, 1, 1])


def test_statistics_of_input_that_does_not_fit():
    square, wide = np.eye(3), np.ones((2, 3))
    with pytest.raises(ValueError, match="k must be a positive integer, got 0"):
        top_degrees(square, 0)
    with pytest.raises(ValueError, match="ends must be 'both', 'rows' or 'columns', got 'out'"):
        top_degrees(square, 1, "out")
    with pytest.raises(HeadShapeError, match=r"must be the same heads, .* \(2, 3\)"):
        top_degrees(wide, 1)
    with pytest.raises(HeadShapeError, match="3 heads need as many labels"):
        in_class_nodes(square, [True], 1)
    with pytest.raises(HeadShapeError, match=r"shape \(3, 3\) need as many labels"):
        pair_average_precision(square, wide)
    with pytest.raises(ValueError, match="nothing is positive"):
        pair_average_precision(square, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="head 0 has no defined pair"):
        head_average_precision(np.where([[1, 1], [1, 0]], np.nan, 1.0), [True, False])
    with pytest.raises(ValueError, match=r"edge \(1, 0\) is undefined"):
        edge_mean(np.array([[1.0, 2.0], [np.nan, 1.0]]), [0, 1], [1, 0])
    with pytest.raises(ValueError, match="edge None is undefined"):
        edge_mean(square, [], [])
