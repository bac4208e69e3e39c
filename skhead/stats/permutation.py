"""Permutation tests of statements about a whole table of similarities.

A similarity has too few exchangeable partners for a p-value of its own, but a hub, a class or a
circuit is a statement about many. Heads of one layer are what a null hypothesis may exchange:
similarities differ between layers for reasons that have nothing to do with single heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skhead.exceptions import HeadShapeError
from skhead.stats.exchange import (
    exchanged_tables,
    layer_codes,
    permute_heads,
    renamed_tables,
)

__all__ = [
    "PermutationResult",
    "label_permutation_test",
    "permutation_test",
]

#: Statistics this close, relative to their size, count as equal.
_EQUAL = 1e-12
_EXCHANGES = ("blocks", "within_rows", "within_columns", "rows", "columns", "both")


@dataclass(frozen=True, eq=False)
class PermutationResult:
    """Outcome of a permutation test of one statistic or of a vector of them.

    Attributes
    ----------
    statistic : ndarray, float64
        Observed; 0-D for a single number.
    p_value : ndarray of the same shape
        ``(1 + permutations at least as extreme) / (1 + permutations)``, each element by itself.
    adjusted_p_value : ndarray of the same shape
        The same against the most extreme element of every permutation, which bounds the
        probability of any false call. It equals `p_value` for a single number.
    null_mean : ndarray of the same shape
        Mean over permutations.
    null_max, null_min : ndarray of shape (n_permutations,)
        Largest and smallest element under every permutation.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import label_permutation_test
    >>> values = np.arange(8.0)
    >>> members = values > 5
    >>> result = label_permutation_test(
    ...     lambda chosen: values[chosen].mean(),
    ...     members,
    ...     [0] * 8,
    ...     n_permutations=99,
    ...     random_state=0,
    ... )
    >>> result.statistic.item(), bool(result.p_value < 0.1)
    (6.5, True)
    """

    statistic: NDArray[np.float64]
    p_value: NDArray[np.float64]
    adjusted_p_value: NDArray[np.float64]
    null_mean: NDArray[np.float64]
    null_max: NDArray[np.float64]
    null_min: NDArray[np.float64]


def permutation_test(
    statistic: Callable[[NDArray[np.float64]], Any],
    values: ArrayLike,
    row_layers: ArrayLike,
    column_layers: ArrayLike,
    exchange: str = "blocks",
    n_permutations: int = 9999,
    side: str = "upper",
    random_state: int | np.random.Generator | None = None,
) -> PermutationResult:
    """Test a statistic of a table of similarities by exchanging heads within layers.

    What is exchanged is what the null hypothesis says not to matter:

    - ``"blocks"``: which two heads of a given pair of layers meet. For hubs, in-class nodes of a
      graph and circuits.
    - ``"within_rows"``: which head of a layer a row head meets, for every row anew. Row levels
      stay; for hubs among the column heads. ``"within_columns"`` likewise for row heads.
    - ``"rows"``, ``"columns"``, ``"both"``: the names of heads, each keeping its whole profile
      (with ``"both"``, its row and its column separately). For links between a head's profile and
      what else is known of the head; a hub remains one under another name and cannot be tested so.

    Parameters
    ----------
    statistic : callable
        Takes a table like `values` and returns a number or an array of numbers, whose largest (or
        smallest) element is then tested too.
    values : array-like of shape (n_rows, n_columns) or (n_rows, n_columns, n_pairs)
        NaN where undefined, in the same places for all pair kinds, which are permuted together.
        Pairs of one role should be listed once, not mirrored.
    row_layers : array-like of shape (n_rows,)
        Layer of every row head.
    column_layers : array-like of shape (n_columns,)
        Layer of every column head.
    exchange : str, default="blocks"
        See above.
    n_permutations : int, default=9999
        The smallest p-value possible is ``1 / (1 + n_permutations)``.
    side : {"upper", "lower", "two"}, default="upper"
        Which deviations count as evidence; "two" doubles the smaller p-value.
    random_state : int, Generator or None, default=None
        None draws differently every time.

    Returns
    -------
    PermutationResult

    Raises
    ------
    HeadShapeError
        If layers or tables do not fit together.
    ValueError
        If there is nothing to exchange, the undefined pairs tell apart heads that are to be
        exchanged, the statistic is not a number, or an option is unknown.

    References
    ----------
    .. [1] B. Phipson and G. K. Smyth, "Permutation p-values should never be zero", Statistical
       Applications in Genetics and Molecular Biology 9 (2010).
    .. [2] P. H. Westfall and S. S. Young, "Resampling-Based Multiple Testing", Wiley (1993).

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import permutation_test, top_degrees
    >>> values = np.random.default_rng(0).random((20, 20))
    >>> values[:, 3] += 1.0
    >>> result = permutation_test(
    ...     lambda table: top_degrees(table, 20, ends="columns"),
    ...     values,
    ...     [0] * 20,
    ...     [1] * 20,
    ...     n_permutations=199,
    ...     random_state=0,
    ... )
    >>> float(result.statistic[3]), float(result.adjusted_p_value[3])
    (20.0, 0.005)
    """
    table = np.array(values, dtype=np.float64)
    if table.ndim not in (2, 3):
        raise HeadShapeError(
            f"permutation_test: needs a table of 2 or 3 dimensions, got shape {table.shape}"
        )
    codes = [layer_codes(layers, "permutation_test") for layers in (row_layers, column_layers)]
    if tuple(len(code) for code in codes) != table.shape[:2]:
        raise HeadShapeError(
            f"permutation_test: a table of shape {table.shape} needs a layer per row and per "
            f"column, got {len(codes[0])} and {len(codes[1])}"
        )
    if exchange not in _EXCHANGES:
        raise ValueError(
            f"permutation_test: exchange must be one of {', '.join(_EXCHANGES)}, got {exchange!r}"
        )
    generator = np.random.default_rng(random_state)
    make = renamed_tables if exchange in ("rows", "columns", "both") else exchanged_tables
    tables = make(table, codes[0], codes[1], exchange, generator)
    return _test(statistic, table, tables, n_permutations, side, "permutation_test")


def label_permutation_test(
    statistic: Callable[[NDArray[Any]], Any],
    labels: ArrayLike,
    layers: ArrayLike,
    n_permutations: int = 9999,
    side: str = "upper",
    random_state: int | np.random.Generator | None = None,
) -> PermutationResult:
    """Test a statistic of class labels by exchanging the labels of heads within layers.

    Classes sit in certain layers, and so does much of any similarity; a score that labels of the
    right layers reach by chance says nothing of heads.

    Parameters
    ----------
    statistic : callable
        Takes labels like `labels` and returns a number or an array of numbers.
    labels : array-like of shape (n_heads,)
        Class, or class membership, of every head.
    layers : array-like of shape (n_heads,)
        Layer of every head.
    n_permutations : int, default=9999
        The smallest p-value possible is ``1 / (1 + n_permutations)``.
    side : {"upper", "lower", "two"}, default="upper"
        As for `permutation_test`.
    random_state : int, Generator or None, default=None
        None draws differently every time.

    Returns
    -------
    PermutationResult

    Raises
    ------
    HeadShapeError
        If labels and layers do not fit together.
    ValueError
        If every layer carries one label only, the statistic is not a number, or an option is
        unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import head_average_precision, label_permutation_test
    >>> values = np.random.default_rng(0).random((12, 12))
    >>> values[:3, :3] += 1.0
    >>> result = label_permutation_test(
    ...     lambda positive: head_average_precision(values, positive),
    ...     np.arange(12) < 3,
    ...     [0] * 12,
    ...     n_permutations=99,
    ...     random_state=0,
    ... )
    >>> float(result.statistic), bool(result.p_value < 0.05)
    (1.0, True)
    """
    given = np.asarray(labels)
    codes = layer_codes(layers, "label_permutation_test")
    if given.shape != codes.shape:
        raise HeadShapeError(
            f"label_permutation_test: {len(codes)} heads need as many labels, got shape "
            f"{given.shape}"
        )
    kinds = np.unique(given, return_inverse=True)[1]
    if len(np.unique(np.stack([codes, kinds]), axis=1).T) == len(np.unique(codes)):
        raise ValueError(
            "label_permutation_test: every layer carries one label only, so that exchanging "
            "labels within layers changes nothing"
        )
    generator = np.random.default_rng(random_state)

    def draws() -> Iterator[NDArray[Any]]:
        while True:
            yield given[permute_heads(codes, 1, generator)[0]]

    return _test(statistic, given, draws(), n_permutations, side, "label_permutation_test")


def _test(
    statistic: Callable[[NDArray[Any]], Any],
    data: NDArray[Any],
    draws: Iterator[NDArray[Any]],
    n_permutations: int,
    side: str,
    caller: str,
) -> PermutationResult:
    if side not in ("upper", "lower", "two"):
        raise ValueError(f"{caller}: side must be 'upper', 'lower' or 'two', got {side!r}")
    if int(n_permutations) != n_permutations or n_permutations < 1:
        raise ValueError(
            f"{caller}: n_permutations must be a positive integer, got {n_permutations!r}"
        )
    observed = _number(statistic(data.copy()), "the data", caller)
    slack = _EQUAL * np.abs(observed)
    above, below = (np.zeros((2, *observed.shape), dtype=np.int64) for _ in range(2))
    total = np.zeros(observed.shape)
    peaks = np.empty((2, int(n_permutations)))
    for i in range(int(n_permutations)):
        drawn = _number(statistic(next(draws)), f"permutation {i}", caller)
        if drawn.shape != observed.shape:
            raise ValueError(
                f"{caller}: the statistic has shape {observed.shape} on the data and "
                f"{drawn.shape} on permutation {i}"
            )
        peaks[:, i] = drawn.max(), drawn.min()
        above += drawn >= observed - slack, peaks[0, i] >= observed - slack
        below += drawn <= observed + slack, peaks[1, i] <= observed + slack
        total += drawn
    upper, lower = ((1 + count) / (1 + n_permutations) for count in (above, below))
    p = {"upper": upper, "lower": lower, "two": np.minimum(2 * np.minimum(upper, lower), 1.0)}[side]
    return PermutationResult(
        observed, np.asarray(p[0]), np.asarray(p[1]), np.asarray(total / n_permutations), *peaks
    )


def _number(value: Any, where: str, caller: str) -> NDArray[np.float64]:
    number = np.asarray(value, dtype=np.float64)
    if number.size == 0 or np.isnan(number).any():
        raise ValueError(f"{caller}: the statistic is empty or not a number on {where}: {value!r}")
    return number
