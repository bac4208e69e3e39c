"""Reading head matrices of the rows of a heads table, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from skhead.exceptions import DegenerateHeadError, HeadShapeError, HeadTableError
from skhead.weights import processing
from skhead.weights.files import Checkpoint
from skhead.weights.layouts import ROLES, LayerPlan, ModelPlan, cut_heads
from skhead.weights.readers import TensorReader, torch_dtype
from skhead.weights.sources import reopen, split_address
from skhead.weights.table import check_heads
from skhead.weights.transfers import Transfers, deliver, transfers_to

__all__ = [
    "LayerJob",
    "MatrixKey",
    "Processing",
    "RoleStack",
    "Route",
    "load_weights",
    "places_of",
    "read_layer",
    "read_role",
    "role_jobs",
]

#: Bytes read through memory maps, which count as the process's memory, until they are closed.
_MAPPED_BYTES = 2**26


@dataclass(frozen=True)
class RoleStack:
    """The distinct head matrices of one role, and which row of the table uses which.

    Attributes
    ----------
    tensor : torch.Tensor of shape (n_unique, d_model, d_head)
        float32. K and V of grouped queries and shared layers are here once.
    index : numpy.ndarray of shape (n_heads,)
        int64, row of the table to place in `tensor`.
    eps : numpy.ndarray of shape (n_unique,)
        float64, relative rounding error of the stored numbers of each matrix: the machine epsilon
        of the dtype in which its checkpoint holds it, at least that of float32.
    """

    tensor: torch.Tensor
    index: np.ndarray
    eps: np.ndarray


def load_weights(
    heads: pd.DataFrame, role: str = "O", fold_norm: bool = False, center: bool = False
) -> np.ndarray:
    """Read one matrix per row of a heads table.

    Parameters
    ----------
    heads : pandas.DataFrame
        Any rows of tables made by :func:`load_heads`, in any order; all of one ``d_model`` and
        one ``d_head``.
    role : {"Q", "K", "V", "O"}, default="O"
        ``x @ W`` gives the query, key or value of a residual vector ``x``; what a head writes is
        ``z @ W.T`` for O.
    fold_norm : bool, default=False
        Multiply the gain of the norm beside the heads into them: for Q, K, V the norm in front,
        for O the norm between the head and the stream if there is one (Gemma 2 and 3, OLMo 2).
        Norms on queries and keys within the head are not folded. Tensors under TransformerLens'
        names without any gain stay as they are, with a warning.
    center : bool, default=False
        Subtract from each matrix its mean over the residual coordinates, after folding.

    Returns
    -------
    numpy.ndarray of shape (n_heads, d_model, d_head)
        float32. Rows that share a matrix (grouped queries, shared layers) each get a copy.

    Raises
    ------
    HeadTableError
        If the table is empty or its rows are not heads of their sources.
    HeadShapeError
        If the rows have several widths.
    DegenerateHeadError
        If a matrix holds NaN or infinite values.
    UnsupportedLayoutError
        If ``fold_norm=True`` and the model normalises the stream itself (BERT, BART, ALBERT).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> stack = skhead.load_weights(heads.loc[["L1H0", "L0H3"]], role="Q")
    >>> stack.shape == (2, heads["d_model"].iloc[0], heads["d_head"].iloc[0])
    True
    """
    stack = read_role(heads, role, fold_norm=fold_norm, center=center)
    return stack.tensor.numpy()[stack.index]


def read_role(
    heads: pd.DataFrame,
    role: str,
    *,
    fold_norm: bool = False,
    center: bool = False,
    device: torch.device | str | None = None,
    opened: dict[str, Checkpoint] | None = None,
) -> RoleStack:
    """Read the distinct matrices of one role, at most one layer beside the result in memory.

    Parameters
    ----------
    heads : pandas.DataFrame
    role : {"Q", "K", "V", "O"}
    fold_norm, center : bool, default=False
        As in :func:`load_weights`.
    device : torch.device or str, optional
        Where the result is; the CPU by default.
    opened : dict of str to Checkpoint, optional
        By address, checkpoints that are open already; those that are opened are put there, so that
        reading one role after the other looks at every header and maps every page once.

    Returns
    -------
    RoleStack

    Raises
    ------
    ValueError
        If the role is none of the four; else as :func:`load_weights`.
    """
    how = Processing(role, fold_norm, center)
    jobs = role_jobs(heads, how, opened)
    keys, index = places_of(jobs)
    shape = (len(keys), int(heads["d_model"].iloc[0]), int(heads["d_head"].iloc[0]))
    tensor = torch.empty(shape, dtype=torch.float32, device=device)
    eps = np.empty(len(keys), dtype=np.float64)
    filled: set[MatrixKey] = set()
    route = Route.to(tensor.device)
    mapped = 0
    for job in jobs:
        fresh = [key for key in dict.fromkeys(job.keys) if key not in filled]
        if not fresh:
            continue
        first = keys[fresh[0]]
        places = slice(first, first + len(fresh))
        eps[places] = read_layer(job, how, [key.number for key in fresh], tensor[places], route)
        filled.update(fresh)
        mapped += tensor[places].nbytes
        if mapped > _MAPPED_BYTES:
            job.checkpoint.reader.release()
            mapped = 0
    if mapped > _MAPPED_BYTES // 2:
        job.checkpoint.reader.release()
    route.settle()
    return RoleStack(tensor, index, eps)


def role_jobs(
    heads: pd.DataFrame, how: Processing, opened: dict[str, Checkpoint] | None = None
) -> list[LayerJob]:
    """Where the matrices of one role are, layer by layer, checked against the heads table.

    Checkpoints come from `opened` and go there, see `read_role`.

    Raises
    ------
    ValueError
        If the role is none of the four; else as :func:`load_weights`.
    """
    if how.role not in tuple(ROLES):
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {how.role!r}.")
    heads = check_heads(heads, "load_weights")
    _check_sizes(heads)
    jobs = list(_walk(heads, how, {} if opened is None else opened))
    first: dict[str, LayerJob] = {}
    for job in jobs:
        first.setdefault(job.source, job)
    for job in first.values():
        _check_processing(job, how)
    return jobs


def places_of(jobs: list[LayerJob]) -> tuple[dict[MatrixKey, int], np.ndarray]:
    """Places of the distinct matrices in the order in which they are read, and those of the rows.

    Returns
    -------
    places : dict of MatrixKey to int
    index : numpy.ndarray of shape (n_heads,)
        int64.
    """
    distinct = dict.fromkeys(key for job in jobs for key in job.keys)
    places = {key: place for place, key in enumerate(distinct)}
    index = np.empty(sum(len(job.rows) for job in jobs), dtype=np.int64)
    for job in jobs:
        index[job.rows] = [places[key] for key in job.keys]
    return places, index


@dataclass(frozen=True)
class Processing:
    """Which matrices are read, and what is done to them."""

    role: str
    fold_norm: bool
    center: bool


@dataclass(frozen=True)
class MatrixKey:
    """Identity of a matrix: shared layers and grouped queries have equal keys."""

    source: str
    tensor: str
    gain: str | None
    number: int


@dataclass(frozen=True)
class LayerJob:
    """The rows of one layer of one source."""

    source: str
    checkpoint: Checkpoint
    plan: ModelPlan
    layer: LayerPlan
    rows: np.ndarray
    keys: list[MatrixKey]


def _check_sizes(heads: pd.DataFrame) -> None:
    if heads["d_head"].nunique() > 1:
        sizes = heads.groupby("source", sort=False)["d_head"].first()
        words = ", ".join(f"{source}: {size}" for source, size in sizes.items())
        raise HeadShapeError(
            f"load_weights: the rows have several d_head ({words}); read each of them by itself."
        )


def _walk(
    heads: pd.DataFrame, how: Processing, opened: dict[str, Checkpoint]
) -> Iterator[LayerJob]:
    positions = pd.Series(np.arange(len(heads)))
    columns = {name: heads[name].to_numpy() for name in heads.columns}
    for source, of_source in positions.groupby(columns["source"], sort=False):
        address, part = split_address(str(source))
        checkpoint = opened.get(address) or opened.setdefault(address, reopen(address))
        plan = checkpoint.plan(part)
        layers = columns["layer"][of_source.to_numpy()]
        for number, of_layer in of_source.groupby(layers):
            rows = of_layer.to_numpy()
            layer = _check_rows(columns, rows, plan, int(number))
            tensor = layer.slots[how.role].tensor
            gain = layer.gains[how.role] if how.fold_norm else None
            numbers = columns["kv_head" if how.role in "KV" else "head"][rows]
            keys = [MatrixKey(str(source), tensor, gain, int(n)) for n in numbers]
            yield LayerJob(str(source), checkpoint, plan, layer, rows, keys)


def _check_rows(
    columns: dict[str, np.ndarray], rows: np.ndarray, plan: ModelPlan, number: int
) -> LayerPlan:
    layer = plan.layer(number)
    heads = columns["head"][rows]
    beyond = heads if layer is None else heads[heads >= layer.n_heads]
    if layer is None or len(beyond):
        raise HeadTableError(
            f"row L{number}H{beyond[0]} of the heads table does not exist in "
            f"{columns['source'][rows[0]]}. Make the table again with load_heads."
        )
    true = {
        "kv_head": heads // (layer.n_heads // layer.n_kv_heads),
        "n_layers": np.full(len(rows), plan.n_layers),
        "d_model": np.full(len(rows), plan.d_model),
        "d_head": np.full(len(rows), plan.d_head),
    }
    for name, values in true.items():
        for place in np.flatnonzero(columns[name][rows] != values)[:1]:
            row = rows[place]
            raise HeadTableError(
                f"row L{number}H{heads[place]} of the heads table says "
                f"{name}={columns[name][row]}, and {columns['source'][row]} has {values[place]}. "
                "Make the table again with load_heads."
            )
    return layer


def _check_processing(job: LayerJob, how: Processing) -> None:
    if how.fold_norm:
        processing.check_foldable(job.plan, job.source)
        processing.warn_if_gains_are_unknown(job.plan, job.source)
    if how.center:
        processing.warn_if_centring_changes_reading(job.plan, job.source)


class Route:
    """How matrices come to a device, so that reading goes on while the device works.

    Whether they hold only finite numbers is asked of a GPU once, by `settle`.

    Parameters
    ----------
    transfers : Transfers or None
        None copies and checks at once.
    """

    def __init__(self, transfers: Transfers | None = None) -> None:
        self.transfers = transfers
        self._unsettled: list[tuple[torch.Tensor, LayerJob, Processing, list[int]]] = []

    @classmethod
    def to(cls, device: torch.device) -> Route:
        """The way to a device."""
        return cls(transfers_to(device))

    def check_finite(
        self, stack: torch.Tensor, job: LayerJob, how: Processing, numbers: list[int]
    ) -> None:
        """Refuse NaN and infinite values, now or when it is settled."""
        if self.transfers is None:
            _check_finite(stack, job, how.role, numbers)
        else:
            self._unsettled.append((stack.sum(), job, how, numbers))

    def settle(self) -> None:
        """Refuse NaN and infinite values in what came before.

        Raises
        ------
        DegenerateHeadError
        """
        waiting, self._unsettled = self._unsettled, []
        if not waiting:
            return
        finite = torch.stack([total for total, *_ in waiting]).isfinite().cpu()
        for (_, job, how, numbers), good in zip(waiting, finite.tolist(), strict=True):
            if not good:
                shape = len(numbers), job.plan.d_model, job.plan.d_head
                read_layer(job, how, numbers, torch.empty(shape), Route())


def read_layer(
    job: LayerJob, how: Processing, numbers: list[int], out: torch.Tensor, route: Route
) -> float:
    """Fill `out` with some matrices of a layer, and return their stored rounding error.

    Raises
    ------
    DegenerateHeadError
        If one of them, or the norm's gain, holds NaN or infinite values; on a GPU only when the
        route is settled.
    """
    reader: TensorReader = job.checkpoint.reader
    slot = job.layer.slots[how.role]
    info = reader.info(slot.tensor)
    dtype = torch_dtype(info, repr(slot.tensor))
    stored = reader.tensor(slot.tensor)
    heads = cut_heads(stored, slot, how.role, job.layer, job.plan.d_head)
    consecutive = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    chosen = heads[numbers[0] : numbers[-1] + 1] if consecutive else heads[numbers]
    deliver(chosen, out, route.transfers)
    route.check_finite(out, job, how, numbers)
    if how.fold_norm:
        processing.fold(out, how.role, job.layer, job.plan, reader, route.transfers)
    if how.center:
        processing.centre(out)
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _check_finite(stack: torch.Tensor, job: LayerJob, role: str, numbers: list[int]) -> None:
    if bool(torch.isfinite(stack.sum())):
        return
    finite = torch.isfinite(stack).flatten(1).all(dim=1)
    if bool(finite.all()):
        return
    place = int((~finite).nonzero()[0])
    number = numbers[place]
    per_group = job.layer.n_heads // job.layer.n_kv_heads
    head = number * per_group if role in "KV" else number
    shared = f" (key-value head {number})" if role in "KV" and per_group > 1 else ""
    n_nan = int(torch.isnan(stack[place]).sum())
    n_inf = int(torch.isinf(stack[place]).sum())
    name = job.layer.slots[role].tensor
    file = job.checkpoint.reader.info(name).file
    raise DegenerateHeadError(
        f"{file}: L{job.layer.layer}H{head} W_{role}{shared}, in tensor {name!r}, "
        f"holds {n_nan} NaN and {n_inf} infinite values. The checkpoint is damaged, or its "
        "training diverged; leave the head out of the table or get other weights."
    )
