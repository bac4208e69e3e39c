"""Informativeness of a similarity."""

from __future__ import annotations

import pytest
from toys import random_weights, registered, toy_heads

from skhead import ProjectionKernel, informativeness


def test_random_heads_carry_almost_no_information():
    with toy_heads(n_layers=2, n_heads=70, d_model=64, d_head=8) as heads:
        found = informativeness(ProjectionKernel().fit_transform(heads), bins=60)
    assert (found < 0.05).all()


def test_heads_of_common_preferred_directions_are_told_from_random_ones():
    weights = random_weights(n_layers=2, n_heads=20, d_model=64, d_head=8)
    weights["blocks.1.attn.W_K"][:, :12] *= 10
    weights["blocks.0.attn.W_O"][:, :, :12] *= 10
    with registered(weights) as heads:
        found = informativeness(ProjectionKernel().fit_transform(heads), bins=60)
    assert found.index.tolist() == ["OQ", "OK", "OV"]
    assert found["OK"] > 1 > 5 * found["OQ"]


def test_refusals():
    weights = random_weights()
    weights["blocks.0.attn.W_O"][0, 1:] = 0
    with registered(weights) as heads:
        with pytest.raises(ValueError, match=r"pair OQ have unequal ranks"):
            informativeness(ProjectionKernel().fit_transform(heads))
        for bins in (0, -3, 2.5):
            with pytest.raises(ValueError, match="bins must be a positive integer, got"):
                informativeness(ProjectionKernel().fit_transform(heads.iloc[1:]), bins=bins)
        with pytest.raises(ValueError, match=r"unit 'pk'.*got 'pk/rank'"):
            informativeness(ProjectionKernel(normalize="rank").fit_transform(heads))
