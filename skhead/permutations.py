"""Permutation tests of statements about a whole similarity: hubs, classes and circuits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead._base import check_option
from skhead._progress import progress_of_calls
from skhead.containers import Similarity
from skhead.stats import (
    edge_mean,
    head_average_precision,
    in_class_nodes,
    label_permutation_test,
    permutation_test,
    top_degrees,
)

__all__ = ["head_permutation_test"]


def head_permutation_test(
    similarity: Similarity,
    statistic: str,
    *,
    k: int = 20,
    classes: pd.Series | None = None,
    head_class: str | None = None,
    edges: Sequence[tuple[str, str]] | None = None,
    pair: str | None = None,
    n_permutations: int = 9999,
    random_state: int | np.random.Generator | None = None,
) -> pd.DataFrame:
    """Test a statistic of the whole similarity by exchanging heads within layers.

    Single pairs cannot be tested so; a hub, a class or a circuit can. The null says that, given two
    layers, it does not matter which of their heads meet (or, for classes, which heads of a layer
    carry a label). Layers of different models are never mixed. Where small values are similar, as
    distances and p-values are, the strongest pairs are the smallest.

    Parameters
    ----------
    similarity : Similarity
        Of the same heads in rows and columns.
    statistic : {"hub_degree", "in_class_nodes", "edge_mean", "average_precision"}
        - "hub_degree": degree of every head in the graph of the `k` strongest pairs of every kind,
          adjusted for having looked at all heads.
        - "in_class_nodes": how many heads of that graph carry a class.
        - "edge_mean": mean similarity along `edges`, in kind `pair`.
        - "average_precision": of `head_class` among heads ranked by their strongest pair.
    k : int, default=20
        Edges of each pair kind.
    classes : Series or None, default=None
        Class of every head, aligned to the heads table; "None" for none.
    head_class : str or None, default=None
        Class to be found; None takes all classes together.
    edges : sequence of (str, str) or None, default=None
        Labels of source and target.
    pair : str or None, default=None
        Pair kind for "edge_mean"; None takes the only one.
    n_permutations : int, default=9999
        The smallest p-value possible is ``1 / (1 + n_permutations)``.
    random_state : int, Generator or None, default=None
        None draws differently every time.

    Returns
    -------
    DataFrame
        Columns ``statistic``, ``p_value``, ``adjusted_p_value``, ``null_mean``; a row for every
        head ("hub_degree", most connected first) or one row.

    Raises
    ------
    ValueError
        If the statistic is unknown, or lacks what it needs.

    References
    ----------
    .. [1] P. H. Westfall and S. S. Young, "Resampling-Based Multiple Testing", Wiley (1993).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel(pairs=["OK"]).fit_transform(heads)
    >>> found = skhead.head_permutation_test(
    ...     similarity, "edge_mean", edges=[("L0H0", "L1H1")], n_permutations=999, random_state=0
    ... )
    >>> bool(found["p_value"].iloc[0] < 0.05)
    True
    """
    name = "head_permutation_test"
    options = ("hub_degree", "in_class_nodes", "edge_mean", "average_precision")
    check_option("statistic", statistic, options, name)
    labels = similarity.row_labels
    if labels != similarity.column_labels:
        raise ValueError(f"{name}: rows and columns must be the same heads in the same order")
    values = np.stack([similarity.listed(kind) for kind in similarity.pairs], axis=2)
    values = values if similarity.large_is_similar else -values
    layers = _layers_of_models(similarity.rows)
    chosen: dict[str, Any] = {"n_permutations": n_permutations, "random_state": random_state}
    if statistic == "average_precision":
        members = _members(similarity, classes, head_class, name)
        measure: Callable[[Any], Any] = partial(head_average_precision, values)
        with progress_of_calls(measure, 1 + n_permutations, name) as counted:
            result = label_permutation_test(counted, members, layers, **chosen)
    else:
        if statistic == "hub_degree":
            measure = partial(top_degrees, k=k)
        elif statistic == "in_class_nodes":
            members = _members(similarity, classes, head_class, name)
            measure = partial(in_class_nodes, in_class=members, k=k)
        else:
            rows, columns = _edge_positions(edges, labels, name)
            values = similarity.values[:, :, _only_pair(similarity, pair, name)]
            measure = partial(edge_mean, rows=rows, columns=columns)
            chosen["side"] = "upper" if similarity.large_is_similar else "lower"
        with progress_of_calls(measure, 1 + n_permutations, name) as counted:
            result = permutation_test(counted, values, layers, layers, **chosen)
    columns_out = ("statistic", "p_value", "adjusted_p_value", "null_mean")
    table = {column: np.atleast_1d(getattr(result, column)) for column in columns_out}
    index = labels if statistic == "hub_degree" else [statistic]
    frame = pd.DataFrame(table, index=pd.Index(index, dtype=object))
    return frame.sort_values("statistic", ascending=False, kind="stable")


def _layers_of_models(heads: pd.DataFrame) -> NDArray[np.int64]:
    """Numbers that heads of one layer of one model share; heads without layers share one."""
    models = heads["source"].where(heads["layer"] >= 0, "")
    return np.asarray(heads.groupby([models, "layer"]).ngroup(), dtype=np.int64)


def _members(
    similarity: Similarity, classes: pd.Series | None, head_class: str | None, name: str
) -> NDArray[np.bool_]:
    if classes is None:
        raise ValueError(f"{name}: this statistic needs classes=, a Series aligned to the heads")
    if not classes.index.is_unique or not similarity.rows.index.isin(classes.index).all():
        raise ValueError(f"{name}: classes must have one entry for every head of the table")
    found = classes.reindex(similarity.rows.index).fillna("None").astype(str)
    members = (found != "None") if head_class is None else (found == head_class)
    if not members.any():
        raise ValueError(
            f"{name}: no head has class {head_class!r}; the classes are "
            f"{', '.join(sorted(set(found) - {'None'})) or 'none'}"
        )
    return members.to_numpy(dtype=bool)


def _edge_positions(
    edges: Sequence[tuple[str, str]] | None, labels: list[str], name: str
) -> tuple[list[int], list[int]]:
    if not edges:
        raise ValueError(f"{name}: this statistic needs edges=, pairs of head labels")
    unknown = [end for edge in edges for end in edge if end not in labels]
    if unknown:
        raise ValueError(f"{name}: no head is called {unknown[0]!r}")
    sources, targets = zip(*edges, strict=True)
    return [labels.index(a) for a in sources], [labels.index(b) for b in targets]


def _only_pair(similarity: Similarity, pair: str | None, name: str) -> int:
    if pair is None and len(similarity.pairs) > 1:
        raise ValueError(f"{name}: choose one pair= of {', '.join(similarity.pairs)}")
    wanted = similarity.pairs[0] if pair is None else pair
    if wanted not in similarity.pairs:
        raise ValueError(f"{name}: there is no pair {wanted!r}, only {', '.join(similarity.pairs)}")
    return similarity.pairs.index(wanted)
