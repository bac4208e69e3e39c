"""A similarity drawn as a matrix of heads against heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead.inspection._fitted import checked_pair, similarity_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from skhead.containers import Similarity

__all__ = ["SimilarityDisplay"]

#: Layers named on an axis; more of them would overlap.
_MOST_TICKS = 16


class SimilarityDisplay:
    """Matrix of one pair kind: row heads down, column heads across, both in table order by layer.

    Made by `from_estimator` or `from_similarity`. Undefined pairs stay blank.

    Parameters
    ----------
    values : ndarray of shape (n_rows, n_columns)
        NaN where a pair is undefined.
    rows, columns : DataFrame
        Heads tables.
    pair : str
        Pair kind, such as ``"OQ"``.
    unit : str, default="pk"
        What the numbers are.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    im_ : matplotlib AxesImage
    colorbar_ : matplotlib Colorbar

    See Also
    --------
    DistributionDisplay : Histogram of the values against random subspaces.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import skhead
    >>> from skhead.inspection import SimilarityDisplay
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
    >>> display = SimilarityDisplay.from_similarity(similarity, pair="OK")
    >>> display.ax_.get_xlabel()
    'K of head, by layer'
    """

    def __init__(
        self,
        values: NDArray[np.floating],
        rows: pd.DataFrame,
        columns: pd.DataFrame,
        *,
        pair: str,
        unit: str = "pk",
    ) -> None:
        self.values = values
        self.rows = rows
        self.columns = columns
        self.pair = pair
        self.unit = unit

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        pair: str | None = None,
        ax: Axes | None = None,
        im_kw: Mapping[str, Any] | None = None,
    ) -> SimilarityDisplay:
        """Draw what a fitted kernel or calibrator makes of heads.

        Parameters
        ----------
        estimator : transformer
            Fitted: a kernel, a `skhead.NullCalibrator`, or a pipeline that ends with one.
        X : object
            Heads, as the estimator takes them.
        pair : str, optional
            Which pair kind; may be left out when there is only one.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.
        im_kw : mapping, optional
            Passed on to ``Axes.imshow``.

        Returns
        -------
        SimilarityDisplay

        Raises
        ------
        HeadShapeError
            If the estimator makes no similarity, or one that cannot be drawn.
        """
        similarity = similarity_of(estimator, X, cls.__name__)
        return cls.from_similarity(similarity, pair, ax, im_kw)

    @classmethod
    def from_similarity(
        cls,
        similarity: Similarity,
        pair: str | None = None,
        ax: Axes | None = None,
        im_kw: Mapping[str, Any] | None = None,
    ) -> SimilarityDisplay:
        """Draw one pair kind of a similarity.

        Parameters
        ----------
        similarity : Similarity
        pair : str, optional
            Which pair kind; may be left out when there is only one.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.
        im_kw : mapping, optional
            Passed on to ``Axes.imshow``.

        Returns
        -------
        SimilarityDisplay

        Raises
        ------
        HeadShapeError
            If the similarity lacks the pair kind, or has several and none is named.
        """
        pair = checked_pair(similarity, pair, cls.__name__)
        values = similarity.values[:, :, similarity.pairs.index(pair)]
        display = cls(values, similarity.rows, similarity.columns, pair=pair, unit=similarity.unit)
        return display.plot(ax=ax, im_kw=im_kw)

    def plot(
        self, ax: Axes | None = None, im_kw: Mapping[str, Any] | None = None
    ) -> SimilarityDisplay:
        """Draw the matrix.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.
        im_kw : mapping, optional
            Passed on to ``Axes.imshow``.

        Returns
        -------
        self
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        options = {"interpolation": "nearest", "cmap": "cividis", **(im_kw or {})}
        self.im_ = ax.imshow(self.values, **options)
        self.ax_ = ax
        self.figure_ = ax.figure
        self.colorbar_ = ax.figure.colorbar(self.im_, ax=ax, label=self.unit)
        for axis, heads in ((ax.yaxis, self.rows), (ax.xaxis, self.columns)):
            positions, names = _layer_ticks(heads)
            axis.set_ticks(positions, names)
        middle = len(self.pair) // 2
        ax.set(
            xlabel=f"{self.pair[middle:]} of head, by layer",
            ylabel=f"{self.pair[:middle]} of head, by layer",
            title=self.pair,
        )
        return self


def _layer_ticks(heads: pd.DataFrame) -> tuple[list[float], list[str]]:
    """Where the heads of a layer begin in table order, and the layer's name."""
    layers = heads["layer"].to_numpy()
    starts = np.flatnonzero(np.r_[True, layers[1:] != layers[:-1]])
    starts = starts[:: -(-len(starts) // _MOST_TICKS)]
    return [float(start) for start in starts], [f"L{layers[start]}" for start in starts]
