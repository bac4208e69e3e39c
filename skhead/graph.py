"""Wiring graphs: the strongest pairs of every kind, and the heads that many of them meet in."""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead.containers import CALIBRATED, SMALL_IS_STRONG, Similarity
from skhead.exceptions import HeadTableError

if TYPE_CHECKING:
    import networkx

__all__ = ["class_counts", "hub_table", "wiring_graph", "write_edges", "write_graphml"]


def wiring_graph(
    similarity: Similarity, k: int = 20, classes: pd.Series | None = None
) -> networkx.MultiDiGraph:
    """Directed graph of the `k` largest pairs of every kind.

    Parameters
    ----------
    similarity : Similarity
    k : int, default=20
        Edges of each pair kind.
    classes : Series, optional
        Class name of every head, aligned to the heads table; "None" means no class.

    Returns
    -------
    networkx.MultiDiGraph
        Nodes are head labels with ``source``, ``layer``, ``head`` and, given classes,
        ``head_class``; edges are keyed by pair kind, with ``pair``, ``score`` and ``rank``. Only
        heads with an edge are nodes. Of a calibrated similarity, edges also carry ``z``,
        ``log10_p``, ``q``, ``ratio`` and ``excess``, and the graph the names of the ``null`` and
        its ``side``; ``score`` is then the similarity before calibration.

    Raises
    ------
    HeadTableError
        If `classes` is not aligned to the heads.

    References
    ----------
    .. [1] H. Yamagiwa, Y. Takase and H. Shimodaira, arXiv:2601.10266 (2026), figure 1.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> graph = skhead.wiring_graph(skhead.ProjectionKernel().fit_transform(heads), k=5)
    >>> graph.number_of_edges()
    15
    """
    import networkx

    heads = _all_heads(similarity)
    labels = None if classes is None else _aligned(classes, similarity, heads)
    edges = similarity.top_pairs(k).to_dict("records")
    graph = networkx.MultiDiGraph(unit=similarity.unit, k=k)
    judged: tuple[str, ...] = ()
    if similarity.calibration is not None:
        judged = CALIBRATED
        graph.graph |= {"null": similarity.calibration.null, "side": similarity.calibration.side}
    for label in heads.index[
        heads.index.isin({e[end] for e in edges for end in ("source", "target")})
    ]:
        row = heads.loc[label]
        node = {"source": str(row["source"]), "layer": int(row["layer"]), "head": int(row["head"])}
        if labels is not None:
            node["head_class"] = labels[label]
        graph.add_node(label, **node)
    for edge in edges:
        numbers = {name: float(edge[name]) for name in ("score", *judged)}
        numbers["rank"] = int(edge["rank"])
        graph.add_edge(
            edge["source"], edge["target"], key=edge["pair"], pair=edge["pair"], **numbers
        )
    return graph


def hub_table(similarity: Similarity, k: int = 20) -> pd.DataFrame:
    """Degree of every head in the wiring graph and its mean strength over all pairs.

    Parameters
    ----------
    similarity : Similarity
    k : int, default=20
        Edges of each pair kind in the wiring graph.

    Returns
    -------
    DataFrame
        One row per head, most connected first: ``degree``, ``out_degree``, ``in_degree`` count
        edges of the wiring graph; ``out_OQ``, ``in_OQ`` and so on are the mean score over all
        defined pairs of a kind in which the head is row or column, NaN where it is in none.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> table = skhead.hub_table(skhead.ProjectionKernel().fit_transform(heads), k=5)
    >>> int(table["degree"].sum())
    30
    """
    heads = _all_heads(similarity)
    edges = similarity.top_pairs(k)
    table = heads[["layer", "head"]].copy()
    table["out_degree"] = edges["source"].value_counts().reindex(heads.index, fill_value=0)
    table["in_degree"] = edges["target"].value_counts().reindex(heads.index, fill_value=0)
    table.insert(2, "degree", table["out_degree"] + table["in_degree"])
    for p, pair in enumerate(similarity.pairs):
        values = similarity.values[:, :, p]
        for side, labels, axis in (
            ("out", similarity.row_labels, 1),
            ("in", similarity.column_labels, 0),
        ):
            means = pd.Series(_mean_defined(values, axis), labels)
            table[f"{side}_{pair}"] = means[~means.index.duplicated()].reindex(heads.index)
    order = ["degree", "layer", "head"]
    return table.sort_values(order, ascending=[False, True, True], kind="stable")


