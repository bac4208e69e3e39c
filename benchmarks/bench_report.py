"""The whole report of a model, in plain products of two 2048 x 2048 matrices."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import ClassVar

from measuring import ROOT, Benchmark, cpu_seconds, plain_gemm_rate

from skhead.report import write_report

SIDE = 2048


def models_folder() -> Path:
    """Where real weights lie, if they do."""
    return Path(os.environ.get("SKHEAD_MODELS", ROOT.parent / "shared" / "models"))


class Report(Benchmark):
    """From weights to the page."""

    repeats = 2
    gemm_size = SIDE
    tiny: ClassVar = {"repeats": 1, "gemm_size": 64}

    def track_bundled_model(self) -> float:
        return self._cost("skhead/induction-2l")

    def track_gpt2_small(self) -> float:
        source = models_folder() / "gpt2-small-attention"
        if not source.is_dir():
            raise NotImplementedError("real weights not found: set SKHEAD_MODELS")
        return self._cost(str(source))

    def _cost(self, source: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            seconds = cpu_seconds(lambda: write_report(source, folder), self.repeats)
        return seconds * plain_gemm_rate(self.gemm_size) / (2 * SIDE**3)
