"""How pairs of queries and keys come in: as a container, or as rows of a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import validate_data

from skhead.exceptions import DegenerateHeadError, HeadShapeError
from skhead.qk_pairs import QKPairs

__all__ = ["generator", "open_pairs", "open_vectors", "refuse_not_finite"]


def generator(random_state: Any) -> np.random.Generator:
    """A numpy Generator from what scikit-learn takes for a seed, or from another one."""
    if isinstance(random_state, np.random.Generator):
        return random_state
    return np.random.default_rng(check_random_state(random_state).randint(2**31 - 1))


def open_pairs(
    estimator: Any, X: Any, y: Any = None, *, reset: bool = False, labelled: bool = False
) -> QKPairs:
    """Pairs from a container, or from rows ``[query, key]`` with a verdict for each.

    Parameters
    ----------
    estimator : estimator
        Whose ``n_features_in_`` is set, or compared with.
    X : QKPairs or array of shape (n_pairs, 2 * d_head)
    y : array or None
        None for an array leaves its pairs unlabelled.
    reset : bool
        Whether the estimator is being fitted.
    labelled : bool
        Whether pairs must have labels.

    Raises
    ------
    HeadShapeError
        If an array has an odd number of columns, or pairs have another d_head than fitted.
    ValueError
        If labels are missing, of another length, or no verdicts.
    """
    caller = type(estimator).__name__
    if isinstance(X, QKPairs):
        pairs = X if y is None else X.with_query_labels(y)
        if reset:
            estimator.n_features_in_ = 2 * pairs.d_head
        elif pairs.d_head != estimator.d_head_:
            raise HeadShapeError(
                f"{caller}: was fitted on d_head {estimator.d_head_}, and these pairs have "
                f"{pairs.d_head}"
            )
        return pairs
    array = validate_data(estimator, X, reset=reset, dtype=[np.float64, np.float32])
    if array.shape[1] % 2:
        raise HeadShapeError(
            f"{caller}: a row of an array is a query followed by a key, and {array.shape[1]} "
            "columns cannot be halved; pass QKPairs"
        )
    if labelled and y is None:
        raise ValueError(
            f"{caller}: requires y to be passed, but the target y is None: an array of pairs needs "
            "y, whether each of them agrees (1) or differs (0)"
        )
    if labelled and getattr(estimator, "per_class", False):
        raise ValueError(
            f"{caller}: per_class=True needs classes that queries look for; pass QKPairs"
        )
    verdicts = np.full(len(array), np.nan) if y is None else _verdicts(y, len(array), caller)
    width = array.shape[1] // 2
    return QKPairs(
        array[:, :width],
        array[:, width:],
        np.arange(len(array)),
        np.ones(verdicts.shape),
        verdicts,
        features=() if verdicts.ndim == 1 or y is None else _default_names(verdicts),
    )


def _default_names(verdicts: NDArray[np.float64]) -> tuple[str, ...]:
    return tuple(f"feature_{i}" for i in range(verdicts.shape[1]))


def _verdicts(y: Any, n_pairs: int, caller: str) -> NDArray[np.float64]:
    labels = np.asarray(y)
    if labels.ndim not in (1, 2) or len(labels) != n_pairs:
        raise ValueError(
            f"{caller}: y must hold a verdict for each of the {n_pairs} pairs; got shape "
            f"{labels.shape}"
        )
    numeric = labels.dtype.kind in "biuf"
    if not numeric or not np.isin(labels[~np.isnan(labels)], (0, 1)).all():
        raise ValueError(
            f"{caller}: y of an array of pairs must be booleans, or 1 for pairs that agree and 0 "
            f"for those that differ; got {np.unique(labels)[:4]!r}. Labels of queries and keys go "
            "into QKPairs"
        )
    return labels.astype(np.float64)


def open_vectors(estimator: Any, X: Any, side: str) -> NDArray[np.floating]:
    """Queries or keys from pairs by either door, or as they are.

    Parameters
    ----------
    estimator : estimator
    X : QKPairs, array of shape (n_pairs, 2 * d_head) or array of shape (n, d_head)
    side : {"queries", "keys"}

    Raises
    ------
    HeadShapeError
        If the width is another than the fitted one.
    """
    if not isinstance(X, QKPairs) and np.ndim(X) == 2 and np.shape(X)[1] == estimator.d_head_:
        return np.asarray(check_array(X, dtype=[np.float64, np.float32], input_name="X"))
    found: NDArray[np.floating] = getattr(open_pairs(estimator, X), side)
    return found


def refuse_not_finite(pairs: QKPairs, caller: str) -> None:
    """Say which query or key is not finite.

    Raises
    ------
    DegenerateHeadError
        Always: sums have overflowed if all queries and keys are finite.
    """
    of = f" of {pairs.head}" if pairs.head else ""
    for name in ("queries", "keys"):
        values = getattr(pairs, name)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            raise DegenerateHeadError(
                f"{caller}: row {int(bad[0])} of the {name}{of} holds NaN or infinite values; "
                "remove it, or run the model in float32"
            )
    raise DegenerateHeadError(
        f"{caller}: products of queries and keys{of} overflow; scale them down"
    )
