"""Seconds and memory of a grid search over head classes, with kernels shared and not.

``python benchmarks/grid_search.py MODEL`` takes a directory of GPT-2 small and runs the search of
``examples/gpt2_head_classes.py`` twice in two processes: 64 candidates, 3 folds and a refit. With
a memory, `WholeModelSimilarity` computes 16 kernels; without, one for every fit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
from measuring import ROOT, Benchmark, cpu_seconds
from sklearn.base import clone

import skhead
from skhead.metrics import MacroAveragePrecision

sys.path.append(str(ROOT / "examples"))
import gpt2_head_classes as example


class PeakMemory:
    """Largest sum of the resident memory of this process and its children, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.peak = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._done.wait(0.1):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)


def search(source: str, memory: str | None, n_jobs: int) -> tuple[float, float, float]:
    """Seconds, peak bytes and best score of one search."""
    heads = skhead.load_heads(source)
    y = example.load_classes("wang2022", heads)
    counts = y[y != "None"].value_counts()
    scorer = MacroAveragePrecision(classes=tuple(counts.index[counts >= 3]))
    with PeakMemory() as watched:
        started = time.perf_counter()
        found = example.search(scorer, memory, 0, n_jobs).fit(heads, y)
        seconds = time.perf_counter() - started
    return seconds, watched.peak, found.best_score_


class GridSearch(Benchmark):
    """The example's pipeline at two settings and four folds, heads of the bundled model."""

    n_folds = 4
    tiny: ClassVar = {"n_folds": 2}

    def setup(self) -> None:
        self.heads = skhead.load_heads("skhead/induction-2l")
        self.y = np.where(np.arange(len(self.heads)) // 2 % 2, "odd", "even")

    def track_speedup_by_shared_kernels(self) -> float:
        """Processor time of all fits with every kernel for itself, over that with a memory."""

        def fits(memory: str | None) -> None:
            for aggregate in ("mean", "max"):
                pipeline = example.make_pipeline(memory).set_params(classes__aggregate=aggregate)
                for fold in range(self.n_folds):
                    kept = np.arange(len(self.heads)) % self.n_folds != fold
                    clone(pipeline).fit(self.heads[kept], self.y[kept])

        def shared() -> None:
            with tempfile.TemporaryDirectory() as memory:
                fits(memory)

        return cpu_seconds(lambda: fits(None), 1) / cpu_seconds(shared, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--n-jobs", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        shared = search(options.source, directory, options.n_jobs)
        kernels = len(list(Path(directory).rglob("output.pkl")))
    apart = search(options.source, None, options.n_jobs)
    for name, (seconds, peak, score) in (("shared kernels", shared), ("kernels apart", apart)):
        print(f"{name}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, best score {score:.4f}")
    print(f"kernels computed: {kernels}; ratio {apart[0] / shared[0]:.1f}")


if __name__ == "__main__":
    main()
