"""A score of every head, drawn as layers against heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from skhead.containers import Similarity
from skhead.exceptions import HeadShapeError, HeadTableError
from skhead.weights import check_heads

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["HeadScoreDisplay"]

#: Ticks named on an axis; more of them would overlap.
_MOST_TICKS = 16


class HeadScoreDisplay:
    """One score of every head of a model: layers down, heads of a layer across.

    Made by `from_estimator` or `from_scores`. Scores of both signs have a diverging scale with zero
    in its middle. Heads without a score, and places where a layer has no head, stay blank; layers
    without attention are left out.

    Parameters
    ----------
    scores : ndarray of shape (n_heads,)
        NaN where a head has none.
    heads : DataFrame
        Heads table of one model.
    name : str, default="score"
        What the score is called.

    Attributes
    ----------
    grid_ : DataFrame of shape (n_layers, n_heads_of_a_layer)
        What is drawn, by layer and head.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    im_ : matplotlib AxesImage
    colorbar_ : matplotlib Colorbar

    See Also
    --------
    skhead.CircuitScorer : Scores of heads.
    skhead.OperationMapper : Scores of heads for operations.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import skhead
    >>> from skhead.inspection import HeadScoreDisplay
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> scorer = skhead.CircuitScorer().fit(heads)
    >>> display = HeadScoreDisplay.from_estimator(scorer, heads, score="ov_copying")
    >>> display.grid_.shape
    (2, 8)
    """

    def __init__(
        self, scores: NDArray[np.floating], heads: pd.DataFrame, name: str = "score"
    ) -> None:
        self.scores = scores
        self.heads = heads
        self.name = name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        score: str | None = None,
        ax: Axes | None = None,
        im_kw: Mapping[str, Any] | None = None,
    ) -> HeadScoreDisplay:
        """Draw what a fitted transformer says of heads.

        Parameters
        ----------
        estimator : transformer
            Fitted, with a column for every score: `skhead.CircuitScorer`, `skhead.OperationMapper`,
            `skhead.ClassAffinity`, or a pipeline that ends with one.
        X : DataFrame or Similarity
            Heads of one model, as the estimator takes them.
        score : str, optional
            Which column; may be left out when there is only one.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.
        im_kw : mapping, optional
            Passed on to ``Axes.imshow``.

        Returns
        -------
        HeadScoreDisplay

        Raises
        ------
        ValueError
            If there is no such score, or several and none is named.
        HeadTableError
            If the heads are of several models, or of none.
        """
        names = [str(name) for name in estimator.get_feature_names_out()]
        if score is None and len(names) > 1:
            raise ValueError(
                f"HeadScoreDisplay: {type(estimator).__name__} has {len(names)} scores; say which "
                f"one to draw, for example score={names[0]!r}"
            )
        score = names[0] if score is None else score
        if score not in names:
            raise ValueError(
                f"HeadScoreDisplay: {type(estimator).__name__} has the scores "
                f"{', '.join(names[:10])}{' ...' * (len(names) > 10)}, not {score!r}"
            )
        heads = X.rows if isinstance(X, Similarity) else X
        values = np.asarray(estimator.transform(X))[:, names.index(score)]
        return cls.from_scores(values, heads, score, ax, im_kw)

    @classmethod
    def from_scores(
        cls,
        scores: ArrayLike,
        heads: pd.DataFrame,
        name: str = "score",
        ax: Axes | None = None,
        im_kw: Mapping[str, Any] | None = None,
    ) -> HeadScoreDisplay:
        """Draw scores that are at hand.

        Parameters
        ----------
        scores : array-like of shape (n_heads,)
            NaN where a head has none.
        heads : DataFrame
            Heads table of one model.
        name : str, default="score"
            What the score is called.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.
        im_kw : mapping, optional
            Passed on to ``Axes.imshow``.

        Returns
        -------
        HeadScoreDisplay

        Raises
        ------
        HeadShapeError
            If there is not one score for every head.
        HeadTableError
            If the heads are of several models, or of none.
        """
        table = check_heads(heads, cls.__name__)
        values = np.asarray(scores, dtype=np.float64)
        if values.shape != (len(table),):
            raise HeadShapeError(
                f"HeadScoreDisplay: {len(table)} heads need as many scores, got shape "
                f"{values.shape}"
            )
        sources = list(dict.fromkeys(table["source"]))
        if len(sources) > 1:
            raise HeadTableError(
                f"HeadScoreDisplay: draws the heads of one model, got {len(sources)}; choose one, "
                f"for example heads[heads['source'] == {sources[0]!r}]"
            )
        return cls(values, table, name).plot(ax, im_kw)

    def plot(
        self, ax: Axes | None = None, im_kw: Mapping[str, Any] | None = None
    ) -> HeadScoreDisplay:
        """Draw the grid.

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

        places = self.heads[["layer", "head"]].assign(score=self.scores)
        grid = places.pivot_table("score", "layer", "head", "first", dropna=False)
        self.grid_ = grid.reindex(columns=range(int(self.heads["head"].max()) + 1))
        if ax is None:
            n_layers, n_heads = self.grid_.shape
            height = float(np.clip(1.1 + 5 * n_layers / n_heads, 2.0, 8.0))
            _, ax = plt.subplots(figsize=(6.4, height), layout="constrained")
        shown = self.grid_.to_numpy()
        options = {"interpolation": "nearest", **_scale(shown), **(im_kw or {})}
        self.im_ = ax.imshow(shown, **options)
        self.ax_, self.figure_ = ax, ax.figure
        # Beside the grid and as high, which the axes of few layers are not.
        self.colorbar_ = ax.figure.colorbar(self.im_, cax=ax.inset_axes((1.03, 0, 0.04, 1)))
        for axis, names in ((ax.yaxis, self.grid_.index), (ax.xaxis, self.grid_.columns)):
            at = range(0, len(names), -(-len(names) // _MOST_TICKS))
            axis.set_ticks(list(at), [str(names[i]) for i in at])
        ax.set(xlabel="head", ylabel="layer", title=self.name)
        return self


def _scale(values: NDArray[np.floating]) -> dict[str, Any]:
    """A diverging scale around zero for both signs, a sequential one otherwise."""
    known = values[np.isfinite(values)]
    if not known.size or known.min() >= 0 or known.max() <= 0:
        return {"cmap": "cividis"}
    reach = float(np.abs(known).max())
    return {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}
