"""Token read-outs against explicit projections, and why the order of two steps matters."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from toys import random_weights, registered

import skhead
import skhead.readout
from skhead.exceptions import (
    HeadShapeError,
    HeadTableError,
    ProvenanceMismatchError,
    UnsupportedLayoutError,
)
from skhead.readout import ORDERS, SubspaceReadout

N_VOCAB, D_MODEL, D_HEAD = 40, 24, 5


def model(seed=0, **shape):
    shape = {"n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "d_model": D_MODEL} | shape
    tensors = random_weights(d_head=D_HEAD, seed=seed, **shape)
    generator = torch.Generator().manual_seed(seed + 1)
    tensors["embed.W_E"] = torch.randn(N_VOCAB, shape["d_model"], generator=generator) + 1
    tensors["unembed.W_U"] = torch.randn(shape["d_model"], N_VOCAB, generator=generator) - 1
    return tensors


def expected_scores(heads, role, vectors, order):
    vectors = vectors.astype(float)
    for step in order.split("-"):
        if step == "center":
            vectors = vectors - vectors.mean(0)
        elif step == "normalize":
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    bases = np.linalg.qr(skhead.load_weights(heads, role).astype(float))[0]
    return np.linalg.norm(np.einsum("hdr,vd->hvr", bases, vectors), axis=2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("role", ["O", "K"])
def test_scores_equal_explicit_projections(order, role, monkeypatch):
    monkeypatch.setattr(skhead.readout, "_SCRATCH", 4000)
    tensors = model()
    vectors = (tensors["unembed.W_U"].T if role == "O" else tensors["embed.W_E"]).numpy()
    with registered(tensors) as heads:
        readout = SubspaceReadout(role, order)
        scores = readout.fit_transform(heads)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected_scores(heads, role, vectors, order), rtol=1e-5)
        top = readout.top_tokens(heads, 7)
    for label, one in zip(heads.index, scores, strict=True):
        listed = top[top["head"] == label]
        assert listed["token"].tolist() == np.argsort(-one, kind="stable")[:7].tolist()
        assert listed["rank"].tolist() == list(range(1, 8))
        np.testing.assert_allclose(listed["score"], np.sort(one)[::-1][:7], rtol=1e-5)


def test_scores_are_cosines_that_complements_complete():
    """With tokens of length 1 after centring, the squares over a basis of the stream add to 1."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0]
    heads = basis.reshape(24, 4, 6).transpose(1, 0, 2)
    vectors = np.random.default_rng(1).standard_normal((30, 24))
    scores = SubspaceReadout().fit(heads, vectors=vectors).transform(heads)
    assert scores.shape == (4, 30)
    np.testing.assert_allclose((scores**2).sum(0), 1, rtol=1e-5)


def test_a_rotation_of_the_stream_changes_nothing():
    rng = np.random.default_rng(0)
    heads, vectors = rng.standard_normal((3, 24, 5)), rng.standard_normal((30, 24))
    turn = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    before = SubspaceReadout().fit(heads, vectors=vectors).transform(heads)
    after = SubspaceReadout().fit(turn @ heads, vectors=vectors @ turn.T).transform(turn @ heads)
    np.testing.assert_allclose(before, after, rtol=1e-4)


def test_only_centring_first_finds_the_tokens_behind_a_common_mean():
    """Four tokens point along the head's subspace, behind a mean shared by all and unequal lengths.

    Without centring, the mean's part in the subspace hides those of negative sign; with lengths
    left in, long tokens win.
    """
    rng = np.random.default_rng(0)
    d_model, half, planted = 64, 100, [17, 55, 117, 155]
    basis = np.linalg.qr(rng.standard_normal((d_model, d_model)))[0]
    mean, direction, rest = basis[:, 0], basis[:, 1], basis[:, 2:]
    own = rng.standard_normal((half, rest.shape[1])) @ rest.T
    own += 2.0 * rng.standard_normal((half, 1)) * direction
    own[planted[:2]] = 8 * direction
    lengths = rng.lognormal(sigma=1.5, size=(half, 1))
    lengths[planted[:2]] = 0.3
    own *= lengths / np.linalg.norm(own, axis=1, keepdims=True)
    vectors = np.concatenate([own, -own]) + 3 * mean
    heads = (0.6 * mean + 0.8 * direction)[None, :, None]
    found = {
        order: set(
            SubspaceReadout(order=order, n_tokens=4)
            .fit(heads, vectors=vectors)
            .top_tokens(heads)["token"]
        )
        for order in ORDERS
    }
    assert found["center-normalize"] == set(planted)
    assert all(found[order] != set(planted) for order in ORDERS if order != "center-normalize")


def test_bundled_model_reads_out_what_its_heads_write():
    """L1H0 writes the answers to questions, 66 and 67, and what separates them from words."""
    heads = skhead.load_heads("skhead/induction-2l")
    readout = SubspaceReadout(n_tokens=2).fit(heads)
    assert set(readout.top_tokens(heads.loc[["L1H0"]])["token"]) <= {64, 65, 66, 67}


def test_vocabulary_names_tokens_and_features(models_dir):
    path = models_dir / "stories260k"
    entries = json.loads((path / "tokens.json").read_text(encoding="utf-8"))
    texts = [str(entry.get("text")) for entry in entries]
    heads = skhead.load_heads(path)
    readout = SubspaceReadout(n_tokens=3, vocabulary=texts, tokens=[300, 301]).fit(heads)
    assert readout.n_vocab_ == 512
    assert readout.get_feature_names_out().tolist() == [
        f"token300 {texts[300]!r}",
        f"token301 {texts[301]!r}",
    ]
    top = readout.top_tokens(heads)
    assert top.groupby("head").size().unique().tolist() == [2]
    assert (top["text"] == [texts[token] for token in top["token"]]).all()


