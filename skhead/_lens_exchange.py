"""Similarities of one pair kind as grids of layers and heads, to and from TransformerLens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead.exceptions import HeadShapeError, HeadTableError
from skhead.stats import haar_moments
from skhead.weights import check_heads
from skhead.weights.lens_results import affinity_result, composition_result

__all__ = ["similarity_parts", "to_transformer_lens"]

_TO = "Similarity.to_transformer_lens"
_FROM = "Similarity.from_transformer_lens"


def to_transformer_lens(similarity: Any, pair: str | None) -> Any:
    """See `Similarity.to_transformer_lens`."""
    pair = _chosen(similarity, pair)
    p = similarity.pairs.index(pair)
    unit = similarity.unit
    if unit not in ("pk", "composition"):
        raise ValueError(
            f"{_TO}: TransformerLens has projection kernels (unit 'pk') and composition scores "
            f"('composition'), and these numbers are in {unit!r}; convert what comes from "
            "ProjectionKernel(normalize=None) or CompositionScore(baseline=None), before "
            "calibration"
        )
    native = unit == "pk"
    sides = [
        _Grid(table, "kv_head" if native and role in "KV" else "head")
        for table, role in zip((similarity.rows, similarity.columns), pair, strict=True)
    ]
    values = similarity.values[:, :, p]
    cells = np.full((sides[0].size, sides[1].size), np.nan, dtype=np.float32)
    at = np.ix_(sides[0].positions, sides[1].positions)
    cells[at] = values
    if not np.array_equal(cells[at], values, equal_nan=True):
        raise HeadShapeError(
            f"{_TO}: heads that share keys and values differ in {pair}; TransformerLens has one "
            "number for all of them"
        )
    shape = (*sides[0].shape, *sides[1].shape)
    grid = torch.from_numpy(cells.reshape(shape))
    defined = ~torch.isnan(grid)
    scores = torch.where(defined, grid, torch.zeros_like(grid))
    if not native:
        _refuse_other_heads(similarity, sides)
        labels = [f"L{layer}H{head}" for layer in sides[0].layers for head in range(shape[1])]
        return composition_result(scores, sides[0].layers, labels)
    ranks = [np.unique(side[:, p]) for side in (similarity.row_ranks, similarity.column_ranks)]
    for of_side, role in zip(ranks, pair, strict=True):
        if len(of_side) != 1:
            raise ValueError(
                f"{_TO}: TransformerLens has one rank for all heads of a role, and those of {role} "
                f"go from {of_side[0]} to {of_side[-1]}; extract the subspaces with one rank"
            )
    layers = sides[0].layers, sides[1].layers
    return affinity_result(scores, defined, pair, layers, (int(ranks[0][0]), int(ranks[1][0])))


def similarity_parts(
    result: Any, heads: pd.DataFrame, pair: str | None, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of the similarity that a result of TransformerLens is; see `Similarity`."""
    table = check_heads(heads, _FROM)
    kernel = hasattr(result, "valid_mask")
    if not kernel and not hasattr(result, "layer_indices"):
        raise TypeError(
            f"{_FROM}: takes a HeadAffinityResult or CompositionScores of TransformerLens; got "
            f"{type(result).__name__}"
        )
    pair = _pair_of(result, pair, kernel)
    scores = result.scores.detach().cpu()
    layers = (
        (result.source_layer_indices, result.target_layer_indices)
        if kernel
        else (result.layer_indices, result.layer_indices)
    )
    kinds = (result.source_head_kind, result.target_head_kind) if kernel else ("query", "query")
    order = torch.as_tensor(layers[0])
    defined = (
        result.valid_mask.cpu()
        if kernel
        else (order[:, None] < order[None, :])[:, None, :, None].expand_as(scores)
    )
    sides = [
        _positions(table, numbers, n_heads, "kv_head" if kind == "kv" else "head")
        for numbers, n_heads, kind in zip(layers, scores.shape[1::2], kinds, strict=True)
    ]
    at = np.ix_(*sides)
    flat = (scores.shape[0] * scores.shape[1], -1)
    values = np.where(
        defined.reshape(flat).numpy()[at], scores.float().reshape(flat).numpy()[at], np.nan
    )
    d_model = int(table["d_model"].iloc[0])
    mean, sd = np.full((1, 1, 1), d_model**-0.5), np.full((1, 1, 1), np.nan)
    ranks = [np.full((len(table), 1), int(table["d_head"].iloc[0]), dtype=np.int64)] * 2
    if kernel:
        of_result = (result.source_rank, result.target_rank)
        ranks = [np.full((len(table), 1), rank, dtype=np.int64) for rank in of_result]
        moments = haar_moments(*of_result, d_model - int(record["center"]))
        mean = np.full((1, 1, 1), float(moments.mean))
        sd = np.full((1, 1, 1), float(np.sqrt(moments.variance)))
    return {
        "values": values[:, :, None].astype(np.float32),
        "pairs": (pair,),
        "rows": table,
        "columns": table,
        "unit": "pk" if kernel else "composition",
        "record": {**record, "rank": result.rank if kernel else None},
        "d_model": d_model,
        "row_ranks": ranks[0],
        "column_ranks": ranks[1],
        "null_mean": mean,
        "null_sd": sd,
    }


