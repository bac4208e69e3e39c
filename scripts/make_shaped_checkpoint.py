"""Write a checkpoint of the shape of a large model, with random weights, one layer at a time.

``python scripts/make_shaped_checkpoint.py 70B DIRECTORY --layers 8`` writes the attention of eight
layers in bfloat16 (2.4 GB), one shard per layer with an index and a configuration, as a model on
the hub has them. ``--ends`` adds the first MLP and the tables of tokens. ``--sparse`` writes files
with holes in place of numbers, which take no room on the disk: enough to list heads and to try out
paths and sizes, while the heads themselves are zero.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of Llama's architecture."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    n_vocab: int


SHAPES = {
    "124M": Shape(12, 12, 12, 768, 64, 3072, 50_257),
    "7B": Shape(32, 32, 32, 4096, 128, 11_008, 32_000),
    "8B": Shape(32, 32, 8, 4096, 128, 14_336, 128_256),
    "70B": Shape(80, 64, 8, 8192, 128, 28_672, 128_256),
    "405B": Shape(126, 128, 8, 16_384, 128, 53_248, 128_256),
}
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_checkpoint(
    folder: Path,
    shape: Shape,
    n_layers: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    ends: bool = False,
    sparse: bool = False,
) -> None:
    """Write some layers of a model, an index and a configuration; a layer is in memory at a time.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    shape : Shape
    n_layers : int
    dtype : torch.dtype, default=torch.bfloat16
    ends : bool, default=False
        Also write the first MLP and the tables of tokens.
    sparse : bool, default=False
        Write zeros that take no room on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, str] = {}
    total = 0
    for layer in range(n_layers):
        sizes = _tensors_of(shape, layer, ends and layer == 0)
        shard = f"model-{layer:05d}.safetensors"
        if sparse:
            _write_holes(folder / shard, sizes, dtype)
        else:
            tensors = {name: _numbers(size, dtype, generator) for name, size in sizes.items()}
            save_file(tensors, folder / shard)
        shards |= dict.fromkeys(sizes, shard)
        total += sum(math.prod(size) for size in sizes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(shape, n_layers)))


def _tensors_of(shape: Shape, layer: int, ends: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a layer by name, with those of the ends of the model."""
    prefix, d_model = f"model.layers.{layer}.", shape.d_model
    queries, keys = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    sizes: dict[str, tuple[int, ...]] = {
        f"{prefix}self_attn.q_proj.weight": (queries, d_model),
        f"{prefix}self_attn.k_proj.weight": (keys, d_model),
        f"{prefix}self_attn.v_proj.weight": (keys, d_model),
        f"{prefix}self_attn.o_proj.weight": (d_model, queries),
        f"{prefix}input_layernorm.weight": (d_model,),
    }
    if ends:
        sizes |= {
            f"{prefix}post_attention_layernorm.weight": (d_model,),
            f"{prefix}mlp.gate_proj.weight": (shape.d_mlp, d_model),
            f"{prefix}mlp.up_proj.weight": (shape.d_mlp, d_model),
            f"{prefix}mlp.down_proj.weight": (d_model, shape.d_mlp),
            "model.embed_tokens.weight": (shape.n_vocab, d_model),
            "model.norm.weight": (d_model,),
            "lm_head.weight": (shape.n_vocab, d_model),
        }
    return sizes


def _numbers(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    return torch.empty(size).normal_(0.0, 0.02, generator=generator).to(dtype)


def _write_holes(path: Path, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    entries, end = {}, 0
    for name, size in sizes.items():
        begin, end = end, end + math.prod(size) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": size, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def _config(shape: Shape, n_layers: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "hidden_size": shape.d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.d_head,
        "intermediate_size": shape.d_mlp,
        "vocab_size": shape.n_vocab,
        "tie_word_embeddings": False,
    }


def main() -> None:
    """Write the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="layers of the model; all of the shape's")
    parser.add_argument("--ends", action="store_true", help="the first MLP and both token tables")
    parser.add_argument("--sparse", action="store_true", help="holes in place of numbers")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    write_checkpoint(
        arguments.directory,
        shape,
        arguments.layers or shape.n_layers,
        ends=arguments.ends,
        sparse=arguments.sparse,
    )


if __name__ == "__main__":
    main()
