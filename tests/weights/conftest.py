"""Small checkpoints written tensor by tensor, without any modelling library."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import skhead

N_LAYERS, N_HEADS, N_KV, D_MODEL, D_HEAD = 3, 4, 2, 24, 8
LLAMA_CONFIG = {
    "model_type": "llama",
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV,
    "head_dim": D_HEAD,
}


@pytest.fixture
def llama_config() -> dict[str, Any]:
    return dict(LLAMA_CONFIG)


@pytest.fixture
def llama_tensors() -> dict[str, torch.Tensor]:
    """Attention and norms of a Llama-like model with 3 layers, 4 heads, 2 key-value heads."""
    generator = torch.Generator().manual_seed(0)
    widths = {"q": N_HEADS, "k": N_KV, "v": N_KV}
    tensors = {"model.embed_tokens.weight": torch.randn(11, D_MODEL, generator=generator)}
    for layer in range(N_LAYERS):
        root = f"model.layers.{layer}."
        for name, count in widths.items():
            shape = (count * D_HEAD, D_MODEL)
            tensors[f"{root}self_attn.{name}_proj.weight"] = torch.randn(shape, generator=generator)
        shape = (D_MODEL, N_HEADS * D_HEAD)
        tensors[f"{root}self_attn.o_proj.weight"] = torch.randn(shape, generator=generator)
        tensors[f"{root}input_layernorm.weight"] = torch.randn(D_MODEL, generator=generator)
    return tensors


@pytest.fixture
def lens_tensors() -> dict[str, torch.Tensor]:
    """Two blocks under TransformerLens' names: 4 heads, 2 key-value heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "W_Q": (N_HEADS, D_MODEL, D_HEAD),
        "_W_K": (N_KV, D_MODEL, D_HEAD),
        "_W_V": (N_KV, D_MODEL, D_HEAD),
        "W_O": (N_HEADS, D_HEAD, D_MODEL),
    }
    return {
        f"blocks.{layer}.attn.{name}": torch.randn(shape, generator=generator)
        for layer in range(2)
        for name, shape in shapes.items()
    }


Writer = Callable[..., Path]


@pytest.fixture
def write_model(tmp_path: Path) -> Writer:
    """Write a directory with one safetensors file and a configuration; return its path."""

    def write(
        tensors: dict[str, torch.Tensor],
        config: dict[str, Any] | None,
        name: str = "model",
        file: str = "model.safetensors",
    ) -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, path / file)
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        return path

    return write


@pytest.fixture
def write_sharded(tmp_path: Path) -> Writer:
    """Write a directory with one shard per layer, one for the rest, and an index."""

    def write(
        tensors: dict[str, torch.Tensor], config: dict[str, Any], name: str = "sharded"
    ) -> Path:
        path = tmp_path / name
        path.mkdir()
        shards: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            number = key.split(".")[2] if ".layers." in key else "rest"
            shards.setdefault(f"model-{number}.safetensors", {})[key] = value.contiguous()
        for file, content in shards.items():
            save_file(content, path / file)
        weight_map = {key: file for file, content in shards.items() for key in content}
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        (path / "config.json").write_text(json.dumps(config))
        return path

    return write


@pytest.fixture
def edit_header() -> Callable[..., None]:
    """Rewrite the header of a safetensors file; the data stays as it is."""

    def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        changed = change(header)
        text = json.dumps(header if changed is None else changed).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return edit


@pytest.fixture
def live() -> Iterator[Callable[..., str]]:
    """Register models, and forget them after the test."""
    names: list[str] = []

    def register(module: Any, name: str = "live-model") -> str:
        skhead.register_model(module, name)
        names.append(name)
        return name

    yield register
    for name in dict.fromkeys(names):
        skhead.unregister_model(name)
