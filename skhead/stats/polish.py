"""What is left of a table of similarities once heads and layers have had their say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skhead.exceptions import HeadShapeError

__all__ = ["MedianPolish", "layer_block_scores", "median_polish"]

#: A standard normal's median absolute deviation.
_NORMAL_MAD = 0.6744897501960817
#: Fewest pairs of a layer block from which a location and a scale are taken.
_FEWEST = 4


@dataclass(frozen=True, eq=False)
class MedianPolish:
    """Additive fit of a table: ``values = overall + row effect + column effect + residual``.

    Attributes
    ----------
    overall : float
    row_effects : ndarray of shape (n_rows,), float64
        NaN for a row without a defined entry.
    column_effects : ndarray of shape (n_columns,), float64
        NaN for a column without a defined entry.
    residuals : ndarray of shape (n_rows, n_columns), float64
        NaN where the values are.
    explained : float
        Share of the variance of the defined values that the effects take away.
    n_iter : int
    converged : bool
        Whether the last sweep moved no effect by more than the tolerance.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import median_polish
    >>> table = np.add.outer([0.0, 1.0, 2.0], [0.0, 10.0, 20.0])
    >>> np.abs(median_polish(table).residuals).max().item()
    0.0
    """

    overall: float
    row_effects: NDArray[np.float64]
    column_effects: NDArray[np.float64]
    residuals: NDArray[np.float64]
    explained: float
    n_iter: int
    converged: bool

    def residuals_of(self, values: ArrayLike) -> NDArray[np.float64]:
        """Residuals of new rows against the fitted column effects.

        The effect of a new row is the median of its own entries, so that no other new row has a
        part in it.

        Parameters
        ----------
        values : array-like of shape (n_new_rows, n_columns)
            NaN where undefined.

        Returns
        -------
        ndarray of shape (n_new_rows, n_columns), float64
            NaN where the value is, and in columns that had no entry to be fitted on.

        Raises
        ------
        HeadShapeError
            If the number of columns differs.

        Examples
        --------
        >>> import numpy as np
        >>> from skhead.stats import median_polish
        >>> fitted = median_polish(np.add.outer([0.0, 1.0, 2.0], [0.0, 10.0, 20.0]))
        >>> fitted.residuals_of(np.array([[5.0, 15.0, 26.0]])).tolist()
        [[0.0, 0.0, 1.0]]
        """
        table = _table(values, "MedianPolish.residuals_of")
        if table.shape[1] != len(self.column_effects):
            raise HeadShapeError(
                f"MedianPolish.residuals_of: fitted on {len(self.column_effects)} columns, got "
                f"{table.shape[1]}"
            )
        left = table - self.column_effects
        return left - _medians(left, 1)[:, None]


def median_polish(
    values: ArrayLike, max_iter: int = 1000, tol: float = 1e-6, symmetric: bool = False
) -> MedianPolish:
    """Take row and column medians out of a table until none are left.

    On the logarithm of a similarity the effects are factors by which a head is similar to
    everything, and a residual says how much more similar two heads are than their own levels.

    Parameters
    ----------
    values : array-like of shape (n_rows, n_columns)
        NaN where undefined, such as against the order of layers.
    max_iter : int, default=1000
        Most sweeps over rows and columns.
    tol : float, default=1e-6
        The sweeps end when no median exceeds it.
    symmetric : bool, default=False
        Whether row and column are the same head and the table is its own mirror image. Rows and
        columns then have the same effects, so that residuals are mirrored as well; where rows come
        first, they are nearly so only.

    Returns
    -------
    MedianPolish

    Raises
    ------
    HeadShapeError
        If the table is not 2-D.
    ValueError
        If no entry is defined or one is infinite, such as the logarithm of 0; or if the table is to
        be symmetric and is not.

    References
    ----------
    .. [1] J. W. Tukey, "Exploratory Data Analysis", Addison-Wesley (1977), chapter 11.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import median_polish
    >>> table = np.add.outer([0.0, 1.0, 2.0], [0.0, 10.0, 20.0])
    >>> table[1, 1] += 5.0
    >>> median_polish(table).residuals
    array([[0., 0., 0.],
           [0., 5., 0.],
           [0., 0., 0.]])
    """
    table = _some_defined(values, "median_polish")
    if symmetric and not np.array_equal(table, table.T, equal_nan=True):
        raise ValueError(
            "median_polish: symmetric=True needs a table that is its own mirror image; polish rows "
            "and columns by themselves with symmetric=False"
        )
    left = table.copy()
    effects = np.zeros(table.shape[0]), np.zeros(table.shape[1])
    sweep, moved = 0, np.inf
    while sweep < max_iter and moved > tol:
        sweep, moved = sweep + 1, 0.0
        if symmetric:
            step = _medians(left, 1)
            moved = float(np.nanmax(np.abs(step)))
            left -= np.add.outer(step, step) / 2
            effects = effects[0] + step / 2, effects[1] + step / 2
            continue
        for axis, effect in enumerate(effects):
            step = _medians(left, 1 - axis)
            left -= np.expand_dims(step, 1 - axis)
            effect += step
            moved = max(moved, float(np.nanmax(np.abs(step))))
    centers = [float(np.nanmedian(effect)) for effect in effects]
    spread = float(np.nanvar(table))
    explained = 1 - float(np.nanvar(left)) / spread if spread > 0 else 0.0
    return MedianPolish(
        sum(centers),
        effects[0] - centers[0],
        effects[1] - centers[1],
        left,
        explained,
        sweep,
        moved <= tol,
    )


def layer_block_scores(
    values: ArrayLike, row_layers: ArrayLike, column_layers: ArrayLike
) -> NDArray[np.float64]:
    """Robust score of every pair among the pairs of the same two layers.

    Distance from the block's median in units of its median absolute deviation, scaled to 1 for
    normal values.

    Parameters
    ----------
    values : array-like of shape (n_rows, n_columns)
        NaN where undefined.
    row_layers : array-like of shape (n_rows,)
        Layer of every row head.
    column_layers : array-like of shape (n_columns,)
        Layer of every column head.

    Returns
    -------
    ndarray of shape (n_rows, n_columns), float64

    Raises
    ------
    HeadShapeError
        If the table is not 2-D or the layers do not fit it.
    ValueError
        If a block has too few defined pairs or no spread.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.stats import layer_block_scores
    >>> values = np.random.default_rng(0).normal(size=(40, 40)) + np.repeat([0, 9], 20)
    >>> scores = layer_block_scores(values, [0] * 40, [1] * 20 + [2] * 20)
    >>> bool(abs(np.median(scores[:, 20:])) < 1e-12)
    True
    """
    table = _some_defined(values, "layer_block_scores")
    layers = [np.asarray(given) for given in (row_layers, column_layers)]
    if tuple(len(given) for given in layers) != table.shape:
        raise HeadShapeError(
            f"layer_block_scores: a table of shape {table.shape} needs a layer per row and per "
            f"column, got {len(layers[0])} and {len(layers[1])}"
        )
    scores = np.full(table.shape, np.nan)
    for row_layer in np.unique(layers[0]):
        rows = np.flatnonzero(layers[0] == row_layer)
        for column_layer in np.unique(layers[1]):
            block = np.ix_(rows, np.flatnonzero(layers[1] == column_layer))
            entries = table[block]
            count = np.count_nonzero(~np.isnan(entries))
            if count == 0:
                continue
            centered = entries - np.nanmedian(entries)
            scale = float(np.nanmedian(np.abs(centered))) / _NORMAL_MAD
            if count < _FEWEST or not scale > 0:
                raise ValueError(
                    f"layer_block_scores: layer {row_layer} against layer {column_layer} has "
                    f"{count} defined pairs of spread {scale:.3g}; at least {_FEWEST} of unlike "
                    "value are needed, use median_polish instead"
                )
            scores[block] = centered / scale
    return scores


def _table(values: ArrayLike, caller: str) -> NDArray[np.float64]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise HeadShapeError(f"{caller}: needs a 2-D table, got shape {table.shape}")
    if np.isinf(table).any():
        row, column = (int(x[0]) for x in np.nonzero(np.isinf(table)))
        raise ValueError(
            f"{caller}: entry ({row}, {column}) is {table[row, column]}; the logarithm of a "
            "similarity of 0 has no effects, leave such pairs out as NaN"
        )
    return table


def _some_defined(values: ArrayLike, caller: str) -> NDArray[np.float64]:
    table = _table(values, caller)
    if np.isnan(table).all():
        raise ValueError(f"{caller}: no entry of the table is defined")
    return table


def _medians(table: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Medians of the defined entries along an axis; NaN where there are none."""
    medians = np.full(table.shape[1 - axis], np.nan)
    defined = ~np.isnan(table).all(axis)
    medians[defined] = np.nanmedian(np.compress(defined, table, 1 - axis), axis)
    return medians
