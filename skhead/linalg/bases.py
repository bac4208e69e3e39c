"""Orthonormal bases of the column spaces of a stack of head matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Bases", "orthonormal_bases", "rank_tolerance"]

#: Beyond this ratio of largest to smallest kept singular value the float64 Gram matrix has lost
#: too many digits (its error grows with the square), and the matrix itself is decomposed.
GRAM_CONDITION_LIMIT = 1e4

#: Heads per float64 work block: large enough to keep the GEMM busy, small enough to stay in cache.
_CHUNK = 8


@dataclass(frozen=True)
class Bases:
    """Orthonormal bases of a stack, with what was measured on the way.

    Attributes
    ----------
    vectors : Tensor of shape (n_heads, d_model, max_rank)
        Orthonormal columns; columns past a head's rank are zero. Those of a head that is not kept
        whole are its left singular vectors, by falling singular value.
    ranks : Tensor of shape (n_heads,), int64
        Number of directions kept for each head.
    numerical_ranks : Tensor of shape (n_heads,), int64
        Singular values of each head above `rank_tolerance`, before any truncation.
    singular_values : Tensor of shape (n_heads, min(d_model, d_head)), float64
        The whole spectrum, falling.
    """

    vectors: torch.Tensor
    ranks: torch.Tensor
    numerical_ranks: torch.Tensor
    singular_values: torch.Tensor


def rank_tolerance(
    singular_values: torch.Tensor, d_model: int, d_head: int, eps: float
) -> torch.Tensor:
    """Singular values at or below this cannot be told from rounding of the stored entries.

    Rounding the entries of a matrix W to a format of relative spacing ``eps`` adds noise of
    spectral norm of about ``0.3 eps ||W||_F (d_model^-1/2 + d_head^-1/2)`` (the largest singular
    value of a random matrix of such entries). The tolerance is ``2 eps ||W||_F (d_model^-1/2 +
    d_head^-1/2)``, which also covers the rounding of a product of factors in the same format.

    Parameters
    ----------
    singular_values : Tensor of shape (..., k)
    d_model, d_head : int
        Shape of the matrices.
    eps : float
        Relative spacing of the format in which the entries were stored.

    Returns
    -------
    Tensor of shape (...,)
    """
    norms: torch.Tensor = torch.linalg.vector_norm(singular_values, dim=-1)
    spread = 1 / math.sqrt(d_model) + 1 / math.sqrt(d_head)
    return 2.0 * eps * spread * norms


def orthonormal_bases(
    stack: torch.Tensor, *, rank: int | float | None = None, eps: float | None = None
) -> Bases:
    """Orthonormal bases of the column spaces of many matrices at once.

    The float64 Gram matrix of each head is factored and multiplied back, which is cheaper than a
    float32 SVD and exact to float32 rounding while the condition number stays below 1e4; heads
    beyond that go through a float64 SVD of the matrix itself.

    Parameters
    ----------
    stack : Tensor of shape (n_heads, d_model, d_head)
        Finite floating-point matrices; 16-bit formats are promoted to float32.
    rank : int, float or None
        ``None`` keeps every direction above `rank_tolerance`; an int keeps at most so many; a float
        in (0, 1) keeps the fewest directions that hold this share of the squared Frobenius norm.
    eps : float, optional
        Relative spacing of the format the entries were stored in; that of `stack` by default.

    Returns
    -------
    Bases
        `vectors` has the dtype (at least float32) and the device of `stack`.
    """
    n_heads, d_model, d_head = stack.shape
    if eps is None:
        eps = torch.finfo(stack.dtype).eps
    out_dtype = torch.promote_types(stack.dtype, torch.float32)
    width = min(d_model, d_head)
    work_device = stack.device if stack.device.type != "mps" else torch.device("cpu")
    vectors = torch.empty(n_heads, d_model, width, dtype=out_dtype, device=stack.device)
    spectra = torch.empty(n_heads, width, dtype=torch.float64, device=work_device)
    kept = torch.empty(n_heads, dtype=torch.int64, device=work_device)
    measured = torch.empty_like(kept)
    buffers = torch.empty(
        2, min(_CHUNK, n_heads), d_model * d_head, dtype=torch.float64, device=work_device
    )
    for start in range(0, n_heads, _CHUNK):
        rows = slice(start, min(start + _CHUNK, n_heads))
        count = rows.stop - start
        block = buffers[0, :count].view(count, d_model, d_head).copy_(stack[rows])
        sigma, keep, measured[rows], mix = _orthonormaliser(block, rank, eps)
        out = buffers[1, :count].view(-1)[: count * d_model * width].view(count, d_model, width)
        vectors[rows] = torch.bmm(block, mix, out=out)
        spectra[rows], kept[rows] = sigma, keep
    max_rank = max(int(kept.max()), 1) if n_heads else width
    if max_rank < width:
        vectors = vectors[:, :, :max_rank].contiguous()
    return Bases(vectors, kept, measured, spectra)


def _orthonormaliser(
    block: torch.Tensor, rank: int | float | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spectrum, kept and numerical ranks, and matrices A for which ``block @ A`` is orthonormal."""
    n_heads, d_model, d_head = block.shape
    width = min(d_model, d_head)
    gram = block.mT @ block
    sigma = torch.linalg.eigvalsh(gram).flip(-1)[:, :width].clamp_min(0).sqrt()
    tolerance = rank_tolerance(sigma, d_model, d_head, eps)[:, None]
    hard = _beyond_gram(sigma, tolerance)
    if hard.any():
        sigma[hard] = torch.linalg.svdvals(block[hard])
    numerical = (sigma > tolerance).sum(-1)
    kept = _kept_ranks(sigma, numerical, rank)
    whole = ~hard & (kept == d_head)
    if whole.all():
        return sigma, kept, numerical, _inverse_root(gram)
    mix = block.new_zeros(n_heads, d_head, width)
    if whole.any():
        mix[whole] = _inverse_root(gram[whole])
    mix[hard] = _fix_signs(torch.linalg.svd(block[hard], full_matrices=False)[2].mT)
    rest = ~hard & ~whole
    mix[rest] = _fix_signs(torch.linalg.eigh(gram[rest])[1].flip(-1)[:, :, :width])
    used = torch.arange(width, device=block.device) < kept[:, None]
    scale = torch.where(used & ~whole[:, None], 1 / sigma, used.to(sigma.dtype))
    return sigma, kept, numerical, mix * scale[:, None, :]


def _beyond_gram(sigma: torch.Tensor, tolerance: torch.Tensor) -> torch.Tensor:
    """Heads whose smallest direction that may count is too small for the Gram matrix."""
    gram_noise = sigma[:, :1] / GRAM_CONDITION_LIMIT
    doubtful = (sigma < gram_noise) & (gram_noise > tolerance)
    return doubtful.any(-1)


def _inverse_root(gram: torch.Tensor) -> torch.Tensor:
    """Upper triangular A with ``A^T gram A = 1``, for Gram matrices of full rank."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram).mT, identity, upper=True)


def _kept_ranks(
    sigma: torch.Tensor, numerical: torch.Tensor, rank: int | float | None
) -> torch.Tensor:
    if rank is None:
        return numerical
    if rank < 1:
        energy = sigma.square().cumsum(-1)
        below = energy < rank * energy[:, -1:] * (1 - 1e-12)
        return torch.minimum(below.sum(-1) + 1, numerical)
    return numerical.clamp_max(rank)


def _fix_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Make the entry of largest size in every column positive, so that results are repeatable."""
    peak = torch.gather(vectors, -2, vectors.abs().argmax(dim=-2, keepdim=True))
    return torch.where(peak < 0, -vectors, vectors)
