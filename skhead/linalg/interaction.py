"""How latents of queries and keys meet in the attention logits of one head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["cross_block_ratio", "diagonal_share", "interaction_matrix"]


def interaction_matrix(
    W_Q: torch.Tensor,
    W_K: torch.Tensor,
    query_embeddings: torch.Tensor,
    key_embeddings: torch.Tensor,
) -> torch.Tensor:
    """``B^T W_Q W_K^T A``: what latent i of a query and latent j of a key add to their dot product.

    Parameters
    ----------
    W_Q, W_K : Tensor of shape (..., d_model, d_head)
        They make queries and keys of rows, ``x @ W_Q``.
    query_embeddings : Tensor of shape (..., d_model, n_query_latents)
        Direction of each latent in a query token.
    key_embeddings : Tensor of shape (..., d_model, n_key_latents)
        Direction of each latent in a token that is attended to.

    Returns
    -------
    Tensor of shape (..., n_query_latents, n_key_latents), float64

    Notes
    -----
    A head that matches equal latents, all with one weight, has a multiple of the identity. Its
    rank is at most d_head: with more latents than that, none is possible.

    Examples
    --------
    >>> import torch
    >>> from skhead.linalg.interaction import interaction_matrix
    >>> identity = torch.eye(2)
    >>> interaction_matrix(2 * identity, identity, identity, identity)
    tensor([[2., 0.],
            [0., 2.]], dtype=torch.float64)
    """
    queries = query_embeddings.double().mT @ W_Q.double()
    keys = key_embeddings.double().mT @ W_K.double()
    return queries @ keys.mT


def diagonal_share(interaction: torch.Tensor) -> torch.Tensor:
    """Share of the squared entries of an interaction matrix that lies on its diagonal.

    Parameters
    ----------
    interaction : Tensor of shape (..., n_latents, n_latents)

    Returns
    -------
    Tensor of shape (...)
        From 0 to 1, of a diagonal matrix; NaN for a matrix of zeros.

    Examples
    --------
    >>> import torch
    >>> from skhead.linalg.interaction import diagonal_share
    >>> diagonal_share(torch.ones(4, 4))
    tensor(0.2500)
    """
    energy = interaction.square()
    return energy.diagonal(dim1=-2, dim2=-1).sum(-1) / energy.sum((-2, -1))


def cross_block_ratio(interaction: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Frobenius norm between factors over that within them.

    Parameters
    ----------
    interaction : Tensor of shape (..., n_latents, n_latents)
    sizes : sequence of int
        Number of latents of each factor, in their order; together n_latents.

    Returns
    -------
    Tensor of shape (...)
        0 if factors only meet themselves; infinite, or NaN for a matrix of zeros, if they never do.

    Raises
    ------
    ValueError
        If the sizes do not add up to the number of latents.

    Examples
    --------
    >>> import torch
    >>> from skhead.linalg.interaction import cross_block_ratio
    >>> cross_block_ratio(torch.ones(4, 4), (2, 2))
    tensor(1.)
    """
    n_latents = interaction.shape[-1]
    if sum(sizes) != n_latents or interaction.shape[-2] != n_latents:
        raise ValueError(
            f"cross_block_ratio: blocks of {tuple(sizes)} latents do not make up a matrix of shape "
            f"{tuple(interaction.shape[-2:])}; give the number of latents of each factor"
        )
    factor = torch.repeat_interleave(torch.tensor(sizes, device=interaction.device))
    within = factor[:, None] == factor[None, :]
    energy = interaction.square()
    inside = energy.where(within, 0.0).sum((-2, -1))
    return (energy.where(~within, 0.0).sum((-2, -1)) / inside).sqrt()
