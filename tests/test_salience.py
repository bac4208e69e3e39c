"""Salient tokens and their targets against explicit maps, and what the listings say."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from toys import random_weights, registered

import skhead
import skhead.salience
from skhead.exceptions import (
    DegenerateHeadError,
    HeadShapeError,
    HeadTableError,
    UnsupportedLayoutError,
)
from skhead.salience import SalientOperations
from skhead.weights.first_block import read_source_embedding

N_VOCAB, D_MODEL, D_HEAD = 40, 24, 5


def model(seed=0, tied=False, **shape):
    shape = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": D_MODEL} | shape
    tensors = random_weights(d_head=D_HEAD, seed=seed, **shape)
    generator = torch.Generator().manual_seed(seed + 1)
    embedding = torch.randn(N_VOCAB, shape["d_model"], generator=generator) + 0.5
    unembedding = torch.randn(shape["d_model"], N_VOCAB, generator=generator)
    tensors["embed.W_E"] = embedding
    tensors["unembed.W_U"] = embedding.T.contiguous() if tied else unembedding
    return tensors


def dense_maps(heads):
    """``W_V W_O`` of every head in float64."""
    w_v, w_o = (skhead.load_weights(heads, role).astype(float) for role in "VO")
    return w_v @ w_o.swapaxes(1, 2)


def dense_saliencies(maps, vectors):
    vectors = np.asarray(vectors, dtype=float)
    written = np.linalg.norm(vectors @ maps, axis=2)
    return written / np.linalg.norm(vectors, axis=1)


def check_mappings(table, maps, vectors, unembedding, n_salient, n_targets, sign=1):
    """Compare a listing with the whole matrix of logits, sorted."""
    vectors, unembedding = (np.asarray(x, dtype=float) for x in (vectors, unembedding))
    saliencies = dense_saliencies(maps, vectors)
    for (_, rows), one, saliency in zip(
        table.groupby("head", sort=False), maps, saliencies, strict=True
    ):
        logits = vectors @ one @ unembedding.T
        expected = np.argsort(-saliency, kind="stable")[:n_salient]
        assert rows["token"].tolist() == np.repeat(expected, n_targets).tolist()
        np.testing.assert_allclose(
            rows["saliency"], np.repeat(saliency[expected], n_targets), rtol=1e-5
        )
        targets = np.argsort(-sign * logits[expected], axis=1, kind="stable")[:, :n_targets]
        assert rows["target"].tolist() == targets.ravel().tolist()
        chosen = np.take_along_axis(logits[expected], targets, axis=1)
        np.testing.assert_allclose(rows["logit"], chosen.ravel(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scratch", [1, 3000, 2**27])
@pytest.mark.parametrize(("tied", "n_kv_heads"), [(True, 4), (False, 2)])
@pytest.mark.parametrize("direction", ["promote", "suppress"])
def test_listings_equal_explicit_maps(scratch, tied, n_kv_heads, direction, monkeypatch):
    monkeypatch.setattr(skhead.salience, "_SCRATCH", scratch)
    tensors = model(tied=tied, n_kv_heads=n_kv_heads)
    embedding, unembedding = tensors["embed.W_E"], tensors["unembed.W_U"].T
    with registered(tensors) as heads:
        salient = SalientOperations(6, 4, source_embedding="raw", direction=direction).fit(heads)
        maps = dense_maps(heads)
        found = salient.transform(heads)
        assert found.dtype == np.float32 and found.shape == (len(heads), N_VOCAB)
        np.testing.assert_allclose(found, dense_saliencies(maps, embedding), rtol=1e-5)
        listed = salient.mappings(heads)
        assert listed.direction == direction
        sign = 1 if direction == "promote" else -1
        check_mappings(listed.table, maps, embedding, unembedding, 6, 4, sign)
        some = salient.mappings(heads.iloc[[6, 1]]).table
        by_head = listed.table.set_index("head")
        expected = by_head.loc[[heads.index[6], heads.index[1]]].reset_index()
        pd.testing.assert_frame_equal(some, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mlp0", "resid_post_mlp0"])
def test_later_layers_read_the_first_mlp_and_the_first_layer_the_embedding(models_dir, kind):
    path = models_dir / "stories260k"
    heads = skhead.load_heads(path).iloc[[3, 9, 33]]
    assert heads["layer"].tolist()[0] == 0 < heads["layer"].tolist()[1]
    salient = SalientOperations(4, 3, source_embedding=kind).fit(heads)
    source = heads["source"].iloc[0]
    space = skhead.weights.read_token_space(source)
    vectors = [read_source_embedding(source, k) for k in ("raw", kind, kind)]
    maps, found, table = dense_maps(heads), salient.transform(heads), salient.mappings(heads).table
    for i, label in enumerate(heads.index):
        expected = dense_saliencies(maps[i : i + 1], vectors[i])
        np.testing.assert_allclose(found[i : i + 1], expected, rtol=1e-4)
        rows = table[table["head"] == label]
        check_mappings(rows, maps[i : i + 1], vectors[i], space.unembedding, 4, 3)
    raw = SalientOperations(source_embedding="raw").fit_transform(heads)
    np.testing.assert_array_equal(found[0], raw[0])
    assert np.corrcoef(found[1], raw[1])[0, 1] < 0.9


def planted(strengths=(5.0, 3.0, 1.0)):
    """A head that maps tokens 3, 8 and 5 to 7, 1 and 2, and the two directions apart."""
    rng = np.random.default_rng(0)
    embedding = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    unembedding = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    w_v = embedding[[3, 8, 5]].T
    w_o = unembedding[[7, 1, 2]].T * np.asarray(strengths)
    stack = np.stack([w_v, w_v, w_v, w_o])[None]
    return stack, embedding, unembedding


def test_a_planted_mapping_is_listed_in_the_order_of_its_strength():
    stack, embedding, unembedding = planted()
    lengths = np.linspace(0.1, 10, 16)[:, None]
    salient = SalientOperations(3, 1).fit(
        stack, embedding=embedding * lengths, unembedding=unembedding
    )
    table = salient.mappings(stack).table
    assert table[["token", "target"]].values.tolist() == [[3, 7], [8, 1], [5, 2]]
    np.testing.assert_allclose(table["saliency"], [5, 3, 1], rtol=1e-6)
    found = salient.transform(stack)[0]
    assert (np.delete(found, [3, 8, 5]) < 1e-6).all()


def test_a_suppressing_head_lowers_what_it_names():
    stack, embedding, unembedding = planted(strengths=(-5.0, -3.0, -1.0))
    salient = SalientOperations(3, 1, direction="suppress")
    table = salient.fit(stack, None, embedding, unembedding).mappings(stack).table
    assert table[["token", "target"]].values.tolist() == [[3, 7], [8, 1], [5, 2]]
    np.testing.assert_allclose(table["logit"], [-5, -3, -1], rtol=1e-6)


def test_rotations_and_lengths_change_no_listing_and_scale_only_strength():
    rng = np.random.default_rng(1)
    stack = rng.standard_normal((3, 4, 16, 4))
    embedding, unembedding = rng.standard_normal((2, 30, 16))
    turn = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    salient = SalientOperations(4, 3).fit(stack, None, embedding, unembedding)
    before, found = salient.mappings(stack).table, salient.transform(stack)
    turned = SalientOperations(4, 3).fit(
        turn @ stack, None, embedding @ turn.T, unembedding @ turn.T
    )
    pd.testing.assert_frame_equal(before, turned.mappings(turn @ stack).table)
    longer = embedding * rng.uniform(0.01, 100, (30, 1))
    scaled = SalientOperations(4, 3).fit(stack, None, longer, unembedding)
    np.testing.assert_allclose(scaled.transform(stack), found, rtol=1e-5)
    np.testing.assert_allclose(salient.transform(3 * stack), 9 * found, rtol=1e-5)
    order = rng.permutation(3)
    np.testing.assert_allclose(salient.transform(stack[order]), found[order], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_extreme_weights_keep_their_saliencies(scale):
    stack, embedding, unembedding = planted()
    salient = SalientOperations(3).fit(stack, None, embedding, unembedding)
    stack = stack * np.array([1, 1, scale, 1 / scale])[:, None, None]
    np.testing.assert_allclose(salient.transform(stack)[0, [3, 8, 5]], [5, 3, 1], rtol=1e-5)


def test_only_considered_tokens_are_listed_and_empty_ones_are_not_salient():
    tensors = model()
    tensors["embed.W_E"][30] = 0
    kept = [30, 4, 9, 2, 17]
    with registered(tensors) as heads:
        every = SalientOperations(source_embedding="raw").fit_transform(heads)
        assert (every[:, 30] == 0).all() and (np.delete(every, 30, axis=1) > 0).all()
        salient = SalientOperations(9, 9, source_embedding="raw", tokens=kept).fit(heads)
        np.testing.assert_allclose(salient.transform(heads), every[:, kept], rtol=1e-6)
        table = salient.mappings(heads).table
        assert len(table) == len(heads) * 25
        assert set(table["token"]) == set(table["target"]) == set(kept)
        assert (table.loc[table["rank"] == 5, "token"] == 30).all()
        assert salient.get_feature_names_out()[1] == "token4"


def test_a_padded_unembedding_asks_for_the_tokens_in_use():
    tensors = model()
    tensors["unembed.W_U"] = tensors["unembed.W_U"][:, :32].contiguous()
    asked = r"32 tokens, the embedding 40.*tokens=range\(32\)"
    with registered(tensors) as heads:
        salient = SalientOperations(source_embedding="raw").fit(heads)
        with pytest.raises(HeadShapeError, match=asked):
            salient.mappings(heads)
        salient = SalientOperations(source_embedding="raw", tokens=range(32)).fit(heads)
        assert salient.mappings(heads).table["target"].max() < 32


def test_fold_norm_folds_both_norms():
    tensors = model()
    gain = torch.linspace(0.5, 2, D_MODEL)
    with registered(tensors) as heads:
        maps, unembedding = dense_maps(heads), tensors["unembed.W_U"].T
    for layer in range(2):
        tensors[f"blocks.{layer}.ln1.w"] = gain
        tensors[f"blocks.{layer}.ln1.b"] = torch.zeros(D_MODEL)
    tensors["ln_final.w"], tensors["ln_final.b"] = gain, torch.zeros(D_MODEL)
    with registered(tensors) as heads:
        salient = SalientOperations(4, 3, source_embedding="raw", fold_norm=True).fit(heads)
        folded = gain.double().numpy()[:, None] * maps
        table = salient.mappings(heads).table
        check_mappings(table, folded, tensors["embed.W_E"], unembedding * gain, 4, 3)


def listing(models_dir, **options):
    path = models_dir / "stories260k"
    entries = json.loads((path / "tokens.json").read_text(encoding="utf-8"))
    texts = [entry.get("text", "") for entry in entries]
    heads = skhead.load_heads(path).iloc[[0, 20, 33]]
    salient = SalientOperations(3, 2, vocabulary=texts, **options).fit(heads)
    return texts, heads, salient.mappings(heads)


def test_texts_stand_beside_tokens_in_every_export(models_dir):
    texts, heads, found = listing(models_dir)
    table = found.table
    assert (table["text"] == [texts[token] for token in table["token"]]).all()
    assert (table["target_text"] == [texts[token] for token in table["target"]]).all()
    lines = found.to_text().splitlines()
    assert lines[::5] == list(heads.index)
    first = table.iloc[0]
    assert lines[1].startswith(f'  "{first["text"]}" ({first["saliency"]:.3g}) -> "')
    document = json.loads(found.to_json())
    assert [head["head"] for head in document["heads"]] == list(heads.index)
    for head, (_, rows) in zip(document["heads"], table.groupby("head", sort=False), strict=True):
        outputs = [output for token in head["inputs"] for output in token["outputs"]]
        assert [output["token"] for output in outputs] == rows["target"].tolist()
        assert [output["logit"] for output in outputs] == rows["logit"].tolist()
        assert [token["text"] for token in head["inputs"]] == rows["text"].tolist()[::2]
        assert head["prompt"] == found.prompts()[head["head"]]


def test_prompts_quote_every_line_and_say_which_direction(models_dir):
    _, heads, raised = listing(models_dir)
    _, _, lowered = listing(models_dir, direction="suppress")
    assert raised.prompts().index.tolist() == list(heads.index)
    for found, verb in ((raised, "raises most"), (lowered, "lowers most")):
        for label, prompt in found.prompts().items():
            assert verb in prompt and label not in prompt
            rows = found.table[found.table["head"] == label]
            for text in (*rows["text"], *rows["target_text"]):
                assert json.dumps(text, ensure_ascii=False) in prompt
            assert prompt.count(" -> ") == 3


def test_without_texts_there_are_ids_and_no_prompts():
    stack, embedding, unembedding = planted()
    found = SalientOperations(2, 1).fit(stack, None, embedding, unembedding).mappings(stack)
    assert found.to_text().splitlines() == ["H0", "  3 (5) -> 7", "  8 (3) -> 1"]
    assert "prompt" not in json.loads(found.to_json())["heads"][0]
    with pytest.raises(ValueError, match="needs the texts of tokens.*vocabulary="):
        found.prompts()


def test_a_tokenizer_serves_as_vocabulary(gpt2_path):
    pytest.importorskip("tokenizers")
    stack, embedding, unembedding = planted()
    salient = SalientOperations(2, 1, vocabulary=gpt2_path)
    table = salient.fit(stack, None, embedding, unembedding).mappings(stack).table
    tokens = list(json.loads((Path(gpt2_path) / "vocab.json").read_text(encoding="utf-8")))
    assert table["text"].tolist() == [tokens[3], tokens[8]]
    assert salient.get_feature_names_out()[3] == f"token3 {tokens[3]!r}"


def test_bundled_model_lists_what_explicit_maps_list():
    heads = skhead.load_heads("skhead/induction-2l")
    salient = SalientOperations(5, 5, source_embedding="raw").fit(heads)
    space = skhead.weights.read_token_space("skhead/induction-2l")
    table = salient.mappings(heads).table
    check_mappings(table, dense_maps(heads), space.embedding, space.unembedding, 5, 5)


def test_clones_pickles_and_data_frames():
    with registered(model()) as heads:
        salient = SalientOperations(2, 2, source_embedding="raw", tokens=[3, 1]).fit(heads)
        found = salient.transform(heads)
        for twin in (pickle.loads(pickle.dumps(salient)), clone(salient).fit(heads)):
            np.testing.assert_array_equal(twin.transform(heads), found)
        frame = clone(salient).set_output(transform="pandas").fit(heads).transform(heads)
        assert frame.columns.tolist() == ["token3", "token1"]
        assert frame.index.equals(heads.index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_salient": 0}, "n_salient must be an integer of at least 1; got 0"),
        ({"n_targets": 1.5}, "n_targets must be an integer of at least 1; got 1.5"),
        ({"source_embedding": "mlp"}, "source_embedding must be one of 'raw', 'mlp0'"),
        ({"direction": "both"}, "direction must be one of 'promote', 'suppress'; got 'both'"),
        ({"tokens": [40]}, "tokens holds 40, but the token ids are 0 to 39"),
    ],
)
def test_parameters_out_of_range(options, message):
    with registered(model()) as heads, pytest.raises(ValueError, match=message):
        SalientOperations(**({"source_embedding": "raw"} | options)).fit(heads)


def test_heads_without_tokens_or_of_other_models():
    stack, embedding, unembedding = planted()
    salient = SalientOperations(source_embedding="raw")
    with pytest.raises(HeadTableError, match="a stack has no tokens; pass fit"):
        salient.fit(stack)
    with pytest.raises(HeadShapeError, match="needs W_V and W_O of every head"):
        salient.fit(stack[:, 0], None, embedding)
    with pytest.raises(
        HeadShapeError, match=r"embedding must have shape \(n_vocab, 16\).*\(5, 3\)"
    ):
        salient.fit(stack, None, np.ones((5, 3)))
    with pytest.raises(HeadShapeError, match="unembedding must be real and finite"):
        salient.fit(stack, None, embedding, np.full((16, 16), np.nan))
    with pytest.raises(HeadShapeError, match="one row for each token, but have 16 and 15"):
        salient.fit(stack, None, embedding, unembedding[1:])
    with pytest.raises(HeadTableError, match="a stack has no unembedding; pass fit"):
        salient.fit(stack, None, embedding).mappings(stack)
    with pytest.raises(ValueError, match="fold_norm needs the model's norms"):
        SalientOperations(fold_norm=True).fit(stack, None, embedding)
    with registered(model()) as heads, registered(model(seed=5)) as others:
        with pytest.raises(HeadTableError, match="are of 2 models .* fit one estimator for each"):
            salient.fit(pd.concat([heads, others]))
        with pytest.raises(ValueError, match="a heads table names the model.*leave embedding"):
            salient.fit(heads, embedding=embedding)
        salient.fit(heads)
        with pytest.raises(HeadTableError, match="was fitted on toy-.*heads are of toy-"):
            salient.transform(others)
        with pytest.raises(HeadShapeError, match="fitted on heads of d_model 24.*have d_model 16"):
            salient.transform(stack)


def test_models_without_what_is_asked_for():
    with registered(model()) as heads:
        with pytest.raises(UnsupportedLayoutError, match="has no MLP.*source_embedding='raw'"):
            SalientOperations().fit(heads)
        first = heads[heads["layer"] == 0]
        found = SalientOperations().fit_transform(first)
        np.testing.assert_array_equal(
            found, SalientOperations(source_embedding="raw").fit_transform(first)
        )
    tensors = model()
    del tensors["embed.W_E"]
    with registered(tensors) as heads, pytest.raises(UnsupportedLayoutError, match="embed"):
        SalientOperations(source_embedding="raw").fit(heads)


def test_a_head_that_writes_nothing_is_named():
    tensors = model()
    tensors["blocks.1.attn.W_O"][2] = 0
    with registered(tensors) as heads:
        salient = SalientOperations(source_embedding="raw").fit(heads)
        with pytest.raises(DegenerateHeadError, match="L1H2 W_V W_O is zero on all tokens"):
            salient.transform(heads)
        assert salient.transform(heads.drop(index="L1H2")).shape == (7, N_VOCAB)
