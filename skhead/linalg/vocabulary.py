"""Token-to-token circuits of heads over a whole vocabulary, never as a matrix of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Vocabulary", "diagonal_lifts", "top_self_shares"]

#: Rows of an embedding that are widened to float64 at once.
_ROWS = 4096
#: Tokens against which self-logits are held first; each further block is twice as large.
_FIRST_BLOCK = 64
_LAST_BLOCK = 8192


@dataclass(frozen=True)
class Vocabulary:
    """Tokens at one end of a circuit, with the sums over them that scores need.

    Attributes
    ----------
    vectors : Tensor of shape (n_vocab, d_model)
    gram : Tensor of shape (d_model, d_model), float64
        ``vectors^T vectors``.
    mean : Tensor of shape (d_model,), float64
    """

    vectors: torch.Tensor
    gram: torch.Tensor
    mean: torch.Tensor

    @classmethod
    def of(cls, vectors: torch.Tensor) -> Vocabulary:
        """Sum over the rows of an embedding or unembedding.

        Parameters
        ----------
        vectors : Tensor of shape (n_vocab, d_model)
        """
        return cls(vectors, row_products(vectors, vectors), vectors.mean(0, dtype=torch.float64))


def row_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left^T right`` in float64, a few thousand rows at a time.

    Parameters
    ----------
    left, right : Tensor of shape (n_vocab, d_model)

    Returns
    -------
    Tensor of shape (d_model, d_model), float64
    """
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for start in range(0, len(left), _ROWS):
        rows = slice(start, start + _ROWS)
        total += left[rows].double().T @ right[rows].double()
    return total


def diagonal_lifts(
    left: torch.Tensor,
    right: torch.Tensor,
    small: torch.Tensor,
    inputs: Vocabulary,
    outputs: Vocabulary,
) -> torch.Tensor:
    """Mean diagonal entry of token circuits above the mean of all entries, in their deviations.

    Parameters
    ----------
    left, right : Tensor of shape (n_heads, d_model, d_head)
        What the head reads, and what faces the other end: W_V and W_O transposed, or W_Q and W_K.
    small : Tensor of shape (n_heads, d_head, d_head)
        From `skhead.linalg.circuits.small_circuits`, with ``outputs^T inputs`` as its core.
    inputs, outputs : Vocabulary
        Of the same tokens.

    Returns
    -------
    Tensor of shape (n_heads,), float64
        0 on average at random, where one standard deviation is about ``n_vocab^-1/2``; 0 where all
        entries are equal.
    """
    n_vocab = len(inputs.vectors)
    left, right = left.double(), right.double()
    diagonal = small.diagonal(dim1=-2, dim2=-1).sum(-1) / n_vocab
    mean = ((inputs.mean @ left) * (outputs.mean @ right)).sum(-1)
    read, written = left.mT @ (inputs.gram @ left), right.mT @ (outputs.gram @ right)
    variance = (read * written).sum((-2, -1)) / n_vocab**2 - mean.square()
    lifts: torch.Tensor = (diagonal - mean) / variance.clamp_min(0).sqrt()
    return torch.where(variance > 0, lifts, 0.0)


def top_self_shares(
    left: torch.Tensor,
    right: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Share of tokens whose largest entry in a head's token circuit is their own.

    Parameters
    ----------
    left, right : Tensor of shape (n_heads, d_model, d_head)
        As for `diagonal_lifts`.
    inputs, outputs : Tensor of shape (n_vocab, d_model)
        Of the same tokens.
    tokens : Tensor of shape (n_tokens,), int64
        Distinct tokens that are asked; each is held against the whole vocabulary.

    Returns
    -------
    Tensor of shape (n_heads,), float64
        In [0, 1]; ``1/n_vocab`` at random.

    Notes
    -----
    Blocks of tokens of falling norm are compared one after the other, and a token leaves as soon
    as another beats it, so that a head that copies nothing costs little. A tie does not beat.
    """
    order = torch.linalg.vector_norm(outputs, dim=1).argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    asked = _Asked(inputs[tokens], outputs[tokens], places[tokens])
    kept = [_never_beaten(*maps, asked, outputs, order) for maps in zip(left, right, strict=True)]
    return torch.tensor(kept, dtype=torch.float64, device=left.device) / len(tokens)


@dataclass(frozen=True)
class _Asked:
    """Tokens that are asked: as inputs, as outputs, and their places among the compared."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    places: torch.Tensor


def _never_beaten(
    left: torch.Tensor,
    right: torch.Tensor,
    asked: _Asked,
    outputs: torch.Tensor,
    order: torch.Tensor,
) -> int:
    """How many of the asked tokens no other token beats, for one head."""
    read = asked.inputs @ left
    own = (read * (asked.outputs @ right)).sum(1)
    places = asked.places
    start, size = 0, _FIRST_BLOCK
    while start < len(order) and len(read):
        block = outputs[order[start : start + size]]
        logits = (
            read @ right.T @ block.T if len(read) < right.shape[1] else read @ (block @ right).T
        )
        inside = ((places >= start) & (places < start + len(block))).nonzero().squeeze(1)
        logits[inside, places[inside] - start] = -torch.inf
        left_in = logits.amax(1) <= own
        read, own, places = read[left_in], own[left_in], places[left_in]
        start, size = start + size, min(2 * size, _LAST_BLOCK)
    return len(read)
