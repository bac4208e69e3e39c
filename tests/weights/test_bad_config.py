"""A configuration that contradicts the tensors, or names what is not known, is refused."""

from __future__ import annotations

import re

import pytest
import torch

import skhead
from skhead.exceptions import CheckpointError, ConfigMismatchError, UnsupportedLayoutError


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_attention_heads": 8}, r"q_proj.* has shape \(32, 24\).*heads=8.*for \(64, 24\)"),
        ({"hidden_size": 32}, r"q_proj\.weight' has shape \(32, 24\).*hidden_size=32.*\(32, 32\)"),
        ({"num_key_value_heads": 4}, r"k_proj.* has shape \(16, 24\).*num_key_value_heads=4"),
        ({"head_dim": 6}, r"has shape \(32, 24\).*head_dim=6.*\(24, 24\)"),
        ({"num_hidden_layers": 2}, r"num_hidden_layers=2.*beyond that: tensor 'model\.layers\.2"),
        ({"num_hidden_layers": 4}, r"num_hidden_layers=4, and the file holds 3 attention layers"),
        ({"num_key_value_heads": 3}, r"4 cannot be divided into 3"),
        ({"head_dim": None, "num_attention_heads": 5}, r"24 cannot be divided into 5"),
        ({"hidden_size": "24"}, r"hidden_size='24' is not a positive integer"),
        ({"hidden_size": 0}, r"hidden_size=0 is not a positive integer"),
        ({"hidden_size": 10**400}, r"hidden_size=1000+\.\.\.0+ is not .* integer below 2\*\*63"),
        ({"num_attention_heads": True}, r"num_attention_heads=True is not a positive integer"),
        ({"hidden_size": None}, r"this llama model lacks hidden_size"),
    ],
)  # fmt: skip
def test_config_that_disagrees(change, message, write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, {**llama_config, **change})
    with pytest.raises(ConfigMismatchError, match=message):
        skhead.load_heads(path)


def test_config_with_synonyms_that_differ(write_model):
    tensors = {
        "h.0.attn.c_attn.weight": torch.randn(24, 72),
        "h.0.attn.c_proj.weight": torch.randn(24, 24),
    }
    config = {"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 1}
    path = write_model(tensors, {**config, "num_attention_heads": 6})
    with pytest.raises(ConfigMismatchError, match=r"n_head=4, num_attention_heads=6 mean the same"):
        skhead.load_heads(path)
    path = write_model(tensors, {**config, "num_attention_heads": 4})
    assert len(skhead.load_heads(path)) == 4


@pytest.mark.parametrize("key", ["num_hidden_groups", "inner_group_num"])
def test_albert_without_groups(key, write_model, llama_tensors):
    config = {"model_type": "albert", "hidden_size": 24, "num_hidden_layers": 2}
    path = write_model(llama_tensors, {**config, "num_attention_heads": 4, key: 0})
    message = f"^{re.escape(str(path))}.*{key}=0 is not a positive integer"
    with pytest.raises(ConfigMismatchError, match=message):
        skhead.load_heads(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 10**7}, r"num_hidden_layers=10000000 times inner_group_num=1 is"),
        ({"inner_group_num": 10**9}, r"times inner_group_num=1000000000 is more than the 10"),
        ({"num_hidden_groups": 3}, r"num_hidden_groups=3 is more than its 2 layers"),
        ({"num_hidden_groups": True}, r"num_hidden_groups=True is not a positive integer"),
    ],
)  # fmt: skip
def test_albert_with_impossible_counts(change, message, write_model, llama_tensors):
    config = {"model_type": "albert", "hidden_size": 24, "num_hidden_layers": 2}
    path = write_model(llama_tensors, {**config, "num_attention_heads": 4, **change})
    with pytest.raises(ConfigMismatchError, match=f"^{re.escape(str(path))}.*{message}"):
        skhead.load_heads(path)


def test_layer_count_is_held_against_the_tensors_before_it_is_used(
    write_model, llama_tensors, llama_config
):
    path = write_model(llama_tensors, {**llama_config, "num_hidden_layers": 10**15})
    message = rf"num_hidden_layers={10**15}, and the file holds 3 .*layers\.3\..* first one missing"
    with pytest.raises(ConfigMismatchError, match=message):
        skhead.load_heads(path)
    llama_tensors[f"model.layers.{10**15 - 1}.self_attn.q_proj.weight"] = torch.zeros(32, 24)
    path = write_model(llama_tensors, {**llama_config, "num_hidden_layers": 10**15})
    with pytest.raises(CheckpointError, match=r"L3 W_Q is missing: .*'model\.layers\.3\.self_attn"):
        skhead.load_heads(path)


def test_layer_number_beyond_any_integer(write_model, llama_tensors, lens_tensors, llama_config):
    number = "9" * 5000
    llama_tensors[f"model.layers.{number}.self_attn.q_proj.weight"] = torch.zeros(32, 24)
    assert len(skhead.load_heads(write_model(llama_tensors, llama_config))) == 12
    lens_tensors[f"blocks.{number}.attn.W_Q"] = torch.zeros(4, 24, 8)
    assert len(skhead.load_heads(write_model(lens_tensors, None, name="lens"))) == 8


def test_falcon_groups_that_are_no_number(write_model, llama_tensors):
    config = {
        "model_type": "falcon", "hidden_size": 24, "num_hidden_layers": 2, "num_kv_heads": "2",
        "num_attention_heads": 4, "new_decoder_architecture": True,
    }  # fmt: skip
    with pytest.raises(ConfigMismatchError, match="num_kv_heads='2' is not a positive integer"):
        skhead.load_heads(write_model(llama_tensors, config))


@pytest.mark.parametrize("layer", [0, 1])
def test_missing_tensor(layer, write_model, llama_tensors, llama_config):
    name = f"model.layers.{layer}.self_attn.v_proj.weight"
    del llama_tensors[name]
    path = write_model(llama_tensors, llama_config)
    with pytest.raises(CheckpointError, match=rf"L{layer} W_V is missing: .*{name}"):
        skhead.load_heads(path)


def test_no_attention_at_all(write_model, llama_config):
    path = write_model({"model.embed_tokens.weight": torch.zeros(2, 24)}, llama_config)
    with pytest.raises(
        CheckpointError, match=r"no attention tensor of llama: .*Tensors seen: 'model\.embed"
    ):
        skhead.load_heads(path)


def test_two_models_in_one_file(write_model, llama_tensors, llama_config):
    double = {**llama_tensors}
    for name, tensor in llama_tensors.items():
        double[name.removeprefix("model.")] = tensor.clone()
    path = write_model(double, llama_config)
    with pytest.raises(
        UnsupportedLayoutError, match=r"after each of the prefixes \['model\.', ''\]"
    ):
        skhead.load_heads(path)


# Architectures that are not known


def test_unknown_model_type(write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, {**llama_config, "model_type": "mamba"})
    message = r"'mamba' is not known. Tensors seen: 'model\.layers.*add a Family entry to skhead/"
    with pytest.raises(UnsupportedLayoutError, match=message):
        skhead.load_heads(path)


def test_no_config(write_model, llama_tensors):
    path = write_model(llama_tensors, None)
    with pytest.raises(UnsupportedLayoutError, match=r"there is no config\.json .*Tensors seen"):
        skhead.load_heads(path)


def test_unknown_file_ending(tmp_path):
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(UnsupportedLayoutError, match=r"file with the ending '\.gguf'"):
        skhead.load_heads(path)
