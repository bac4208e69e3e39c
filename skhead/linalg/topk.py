"""Exact selection of the largest entries of a large matrix."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["largest_entries"]


def largest_entries(
    values: NDArray[np.floating], k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the `k` largest entries, falling; equal entries in row-major order.

    Only rows whose maximum is among the `k` largest row maxima can hold one of them, so a single
    pass over the matrix is followed by a sort of few rows.

    Parameters
    ----------
    values : ndarray of shape (n_rows, n_columns)
        NaN entries are never selected.
    k : int
        At least 1; fewer are returned when fewer are defined.

    Returns
    -------
    rows, columns : ndarray of shape (at most k,)
    """
    peaks = np.fmax.reduce(values, axis=1, initial=-np.inf)
    candidates = np.flatnonzero(peaks >= _kth_largest(peaks, k))
    flat = values[candidates].ravel()
    defined = ~np.isnan(flat)
    flat[~defined] = -np.inf
    chosen = np.flatnonzero((flat >= _kth_largest(flat, k)) & defined)
    order = chosen[np.argsort(-flat[chosen], kind="stable")][:k]
    rows, columns = np.divmod(order, values.shape[1])
    return candidates[rows], columns


def _kth_largest(values: NDArray[np.floating], k: int) -> float:
    """The `k`-th largest value, or the smallest where there are fewer."""
    return float(np.partition(values, -k)[-k]) if values.size > k else float("-inf")
