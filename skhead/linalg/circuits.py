"""Eigenvalues of circuits from token to token, from matrices of the size of a head.

The circuits of a head run from vocabulary to vocabulary: ``E W_V W_O U`` says which token a source
token promotes, ``E W_Q W_K^T E^T`` which token a token attends to. Their non-zero eigenvalues are
those of a ``d_head x d_head`` matrix, in which the vocabulary appears only through ``U^T E`` or
``E^T E``. A circuit is given here as ``left (core) right^T`` without ever being formed: `left` is
what the head reads, `right` what faces the other end, and `core` one ``(d_model, d_model)`` matrix
for all heads, or None for the identity.
"""

from __future__ import annotations

import torch

from skhead.linalg.factored import cross_products, runs

__all__ = [
    "composed_cosines",
    "composed_matching",
    "eigenvalue_ratios",
    "paired_matching",
    "phase_summaries",
    "small_circuits",
    "symmetric_shares",
]

#: Sum of the moduli of eigenvalues, relative to the factors' norms, that float64 cannot tell
#: from zero.
_ZERO = 1e-14


def small_circuits(
    left: torch.Tensor, right: torch.Tensor, core: torch.Tensor | None = None
) -> torch.Tensor:
    """``right^T core left``, whose eigenvalues are the non-zero ones of the whole circuit.

    Parameters
    ----------
    left, right : Tensor of shape (n_heads, d_model, d_head)
        W_V and W_O transposed for an OV circuit, W_Q and W_K for a QK circuit.
    core : Tensor of shape (d_model, d_model) or None, default=None
        ``U^T E`` for the copying of tokens (U of shape (n_vocab, d_model), rows as for E),
        ``E^T E`` for their matching; None for the circuit in the residual stream itself.

    Returns
    -------
    Tensor of shape (n_heads, d_head, d_head), float64

    Notes
    -----
    An OV circuit ``E W_V W_O U^T`` has the eigenvalues of ``W_O (U^T E) W_V``, and a QK circuit
    ``E W_Q W_K^T E^T`` those of ``W_K^T (E^T E) W_Q``. With a core it costs ``2 d_model^2 d_head``
    flops a head, without one ``2 d_model d_head^2``.
    """
    left, right = left.double(), right.double()
    return right.mT @ (left if core is None else core.double() @ left)


def eigenvalue_ratios(small: torch.Tensor) -> torch.Tensor:
    """Sum of the eigenvalues over the sum of their moduli.

    Parameters
    ----------
    small : Tensor of shape (..., r, r)

    Returns
    -------
    Tensor of shape (...), float64
        In [-1, 1]: 1 where all eigenvalues are positive, -1 where all are negative, near 0 where
        they surround the origin. The numerator is the trace, free of the error of eigenvalues.
        0 where all eigenvalues vanish: such a circuit leads nothing to itself or its opposite.
    """
    small = small.double()
    moduli = torch.linalg.eigvals(small).abs().sum(-1)
    trace = small.diagonal(dim1=-2, dim2=-1).sum(-1)
    defined = moduli > _ZERO * torch.linalg.matrix_norm(small)
    ratios: torch.Tensor = torch.where(defined, trace / moduli, 0.0)
    return ratios.clamp(-1.0, 1.0)


