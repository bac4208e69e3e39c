"""The QK and OV maps of heads as factors, without any product of model width."""

from __future__ import annotations

import torch

__all__ = ["gram_roots", "map_factors", "product_norms", "signed_identity"]


def gram_roots(stack: torch.Tensor) -> torch.Tensor:
    """Matrices L with ``L L^T = W^T W``, one for each head.

    Parameters
    ----------
    stack : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    Tensor of shape (n_heads, d_head, d_head)
        The Cholesky factor; for a head whose Gram matrix is singular, the square root from its
        eigenvalues instead.
    """
    gram = stack.mT @ stack
    roots: torch.Tensor
    roots, failed = torch.linalg.cholesky_ex(gram)
    singular = failed != 0
    if singular.any():
        exact = stack[singular].double()
        eigenvalues, vectors = torch.linalg.eigh(exact.mT @ exact)
        scaled = vectors * eigenvalues.clamp_min(0).sqrt()[:, None, :]
        roots[singular] = scaled.to(roots.dtype)
    return roots


def map_factors(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Factors Y with ``||Y^T x|| = ||inner (outer^T x)||`` for every residual vector x.

    Whatever reads or writes through the map ``outer inner^T`` sees only ``Y = outer L`` with
    ``L L^T = inner^T inner``, of the shape of `outer`.

    Parameters
    ----------
    outer, inner : Tensor of shape (n_heads, d_model, d_head)
        The side that faces the other head, and the side that faces away.

    Returns
    -------
    Tensor of shape (n_heads, d_model, d_head)
        Its squared Frobenius norm is that of the map.
    """
    return outer @ gram_roots(inner)


def product_norms(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Frobenius norms of ``left right^T``, from ``d_head x d_head`` Gram matrices.

    Parameters
    ----------
    left, right : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    Tensor of shape (n_heads,), float64
    """
    a, b = left.double(), right.double()
    return ((a.mT @ a) * (b.mT @ b)).sum((-2, -1)).clamp_min(0).sqrt()


def signed_identity(w_v: torch.Tensor, w_o: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """How far each head's OV map is a multiple of a projector, with its sign.

    ``tr(W_V W_O) / (||W_V W_O||_F sqrt(rank))``: +1 for a head that copies its subspace unchanged,
    -1 for one that erases it, 0 on average for unrelated directions.

    Parameters
    ----------
    w_v, w_o : Tensor of shape (n_heads, d_model, d_head)
        Residual coordinates, so `w_o` is W_O transposed.
    ranks : Tensor of shape (n_heads,)
        Rank of each OV map.

    Returns
    -------
    Tensor of shape (n_heads,), float64
    """
    trace = (w_v.double() * w_o.double()).sum((-2, -1))
    return trace / (product_norms(w_v, w_o) * ranks.double().sqrt())
