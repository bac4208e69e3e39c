"""Displays of query-key decompositions draw what the estimator says."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

from matplotlib.colors import to_rgba
from sklearn.exceptions import NotFittedError

from skhead import ContrastiveQKDecomposer, QKPairs
from skhead.datasets import load_payload_head, make_payload_retrieval
from skhead.inspection import AttributionDisplay, FeatureScatterDisplay, SpectrumDisplay


@pytest.fixture(scope="module")
def pairs():
    head = load_payload_head("d16-r3-r5")
    return make_payload_retrieval(800, embeddings=head.embeddings, random_state=0).pairs(head)


@pytest.fixture(scope="module")
def decomposer(pairs):
    return ContrastiveQKDecomposer(rank="null", n_permutations=99, random_state=0).fit(pairs)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def categories(n_queries=200, n_keys=4, classes=("animal", "food", "toy"), d_head=6):
    """Contexts of labelled keys; a query lies along the key direction of what it looks for."""
    rng = np.random.default_rng(0)
    labels = np.array(classes)
    asked = rng.integers(len(labels), size=n_queries)
    own = rng.integers(len(labels), size=(n_queries, n_keys))
    own[:, 0], own[:, 1] = asked, (asked + 1) % len(labels)
    directions = np.linalg.qr(rng.normal(size=(d_head, d_head)))[0][: len(labels)]
    keys = directions[own.ravel()] + 0.1 * rng.normal(size=(n_queries * n_keys, d_head))
    return QKPairs(
        directions[asked], keys, np.repeat(np.arange(n_queries), n_keys), labels[asked],
        labels[own.ravel()], features=("category",), head="L3H1",
    )  # fmt: skip


def test_bars_sum_to_the_scores(pairs, decomposer):
    display = AttributionDisplay.from_estimator(decomposer, pairs, query=5)
    table = decomposer.attribute(pairs).query("query == 5")
    heights = {name: [bar.get_height() for bar in bars] for name, bars in display.bars_.items()}
    assert list(heights) == ["z1", "z2", "residual"]
    for name, drawn in heights.items():
        np.testing.assert_allclose(drawn, table[name])
    np.testing.assert_allclose(np.sum(list(heights.values()), axis=0), table["total"])
    np.testing.assert_allclose(display.totals_.get_ydata(), pairs[[5]].logits(), atol=1e-5)


def test_parts_of_one_sign_are_stacked_without_overlap(pairs, decomposer):
    display = AttributionDisplay.from_estimator(decomposer, pairs, query=0)
    for key in range(16):
        bars = [(bars[key].get_y(), bars[key].get_height()) for bars in display.bars_.values()]
        for sign in (1, -1):
            own = [(y, height) for y, height in bars if height * sign > 0]
            expected = np.cumsum([0.0, *(height for _, height in own)])[:-1]
            np.testing.assert_allclose([y for y, _ in own], expected, atol=1e-12)


def test_keys_that_agree_are_marked(pairs, decomposer):
    display = AttributionDisplay.from_estimator(decomposer, pairs, query=7)
    for column, name in enumerate(("z1", "z2")):
        agreeing = np.flatnonzero(pairs[[7]].agreement[:, column] == 1)
        assert display.agreeing_[name].get_xdata().tolist() == agreeing.tolist()
        assert (
            display.agreeing_[name].get_color()
            == mpl.colors.to_hex(display.bars_[name][0].get_facecolor()).upper()
        )
    texts = [text.get_text() for text in display.legend_.get_texts()]
    assert texts == ["total", "agrees on z1", "agrees on z2", "z1", "z2", "residual"]


def test_keys_are_named(pairs, decomposer):
    display = AttributionDisplay.from_estimator(decomposer, pairs)
    assert [tick.get_text() for tick in display.ax_.get_xticklabels()] == [*map(str, range(16))]
    assert display.ax_.get_title() == "d16-r3-r5: query 0"
    names = [f"rabbit {i}" for i in range(len(pairs.keys))]
    asked = [f"word {i}" for i in range(len(pairs))]
    named = replace(pairs, key_names=names, query_names=asked)
    display = AttributionDisplay.from_estimator(decomposer, named, query=2)
    ticks = display.ax_.get_xticklabels()
    assert [tick.get_text() for tick in ticks] == names[32:48]
    assert {tick.get_rotation() for tick in ticks} == {90}
    assert display.ax_.get_title() == "d16-r3-r5: query 2 'word 2'"


def test_names_do_not_overlap(decomposer):
    head = load_payload_head("d16-r3-r5")
    task = make_payload_retrieval(3, context=30, embeddings=head.embeddings, random_state=0)
    for width in (1, 5, 12):
        names = ["m" * width] * 90
        long = replace(task.pairs(head), key_names=names)
        display = AttributionDisplay.from_estimator(decomposer, long)
        display.figure_.canvas.draw()
        boxes = [tick.get_window_extent() for tick in display.ax_.get_xticklabels()]
        assert len(boxes) == 30
        assert all(a.x1 <= b.x0 for a, b in pairwise(boxes))


def test_features_of_other_decomposers_are_drawn(pairs):
    import matplotlib.pyplot as plt

    first, second = (ContrastiveQKDecomposer().fit(pairs.feature(name)) for name in ("z1", "z2"))
    _, ax = plt.subplots()
    display = AttributionDisplay.from_estimator(first, pairs, others=[second], ax=ax)
    assert display.ax_ is ax
    assert list(display.bars_) == ["z1", "z2", "residual"]
    table = first.attribute(pairs[[0]], others=[second])
    np.testing.assert_allclose([bar.get_height() for bar in display.bars_["z2"]], table["z2"])


def test_errors_of_attributions(pairs, decomposer):
    draw = AttributionDisplay.from_estimator
    with pytest.raises(ValueError, match="AttributionDisplay: query=800 is none of the 800"):
        draw(decomposer, pairs, query=800)
    with pytest.raises(ValueError, match="query=-1 is none of the 800 queries, which are counted"):
        draw(decomposer, pairs, query=-1)
    with pytest.raises(TypeError, match="AttributionDisplay: draws .* needs QKPairs; got ndarray"):
        draw(decomposer, pairs.queries)
    with pytest.raises(NotFittedError):
        draw(ContrastiveQKDecomposer(), pairs)
    kept = pairs.query_index > 0
    lacking = replace(
        pairs, keys=pairs.keys[kept], query_index=pairs.query_index[kept],
        key_labels=pairs.key_labels[kept], key_groups=pairs.key_groups[kept],
    )  # fmt: skip
    with pytest.raises(ValueError, match="query 0 has no keys; draw another one"):
        draw(decomposer, lacking)


def test_points_are_coordinates_by_label(pairs, decomposer):
    few = pairs[:40]
    display = FeatureScatterDisplay.from_estimator(decomposer, few, "z2", components=(2, 0))
    of = np.array(decomposer.component_features_) == "z2"
    sides = (
        (display.queries_, decomposer.transform(few), few.query_labels[:, 1]),
        (display.keys_, decomposer.transform_keys(few), few.key_labels[:, 1]),
    )
    for scale, (points, coordinates, labels) in zip(display.scales_, sides, strict=True):
        expected = coordinates[:, of][:, [2, 0]]
        assert scale == pytest.approx(np.sqrt(np.mean(expected**2)))
        np.testing.assert_allclose(points.get_offsets() * scale, expected, atol=1e-6)
        colors = [to_rgba(display.colors_[label])[:3] for label in labels]
        np.testing.assert_allclose(points.get_facecolors()[:, :3], colors)
    assert len(display.queries_.get_offsets()) == 40
    assert len(display.keys_.get_offsets()) == 640
    assert display.ax_.get_xlabel() == "component 2 of z2 (queries: u2, keys: v2)"
    assert display.ax_.get_ylabel() == "component 0 of z2 (queries: u0, keys: v0)"


def test_the_legend_lists_up_to_ten_labels(pairs, decomposer):
    few = FeatureScatterDisplay.from_estimator(decomposer, pairs[:40], "z1")
    many = FeatureScatterDisplay.from_estimator(decomposer, pairs[:40], "z2")
    names = [text.get_text() for text in few.legend_.get_texts()]
    assert names == ["query", "key", *map(str, range(8))]
    assert [text.get_text() for text in many.legend_.get_texts()] == ["query", "key"]
    for display in (few, many):
        assert len(set(map(str, display.colors_.values()))) == len(display.colors_)


def test_one_component_is_drawn_as_strips():
    pairs = categories(classes=("animal", "food"))
    found = ContrastiveQKDecomposer(rank=1).fit(pairs)
    display = FeatureScatterDisplay.from_estimator(found, pairs)
    assert display.components == (0,)
    assert [tick.get_text() for tick in display.ax_.get_yticklabels()] == ["keys", "queries"]
    for points, scale, coordinates, labels, height in (
        (display.queries_, display.scales_[0], found.transform(pairs), pairs.query_labels, 1),
        (display.keys_, display.scales_[1], found.transform_keys(pairs), pairs.key_labels, 0),
    ):
        across = points.get_offsets()
        np.testing.assert_allclose(across[:, 0] * scale, coordinates[:, 0])
        assert (abs(across[:, 1] - height) <= 0.4).all()
        animal = labels[:, 0] == "animal"
        assert across[animal, 1].max() < height < across[~animal, 1].min()


def test_missing_labels_are_grey():
    pairs = categories()
    labels = pairs.key_labels.astype(object)
    labels[::4] = None
    found = ContrastiveQKDecomposer(rank=2).fit(pairs)
    for components in ((0, 1), (1,)):
        display = FeatureScatterDisplay.from_estimator(
            found, replace(pairs, key_labels=labels), components=components
        )
        grey = (display.keys_.get_facecolors()[:, :3] == 0.75).all(axis=1)
        assert grey.tolist() == [row % 4 == 0 for row in range(len(labels))]
        assert list(display.colors_) == ["animal", "food", "toy"]


def test_classes_of_a_feature_are_coloured_by_its_labels():
    pairs = categories()
    found = ContrastiveQKDecomposer(rank=1, per_class=True).fit(pairs)
    display = FeatureScatterDisplay.from_estimator(found, pairs, "food")
    assert list(display.colors_) == ["animal", "food", "toy"]
    assert display.ax_.get_title() == "L3H1"


def test_errors_of_scatters(pairs, decomposer):
    draw = FeatureScatterDisplay.from_estimator
    with pytest.raises(ValueError, match="FeatureScatterDisplay: .* features z1, z2; say which"):
        draw(decomposer, pairs)
    with pytest.raises(ValueError, match="has the features z1, z2, not 'z3'"):
        draw(decomposer, pairs, "z3")
    with pytest.raises(ValueError, match=r"'z1' has 3 components, .* components=\(0, 3\) are"):
        draw(decomposer, pairs, "z1", components=(0, 3))
    with pytest.raises(ValueError, match=r"draws one or two components; got \(0, 1, 2\)"):
        draw(decomposer, pairs, "z1", components=(0, 1, 2))
    with pytest.raises(TypeError, match="needs QKPairs; got list"):
        draw(decomposer, [], "z1")
    other = replace(pairs, features=("a", "b"))
    with pytest.raises(ValueError, match="have the features a, b, and no labels of 'z1'"):
        draw(decomposer, other, "z1")
    single = ContrastiveQKDecomposer(rank=1).fit(pairs)
    with pytest.raises(ValueError, match="has 1 components, counted from 0"):
        draw(single, pairs, "z1", components=(0, 2))


def test_a_feature_of_rank_0_has_no_points(pairs):
    labels = np.random.default_rng(0).permuted(pairs.key_labels.reshape(800, 16, 2), axis=1)
    noise = replace(pairs, key_labels=labels.reshape(-1, 2), key_groups=None)
    found = ContrastiveQKDecomposer(rank="null", n_permutations=99, random_state=0).fit(noise)
    assert found.rank_.tolist() == [0, 0]
    with pytest.raises(ValueError, match="'z1' has no component to draw; fit with another rank"):
        FeatureScatterDisplay.from_estimator(found, noise, "z1")
    display = SpectrumDisplay.from_estimator(found)
    assert len(display.kept_["z1"].get_xdata()) == 0
    assert len(display.dropped_["z1"].get_xdata()) == 16
    bars = AttributionDisplay.from_estimator(found, noise).bars_
    np.testing.assert_allclose([bar.get_height() for bar in bars["z1"]], 0)


def test_spectra_with_their_null(decomposer):
    display = SpectrumDisplay.from_estimator(decomposer)
    assert list(display.kept_) == ["z1", "z2"]
    for name, rank in (("z1", 3), ("z2", 5)):
        found = decomposer.decompositions_[name]
        np.testing.assert_allclose(display.kept_[name].get_ydata(), found.singular_values[:rank])
        np.testing.assert_allclose(display.dropped_[name].get_ydata(), found.singular_values[rank:])
        assert display.kept_[name].get_xdata().tolist() == list(range(1, rank + 1))
        assert set(display.cuts_[name].get_xdata()) == {rank + 0.5}
        assert set(display.thresholds_[name].get_ydata()) == {found.null_threshold}
        low, high = display.nulls_[name].get_extents().transformed(
            display.ax_.transData.inverted()
        ).intervaly  # fmt: skip
        null = found.null_singular_values
        assert (low, high) == pytest.approx((null.min(), null.max()))
    assert display.ax_.get_yscale() == "log"
    assert [text.get_text() for text in display.legend_.get_texts()] == [
        "z1: 3 of 16 kept", "z1: permuted labels", "z2: 5 of 16 kept", "z2: permuted labels"
    ]  # fmt: skip


def test_spectrum_of_one_feature_without_a_null(pairs):
    import matplotlib.pyplot as plt

    found = ContrastiveQKDecomposer().fit(pairs)
    _, ax = plt.subplots()
    display = SpectrumDisplay.from_estimator(found, "z2", ax=ax)
    assert display.ax_ is ax
    assert list(display.kept_) == ["z2"]
    assert display.thresholds_ == display.nulls_ == {}
    with pytest.raises(ValueError, match="SpectrumDisplay: .* features z1, z2, not 'z3'"):
        SpectrumDisplay.from_estimator(found, "z3")


def test_vanishing_singular_values_lie_under_the_axis():
    rng = np.random.default_rng(0)
    sign = rng.choice([-1.0, 1.0], 300)
    queries = np.column_stack([np.ones(300), np.zeros((300, 3))])
    keys = np.column_stack([sign, np.zeros((300, 3))])
    found = ContrastiveQKDecomposer().fit(np.hstack([queries, keys]), sign > 0)
    display = SpectrumDisplay.from_estimator(found)
    low, high = display.ax_.get_ylim()
    assert low > 0.4 * found.singular_values_[0] and high < 3 * found.singular_values_[0]
