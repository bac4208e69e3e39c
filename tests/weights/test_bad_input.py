"""What is wrong with a checkpoint is said, with the file, the tensor or the head by name."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import skhead
from skhead.exceptions import (
    CheckpointError,
    ConfigMismatchError,
    DegenerateHeadError,
    SourceNotFoundError,
    UnsafeCheckpointError,
    UnsupportedLayoutError,
)

INDEX = "model.safetensors.index.json"


def _index(path: Path) -> dict[str, Any]:
    return json.loads((path / INDEX).read_text())


# Damaged files


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_truncated_file(keep, write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    file = path / "model.safetensors"
    raw = file.read_bytes()
    size = int(len(raw) * keep) if 0 < abs(keep) < 1 else keep
    file.write_bytes(raw[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        skhead.load_heads(path)


def test_truncated_file_names_the_first_lost_tensor(write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"truncated: tensor 'model\.layers\.2\..*' ends at"):
        skhead.load_heads(path)


def test_truncated_shard(write_sharded, llama_tensors, llama_config):
    path = write_sharded(llama_tensors, llama_config)
    shard = path / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is truncated"):
        skhead.load_heads(path)


def test_missing_shard(write_sharded, llama_tensors, llama_config):
    path = write_sharded(llama_tensors, llama_config)
    (path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-1\.safetensors is missing"):
        skhead.load_heads(path)


def test_missing_shard_without_attention_does_no_harm(write_sharded, llama_tensors, llama_config):
    path = write_sharded(llama_tensors, llama_config)
    (path / "model-rest.safetensors").unlink()
    heads = skhead.load_heads(path)
    assert skhead.load_weights(heads).shape == (12, 24, 8)


def test_index_that_places_a_tensor_wrongly(write_sharded, llama_tensors, llama_config):
    path = write_sharded(llama_tensors, llama_config)
    index = _index(path)
    index["weight_map"]["model.layers.1.self_attn.k_proj.weight"] = "model-2.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    message = r"places tensor 'model\.layers\.1\.self_attn\.k_proj\.weight' in model-2\.safetensors"
    with pytest.raises(CheckpointError, match=message):
        skhead.load_heads(path)


@pytest.mark.parametrize(
    "text, message",
    [("{", r"is not JSON"), ("[]", "holds a list"), ("{}", "has no weight_map")],
)
def test_broken_index(text, message, write_sharded, llama_tensors, llama_config):
    path = write_sharded(llama_tensors, llama_config)
    (path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        skhead.load_heads(path)


@pytest.mark.parametrize("text", ["{", "\ud800".encode("utf-8", "surrogatepass"), "[1]"])
def test_broken_config(text, write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    (path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|holds a list)"):
        skhead.load_heads(path)


Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h: h[Q1].update(shape=[32, 25]), rf"lies about tensor '{Q1}': shape \(32, 25\)"),
        (lambda h: h[Q1].update(shape=[10**15, 10**15]), rf"lies about tensor '{Q1}'"),
        (lambda h: h[Q1].update(shape=[-32, -24]), rf"'{Q1}' has the impossible shape"),
        (lambda h: h[Q1].update(shape="32x24"), rf"'{Q1}' has the impossible shape '32x24'"),
        (lambda h: h[Q1].update(dtype="F16"), rf"lies about tensor '{Q1}'.*of F16 takes 1536"),
        (lambda h: h[Q1].update(dtype="F99"), rf"'{Q1}' has the unknown dtype 'F99'"),
        (lambda h: h[Q1].update(data_offsets=[9, 3]), rf"'{Q1}' has impossible offsets \[9, 3\]"),
        (lambda h: h[Q1].pop("dtype"), rf"entry for tensor '{Q1}' lacks dtype"),
        (lambda h: h.update({Q1: 7}), rf"entry for tensor '{Q1}' lacks dtype"),
        (lambda h: h.pop(Q1), r"the header lies about tensor '.*': it begins at byte"),
        (lambda h: [*h], "the header is a list"),
    ],
)
def test_lying_header(change, message, write_model, edit_header, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)

    def apply(header):
        result = change(header)
        return result if isinstance(result, list) else None

    edit_header(path / "model.safetensors", apply)
    with pytest.raises(CheckpointError, match=message):
        skhead.load_heads(path)


def test_overlapping_tensors(write_model, edit_header, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    other = "model.layers.0.self_attn.q_proj.weight"

    def overlap(header):
        header[Q1]["data_offsets"] = header[other]["data_offsets"]

    edit_header(path / "model.safetensors", overlap)
    with pytest.raises(CheckpointError, match=r"the header lies about tensor"):
        skhead.load_heads(path)


def test_bytes_behind_the_last_tensor(write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 12)
    with pytest.raises(CheckpointError, match=r"12 bytes follow the last tensor"):
        skhead.load_heads(path)


@pytest.mark.parametrize(
    "header, message",
    [
        (b'{"a": 1', "the header is not JSON"),
        (b"\xff\xfe{}", "the header is not JSON"),
        (b'{"a": {}, "a": {}}', "holds the key 'a' twice"),
    ],
)
def test_unreadable_header(header, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=message):
        skhead.load_heads(path)


# Configurations that disagree with the tensors


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
    with pytest.raises(ConfigMismatchError, match=f"{key}=0 is not a positive integer"):
        skhead.load_heads(path)


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


# Values


@pytest.mark.parametrize(
    "role, name, rows, value, message",
    [
        ("Q", "q_proj", slice(24, 25), float("nan"), r"L1H3 W_Q, in tensor .*q_proj.*24 NaN"),
        ("K", "k_proj", slice(8, 9), float("inf"), r"L1H2 W_K \(key-value head 1\).*and 24 inf"),
        ("V", "v_proj", slice(0, 1), float("-inf"), r"L1H0 W_V \(key-value head 0\)"),
    ],
)  # fmt: skip
def test_values_that_are_not_finite(
    role, name, rows, value, message, write_model, llama_tensors, llama_config
):
    llama_tensors[f"model.layers.1.self_attn.{name}.weight"][rows] = value
    path = write_model(llama_tensors, llama_config)
    heads = skhead.load_heads(path)
    with pytest.raises(DegenerateHeadError, match=message):
        skhead.load_weights(heads, role)
    assert skhead.load_weights(heads[heads["layer"] != 1], role).shape == (8, 24, 8)
    assert skhead.load_weights(heads, "O").shape == (12, 24, 8)


def test_not_finite_o(write_model, llama_tensors, llama_config):
    llama_tensors["model.layers.2.self_attn.o_proj.weight"][5, 17] = float("nan")
    heads = skhead.load_heads(write_model(llama_tensors, llama_config))
    with pytest.raises(
        DegenerateHeadError, match=r"model\.safetensors: L2H2 W_O.* 1 NaN and 0 inf"
    ):
        skhead.load_weights(heads, "O")


def test_not_finite_gain(write_model, llama_tensors, llama_config):
    llama_tensors["model.layers.0.input_layernorm.weight"][3] = float("nan")
    heads = skhead.load_heads(write_model(llama_tensors, llama_config))
    with pytest.raises(DegenerateHeadError, match=r"input_layernorm\.weight' holds NaN"):
        skhead.load_weights(heads, "Q", fold_norm=True)


def test_zero_head_is_read(write_model, llama_tensors, llama_config):
    llama_tensors["model.layers.1.self_attn.q_proj.weight"].zero_()
    heads = skhead.load_heads(write_model(llama_tensors, llama_config))
    assert not skhead.load_weights(heads.loc[["L1H0"]], "Q").any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_storage(dtype, write_model, llama_tensors, llama_config):
    name = "model.layers.1.self_attn.q_proj.weight"
    llama_tensors[name] = torch.ones(32, 24).to(dtype)
    path = write_model(llama_tensors, llama_config)
    with pytest.raises(UnsupportedLayoutError, match=rf"'{name}' is stored as .*Quantised weights"):
        skhead.load_heads(path)


def test_missing_gain(write_model, llama_tensors, llama_config):
    del llama_tensors["model.layers.1.input_layernorm.weight"]
    heads = skhead.load_heads(write_model(llama_tensors, llama_config))
    message = (
        r"no tensor 'model\.layers\.1\.input_layernorm\.weight', the gain of the norm beside L1"
    )
    with pytest.raises(CheckpointError, match=message):
        skhead.load_weights(heads, "K", fold_norm=True)


def test_gain_of_wrong_length(write_model, llama_tensors, llama_config):
    llama_tensors["model.layers.1.input_layernorm.weight"] = torch.ones(23)
    heads = skhead.load_heads(write_model(llama_tensors, llama_config))
    with pytest.raises(
        CheckpointError, match=r"has shape \(23,\); a gain of this model has \(24,\)"
    ):
        skhead.load_weights(heads, "K", fold_norm=True)


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


# Files that could do harm


class _Bomb:
    def __reduce__(self):
        return (Path("/nonexistent/skhead-was-executed").write_text, ("boom",))


def test_pickled_weights_are_refused_with_a_command_that_works(
    tmp_path, llama_tensors, llama_config
):
    path = tmp_path / "old"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(llama_config))
    torch.save(llama_tensors, path / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpointError, match="pickled files only") as caught:
        skhead.load_heads(path)
    message = str(caught.value)
    assert "weights_only=True" in message
    command = message[message.index("python -c ") : message.index(" . Or give")]
    code = command.removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    heads = skhead.load_heads(path)
    direct = skhead.load_heads(path / "pytorch_model.bin")
    for role in "QKVO":
        converted = skhead.load_weights(heads, role)
        assert (converted == skhead.load_weights(direct, role)).all()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_torch_file_that_would_execute_code(tmp_path, llama_config):
    path = tmp_path / "pytorch_model.bin"
    (tmp_path / "config.json").write_text(json.dumps(llama_config))
    torch.save({"a": _Bomb()}, path)
    with pytest.raises(UnsafeCheckpointError, match=r"pytorch_model\.bin holds more than tensors"):
        skhead.load_heads(path)
    path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(UnsafeCheckpointError, match=r"pytorch_model\.bin holds more than tensors"):
        skhead.load_heads(path)


def test_torch_file_that_is_no_state_dict(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"model": {"a": torch.zeros(2)}}, path)
    with pytest.raises(
        CheckpointError, match=r"not a flat state dict: its entry 'model' is a dict"
    ):
        skhead.load_heads(path)
    torch.save(torch.zeros(2), path)
    with pytest.raises(CheckpointError, match="holds no mapping of names to tensors"):
        skhead.load_heads(path)
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises((CheckpointError, UnsafeCheckpointError), match=r"x\.pt"):
        skhead.load_heads(path)


@pytest.mark.parametrize(
    "shard", ["../../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "\\\\host\\x"]
)
def test_index_that_leaves_its_directory(shard, write_sharded, llama_tensors, llama_config):
    path = write_sharded(llama_tensors, llama_config)
    save_file(llama_tensors, path.parent.parent / "x.safetensors")
    index = _index(path)
    index["weight_map"]["model.embed_tokens.weight"] = shard
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UnsafeCheckpointError, match=r"'model\.embed_tokens\.weight' in .*outside"):
        skhead.load_heads(path)


def test_several_files_and_no_index(tmp_path, lens_tensors):
    for name in ("a", "b"):
        save_file(lens_tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several safetensors.*: a\.safetensors, b\.safet"):
        skhead.load_heads(tmp_path)


def test_empty_directory(tmp_path):
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        skhead.load_heads(tmp_path)


# Names that lead nowhere


@pytest.mark.parametrize("source", ["./nowhere", "no/such/path", "/no/such/path", "a b"])
def test_no_such_source(source):
    with pytest.raises(SourceNotFoundError, match=r"does not exist: .*no bundled model, no path"):
        skhead.load_heads(source)


def test_path_object_is_never_a_hub_id(tmp_path):
    with pytest.raises(SourceNotFoundError, match="does not exist"):
        skhead.load_heads(Path("gpt2-of-nobody"))


def test_source_that_went_away(write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    heads = skhead.load_heads(path)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(SourceNotFoundError, match="does not exist any more"):
        skhead.load_weights(heads)


def test_revision_is_for_the_hub(write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    with pytest.raises(ValueError, match=r"revision='main' applies to hub repositories only"):
        skhead.load_heads(path, revision="main")
    with pytest.raises(ValueError, match=r"revision='main' applies to hub repositories only"):
        skhead.load_heads("skhead/induction-2l", revision="main")


def test_part_of_a_model_without_parts(write_model, llama_tensors, lens_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    with pytest.raises(ValueError, match=r"part='decoder' was given, and a llama model has one"):
        skhead.load_heads(path, part="decoder")
    path = write_model(lens_tensors, None, name="lens")
    with pytest.raises(
        ValueError, match=r"part='decoder' was given, and a model under Transformer"
    ):
        skhead.load_heads(path, part="decoder")
