"""Embeddings behind the first block's MLP, against the modules of transformers themselves."""

from __future__ import annotations

import uuid
from operator import attrgetter

import pytest
import torch

import skhead
from skhead.exceptions import CheckpointError, ConfigMismatchError, UnsupportedLayoutError
from skhead.weights.first_block import read_first_block, read_source_embedding
from skhead.weights.running import open_bridge
from tests.architectures import ZOO, fresh_model
from tests.toys import random_weights, registered

#: By model: the embedding, the modules that a token passes, and what scales the embedding.
ROOT = "model.layers.0."
LLAMA = ("model.embed_tokens", f"{ROOT}post_attention_layernorm", f"{ROOT}mlp")
GEMMA = (
    "model.embed_tokens",
    f"{ROOT}pre_feedforward_layernorm",
    f"{ROOT}mlp",
    f"{ROOT}post_feedforward_layernorm",
)
PATHS = {
    "gpt2": ("transformer.wte", "transformer.h.0.ln_2", "transformer.h.0.mlp"),
    "gpt_neo": ("transformer.wte", "transformer.h.0.ln_2", "transformer.h.0.mlp"),
    "gptj": ("transformer.wte", "transformer.h.0.ln_1", "transformer.h.0.mlp"),
    "gpt_neox": (
        "gpt_neox.embed_in",
        "gpt_neox.layers.0.post_attention_layernorm",
        "gpt_neox.layers.0.mlp",
    ),
    "opt": (
        "model.decoder.embed_tokens",
        "model.decoder.layers.0.final_layer_norm",
        "model.decoder.layers.0.fc1",
        "model.decoder.layers.0.activation_fn",
        "model.decoder.layers.0.fc2",
    ),
    "falcon-multi-query": (
        "transformer.word_embeddings",
        "transformer.h.0.input_layernorm",
        "transformer.h.0.mlp",
    ),
    "falcon-grouped": (
        "transformer.word_embeddings",
        "transformer.h.0.ln_mlp",
        "transformer.h.0.mlp",
    ),
    "falcon-grouped-one-norm": (
        "transformer.word_embeddings",
        "transformer.h.0.input_layernorm",
        "transformer.h.0.mlp",
    ),
    "falcon-per-head": (
        "transformer.word_embeddings",
        "transformer.h.0.post_attention_layernorm",
        "transformer.h.0.mlp",
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), LLAMA),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi": ("model.embed_tokens", f"{ROOT}input_layernorm", f"{ROOT}mlp"),
    "olmo2": ("model.embed_tokens", f"{ROOT}mlp", f"{ROOT}post_feedforward_layernorm"),
}


def _registered(name):
    model = fresh_model(ZOO[name])
    return model, skhead.register_model(model, f"block-{uuid.uuid4().hex[:8]}")


@pytest.mark.parametrize("name", PATHS)
def test_mlp_of_tokens_is_what_the_modules_of_transformers_compute(name):
    model, source = _registered(name)
    embedding, *path = PATHS[name]
    with torch.no_grad():
        stream = attrgetter(embedding)(model)(torch.arange(11))
        written = stream
        for module in path:
            written = attrgetter(module)(model)(written)
    for kind, expected in (
        ("raw", stream),
        ("mlp0", written),
        ("resid_post_mlp0", stream + written),
    ):
        found = read_source_embedding(source, kind)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    some = read_source_embedding(source, "mlp0", tokens=[4, 2, 4], center=True)
    centred = written[[4, 2, 4]] - written[[4, 2, 4]].mean(1, keepdim=True)
    torch.testing.assert_close(some, centred, rtol=1e-4, atol=1e-4)
    skhead.unregister_model(source)


def test_blooms_norm_behind_the_embedding_acts_before_the_block():
    model, source = _registered("bloom")
    block = model.transformer.h[0]
    with torch.no_grad():
        stream = model.transformer.word_embeddings_layernorm(
            model.transformer.word_embeddings(torch.arange(11))
        )
        hidden = block.mlp.gelu_impl(
            block.mlp.dense_h_to_4h(block.post_attention_layernorm(stream))
        )
        expected = block.mlp.dense_4h_to_h(hidden)
    found = read_source_embedding(source, "mlp0")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found = read_source_embedding(source, "resid_post_mlp0")
    torch.testing.assert_close(found, expected + stream, rtol=1e-4, atol=1e-4)


