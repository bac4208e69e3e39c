"""What a layer sees of each position on average over the tokens that may stand there."""

from __future__ import annotations

import torch

__all__ = ["NORMS", "mean_inputs"]

NORMS = ("layernorm", "rmsnorm", "none")
#: Rows of an embedding that are widened to float64 at once.
_ROWS = 4096


def mean_inputs(embedding: torch.Tensor, positions: torch.Tensor | None, norm: str) -> torch.Tensor:
    """Mean over tokens of the normalised sum of token and position.

    Token t at position i stands on the stream as ``E_t + P_i``. The norm in front of a layer
    divides it by its root mean square ``s_ti``, so that the mean over tokens is ``mean_t(E_t /
    s_ti) + P_i mean_t(1 / s_ti)``: a position counts as much as the tokens beside it let it.

    Parameters
    ----------
    embedding : Tensor of shape (n_vocab, d_model)
    positions : Tensor of shape (n_positions, d_model) or None
        None where nothing is added to the tokens: one row is returned, the same for all positions.
    norm : {"layernorm", "rmsnorm", "none"}
        "layernorm" takes the mean over d_model off each row first; "none" neither takes off nor
        divides. Gains are no part of it.

    Returns
    -------
    Tensor of shape (n_positions, d_model) or (1, d_model), float64

    Raises
    ------
    ValueError
        If the norm is unknown.

    Notes
    -----
    ``4 n_vocab n_positions d_model`` flops, a few thousand tokens at a time.
    """
    if norm not in NORMS:
        raise ValueError(f"mean_inputs: norm must be one of {', '.join(NORMS)}; got {norm!r}")
    d_model = embedding.shape[1]
    places = embedding.new_zeros(1, d_model) if positions is None else positions
    places = _centred(places.double(), norm)
    tokens = torch.zeros_like(places)
    weights = places.new_zeros(len(places), 1)
    for rows in embedding.split(_ROWS):
        block = _centred(rows.double(), norm)
        inverse = block.new_ones(len(places), len(block))
        if norm != "none":
            squares = places.square().sum(1)[:, None] + block.square().sum(1)[None, :]
            squares = (squares + 2.0 * places @ block.mT) / d_model
            inverse = torch.where(squares > 0, squares.clamp_min(0).rsqrt(), 0.0)
        tokens += inverse @ block
        weights += inverse.sum(1, keepdim=True)
    return (tokens + places * weights) / len(embedding)


def _centred(rows: torch.Tensor, norm: str) -> torch.Tensor:
    return rows - rows.mean(1, keepdim=True) if norm == "layernorm" else rows
