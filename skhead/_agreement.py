"""Agreement of what heads do when the model runs with what their parameters say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from skhead.exceptions import HeadTableError

__all__ = ["compare_scores"]


def compare_scores(static: Any, dynamic: pd.DataFrame, *, m: int = 10) -> pd.DataFrame:
    """Compare scores that are read from parameters with those of the running model.

    Parameters
    ----------
    static : DataFrame or Series
        Index: labels of heads; one column per feature, named as in `dynamic`, and as ``"name@k"``
        where that has several `k`: what `OperationMapper` gives. A Series is one column; without a
        name it is the first feature of `dynamic`.
    dynamic : DataFrame
        From `dynamic_scores`. Features that `static` lacks are left out.
    m : int, default=10
        Heads at the top that are compared.

    Returns
    -------
    DataFrame
        One row per ``feature`` and ``context``. ``pearson`` and ``spearman`` are taken over heads
        and templates, the static score of a head standing against its score in every template, as
        published. ``overlap`` is the share of the `m` heads with the highest static score that
        are also among the `m` with the highest mean dynamic score; where heads are tied at the
        border it is the mean over all ways to choose among them. ``chance`` is the overlap of
        unrelated rankings, ``static_max`` and ``dynamic_max`` are the highest scores, and
        ``n_heads`` and ``n_templates`` what was compared. A correlation with scores that are all
        equal is NaN.

    Raises
    ------
    HeadTableError
        If the heads of the two differ.
    ValueError
        If no feature is in both, a score is not finite, or `m` is out of range.

    Examples
    --------
    >>> import pandas as pd
    >>> import skhead
    >>> copying = [(token, token) for token in range(40)]
    >>> dynamic = skhead.dynamic_scores("skhead/induction-2l", copying, [([64], [])], k=1)
    >>> found = dynamic.query("context == 'without' and feature == 'operation'")["score"]
    >>> table = skhead.compare_scores(found.rename("operation"), dynamic, m=1)
    >>> table.loc[("operation", "without"), ["pearson", "overlap"]].tolist()
    [1.0, 1.0]
    """
    groups = _groups(dynamic)
    columns = _static_columns(static, [feature for feature, _ in groups])
    rows: list[dict[str, Any]] = []
    for (feature, context), group in groups.items():
        if feature not in columns:
            continue
        by_template = group.pivot_table(index="head", columns="template", values="score")
        own = _aligned(columns[feature], by_template.index, feature)
        if not 1 <= m <= len(own):
            raise ValueError(
                f"compare_scores: m must be from 1 to the {len(own)} heads compared, got {m}"
            )
        scores = by_template.to_numpy()
        repeated = np.repeat(own, scores.shape[1])
        means = scores.mean(1)
        rows.append(
            {
                "feature": feature,
                "context": context,
                "pearson": _correlation(stats.pearsonr, repeated, scores.ravel()),
                "spearman": _correlation(stats.spearmanr, repeated, scores.ravel()),
                "overlap": float(_membership(own, m) @ _membership(means, m) / m),
                "chance": m / len(own),
                "static_max": own.max(),
                "dynamic_max": means.max(),
                "n_heads": len(own),
                "n_templates": scores.shape[1],
            }
        )
    return pd.DataFrame(rows).set_index(["feature", "context"])


def _groups(dynamic: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Rows by name of the static column, and context."""
    missing = {"feature", "template", "context", "k", "score"} - set(dynamic.columns)
    if missing:
        raise ValueError(
            f"compare_scores: dynamic has no column {sorted(missing)[0]!r}; pass what "
            "dynamic_scores returned"
        )
    several = {
        str(feature): numbers.nunique() > 1 for feature, numbers in dynamic.groupby("feature")["k"]
    }
    groups: dict[tuple[str, str], pd.DataFrame] = {}
    for key, rows in dynamic.groupby(["feature", "context", "k"], sort=False):
        feature, context, k = map(str, cast("tuple[Any, ...]", key))
        groups[f"{feature}@{k}" if several[feature] else feature, context] = rows
    return groups


def _static_columns(static: Any, features: list[str]) -> dict[str, pd.Series]:
    if isinstance(static, pd.Series):
        columns = {features[0] if static.name is None else str(static.name): static}
    else:
        columns = {str(name): static[name] for name in static.columns}
    if not set(columns) & set(features):
        raise ValueError(
            f"compare_scores: static has no feature of dynamic: {', '.join(list(columns)[:4])} "
            f"against {', '.join(dict.fromkeys(features))}; name them alike"
        )
    return columns


def _aligned(scores: pd.Series, heads: pd.Index, feature: str) -> NDArray[np.float64]:
    absent = heads.difference(scores.index, sort=False)
    if len(absent) or len(scores) != len(heads):
        what = f"head {absent[0]} is not in static" if len(absent) else "static has others as well"
        raise HeadTableError(
            f"compare_scores: {feature!r} is compared over {len(heads)} heads of dynamic and "
            f"{len(scores)} of static: {what}; score the same heads of one model"
        )
    values = scores.loc[heads].to_numpy(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"compare_scores: static score {feature!r} of {heads[~np.isfinite(values)][0]} is not "
            "finite"
        )
    return values


def _correlation(measure: Callable[..., Any], left: Any, right: Any) -> float:
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(measure(left, right).statistic)


def _membership(scores: NDArray[np.float64], m: int) -> NDArray[np.float64]:
    """Probability of every head to be among the first `m` when ties are drawn by lot."""
    border = np.partition(scores, -m)[-m]
    tied = scores == border
    above = scores > border
    return above + tied * (m - above.sum()) / tied.sum()
