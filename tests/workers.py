"""Kernels that misbehave in workers, in a module that worker processes can import."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from skhead import ProjectionKernel


class FatalKernel(ProjectionKernel):
    """Kills the first process that computes one of its tiles, and no other."""

    def __init__(self, flag="", pairs=("OQ", "OK", "OV"), max_memory="1GiB", n_jobs=None):
        super().__init__(pairs=pairs, max_memory=max_memory, n_jobs=n_jobs)
        self.flag = flag

    def _measure_tables(self, rows, columns):
        with suppress(FileExistsError):
            Path(self.flag).touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._measure_tables(rows, columns)


class DeadlyKernel(ProjectionKernel):
    """Kills every process that computes one of its tiles."""

    def _measure_tables(self, rows, columns):
        os.kill(os.getpid(), signal.SIGKILL)


class SlowKernel(FatalKernel):
    """Says which process computes a tile, and takes a minute for it."""

    def _measure_tables(self, rows, columns):
        (Path(self.flag) / str(os.getpid())).touch()
        time.sleep(60)
