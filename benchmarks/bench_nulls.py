"""Laws of chance: draws, tails and moments, against drawing the subspaces or the plain product."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from measuring import Benchmark, cpu_ratio, cpu_seconds, random_stack

from skhead.linalg.bases import orthonormal_bases
from skhead.linalg.kernels import overlap_blocks
from skhead.stats import haar_logsf, haar_sample, permutation_test, signflip_moments


class HaarLaw(Benchmark):
    """Two subspaces of rank 64 in 768 dimensions, as in GPT-2 small."""

    rank, d_model = 64, 768
    n_qr, n_draws, n_values = 50, 100_000, 1_000_000
    tiny: ClassVar = {"n_qr": 2, "n_draws": 2000, "n_values": 2000}

    def setup(self) -> None:
        self.generator = np.random.default_rng(0)

    def draw(self) -> Any:
        return haar_sample(self.rank, self.rank, self.d_model, self.n_draws, self.generator)

    def track_speedup_over_two_qrs(self) -> float:
        """Time a draw takes by two QR decompositions, in draws of the sampler."""

        def subspaces() -> None:
            for _ in range(self.n_qr):
                shape = 2, self.d_model, self.rank
                gaussians = self.generator.standard_normal(shape)
                one, other = (np.linalg.qr(gaussian)[0] for gaussian in gaussians)
                np.square(one.T @ other).sum()

        return cpu_ratio(subspaces, self.draw) * self.n_draws / self.n_qr

    def track_log_tails_over_draws(self) -> float:
        """Time of one log tail probability, in draws."""
        values = np.linspace(4, 40, self.n_values)
        tails = cpu_seconds(lambda: haar_logsf(values, self.rank, self.rank, self.d_model), 3)
        return tails / self.n_values / (cpu_seconds(self.draw, 3) / self.n_draws)


class SignFlip(Benchmark):
    """Moments under random sign flips of the pairs of GPT-2 small's heads of two roles."""

    shape = 144, 768, 64
    tiny: ClassVar = {"shape": (4, 48, 6)}

    def setup(self) -> None:
        self.bases = [
            orthonormal_bases(random_stack(*self.shape, seed)).vectors for seed in range(2)
        ]

    def track_cost_over_kernel(self) -> float:
        """In units of the kernel of the same pairs."""
        return cpu_ratio(
            lambda: signflip_moments(*self.bases),
            lambda: overlap_blocks(self.bases, None, [(0, 1)]),
        )


class Permutation(Benchmark):
    """A permutation test of the mean of some edges of a table of 144 heads."""

    layers, heads, n_permutations = 12, 12, 999
    tiny: ClassVar = {"layers": 3, "heads": 3, "n_permutations": 19}

    def setup(self) -> None:
        n_heads = self.layers * self.heads
        self.layer = np.repeat(np.arange(self.layers), self.heads)
        self.values = np.random.default_rng(0).standard_normal((n_heads, n_heads))
        self.values[self.layer[:, None] >= self.layer[None, :]] = np.nan

    def track_cost_over_plain_shuffle(self) -> float:
        """In units of one shuffle of the whole table by numpy for every permutation."""
        generator = np.random.default_rng(0)

        def shuffles() -> None:
            for _ in range(self.n_permutations):
                generator.permutation(self.values.ravel())

        def test() -> None:
            permutation_test(
                lambda table: table[0, -3:].mean(),
                self.values,
                self.layer,
                self.layer,
                n_permutations=self.n_permutations,
                random_state=0,
            )

        return cpu_ratio(test, shuffles)
