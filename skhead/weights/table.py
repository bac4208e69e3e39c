"""The heads table: one row per attention head, read from configuration and headers only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from skhead.exceptions import HeadShapeError, HeadTableError
from skhead.weights.files import Checkpoint
from skhead.weights.labels import prefixed_labels, short_names
from skhead.weights.layouts import ModelPlan
from skhead.weights.readers import torch_dtype
from skhead.weights.sources import locate, reopen, split_address, split_source

__all__ = [
    "HEAD_COLUMNS",
    "SourceInfo",
    "check_heads",
    "describe_sources",
    "load_heads",
]

HEAD_COLUMNS = ("source", "layer", "head", "kv_head", "n_layers", "d_model", "d_head")
_INTEGER_COLUMNS = HEAD_COLUMNS[1:]


@dataclass(frozen=True)
class SourceInfo:
    """What one source of a heads table is.

    Attributes
    ----------
    source : str
        The address, as in the table.
    name : str
        A short name, unique within the table.
    family : str
        The architecture; ``"transformer_lens"`` for tensors under TransformerLens' names.
    part : str or None
        ``"encoder"``, ``"decoder"`` or ``"cross"``.
    revision : str or None
        Commit on the hub.
    dtype : str
        Stored dtype of the attention matrices; several are joined by ``"+"``.
    n_layers, n_heads, n_kv_heads, d_model, d_head : int
        Of the whole model; where layers differ, the largest count of heads.
    norm : {"layernorm", "rmsnorm", "rmsnorm+1", "none"}
        ``"rmsnorm+1"`` multiplies by one plus the stored gain.
    norm_placement : {"pre", "post", "pre+post", "none"}
        Before the heads read, after they wrote, or both.
    shared_layers : bool
        Several layers use the same tensors.
    """

    source: str
    name: str
    family: str
    part: str | None
    revision: str | None
    dtype: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    norm: str
    norm_placement: str
    shared_layers: bool


def load_heads(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    revision: str | None = None,
    part: str | None = None,
) -> pd.DataFrame:
    """List the attention heads of a model, one row each, without reading a weight.

    Reads the configuration and the headers of the weight files, and checks that every attention
    tensor is there in the shape that the configuration asks for.

    Parameters
    ----------
    source : str, path-like, or list of these
        In the order of looking: the name of a live model (:func:`register_model`), of a bundled
        model, an existing path, or a repository on the Hugging Face hub. A path is a directory in
        Hugging Face layout, a ``.safetensors`` file, a ``.index.json`` file, or, when named
        itself, a torch file (``.bin``, ``.pt``, ``.pth``), which is read by
        ``torch.load(weights_only=True)``. Tensors under TransformerLens' names need no
        configuration.
    revision : str, optional
        Branch, tag or commit, for hub repositories only.
    part : {"encoder", "decoder", "cross"}, optional
        Which heads of an encoder-decoder.

    Returns
    -------
    pandas.DataFrame
        One row per query head, layers in order. The index holds labels such as ``"L4H7"``, with
        the name of the source in front (``"small:L4H7"``) for a list of several. Columns:
        ``source`` (address that finds the weights again, in this or another process; a hub
        repository is pinned to its commit), ``layer``, ``head``, ``kv_head`` (the key-value head
        that serves it), ``n_layers``, ``d_model``, ``d_head``.

    Raises
    ------
    SourceNotFoundError
        If nothing answers to the name.
    UnsupportedLayoutError
        If the architecture or the storage of the weights is not known.
    ConfigMismatchError
        If configuration and tensors disagree.
    CheckpointError
        If a file or tensor is missing, truncated, or its header contradicts itself.
    UnsafeCheckpointError
        If there are only pickled weights, or an index names files outside its directory.
    HeadTableError
        If the list is empty or names a source twice, or a part has the address of another path
        that exists (``model`` and ``model#decoder`` side by side).
    TypeError
        If `source` is none of these types. A model in memory goes to :func:`register_model`.
    ValueError
        If `part` is missing for an encoder-decoder, or `part` or `revision` do not apply.

    Notes
    -----
    Where only the product of head count and head size is stored (as in GPT-2), a configuration
    with a wrong head count that divides the width agrees with every tensor and cannot be told.

    From the hub, the configuration is downloaded and, of the weights, the shards that hold
    attention; a checkpoint in one file is downloaded whole. Environment variables of
    huggingface_hub (``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_HOME``) apply.

    The table says where the weights are, not what they are. A scikit-learn pipeline with
    ``memory=`` keeps results under the table's content, and so does any cache made with joblib:
    after weights changed under the same path, clear that cache.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> heads.loc["L1H0", ["layer", "head", "n_layers"]].tolist()
    [1, 0, 2]
    """
    sources = _listed(source)
    if not sources:
        raise HeadTableError("load_heads: the list of sources is empty.")
    tables = [_table_of(entry, revision, part) for entry in sources]
    table = pd.concat(tables)
    addresses = [frame["source"].iloc[0] for frame in tables]
    for address, count in Counter(addresses).items():
        if count > 1:
            raise HeadTableError(f"load_heads: {address} is named {count} times.")
    if len(tables) > 1:
        table.index = pd.Index(prefixed_labels(table))
    return table.copy()  # in one block per dtype, so that equal tables have equal joblib hashes


def _listed(source: Any) -> list[str | os.PathLike[str]]:
    if isinstance(source, str | os.PathLike):
        return [source]
    listable = isinstance(source, Iterable) and not isinstance(
        source, bytes | bytearray | Mapping | torch.nn.Module | pd.DataFrame
    )
    sources = list(source) if listable else [source]
    for entry in sources:
        if not isinstance(entry, str | os.PathLike):
            raise TypeError(
                "load_heads: source must be a path, a name, or a list of these, got "
                f"{'a list that holds ' if listable else ''}{type(entry).__name__}. "
                + _advice(entry)
            )
    return sources


def _advice(source: Any) -> str:
    if isinstance(source, torch.nn.Module | Mapping):
        return (
            "Give a model in memory a name with skhead.register_model(model, name), and pass that "
            "name."
        )
    if isinstance(source, pd.DataFrame):
        return "A heads table goes to load_weights or to an estimator."
    if isinstance(source, bytes | bytearray):
        return "Decode it: os.fsdecode(source)."
    return "Give for example the path of a directory that holds config.json and the weights."


def _table_of(
    source: str | os.PathLike[str], revision: str | None, part: str | None
) -> pd.DataFrame:
    where: str | os.PathLike[str] = source
    if isinstance(source, str):
        where, stated = split_source(source)
        if stated and part and stated != part:
            raise ValueError(f"load_heads: source {source!r} and part={part!r} disagree.")
        part = stated or part
    checkpoint = locate(where, revision)
    plan = checkpoint.plan(part)
    address = checkpoint.address if plan.part is None else f"{checkpoint.address}#{plan.part}"
    split_address(address)
    rows = [
        (layer.layer, head, head // (layer.n_heads // layer.n_kv_heads))
        for layer in plan.layers
        for head in range(layer.n_heads)
    ]
    table = pd.DataFrame(rows, columns=["layer", "head", "kv_head"], dtype=np.int64)
    table.insert(0, "source", address)
    for name in ("n_layers", "d_model", "d_head"):
        table[name] = np.int64(getattr(plan, name))
    table.index = pd.Index([f"L{layer}H{head}" for layer, head, _ in rows])
    return table


def check_heads(heads: pd.DataFrame, caller: str) -> pd.DataFrame:
    """Return the columns of a heads table with their types, or say what is wrong with it.

    Parameters
    ----------
    heads : pandas.DataFrame
    caller : str
        The estimator or function to name in errors.

    Returns
    -------
    pandas.DataFrame
        The seven columns in order, integers as int64, with the index of `heads`, whose name is
        dropped.

    Raises
    ------
    HeadTableError
        If it is no table, is empty, lacks or repeats columns, or holds impossible values.
    HeadShapeError
        If its rows have several ``d_model``.
    """
    if not isinstance(heads, pd.DataFrame):
        raise HeadTableError(
            f"{caller}: expected a heads table (pandas.DataFrame, made by load_heads), got "
            f"{type(heads).__name__}."
        )
    missing = [name for name in HEAD_COLUMNS if name not in heads.columns]
    if missing:
        raise HeadTableError(
            f"{caller}: the heads table lacks the column{'s' * (len(missing) > 1)} "
            f"{', '.join(missing)}. Make it with load_heads."
        )
    repeated = [name for name in HEAD_COLUMNS if list(heads.columns).count(name) > 1]
    if repeated:
        raise HeadTableError(
            f"{caller}: the heads table has several columns named {', '.join(repeated)}."
        )
    if heads.empty:
        raise HeadTableError(f"{caller}: the heads table is empty: it has no rows.")
    index = heads.index.copy()
    index.names = [None] * index.nlevels
    columns: dict[str, Any] = {"source": _sources_column(heads, caller)}
    columns |= {name: _integer_column(heads, name, caller) for name in _INTEGER_COLUMNS}
    checked = pd.DataFrame(columns, index=index)
    beyond = checked["layer"] >= checked["n_layers"]
    if beyond.any():
        row = checked[beyond].iloc[0]
        raise HeadTableError(
            f"{caller}: row {row.name!r} of the heads table has layer {row['layer']} of "
            f"{row['n_layers']}; layers are counted from 0."
        )
    if checked["d_model"].nunique() > 1:
        sizes = checked.groupby("source", sort=False)["d_model"].first()
        words = ", ".join(f"{source}: {size}" for source, size in sizes.items())
        raise HeadShapeError(
            f"{caller}: heads of different d_model have no residual stream in common ({words})."
        )
    return checked


def _sources_column(heads: pd.DataFrame, caller: str) -> Any:
    for label, value in heads["source"].items():
        if not isinstance(value, str) or not value:
            raise HeadTableError(
                f"{caller}: row {label!r} of the heads table has source {value!r}."
            )
    return heads["source"].array


def _integer_column(heads: pd.DataFrame, name: str, caller: str) -> np.ndarray:
    least = 1 if name in ("n_layers", "d_model", "d_head") else 0
    column = heads[name]
    if column.dtype.kind == "i" and column.to_numpy().min() >= least:
        return column.to_numpy(dtype=np.int64)
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~np.isfinite(numbers) | (numbers != np.floor(numbers)) | (numbers < least)
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise HeadTableError(
            f"{caller}: row {heads.index[place]!r} of the heads table has "
            f"{name}={column.iloc[place]!r}; expected an integer of at least {least}."
        )
    return numbers.astype(np.int64)


def describe_sources(heads: pd.DataFrame) -> list[SourceInfo]:
    """Describe the sources of a heads table, in order of appearance.

    Parameters
    ----------
    heads : pandas.DataFrame

    Returns
    -------
    list of SourceInfo

    Raises
    ------
    HeadTableError
        If the table is not one.
    SourceNotFoundError
        If a source is gone.
    """
    sources = list(check_heads(heads, "describe_sources")["source"].unique())
    names = short_names(sources)
    return [_describe(source, names[source]) for source in sources]


def _describe(source: str, name: str) -> SourceInfo:
    address, part = split_address(source)
    checkpoint: Checkpoint = reopen(address)
    plan = checkpoint.plan(part)
    tensors = [slot.tensor for layer in plan.layers for slot in layer.slots.values()]
    return SourceInfo(
        source=source,
        name=name,
        family=plan.family,
        part=plan.part,
        revision=checkpoint.revision,
        dtype=_dtypes(tensors, checkpoint),
        n_layers=plan.n_layers,
        n_heads=max(layer.n_heads for layer in plan.layers),
        n_kv_heads=max(layer.n_kv_heads for layer in plan.layers),
        d_model=plan.d_model,
        d_head=plan.d_head,
        norm=plan.norm.kind,
        norm_placement=plan.norm.placement,
        shared_layers=_shares_layers(plan),
    )


def _dtypes(tensors: list[str], checkpoint: Checkpoint) -> str:
    dtypes = {torch_dtype(checkpoint.reader.info(name), repr(name)) for name in tensors}
    return "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _shares_layers(plan: ModelPlan) -> bool:
    return len({layer.slots["Q"].tensor for layer in plan.layers}) < len(plan.layers)
