"""What a hostile checkpoint cannot do; SECURITY.md says the same in words and names these tests."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import skhead
from skhead.exceptions import CheckpointError, SkheadError, UnsafeCheckpointError
from skhead.weights import files, lens

ROOT = Path(__file__).resolve().parents[2]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(write_model, llama_tensors, llama_config):
    return write_model(llama_tensors, llama_config)


def peak_of(source):
    """Most bytes that Python held while a source was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(SkheadError):
            skhead.load_heads(source)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# No code


def test_code_beside_a_checkpoint_is_not_executed(model, llama_config):
    """What transformers would run for trust_remote_code=True stays a file."""
    (model / "modeling_evil.py").write_text("raise SystemExit('executed')\n")
    (model / "setup.py").write_text("raise SystemExit('executed')\n")
    classes = {"AutoConfig": "modeling_evil.Config", "AutoModel": "modeling_evil.Model"}
    config = llama_config | {"auto_map": classes, "trust_remote_code": True}
    (model / "config.json").write_text(json.dumps(config))
    heads = skhead.load_heads(model)
    assert skhead.load_weights(heads, role="O").shape[0] == len(heads)
    assert "modeling_evil" not in sys.modules


def test_texts_of_a_configuration_are_no_names_of_modules(model, llama_config):
    for value in ("os", "__import__('os')", "../../evil", "skhead.cli", "llama\0", "{0.__class__}"):
        (model / "config.json").write_text(json.dumps(llama_config | {"model_type": value}))
        with pytest.raises(SkheadError):
            skhead.load_heads(model)


# Nothing outside


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_a_link_shows_nothing_of_what_it_leads_to(name, tmp_path, model):
    """Links are followed, as caches of the hub consist of them; errors quote no content."""
    secret = tmp_path / "secret"
    secret.write_text("root:hunter2:0:0\n" * 50)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    if name == INDEX:
        (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        skhead.load_heads(model)
    assert "hunter2" not in str(caught.value) + str(caught.value.__cause__)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "loop"])
def test_what_is_no_file_is_not_read(name, kind, model):
    """A pipe would wait for ever, and a device never end."""
    (model / "model.safetensors").unlink()
    (model / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero" if kind == "zeros" else model / name)
    with pytest.raises(SkheadError):
        skhead.load_heads(model)


def test_shards_of_an_index_are_files_of_its_directory(tmp_path, write_sharded, llama_tensors):
    """Also where another directory holds what the index asks for."""
    path = write_sharded(llama_tensors, {"model_type": "llama"})
    index = json.loads((path / INDEX).read_text())
    save_file(llama_tensors, tmp_path / "outside.safetensors")
    name = next(iter(index["weight_map"]))
    for shard in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "a/../../x"):
        index["weight_map"][name] = shard
        (path / INDEX).write_text(json.dumps(index))
        with pytest.raises(UnsafeCheckpointError, match="outside its own directory"):
            skhead.load_heads(path)


# No memory for what is not there


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8])
def test_a_header_that_claims_to_be_long_takes_no_memory(length, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    assert peak_of(path) < 2**20


@pytest.mark.parametrize("shape", [[2**40], [2**31, 2**31], [2**62, 2**62], [0, 2**62]])
def test_a_tensor_that_claims_to_be_large_takes_no_memory(shape, model, edit_header):
    def change(header):
        header["model.layers.0.self_attn.q_proj.weight"]["shape"] = shape

    edit_header(model / "model.safetensors", change)
    assert peak_of(model) < 2**21


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
)
def test_a_configuration_that_claims_to_be_large_takes_no_memory(key, model, llama_config):
    (model / "config.json").write_text(json.dumps(llama_config | {key: 10**12}))
    assert peak_of(model) < 2**22


def test_a_configuration_that_is_large_is_not_read(model, monkeypatch):
    assert files._LARGEST_JSON == 100_000_000
    with (model / "config.json").open("wb") as file:
        file.truncate(files._LARGEST_JSON + 1)
    assert peak_of(model) < 2**20


def test_a_zip_bomb_takes_no_more_memory_than_a_tensor_says(tmp_path):
    """torch maps its files, so that a repeated or huge storage is not unpacked."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1).expand(2**30)}, path)
    assert path.stat().st_size < 2**20
    assert peak_of(path) < 2**22


def test_an_expanded_tensor_takes_no_memory(tmp_path):
    """A file of some kilobytes could else ask for any number of weights."""
    width, path = 2**14, tmp_path / "pytorch_model.bin"
    names = (f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkvo")
    torch.save({name: torch.zeros(1).expand(width, width) for name in names}, path)
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    with pytest.raises(CheckpointError, match=r"q_proj.weight'.*fewer numbers.*contiguous"):
        skhead.load_heads(path)


# No time either


def test_many_layers_take_no_time_out_of_proportion(monkeypatch, tmp_path):
    """Names are searched as often for many layers as for few."""
    shapes = {"W_Q": (1, 2, 1), "W_K": (1, 2, 1), "W_V": (1, 2, 1), "W_O": (1, 1, 2)}
    searched = []
    search = lens._matching
    monkeypatch.setattr(lens, "_matching", lambda *given: searched.append(given) or search(*given))
    counts = []
    for n_layers in (2, 40):
        tensors = {
            f"blocks.{layer}.attn.{name}": torch.ones(shape)
            for layer in range(n_layers)
            for name, shape in shapes.items()
        }
        save_file(tensors, tmp_path / "model.safetensors")
        searched.clear()
        assert len(skhead.load_heads(tmp_path)) == n_layers
        counts.append(len(searched))
    assert counts[0] == counts[1] > 0


# What SECURITY.md says


def test_every_claim_names_a_test_that_exists():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)
    claims = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert all("::test_" in line for line in claims[1:])
