"""Rotary positions as an orthogonal map on the columns of query and key matrices."""

from __future__ import annotations

import torch

__all__ = ["PAIRINGS", "rotate"]

#: ``"half"``: coordinate i turns with i + n_dims / 2. ``"adjacent"``: 2 i turns with 2 i + 1.
PAIRINGS = ("half", "adjacent")


def rotate(
    stack: torch.Tensor,
    offset: float,
    frequencies: torch.Tensor,
    n_dims: int,
    pairing: str,
) -> torch.Tensor:
    """Turn the columns of query or key matrices as rotary embeddings turn a query or key.

    ``x @ rotate(W, p, ...)`` is what a model makes of the query or key ``x @ W`` at position p. As
    the rotation is orthogonal and positions add, the score between a query at position i and a key
    at position j is ``x @ rotate(W_Q, i - j, ...) @ W_K.T @ y``.

    Parameters
    ----------
    stack : Tensor of shape (..., d_head)
        The last axis holds the coordinates of a head; ``(n_heads, d_model, d_head)`` as a rule.
    offset : float
        Position, or relative position, in tokens. May be negative.
    frequencies : Tensor of shape (n_dims / 2,)
        Radians per position, one for each pair of coordinates.
    n_dims : int
        How many leading coordinates are turned; the others stay. Even, at most d_head.
    pairing : {"half", "adjacent"}
        Which two coordinates turn together: i and i + n_dims / 2, or 2 i and 2 i + 1.

    Returns
    -------
    Tensor of the shape, dtype and device of `stack`
        A new tensor. Angles are formed in float64.

    Raises
    ------
    ValueError
        If `n_dims` is odd or above d_head, the frequencies are not n_dims / 2 finite numbers, or
        the pairing is none of the two.

    References
    ----------
    J. Su et al., "RoFormer: enhanced transformer with rotary position embedding",
    arXiv:2104.09864 (2021).

    Examples
    --------
    >>> import torch
    >>> from skhead.linalg.rotary import rotate
    >>> quarter = torch.tensor([torch.pi / 2], dtype=torch.float64)
    >>> rotate(torch.tensor([[1.0, 0.0, 5.0]]), 1, quarter, 2, "half").round().tolist()
    [[0.0, 1.0, 5.0]]
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"rotate: pairing must be 'half' or 'adjacent', got {pairing!r}.")
    d_head = stack.shape[-1]
    if n_dims % 2 or not 0 < n_dims <= d_head:
        raise ValueError(
            f"rotate: n_dims must be even and between 2 and d_head={d_head}, got {n_dims}."
        )
    if frequencies.shape != (n_dims // 2,) or not bool(torch.isfinite(frequencies).all()):
        raise ValueError(
            f"rotate: frequencies must be {n_dims // 2} finite numbers for n_dims={n_dims}, got "
            f"shape {tuple(frequencies.shape)}."
        )
    angles = frequencies.to(device=stack.device, dtype=torch.float64) * offset
    cosine, sine = angles.cos().to(stack.dtype), angles.sin().to(stack.dtype)
    half = n_dims // 2
    pairs = (
        (slice(0, half), slice(half, n_dims))
        if pairing == "half"
        else (slice(0, n_dims, 2), slice(1, n_dims, 2))
    )
    first, second = (stack[..., place] for place in pairs)
    turned = stack.clone()
    turned[..., pairs[0]] = first * cosine - second * sine
    turned[..., pairs[1]] = second * cosine + first * sine
    return turned