@pytest.mark.parametrize("vocabulary", [str, {i: str(i) for i in range(N_VOCAB)}])
def test_vocabulary_as_callable_or_mapping(vocabulary):
    with registered(model()) as heads:
        top = SubspaceReadout(vocabulary=vocabulary).fit(heads).top_tokens(heads)
    assert (top["text"] == top["token"].astype(str)).all()


def test_a_subset_of_tokens_is_centred_over_all():
    with registered(model()) as heads:
        everything = SubspaceReadout().fit_transform(heads)
        some = SubspaceReadout(tokens=[9, 2, 30]).fit_transform(heads)
    np.testing.assert_allclose(some, everything[:, [9, 2, 30]], rtol=1e-6)


def test_subspaces_go_in_as_well_as_tables():
    with registered(model()) as heads:
        subspaces = skhead.SubspaceExtractor(roles="OV").fit_transform(heads)
        direct = SubspaceReadout("V").fit_transform(heads)
        piped = make_pipeline(skhead.SubspaceExtractor(roles="OV"), SubspaceReadout("V"))
        np.testing.assert_allclose(piped.fit_transform(heads), direct, rtol=1e-6)
        readout = SubspaceReadout("V", fold_norm=True).fit(heads)
        with pytest.raises(ProvenanceMismatchError, match="fold_norm=True against False"):
            readout.transform(subspaces)


def test_rank_keeps_the_leading_directions():
    with registered(model()) as heads:
        one, all_five = (SubspaceReadout(rank=r).fit_transform(heads) for r in (1, None))
    assert (one <= all_five + 1e-6).all()
    assert one.mean() < all_five.mean()


def test_scikit_learn_habits():
    heads = skhead.load_heads("skhead/induction-2l")
    readout = SubspaceReadout(tokens=[1, 2]).set_output(transform="pandas")
    table = readout.fit_transform(heads)
    assert isinstance(table, pd.DataFrame)
    assert table.columns.tolist() == ["token1", "token2"]
    assert table.index.tolist() == heads.index.tolist()
    again = pickle.loads(pickle.dumps(readout))
    assert again.transform(heads).equals(table)
    assert clone(readout).get_params() == readout.get_params()


def test_heads_of_another_model_are_refused():
    with registered(model()) as one, registered(model(seed=3)) as other:
        readout = SubspaceReadout().fit(one)
        with pytest.raises(HeadTableError, match="was fitted on the tokens of toy-"):
            readout.transform(other)
        both = skhead.load_heads([*one["source"].unique(), *other["source"].unique()])
        with pytest.raises(HeadTableError, match="the heads are of 2 models"):
            SubspaceReadout().fit(both)
        with pytest.raises(HeadShapeError, match="was fitted on heads of d_model 24"):
            readout.transform(np.ones((2, 12, 3)))


def test_what_is_missing_is_named(gpt2_path):
    with pytest.raises(UnsupportedLayoutError, match=r"SubspaceReadout: .*wte\.weight"):
        SubspaceReadout("Q").fit(skhead.load_heads(gpt2_path))
    with pytest.raises(HeadTableError, match="a stack has no tokens; pass fit"):
        SubspaceReadout().fit(np.ones((2, 6, 3)))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"role": "X"}, "role must be one of 'Q', 'K', 'V', 'O'; got 'X'"),
        ({"order": "sideways"}, "order must be one of .*; got 'sideways'"),
        ({"matrix": "wte"}, "matrix must be one of .*; got 'wte'"),
        ({"n_tokens": 0}, "n_tokens must be an integer of at least 1; got 0"),
        ({"tokens": [0, 68]}, "tokens holds 68, but the token ids are 0 to 67"),
        ({"tokens": [0.5]}, "tokens must be a list of token ids or None"),
    ],
)
def test_parameters_out_of_range(wrong, message):
    heads = skhead.load_heads("skhead/induction-2l")
    with pytest.raises(ValueError, match=f"SubspaceReadout: {message}"):
        SubspaceReadout(**wrong).fit(heads)


def test_a_stack_is_not_processed():
    stack, vectors = np.ones((3, 8, 2)), np.eye(8)
    with pytest.raises(ValueError, match="SubspaceReadout: fold_norm and center need the model's"):
        SubspaceReadout(center=True).fit(stack, vectors=vectors)
    fitted = SubspaceReadout().fit(stack, vectors=vectors).set_params(fold_norm=True)
    with pytest.raises(ValueError, match="SubspaceReadout: fold_norm and center need the model's"):
        fitted.transform(stack)


def test_vectors_and_vocabularies_that_do_not_fit():
    heads = np.random.default_rng(0).standard_normal((2, 6, 3))
    with pytest.raises(HeadShapeError, match=r"vectors must have shape \(n_vocab, 6\)"):
        SubspaceReadout().fit(heads, vectors=np.ones((4, 5)))
    with pytest.raises(HeadShapeError, match="vectors must be real and finite"):
        SubspaceReadout().fit(heads, vectors=np.full((4, 6), np.nan))
    readout = SubspaceReadout(vocabulary=["a", "b"]).fit(heads, vectors=np.eye(6)[:4])
    with pytest.raises(ValueError, match="vocabulary must give the text of every token id"):
        readout.top_tokens(heads)
