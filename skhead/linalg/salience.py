"""How strongly heads respond to tokens, and which tokens their answers point at, in blocks."""

from __future__ import annotations

import torch

from skhead.linalg.factored import map_factors, product_norms

__all__ = ["largest_in_rows", "largest_products", "map_gains", "written_vectors"]


def map_gains(
    w_v: torch.Tensor, w_o: torch.Tensor, vectors: torch.Tensor, *, scratch: int = 2**27
) -> torch.Tensor:
    """How much longer OV maps make each vector: ``||e W_V W_O|| / ||e||``.

    ``||e W_V W_O||^2`` is ``y G y^T`` with ``y = e W_V`` and the ``d_head x d_head`` Gram matrix
    ``G`` of W_O, so that the map itself is never formed.

    Parameters
    ----------
    w_v, w_o : Tensor of shape (n_heads, d_model, d_head)
        Residual coordinates, so `w_o` is W_O transposed.
    vectors : Tensor of shape (n_tokens, d_model)
    scratch : int, default=134217728
        Bytes for the vectors that are handled at once.

    Returns
    -------
    Tensor of shape (n_heads, n_tokens), dtype of the stacks
        0 for a vector or a map that is zero.
    """
    n_heads, d_model, d_head = w_v.shape
    factors, norms = map_factors(w_v, w_o)
    scale = torch.where(norms > 0, product_norms(w_v, w_o) / norms, 0.0)
    flat = factors.permute(1, 0, 2).reshape(d_model, n_heads * d_head)
    gains = torch.empty(n_heads, len(vectors), dtype=w_v.dtype, device=w_v.device)
    step = max(scratch // (8 * (n_heads * d_head + d_model)), 1)
    for start in range(0, len(vectors), step):
        rows = vectors[start : start + step].to(w_v)
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        units = torch.where(lengths > 0, rows / lengths, 0.0)
        cross = (units @ flat).view(len(rows), n_heads, d_head)
        gains[:, start : start + step] = torch.linalg.vector_norm(cross, dim=2).T
    return gains * scale.to(gains.dtype)[:, None]


def written_vectors(w_v: torch.Tensor, w_o: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """What each head writes for vectors of its own: ``e W_V W_O``.

    Parameters
    ----------
    w_v, w_o : Tensor of shape (n_heads, d_model, d_head)
        As for `map_gains`.
    vectors : Tensor of shape (n_heads, n_tokens, d_model)

    Returns
    -------
    Tensor of shape (n_heads, n_tokens, d_model)
    """
    return (vectors.to(w_v) @ w_v) @ w_o.mT


def largest_in_rows(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest entries of each row, falling; equal entries by rising column.

    Parameters
    ----------
    scores : Tensor of shape (n_rows, n_columns)
    k : int
        At least 1; all columns where there are fewer.

    Returns
    -------
    values, columns : Tensor of shape (n_rows, min(k, n_columns))
    """
    k = min(k, scores.shape[1])
    values, places = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    kept = places[:, :k].sort(dim=1).values
    tied = (values[:, k - 1] == values[:, -1]).nonzero().squeeze(1) if k < values.shape[1] else ()
    for row in tied:
        kept[row] = scores[row].argsort(descending=True, stable=True)[:k].sort().values
    found = scores.gather(1, kept)
    order = found.argsort(dim=1, descending=True, stable=True)
    return found.gather(1, order), kept.gather(1, order)


def largest_products(
    rows: torch.Tensor, vectors: torch.Tensor, k: int, *, scratch: int = 2**27
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest inner products of each row with many vectors, by blocks of these.

    Parameters
    ----------
    rows : Tensor of shape (n_rows, d_model)
    vectors : Tensor of shape (n_vectors, d_model)
    k : int
        At least 1; all vectors where there are fewer.
    scratch : int, default=134217728
        Bytes for the products that exist at once.

    Returns
    -------
    values, places : Tensor of shape (n_rows, min(k, n_vectors))
        Falling; equal products by rising place.
    """
    k = min(k, len(vectors))
    values = rows.new_empty(len(rows), 0)
    places = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    step = max(scratch // (8 * (len(rows) + rows.shape[1])), k)
    for start in range(0, len(vectors), step):
        products = rows @ vectors[start : start + step].to(rows).T
        found, inside = largest_in_rows(products, k)
        joined = torch.cat([values, found], dim=1)
        numbers = torch.cat([places, inside + start], dim=1)
        order = joined.argsort(dim=1, descending=True, stable=True)[:, :k]
        values, places = joined.gather(1, order), numbers.gather(1, order)
    return values, places
