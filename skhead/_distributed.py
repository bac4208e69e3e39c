"""Pairs of heads shared out among workers, which are told which heads and read the weights.

The pairs are cut into tiles. A tile is the kernel on fewer heads: what travels to a worker is rows
of the heads table, and what comes back is a block of float32 values. joblib decides where the
workers are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed, effective_n_jobs
from joblib.parallel import get_active_backend
from sklearn.base import clone

from skhead._callers import warn_user
from skhead._compared import Measured
from skhead._tiling import Factors, Tile, Tiling
from skhead.exceptions import MemoryBudgetError
from skhead.weights.live import is_registered

__all__ = ["measure_in_workers", "workers_share"]


def workers_share(sides: Sequence[pd.DataFrame | None], n_jobs: int | None, caller: str) -> bool:
    """Whether there are several workers and all of them can read the heads.

    Parameters
    ----------
    sides : sequence of DataFrame or None
        Heads tables; None for heads that are only in memory.
    n_jobs : int or None
        If it asks for workers that cannot read the heads, a warning says so.
    caller : str
    """
    if effective_n_jobs(n_jobs) == 1:
        return False
    shared_memory = getattr(get_active_backend()[0], "supports_sharedmem", False)
    tables = [heads for heads in sides if heads is not None]
    if len(tables) < len(sides):
        held = "arrays and ready-made Subspaces"
    elif not shared_memory and any(is_registered(s) for t in tables for s in t["source"].unique()):
        held = "live models"
    else:
        return True
    if n_jobs is not None:
        warn_user(
            f"{caller}: n_jobs={n_jobs} has no effect on {held}, which only this process holds; "
            "pass the heads table of a model on disk or on the hub, which workers can read"
        )
    return False


def measure_in_workers(
    kernel: Any,
    rows: pd.DataFrame,
    columns: pd.DataFrame | None,
    factors_of: Callable[[Sequence[str]], Factors],
    max_memory: int,
    progress: Callable[[float], None],
) -> Measured:
    """All pairs of a kernel, computed tile by tile by joblib's workers.

    Parameters
    ----------
    kernel : estimator
        With pairs_, layer_order, max_memory, n_jobs, and ``_measure_tables(rows, columns)``.
    rows, columns : DataFrame
        Heads tables; None for columns that are the rows.
    factors_of : callable
        From pair kinds to what is multiplied for them.
    max_memory : int
        Bytes that a worker may hold, matrices of its heads included.
    progress : callable

    Returns
    -------
    Measured
    """
    tiling = Tiling(rows, columns, kernel.pairs_, kernel.layer_order, factors_of, max_memory)
    tiles = tiling.plan(effective_n_jobs(kernel.n_jobs), type(kernel).__name__)
    tasks = [_Task.of(kernel, tiling, tile, number) for number, tile in enumerate(tiles)]
    total, done = sum(tile.flops for tile in tiles), 0.0
    gathered = _Gathered(tiling)
    try:
        for number, block in _results(tasks, kernel.n_jobs):
            gathered.put(tiles[number], block)
            done += tiles[number].flops
            progress(done / total)
    except MemoryBudgetError as error:
        raise MemoryBudgetError(
            f"{error} (in a worker, beside the matrices of its heads, of max_memory={max_memory} "
            "bytes)"
        ) from None
    except BrokenProcessPool as error:
        raise type(error)(
            f"{type(kernel).__name__}: a worker process died before its heads were compared, most "
            "often for lack of memory, and nothing was returned; lower n_jobs or max_memory, or "
            "use a Dask cluster, which gives the work of a lost worker to another one"
        ) from error
    return gathered.measured()


def _results(tasks: Sequence[_Task], n_jobs: int | None) -> Iterator[tuple[int, Measured]]:
    """What the tasks give, in the order in which they finish where the workers allow it."""
    backend = get_active_backend()[0]
    client = getattr(backend, "client", None)
    if client is None:
        order = "generator_unordered" if backend.supports_return_generator else "list"
        parallel = Parallel(n_jobs=n_jobs, batch_size=1, return_as=order)
        yield from parallel(delayed(task)() for task in tasks)
        return
    # joblib waits for ever for a task of which Dask has given up, as it does when one has killed
    # several workers.
    from distributed import as_completed

    with backend.retrieval_context():
        futures = client.map(_run, tasks, pure=False)
        for _, result in as_completed(futures, with_results=True):
            yield result


def _run(task: _Task) -> tuple[int, Measured]:
    return task()


@dataclass(frozen=True, eq=False)
class _Task:
    """What a worker is sent: the kernel's parameters and rows of heads tables."""

    number: int
    kernel: Any
    rows: pd.DataFrame
    columns: pd.DataFrame | None

    @classmethod
    def of(cls, kernel: Any, tiling: Tiling, tile: Tile, number: int) -> _Task:
        own = clone(kernel).set_params(pairs=tile.pairs, max_memory=tile.max_memory, n_jobs=1)
        if hasattr(own, "set_callbacks"):
            own.set_callbacks()  # workers have nobody to tell
        same = tiling.columns is None and tile.rows is tile.columns
        columns = None if same else tiling.right.iloc[tile.columns]
        return cls(number, own, tiling.rows.iloc[tile.rows], columns)

    def __call__(self) -> tuple[int, Measured]:
        with _one_thread():
            return self.number, self.kernel._measure_tables(self.rows, self.columns)


class _Gathered:
    """Blocks put where they belong, mirrored ones twice."""

    def __init__(self, tiling: Tiling) -> None:
        self._tiling = tiling
        self._blocks: Measured | None = None

    def put(self, tile: Tile, block: Measured) -> None:
        into = self._whole(block)
        pairs = self._tiling.pairs
        for p, pair in enumerate(tile.pairs):
            place = pairs.index(pair)
            values = block.values[:, :, p]
            into.values[:, :, place][np.ix_(tile.rows, tile.columns)] = values
            into.row_facts[tile.rows, place] = block.row_facts[:, p]
            into.column_facts[tile.columns, place] = block.column_facts[:, p]
            if self._tiling.mirrored and tile.rows is not tile.columns and pair[::-1] in pairs:
                mirror = pairs.index(pair[::-1])
                into.values[:, :, mirror][np.ix_(tile.columns, tile.rows)] = values.T

    def _whole(self, block: Measured) -> Measured:
        if self._blocks is None:
            n_rows, n_pairs = len(self._tiling.rows), len(self._tiling.pairs)
            n_columns = len(self._tiling.right)
            self._blocks = Measured(
                np.full((n_rows, n_columns, n_pairs), np.nan, dtype=np.float32),
                np.zeros((n_rows, n_pairs), dtype=block.row_facts.dtype),
                np.zeros((n_columns, n_pairs), dtype=block.column_facts.dtype),
            )
        return self._blocks

    def measured(self) -> Measured:
        assert self._blocks is not None
        return self._blocks


class _ThreadKeeper:
    """How many threads torch had before the first of the tasks that now share this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 1

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            torch.set_num_threads(self._before)


#: torch's number of threads is the process's, so its keeper is too; it holds nothing else.
_KEEPER = _ThreadKeeper()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread, unless the worker's environment says how many."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    _KEEPER.enter()
    try:
        yield
    finally:
        _KEEPER.leave()
