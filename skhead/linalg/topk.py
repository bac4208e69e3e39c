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
    defined = np.where(np.isnan(values), -np.inf, values)
    peaks = defined.max(axis=1, initial=-np.inf)
    if len(peaks) > k:
        cut = np.partition(peaks, -k)[-k]
        candidates = np.flatnonzero(peaks >= cut)
    else:
        candidates = np.arange(len(peaks))
    flat = defined[candidates].ravel()
    if flat.size > k:
        threshold = np.partition(flat, -k)[-k]
        chosen = np.flatnonzero(flat >= threshold)
    else:
        chosen = np.arange(flat.size)
    chosen = chosen[flat[chosen] > -np.inf]
    order = chosen[np.argsort(-flat[chosen], kind="stable")][:k]
    rows, columns = np.divmod(order, values.shape[1])
    return candidates[rows], columns
