"""Bases that lie in files, against bases in memory."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from measuring import ROOT, Benchmark, cpu_ratio, peak_growth

import skhead


class Streaming(Benchmark):
    """A model of grouped queries whose bases take five times the memory allowed."""

    layers, heads, kv_heads, d_model, d_head = 8, 32, 8, 1024, 64
    budget = 2**25
    tiny: ClassVar = {
        "layers": 2, "heads": 4, "kv_heads": 2, "d_model": 48, "d_head": 6, "budget": 2**20,
    }  # fmt: skip

    def setup(self) -> None:
        sys.path.append(str(ROOT / "scripts"))
        from make_shaped_checkpoint import Shape, write_checkpoint

        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        sizes = self.heads, self.kv_heads, self.d_model, self.d_head
        shape = Shape(self.layers, *sizes, 4 * self.d_model, 100)
        write_checkpoint(folder / "model", shape, self.layers, torch.float32)
        self.table = skhead.load_heads(folder / "model")
        self.stored = self.extract(self.filled())

    def teardown(self) -> None:
        self._folder.cleanup()

    def filled(self) -> str:
        """A directory that holds all bases."""
        cache = str(Path(self._folder.name) / "cache")
        self.extract(cache)
        return cache

    def fresh(self) -> str:
        return tempfile.mkdtemp(dir=self._folder.name)

    def extract(self, cache: str | None) -> skhead.Subspaces:
        extractor = skhead.SubspaceExtractor(cache=cache, max_memory=self.budget)
        return extractor.fit_transform(self.table)

    def compare(self, subspaces: skhead.Subspaces) -> skhead.Similarity:
        return skhead.ProjectionKernel(max_memory=self.budget).fit_transform(subspaces)

    def track_extraction_over_in_memory(self) -> float:
        """Bases computed and written, in units of bases computed and kept."""
        return cpu_ratio(lambda: self.extract(self.fresh()), lambda: self.extract(None))

    def track_resumed_over_in_memory(self) -> float:
        """Bases found in files, in units of bases computed."""
        return cpu_ratio(lambda: self.extract(self.filled()), lambda: self.extract(None))

    def track_kernel_over_in_memory(self) -> float:
        """The kernel of bases in files, in units of that of bases in memory."""
        kept = self.extract(None)
        return cpu_ratio(lambda: self.compare(self.stored), lambda: self.compare(kept))

    def track_peak_extraction_over_budget(self) -> float:
        return self._peak(lambda: self.extract(self.fresh()), lambda _: 0)

    def track_peak_kernel_over_budget(self) -> float:
        """Without the result and the copy of it that is being made."""
        return self._peak(lambda: self.compare(self.stored), lambda found: 2 * found.values.nbytes)

    def _peak(self, work: Callable[[], Any], kept: Callable[[Any], int]) -> float:
        grown, result = peak_growth(work)
        return (grown - kept(result)) / self.budget
