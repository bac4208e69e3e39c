"""Orthonormal bases of the column spaces of a stack of head matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from skhead.linalg.devices import exact_device, is_out_of_memory
from skhead.linalg.precision import fast_float32_matmul

__all__ = ["Bases", "orthonormal_bases", "rank_tolerance"]

#: Beyond this ratio of largest to smallest kept singular value the float64 Gram matrix has lost
#: too many digits (its error grows with the square), and the matrix itself is decomposed.
GRAM_CONDITION_LIMIT = 1e4

#: Up to this ratio, a head of full rank is orthonormal once it was orthonormalised twice.
_TWICE_CONDITION_LIMIT = 1e6
#: While ``||W||_F ||W^+||_F`` is at most so many times its least value, d_head, and not above the
#: second number, a float32 product with the inverse Cholesky factor is orthonormal to 4e-6.
_SINGLE_CONDITION = 8, 512
#: Numbers of the smallest matrix that is multiplied in float32: the last digits of products of
#: smaller ones depend on how many there are, and nothing is gained.
_SINGLE_SIZE = 2**10
#: How far above the tolerance a smallest singular value is to be that comes with an error of 1%.
_MARGIN = 1.1

#: Heads per float64 work block: large enough to keep the GEMM busy, small enough to stay in cache.
_CHUNK = 8
#: Bytes of a work block off the CPU, where small products leave most of the device idle.
_DEVICE_BLOCK_BYTES = 2**28


@dataclass(frozen=True)
class Bases:
    """Orthonormal bases of a stack, with what was measured on the way.

    Attributes
    ----------
    vectors : Tensor of shape (n_heads, d_model, max_rank)
        Orthonormal columns; those past a head's rank are zero. Where `rank` was given, they are the
        left singular vectors by falling singular value.
    ranks : Tensor of shape (n_heads,), int64
        Number of directions kept for each head.
    numerical_ranks : Tensor of shape (n_heads,), int64
        Singular values of each head above `rank_tolerance`, before any truncation.
    """

    vectors: torch.Tensor
    ranks: torch.Tensor
    numerical_ranks: torch.Tensor


def rank_tolerance(
    norms: torch.Tensor, d_model: int, d_head: int, eps: float | torch.Tensor
) -> torch.Tensor:
    """Singular values at or below this cannot be told from rounding of the stored entries.

    Rounding the entries of a matrix W to a format of relative spacing ``eps`` adds noise of
    spectral norm of about ``0.3 eps ||W||_F (d_model^-1/2 + d_head^-1/2)`` (the largest singular
    value of a random matrix of such entries). The tolerance is ``2 eps ||W||_F (d_model^-1/2 +
    d_head^-1/2)``, which also covers the rounding of a product of factors in the same format, and
    ``max(d_model, d_head) ||W||_F`` float64 spacings for the decomposition itself.

    Parameters
    ----------
    norms : Tensor of shape (...,)
        Frobenius norms of the matrices.
    d_model, d_head : int
        Shape of the matrices.
    eps : float or Tensor of shape (...,)
        Relative spacing of the format in which the entries were stored.

    Returns
    -------
    Tensor of shape (...,)
    """
    spread = 1 / math.sqrt(d_model) + 1 / math.sqrt(d_head)
    decomposition = max(d_model, d_head) * torch.finfo(torch.float64).eps
    return (2.0 * spread * eps + decomposition) * norms


def orthonormal_bases(
    stack: torch.Tensor,
    *,
    rank: int | float | None = None,
    eps: float | torch.Tensor | None = None,
    overwrite: bool = False,
    shrink: Callable[[int, str], int] | None = None,
) -> Bases:
    """Orthonormal bases of the column spaces of many matrices at once.

    The float64 Gram matrix of each head is factored and multiplied back, which is cheaper than a
    float32 SVD and exact to float32 rounding while the condition number stays below 1e4; float32
    heads are multiplied in float32 below about 60. A head of full rank is orthonormalised twice up
    to about 5e5; all others beyond go through a float64 SVD of the matrix itself. On a GPU, larger
    blocks of heads are worked on, and the host waits once for each to learn which of its heads need
    more than the Cholesky factor.

    Parameters
    ----------
    stack : Tensor of shape (n_heads, d_model, d_head)
        Finite floating-point matrices; 16-bit formats are promoted to float32.
    rank : int, float or None
        ``None`` keeps every direction above `rank_tolerance`; an int keeps at most so many; a float
        in (0, 1) keeps the fewest directions that hold this share of the squared Frobenius norm.
    eps : float or Tensor of shape (n_heads,), optional
        Relative spacing of the format the entries were stored in; that of `stack` by default.
    overwrite : bool, default=False
        Put the bases into the memory of `stack` where they fit.
    shrink : callable, optional
        Asked for a smaller number of heads in a block when the device's memory does not hold the
        work on so many; told that number and what the device said. By default the device's error
        is raised.

    Returns
    -------
    Bases
        `vectors` has the dtype (at least float32) and the device of `stack`.
    """
    n_heads, d_model, d_head = stack.shape
    out_dtype = torch.promote_types(stack.dtype, torch.float32)
    width = min(d_model, d_head)
    work_device = exact_device(stack.device)
    if overwrite and width == d_head and out_dtype == stack.dtype:
        vectors = stack
    else:
        vectors = torch.empty(n_heads, d_model, width, dtype=out_dtype, device=stack.device)
    spacing = torch.finfo(stack.dtype).eps if eps is None else eps
    spacings = torch.as_tensor(spacing, dtype=torch.float64, device=work_device).expand(n_heads)
    kept = torch.empty(n_heads, dtype=torch.int64, device=work_device)
    measured = torch.empty_like(kept)

    def work(rows: slice, buffers: torch.Tensor) -> None:
        kept[rows], measured[rows] = _fill_block(
            stack[rows], vectors[rows], rank, spacings[rows], buffers
        )

    def scratch(size: int) -> torch.Tensor:
        entries = 2, size, d_model * d_head
        return torch.empty(entries, dtype=torch.float64, device=work_device)

    _in_blocks(n_heads, _block_size(work_device, d_model, d_head), scratch, work, shrink)
    max_rank = max(int(kept.max()), 1) if n_heads else width
    if max_rank < width:
        vectors = vectors[:, :, :max_rank].contiguous()
    return Bases(vectors, kept, measured)


def _in_blocks(
    n_heads: int,
    size: int,
    scratch: Callable[[int], torch.Tensor],
    work: Callable[[slice, torch.Tensor], None],
    shrink: Callable[[int, str], int] | None,
) -> None:
    """Work on blocks of heads, on smaller ones from where a device has no memory for more."""
    start, size, buffers = 0, min(size, max(n_heads, 1)), None
    while start < n_heads:
        try:
            if buffers is None:
                buffers = scratch(size)
            work(slice(start, min(start + size, n_heads)), buffers)
        except RuntimeError as error:
            if shrink is None or not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        else:
            start += size
            continue
        buffers = None
        size = shrink(size, reason)


def _block_size(device: torch.device, d_model: int, d_head: int) -> int:
    """Heads per float64 work block."""
    if device.type == "cpu":
        return _CHUNK
    return max(_DEVICE_BLOCK_BYTES // (8 * d_model * d_head), _CHUNK)


def _fill_block(
    stack: torch.Tensor,
    out: torch.Tensor,
    rank: int | float | None,
    eps: torch.Tensor,
    buffers: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the bases of a block of heads into `out`; their kept and numerical ranks.

    `out`, which may be the memory of `stack`, is written last of all, so that a block of which the
    device has no memory for something can be taken again.
    """
    count, d_model, d_head = stack.shape
    block = buffers[0, :count].view(count, d_model, d_head).copy_(stack)
    found = _orthonormaliser(block, rank, eps)
    single = found.single if out.dtype == torch.float32 and stack.device == block.device else None
    if single is None or not single.any():
        bases = _multiplied(block, found.mix, buffers[1])
    else:
        bases = _multiplied(stack, found.mix.float(), buffers[1].view(torch.float32))
        for head in (~single).nonzero().flatten().tolist():
            bases[head] = block[head] @ found.mix[head]
    out.copy_(bases)
    return found.kept, found.numerical


