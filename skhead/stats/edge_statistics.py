"""Statistics of a whole table of similarities, made for `skhead.stats.permutation_test`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skhead.exceptions import HeadShapeError
from skhead.linalg.topk import largest_entries

__all__ = [
    "edge_mean",
    "head_average_precision",
    "in_class_nodes",
    "pair_average_precision",
    "top_degrees",
]


def top_degrees(values: NDArray[np.floating], k: int, ends: str = "both") -> NDArray[np.int64]:
    """Degree of every head in the graph of the `k` largest entries of every pair kind.

    Parameters
    ----------
    values : ndarray of shape (n_rows, n_columns) or (n_rows, n_columns, n_pairs)
        NaN where undefined.
    k : int
        Edges of each pair kind.
    ends : {"both", "rows", "columns"}, default="both"
        Which ends of an edge count; "both" needs rows and columns to be the same heads.

    Returns
    -------
    ndarray of shape (n_heads,), int64

    Raises
    ------
    HeadShapeError
        If both ends are to count in a table that is not square.
    ValueError
        If `k` is not a positive integer or `ends` is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import top_degrees
    >>> top_degrees(np.array([[0.0, 5.0, 4.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]), k=2)
    array([2, 1, 1])
    """
    counts = []
    sizes = {"rows": (0,), "columns": (1,), "both": (0, 1)}
    if ends not in sizes:
        raise ValueError(f"top_degrees: ends must be 'both', 'rows' or 'columns', got {ends!r}")
    if ends == "both":
        _check_square(values, "top_degrees")
    n_heads = values.shape[sizes[ends][0]]
    for edge in _top_edges(values, k, "top_degrees"):
        counts += [edge[axis] for axis in sizes[ends]]
    return np.bincount(np.concatenate(counts), minlength=n_heads)


def in_class_nodes(values: NDArray[np.floating], in_class: ArrayLike, k: int) -> int:
    """Heads of a class among the ends of the `k` largest entries of every pair kind.

    Parameters
    ----------
    values : ndarray of shape (n_heads, n_heads) or (n_heads, n_heads, n_pairs)
        NaN where undefined.
    in_class : array-like of bool of shape (n_heads,)
        Which heads belong to the class, or to any class.
    k : int
        Edges of each pair kind.

    Returns
    -------
    int

    Raises
    ------
    HeadShapeError
        If the table is not square or the classes do not fit it.
    ValueError
        If `k` is not a positive integer.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import in_class_nodes
    >>> values = np.array([[0.0, 5.0, 4.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    >>> in_class_nodes(values, [True, False, True], k=1)
    1
    """
    members = _members(values, in_class, "in_class_nodes")
    ends = [end for edge in _top_edges(values, k, "in_class_nodes") for end in edge]
    return int(members[np.unique(np.concatenate(ends))].sum())


def edge_mean(values: NDArray[np.floating], rows: ArrayLike, columns: ArrayLike) -> float:
    """Mean similarity along given edges, such as those of a circuit.

    Parameters
    ----------
    values : ndarray of shape (n_rows, n_columns)
        NaN where undefined.
    rows, columns : array-like of int of shape (n_edges,)
        Position of the source and of the target of every edge.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If an edge is undefined or there is none.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import edge_mean
    >>> edge_mean(np.array([[1.0, 2.0], [3.0, 4.0]]), rows=[0, 1], columns=[1, 1])
    3.0
    """
    sources, targets = (np.asarray(ends, dtype=np.int64) for ends in (rows, columns))
    found = np.asarray(values[sources, targets], dtype=np.float64)
    missing = np.flatnonzero(np.isnan(found))
    if len(missing) or found.size == 0:
        edge = (int(sources[missing[0]]), int(targets[missing[0]])) if len(missing) else None
        raise ValueError(
            f"edge_mean: edge {edge} is undefined; give edges from a row to a column that have a "
            "value, in the order of layers"
        )
    return float(found.mean())


def pair_average_precision(values: NDArray[np.floating], positive: ArrayLike) -> float:
    """Average precision of the defined pairs, ranked by similarity.

    The area under the precision-recall curve as a sum over thresholds; equal values share one.

    Parameters
    ----------
    values : ndarray of shape (n_rows, n_columns)
        NaN where undefined; these pairs are left out.
    positive : array-like of bool of shape (n_rows, n_columns)
        Pairs to be found.

    Returns
    -------
    float
        Between 0 and 1; the share of positive pairs is what a random ranking gives.

    Raises
    ------
    HeadShapeError
        If the shapes differ.
    ValueError
        If no defined pair is positive.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import pair_average_precision
    >>> pair_average_precision(np.array([[0.9, 0.5], [0.7, 0.1]]), [[1, 1], [0, 0]])
    0.8333333333333333
    """
    wanted = np.asarray(positive, dtype=bool)
    if wanted.shape != values.shape:
        raise HeadShapeError(
            f"pair_average_precision: values of shape {values.shape} need as many labels, got "
            f"{wanted.shape}"
        )
    defined = ~np.isnan(values)
    return _average_precision(values[defined], wanted[defined], "pair_average_precision")


def head_average_precision(values: NDArray[np.floating], positive: ArrayLike) -> float:
    """Average precision of heads, ranked by the largest similarity of each to another one.

    Parameters
    ----------
    values : ndarray of shape (n_heads, n_heads) or (n_heads, n_heads, n_pairs)
        NaN where undefined; the diagonal, a head against itself, does not count.
    positive : array-like of bool of shape (n_heads,)
        Heads to be found.

    Returns
    -------
    float
        Between 0 and 1; the share of positive heads is what a random ranking gives.

    Raises
    ------
    HeadShapeError
        If the table is not square or the classes do not fit it.
    ValueError
        If a head has no defined pair, or none is positive.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import head_average_precision
    >>> values = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    >>> head_average_precision(values, [True, True, False])
    1.0
    """
    members = _members(values, positive, "head_average_precision")
    table = np.where(np.isnan(values), -np.inf, values).reshape(*values.shape[:2], -1).max(2)
    np.fill_diagonal(table, -np.inf)
    scores = np.maximum(table.max(0), table.max(1))
    if np.isneginf(scores).any():
        raise ValueError(
            f"head_average_precision: head {int(scores.argmin())} has no defined pair; leave it out"
        )
    return _average_precision(scores, members, "head_average_precision")


def _average_precision(
    scores: NDArray[np.floating], positive: NDArray[np.bool_], caller: str
) -> float:
    total = np.count_nonzero(positive)
    if total == 0:
        raise ValueError(f"{caller}: nothing is positive, so that there is nothing to be found")
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    gains = np.diff(found[last], prepend=0) / total
    return float((gains * found[last] / (last + 1)).sum())


def _top_edges(
    values: NDArray[np.floating], k: int, caller: str
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    if int(k) != k or k < 1:
        raise ValueError(f"{caller}: k must be a positive integer, got {k!r}")
    layers = values.reshape(*values.shape[:2], -1)
    for p in range(layers.shape[2]):
        yield largest_entries(layers[:, :, p], int(k))


def _check_square(values: NDArray[np.floating], caller: str) -> None:
    if values.ndim not in (2, 3) or values.shape[0] != values.shape[1]:
        raise HeadShapeError(
            f"{caller}: rows and columns must be the same heads, got a table of shape "
            f"{values.shape}"
        )


def _members(values: NDArray[np.floating], in_class: ArrayLike, caller: str) -> NDArray[np.bool_]:
    _check_square(values, caller)
    members = np.asarray(in_class, dtype=bool)
    if members.shape != values.shape[:1]:
        raise HeadShapeError(
            f"{caller}: {len(values)} heads need as many labels, got shape {members.shape}"
        )
    return members
