"""Tables of similarities with heads, or pairs of heads, exchanged within layers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skhead.exceptions import HeadShapeError

__all__ = ["exchanged_tables", "layer_codes", "permute_heads", "renamed_tables"]


def permute_heads(
    layers: ArrayLike, size: int, random_state: int | np.random.Generator | None = None
) -> NDArray[np.int64]:
    """Random orders of heads in which every head stays in its layer.

    Parameters
    ----------
    layers : array-like of shape (n_heads,)
        Layer of every head, in any order.
    size : int
        Number of permutations.
    random_state : int, Generator or None, default=None
        None draws differently every time.

    Returns
    -------
    ndarray of shape (size, n_heads), int64
        Position of the head that takes each place.

    Raises
    ------
    HeadShapeError
        If the layers are not a non-empty list.

    Examples
    --------
    >>> from skhead.stats import permute_heads
    >>> orders = permute_heads([0, 0, 1, 1, 1], size=3, random_state=0)
    >>> sorted(orders[0, :2].tolist()), sorted(orders[0, 2:].tolist())
    ([0, 1], [2, 3, 4])
    """
    codes = layer_codes(layers, "permute_heads")
    generator = np.random.default_rng(random_state)
    places = np.argsort(codes, kind="stable")
    orders = np.empty((size, len(codes)), dtype=np.int64)
    orders[:, places] = np.argsort(codes + generator.random((size, len(codes))), axis=1)
    return orders


def layer_codes(layers: ArrayLike, caller: str) -> NDArray[np.int64]:
    """Layers numbered from 0 in rising order."""
    given = np.asarray(layers)
    if given.ndim != 1 or given.size == 0:
        raise HeadShapeError(f"{caller}: needs a layer for every head, got shape {given.shape}")
    return np.unique(given, return_inverse=True)[1].astype(np.int64)


def _defined(table: NDArray[np.float64]) -> NDArray[np.bool_]:
    defined = ~np.isnan(table)
    if table.ndim == 2:
        return defined
    if not (defined == defined[:, :, :1]).all():
        raise ValueError(
            "permutation_test: different pairs are undefined in different pair kinds, so that "
            "these cannot be permuted together; test each kind by itself"
        )
    return np.asarray(defined[:, :, 0])


def renamed_tables(
    table: NDArray[np.float64],
    row_codes: NDArray[np.int64],
    column_codes: NDArray[np.int64],
    exchange: str,
    generator: np.random.Generator,
) -> Iterator[NDArray[np.float64]]:
    """Tables with the heads of some axes exchanged within layers."""
    defined = _defined(table)
    axes = {"rows": (0,), "columns": (1,), "both": (0, 1)}[exchange]
    codes = row_codes, column_codes
    for axis in axes:
        sizes = np.bincount(codes[axis])
        _, first = np.unique(codes[axis], return_index=True)
        if sizes.max() == 1:
            raise ValueError(
                f"permutation_test: no layer has two {('row', 'column')[axis]} heads to exchange"
            )
        if not (defined == defined.take(first[codes[axis]], axis)).all():
            raise ValueError(
                f"permutation_test: exchange={exchange!r} needs pairs that are defined or not by "
                "their layers alone; use exchange='blocks', which leaves undefined pairs in place"
            )

    def draws() -> Iterator[NDArray[np.float64]]:
        while True:
            drawn = table
            for axis in axes:
                drawn = drawn.take(permute_heads(codes[axis], 1, generator)[0], axis)
            yield drawn

    return draws()


def _cells(
    defined: NDArray[np.bool_],
    row_codes: NDArray[np.int64],
    column_codes: NDArray[np.int64],
    exchange: str,
) -> NDArray[np.int64]:
    """Which cells of the table are exchangeable: equal non-negative numbers; -1 if undefined."""
    rows = np.arange(len(row_codes)) if exchange == "within_rows" else row_codes
    columns = np.arange(len(column_codes)) if exchange == "within_columns" else column_codes
    groups = rows[:, None] * (columns.max() + 1) + columns[None, :]
    if np.unique(groups[defined], return_counts=True)[1].max(initial=0) < 2:
        raise ValueError(
            f"permutation_test: exchange={exchange!r} has no two defined pairs to exchange"
        )
    return np.where(defined, groups, -1)


def exchanged_tables(
    table: NDArray[np.float64],
    row_codes: NDArray[np.int64],
    column_codes: NDArray[np.int64],
    exchange: str,
    generator: np.random.Generator,
) -> Iterator[NDArray[np.float64]]:
    """Tables with defined entries exchanged within groups of cells."""
    groups = _cells(_defined(table), row_codes, column_codes, exchange)
    cells = np.flatnonzero(groups >= 0)
    codes = np.unique(groups.ravel()[cells], return_inverse=True)[1]
    places = cells[np.argsort(codes, kind="stable")]
    entries = table.reshape(groups.size, -1)[cells]

    def draws() -> Iterator[NDArray[np.float64]]:
        while True:
            drawn = table.copy()
            order = np.argsort(codes + generator.random(len(codes)))
            drawn.reshape(groups.size, -1)[places] = entries[order]
            yield drawn

    return draws()
