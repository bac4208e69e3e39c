"""What heads attend to by position alone: the positional part of their QK circuits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skhead.linalg.rotary import rotate

__all__ = [
    "PositionScores",
    "learned_position_logits",
    "position_scores",
    "rotary_position_logits",
    "unit_rows",
]

#: Queries at the first two positions cannot tell the first token from the previous or current one.
_FIRST_QUERY = 2


@dataclass(frozen=True)
class PositionScores:
    """Attention by position above uniform attention, each of shape (n_heads,) and float64.

    1 is all attention on that position, 0 as much as uniform attention gives, slightly below 0
    less.

    Attributes
    ----------
    previous, current, first : Tensor
    """

    previous: torch.Tensor
    current: torch.Tensor
    first: torch.Tensor


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows at root mean square 1, as a norm in front of a layer makes them; zero rows stay.

    Parameters
    ----------
    rows : Tensor of shape (n_rows, d_model)

    Returns
    -------
    Tensor of shape (n_rows, d_model), float64
    """
    rows = rows.double()
    sizes = rows.square().mean(1, keepdim=True).sqrt()
    return rows / torch.where(sizes > 0, sizes, 1.0)


def learned_position_logits(
    positions: torch.Tensor, w_q: torch.Tensor, w_k: torch.Tensor
) -> torch.Tensor:
    """Attention logits ``P W_Q W_K^T P^T / sqrt(d_head)`` between learned positions.

    Parameters
    ----------
    positions : Tensor of shape (n_positions, d_model)
    w_q, w_k : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    Tensor of shape (n_heads, n_positions, n_positions), float64
        Rows are queries.
    """
    positions = positions.double()
    queries, keys = positions @ w_q.double(), positions @ w_k.double()
    logits: torch.Tensor = queries @ keys.mT / w_q.shape[2] ** 0.5
    return logits


def rotary_position_logits(
    token: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    n_positions: int,
    *,
    frequencies: torch.Tensor,
    n_dims: int,
    pairing: str,
) -> torch.Tensor:
    """Attention logits under rotary positions, averaged over independent tokens.

    The average of ``(x W_Q) R (y W_K)^T`` over tokens x and y is that of the mean token with
    itself, and depends on the offset between query and key alone.

    Parameters
    ----------
    token : Tensor of shape (d_model,)
        Mean token embedding.
    w_q, w_k : Tensor of shape (n_heads, d_model, d_head)
    n_positions : int
    frequencies, n_dims, pairing
        As for `skhead.linalg.rotary.rotate`.

    Returns
    -------
    Tensor of shape (n_heads, n_positions, n_positions), float64
        Rows are queries.
    """
    queries, keys = token.double() @ w_q.double(), token.double() @ w_k.double()
    by_offset = torch.stack(
        [
            (rotate(queries, offset, frequencies, n_dims, pairing) * keys).sum(1)
            for offset in range(n_positions)
        ],
        dim=1,
    )
    places = torch.arange(n_positions, device=w_q.device)
    offsets = (places[:, None] - places[None, :]).clamp_min(0)
    logits: torch.Tensor = by_offset[:, offsets] / w_q.shape[2] ** 0.5
    return logits


def position_scores(logits: torch.Tensor) -> PositionScores:
    """Causal attention to the previous, the current and the first position, above uniform.

    Parameters
    ----------
    logits : Tensor of shape (n_heads, n_positions, n_positions)
        At least 3 positions; entries above the diagonal are ignored.

    Returns
    -------
    PositionScores
        Means over the queries from the third position on, ``(attention - uniform) / (1 -
        uniform)`` with the mean of ``1/(i + 1)`` as uniform.

    Raises
    ------
    ValueError
        If there are fewer than 3 positions.
    """
    n_positions = logits.shape[-1]
    if n_positions <= _FIRST_QUERY:
        raise ValueError(
            f"position_scores: needs at least {_FIRST_QUERY + 1} positions to tell the first, the "
            f"previous and the current one apart, got {n_positions}."
        )
    later = torch.ones(n_positions, n_positions, dtype=torch.bool, device=logits.device).triu(1)
    attention = logits.double().masked_fill(later, -torch.inf).softmax(-1)
    queries = torch.arange(_FIRST_QUERY, n_positions, device=logits.device)
    uniform = float((1.0 / (queries.double() + 1.0)).mean())

    def above_uniform(keys: torch.Tensor) -> torch.Tensor:
        return (attention[:, queries, keys].mean(1) - uniform) / (1.0 - uniform)

    return PositionScores(
        previous=above_uniform(queries - 1),
        current=above_uniform(queries),
        first=above_uniform(torch.zeros_like(queries)),
    )
