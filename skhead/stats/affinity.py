"""How similar heads are to the members of a class, and to everybody else."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skhead.exceptions import HeadShapeError

__all__ = ["affinity_weights", "class_affinity"]

AGGREGATES = ("mean", "max", "topk")


def class_affinity(
    values: ArrayLike,
    members: ArrayLike,
    own: ArrayLike | None = None,
    aggregate: str = "mean",
    k: int = 3,
    contrast: bool = True,
) -> NDArray[np.float64]:
    """Similarity of each head to the members of each class, itself never among them.

    A member of a class of m heads is compared with the m - 1 others. The mean of a head that is no
    member has the same expectation whatever m, but its maximum grows with m; where "max" or "topk"
    compares it with m heads, it gets the mean over leaving out each of these once, so that
    members and others are measured alike.

    Parameters
    ----------
    values : array-like of shape (n_rows, n_columns, n_pairs)
        Similarities to the reference heads, large for similar ones; NaN where undefined.
    members : array-like of bool of shape (n_columns, n_classes)
        Which reference heads belong to which class.
    own : array-like of bool of shape (n_rows, n_columns) or None, default=None
        Where row and column are the same head; these similarities are never used.
    aggregate : {"mean", "max", "topk"}, default="mean"
        Mean over the members of the class, the largest, or the mean of the `k` largest.
    k : int, default=3
        For "topk".
    contrast : bool, default=True
        Subtract the head's mean similarity to the reference heads outside the class, so that heads
        which are similar to everything are not similar to the class in particular.

    Returns
    -------
    ndarray of shape (n_rows, n_classes, n_pairs), float64
        NaN where a head has no defined similarity to a class, or, with `contrast`, to the others.

    Raises
    ------
    HeadShapeError
        If the shapes do not fit together.
    ValueError
        If `aggregate` is unknown or `k` is not a positive integer.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import class_affinity
    >>> values = np.array([[9.0, 4.0, 1.0], [4.0, 9.0, 2.0], [1.0, 2.0, 9.0]])[:, :, None]
    >>> class_affinity(values, [[True], [True], [False]], own=np.eye(3) > 0)[:, 0, 0].tolist()
    [3.0, 2.0, nan]
    """
    table = np.asarray(values, dtype=np.float64)
    classes = np.asarray(members, dtype=bool)
    if table.ndim != 3 or classes.ndim != 2 or len(classes) != table.shape[1]:
        raise HeadShapeError(
            "class_affinity: values must be (n_rows, n_columns, n_pairs) and members (n_columns, "
            f"n_classes); got shapes {table.shape} and {classes.shape}"
        )
    same = np.zeros(table.shape[:2], dtype=bool) if own is None else np.asarray(own, dtype=bool)
    if same.shape != table.shape[:2]:
        raise HeadShapeError(
            f"class_affinity: own must have shape {table.shape[:2]}, got {same.shape}"
        )
    if aggregate not in AGGREGATES:
        raise ValueError(
            f"class_affinity: aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}"
        )
    if not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"class_affinity: k must be a positive integer, got {k!r}")
    table = np.where(same[:, :, None], np.nan, table)
    found = np.empty((len(table), classes.shape[1], table.shape[2]))
    for c, inside in enumerate(classes.T):
        weights = _weights(table, inside, same, aggregate, int(k), contrast)
        found[:, c] = _weighted_sum(weights, table)
    return found


def affinity_weights(
    values: NDArray[np.float64],
    inside: NDArray[np.bool_],
    own: NDArray[np.bool_],
    aggregate: str,
    k: int,
    contrast: bool,
) -> NDArray[np.float64]:
    """How much each reference head counts in the affinity to one class, as `class_affinity` does.

    Parameters
    ----------
    values : ndarray of shape (n_rows, n_columns, n_pairs)
    inside : ndarray of bool of shape (n_columns,)
        Members of the class.
    own : ndarray of bool of shape (n_rows, n_columns)
    aggregate, k, contrast
        As for `class_affinity`.

    Returns
    -------
    ndarray of shape (n_rows, n_columns, n_pairs)
        The affinity is the sum of weights times values; 0 for a similarity that is not used.
    """
    table = np.where(own[:, :, None], np.nan, np.asarray(values, dtype=np.float64))
    return _weights(table, inside, own, aggregate, k, contrast)


def _weights(
    table: NDArray[np.float64],
    inside: NDArray[np.bool_],
    same: NDArray[np.bool_],
    aggregate: str,
    k: int,
    contrast: bool,
) -> NDArray[np.float64]:
    weights = np.zeros(table.shape)
    if aggregate == "mean":
        weights[:, inside] = _mean_weights(table[:, inside])
    else:
        is_member = np.asarray(same[:, inside].any(axis=1))
        depth = 1 if aggregate == "max" else k
        weights[:, inside] = _largest_weights(table[:, inside], is_member, depth)
    if contrast:
        weights[:, ~inside] = -_mean_weights(table[:, ~inside])
    return weights


def _weighted_sum(weights: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Affinities; NaN where the class, or what it is contrasted with, has no defined similarity."""
    total = (weights * np.where(np.isnan(table), 0.0, table)).sum(axis=1)
    undefined = np.isnan(weights).any(axis=1)
    return np.where(undefined, np.nan, total)


def _mean_weights(block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equal weights of the defined columns; NaN where there is none."""
    defined = ~np.isnan(block)
    count = defined.sum(axis=1, keepdims=True)
    share = np.divide(1.0, count, out=np.full(count.shape, np.nan), where=count > 0)
    return np.where(defined | (count == 0), share, 0.0)


def _largest_weights(
    block: NDArray[np.float64], is_member: NDArray[np.bool_], k: int
) -> NDArray[np.float64]:
    """Weights of the mean of the k largest, for non-members over leaving one column out.

    Leaving out one of the ``depth`` largest of ``count`` brings the next one in: each of these
    stays in ``count - 1`` of ``count`` cases, and the next one enters in ``depth`` of them.
    """
    order = np.argsort(np.argsort(np.where(np.isnan(block), np.inf, -block), axis=1), axis=1)
    count = (~np.isnan(block)).sum(axis=1, keepdims=True)
    left_out = (count > 1) & ~is_member[:, None, None]
    depth = np.minimum(k, count - left_out)
    share = np.divide(1.0, depth, out=np.full(count.shape, np.nan), where=depth > 0)
    kept = np.where(left_out, (count - 1) / np.maximum(count, 1), 1.0)
    next_in = np.where(left_out, depth / np.maximum(count, 1), 0.0)
    chosen = np.where(order < depth, kept, np.where(order == depth, next_in, 0.0))
    return np.where(count == 0, np.nan, chosen * share)
