"""Draws from the law of the projection kernel against drawing the subspaces, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from skhead.stats import haar_logsf, haar_sample


def cpu_seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Least processor time of several calls, after one to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


class HaarSampling:
    """Two subspaces of rank 64 in 768 dimensions, as in GPT-2 small."""

    unit = "ratio"
    n_qr, n_draws, n_values = 50, 100_000, 1_000_000

    def setup(self) -> None:
        self.generator = np.random.default_rng(0)

    def track_speedup_over_two_qrs(self) -> float:
        """Time a draw takes by two QR decompositions, in draws of the sampler."""

        def subspaces() -> None:
            for _ in range(self.n_qr):
                gaussians = self.generator.standard_normal((2, 768, 64))
                one, other = (np.linalg.qr(gaussian)[0] for gaussian in gaussians)
                np.square(one.T @ other).sum()

        drawn = cpu_seconds(lambda: haar_sample(64, 64, 768, self.n_draws, self.generator))
        return cpu_seconds(subspaces) / self.n_qr / (drawn / self.n_draws)

    def track_log_tails_over_draws(self) -> float:
        """Time of one log tail probability, in draws."""
        values = np.linspace(4, 40, self.n_values)
        tails = cpu_seconds(lambda: haar_logsf(values, 64, 64, 768)) / self.n_values
        drawn = cpu_seconds(lambda: haar_sample(64, 64, 768, self.n_draws, self.generator))
        return tails / (drawn / self.n_draws)


def main() -> None:
    """Run every tracked ratio and print it."""
    suite = HaarSampling()
    suite.setup()
    for name in sorted(vars(HaarSampling)):
        if name.startswith("track_"):
            print(f"HaarSampling.{name.removeprefix('track_'):28} {getattr(suite, name)():8.3f}")


if __name__ == "__main__":
    main()
