"""Nulls on models with planted pairs: what share of the calls is wrong, what share is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import random_weights, registered

from skhead import NullCalibrator, ProjectionKernel

N_HEADS, D_MODEL, D_HEAD, N_PLANTED, N_MODELS = 40, 96, 8, 20, 6
NULLS = ("haar", "anisotropic", "empirical")


def planted(shared, seed, uneven=0.0, decay=1.0):
    """Random heads that prefer common directions, some pairs of which share more of them."""
    weights = random_weights(2, N_HEADS, D_MODEL, D_HEAD, seed=seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    coordinate = torch.arange(1, D_MODEL + 1).float()
    for name, w in weights.items():
        slope = decay * (1 + uneven * (2 * torch.rand(N_HEADS, 1, 1, generator=generator) - 1))
        gains = coordinate ** (-slope / 2)
        weights[name] = w * gains if "W_O" in name else w * gains.mT
    written = weights["blocks.0.attn.W_O"][:N_PLANTED, :shared]
    weights["blocks.1.attn.W_K"][:N_PLANTED, :, :shared] = written.mT
    return weights


def rates(shared, **background):
    """Mean false discovery proportion and mean power of every null at a nominal rate of 5%."""
    found = {null: [] for null in NULLS}
    for seed in range(N_MODELS):
        with registered(planted(shared, seed, **background)) as heads:
            similarity = ProjectionKernel(pairs=["OK"]).fit_transform(heads)
        for null, shares in found.items():
            calibration = NullCalibrator(null=null, side="upper").fit_transform(similarity)
            called = calibration.calibration.q[:N_HEADS, N_HEADS:, 0] < 0.05
            hits = np.count_nonzero(np.diag(called)[:N_PLANTED])
            shares.append((1 - hits / max(np.count_nonzero(called), 1), hits / N_PLANTED))
    return {null: tuple(np.mean(shares, axis=0)) for null, shares in found.items()}


def test_haar_fails_the_rate_that_the_others_hold_on_a_common_background():
    found = rates(shared=3)
    assert found["haar"][0] > 0.9
    for null in ("anisotropic", "empirical"):
        proportion, power = found[null]
        assert proportion <= 0.10, null
        assert power >= 0.95, null


def test_every_null_holds_the_rate_where_its_assumptions_do():
    found = rates(shared=3, decay=0.0)
    for null, (proportion, power) in found.items():
        assert proportion <= 0.10, null
        assert power >= 0.95, null


def test_heads_that_differ_in_preference_mislead_the_anisotropic_null_first():
    found = rates(shared=4, uneven=0.3)
    assert found["anisotropic"][0] > 0.5
    assert found["empirical"][0] <= 0.25
    assert found["empirical"][1] >= 0.95


@pytest.mark.parametrize("null", NULLS)
def test_nothing_is_called_without_a_planted_pair(null):
    """A family is called at all in about as many models as the nominal rate allows."""
    decay = 0.0 if null == "haar" else 1.0
    n_models, calls = 20, 0
    for seed in range(n_models):
        with registered(planted(0, seed, decay=decay)) as heads:
            similarity = ProjectionKernel(pairs=["OK"]).fit_transform(heads)
        law = NullCalibrator(null=null, side="upper", fdr="by")
        calls += bool(np.nanmin(law.fit_transform(similarity).calibration.q) < 0.05)
    assert calls <= 3
