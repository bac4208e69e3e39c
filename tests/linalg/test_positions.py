"""Attention by position alone, against models written out in full."""

from __future__ import annotations

import pytest
import torch

from skhead.linalg.positions import (
    learned_position_logits,
    position_scores,
    rotary_position_logits,
    unit_rows,
)
from skhead.linalg.rotary import rotate


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_learned_logits_equal_the_dense_circuit():
    positions, q, k = draw(7, 12), draw(3, 12, 4, seed=1), draw(3, 12, 4, seed=2)
    dense = positions @ q @ k.mT @ positions.T / 2.0
    torch.testing.assert_close(learned_position_logits(positions, q, k), dense)


def test_rotary_logits_are_the_mean_over_pairs_of_tokens():
    tokens, q, k = draw(9, 12), draw(2, 12, 6, seed=1), draw(2, 12, 6, seed=2)
    how = {"frequencies": torch.tensor([0.7, 0.2]).double(), "n_dims": 4, "pairing": "adjacent"}
    found = rotary_position_logits(tokens.mean(0), q, k, 5, **how)
    for query in range(5):
        for key in range(query + 1):
            turned_q, turned_k = rotate(q, query, **how), rotate(k, key, **how)
            dense = ((tokens @ turned_q) @ (tokens @ turned_k).mT).mean((1, 2)) / 6**0.5
            torch.testing.assert_close(found[:, query, key], dense)


def test_planted_heads():
    n = 12
    previous = torch.diag(torch.full((n - 1,), 50.0), -1)
    current = torch.diag(torch.full((n,), 50.0))
    first = torch.zeros(n, n)
    first[:, 0] = 50.0
    scores = position_scores(torch.stack([previous, current, first, torch.zeros(n, n)]))
    assert scores.previous.tolist()[0] == pytest.approx(1)
    assert scores.current.tolist()[1] == pytest.approx(1)
    assert scores.first.tolist()[2] == pytest.approx(1)
    assert max(scores.previous[1:].tolist()) == pytest.approx(0, abs=1e-12)
    for values in (scores.previous, scores.current, scores.first):
        assert float(values[3]) == pytest.approx(0, abs=1e-12)


def test_later_keys_are_never_attended_to():
    logits = draw(2, 6, 6)
    ahead = logits + 100.0 * torch.ones(6, 6).triu(1)
    torch.testing.assert_close(position_scores(ahead).previous, position_scores(logits).previous)


def test_too_few_positions():
    with pytest.raises(ValueError, match="needs at least 3 positions .* got 2"):
        position_scores(torch.zeros(1, 2, 2))


def test_unit_rows():
    rows = unit_rows(torch.tensor([[3.0, -3.0], [0.0, 0.0], [0.0, 2.0**0.5]]))
    assert rows.square().mean(1).tolist() == pytest.approx([1, 0, 1])
