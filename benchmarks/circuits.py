"""Seconds of the circuit scores of a GPT-2-sized model with its whole vocabulary, group by group.

``python benchmarks/circuits.py`` times random weights of GPT-2 small: 12 layers of 12 heads,
d_model 768, 50,257 tokens at either end. ``--flops`` prints what a model needs without running it.
"""

from __future__ import annotations

import argparse
import time
from typing import ClassVar

import pandas as pd
import torch
from measuring import Benchmark, plain_gemm_rate

import skhead
from skhead.circuits import CircuitScorer

GROUPS = ("maps", "tokens", "positions", "composition", "induction")
#: Layers, heads a layer, d_model, d_head, tokens.
Sizes = tuple[int, int, int, int, int]
SHAPES: dict[str, Sizes] = {
    "GPT-2 small": (12, 12, 768, 64, 50_257),
    "GPT-2 xl": (48, 25, 1600, 64, 50_257),
    "7B": (32, 32, 4096, 128, 32_000),
}


def random_model(sizes: Sizes) -> dict[str, torch.Tensor]:
    """Untied random weights under TransformerLens' names."""
    n_layers, n_heads, d_model, d_head, n_vocab = sizes
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(n_layers):
        for role in ("W_Q", "W_K", "W_V", "W_O"):
            size = (d_head, d_model) if role == "W_O" else (d_model, d_head)
            tensors[f"blocks.{layer}.attn.{role}"] = torch.randn(
                n_heads, *size, generator=generator
            )
    tensors["embed.W_E"] = torch.randn(n_vocab, d_model, generator=generator)
    tensors["unembed.W_U"] = torch.randn(d_model, n_vocab, generator=generator)
    tensors["pos_embed.W_pos"] = torch.randn(1024, d_model, generator=generator)
    return tensors


def seconds(heads: pd.DataFrame, scores: str) -> tuple[float, float]:
    """Wall-clock and processor seconds of one group, or of all."""
    wall, processor = time.perf_counter(), time.process_time()
    CircuitScorer(scores).fit_transform(heads)
    return time.perf_counter() - wall, time.process_time() - processor


def flops(sizes: Sizes) -> dict[str, float]:
    """Leading terms of the floating-point operations of each group."""
    n_layers, n_heads, d, r, n_vocab = sizes
    n = n_layers * n_heads
    pairs = n * n / 2
    return {
        "maps": n * 24 * d * r**2,
        "tokens, sums over the vocabulary": 3 * 2 * n_vocab * d**2,
        "tokens, heads": n * 8 * d**2 * r,
        "composition, all layers at once": 4 * n * d**2 * r + 3 * pairs * d**2,
        "induction, screen of all layers at once": n * 4 * d**2 * r + 2 * pairs * 2 * d**2,
        "induction, candidates": n * 16 * (4 * d * r**2 + 25 * r**3),
    }


class Circuits(Benchmark):
    """All scores of a model of the shape of GPT-2 small."""

    sizes = SHAPES["GPT-2 small"]
    gemm_size = 2048
    tiny: ClassVar = {"sizes": (2, 2, 24, 4, 60), "gemm_size": 64}

    def setup(self) -> None:
        self.name = skhead.register_model(random_model(self.sizes), "benchmark-circuits")
        self.heads = skhead.load_heads(self.name)

    def teardown(self) -> None:
        skhead.unregister_model(self.name)

    def track_share_of_plain_product(self) -> float:
        """Leading flops of all groups over the processor time of all, over a GEMM's rate."""
        seconds(self.heads.iloc[:2], "all")
        _, processor = seconds(self.heads, "all")
        return sum(flops(self.sizes).values()) / processor / plain_gemm_rate(self.gemm_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flops", action="store_true", help="print flops of all shapes and leave")
    if parser.parse_args().flops:
        print(
            pd.DataFrame({s: flops(n) for s, n in SHAPES.items()}).map(
                lambda x: f"{x / 1e9:,.0f} GFLOP"
            )
        )
        return
    name = skhead.register_model(random_model(SHAPES["GPT-2 small"]), "benchmark")
    heads = skhead.load_heads(name)
    seconds(skhead.load_heads("skhead/induction-2l"), "all")
    for scores in (*GROUPS, "all"):
        wall, processor = seconds(heads, scores)
        print(f"{scores:12} {wall:6.1f} s  ({processor:.1f} s of processor)", flush=True)


if __name__ == "__main__":
    main()
