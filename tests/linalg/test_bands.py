"""Bands cover what is asked for, once, and little else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skhead.linalg.bands import band_area, column_bands, row_bands


def stacks(sizes):
    return [torch.empty(n, 4, 2) for n in sizes]


def asked_tables(rows, columns, blocks, spans):
    """By block, which pairs are asked for; of mirrored pairs either one, so both are marked."""
    right = rows if columns is None else columns
    asked = {}
    for i, j in blocks:
        places = np.arange(len(right[j]))
        table = np.ones((len(rows[i]), len(places)), dtype=bool)
        if (i, j) in spans:
            span = spans[i, j]
            table = (span[:, :1] <= places) & (places < span[:, 1:])
        asked[i, j] = table
    return asked


def counted(bands, rows, columns):
    """How often every pair of heads of every block is in a band."""
    right = rows if columns is None else columns
    counts = {
        (i, j): np.zeros((len(a), len(b)), dtype=int)
        for i, a in enumerate(rows)
        for j, b in enumerate(right)
    }
    for band in bands:
        for i, heads in band.rows:
            for j, others in band.columns:
                counts[i, j][heads, others] += 1
    return counts


sizes = st.lists(st.integers(0, 20), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shape=st.tuples(sizes, sizes), step=st.integers(1, 9), seed=st.integers(0))
def test_every_asked_pair_of_two_sides_is_in_one_band(data, shape, step, seed):
    rows, columns = map(stacks, shape)
    every = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    blocks = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    rng = np.random.default_rng(seed)
    spans = {
        (i, j): rng.integers(0, len(columns[j]) + 1, (len(rows[i]), 2))
        for i, j in blocks
        if rng.random() < 0.7
    }
    bands = column_bands(rows, columns, blocks, spans, step)
    counts = counted(bands, rows, columns)
    for block, asked in asked_tables(rows, columns, blocks, spans).items():
        assert (counts[block][asked] == 1).all()
        assert (counts[block] <= 1).all()
    assert all(not counts[block].any() for block in set(every) - set(blocks))
    assert all(band.width <= step for band in bands)
    assert sum(band.area for band in bands) == sum(count.sum() for count in counts.values())


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shape=sizes, step=st.integers(1, 9), spread=st.booleans())
def test_bands_of_one_side_have_columns_in_a_row(data, shape, step, spread):
    rows = stacks(shape)
    every = [(i, j) for i in range(len(rows)) for j in range(len(rows))]
    blocks = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    triangle = {
        (i, j): np.stack([np.arange(n) + 1, np.full(n, n)], axis=1)
        for i, j in blocks
        if spread and (n := len(rows[i])) == len(rows[j]) and (j, i) not in blocks
    }
    bands = column_bands(rows, None, blocks, triangle, step)
    counts = counted(bands, rows, None)
    tables = asked_tables(rows, None, blocks, triangle)
    for (i, j), asked in tables.items():
        found = counts[i, j]
        if (j, i) in blocks:
            found = found + counts[j, i].T if i != j else np.maximum(found, found.T)
        assert (found[asked] == 1).all()
    starts = np.cumsum([0, *shape])
    for band in bands:
        places = np.concatenate(
            [starts[j] + np.arange(heads.start, heads.stop) for j, heads in band.columns]
        )
        assert np.array_equal(places, np.arange(places[0], places[0] + len(places)))


@pytest.mark.parametrize("n_kv", [12, 4])
def test_readers_of_a_layer_share_a_band_whatever_they_read(n_kv):
    """Twelve layers; kinds OQ, OK and OV of the heads of one layer ask for the same writers."""
    rows, columns = stacks([144]), stacks([144, 12 * n_kv, 12 * n_kv])
    spans = {
        (0, j): np.stack(
            [(np.arange(144) // 12 + 1) * (len(s) // 12), np.full(144, len(s))], axis=1
        )
        for j, s in enumerate(columns)
    }
    readers = 12 + 2 * n_kv
    bands = column_bands(rows, columns, list(spans), spans, readers)
    assert len(bands) == 11
    for layer, band in enumerate(bands, start=1):
        assert band.rows == ((0, slice(0, 12 * layer)),)
        assert [heads.start for _, heads in band.columns] == [12 * layer, *2 * [n_kv * layer]]
    assert sum(band.area for band in bands) == readers * 12 * 66
    by_rows = row_bands(rows, columns, list(spans), spans)
    areas = [band_area(band) for parts in by_rows.values() for band in parts]
    assert sum(areas) > readers * 12 * 66


@pytest.mark.parametrize("n_layers", [16, 17, 126])
def test_products_of_many_layers_have_few_sizes(n_layers):
    """Which costs memory of the matrix library, and is worth a few percent of the work."""
    sizes = 32 * n_layers, 8 * n_layers
    rows, columns = stacks(sizes[:1]), stacks(sizes)
    layers = np.arange(sizes[0]) // 32
    spans = {
        (0, j): np.stack([(layers + 1) * (n // n_layers), np.full(sizes[0], n)], axis=1)
        for j, n in enumerate(sizes)
    }
    bands = column_bands(rows, columns, list(spans), spans, 40)
    assert len(bands) == n_layers - 1
    assert 7 < len({str(band.rows) for band in bands}) <= 12
    asked = 32 * 40 * n_layers * (n_layers - 1) // 2
    assert asked <= sum(band.area for band in bands) < 1.1 * asked
