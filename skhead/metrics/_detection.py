"""Whether classed heads, and pairs of them, stand out in a similarity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from skhead.containers import Similarity, head_codes
from skhead.exceptions import HeadShapeError
from skhead.metrics._precision import UNCLASSED, class_labels

__all__ = ["head_detection", "pair_detection"]


def head_detection(
    similarity: Similarity, y: ArrayLike, none_label: str = UNCLASSED
) -> pd.DataFrame:
    """Whether heads that have a class take part in strong pairs.

    A head's score is its largest similarity to another head, of all pairs of the kind.

    Parameters
    ----------
    similarity : Similarity
        Heads compared with each other.
    y : array-like of shape (n_heads,)
        Class of each row.
    none_label : str, default="None"
        The label of heads without a class, which are not to be found.

    Returns
    -------
    DataFrame
        One row per pair kind: ``average_precision``, ``roc_auc``, ``base_rate``, ``n_positive``.

    Raises
    ------
    HeadShapeError
        If rows and columns are not the same heads in one order, or `y` does not fit them.
    ValueError
        If all heads or none have a class, or a head takes part in no defined pair.

    References
    ----------
    .. [1] H. Yamagiwa, Y. Takase and H. Shimodaira, arXiv:2601.10266 (2026).

    Examples
    --------
    >>> import skhead
    >>> from skhead.metrics import head_detection
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
    >>> classes = skhead.datasets.load_head_classes("induction-2l", heads)
    >>> head_detection(similarity, classes)["average_precision"].idxmax()
    'OK'
    """
    labels = _labels_of(similarity, y, "head_detection")
    positive = labels != none_label
    rows = {}
    for p, pair in enumerate(similarity.pairs):
        table = _rising(similarity)[:, :, p]
        table = np.where(np.isnan(table), -np.inf, table)
        np.fill_diagonal(table, -np.inf)
        scores = np.maximum(table.max(axis=0), table.max(axis=1))
        if np.isneginf(scores).any():
            label = similarity.row_labels[int(scores.argmin())]
            raise ValueError(f"head_detection: {label} takes part in no defined {pair} pair")
        rows[pair] = _detection(scores, positive, "head_detection")
    return pd.DataFrame.from_dict(rows, orient="index")


def pair_detection(
    similarity: Similarity,
    y: ArrayLike,
    wiring: Mapping[str, Sequence[tuple[Any, Any]]] | None = None,
    none_label: str = UNCLASSED,
) -> pd.DataFrame:
    """Whether pairs of heads of one class, or along a circuit, are strong among all pairs.

    Parameters
    ----------
    similarity : Similarity
        Heads compared with each other.
    y : array-like of shape (n_heads,)
        Class of each row.
    wiring : mapping of str to sequence of (class, class), or None, default=None
        Per pair kind, which classes are wired: (class of the row head, class of the column head),
        in either order where the pair kind is symmetric.
        None is every class with itself, one after the other, by all pair kinds.
    none_label : str, default="None"
        The label of heads without a class.

    Returns
    -------
    DataFrame
        Columns ``pair``, ``source``, ``target`` (classes), ``average_precision``, ``roc_auc``,
        ``base_rate``, ``n_positive``; with a wiring, one row per pair kind, whose classes are
        listed together. Of a pair kind that is symmetric, each pair counts once.

    Raises
    ------
    HeadShapeError
        If rows and columns are not the same heads in one order, or `y` does not fit them.
    ValueError
        If no defined pair is wired.

    Examples
    --------
    >>> import skhead
    >>> from skhead.metrics import pair_detection
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
    >>> classes = skhead.datasets.load_head_classes("induction-2l", heads)
    >>> wiring = {"OK": [("Previous Token", "Induction")]}
    >>> pair_detection(similarity, classes, wiring)["average_precision"].tolist()
    [1.0]
    """
    labels = _labels_of(similarity, y, "pair_detection")
    if wiring is None:
        counts = {name: int((labels == name).sum()) for name in np.unique(labels).tolist()}
        named = [name for name, count in counts.items() if name != none_label and count > 1]
        jobs = [(pair, [(name, name)]) for pair in similarity.pairs for name in named]
    else:
        jobs = [(pair, list(wired)) for pair, wired in wiring.items()]
    rows = []
    for pair, wired in jobs:
        listed = similarity.listed(pair)
        positive = np.zeros(listed.shape, dtype=bool)
        for source, target in wired:
            positive |= (labels == source)[:, None] & (labels == target)[None, :]
        defined = ~np.isnan(listed)
        values = _rising(similarity)[:, :, similarity.pairs.index(pair)]
        listed_as_mirror = ~defined & ~np.isnan(values)
        positive |= (positive & listed_as_mirror).T
        scores = values[defined]
        ends = {
            "source": ", ".join(dict.fromkeys(str(source) for source, _ in wired)),
            "target": ", ".join(dict.fromkeys(str(target) for _, target in wired)),
        }
        found = _detection(scores, positive[defined], f"pair_detection ({pair})")
        rows.append({"pair": pair, **ends, **found})
    return pd.DataFrame(rows)


def _labels_of(similarity: Similarity, y: ArrayLike, caller: str) -> NDArray[Any]:
    if not isinstance(similarity, Similarity):
        raise HeadShapeError(
            f"{caller}: expected a Similarity of heads with each other, got "
            f"{type(similarity).__name__}; pass what fit_transform of a kernel gives"
        )
    rows, columns = head_codes(similarity.rows, similarity.columns)
    if not np.array_equal(rows, columns):
        raise HeadShapeError(
            f"{caller}: rows and columns must be the same heads in one order; pass what "
            "fit_transform of a kernel gives"
        )
    labels = class_labels(y, caller)
    if labels.shape != (len(rows),):
        raise HeadShapeError(
            f"{caller}: {len(rows)} heads need as many labels, got shape {labels.shape}"
        )
    return labels


def _rising(similarity: Similarity) -> NDArray[np.float32]:
    return similarity.values if similarity.large_is_similar else -similarity.values


def _detection(
    scores: NDArray[np.floating], positive: NDArray[np.bool_], caller: str
) -> dict[str, Any]:
    n_positive = int(positive.sum())
    if n_positive in (0, len(positive)):
        raise ValueError(
            f"{caller}: {n_positive} of {len(positive)} are to be found, which leaves nothing to "
            "tell apart"
        )
    return {
        "average_precision": float(average_precision_score(positive, scores)),
        "roc_auc": float(roc_auc_score(positive, scores)),
        "base_rate": n_positive / len(positive),
        "n_positive": n_positive,
    }
