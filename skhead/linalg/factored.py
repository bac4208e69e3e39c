"""The QK and OV maps of heads as factors, without any product of model width."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from skhead.linalg.devices import exact_device
from skhead.linalg.precision import wide

__all__ = [
    "Spectrum",
    "cross_products",
    "facing_factors",
    "frobenius_norms",
    "gram_roots",
    "map_factors",
    "map_spectra",
    "product_norms",
    "runs",
    "signed_identity",
    "spectrum_summaries",
]

#: Bytes of scratch for what is handled at once.
_SCRATCH = 2**27
#: Bytes of a product that stays in a processor's cache.
_CACHED = 2**21
#: Norm of a map, relative to those of its sides, below which it is formed in float64.
_CANCELLING = 1e-2
#: Relative norm that float64 cannot tell from zero.
_ZERO = 1e-13


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
        exact = stack[singular].to(exact_device(stack.device)).double()
        eigenvalues, vectors = torch.linalg.eigh(exact.mT @ exact)
        scaled = vectors * eigenvalues.clamp_min(0).sqrt()[:, None, :]
        roots[singular] = scaled.to(roots.device, roots.dtype)
    return roots


def map_factors(outer: torch.Tensor, inner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors Y with ``||Y^T x||`` proportional to ``||inner (outer^T x)||``.

    Whatever reads or writes through the map ``outer inner^T`` sees only ``Y = outer L`` with ``L
    L^T = inner^T inner``, of the shape of `outer`. Where the two sides nearly cancel, the product
    lies in directions that float32 Gram matrices lose, and is formed in float64.

    Parameters
    ----------
    outer, inner : Tensor of shape (n_heads, d_model, d_head)
        The side that faces the other head, and the side that faces away.

    Returns
    -------
    factors : Tensor of shape (n_heads, d_model, d_head)
        Of the scale of 1, whatever the scale of the sides.
    norms : Tensor of shape (n_heads,), float64
        Their Frobenius norms; 0 where the map is zero.
    """
    (outer, outer_norms), (inner, inner_norms) = (_within_range(x) for x in (outer, inner))
    scale = _reciprocal(outer_norms * inner_norms)
    factors = outer @ _scaled(gram_roots(inner), scale)
    norms = frobenius_norms(factors)
    weak = norms < _CANCELLING
    if weak.any():
        exact = _exact_factors(outer[weak], inner[weak], scale[weak])
        factors[weak], norms[weak] = exact
    return factors, norms