def phase_summaries(small: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the eigenvalues lie in the complex plane.

    Parameters
    ----------
    small : Tensor of shape (..., r, r)

    Returns
    -------
    positive : Tensor of shape (...), float64
        Share of the eigenvalues whose real part is positive; 0.5 on average at random.
    phase : Tensor of shape (...), float64
        Mean of the angle to the positive axis, in units of pi and weighted by modulus: 0 if all
        are positive, 1 if all are negative, 0.5 at random and where all vanish.
    """
    eigenvalues = torch.linalg.eigvals(small.double())
    moduli = eigenvalues.abs()
    total = moduli.sum(-1)
    positive = (eigenvalues.real > 0).double().mean(-1)
    phase = (moduli * eigenvalues.angle().abs()).sum(-1) / (total * torch.pi)
    return positive, torch.where(total > 0, phase, 0.5)


def symmetric_shares(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Share of the squared norm of ``left right^T`` that is symmetric.

    Parameters
    ----------
    left, right : Tensor of shape (n_heads, d_model, d_head)
        W_Q and W_K for a QK map.

    Returns
    -------
    Tensor of shape (n_heads,), float64
        In [0, 1]: 1 for a symmetric map, 0 for an antisymmetric one, near 0.5 at random. NaN where
        the map is zero.
    """
    left, right = left.double(), right.double()
    cross = right.mT @ left
    squared = ((left.mT @ left) * (right.mT @ right)).sum((-2, -1))
    return 0.5 + 0.5 * (cross * cross.mT).sum((-2, -1)) / squared


def composed_matching(
    w_q2: torch.Tensor,
    w_k2: torch.Tensor,
    w_v1: torch.Tensor,
    w_o1: torch.Tensor,
    gram_E: torch.Tensor,
) -> torch.Tensor:
    """Whether a head attends to the tokens after copies of its own, through every earlier head.

    If head 1 moves each token to the position after it, head 2 whose keys read that copy matches
    its query's token with the token *before* a position: ``E W_Q2 (W_V1 W_O1 W_K2)^T E^T``, the
    mechanism of induction. Returned is the eigenvalue ratio of that circuit (see
    `eigenvalue_ratios`), near 1 for induction heads paired with their previous-token heads.

    Parameters
    ----------
    w_q2, w_k2 : Tensor of shape (n_heads_2, d_model, d_head_2)
        Queries and keys of the later heads.
    w_v1, w_o1 : Tensor of shape (n_heads_1, d_model, d_head_1)
        Values and outputs of the earlier heads, W_O transposed.
    gram_E : Tensor of shape (d_model, d_model)
        ``E^T E`` of the token embedding.

    Returns
    -------
    Tensor of shape (n_heads_1, n_heads_2), float64
        In [-1, 1], near 0 at random; 0 where the circuit is zero.

    Notes
    -----
    With h heads a side, ``4 h^2 d_head^2 d_model`` flops for the products and the eigenvalues of
    h^2 matrices of the smaller d_head, which dominate: screen with `composed_cosines` when heads
    are many.
    """
    later, queries = w_k2.double(), gram_E.double() @ w_q2.double()
    each = 3 * 8 * len(w_q2) * max(w_v1.shape[2], w_q2.shape[2]) ** 2
    parts = []
    for rows in runs(len(w_v1), each):
        keys = cross_products(w_o1[rows].double(), later)
        reads = cross_products(w_v1[rows].double(), queries)
        parts.append(eigenvalue_ratios(_smaller(keys, reads)))
    return torch.cat(parts)


def composed_cosines(
    w_q2: torch.Tensor,
    w_k2: torch.Tensor,
    w_v1: torch.Tensor,
    w_o1: torch.Tensor,
    gram_E: torch.Tensor,
) -> torch.Tensor:
    """Trace of the composed matching circuit over the norms of its parts: a screen of all pairs.

    Parameters
    ----------
    w_q2, w_k2, w_v1, w_o1, gram_E
        As for `composed_matching`.

    Returns
    -------
    Tensor of shape (n_heads_1, n_heads_2)
        ``<W_V1 W_O1, (E^T E) W_Q2 W_K2^T> / (norms)``, a cosine in [-1, 1] of the dtype of `w_v1`;
        0 on average at random, with standard deviation ``1/d_model``. NaN where a map is zero.

    Notes
    -----
    The maps are formed a few columns at a time: ``2 d_model^2`` flops a pair and ``2 d_model^2
    d_head`` a head, against ``4 d_model d_head^2`` a pair for the circuits themselves.
    """
    queries = gram_E.to(w_q2.dtype) @ w_q2
    n_1, n_2, d_model = len(w_v1), len(w_q2), w_v1.shape[1]
    sums = w_v1.new_zeros(n_1, n_2)
    squares_1, squares_2 = w_v1.new_zeros(n_1), w_v1.new_zeros(n_2)
    for panel in runs(d_model, (n_1 + n_2) * d_model * w_v1.element_size()):
        moved = (w_v1[:, panel] @ w_o1.mT).flatten(1)
        matched = (queries[:, panel] @ w_k2.mT).flatten(1)
        sums += moved @ matched.T
        squares_1 += moved.square().sum(1)
        squares_2 += matched.square().sum(1)
    return sums / (squares_1[:, None] * squares_2[None, :]).sqrt()


def paired_matching(
    queries: torch.Tensor, w_k2: torch.Tensor, w_v1: torch.Tensor, w_o1: torch.Tensor
) -> torch.Tensor:
    """`composed_matching` of chosen pairs, one for each place of stacks of equal length.

    Parameters
    ----------
    queries : Tensor of shape (n_pairs, d_model, d_head_2)
        ``(E^T E) W_Q2``.
    w_k2, w_v1, w_o1 : Tensor of shape (n_pairs, d_model, d_head)

    Returns
    -------
    Tensor of shape (n_pairs,), float64
    """
    keys = w_o1.double().mT @ w_k2.double()
    reads = w_v1.double().mT @ queries.double()
    return eigenvalue_ratios(_smaller(keys, reads))


def _smaller(keys: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    """The composed circuit on the side with the smaller d_head."""
    if keys.shape[-2] < keys.shape[-1]:
        return reads @ keys.mT
    return keys.mT @ reads
