"""Bases of the heads of a checkpoint, computed layer by layer and kept in files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._devices import halved, reason_if_full
from skhead.exceptions import CheckpointError, DegenerateHeadError, MemoryBudgetError
from skhead.linalg.bases import orthonormal_bases
from skhead.weights.basis_store import FORMAT, BasisFile, BasisStack, BasisStore, BasisWriter
from skhead.weights.readers import torch_dtype
from skhead.weights.stacks import LayerJob, Processing, Route, places_of, read_layer, role_jobs
from skhead.weights.transfers import Transfers, transfers_to

__all__ = ["BasisRequest", "CachedBases", "cached_bases"]

#: Heads, in float64, that finding the bases of a block of heads takes.
_WORK_HEADS = 24


@dataclass(frozen=True)
class CachedBases:
    """The distinct bases of one role, in files, and which row of the table uses which.

    Attributes
    ----------
    stack : BasisStack of shape (n_distinct, d_model, max_rank)
    ranks : numpy.ndarray of shape (n_distinct,)
        int64.
    index : numpy.ndarray of shape (n_heads,)
        int64.
    """

    stack: BasisStack
    ranks: NDArray[np.int64]
    index: NDArray[np.int64]


@dataclass(frozen=True)
class BasisRequest:
    """Which bases are wanted, and what computing them may take.

    Attributes
    ----------
    processing : Processing
        Role, and how its matrices are processed.
    rank : int, float or None
        As for `orthonormal_bases`.
    device : torch.device
        Where to compute, and where bases are put when they are read.
    max_memory : int
        Bytes that a layer may take at a time; its heads are taken in groups that keep to it.
    caller : str
        Estimator to name in errors.
    """

    processing: Processing
    rank: int | float | None
    device: torch.device
    max_memory: int
    caller: str

    @cached_property
    def transfers(self) -> Transfers | None:
        """The way to the device, the same for all layers."""
        return transfers_to(self.device)


def cached_bases(
    heads: pd.DataFrame,
    request: BasisRequest,
    cache: str | os.PathLike[str],
    progress: Callable[[float], None],
) -> CachedBases:
    """Bases of one role of heads, as files in a directory; those that are there are not computed.

    Files hold all heads of a layer, whichever of them the table lists, so that any part of a model
    finds them again.

    Parameters
    ----------
    heads : pandas.DataFrame
    request : BasisRequest
    cache : path-like
    progress : callable
        Called with the fraction done.

    Returns
    -------
    CachedBases

    Raises
    ------
    CacheError
        If the directory cannot be written.
    MemoryBudgetError
        If a single head does not fit.
    DegenerateHeadError
        If a head that the table lists holds NaN or infinite values.
    """
    jobs = role_jobs(heads, request.processing)
    places, index = places_of(jobs)
    store = BasisStore(Path(cache).expanduser().absolute(), request.caller)
    files: dict[Path, tuple[int, BasisFile]] = {}
    members = np.empty((len(places), 2), dtype=np.int64)
    for done, job in enumerate(jobs, start=1):
        path, file = _file_of(store, job, request)
        number, file = files.setdefault(path, (len(files), file))
        for key in job.keys:
            members[places[key]] = number, _place(file, job, request, key.number)
        progress(done / len(jobs))
    listed = tuple(file for _, file in files.values())
    ranks = np.array([listed[file].ranks[place] for file, place in members], dtype=np.int64)
    d_model, max_rank = int(heads["d_model"].iloc[0]), max(int(ranks.max()), 1)
    stack = BasisStack(listed, members, d_model, max_rank, request.device)
    return CachedBases(stack, ranks, index)


def _file_of(store: BasisStore, job: LayerJob, request: BasisRequest) -> tuple[Path, BasisFile]:
    """The file of the bases of a layer, which is there or is written."""
    description = _describe(job, request)
    path = store.path(description)
    found = store.find(path)
    if found is None:
        with store.writing(path, description) as writer:
            _write_layer(writer, job, request)
            if _describe(job, request) != description:
                raise CheckpointError(
                    f"{request.caller}: the weights of {job.source} changed while they were read; "
                    "run again when they are complete"
                )
        found = store.find(path)
    if found is None:
        raise CheckpointError(
            f"{request.caller}: {path} was written and cannot be read again; check the disk of the "
            "cache"
        )
    return path, found


def _place(file: BasisFile, job: LayerJob, request: BasisRequest, number: int) -> int:
    """Place of a head in the file; damaged heads are not in there."""
    if number not in file.numbers:
        shape = (1, job.plan.d_model, job.plan.d_head)
        read_layer(job, request.processing, [number], torch.empty(shape), Route())
    return file.numbers.index(number)


def _describe(job: LayerJob, request: BasisRequest) -> dict[str, Any]:
    """Everything that the bases of a layer depend on."""
    role, reader = request.processing.role, job.checkpoint.reader
    slot = job.layer.slots[role]
    gain = job.layer.gains[role] if request.processing.fold_norm else None
    read = [slot.tensor] if gain is None or gain not in reader.names() else [slot.tensor, gain]
    sharing = [layer.layer for layer in job.plan.layers if layer.slots[role].tensor == slot.tensor]
    config = json.dumps(job.checkpoint.config, sort_keys=True, default=str)
    return {
        "format": FORMAT,
        "source": job.source,
        "revision": job.checkpoint.revision,
        "config": hashlib.blake2b(config.encode(), digest_size=16).hexdigest(),
        "tensors": {name: reader.fingerprint(name) for name in read},
        "role": role,
        "layer": min(sharing),
        "n_heads": job.layer.count(role),
        "d_head": job.plan.d_head,
        "norm": job.plan.norm.kind,
        "fold_norm": request.processing.fold_norm,
        "center": request.processing.center,
        "rank": request.rank if request.rank is None or request.rank >= 1 else float(request.rank),
    }


def _write_layer(writer: BasisWriter, job: LayerJob, request: BasisRequest) -> None:
    count = job.layer.count(request.processing.role)
    start, width = 0, min(_group_size(job, request), count)
    while start < count:
        numbers = list(range(start, min(start + width, count)))
        try:
            bases = _bases_of(numbers, job, request)
        except RuntimeError as error:
            reason = reason_if_full(error)
        else:
            for number, basis in bases:
                writer.add(number, basis)
            start += len(numbers)
            job.checkpoint.reader.release()
            continue
        width = halved(len(numbers), reason, request.caller, "group of {} heads")


def _group_size(job: LayerJob, request: BasisRequest) -> int:
    """Heads of a layer that fit into memory, beside the stored tensor that they are cut from."""
    slot = job.layer.slots[request.processing.role]
    info = job.checkpoint.reader.info(slot.tensor)
    stored = int(np.prod(info.shape)) * torch_dtype(info, repr(slot.tensor)).itemsize
    entries = job.plan.d_model * job.plan.d_head
    fixed = stored + 8 * entries * min(_WORK_HEADS, 3 * job.layer.count(request.processing.role))
    each = 2 * 4 * entries
    if fixed + each > request.max_memory:
        what = f"L{job.layer.layer} W_{request.processing.role}"
        raise MemoryBudgetError(
            f"{request.caller}: max_memory is {request.max_memory} bytes, but the bases of one "
            f"head of {what} need {fixed + each}, {stored} of them for tensor {slot.tensor!r}; "
            "raise max_memory"
        )
    return (request.max_memory - fixed) // each


def _bases_of(
    numbers: list[int], job: LayerJob, request: BasisRequest
) -> list[tuple[int, torch.Tensor]]:
    """Bases of some heads of a layer, without those that are damaged."""
    shape = (len(numbers), job.plan.d_model, job.plan.d_head)
    stack = torch.empty(shape, dtype=torch.float32, device=request.device)
    route = Route(request.transfers)
    try:
        eps = read_layer(job, request.processing, numbers, stack, route)
        route.settle()
    except DegenerateHeadError:
        if len(numbers) == 1:
            return []
        return [pair for number in numbers for pair in _bases_of([number], job, request)]
    found = orthonormal_bases(stack, rank=request.rank, eps=eps, overwrite=True)
    return [
        (number, vectors[:, :rank])
        for number, vectors, rank in zip(numbers, found.vectors, found.ranks.tolist(), strict=True)
    ]
