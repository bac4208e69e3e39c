"""What single heads do to the residual stream, read from their weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._base import extract_subspaces, open_door
from skhead.exceptions import DegenerateHeadError, HeadShapeError
from skhead.linalg.factored import signed_identity
from skhead.weights import head_labels

__all__ = ["identity_scores"]

#: Heads per float64 work block.
_CHUNK = 64


def identity_scores(
    X: Any,
    *,
    fold_norm: bool = False,
    center: bool = False,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """Whether heads write back to the subspace that they read values from, and with which sign.

    ``pk_vo`` is the projection kernel between W_V and W_O^T of one head: high for a head that moves
    a subspace onto itself, blind to sign. ``identity_signed``, ``tr(W_V W_O) / (||W_V W_O||_F
    sqrt(rank))``, is +1 for a head that copies its subspace unchanged, -1 for one that erases it
    and near 0 for unrelated directions.

    Parameters
    ----------
    X : DataFrame, or array or Tensor of shape (n_heads, 4, d_model, d_head)
        Heads table, or W_Q, W_K, W_V and W_O transposed.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`.
    device : str, torch.device or None, default=None
        Where to compute.

    Returns
    -------
    DataFrame
        One row per head, columns ``pk_vo`` and ``identity_signed``.

    Raises
    ------
    HeadShapeError
        If a stack does not hold all four roles.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> skhead.identity_scores(heads).columns.tolist()
    ['pk_vo', 'identity_signed']
    """
    source = open_door(X, "identity_scores")
    if source.anonymous:
        raise HeadShapeError(
            "identity_scores: needs W_V and W_O of every head; pass a heads table or a stack of "
            "shape (n_heads, 4, d_model, d_head) for Q, K, V, O"
        )
    options: dict[str, Any] = {"fold_norm": fold_norm, "center": center, "device": device}
    subspaces = extract_subspaces(source, "VO", rank=None, caller="identity_scores", **options)
    bases = [subspaces.role(role) for role in "VO"]
    matrices = [source.read(role, **options) for role in "VO"]
    ranks = np.minimum(subspaces.ranks("V"), subspaces.ranks("O"))
    parts = []
    for start in range(0, len(source.heads), _CHUNK):
        rows = slice(start, start + _CHUNK)
        v, o = (_heads_of(basis.vectors, basis.index[rows]).double() for basis in bases)
        w_v, w_o = (_heads_of(read.tensor, read.index[rows]) for read in matrices)
        overlap = (v.mT @ o).square().sum((1, 2))
        signed = signed_identity(w_v, w_o, torch.as_tensor(ranks[rows], device=w_v.device))
        parts.append(torch.stack([overlap, signed], dim=1).cpu().numpy())
    labels = pd.Index(head_labels(source.heads))
    _refuse_zero_maps(np.concatenate(parts), labels)
    return pd.DataFrame(np.concatenate(parts), labels, ["pk_vo", "identity_signed"])


def _refuse_zero_maps(scores: NDArray[np.float64], labels: pd.Index) -> None:
    undefined = np.isnan(scores).any(axis=1)
    if undefined.any():
        label = labels[int(undefined.argmax())]
        raise DegenerateHeadError(
            f"identity_scores: the OV map of {label} is zero, so that it has no sign; "
            "drop the head, for example heads.drop(index=...)"
        )


def _heads_of(stack: torch.Tensor, index: NDArray[np.int64]) -> torch.Tensor:
    return stack[torch.as_tensor(index, device=stack.device)]