def test_block_under_lens_names_is_what_the_running_bridge_computes():
    pytest.importorskip("transformer_lens")
    source = next(name for name in skhead.datasets.list_models() if _has_mlp(name))
    bridge = open_bridge(source)
    tokens = torch.arange(8)
    with torch.no_grad():
        stream = bridge.embed(tokens[None])
        block = bridge.blocks[0]
        expected = block.mlp(block.ln2(stream))[0]
    torch.testing.assert_close(read_source_embedding(source, "mlp0", tokens), expected)


def _has_mlp(source):
    try:
        read_first_block(source)
    except UnsupportedLayoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral", "routes each token to experts"),
        ("bert", "normalises the residual stream itself"),
        ("opt-350m-like", "normalises the residual stream itself"),
    ],
)
def test_architectures_without_a_map_of_single_tokens_are_named(name, message):
    _, source = _registered(name)
    with pytest.raises(UnsupportedLayoutError, match=message):
        read_source_embedding(source, "mlp0")


def test_missing_parts_and_wrong_parameters_raise():
    with pytest.raises(UnsupportedLayoutError, match="the first block has no MLP"):
        read_source_embedding("skhead/induction-2l", "mlp0")
    with pytest.raises(ValueError, match="kind must be one of"):
        read_source_embedding("skhead/induction-2l", "mlp1")
    with pytest.raises(ValueError, match="tokens holds 68"):
        read_source_embedding("skhead/induction-2l", tokens=[68])
    with pytest.raises(ValueError, match="list of token ids"):
        read_source_embedding("skhead/induction-2l", tokens=[1.5])
    weights = random_weights()
    with registered(weights) as heads:
        source = heads["source"].iloc[0]
        with pytest.raises(UnsupportedLayoutError, match=r"no tensor 'embed\.W_E'"):
            read_source_embedding(source)
    weights["blocks.0.mlp.W_in"] = torch.ones(24, 7)
    with (
        registered(weights) as heads,
        pytest.raises(UnsupportedLayoutError, match="nothing says which activation"),
    ):
        read_first_block(heads["source"].iloc[0])


def test_a_missing_bias_is_not_taken_for_zero():
    model, source = _registered("gpt2")
    model.transformer.h[0].mlp.c_fc.bias = None
    with pytest.raises(CheckpointError, match=r"h\.0\.mlp\.c_fc\.bias.*bias of the MLP's up"):
        read_first_block(source)


def test_an_unknown_activation_is_named():
    model, source = _registered("llama")
    model.config.hidden_act = "mish"
    with pytest.raises(UnsupportedLayoutError, match="activation 'mish'"):
        read_first_block(source)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("h.0.ln_2.weight", (1,), "the norm's gain of this model has"),
        ("h.0.ln_2.bias", (1,), "the norm's bias of this model has"),
        ("h.0.mlp.c_fc.bias", (1,), "the bias of the MLP's up matrix of this model has"),
        ("h.0.mlp.c_proj.bias", (7,), "the bias of the MLP's down matrix of this model has"),
    ],
)
def test_vectors_of_another_length_are_not_repeated(name, shape, message):
    model, source = _registered("gpt2")
    owner, _, attribute = f"transformer.{name}".rpartition(".")
    setattr(attrgetter(owner)(model), attribute, torch.nn.Parameter(torch.ones(shape)))
    with pytest.raises(ConfigMismatchError, match=rf"{name}' has shape .*; {message}"):
        read_first_block(source)


def test_matrices_that_disagree_about_the_hidden_layer():
    model, source = _registered("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, 1:].clone())
    with pytest.raises(ConfigMismatchError, match=r"widths \(up \d+, down \d+, gate \d+\)"):
        read_first_block(source)