def class_counts(graph: networkx.MultiDiGraph) -> pd.Series:
    """How many nodes of a wiring graph carry a class.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
        From `wiring_graph` with classes.

    Returns
    -------
    Series
        ``in_class``, ``out_of_class`` and ``nodes``.

    Raises
    ------
    ValueError
        If the graph was made without classes.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> classes = skhead.datasets.load_head_classes("induction-2l", heads)
    >>> similarity = skhead.ProjectionKernel(pairs=["OK"]).fit_transform(heads)
    >>> skhead.class_counts(skhead.wiring_graph(similarity, k=1, classes=classes)).to_dict()
    {'in_class': 2, 'out_of_class': 0, 'nodes': 2}
    """
    found = [data.get("head_class") for _, data in graph.nodes(data=True)]
    if any(name is None for name in found):
        raise ValueError(
            "class_counts: the graph has no classes; make it with wiring_graph(..., classes=...)"
        )
    in_class = sum(name != "None" for name in found)
    counts = {"in_class": in_class, "out_of_class": len(found) - in_class, "nodes": len(found)}
    return pd.Series(counts, name="nodes")


def write_graphml(graph: networkx.MultiDiGraph, path: str | PathLike[str]) -> None:
    """Write a wiring graph as GraphML, for Gephi, Cytoscape or yEd.

    Nodes carry their label as ``label`` too, edges a unique id and their pair kind as ``label``,
    which is what Gephi shows. Where large scores are similar and none is negative, edges have them
    as ``weight`` as well. An edge lacks the attributes that are not finite: programs differ in how
    they spell such numbers and some fail to open the file.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
    path : path-like

    Examples
    --------
    >>> import pathlib, tempfile, skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> graph = skhead.ProjectionKernel().fit_transform(heads).to_graph(5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     skhead.write_graphml(graph, pathlib.Path(folder) / "wiring.graphml")
    """
    import networkx

    portable = networkx.MultiDiGraph(**graph.graph)
    portable.add_nodes_from(
        (node, {"label": str(node)} | data) for node, data in graph.nodes.items()
    )
    weighted = _has_weights(graph)
    for source, target, pair, data in graph.edges(keys=True, data=True):
        shown = {
            name: value
            for name, value in data.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        shown["label"] = str(pair)
        if weighted:
            shown["weight"] = data["score"]
        portable.add_edge(source, target, key=f"{pair}:{source}:{target}", **shown)
    networkx.write_graphml(portable, path)


def _has_weights(graph: networkx.MultiDiGraph) -> bool:
    """Whether scores are strengths, which draw heads together in a layout."""
    small = str(graph.graph.get("unit", "")).partition("/")[0] in SMALL_IS_STRONG
    scores = [data.get("score", math.nan) for *_, data in graph.edges(data=True)]
    return not small and all(math.isfinite(score) and score >= 0 for score in scores)


def write_edges(graph: networkx.MultiDiGraph, path: str | PathLike[str]) -> None:
    """Write the edges of a wiring graph as CSV: ``pair, rank, source, target, score``.

    Of a calibrated similarity, ``z, log10_p, q, ratio, excess`` and the name of the ``null``
    follow.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
    path : path-like

    Examples
    --------
    >>> import pathlib, tempfile, skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> graph = skhead.ProjectionKernel().fit_transform(heads).to_graph(1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "edges.csv"
    ...     skhead.write_edges(graph, path)
    ...     print(path.read_text().splitlines()[0])
    pair,rank,source,target,score
    """
    rows: list[dict[str, Any]] = [
        d | {"source": a, "target": b} for a, b, d in graph.edges(data=True)
    ]
    columns = ["pair", "rank", "source", "target", "score"]
    if "null" in graph.graph:
        columns += [*CALIBRATED, "null"]
        rows = [row | {"null": graph.graph["null"]} for row in rows]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)


def _all_heads(similarity: Similarity) -> pd.DataFrame:
    """Row and column heads, each once, indexed by label."""
    both = pd.concat([similarity.rows, similarity.columns])
    labels = similarity.row_labels + similarity.column_labels
    both = both.set_axis(pd.Index(labels, dtype=object))
    return both[~both.index.duplicated()]


def _aligned(classes: pd.Series, similarity: Similarity, heads: pd.DataFrame) -> dict[str, str]:
    named: dict[str, str] = {}
    sides = (
        (similarity.rows, similarity.row_labels),
        (similarity.columns, similarity.column_labels),
    )
    for table, labels in sides:
        if len(classes) == len(table) and classes.index.equals(table.index):
            found = classes
        elif classes.index.is_unique and table.index.isin(classes.index).all():
            found = classes.reindex(table.index)
        else:
            continue
        named.update(zip(labels, map(str, found.fillna("None")), strict=True))
    missing = [label for label in heads.index if label not in named]
    if missing:
        raise HeadTableError(
            f"wiring_graph: classes has no entry for head {missing[0]} (and "
            f"{len(missing) - 1} more); give a Series indexed like the heads table"
        )
    return named


def _mean_defined(values: NDArray[np.floating], axis: int) -> NDArray[np.float64]:
    defined = ~np.isnan(values)
    counts = defined.sum(axis=axis)
    sums = np.where(defined, values, 0.0).sum(axis=axis, dtype=np.float64)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
