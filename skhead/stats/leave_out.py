"""Mean projectors without the very heads that are tested, by traces alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skhead.exceptions import HeadShapeError
from skhead.stats.anisotropic import MeanProjector

__all__ = ["leave_one_out_means"]


def leave_one_out_means(
    row_mean: MeanProjector,
    column_mean: MeanProjector,
    values: NDArray[np.floating],
    row_traces: ArrayLike,
    column_traces: ArrayLike,
    row_members: ArrayLike,
    column_members: ArrayLike,
    shrinkage: float = 0.0,
) -> NDArray[np.float64]:
    """Expected kernel of every pair from means that leave out the very heads of the pair.

    No mean is formed anew: taking a basis out of ``tr(M_A M_B)`` changes it by traces that are
    known once per head. Between two roles, the row head's basis leaves the row mean and the column
    head's the column mean. Within one role (`row_mean` is `column_mean`), both leave both sides,
    and kernels of a basis with itself are left out of the mean, which they would bias upwards.

    Parameters
    ----------
    row_mean, column_mean : MeanProjector
        The same object for pairs of one role.
    values : ndarray of shape (n_rows, n_columns)
        Kernel of every pair; where NaN, so is the result.
    row_traces : array-like of shape (n_rows,)
        ``tr(P_i M_B)`` of every row head with the column mean, from `projector_traces`.
    column_traces : array-like of shape (n_columns,)
        ``tr(M_A Q_j)`` of every column head with the row mean.
    row_members, column_members : array-like of int
        Position of every head's basis in its mean, or -1 for a head that took no part in it.
    shrinkage : float, default=0.0
        As for `shrink_projector`, applied to the means after leaving out.

    Returns
    -------
    ndarray of shape (n_rows, n_columns), float64

    Raises
    ------
    HeadShapeError
        If the lengths do not fit `values`.
    ValueError
        If leaving the heads out leaves nothing, or the shrinkage is outside [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import leave_one_out_means, mean_projector, projector_traces
    >>> axes = np.eye(4)[:, :, None]
    >>> mean = mean_projector(axes)
    >>> traces = projector_traces(axes, mean.matrix)
    >>> expected = leave_one_out_means(mean, mean, np.eye(4), traces, traces, range(4), range(4))
    >>> float(expected.max())
    0.0
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"leave_one_out_means: shrinkage must lie in [0, 1], got {shrinkage!r}")
    sides = (row_mean, row_traces, row_members), (column_mean, column_traces, column_members)
    for axis, (_, traces, members) in enumerate(sides):
        if not np.shape(traces) == np.shape(members) == (np.shape(values)[axis],):
            raise HeadShapeError(
                f"leave_one_out_means: values of shape {np.shape(values)} need one trace and one "
                f"member per head on axis {axis}, got {np.shape(traces)} and {np.shape(members)}"
            )
    rows, columns = (_Side.of(*side) for side in sides)
    kernels = np.asarray(values, dtype=np.float64)
    if row_mean is column_mean:
        overlap, ranks = _within_role(row_mean, rows, columns, kernels)
    else:
        overlap, ranks = _between_roles(row_mean, column_mean, rows, columns, kernels)
    d_model = len(row_mean.matrix)
    return (1 - shrinkage) ** 2 * overlap + shrinkage * (2 - shrinkage) * ranks / d_model


@dataclass(frozen=True)
class _Side:
    """Heads of one side: weight and rank of the basis of each in the mean; 0 for non-members."""

    members: NDArray[np.int64]
    weights: NDArray[np.float64]
    ranks: NDArray[np.float64]
    traces: NDArray[np.float64]

    @classmethod
    def of(cls, mean: MeanProjector, traces: ArrayLike, members: ArrayLike) -> _Side:
        chosen = np.asarray(members, dtype=np.int64)
        inside = chosen >= 0
        return cls(
            chosen,
            np.where(inside, mean.weights[chosen], 0.0),
            np.where(inside, mean.ranks[chosen], 0).astype(np.float64),
            np.asarray(traces, dtype=np.float64),
        )


def _between_roles(
    row_mean: MeanProjector,
    column_mean: MeanProjector,
    rows: _Side,
    columns: _Side,
    kernels: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Overlap of the reduced means, and product of their mean ranks, of every pair."""
    total_a, total_b = row_mean.weights.sum(), column_mean.weights.sum()
    left_a, left_b = total_a - rows.weights, total_b - columns.weights
    if min(left_a.min(), left_b.min()) <= 0:
        raise ValueError(
            "leave_one_out_means: a group of one head has no mean without that head; pool more "
            "heads"
        )
    overlap = float((row_mean.matrix * column_mean.matrix.to(row_mean.matrix)).sum())
    w, v = rows.weights[:, None], columns.weights[None, :]
    sums = total_a * total_b * overlap + w * v * kernels
    sums = sums - total_b * w * rows.traces[:, None] - total_a * v * columns.traces[None, :]
    ranks_a = ((row_mean.weights * row_mean.ranks).sum() - rows.weights * rows.ranks) / left_a
    ranks_b = (column_mean.weights * column_mean.ranks).sum() - columns.weights * columns.ranks
    ranks = np.multiply.outer(ranks_a, ranks_b / left_b)
    return sums / np.multiply.outer(left_a, left_b), np.where(np.isnan(kernels), np.nan, ranks)


def _within_role(
    mean: MeanProjector, rows: _Side, columns: _Side, kernels: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same for one role: mean over pairs of distinct remaining bases."""
    weights, total = mean.weights, mean.weights.sum()
    w, v = rows.weights[:, None], columns.weights[None, :]
    same = (rows.members[:, None] == columns.members[None, :]) & (rows.members[:, None] >= 0)
    v = np.where(same, 0.0, v)
    left = total - w - v
    pairs = left**2 - ((weights**2).sum() - w**2 - v**2)
    if pairs.min() <= 1e-9 * total**2:
        raise ValueError(
            "leave_one_out_means: a mean within one role needs two distinct bases besides those of "
            "the pair; pool at least four heads"
        )
    whole = total**2 * float(mean.matrix.square().sum()) - (weights**2 * mean.ranks).sum()
    once_w = w * total * rows.traces[:, None] - w**2 * rows.ranks[:, None]
    once_v = v * total * columns.traces[None, :] - v**2 * columns.ranks[None, :]
    sums = whole - 2 * once_w - 2 * once_v + 2 * w * v * kernels
    rank = ((weights * mean.ranks).sum() - w * rows.ranks[:, None] - v * columns.ranks) / left
    return sums / pairs, np.where(np.isnan(kernels), np.nan, rank**2)
