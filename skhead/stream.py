"""How heads share the residual stream: what they read and write of it, and what they erase."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._base import ROLES, HeadInput, defined_pairs, extract_subspaces
from skhead._callers import saying_once
from skhead._checks import check_count
from skhead._devices import check_device
from skhead._inputs import (
    Processing,
    SourceHeads,
    heads_at,
    layer_rows,
    of_sources,
    open_maps,
    refuse_zero_maps,
)
from skhead._progress import progress_bar
from skhead.linalg.factored import map_factors
from skhead.linalg.paths import erasure_statistics, head_maps, stream_dimensions
from skhead.linalg.stacks import expand
from skhead.linalg.topk import largest_entries

__all__ = ["erasures", "stream_usage"]


def stream_usage(
    heads: Any,
    *,
    fold_norm: bool = False,
    center: bool = False,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """How much of the residual stream every layer reads and writes.

    Parameters
    ----------
    heads : DataFrame, or array or Tensor of shape (n_heads, 4, d_model, d_head)
        Heads table, or W_Q, W_K, W_V and W_O transposed; a stack counts as one layer, numbered -1.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`.
    device : str, torch.device or None, default=None
        Where to compute.

    Returns
    -------
    DataFrame
        One row per layer and role (Q, K, V, O):

        ``source``, ``layer``, ``role``, ``n_heads``
            Key-value heads count once for each head that uses them.
        ``dimension``, ``share``
            Dimension of the union of the heads' subspaces, and its share of d_model.
        ``effective_dimension``, ``effective_random``
            Participation ratio ``tr(P)^2 / tr(P^2)`` of the sum P of the heads' projectors: the
            dimension if the union were filled evenly, at most `dimension`; and what independent
            random subspaces of the same ranks would have.
        ``earlier_read``
            Share, in [0, 1], of what all heads of earlier layers write (each with the same weight,
            for isotropic inputs) that lies within the union. Its chance level is ``share``; NaN for
            O, and where nothing is written before.
        ``earlier_ratio``
            The same with the sum of projectors in place of the union, over its chance level: above
            1 where the heads gather in the directions that were written.

    Raises
    ------
    HeadShapeError
        If a stack does not hold all four roles.
    DegenerateHeadError
        If a matrix is zero.
    ValueError
        If a stack is to be processed as only a model's weights can be.

    References
    ----------
    N. Elhage et al., "A mathematical framework for transformer circuits", Transformer Circuits
    Thread (2021): the residual stream as a memory whose bandwidth is in demand.

    Examples
    --------
    >>> import skhead
    >>> from skhead.stream import stream_usage
    >>> usage = stream_usage(skhead.load_heads("skhead/induction-2l"))
    >>> usage[["layer", "role", "dimension"]].head(4).to_dict("list")
    {'layer': [0, 0, 0, 0], 'role': ['Q', 'K', 'V', 'O'], 'dimension': [128, 128, 128, 128]}
    """
    process = Processing(fold_norm, center, check_device(device, "stream_usage", float64=True))
    rows: list[dict[str, Any]] = []
    with saying_once():
        for model in of_sources(open_maps(heads, process, "stream_usage")):
            written = None
            layers = [heads_at(model.heads, at) for at in layer_rows(model.table)]
            for layer in progress_bar(layers, "stream_usage", unit="layer"):
                rows += _layer_usage(layer, model.name, written, process)
                addition = _covariance(layer, process)
                written = addition if written is None else written + addition
    return pd.DataFrame(rows)


def _layer_usage(
    layer: HeadInput, source: str, written: torch.Tensor | None, process: Processing
) -> list[dict[str, Any]]:
    """The rows of one layer, one for each role."""
    subspaces = extract_subspaces(layer, ROLES, rank=None, caller="stream_usage", **process.options)
    rows = []
    for role in ROLES:
        basis, ranks = subspaces.role(role), subspaces.ranks(role)
        earlier = None if role == "O" else written
        keys = {
            "source": source,
            "layer": int(layer.heads["layer"].iloc[0]),
            "role": role,
            "n_heads": len(ranks),
        }
        rows.append(keys | _usage(expand(basis.tensor, basis.index), ranks, earlier))
    return rows


def _usage(
    bases: torch.Tensor, ranks: NDArray[np.int64], written: torch.Tensor | None
) -> dict[str, float]:
    """One row of `stream_usage`, without its keys."""
    d_model, total = bases.shape[1], float(ranks.sum())
    union, effective = stream_dimensions(bases)
    dimension = union.shape[1]
    squares = float((ranks.astype(float) ** 2).sum())
    between = (total**2 - squares) / d_model
    usage = {
        "dimension": dimension,
        "share": dimension / d_model,
        "effective_dimension": effective,
        "effective_random": total**2 / (total + between),
        "earlier_read": np.nan,
        "earlier_ratio": np.nan,
    }
    if written is None:
        return usage
    everything = float(written.trace())
    inside = float((union * (written @ union)).sum())
    joined = bases.double().permute(1, 0, 2).flatten(1)
    through = float((joined * (written @ joined)).sum())
    usage["earlier_read"] = inside / everything
    usage["earlier_ratio"] = through * d_model / (total * everything)
    return usage


def _covariance(layer: HeadInput, process: Processing) -> torch.Tensor:
    """Covariance of what the heads of a layer write for isotropic inputs, each of trace 1."""
    factors, norms = map_factors(process.stack(layer, "O"), process.stack(layer, "V"))
    refuse_zero_maps(norms, layer.heads, "OV", "stream_usage")
    joined = (factors.double() / norms[:, None, None]).permute(1, 0, 2).flatten(1)
    return joined @ joined.mT


def erasures(
    heads: Any,
    *,
    top: int | None = 100,
    fold_norm: bool = False,
    center: bool = False,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """Which heads remove from the residual stream what earlier heads wrote to it.

    Head 1 adds ``x W_OV1`` to the stream. A later head that attends to the same place reads it and
    adds ``x W_OV1 W_OV2``. Where this points against the first output, the later head takes it
    back.

    Parameters
    ----------
    heads : DataFrame, or array or Tensor of shape (n_heads, 4, d_model, d_head)
        Heads table, or W_Q, W_K, W_V and W_O transposed; without layers, every ordered pair of
        different heads is compared.
    top : int or None, default=100
        How many pairs to return for each source, the strongest erasure first; None for all.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`.
    device : str, torch.device or None, default=None
        Where to compute.

    Returns
    -------
    DataFrame
        One row per pair, by rising ``z``:

        ``source``, ``writer``, ``eraser``
            The model, and the labels of the earlier and of the later head.
        ``signed_overlap``
            ``<W_OV1 W_OV2, W_OV1> / (||W_OV1 W_OV2||_F ||W_OV1||_F)``, in [-1, 1]: direction
            alone; 0 on average at random.
        ``removed``
            ``-<W_OV1 W_OV2, W_OV1> / ||W_OV1||_F^2``: the share of the output that is taken back at
            full attention; negative where it is reinforced. It has the scale of the weights: norms
            between the heads are not part of it unless folded.
        ``z``
            The overlap in standard deviations of its law when the later map keeps its subspaces and
            singular values but is rotated at random in between; 0 on average, of standard deviation
            1, and at most the rank of the map in size.

    Raises
    ------
    HeadShapeError
        If a stack does not hold all four roles.
    DegenerateHeadError
        If an OV map is zero.
    ValueError
        If `top` is no positive integer, or a stack is to be processed as only a model's weights can
        be.

    Notes
    -----
    W_V and W_O of all heads of a model are held at once, with orthonormal bases of the same size:
    some 8 GB for 32 layers of 32 heads at d_model 4096.

    Examples
    --------
    >>> import skhead
    >>> from skhead.stream import erasures
    >>> pairs = erasures(skhead.load_heads("skhead/induction-2l"), top=3)
    >>> pairs.columns.tolist()
    ['source', 'writer', 'eraser', 'signed_overlap', 'removed', 'z']
    >>> bool((pairs["z"] < 0).all())
    True
    """
    kept = None if top is None else check_count("top", top, "erasures")
    process = Processing(fold_norm, center, check_device(device, "erasures", float64=True))
    with saying_once():
        tables = [
            _erasures_of_source(model, kept, process)
            for model in of_sources(open_maps(heads, process, "erasures"))
        ]
    return pd.concat(tables, ignore_index=True)


def _erasures_of_source(model: SourceHeads, top: int | None, process: Processing) -> pd.DataFrame:
    maps = head_maps(*(process.stack(model.heads, role) for role in "VO"))
    refuse_zero_maps(torch.linalg.matrix_norm(maps.cores), model.table, "OV", "erasures")
    allowed = defined_pairs(model.table, model.table, True, "forward")
    cosines, gains, deviations = (np.full(allowed.shape, np.nan) for _ in range(3))
    for columns in progress_bar(layer_rows(model.table), "erasures", unit="layer"):
        rows = np.flatnonzero(allowed[:, columns].any(axis=1))
        if rows.size:
            found = erasure_statistics(maps.take(rows), maps.take(columns))
            at = np.ix_(rows, columns)
            cosines[at], gains[at], deviations[at] = (part.cpu().numpy() for part in found)
    order = np.where(allowed, -deviations, np.nan)
    writers, erasers = largest_entries(order, allowed.size if top is None else top)
    numbers = {"signed_overlap": cosines, "removed": -gains, "z": deviations}
    table: dict[str, Any] = {"source": model.name}
    table |= {"writer": model.labels[writers], "eraser": model.labels[erasers]}
    return pd.DataFrame(
        table | {name: values[writers, erasers] for name, values in numbers.items()}
    )
