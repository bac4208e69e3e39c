"""Average precision of head classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from skhead.exceptions import HeadShapeError

__all__ = [
    "UNCLASSED",
    "MacroAveragePrecision",
    "class_average_precisions",
    "macro_average_precision",
    "macro_average_precision_score",
]

#: The label of heads without a class.
UNCLASSED = "None"


def class_average_precisions(
    y_true: ArrayLike,
    y_score: ArrayLike,
    classes: Sequence[Any],
    none_label: str = UNCLASSED,
) -> pd.DataFrame:
    """Average precision of every class, with what chance gives.

    Parameters
    ----------
    y_true : array-like of shape (n_heads,) or (n_heads, n_classes)
        Class of each head, or a multilabel indicator in the order of `classes`.
    y_score : array-like of shape (n_heads, n_classes)
        Larger for heads that more likely belong to the class.
    classes : sequence of shape (n_classes,)
        Class of each column of `y_score`.
    none_label : str, default="None"
        The label of heads without a class, which is no class to be found.

    Returns
    -------
    DataFrame
        One row for every class that occurs in `y_true`, in order: ``average_precision``,
        ``roc_auc`` (NaN where every head is of the class), ``n_heads`` of the class, and
        ``base_rate``, the share of its heads, which is the average precision of a random ranking
        of many heads. A class without a column scores its base rate.

    Raises
    ------
    HeadShapeError
        If the shapes do not fit together.
    ValueError
        If a label is missing, a class has several columns, no head has a class, or a score is not
        finite.

    Examples
    --------
    >>> from skhead.metrics import class_average_precisions
    >>> scores = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.3], [0.1, 0.1]]
    >>> found = class_average_precisions(["a", "b", "None", "None"], scores, ["a", "b"])
    >>> found["average_precision"].tolist()
    [1.0, 1.0]
    """
    names = list(classes)
    scores = np.asarray(y_score, dtype=np.float64)
    labels = class_labels(y_true, "class_average_precisions")
    if scores.ndim != 2 or scores.shape != (len(labels), len(names)):
        raise HeadShapeError(
            f"class_average_precisions: {len(labels)} heads and {len(names)} classes need scores "
            f"of shape {(len(labels), len(names))}, got {scores.shape}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"class_average_precisions: class {twice!r} has several columns of scores; give each "
            "class one"
        )
    if not np.isfinite(scores).all():
        bad = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(
            f"class_average_precisions: the score of head {bad[0]} for class {names[bad[1]]!r} is "
            f"{scores[tuple(bad)]}; every head needs a finite score for every class"
        )
    rows = {}
    for name, positive in _memberships(labels, names, none_label).items():
        known = scores[:, names.index(name)] if name in names else np.zeros(len(labels))
        rows[name] = {
            "average_precision": float(average_precision_score(positive, known)),
            "roc_auc": np.nan if positive.all() else float(roc_auc_score(positive, known)),
            "n_heads": int(positive.sum()),
            "base_rate": float(positive.mean()),
        }
    if not rows:
        raise ValueError(
            "class_average_precisions: no head has a class, so that there is nothing to be found"
        )
    return pd.DataFrame.from_dict(rows, orient="index")


def class_scores(estimator: Any, X: Any, method: str | None = None) -> NDArray[np.float64]:
    """Scores of heads for every class of a fitted classifier, also where it has two.

    Parameters
    ----------
    estimator : classifier
    X : object
        Heads, as the estimator takes them.
    method : {"decision_function", "predict_proba"}, optional
        By default the first that the estimator has.

    Returns
    -------
    ndarray of shape (n_heads, n_classes)
    """
    ranked = hasattr(estimator, "decision_function")
    method = method or ("decision_function" if ranked else "predict_proba")
    scores = np.asarray(getattr(estimator, method)(X), dtype=np.float64)
    return np.column_stack([-scores, scores]) if scores.ndim == 1 else scores


def class_labels(y: ArrayLike, caller: str) -> NDArray[Any]:
    """Labels of heads as an array, none of them missing.

    Parameters
    ----------
    y : array-like of shape (n_heads,) or (n_heads, n_classes)
    caller : str
        Function to name in errors.

    Raises
    ------
    ValueError
        If a label is missing.
    """
    missing = np.argwhere(pd.isna(np.asarray(y, dtype=object)))
    if len(missing):
        raise ValueError(
            f"{caller}: the label of head {missing[0][0]} is missing; give every head a class, "
            f"{UNCLASSED!r} for one without"
        )
    return np.asarray(y)


def _memberships(
    labels: NDArray[Any], names: Sequence[Any], none_label: str
) -> dict[Any, NDArray[np.bool_]]:
    """Which heads belong to each class that occurs."""
    if labels.ndim == 2:
        if labels.shape[1] != len(names):
            raise HeadShapeError(
                f"class_average_precisions: an indicator of shape {labels.shape} does not fit "
                f"{len(names)} classes"
            )
        found = dict(zip(names, labels.astype(bool).T, strict=True))
    else:
        found = {name: labels == name for name in np.unique(labels).tolist()}
    return {name: of for name, of in found.items() if name != none_label and of.any()}


def macro_average_precision_score(
    y_true: ArrayLike,
    y_score: ArrayLike,
    classes: Sequence[Any],
    none_label: str = UNCLASSED,
) -> float:
    """Mean over the classes that occur of their average precision.

    A class of two heads counts as much as one of twenty, and heads without a class count only as
    those that must not be ranked high.

    Parameters
    ----------
    y_true : array-like of shape (n_heads,) or (n_heads, n_classes)
        As for `class_average_precisions`.
    y_score : array-like of shape (n_heads, n_classes)
        As for `class_average_precisions`.
    classes : sequence of shape (n_classes,)
        Class of each column of `y_score`.
    none_label : str, default="None"
        The label of heads without a class.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    HeadShapeError, ValueError
        As for `class_average_precisions`.

    Examples
    --------
    >>> from skhead.metrics import macro_average_precision_score
    >>> macro_average_precision_score(["a", "b", "None"], [[2, 0], [1, 1], [0, 2]], ["a", "b"])
    0.75
    """
    found = class_average_precisions(y_true, y_score, classes, none_label)
    return float(found["average_precision"].mean())


class MacroAveragePrecision:
    """Scorer for cross-validation of head classes, for ``scoring=``.

    Classes that occur in the heads scored are ranked by ``decision_function``, else by
    ``predict_proba``. Average precision needs no threshold and no balance, and so stands classes of
    two to eight heads among a hundred; a class that the training heads lacked scores its base
    rate.

    Parameters
    ----------
    classes : sequence or None, default=None
        Score these only; None is all that occur.
    none_label : str, default="None"
        The label of heads without a class, which is never scored.

    See Also
    --------
    macro_average_precision : The scorer over all classes.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from skhead.metrics import MacroAveragePrecision
    >>> X, y = [[0.0], [0.2], [0.9], [1.0]], ["None", "None", "Induction", "Induction"]
    >>> MacroAveragePrecision()(LogisticRegression().fit(X, y), X, y)
    1.0
    """

    def __init__(self, classes: Sequence[Any] | None = None, none_label: str = UNCLASSED) -> None:
        self.classes = classes
        self.none_label = none_label

    def __repr__(self) -> str:
        return f"MacroAveragePrecision(classes={self.classes!r}, none_label={self.none_label!r})"

    def __call__(self, estimator: Any, X: Any, y: ArrayLike) -> float:
        """Score a fitted classifier.

        Parameters
        ----------
        estimator : classifier
            Fitted, with ``classes_``.
        X : object
            Heads, as the estimator takes them.
        y : array-like of shape (n_heads,) or (n_heads, n_classes)
            Their classes.

        Returns
        -------
        float
        """
        scores = class_scores(estimator, X)
        found = class_average_precisions(y, scores, list(estimator.classes_), self.none_label)
        if self.classes is not None:
            found = found.loc[[name for name in self.classes if name in found.index]]
            if found.empty:
                raise ValueError(
                    "MacroAveragePrecision: none of the classes "
                    f"{', '.join(map(repr, self.classes))} occurs among the heads scored; stratify "
                    "the folds, or use fewer"
                )
        return float(found["average_precision"].mean())


def macro_average_precision(estimator: Any, X: Any, y: ArrayLike) -> float:
    """Scorer over all classes that occur, for ``scoring=``; see `MacroAveragePrecision`.

    Parameters
    ----------
    estimator : classifier
        Fitted, with ``classes_``; ranks by ``decision_function``, else by ``predict_proba``.
    X : object
        Heads, as the estimator takes them.
    y : array-like of shape (n_heads,) or (n_heads, n_classes)
        Their classes, ``"None"`` for heads without one.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    ValueError
        If no head has a class, or a score is not finite.

    See Also
    --------
    macro_average_precision_score : The same of scores instead of a classifier.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from skhead.metrics import macro_average_precision
    >>> X, y = [[0.0], [0.2], [0.9], [1.0]], ["None", "None", "Induction", "Induction"]
    >>> macro_average_precision(LogisticRegression().fit(X, y), X, y)
    1.0
    """
    return MacroAveragePrecision()(estimator, X, y)
