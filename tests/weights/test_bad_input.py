"""What is wrong with a checkpoint is said, with the file, the tensor or the head by name."""

from __future__ import annotations

import json
import pickle
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import skhead
from skhead.exceptions import (
    CheckpointError,
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


def test_shard_of_an_impossible_name(write_sharded, llama_tensors, llama_config):
    path = write_sharded(llama_tensors, llama_config)
    index = _index(path)
    index["weight_map"]["model.layers.1.self_attn.k_proj.weight"] = "x" * 5000
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"shard x{100}\.\.\. \(5000 characters\) is missing"):
        skhead.load_heads(path)


LONG = '{"hidden_size": ' + "9" * 5000 + "}"


def test_index_with_a_very_long_integer(write_sharded, llama_tensors, llama_config):
    path = write_sharded(llama_tensors, llama_config)
    (path / INDEX).write_text(LONG)
    with pytest.raises(CheckpointError, match=r"index\.json is not JSON: Exceeds the limit"):
        skhead.load_heads(path)


@pytest.mark.parametrize("text", ["{", "\ud800".encode("utf-8", "surrogatepass"), "[1]", LONG])
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
        (lambda h: h[Q1].update(shape=[0, 2**70]), rf"'{Q1}' has the impossible shape \[0, 118"),
        (
            lambda h: h[Q1].update(shape=[10**400]),
            rf"'{Q1}' has the impossible shape \[1000+\.\.\.",
        ),
        (lambda h: h[Q1].update(data_offsets=[0, 2**63]), rf"'{Q1}' has impossible offsets \[0, 9"),
        (
            lambda h: h[Q1].update(shape=[2**62] * 9),
            r"takes 2\*\*63 bytes or more, its offsets hold",
        ),
        (lambda h: h[Q1].update(shape=[2**62, 2**62, 0]), r"takes 2\*\*63 bytes or more"),
        (lambda h: h[Q1].update(note=float("nan")), r"the header is not JSON \(it holds NaN\)"),
        (lambda h: h[Q1].update(note="\ud800"), r"the header holds '\\ud800', which is no Unicode"),
        (lambda h: h.update({"\udfff": h.pop(Q1)}), r"the header holds '\\udfff', which is no Uni"),
        (lambda h: h.update(__metadata__=["a"]), r"__metadata__ is a list, not a mapping of text"),
        (lambda h: h.update(__metadata__="a"), r"__metadata__ is a str, not a mapping of text to"),
        (
            lambda h: h.update(__metadata__={"k": 1}),
            r"__metadata__ holds 1 under 'k', and only text",
        ),
        (lambda h: h.update(__metadata__={"k": None}), r"__metadata__ holds None under 'k'"),
        (lambda h: h.update(__metadata__={"k": float("nan")}), r"not JSON \(it holds NaN\)"),
        (lambda h: h.update(__metadata__={"k": "\ud800"}), r"holds '\\ud800', which is no Unicode"),
    ],
)
def test_lying_header(change, message, write_model, edit_header, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)

    def apply(header):
        result = change(header)
        return result if isinstance(result, list) else None

    edit_header(path / "model.safetensors", apply)
    with pytest.raises(CheckpointError, match=message) as caught:
        skhead.load_heads(path)
    assert str(path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "note": "é"}])
def test_metadata_that_is_allowed(metadata, write_model, edit_header, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    edit_header(path / "model.safetensors", lambda h: h.update(__metadata__=metadata))
    assert skhead.load_weights(skhead.load_heads(path)).shape == (12, 24, 8)


def test_what_only_safetensors_refuses(write_model, edit_header, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    edit_header(path / "model.safetensors", lambda h: h[Q1].update(note=["\ud800"]))
    heads = skhead.load_heads(path)
    message = (
        r"model\.safetensors: safetensors cannot read tensor '.*layers\.0\..*o_proj\.weight' \("
    )
    with pytest.raises(CheckpointError, match=message):
        skhead.load_weights(heads)


def test_tensor_that_safetensors_fails_to_read(
    write_model, llama_tensors, llama_config, monkeypatch
):
    class Failing:
        def get_tensor(self, name):
            raise SafetensorError(f"no {name}")

    heads = skhead.load_heads(write_model(llama_tensors, llama_config))
    monkeypatch.setattr("skhead.weights.readers.safe_open", lambda *_, **__: Failing())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*cannot read tensor .*o_proj"):
        skhead.load_weights(heads)


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
        (b"\xef\xbb\xbf{}", r"the header is not JSON \(Unexpected UTF-8 BOM"),
        ("{}".encode("utf-16"), "the header is not JSON"),
        (b'{"a": %s}' % (b"9" * 5000), r"the header is not JSON \(Exceeds the limit"),
    ],
)
def test_unreadable_header(header, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=message):
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


