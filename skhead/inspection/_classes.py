"""How well head classes are predicted: curves, confusion and a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import confusion_matrix, precision_recall_curve

from skhead.exceptions import HeadShapeError
from skhead.metrics import class_average_precisions
from skhead.metrics._precision import class_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["HeadClassDisplay"]


class HeadClassDisplay:
    """Precision-recall curve of every class, confusion of classes, and what chance would give.

    Made by `from_estimator` or `from_predictions`. On the left, precision against recall as the
    heads are taken in the order of their scores, one curve a class, the average precision in the
    legend; a dotted line marks the share of heads that have the commonest class. On the right, how
    many heads of each true class (rows) are predicted as which (columns).

    Parameters
    ----------
    y_true : ndarray of shape (n_heads,)
        Classes.
    y_score : ndarray of shape (n_heads, n_classes)
        Scores by which heads are ranked.
    classes : sequence of shape (n_classes,)
        Class of each column.
    y_pred : ndarray of shape (n_heads,)
        Predicted classes.
    none_label : str, default="None"
        The label of heads without a class.

    Attributes
    ----------
    table_ : DataFrame
        Per class ``average_precision``, ``roc_auc``, ``n_heads`` and ``base_rate``; see
        `skhead.metrics.class_average_precisions`.
    confusion_ : DataFrame
        Numbers of heads, true classes in rows, predicted ones in columns.
    axes_ : ndarray of shape (2,), of matplotlib Axes
    figure_ : matplotlib Figure
    curves_ : dict of str to matplotlib Line2D
        Of every class.
    image_ : matplotlib AxesImage
        Of the confusion.

    See Also
    --------
    skhead.metrics.baseline_scores : What is reached without subspaces.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> from skhead.inspection import HeadClassDisplay
    >>> y = ["Induction", "Induction", "None", "None"]
    >>> scores = [[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.5, 0.0]]
    >>> display = HeadClassDisplay.from_predictions(y, scores, ["Induction", "None"])
    >>> display.table_["average_precision"].round(2).to_dict()
    {'Induction': 0.83}
    """

    def __init__(
        self,
        y_true: NDArray[Any],
        y_score: NDArray[np.floating],
        classes: Sequence[Any],
        y_pred: NDArray[Any],
        none_label: str = "None",
    ) -> None:
        self.y_true = y_true
        self.y_score = y_score
        self.classes = classes
        self.y_pred = y_pred
        self.none_label = none_label

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: ArrayLike,
        none_label: str = "None",
        axes: NDArray[Any] | None = None,
    ) -> HeadClassDisplay:
        """Draw what a fitted classifier says of heads that it has not seen.

        Parameters
        ----------
        estimator : classifier
            Fitted, with ``classes_``; a pipeline that ends with `HeadClassifier`, for example.
        X : object
            Heads, as the estimator takes them.
        y : array-like of shape (n_heads,)
            Their classes.
        none_label : str, default="None"
            The label of heads without a class.
        axes : array of two matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        HeadClassDisplay
        """
        scores, predicted = class_scores(estimator, X), estimator.predict(X)
        return cls.from_predictions(y, scores, estimator.classes_, predicted, none_label, axes)

    @classmethod
    def from_predictions(
        cls,
        y_true: ArrayLike,
        y_score: ArrayLike,
        classes: Sequence[Any],
        y_pred: ArrayLike | None = None,
        none_label: str = "None",
        axes: NDArray[Any] | None = None,
    ) -> HeadClassDisplay:
        """Draw predictions, such as those of ``cross_val_predict``.

        Parameters
        ----------
        y_true : array-like of shape (n_heads,)
            Classes.
        y_score : array-like of shape (n_heads, n_classes)
            Scores by which heads are ranked.
        classes : sequence of shape (n_classes,)
            Class of each column of `y_score`.
        y_pred : array-like of shape (n_heads,), optional
            Predicted classes; by default those of the largest score.
        none_label : str, default="None"
            The label of heads without a class.
        axes : array of two matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        HeadClassDisplay

        Raises
        ------
        HeadShapeError
            If labels, scores and classes do not fit together, or a head may have several classes.
        ValueError
            If no head has a class, or a score is not finite.
        """
        truth, scores = np.asarray(y_true), np.asarray(y_score, dtype=np.float64)
        if truth.ndim != 1:
            raise HeadShapeError(
                f"HeadClassDisplay: needs one class of every head, got labels of shape "
                f"{truth.shape}; draw a multilabel indicator one column at a time"
            )
        if scores.ndim != 2 or scores.shape != (len(truth), len(classes)):
            raise HeadShapeError(
                f"HeadClassDisplay: {len(truth)} heads and {len(classes)} classes need scores of "
                f"shape {(len(truth), len(classes))}, got {scores.shape}"
            )
        best = np.asarray(list(classes), dtype=object)[scores.argmax(axis=1)]
        predicted = best if y_pred is None else np.asarray(y_pred)
        if predicted.shape != truth.shape:
            raise HeadShapeError(
                f"HeadClassDisplay: {len(truth)} heads need as many predictions, got shape "
                f"{predicted.shape}"
            )
        return cls(truth, scores, list(classes), predicted, none_label).plot(axes)

    def plot(self, axes: NDArray[Any] | None = None) -> HeadClassDisplay:
        """Draw both panels.

        Parameters
        ----------
        axes : array of two matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If `axes` are not two, no head has a class, or a score is not finite.
        """
        import matplotlib.pyplot as plt

        self.table_ = class_average_precisions(
            self.y_true, self.y_score, self.classes, self.none_label
        )
        present = set(self.y_true.tolist()) | set(self.y_pred.tolist())
        names = sorted(present - {self.none_label}, key=str)
        names += [self.none_label] if self.none_label in present else []
        counts = confusion_matrix(
            self.y_true.astype(object), self.y_pred.astype(object), labels=names
        )
        self.confusion_ = pd.DataFrame(counts, names, names)
        if axes is None:
            width = 9 + 0.3 * len(names)
            _, axes = plt.subplots(1, 2, figsize=(width, 4.2), layout="constrained")
        self.axes_ = np.asarray(axes, dtype=object).ravel()
        if len(self.axes_) != 2:
            raise ValueError(f"HeadClassDisplay: draws on two axes, got {len(self.axes_)}")
        self.figure_ = self.axes_[0].figure
        self._draw_curves(self.axes_[0])
        self._draw_confusion(self.axes_[1])
        return self

    def _draw_curves(self, ax: Axes) -> None:
        self.curves_ = {}
        for name, row in self.table_.iterrows():
            known = name in self.classes
            scores = (
                self.y_score[:, self.classes.index(name)] if known else np.zeros(len(self.y_true))
            )
            precision, recall, _ = precision_recall_curve(self.y_true == name, scores)
            label = f"{name} ({int(row['n_heads'])}): {row['average_precision']:.2f}"
            (self.curves_[name],) = ax.step(recall, precision, where="post", label=label)
        chance = float(self.table_["base_rate"].max())
        ax.axhline(chance, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.05))
        ax.legend(
            title="class (heads): average precision", frameon=False, fontsize="small",
            loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=2,
        )  # fmt: skip

    def _draw_confusion(self, ax: Axes) -> None:
        counts = self.confusion_.to_numpy()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        self.image_ = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                ax.text(column, row, f"{count}", ha="center", va="center", color=color)
        names = [str(name) for name in self.confusion_.index]
        ax.set_xticks(range(len(names)), names, rotation=40, ha="right")
        ax.set_yticks(range(len(names)), names)
        ax.set(xlabel="predicted", ylabel="true")
