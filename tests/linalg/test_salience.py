"""Gains, written vectors and largest entries against explicit matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skhead.linalg.salience import largest_in_rows, largest_products, map_gains, written_vectors


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scratch", [1, 10_000, 2**27])
def test_gains_are_ratios_of_norms(dtype, scratch):
    w_v, w_o = random(3, 20, 4, dtype=dtype), random(3, 20, 4, dtype=dtype, seed=1)
    vectors = random(30, 20, dtype=dtype, seed=2)
    vectors[7] = 0
    gains = map_gains(w_v, w_o, vectors, scratch=scratch)
    dense = vectors.double() @ w_v.double() @ w_o.double().mT
    expected = dense.norm(dim=2) / vectors.double().norm(dim=1).clamp_min(1e-300)
    assert gains.dtype == dtype
    torch.testing.assert_close(gains.double(), expected, rtol=1e-5, atol=0)
    assert (gains[:, 7] == 0).all()
    assert (map_gains(w_v, torch.zeros_like(w_o), vectors) == 0).all()


def test_gains_survive_sides_that_nearly_cancel():
    """What W_V writes lies in directions that W_O all but ignores."""
    w_v, w_o = random(1, 20, 4), random(1, 20, 4, seed=1)
    w_o = w_o @ torch.diag(torch.tensor([1.0, 1e-5, 1e-5, 1e-5], dtype=torch.float64))
    w_v[:, :, 0] = 0
    vectors = random(30, 20, seed=2)
    expected = (vectors @ w_v @ w_o.mT).norm(dim=2) / vectors.norm(dim=1)
    gains = map_gains(w_v.float(), w_o.float(), vectors.float())
    torch.testing.assert_close(gains.double(), expected, rtol=1e-4, atol=0)


def test_every_head_writes_for_vectors_of_its_own():
    w_v, w_o, vectors = random(3, 20, 4), random(3, 20, 4, seed=1), random(3, 5, 20, seed=2)
    written = written_vectors(w_v, w_o, vectors)
    for one in range(3):
        torch.testing.assert_close(written[one], vectors[one] @ (w_v[one] @ w_o[one].T))


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 8))
def test_largest_entries_are_those_of_a_stable_sort(seed, k, n_columns):
    """Small integers tie often, at the border and within."""
    scores = random(4, n_columns, seed=seed).mul(1.5).round()
    values, columns = largest_in_rows(scores, k)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(columns, order)
    assert torch.equal(values, scores.gather(1, order))


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 3000))
def test_largest_products_do_not_depend_on_blocks(seed, k, scratch):
    rows, vectors = random(3, 4, seed=seed).round(), random(40, 4, seed=seed + 1).round()
    values, places = largest_products(rows, vectors, k, scratch=scratch)
    products = rows @ vectors.T
    order = products.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(places, order)
    assert torch.equal(values, products.gather(1, order))
