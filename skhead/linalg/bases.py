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
        Orthonormal columns, by falling singular value; columns past a head's rank are zero.
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

    The float64 Gram matrix of each head is decomposed and multiplied back, which is as cheap as a
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
    for start in range(0, n_heads, _CHUNK):
        rows = slice(start, start + _CHUNK)
        block = stack[rows].to(device=work_device, dtype=torch.float64)
        left, sigma = _left_singular(block, eps)
        numerical = (sigma > rank_tolerance(sigma, d_model, d_head, eps)[:, None]).sum(-1)
        keep = _kept_ranks(sigma, numerical, rank)
        left = (
            _fix_signs(left) * (torch.arange(width, device=work_device) < keep[:, None])[:, None, :]
        )
        vectors[rows] = left.to(device=stack.device, dtype=out_dtype)
        spectra[rows], measured[rows], kept[rows] = sigma, numerical, keep
    max_rank = max(int(kept.max()), 1) if n_heads else width
    if max_rank < width:
        vectors = vectors[:, :, :max_rank].contiguous()
    return Bases(vectors, kept, measured, spectra)


def _left_singular(block: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors and singular values of float64 matrices, falling."""
    d_model, d_head = block.shape[-2:]
    if d_head > d_model:
        return _svd(block)
    eigenvalues, right = torch.linalg.eigh(block.mT @ block)
    sigma = eigenvalues.flip(-1).clamp_min(0).sqrt()
    left = (block @ right.flip(-1)) / torch.where(sigma > 0, sigma, 1.0)[:, None, :]
    hard = _beyond_gram(sigma, rank_tolerance(sigma, d_model, d_head, eps))
    if hard.any():
        left[hard], sigma[hard] = _svd(block[hard])
    return left, sigma


def _beyond_gram(sigma: torch.Tensor, tolerance: torch.Tensor) -> torch.Tensor:
    """Heads whose smallest direction that may count is too small for the Gram matrix."""
    gram_noise = sigma[:, :1] / GRAM_CONDITION_LIMIT
    doubtful = (sigma < gram_noise) & (gram_noise > tolerance[:, None])
    return doubtful.any(-1)


def _svd(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    left, sigma, _ = torch.linalg.svd(block, full_matrices=False)
    return left, sigma


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
    peak = vectors.abs().argmax(dim=-2, keepdim=True)
    signs = torch.gather(vectors, -2, peak).sign()
    return vectors * torch.where(signs == 0, torch.ones_like(signs), signs)
