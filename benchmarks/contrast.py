"""Throughput and memory of ContrastiveQKDecomposer beside plain matrix products.

``python benchmarks/contrast.py`` fits a stream of a million pairs at d_head 128, every key with a
query of its own, and prints the seconds of processor beside those of the two products
``queries.T @ keys`` of the same rows, in the same run, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from measuring import Benchmark, cpu_ratio, peak_bytes

from skhead import ContrastiveQKDecomposer, QKPairs

D_HEAD = 128
CHUNK = 125_000


def chunk(n_pairs: int, d_head: int, seed: int) -> QKPairs:
    """Random pairs of which half agree, along one direction."""
    rng = np.random.default_rng(seed)
    queries, keys = (rng.standard_normal((n_pairs, d_head), dtype=np.float32) for _ in range(2))
    agree = rng.integers(0, 2, n_pairs, dtype=np.int8)
    keys[:, 0] += agree * queries[:, 0]
    return QKPairs(queries, keys, np.arange(n_pairs), np.ones(n_pairs, dtype=np.int8), agree)


class Contrast(Benchmark):
    """Sums of second moments of 125,000 pairs at d_head 128."""

    n_pairs, d_head = CHUNK, D_HEAD
    tiny: ClassVar = {"n_pairs": 200, "d_head": 8}

    def setup(self) -> None:
        self.pairs = chunk(self.n_pairs, self.d_head, 0)
        self.queries, self.keys = (
            torch.from_numpy(values) for values in (self.pairs.queries, self.pairs.keys)
        )

    def track_share_of_plain_product(self) -> float:
        """Rate of the whole fit, SVD included, over that of one product of all rows."""
        return self._share(ContrastiveQKDecomposer())

    def track_share_of_plain_products_whitened(self) -> float:
        """The same with both second moments, against three products."""
        return 3 * self._share(ContrastiveQKDecomposer(whiten="qk"))

    def _share(self, decomposer: ContrastiveQKDecomposer) -> float:
        return cpu_ratio(lambda: self.queries.T @ self.keys, lambda: decomposer.fit(self.pairs))


def chunks(n_pairs: int) -> Iterator[QKPairs]:
    for seed, start in enumerate(range(0, n_pairs, CHUNK)):
        yield chunk(min(CHUNK, n_pairs - start), D_HEAD, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    arguments = parser.parse_args()
    # Once per process, the first fit probes which matrix product is fast.
    ContrastiveQKDecomposer().fit(chunk(1000, D_HEAD, 0))
    decomposer = ContrastiveQKDecomposer()
    seconds = {"own": 0.0, "plain": 0.0}
    for number, pairs in enumerate(chunks(arguments.pairs)):
        queries, keys = (torch.from_numpy(values) for values in (pairs.queries, pairs.keys))
        work: dict[str, Callable[[], Any]] = {
            "own": partial(decomposer.partial_fit, pairs),
            "plain": partial(torch.mm, queries.T, keys),
        }
        # The first to read a chunk finds it out of the processor's cache: they take turns.
        for name in sorted(work, reverse=bool(number % 2)):
            start = time.process_time()
            work[name]()
            seconds[name] += time.process_time() - start
    own, plain = seconds["own"], seconds["plain"]
    print(f"{arguments.pairs:,} pairs at d_head {D_HEAD}: rank {decomposer.rank_}")
    print(f"partial_fit      {own:6.2f} s of processor, {plain / own:.2f} of the plain rate")
    print(f"plain product    {plain:6.2f} s of processor")
    print(f"peak memory of the process, chunks included: {peak_bytes() / 2**30:.2f} GiB")
    benchmark = Contrast()
    benchmark.setup()
    for name in ("track_share_of_plain_product", "track_share_of_plain_products_whitened"):
        print(f"{name:40s} {getattr(benchmark, name)():.2f}")


if __name__ == "__main__":
    main()
