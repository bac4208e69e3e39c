"""Selection of the largest entries against a full sort."""

from __future__ import annotations

import numpy as np
import pytest

from skhead.linalg.topk import largest_entries


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (40, 60), (3, 500)])
@pytest.mark.parametrize("k", [1, 5, 2000])
def test_equals_a_full_sort(shape, k):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 30, shape).astype(np.float32)
    values[rng.random(shape) < 0.3] = np.nan
    rows, columns = largest_entries(values, k)
    flat = np.where(np.isnan(values), -np.inf, values).ravel()
    order = np.argsort(-flat, kind="stable")[: min(k, int((~np.isnan(values)).sum()))]
    assert (rows * shape[1] + columns).tolist() == order.tolist()


def test_nothing_defined_selects_nothing():
    rows, columns = largest_entries(np.full((3, 4), np.nan), 5)
    assert len(rows) == len(columns) == 0


def test_an_infinite_entry_is_one_of_the_smallest():
    """Such as an infinite distance with its sign changed, which is defined all the same."""
    values = np.array([[1.0, -np.inf], [np.nan, 2.0], [-np.inf, np.nan]])
    rows, columns = largest_entries(values, 6)
    assert (rows.tolist(), columns.tolist()) == ([1, 0, 0, 2], [1, 0, 1, 0])
