"""The hot paths as ratios against a plain matrix product or the obvious algorithm, in one run.

Each ``track_`` method returns a ratio of processor times, so that the figures of different machines
can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skhead.linalg.bases import orthonormal_bases
from skhead.linalg.factored import map_factors
from skhead.linalg.kernels import overlap_blocks, plan_overlaps
from skhead.linalg.precision import fast_float32_matmul
from skhead.linalg.topk import largest_entries


def cpu_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Least processor time of several calls, after one to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def random_stack(n_heads: int, d_model: int, d_head: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_heads, d_model, d_head, generator=generator)


class Bases:
    """Bases of GPT-2 small's 144 heads of one role."""

    unit = "ratio"

    def setup(self) -> None:
        self.stack = random_stack(144, 768, 64)

    def track_speedup_over_svd(self) -> float:
        """Against torch's float32 SVD, head by head."""

        def svd() -> None:
            for matrix in self.stack:
                torch.linalg.svd(matrix, full_matrices=False)

        return cpu_seconds(svd, 3) / cpu_seconds(lambda: orthonormal_bases(self.stack))


class Overlaps:
    """All pairs of heads."""

    unit = "ratio"

    def setup(self) -> None:
        self.small = [random_stack(144, 768, 64, seed) for seed in range(4)]
        self.large = [random_stack(600, 1600, 64, seed) for seed in range(2)]

    def track_speedup_over_cross_gram_small(self) -> float:
        """OQ, OK and OV of GPT-2 small against the tiled cross-Gram by the same GEMM."""
        blocks = [(0, 1), (0, 2), (0, 3)]
        packed, direct = (
            cpu_seconds(lambda m=m: overlap_blocks(self.small, None, blocks, method=m), 3)  # type: ignore[misc]
            for m in ("packed", "direct")
        )
        return direct / packed

    def track_throughput_in_direct_flops(self) -> float:
        """Half of GPT-2 xl: flops that the cross-Gram would need, over a plain GEMM's rate."""
        stacks, blocks = self.large, [(0, 1)]
        flops = plan_overlaps(stacks, None, blocks, 2**30, "direct").flops
        seconds = cpu_seconds(lambda: overlap_blocks(stacks, None, blocks), 1)
        return flops / seconds / plain_gemm_rate()

    def track_sixteen_kinds_over_one(self) -> float:
        """Cost of all role pairs with bases, in units of one pair kind with bases."""

        def cost(roles: list[int], blocks: list[tuple[int, int]]) -> float:
            def work() -> None:
                bases = [orthonormal_bases(self.small[role]).vectors for role in roles]
                overlap_blocks(bases, None, blocks)

            return cpu_seconds(work, 3)

        return cost([0, 1, 2, 3], list(product(range(4), repeat=2))) / cost([0, 1], [(0, 1)])

    def track_peak_scratch_over_budget(self) -> float:
        """Memory that half of GPT-2 xl takes beyond its inputs and result, over 256 MiB allowed."""
        budget, blocks = 2**28, [(0, 1)]
        overlap_blocks([stack[:3] for stack in self.large], None, blocks)
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        found = overlap_blocks(self.large, None, blocks, max_memory=budget)
        return (resident_bytes("VmHWM") - before - 4 * found[0, 1].numel()) / budget


class Composition:
    """Factors and overlaps of the three composition scores."""

    unit = "ratio"

    def setup(self) -> None:
        self.roles = {role: random_stack(144, 768, 64, i) for i, role in enumerate("QKVO")}

    def track_speedup_over_blocked_maps(self) -> float:
        """Against the cross-Gram of reduced maps by layer pairs, for K-composition."""
        q, k, v, o = (self.roles[role] for role in "QKVO")

        def blocked() -> None:
            left = map_factors(o, v)[0].mT.reshape(12, 768, 768)
            right = map_factors(k, q)[0].permute(1, 0, 2).reshape(768, 12, 768)
            with fast_float32_matmul(left.device):
                for source in range(12):
                    for target in range(12):
                        cross = left[source] @ right[:, target]
                        cross.square_().view(12, 64, 12, 64).sum(3).sum(1)

        def ours() -> None:
            overlap_blocks([map_factors(o, v)[0]], [map_factors(k, q)[0]], [(0, 0)])

        return cpu_seconds(blocked, 3) / cpu_seconds(ours, 3)


class TopPairs:
    """The twenty largest of 5120 x 5120 scores."""

    unit = "ratio"

    def setup(self) -> None:
        self.values = np.random.default_rng(0).standard_normal((5120, 5120)).astype(np.float32)

    def track_speedup_over_flat_topk(self) -> float:
        tensor = torch.from_numpy(self.values)
        flat = cpu_seconds(lambda: tensor.flatten().topk(20), 3)
        return flat / cpu_seconds(lambda: largest_entries(self.values, 20), 3)


def resident_bytes(key: str) -> int:
    """Resident memory of this process as Linux states it: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not state {key}")


def plain_gemm_rate() -> float:
    """Flops per processor second of a 2048 product under the setting that the kernels use."""
    a, b = torch.randn(2, 2048, 2048)
    with fast_float32_matmul(a.device):
        return 2 * 2048**3 / cpu_seconds(lambda: a @ b, 3)


def main() -> None:
    """Run every tracked ratio and print it."""
    for cls in (Bases, Overlaps, Composition, TopPairs):
        suite = cls()
        suite.setup()
        for name in sorted(vars(cls)):
            if name.startswith("track_"):
                print(
                    f"{cls.__name__}.{name.removeprefix('track_'):36} {getattr(suite, name)():8.2f}"
                )


if __name__ == "__main__":
    main()
