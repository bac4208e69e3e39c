"""Results in the classes of TransformerLens, for those who go on with its tools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["affinity_result", "composition_result"]


def affinity_result(
    scores: torch.Tensor,
    defined: torch.Tensor,
    pair: str,
    layers: tuple[Sequence[int], Sequence[int]],
    ranks: tuple[int, int],
) -> Any:
    """Projection kernels as TransformerLens' ``attention_head_subspace_affinity`` gives them.

    Parameters
    ----------
    scores : Tensor of shape (n_row_layers, n_row_heads, n_column_layers, n_column_heads)
        0 where undefined.
    defined : Tensor of the same shape, bool
    pair : str
        Such as ``"OQ"``.
    layers : tuple of sequences of int
        Layer numbers of rows and of columns.
    ranks : tuple of int
        Of row heads and of column heads.

    Returns
    -------
    transformer_lens.tools.analysis.projection_kernel.HeadAffinityResult
        Its tolerance is NaN, as ranks were not measured by one.

    Raises
    ------
    ImportError
        If transformer_lens is not installed.
    """
    _require("HeadAffinityResult")
    from transformer_lens.tools.analysis.projection_kernel import HeadAffinityResult

    row_rank, column_rank = ranks
    kinds = ["query" if role in "QO" else "kv" for role in pair]
    return HeadAffinityResult(
        scores=scores,
        normalized=scores / math.sqrt(row_rank * column_rank),
        valid_mask=defined,
        source_role=pair[0],  # type: ignore[arg-type]
        target_role=pair[1],  # type: ignore[arg-type]
        source_layer_indices=tuple(layers[0]),
        target_layer_indices=tuple(layers[1]),
        source_head_kind=kinds[0],  # type: ignore[arg-type]
        target_head_kind=kinds[1],  # type: ignore[arg-type]
        source_ranks=torch.full(scores.shape[:2], row_rank),
        target_ranks=torch.full(scores.shape[2:], column_rank),
        source_rank=row_rank,
        target_rank=column_rank,
        rank=None,
        rtol=math.nan,
    )


def composition_result(scores: torch.Tensor, layers: Sequence[int], labels: Sequence[str]) -> Any:
    """Composition scores as ``TransformerBridge.all_composition_scores`` gives them.

    Parameters
    ----------
    scores : Tensor of shape (n_layers, n_heads, n_layers, n_heads)
        0 where undefined.
    layers : sequence of int
    labels : sequence of str
        Of all heads, in order.

    Returns
    -------
    transformer_lens.model_bridge.composition_scores.CompositionScores

    Raises
    ------
    ImportError
        If transformer_lens is not installed.
    """
    _require("CompositionScores")
    from transformer_lens.model_bridge.composition_scores import CompositionScores

    return CompositionScores(scores, list(layers), list(labels))


def _require(result: str) -> None:
    try:
        import transformer_lens.model_bridge  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Similarity.to_transformer_lens: a {result} needs transformer_lens, which is not "
            "installed; install skhead[lens]"
        ) from error
