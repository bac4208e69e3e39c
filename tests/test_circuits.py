"""Identity scores of heads with known maps."""

from __future__ import annotations

import numpy as np
import pytest
from toys import toy_heads

from skhead import identity_scores, load_weights
from skhead.exceptions import DegenerateHeadError, HeadShapeError


def test_copying_erasing_and_random_heads():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((64, 8)))[0]
    heads = np.stack([np.stack([basis] * 4)] * 3)
    heads[1, 3] *= -2.0
    heads[2, 3] = rng.standard_normal((64, 8))
    scores = identity_scores(heads)
    assert scores["pk_vo"].tolist()[:2] == pytest.approx([8, 8])
    assert scores["identity_signed"].tolist()[:2] == pytest.approx([1, -1])
    assert abs(scores["identity_signed"].iloc[2]) < 0.5


def test_equals_dense_maps():
    with toy_heads(n_kv_heads=2) as heads:
        scores = identity_scores(heads)
        v, o = (load_weights(heads, role).astype(float) for role in "VO")
    maps = v @ o.transpose(0, 2, 1)
    signed = np.trace(maps, axis1=1, axis2=2) / (np.linalg.norm(maps, axis=(1, 2)) * 5**0.5)
    np.testing.assert_allclose(scores["identity_signed"], signed, rtol=1e-6)
    assert scores.index.tolist() == heads.index.tolist()


def test_a_zero_map_has_no_sign():
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 6)))[0]
    head = np.stack([np.concatenate([basis[:, :3], 0 * basis[:, :3]], axis=1)] * 4)
    head[3] = np.concatenate([0 * basis[:, 3:], basis[:, 3:]], axis=1)
    with pytest.raises(DegenerateHeadError, match="OV map of H0 is zero"):
        identity_scores(head[None])


def test_one_role_is_not_enough():
    with pytest.raises(HeadShapeError, match="needs W_V and W_O of every head"):
        identity_scores(np.ones((2, 6, 3)))
