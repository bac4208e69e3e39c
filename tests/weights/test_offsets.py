"""The constant part of queries and keys, against transformers' own modules."""

from __future__ import annotations

import uuid
from contextlib import contextmanager

import pytest
import torch
from toys import random_weights, registered

import skhead
from skhead.exceptions import ConfigMismatchError, DegenerateHeadError, UnsupportedLayoutError
from skhead.weights.offsets import read_offsets
from skhead.weights.running import open_bridge

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 11,
}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=11))

    def constants(layer):
        block = model.transformer.h[layer]
        parts = block.attn.c_attn(block.ln_1.bias[None])[0].split(24)
        return {role: part.view(4, 6) for role, part in zip("QKV", parts, strict=True)}

    return model, constants


def gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))

    def constants(layer):
        block = model.gpt_neox.layers[layer]
        fused = block.attention.query_key_value(block.input_layernorm.bias).view(4, 3, 6)
        return {role: fused[:, place] for place, role in enumerate("QKV")}

    return model, constants


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2))

    def constants(layer):
        attention = model.model.layers[layer].self_attn
        zero = torch.zeros(24)
        groups = torch.tensor([0, 0, 1, 1])
        return {
            "Q": attention.q_proj(zero).view(4, 6),
            "K": attention.k_proj(zero).view(2, 6)[groups],
            "V": attention.v_proj(zero).view(2, 6)[groups],
        }

    return model, constants


@contextmanager
def live(model):
    name = skhead.register_model(model, f"offsets-{uuid.uuid4().hex[:8]}")
    try:
        yield skhead.load_heads(name)
    finally:
        skhead.unregister_model(name)


@pytest.mark.parametrize("make", [gpt2, gpt_neox, qwen2])
def test_equals_what_the_module_makes_of_the_norms_bias(make):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, constants = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        with live(model) as heads:
            for role in "QKV":
                found = read_offsets(heads, role)
                expected = torch.cat([constants(layer)[role] for layer in range(2)])
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                some = read_offsets(heads.iloc[[6, 1]], role)
                torch.testing.assert_close(some, expected[[6, 1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [gpt2, gpt_neox, qwen2])
def test_a_bridge_has_the_biases_of_its_model(make):
    pytest.importorskip("transformer_lens")
    torch.manual_seed(0)
    model, _ = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    with live(model) as heads, live(open_bridge(model)) as bridged:
        for role in "QKV":
            expected = read_offsets(heads, role)
            assert expected.any()
            torch.testing.assert_close(read_offsets(bridged, role), expected, rtol=1e-5, atol=1e-5)


def lens(n_kv_heads=2):
    tensors = random_weights(n_layers=1, n_kv_heads=n_kv_heads)
    kv = "_b_K" if n_kv_heads != 4 else "b_K"
    for name, count in (("b_Q", 4), (kv, n_kv_heads)):
        tensors[f"blocks.0.attn.{name}"] = torch.randn(count, 5)
    tensors["blocks.0.ln1.w"], tensors["blocks.0.ln1.b"] = torch.randn(24), torch.randn(24)
    return tensors


def test_tensors_under_transformer_lens_names():
    tensors = lens()
    with registered(tensors) as heads:
        queries, keys = (read_offsets(heads, role) for role in "QK")
        weights = skhead.load_weights(heads, "Q"), skhead.load_weights(heads, "K")
    shift = tensors["blocks.0.ln1.b"]
    torch.testing.assert_close(
        queries, tensors["blocks.0.attn.b_Q"] + shift @ torch.from_numpy(weights[0])
    )
    own = tensors["blocks.0.attn._b_K"].repeat_interleave(2, 0)
    torch.testing.assert_close(keys, own + shift @ torch.from_numpy(weights[1]))


def test_without_any_bias_it_is_zero(models_dir):
    heads = skhead.load_heads(models_dir / "stories260k")
    assert not read_offsets(heads, "Q").any()
    with registered(random_weights()) as toy:
        assert read_offsets(toy, "K").shape == (12, 5)
        assert not read_offsets(toy, "K").any()


def test_damaged_biases_are_named():
    tensors = lens()
    tensors["blocks.0.attn.b_Q"] = torch.zeros(4, 6)
    with (
        registered(tensors) as heads,
        pytest.raises(ConfigMismatchError, match=r"b_Q' has shape \(4, 6\); .* \(4, 5\)"),
    ):
        read_offsets(heads, "Q")
    tensors = lens()
    tensors["blocks.0.ln1.b"][3] = torch.nan
    with (
        registered(tensors) as heads,
        pytest.raises(DegenerateHeadError, match=r"blocks\.0\.ln1\.b' holds NaN"),
    ):
        read_offsets(heads, "K")


def test_quantised_biases_are_refused():
    tensors = lens()
    tensors["blocks.0.attn.b_Q"] = torch.zeros(4, 5, dtype=torch.int8)
    with (
        registered(tensors) as heads,
        pytest.raises(UnsupportedLayoutError, match=r"b_Q' is stored as torch\.int8"),
    ):
        read_offsets(heads, "Q")
