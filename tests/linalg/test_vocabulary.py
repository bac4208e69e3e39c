"""Sums and maxima over token circuits, against the circuits themselves."""

from __future__ import annotations

import pytest
import torch

from skhead.linalg import vocabulary
from skhead.linalg.circuits import small_circuits
from skhead.linalg.vocabulary import Vocabulary, diagonal_lifts, row_products, top_self_shares


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def ends():
    return draw(30, 12) + 0.5, draw(30, 12, seed=1) - 0.2


@pytest.fixture
def maps():
    """A copying head among random ones."""
    left, right = draw(4, 12, 5, seed=2), draw(4, 12, 5, seed=3)
    right[1] = left[1]
    return left, right


def test_diagonal_lift_equals_dense(ends, maps):
    inputs, outputs = map(Vocabulary.of, ends)
    small = small_circuits(*maps, row_products(outputs.vectors, inputs.vectors))
    found = diagonal_lifts(*maps, small, inputs, outputs)
    dense = ends[0] @ maps[0] @ maps[1].mT @ ends[1].T
    diagonal = dense.diagonal(dim1=1, dim2=2).mean(1)
    spread = dense.flatten(1).std(1, correction=0)
    expected = (diagonal - dense.flatten(1).mean(1)) / spread
    torch.testing.assert_close(found, expected)


def test_equal_entries_have_no_diagonal():
    ones = Vocabulary.of(torch.ones(5, 2).double())
    left = torch.ones(1, 2, 1).double()
    assert diagonal_lifts(left, left, small_circuits(left, left, ones.gram), ones, ones) == 0


def test_row_products_in_blocks(ends, monkeypatch):
    monkeypatch.setattr(vocabulary, "_ROWS", 7)
    torch.testing.assert_close(row_products(*ends), ends[0].T @ ends[1])


@pytest.mark.parametrize("first_block", [1, 4, 64])
def test_top_self_share_equals_dense(ends, maps, first_block, monkeypatch):
    monkeypatch.setattr(vocabulary, "_FIRST_BLOCK", first_block)
    embedding = ends[0]
    tokens = torch.tensor([0, 3, 4, 11, 20, 29])
    dense = embedding @ maps[0] @ maps[1].mT @ embedding.T
    own = dense.argmax(2) == torch.arange(30)
    found = top_self_shares(*maps, embedding, embedding, tokens)
    torch.testing.assert_close(found, own[:, tokens].double().mean(1))
    everyone = top_self_shares(*maps, embedding, embedding, torch.arange(30))
    torch.testing.assert_close(everyone, own.double().mean(1))
    assert 0.2 < float(everyone[1]) < 1.0


def test_a_tie_does_not_beat():
    embedding = torch.eye(4).double()[[0, 0, 1, 2]]
    left = torch.eye(4).double()[None]
    assert float(top_self_shares(left, left, embedding, embedding, torch.arange(4))) == 1.0
