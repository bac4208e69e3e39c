"""Orthonormal bases of heads."""

from __future__ import annotations

from typing import ClassVar

import torch
from measuring import Benchmark, cpu_ratio, cpu_seconds, plain_gemm_rate, random_stack

from skhead.linalg.bases import orthonormal_bases


class Bases(Benchmark):
    """Bases of GPT-2 small's 144 heads of one role."""

    shape = 144, 768, 64
    gemm_size = 2048
    tiny: ClassVar = {"shape": (4, 48, 6), "gemm_size": 64}

    def setup(self) -> None:
        self.stack = random_stack(*self.shape)

    def track_speedup_over_svd(self) -> float:
        """Against torch's float32 SVD, head by head, as the peer does it."""

        def svd() -> None:
            for matrix in self.stack:
                torch.linalg.svd(matrix, full_matrices=False)

        return cpu_ratio(svd, lambda: orthonormal_bases(self.stack))

    def track_share_of_plain_product(self) -> float:
        """Rate of the two float64 products a head needs, decomposition included, over a GEMM's."""
        n_heads, d_model, d_head = self.shape
        seconds = cpu_seconds(lambda: orthonormal_bases(self.stack), 3)
        rate = 4 * n_heads * d_model * d_head**2 / seconds
        return rate / plain_gemm_rate(self.gemm_size, torch.float64)