def facing_factors(
    first: torch.Tensor, second: torch.Tensor, overwrite: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Factors of both sides of the maps ``first second^T``, see `map_factors`.

    Parameters
    ----------
    first, second : Tensor of shape (n_heads, d_model, d_head)
        The sides; each faces the other head once and faces away once.
    overwrite : bool, default=False
        Put the factors into the memory of the sides, unless a head of theirs is of extreme scale.

    Returns
    -------
    list of (Tensor, Tensor)
        Factors and norms where `first` faces the other head, and where `second` does.
    """
    (first, first_norms), (second, second_norms) = (_within_range(x) for x in (first, second))
    scale = _reciprocal(first_norms * second_norms)
    roots = gram_roots(first), gram_roots(second)
    weak = wide(torch.linalg.matrix_norm(roots[0].mT @ roots[1])) * scale < _CANCELLING
    exact = [
        _exact_factors(outer[weak], inner[weak], scale[weak])
        for outer, inner in ((first, second), (second, first))
    ]
    found = []
    for outer, inner_roots, (factors_of_weak, norms_of_weak) in zip(
        (first, second), roots[::-1], exact, strict=True
    ):
        factors = outer if overwrite else torch.empty_like(outer)
        _multiply(outer, _scaled(inner_roots, scale), factors)
        norms = frobenius_norms(factors)
        factors[weak], norms[weak] = factors_of_weak, norms_of_weak
        found.append((factors, norms))
    return found


def _exact_factors(
    outer: torch.Tensor, inner: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of norm 1 from float64 products; where the map is zero, the norm is 0."""
    exact = wide(outer) @ _scaled(gram_roots(wide(inner)), scale)
    norms = frobenius_norms(exact)
    factors = _scaled(exact, _reciprocal(norms)).to(outer.dtype)
    return factors, (norms > _ZERO).to(norms.dtype)


def _multiply(stack: torch.Tensor, mix: torch.Tensor, out: torch.Tensor) -> None:
    """Products of every head's matrix, which may lie in the memory of `out`, some at a time."""
    block = _CACHED if stack.device.type == "cpu" else _SCRATCH
    step = max(block // max(stack[:1].nbytes, 1), 1)
    for start in range(0, len(stack), step):
        some = slice(start, start + step)
        out[some] = torch.bmm(stack[some], mix[some])


def _within_range(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack whose Gram matrices neither overflow nor underflow, and its Frobenius norms.

    Heads of extreme scale are brought to norm 1, which no score depends on.
    """
    norms = frobenius_norms(stack)
    extreme = (norms > 0) & ((norms < 1e-6) | (norms > 1e6))
    if extreme.any():
        stack = _scaled(stack, torch.where(extreme, _reciprocal(norms), 1.0))
        norms = frobenius_norms(stack)
    return stack, norms


def frobenius_norms(stack: torch.Tensor) -> torch.Tensor:
    """Frobenius norms; only the short sums along a row are left to the dtype.

    Parameters
    ----------
    stack : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    Tensor of shape (n_heads,), float64
    """
    rows = wide(torch.linalg.vector_norm(stack, dim=2))
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _reciprocal(norms: torch.Tensor) -> torch.Tensor:
    return torch.where(norms > 0, 1 / norms, 0.0)


def _scaled(stack: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return stack * scale[:, None, None].to(stack.dtype)


def product_norms(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Frobenius norms of ``left right^T``, from ``d_head x d_head`` Gram matrices.

    Parameters
    ----------
    left, right : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    Tensor of shape (n_heads,), float64
    """
    step = max(_SCRATCH // (2 * 8 * left.shape[1] * left.shape[2]), 1)
    parts = []
    for a, b in zip(left.split(step), right.split(step), strict=True):
        a, b = a.double(), b.double()
        parts.append(((a.mT @ a) * (b.mT @ b)).sum((-2, -1)).clamp_min(0).sqrt())
    return torch.cat(parts)


def cross_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left_i^T right_j`` of all pairs of heads, as one product.

    Parameters
    ----------
    left, right : Tensor of shape (n_left, d_model, r), (n_right, d_model, s)

    Returns
    -------
    Tensor of shape (n_left, n_right, r, s)
    """
    (n_left, d_model, r), (n_right, _, s) = left.shape, right.shape
    flat = left.mT.reshape(n_left * r, d_model) @ right.mT.reshape(n_right * s, d_model).T
    return flat.view(n_left, r, n_right, s).transpose(1, 2)


def runs(length: int, bytes_each: int) -> list[slice]:
    """Runs of heads, or of whatever lies side by side, whose work fits into 128 MiB.

    Parameters
    ----------
    length : int
    bytes_each : int
        What the work on one of them takes; a run holds one at least.

    Returns
    -------
    list of slice
    """
    step = max(_SCRATCH // bytes_each, 1)
    return [slice(start, start + step) for start in range(0, length, step)]


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


def map_spectra(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Singular values of ``left right^T``, from ``d_head x d_head`` matrices.

    Parameters
    ----------
    left, right : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    Tensor of shape (n_heads, d_head), float64
        Falling. Those below about 1e-8 of the largest are lost in rounding.
    """
    product = gram_roots(left.double()).mT @ gram_roots(right.double())
    values: torch.Tensor = torch.linalg.svdvals(product)
    return values


@dataclass(frozen=True)
class Spectrum:
    """How evenly a map uses its directions, each of shape (n_heads,) and float64.

    Attributes
    ----------
    effective_rank : Tensor
        Exponential of the entropy of the singular values as shares of their sum, 1 to d_head.
    stable_rank : Tensor
        Squared Frobenius norm over squared spectral norm, 1 to d_head.
    entropy : Tensor
        Entropy of the squared singular values as shares of their sum, over ``log(d_head)``: 0 for
        one direction, 1 for all alike. 0 where d_head is 1.

    References
    ----------
    O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO
    (2007).
    """

    effective_rank: torch.Tensor
    stable_rank: torch.Tensor
    entropy: torch.Tensor


def spectrum_summaries(singular_values: torch.Tensor) -> Spectrum:
    """Summaries of the singular values of maps.

    Parameters
    ----------
    singular_values : Tensor of shape (n_heads, d_head)
        Falling, the first of each head above zero.

    Returns
    -------
    Spectrum
    """
    squared = singular_values.double().square()
    n_values = singular_values.shape[1]
    entropy = _entropies(squared)
    return Spectrum(
        effective_rank=_entropies(singular_values.double()).exp(),
        stable_rank=squared.sum(1) / squared[:, 0],
        entropy=entropy / math.log(n_values) if n_values > 1 else torch.zeros_like(entropy),
    )


def _entropies(weights: torch.Tensor) -> torch.Tensor:
    shares = weights / weights.sum(1, keepdim=True)
    entropies: torch.Tensor = -torch.special.xlogy(shares, shares).sum(1)
    return entropies
