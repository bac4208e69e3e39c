"""Shapes of the models that are compared, their checkpoints, and what work on them needs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring import ROOT

KINDS = ("OQ", "OK", "OV")
TASKS = {
    "pk": "projection kernel OQ+OK+OV with bases",
    "cs": "composition scores Q+K+V",
}


@dataclass(frozen=True)
class Shape:
    """Attention of a model; embeddings and MLPs are tiny."""

    family: str
    layers: int
    heads: int
    kv_heads: int
    d_model: int
    d_head: int

    def readers(self, task: str) -> dict[str, int]:
        """Column heads of every pair kind; composition is between query heads."""
        shared = self.layers * (self.heads if task == "cs" else self.kv_heads)
        return {"OQ": self.layers * self.heads, "OK": shared, "OV": shared}

    def direct_flops(self, task: str) -> float:
        """Flops of the cross-Gram of all pairs of heads, by which the peer computes them."""
        pairs = self.layers * self.heads * sum(self.readers(task).values())
        return 2.0 * self.d_model * self.d_head**2 * pairs

    def head_bytes(self) -> int:
        return 4 * self.d_model * self.d_head


SHAPES = {
    "gpt2-small": Shape("gpt2", 12, 12, 12, 768, 64),
    "gpt2-medium": Shape("gpt2", 24, 16, 16, 1024, 64),
    "gpt2-large": Shape("gpt2", 36, 20, 20, 1280, 64),
    "gpt2-xl": Shape("gpt2", 48, 25, 25, 1600, 64),
    "llama-3-8b": Shape("llama", 32, 32, 8, 4096, 128),
}


def shape_named(name: str, layers: int | None) -> Shape:
    shape = SHAPES[name]
    return shape if layers is None else replace(shape, layers=layers)


def bytes_needed(contestant: str, task: str, shape: Shape) -> int:
    """Memory that a contestant holds at once at least, from the sizes of its tensors."""
    n_heads, n_readers = shape.layers * shape.heads, shape.layers * shape.kv_heads
    weights = 2 * (n_heads + n_readers) * shape.head_bytes()
    if contestant == "skhead":
        return weights
    if contestant != "peer":
        return 2 * weights
    if task == "cs":
        # Both factors of every pair, broadcast to the full table of pairs.
        return weights + 2 * n_heads**2 * shape.head_bytes()
    # Bases of both roles, and the target's once more, permuted for the product.
    return weights + 3 * n_heads * shape.head_bytes()


def write_checkpoint(shape: Shape, directory: Path, real: bool) -> str:
    """Save a model of the shape in float32, and say where its weights are from."""
    if shape.family == "llama":
        return _write_llama(shape, directory)
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = GPT2Config(
        vocab_size=128,
        n_positions=64,
        n_inner=64,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.d_model,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    origin = _real_attention(model) if real else "random weights"
    model.save_pretrained(directory)
    return origin


def _real_attention(model: Any) -> str:
    """Put the trained attention of GPT-2 small into a model, where it is found."""
    from safetensors.torch import load_file

    root = Path(os.environ.get("SKHEAD_MODELS", ROOT.parent / "shared" / "models"))
    path = root / "gpt2-small-attention" / "model.safetensors"
    if not path.is_file():
        return "random weights"
    stored = {k: v.float() for k, v in load_file(path).items() if ".attn." in k}
    unknown = model.transformer.load_state_dict(stored, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"unexpected tensors in {path}: {unknown}")
    return "real attention weights"


def _write_llama(shape: Shape, directory: Path) -> str:
    """Attention only, a shard per layer; what else the model has is random when it is loaded."""
    import torch

    sys.path.append(str(ROOT / "scripts"))
    import make_shaped_checkpoint as script

    sizes = shape.heads, shape.kv_heads, shape.d_model, shape.d_head
    whole = script.Shape(shape.layers, *sizes, d_mlp=64, n_vocab=128)
    script.write_checkpoint(directory, whole, shape.layers, torch.float32)
    return "random weights"


def load_bridge(directory: str) -> Any:
    """The peer's model of a checkpoint."""
    import torch
    import transformers
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = json.loads((Path(directory) / "config.json").read_text())
    architecture = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[config["model_type"]]
    model = getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32)
    return build_bridge_from_module(model, architecture, hf_config=model.config)
