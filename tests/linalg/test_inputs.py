"""Mean inputs against the norms that models apply, token by token."""

from __future__ import annotations

import pytest
import torch

import skhead.linalg.inputs as inputs
from skhead.linalg.inputs import mean_inputs


def embeddings(n_vocab=11, n_positions=4, d_model=8):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(n_vocab, d_model, generator=generator)
    places = 0.5 * torch.randn(n_positions, d_model, generator=generator)
    return tokens + 0.3, places


def normalised(rows, norm):
    if norm == "layernorm":
        return torch.nn.functional.layer_norm(rows, rows.shape[-1:], eps=0.0)
    if norm == "rmsnorm":
        return torch.nn.functional.rms_norm(rows, rows.shape[-1:], eps=0.0)
    return rows


@pytest.mark.parametrize("norm", inputs.NORMS)
def test_equals_the_mean_over_all_tokens(norm, monkeypatch):
    monkeypatch.setattr(inputs, "_ROWS", 3)
    tokens, places = embeddings()
    stream = normalised(tokens.double()[None] + places.double()[:, None], norm)
    torch.testing.assert_close(mean_inputs(tokens, places, norm), stream.mean(1))


@pytest.mark.parametrize("norm", inputs.NORMS)
def test_without_positions_it_is_the_mean_token(norm):
    tokens, _ = embeddings()
    expected = normalised(tokens.double(), norm).mean(0, keepdim=True)
    torch.testing.assert_close(mean_inputs(tokens, None, norm), expected)


def test_large_tokens_leave_little_to_positions():
    tokens, places = embeddings()
    tokens = tokens - tokens.mean(0)
    beside_small, beside_large = (
        mean_inputs(scale * tokens, places, "rmsnorm").norm() for scale in (0.1, 10.0)
    )
    assert beside_small > 5 * beside_large


def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="norm must be one of layernorm, rmsnorm, none; got 'l2'"):
        mean_inputs(*embeddings(), "l2")
