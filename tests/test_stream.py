"""Bandwidth of the residual stream and erasure, on planted and on real heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import random_weights, registered, toy_heads

import skhead
from skhead.exceptions import DegenerateHeadError, HeadShapeError
from skhead.stream import erasures, stream_usage

RNG = np.random.default_rng(0)


def orthonormal(d_model, rank):
    return torch.tensor(np.linalg.qr(RNG.standard_normal((d_model, rank)))[0]).float()


def test_usage_equals_dense_projectors():
    with toy_heads(n_layers=2, n_heads=3, n_kv_heads=1, d_model=20, d_head=4) as heads:
        usage = stream_usage(heads).set_index(["layer", "role"])
        stacks = {role: skhead.load_weights(heads, role).astype(float) for role in "QKVO"}
    written = np.zeros((20, 20))
    for v, o in zip(stacks["V"][:3], stacks["O"][:3], strict=True):
        one = v @ o.T
        written += one.T @ one / np.linalg.norm(one) ** 2
    for (layer, role), row in usage.iterrows():
        bases = [np.linalg.qr(w)[0] for w in stacks[role][3 * layer : 3 * layer + 3]]
        total = sum(b @ b.T for b in bases)
        rank = np.linalg.matrix_rank(total, tol=1e-6)
        assert row["dimension"] == rank
        assert row["share"] == rank / 20
        assert row["effective_dimension"] == pytest.approx(
            np.trace(total) ** 2 / np.trace(total @ total), rel=1e-5
        )
        if layer == 1 and role != "O":
            left, singular, _ = np.linalg.svd(total)
            union = left[:, singular > 1e-6]
            inside = np.trace(union.T @ written @ union) / np.trace(written)
            assert row["earlier_read"] == pytest.approx(inside, rel=1e-5)
            ratio = 20 * np.trace(total @ written) / (np.trace(total) * np.trace(written))
            assert row["earlier_ratio"] == pytest.approx(ratio, rel=1e-5)
        else:
            assert np.isnan(row["earlier_read"]) and np.isnan(row["earlier_ratio"])
    assert usage.loc[(0, "K"), "dimension"] == 4
    assert usage.loc[(0, "Q"), "dimension"] == 12


def test_random_layers_use_as_much_as_random_subspaces_do():
    with toy_heads(n_layers=6, n_heads=8, d_model=64, d_head=8) as heads:
        usage = stream_usage(heads)
    ratio = usage["effective_dimension"] / usage["effective_random"]
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert usage["earlier_ratio"].mean() == pytest.approx(1, abs=0.05)
    assert (usage["dimension"] == 64).all()


def test_a_layer_that_reads_only_what_was_written():
    basis = orthonormal(30, 10)
    written, elsewhere = basis[:, :5], basis[:, 5:]
    tensors = random_weights(n_layers=2, n_heads=2, d_model=30, d_head=5)
    tensors["blocks.0.attn.W_O"][:] = written.T
    for head, read in enumerate((written, elsewhere)):
        tensors["blocks.1.attn.W_V"][head] = read
        tensors["blocks.1.attn.W_Q"][head] = elsewhere
    with registered(tensors) as heads:
        usage = stream_usage(heads).set_index(["layer", "role"])
    assert usage.loc[(1, "V"), "earlier_read"] == pytest.approx(1, abs=1e-5)
    assert usage.loc[(1, "Q"), "earlier_read"] == pytest.approx(0, abs=1e-5)
    assert usage.loc[(1, "V"), "earlier_ratio"] == pytest.approx(3, rel=1e-4)
    assert usage.loc[(0, "O"), "dimension"] == 5


def test_models_do_not_see_each_others_writes():
    with toy_heads(seed=1) as one, toy_heads(seed=2) as other:
        alone = stream_usage(other)
        both = stream_usage(skhead.load_heads([*one["source"].unique(), *other["source"].unique()]))
    second = both[both["source"] == alone["source"].iloc[0]].reset_index(drop=True)
    assert second.equals(alone)


def test_a_stack_is_one_layer():
    usage = stream_usage(RNG.standard_normal((3, 4, 12, 3)))
    assert usage["layer"].tolist() == [-1] * 4
    assert usage["source"].tolist() == ["array"] * 4
    assert usage["earlier_read"].isna().all()


def test_a_planted_eraser_is_found():
    basis = orthonormal(32, 10)
    tensors = random_weights(n_layers=3, n_heads=4, d_model=32, d_head=5)
    tensors["blocks.0.attn.W_O"][3] = basis[:, :5].T
    tensors["blocks.2.attn.W_V"][1] = basis[:, :5]
    tensors["blocks.2.attn.W_O"][1] = -basis[:, :5].T
    with registered(tensors) as heads:
        pairs = erasures(heads, top=None)
    best = pairs.iloc[0]
    assert (best["writer"], best["eraser"]) == ("L0H3", "L2H1")
    assert best["signed_overlap"] == pytest.approx(-1, abs=1e-5)
    assert best["removed"] == pytest.approx(1, abs=1e-5)
    assert len(pairs) == 3 * 16
    assert (np.diff(pairs["z"]) >= 0).all()
    others = pairs.loc[pairs["eraser"] != "L2H1", "z"]
    assert others.mean() == pytest.approx(0, abs=0.5)
    assert others.std() == pytest.approx(1, abs=0.35)


def test_erasures_equal_dense_maps():
    with toy_heads(n_layers=2, n_heads=2, n_kv_heads=1) as heads:
        pairs = erasures(heads)
        v, o = (skhead.load_weights(heads, role).astype(float) for role in "VO")
    maps = dict(zip(heads.index, v @ o.transpose(0, 2, 1), strict=True))
    for _, pair in pairs.iterrows():
        first, second = maps[pair["writer"]], maps[pair["eraser"]]
        through = first @ second
        overlap = (through * first).sum()
        sizes = np.linalg.norm(first), np.linalg.norm(through)
        assert pair["signed_overlap"] == pytest.approx(overlap / np.prod(sizes), abs=1e-5)
        assert pair["removed"] == pytest.approx(-overlap / sizes[0] ** 2, rel=1e-4)


def test_gpt2_small_has_one_great_eraser(gpt2_path):
    """L4H7, whose own OV map is close to minus a projector, erases most."""
    pairs = erasures(skhead.load_heads(gpt2_path), top=None)
    assert len(pairs) == 9504
    assert pairs.groupby("eraser")["z"].mean().idxmin() == "L4H7"
    best = pairs.iloc[0]
    assert (best["writer"], best["eraser"]) == ("L3H10", "L4H7")
    assert best["signed_overlap"] == pytest.approx(-0.594, abs=0.001)
    assert best["z"] == pytest.approx(-47.9, abs=0.1)


def test_top_is_for_each_model():
    with toy_heads(seed=1) as one, toy_heads(seed=2) as other:
        both = erasures(
            skhead.load_heads([*one["source"].unique(), *other["source"].unique()]), top=3
        )
        alone = erasures(other, top=3)
    assert both["source"].value_counts().tolist() == [3, 3]
    np.testing.assert_allclose(both["z"].iloc[3:], alone["z"])


def test_a_single_layer_has_no_pairs():
    with toy_heads(n_layers=1) as heads:
        pairs = erasures(heads)
    assert len(pairs) == 0
    assert pairs.columns.tolist() == [
        "source", "writer", "eraser", "signed_overlap", "removed", "z",
    ]  # fmt: skip


def test_bad_input_is_refused():
    with pytest.raises(HeadShapeError, match="stream_usage: needs all four matrices"):
        stream_usage(np.ones((2, 6, 3)))
    with pytest.raises(ValueError, match="erasures: top must be an integer of at least 1; got 0"):
        erasures(skhead.load_heads("skhead/induction-2l"), top=0)
    tensors = random_weights()
    tensors["blocks.0.attn.W_O"][1] = 0
    with registered(tensors) as heads:
        with pytest.raises(DegenerateHeadError, match="erasures: the OV map of L0H1 is zero"):
            erasures(heads)
        with pytest.raises(DegenerateHeadError, match="stream_usage: L0H1 W_O is zero"):
            stream_usage(heads)
