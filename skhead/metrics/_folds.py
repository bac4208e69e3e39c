"""Out-of-fold scores of every head for every class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone
from sklearn.model_selection import check_cv
from sklearn.utils import _safe_indexing

from skhead.exceptions import HeadShapeError
from skhead.metrics._precision import class_scores

__all__ = ["cross_val_classes"]

_METHODS = ("predict_proba", "decision_function")


def cross_val_classes(
    estimator: Any,
    heads: Any,
    y: ArrayLike,
    *,
    cv: Any,
    groups: ArrayLike | None = None,
    method: str = "predict_proba",
    n_jobs: int | None = None,
) -> pd.DataFrame:
    """Class probabilities of every head, by models that have not seen it.

    As scikit-learn's ``cross_val_predict``, with two differences: the classifier gets the labels as
    they are, where that function replaces them by numbers and so hides which heads are unclassed;
    and a class that the training heads of a fold lack has probability 0 there.

    Parameters
    ----------
    estimator : classifier
        Takes `heads`; a pipeline that ends with `HeadClassifier`, for example.
    heads : DataFrame or array-like of shape (n_heads, ...)
        Heads table, or features.
    y : array-like of shape (n_heads,)
        Class of each head.
    cv : cross-validator, int or iterable
        Folds that together hold every head once.
    groups : array-like of shape (n_heads,) or None, default=None
        For the cross-validator.
    method : {"predict_proba", "decision_function"}, default="predict_proba"
        What to return.
    n_jobs : int or None, default=None
        Folds at once, as for joblib.

    Returns
    -------
    DataFrame of shape (n_heads, n_classes)
        Indexed as `heads`; a column for each class of `y`, and for one that only the classifier
        has, such as the unclassed of ``HeadClassifier(rare="none")``. Of "decision_function", NaN
        where the training heads lack a class.

    Raises
    ------
    HeadShapeError
        If `y` does not fit the heads, or is no list of labels.
    ValueError
        If the folds leave out a head or test it twice, or `method` is unknown.

    Examples
    --------
    >>> import skhead
    >>> from sklearn.pipeline import make_pipeline
    >>> from skhead.metrics import cross_val_classes
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> kernel = skhead.ProjectionKernel(pairs=["QQ", "KK"], layer_order="all")
    >>> layer = heads["layer"].map({0: "early", 1: "late"})
    >>> steps = make_pipeline(kernel, skhead.HeadClassifier())
    >>> cross_val_classes(steps, heads, layer, cv=4).shape
    (16, 2)
    """
    if method not in _METHODS:
        raise ValueError(
            f"cross_val_classes: method must be one of {', '.join(_METHODS)}, got {method!r}"
        )
    labels = np.asarray(y)
    if labels.shape != (len(heads),):
        raise HeadShapeError(
            f"cross_val_classes: {len(heads)} heads need as many labels, got shape {labels.shape}"
        )
    splits = list(check_cv(cv, labels, classifier=True).split(heads, labels, groups))
    tested = np.bincount(np.concatenate([test for _, test in splits]), minlength=len(heads))
    if (tested != 1).any():
        raise ValueError(
            f"cross_val_classes: head {int((tested != 1).argmax())} is tested in "
            f"{tested[(tested != 1).argmax()]} folds; use folds that hold every head once"
        )
    parts = Parallel(n_jobs=n_jobs)(
        delayed(_fold)(clone(estimator), heads, y, train, test, method) for train, test in splits
    )
    index = heads.index if isinstance(heads, pd.DataFrame) else pd.RangeIndex(len(heads))
    absent = 0.0 if method == "predict_proba" else np.nan
    known = set(labels.tolist()).union(*(classes for classes, _ in parts))
    found = pd.DataFrame(absent, index, sorted(known, key=str))
    for (_, test), (classes, scores) in zip(splits, parts, strict=True):
        found.iloc[test, found.columns.get_indexer(classes)] = scores
    return found


def _fold(
    estimator: Any,
    heads: Any,
    y: ArrayLike,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    method: str,
) -> tuple[list[Any], NDArray[np.float64]]:
    fitted = estimator.fit(_safe_indexing(heads, train), _safe_indexing(y, train))
    return fitted.classes_.tolist(), class_scores(fitted, _safe_indexing(heads, test), method)