def _multiplied(block: torch.Tensor, mix: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Bases of some heads, in the precision and the memory of a buffer."""
    shape = len(block), block.shape[1], mix.shape[2]
    bases = buffer.flatten()[: math.prod(shape)].view(shape)
    with fast_float32_matmul(bases.device):
        return torch.bmm(block.to(bases.dtype), mix, out=bases)


class _Orthonormaliser(NamedTuple):
    """Of a block of heads, matrices A for which ``block @ A`` is orthonormal, and the ranks.

    `single`, on the host, tells for which of them a float32 product is; None says none.
    """

    mix: torch.Tensor
    kept: torch.Tensor
    numerical: torch.Tensor
    single: torch.Tensor | None


def _orthonormaliser(
    block: torch.Tensor, rank: int | float | None, eps: torch.Tensor
) -> _Orthonormaliser:
    """What makes the bases of a block of heads, and their kept and numerical ranks.

    A head that is plainly of full rank and kept whole takes the inverse Cholesky factor of its Gram
    matrix; the others are decomposed.
    """
    n_heads, d_model, d_head = block.shape
    gram = block.mT @ block
    norms = gram.diagonal(dim1=1, dim2=2).sum(-1).sqrt()
    tolerance = rank_tolerance(norms, d_model, d_head, eps)
    if rank is not None:
        return _Orthonormaliser(*_by_spectrum(block, gram, tolerance, rank), None)
    mix, smallest = _inverse_roots(gram)
    plain = smallest > torch.maximum(tolerance, norms / GRAM_CONDITION_LIMIT)
    again = smallest > torch.maximum(_MARGIN * tolerance, norms / _TWICE_CONDITION_LIMIT)
    times, most = _SINGLE_CONDITION
    easy = plain & (smallest * min(times * d_head, most) > norms)
    easy &= d_model * d_head >= _SINGLE_SIZE
    done, again, easy = torch.stack([plain, again & ~plain, easy]).cpu()
    kept = torch.full((n_heads,), d_head, dtype=torch.int64, device=block.device)
    if done.all():
        return _Orthonormaliser(mix, kept, kept, easy)
    if again.any():
        places = again.nonzero().squeeze(1).to(block.device)
        mix[places], good = _twice(block[places], mix[places])
        done[again] = good.cpu()
    numerical = kept.clone()
    mix = mix[:, :, : min(d_model, d_head)]
    if not done.all():
        rest = (~done).nonzero().squeeze(1).to(block.device)
        mix[rest], kept[rest], numerical[rest] = _by_spectrum(
            block[rest], gram[rest], tolerance[rest], rank
        )
    return _Orthonormaliser(mix, kept, numerical, easy)


def _twice(block: torch.Tensor, roots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormalise what is nearly orthonormal once more; the product of both, and if it holds."""
    nearly = block @ roots
    second, smallest = _inverse_roots(nearly.mT @ nearly)
    # Of d_head orthonormal columns, 1 / ||A||_F is d_head^-1/2.
    return roots @ second, smallest * block.shape[2] ** 0.5 > 0.5


def _inverse_roots(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper triangular A with ``A^T gram A = 1``, and ``1 / ||A||_F``.

    This is a lower bound of the smallest singular value of the head, and 0 where there is no
    Cholesky factor; there, A is the identity.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    lower, failed = torch.linalg.cholesky_ex(gram)
    lower = torch.where((failed == 0)[:, None, None], lower, identity)
    roots = torch.linalg.solve_triangular(lower.mT, identity, upper=True)
    bound = 1 / torch.linalg.vector_norm(roots, dim=(1, 2))
    return roots, torch.where(failed == 0, bound, 0.0)


def _by_spectrum(
    block: torch.Tensor, gram: torch.Tensor, tolerance: torch.Tensor, rank: int | float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled right singular vectors, by falling singular value, with kept and numerical ranks.

    They come from the Gram matrix, and from the matrix itself where a singular value that may count
    is too small for the Gram matrix.
    """
    width = min(block.shape[1:])
    eigenvalues, vectors = torch.linalg.eigh(gram)
    sigma = eigenvalues.flip(-1)[:, :width].clamp_min(0).sqrt()
    right = vectors.flip(-1)[:, :, :width]
    floor = sigma[:, 0] / GRAM_CONDITION_LIMIT
    hard = (sigma < floor[:, None]).any(-1) & (floor > tolerance)
    if hard.any():
        _, sigma[hard], rows = torch.linalg.svd(block[hard], full_matrices=False)
        right[hard] = rows.mT
    numerical = (sigma > tolerance[:, None]).sum(-1)
    kept = _kept_ranks(sigma, numerical, rank)
    used = torch.arange(width, device=block.device) < kept[:, None]
    scale = torch.where(used, 1 / sigma, 0.0)
    return _fix_signs(right) * scale[:, None, :], kept, numerical


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