@pytest.mark.parametrize("to_sparse", [torch.Tensor.to_sparse_coo, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_storage(to_sparse, tmp_path, llama_tensors, llama_config):
    name = "model.layers.1.self_attn.q_proj.weight"
    llama_tensors[name] = to_sparse(llama_tensors[name])
    (tmp_path / "config.json").write_text(json.dumps(llama_config))
    torch.save(llama_tensors, tmp_path / "pytorch_model.bin")
    message = rf"_model\.bin: tensor '{name}' is stored in the layout torch\.sparse_.*to_dense\(\)"
    with pytest.raises(UnsupportedLayoutError, match=message):
        skhead.load_heads(tmp_path / "pytorch_model.bin")


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
    python, *arguments = shlex.split(command)
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    heads = skhead.load_heads(path)
    direct = skhead.load_heads(path / "pytorch_model.bin")
    for role in "QKVO":
        converted = skhead.load_weights(heads, role)
        assert (converted == skhead.load_weights(direct, role)).all()


@pytest.mark.parametrize("name", ["a'+print(1)+'.bin", "$(touch x).bin", "a; echo.bin", 'a"b.bin'])
def test_the_command_takes_a_file_name_for_a_name(name, tmp_path):
    """Names come from whoever made the archive, and users paste the command into a shell."""
    (tmp_path / name).touch()
    with pytest.raises(UnsafeCheckpointError) as caught:
        skhead.load_heads(tmp_path)
    message = str(caught.value)
    command = message[message.index("python -c ") : message.index(" . Or give")]
    _, _, code, source, _ = shlex.split(command)
    assert source == (tmp_path / name).as_posix()
    assert name not in code and "$" not in code


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


@pytest.mark.parametrize(
    "code",
    [b".", b"h\x05.", b"K\x01\x86.", b"X\x02\0\0\0\xff\xff.", b"K\x01Q.", b""],
    ids=["no result", "no memo", "no pair", "no text", "no tuple", "nothing"],
)
def test_torch_file_with_a_damaged_pickle(code, tmp_path):
    """Whatever torch's reader trips over, the file is named."""
    good, path = tmp_path / "good.bin", tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2)}, good)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = b"\x80\x02" + code if name.endswith("data.pkl") else source.read(name)
            target.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read as a torch file"):
        skhead.load_heads(path)
    path.write_bytes(b"\x80\x02" + code)
    with pytest.raises((CheckpointError, UnsafeCheckpointError), match=r"pytorch_model\.bin"):
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


def test_source_that_no_file_system_takes():
    with pytest.raises(SourceNotFoundError, match="does not exist"):
        skhead.load_heads("./" + "x" * 5000)


@pytest.mark.parametrize(
    "source, message",
    [
        (None, r"load_heads: source must be a path, .* got NoneType\. Give for example the path"),
        (3, r"got int\. Give for example"),
        (b"gpt2", r"got bytes\. Decode it"),
        (
            torch.nn.Linear(2, 2),
            r"got Linear\. Give a model in memory a name with skhead\.regist",
        ),
        (
            torch.nn.ModuleList([torch.nn.Linear(2, 2)]),
            r"got ModuleList\. .*skhead\.register_model",
        ),
        ({"blocks.0.attn.W_Q": torch.zeros(1)}, r"got dict\. .*skhead\.register_model"),
        (pd.DataFrame({"source": ["x"]}), r"got DataFrame\. A heads table goes to load_weights"),
        ([None], r"got a list that holds NoneType"),
        (["gpt2", torch.nn.Linear(2, 2)], r"a list that holds Linear\. .*skhead\.register_model"),
    ],
)
def test_source_of_another_type(source, message):
    with pytest.raises(TypeError, match=message):
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
