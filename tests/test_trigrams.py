"""Skip-trigram tables against whole token circuits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from toys import random_weights, registered

import skhead
import skhead.trigrams
from skhead.exceptions import HeadTableError, UnsupportedLayoutError
from skhead.trigrams import skip_trigrams

N_VOCAB = 30


def model(seed=0, n_layers=1):
    tensors = random_weights(
        n_layers=n_layers, n_heads=3, n_kv_heads=1, d_model=24, d_head=5, seed=seed
    )
    generator = torch.Generator().manual_seed(seed + 1)
    tensors["embed.W_E"] = torch.randn(N_VOCAB, 24, generator=generator) + 0.5
    tensors["unembed.W_U"] = torch.randn(24, N_VOCAB, generator=generator) + 0.5
    return tensors


def circuits(heads, tensors, i):
    """Attention logits (destination, source) and output logits (source, out), whole."""
    q, k, v, o = (skhead.load_weights(heads, role)[i].astype(float) for role in "QKVO")
    tokens, unembedding = (tensors[n].double().numpy() for n in ("embed.W_E", "unembed.W_U"))
    attention = tokens @ q @ k.T @ tokens.T / 5**0.5
    logits = tokens @ v @ o.T @ unembedding
    return attention - attention.mean(1, keepdims=True), logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("scratch", [2**26, 4 * N_VOCAB * 7])
def test_equals_whole_circuits(scratch, monkeypatch):
    monkeypatch.setattr(skhead.trigrams, "_SCRATCH", scratch)
    tensors = model()
    with registered(tensors) as heads:
        table = skip_trigrams(heads, n_sources=4, k=3)
        for i, label in enumerate(heads.index):
            attention, logits = circuits(heads, tensors, i)
            strength = np.maximum(attention.max(0), 0) * np.maximum(logits.max(1), 0)
            listed = table[table["head"] == label]
            strongest = np.argsort(-strength)[:4]
            assert listed["source"].tolist() == np.repeat(strongest, 3).tolist()
            assert listed["rank"].tolist() == [1, 2, 3] * 4
            np.testing.assert_allclose(
                listed["strength"], np.repeat(strength[strongest], 3), rtol=1e-4
            )
            for source, rows in listed.groupby("source"):
                best = np.argsort(-attention[:, source])[:3]
                assert rows["destination"].tolist() == best.tolist()
                np.testing.assert_allclose(rows["attention"], attention[best, source], rtol=1e-4)
                best = np.argsort(-logits[source])[:3]
                assert rows["out"].tolist() == best.tolist()
                np.testing.assert_allclose(rows["logit"], logits[source, best], rtol=1e-4)


def test_heads_come_in_the_order_of_the_table():
    with registered(model(n_layers=3)) as heads:
        mixed = heads.sample(frac=1, random_state=0)
        straight, found = (skip_trigrams(table, n_sources=2, k=2) for table in (heads, mixed))
    assert found["head"].unique().tolist() == mixed.index.tolist()
    expected = pd.concat([straight[straight["head"] == label] for label in mixed.index])
    pd.testing.assert_frame_equal(found, expected.reset_index(drop=True), rtol=1e-5)


def test_a_planted_trigram():
    """Token 7 is attended to by token 3, and makes it say token 12."""
    tensors = model()
    tensors["embed.W_E"], tensors["unembed.W_U"] = torch.eye(24)[:20], torch.eye(24)[:, :20]
    for name in ("W_Q", "_W_K", "_W_V", "W_O"):
        tensors[f"blocks.0.attn.{name}"] *= 0.01
    tensors["blocks.0.attn.W_Q"][1, 3, 0] = 5
    tensors["blocks.0.attn._W_K"][0, 7, 0] = 5
    tensors["blocks.0.attn._W_V"][0, 7, 1] = 5
    tensors["blocks.0.attn.W_O"][1, 1, 12] = 5
    with registered(tensors) as heads:
        table = skip_trigrams(heads, n_sources=1, k=1, vocabulary=lambda token: f"<{token}>")
    row = table[table["head"] == "L0H1"].iloc[0]
    assert (row["source"], row["destination"], row["out"]) == (7, 3, 12)
    texts = [row[f"{name}_text"] for name in ("source", "destination", "out")]
    assert texts == ["<7>", "<3>", "<12>"]


def test_named_sources_only():
    with registered(model()) as heads:
        everything = skip_trigrams(heads, n_sources=N_VOCAB)
        some = skip_trigrams(heads, sources=[4, 11])
    assert set(some["source"]) == {4, 11}
    expected = everything[everything["source"].isin([4, 11])].reset_index(drop=True)
    assert some.drop(columns=["attention", "logit", "strength"]).equals(
        expected.drop(columns=["attention", "logit", "strength"])
    )


def test_the_induction_head_says_what_it_finds():
    """Whatever word it attends to, the bundled model's induction head promotes that word most."""
    heads = skhead.load_heads("skhead/induction-2l")
    table = skip_trigrams(heads.loc[["L1H1"]], sources=range(64), n_sources=64, k=1)
    assert (table["source"] == table["out"]).mean() > 0.95


def test_what_is_missing_is_named(gpt2_path):
    with pytest.raises(UnsupportedLayoutError, match=r"skip_trigrams: .*wte\.weight"):
        skip_trigrams(skhead.load_heads(gpt2_path))
    with pytest.raises(HeadTableError, match="skip_trigrams: needs the tokens of a model"):
        skip_trigrams(np.ones((2, 4, 6, 3)))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"k": 0}, "k must be an integer of at least 1; got 0"),
        ({"n_sources": True}, "n_sources must be an integer of at least 1; got True"),
        ({"sources": [-1]}, "sources holds -1, but the token ids are 0 to 67"),
    ],
)
def test_parameters_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=f"skip_trigrams: {message}"):
        skip_trigrams(skhead.load_heads("skhead/induction-2l"), **wrong)
