"""The files beside the page: tables, graph and numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from skhead._report.chance import STANDS_OUT
from skhead._report.comparison import Comparison
from skhead._report.data import Analysis, named_after_null
from skhead._report.page import Download
from skhead._report.text import listed
from skhead.containers import Similarity
from skhead.graph import wiring_graph, write_graphml

__all__ = ["MOST_PAIRS", "write_comparison_files", "write_files"]

#: Rows of pairs.csv beyond which it is not written.
MOST_PAIRS = 2_000_000
_EDGE_COLUMNS = ["pair", "rank", "source", "target", "score", "expected", "ratio"]
#: Of what the null law says, what the tables of pairs list.
_JUDGED = ("ratio", "z", "log10_p", "q")


def write_files(analysis: Analysis, numbers: Mapping[str, Any], directory: Path) -> list[Download]:
    """Write everything but the page, and list it for the page.

    Parameters
    ----------
    analysis : Analysis
    numbers : mapping
        From `skhead._report.numbers.summarize`.
    directory : Path
        An existing directory.

    Returns
    -------
    list of Download
    """
    null = analysis.options.null
    judged = [f"{name}_{null}" for name in _JUDGED]
    columns = dict.fromkeys([*_EDGE_COLUMNS, *judged, f"q_{STANDS_OUT}"])
    edges = analysis.edges[list(columns)].to_csv(index=False).encode()
    table = analysis.table
    if analysis.operations is not None:
        table = pd.concat([table, analysis.operations.columns()], axis=1)
    heads = table.rename_axis("label").to_csv().encode()
    summary = json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    downloads = [
        Download("edges.csv", "the pairs drawn in the diagram", "text/csv", edges),
        Download(
            "heads.csv",
            "one row per head: ranks, edges, strengths, scores, class, probabilities of classes",
            "text/csv",
            heads,
        ),
        Download("summary.json", "every number of this page", "application/json", summary.encode()),
    ]
    for file in downloads:
        if file.content is not None:
            (directory / file.name).write_bytes(file.content)
    classes = analysis.classes.values if analysis.classes is not None else None
    graph = wiring_graph(analysis.kernel, analysis.options.k, classes)
    write_graphml(graph, directory / "graph.graphml")
    downloads.append(
        Download(
            "graph.graphml", "the diagram, for Gephi, Cytoscape or yEd", "application/xml", None
        )
    )
    return [*downloads, *_write_pairs(analysis, directory / "pairs.csv")]


def write_comparison_files(
    found: Comparison, numbers: Mapping[str, Any], directory: Path
) -> list[Download]:
    """Write everything but the page of a comparison, and list it for the page.

    Parameters
    ----------
    found : Comparison
    numbers : mapping
        From `skhead._report.numbers.summarize_comparison`.
    directory : Path
        An existing directory.

    Returns
    -------
    list of Download
    """
    shared = found.refusal is None
    heads = found.heads.rename_axis("label").to_csv() if shared else found.heads.to_csv(index=False)
    summary = json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    what = "one row per head: distances, figures of A and B" if shared else (
        "one row per head of A and of B: figures, nearest spectra in the other model"
    )  # fmt: skip
    downloads = [Download("compare.csv", what, "text/csv", heads.encode())]
    edges = directory / "compare_edges.csv"
    edges.unlink(missing_ok=True)
    if shared:
        content = found.edges.to_csv(index=False).encode()
        downloads.append(Download(edges.name, "pairs that appear or vanish", "text/csv", content))
    what = "the numbers of this page"
    downloads.append(Download("summary.json", what, "application/json", summary.encode()))
    for file in downloads:
        if file.content is not None:
            (directory / file.name).write_bytes(file.content)
    return downloads


def _write_pairs(analysis: Analysis, path: Path) -> list[Download]:
    """Every compared pair, where that is a file of reasonable size."""
    kernel = analysis.kernel
    count = sum(int((~np.isnan(kernel.listed(pair))).sum()) for pair in kernel.pairs)
    if count > MOST_PAIRS:
        path.unlink(missing_ok=True)
        what = f"{path.name} is not written: {count:,} pairs are more than {MOST_PAIRS:,}"
        return [Download("", what, "", None)]
    null = analysis.options.null
    everything = named_after_null(kernel.to_frame(), null)
    pairs = everything[["pair", "source", "target", "score"]].copy()
    pairs["expected"] = _along(kernel, kernel.null_mean)
    for name in _JUDGED:
        pairs[f"{name}_{null}"] = everything[f"{name}_{null}"]
    if analysis.composition is not None:
        pairs["composition"] = _along(kernel, analysis.composition.values)
    pairs.to_csv(path, index=False)
    columns = ["random expectation", "null law"]
    if analysis.composition is not None:
        columns.append("composition score")
    what = f"all {count:,} compared pairs, with {listed(columns)}"
    return [Download(path.name, what, "text/csv", None)]


def _along(kernel: Similarity, values: np.ndarray) -> np.ndarray:
    """Values in the order of `Similarity.to_frame`."""
    values = np.broadcast_to(values, kernel.values.shape)
    defined = [~np.isnan(kernel.listed(pair)) for pair in kernel.pairs]
    return np.concatenate([values[:, :, p][mask] for p, mask in enumerate(defined)])