class _Grid:
    """Places of the heads of one model among layers and heads of a layer."""

    def __init__(self, heads: pd.DataFrame, column: str) -> None:
        sources = heads["source"].unique()
        if len(sources) != 1 or (heads["layer"] < 0).any():
            raise HeadTableError(
                f"{_TO}: TransformerLens lays out the heads of one model, and these come from "
                f"{len(sources)} sources; choose the rows and columns of one model"
            )
        self.layers = sorted(int(layer) for layer in heads["layer"].unique())
        self.shape = len(self.layers), int(heads[column].max()) + 1
        self.size = self.shape[0] * self.shape[1]
        rows = np.searchsorted(self.layers, heads["layer"].to_numpy())
        self.positions: NDArray[np.int64] = rows * self.shape[1] + heads[column].to_numpy()
        missing = np.setdiff1d(np.arange(self.size), self.positions)
        if missing.size:
            layer, head = divmod(int(missing[0]), self.shape[1])
            raise HeadTableError(
                f"{_TO}: TransformerLens has every head of a layer, and L{self.layers[layer]}H"
                f"{head} is missing; compare all heads of the model"
            )


def _refuse_other_heads(similarity: Any, sides: list[_Grid]) -> None:
    if sides[0].layers != sides[1].layers or sides[0].shape != sides[1].shape:
        raise HeadShapeError(
            f"{_TO}: CompositionScores hold all heads against all heads, and this similarity has "
            f"{len(similarity.rows)} rows and {len(similarity.columns)} columns of other heads"
        )


def _chosen(similarity: Any, pair: str | None) -> str:
    if pair is None and len(similarity.pairs) > 1:
        raise HeadShapeError(
            f"{_TO}: the similarity holds {' '.join(similarity.pairs)}; TransformerLens has one "
            f"pair kind in a result, so say which, for example pair={similarity.pairs[0]!r}"
        )
    pair = str(similarity.pairs[0] if pair is None else pair)
    if pair not in similarity.pairs:
        raise HeadShapeError(
            f"{_TO}: the similarity holds {' '.join(similarity.pairs)}, not {pair!r}"
        )
    return pair


def _pair_of(result: Any, pair: str | None, kernel: bool) -> str:
    if not kernel:
        if pair not in ("OQ", "OK", "OV"):
            raise ValueError(
                f"{_FROM}: CompositionScores do not say which composition they are; pass pair='OQ' "
                f"for mode 'Q', 'OK' for 'K' or 'OV' for 'V'; got {pair!r}"
            )
        return pair
    own = f"{result.source_role}{result.target_role}"
    if pair not in (None, own):
        raise ValueError(f"{_FROM}: the result is of {own}, and pair={pair!r} was asked for")
    return own


def _positions(heads: pd.DataFrame, layers: Any, n_heads: int, column: str) -> NDArray[np.int64]:
    """Row of the flattened result in which each head stands."""
    numbers = {int(layer): i for i, layer in enumerate(layers)}
    unknown = ~heads["layer"].isin(list(numbers)) | (heads[column] >= n_heads)
    sources = heads["source"].nunique()
    if unknown.any() or sources != 1 or len(numbers) != heads["layer"].nunique():
        at = f"head {heads.index[unknown][0]} is not in it" if unknown.any() else "layers differ"
        raise HeadTableError(
            f"{_FROM}: the heads table, of {sources} models, does not fit the result, which has "
            f"{len(numbers)} layers of {n_heads}: {at}; pass load_heads of the model that was "
            "analysed"
        )
    rows = heads["layer"].map(numbers).to_numpy(dtype=np.int64)
    return np.asarray(rows * n_heads + heads[column].to_numpy(), dtype=np.int64)
