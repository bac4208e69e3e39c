"""Products of all pairs of heads, and the search for the largest."""

from __future__ import annotations

from itertools import product
from typing import ClassVar

import numpy as np
import torch
from measuring import (
    Benchmark,
    cpu_ratio,
    cpu_seconds,
    peak_growth,
    plain_gemm_rate,
    random_stack,
)

from skhead.linalg.bases import orthonormal_bases
from skhead.linalg.factored import map_factors
from skhead.linalg.kernels import overlap_blocks, plan_overlaps
from skhead.linalg.precision import fast_float32_matmul
from skhead.linalg.topk import largest_entries


class Overlaps(Benchmark):
    """All pairs of the heads of GPT-2 small, and of half of GPT-2 xl's."""

    small, large = (144, 768, 64), (600, 1600, 64)
    gemm_size = 2048
    tiny: ClassVar = {"small": (6, 48, 6), "large": (8, 48, 6), "gemm_size": 64}

    def setup(self) -> None:
        self.roles = [random_stack(*self.small, seed) for seed in range(4)]
        self.pair = [random_stack(*self.large, seed) for seed in range(2)]

    def track_speedup_over_cross_gram_small(self) -> float:
        """OQ, OK and OV of GPT-2 small against the tiled cross-Gram by the same GEMM."""
        blocks = [(0, 1), (0, 2), (0, 3)]
        return cpu_ratio(
            lambda: overlap_blocks(self.roles, None, blocks, method="direct"),
            lambda: overlap_blocks(self.roles, None, blocks, method="packed"),
        )

    def track_share_of_plain_product(self) -> float:
        """Half of GPT-2 xl: flops of the plan, over a plain GEMM's rate."""
        return self._rate("auto") / plain_gemm_rate(self.gemm_size)

    def track_share_in_direct_flops(self) -> float:
        """The same in flops that the cross-Gram would need."""
        return self._rate("direct") / plain_gemm_rate(self.gemm_size)

    def _rate(self, counted: str) -> float:
        flops = plan_overlaps(self.pair, None, [(0, 1)], 2**30, counted).flops
        return flops / cpu_seconds(lambda: overlap_blocks(self.pair, None, [(0, 1)]), 1)

    def track_sixteen_kinds_over_one(self) -> float:
        """Cost of all role pairs with bases, in units of one pair kind with bases."""

        def work(roles: list[int], blocks: list[tuple[int, int]]) -> None:
            bases = [orthonormal_bases(self.roles[role]).vectors for role in roles]
            overlap_blocks(bases, None, blocks)

        every = list(product(range(4), repeat=2))
        return cpu_ratio(lambda: work([0, 1, 2, 3], every), lambda: work([0, 1], [(0, 1)]))

    def track_peak_scratch_over_budget(self) -> float:
        """Memory that half of GPT-2 xl takes beyond its inputs and result, over 256 MiB allowed."""
        budget, blocks = 2**28, [(0, 1)]
        overlap_blocks([stack[:3] for stack in self.pair], None, blocks)
        grown, found = peak_growth(
            lambda: overlap_blocks(self.pair, None, blocks, max_memory=budget)
        )
        return (grown - 4 * found[0, 1].numel()) / budget


class Composition(Benchmark):
    """Factors and overlaps of the three composition scores."""

    layers, heads, d_model, d_head = 12, 12, 768, 64
    tiny: ClassVar = {"layers": 2, "heads": 2, "d_model": 24, "d_head": 4}

    def setup(self) -> None:
        shape = self.layers * self.heads, self.d_model, self.d_head
        self.roles = {role: random_stack(*shape, i) for i, role in enumerate("QKVO")}

    def track_speedup_over_blocked_maps(self) -> float:
        """Against the cross-Gram of reduced maps by layer pairs, for K-composition."""
        q, k, v, o = (self.roles[role] for role in "QKVO")
        layers, heads, d_model, d_head = self.layers, self.heads, self.d_model, self.d_head
        width = heads * d_head

        def blocked() -> None:
            left = map_factors(o, v)[0].mT.reshape(layers, width, d_model)
            right = map_factors(k, q)[0].permute(1, 0, 2).reshape(d_model, layers, width)
            with fast_float32_matmul(left.device):
                for source, target in product(range(layers), repeat=2):
                    cross = left[source] @ right[:, target]
                    cross.square_().view(heads, d_head, heads, d_head).sum(3).sum(1)

        def ours() -> None:
            overlap_blocks([map_factors(o, v)[0]], [map_factors(k, q)[0]], [(0, 0)])

        return cpu_ratio(blocked, ours)


class TopPairs(Benchmark):
    """The twenty largest of 5120 x 5120 scores."""

    size = 5120
    tiny: ClassVar = {"size": 40}

    def setup(self) -> None:
        shape = self.size, self.size
        self.values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def track_speedup_over_flat_topk(self) -> float:
        tensor = torch.from_numpy(self.values)
        return cpu_ratio(
            lambda: tensor.flatten().topk(20), lambda: largest_entries(self.values, 20)
        )
