"""Sections of the page that are drawings: distributions, maps, matrices, composition."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from skhead._report.charts import (
    Histogram,
    heat_map,
    layer_map,
    legend_bar,
    limits_of,
)
from skhead._report.data import Analysis, scores_of
from skhead._report.raster import Scale, spread
from skhead._report.tables import composition_tables
from skhead._report.text import number
from skhead._report.words import READS, composition_words
from skhead.containers import Similarity

__all__ = ["composition", "distributions", "layer_maps", "matrices"]


def distributions(analysis: Analysis, numbers: Mapping[str, Any]) -> str:
    """Histogram of every pair kind with its random reference."""
    kernel = numbers["projection_kernel"]
    samples = {pair: scores_of(analysis.kernel, pair) for pair in kernel}
    marks = [found[name] for found in kernel.values() for name in ("null_mean", "cutoff")]
    limits = limits_of(list(samples.values()), marks)
    panels = []
    for pair, found in kernel.items():
        shown = Histogram(
            pair, samples[pair], limits, found["null_mean"], found["null_sd"], found["cutoff"], "PK"
        )
        panels.append(_panel(shown, _distribution_note(found)))
    words = (
        "How the overlaps of all compared pairs are distributed. The dashed line is the mean "
        "between independent random subspaces of the same ranks, the grey band three standard "
        "deviations around it. Random subspaces are a reference for scale, not a test: trained "
        "weights crowd into few directions of the residual stream, so that a pair outside the band "
        "need not be wired together in particular."
    )
    if any(found["informativeness"] is not None for found in kernel.values()):
        words += " Informativeness is the divergence of the random law from what is observed."
    if any(float(values.max()) > limits[1] for values in samples.values()):
        words += " The axes end before the last few pairs."
    return f'<p>{words}</p><div class="panels">{"".join(panels)}</div>'


def _distribution_note(found: Mapping[str, Any]) -> str:
    if found["constant"]:
        return f"{_pairs(found['pairs'])}, all {number(found['mean'])}: fixed by the ranks"
    counted = (
        f"{_pairs(found['pairs'])}, mean {number(found['mean'])}, largest {number(found['max'])}, "
        f"random {number(found['null_mean'])} ± {number(found['null_sd'], 2)}; {found['above']:,} "
        f"above and {found['below']:,} below the band"
    )
    known = found["informativeness"]
    return counted + (f"; informativeness {number(known, 3)} nats" if known is not None else "")


def _pairs(count: int) -> str:
    return f"{count:,} pair{'s' * (count != 1)}"


def _panel(shown: Histogram, note: str) -> str:
    read = READS.get(shown.pair, "")
    return (
        f"<figure><figcaption><strong>{shown.pair}</strong> written, then read by {read}<br>"
        f'<span class="note">{escape(note)}</span></figcaption>{shown.svg()}</figure>'
    )


def layer_maps(analysis: Analysis) -> str:
    """Strength and identity scores of every head, layers by heads."""
    table, pairs = analysis.table, analysis.kernel.pairs
    columns = [f"{side}_{pair}" for side in ("out", "in") for pair in pairs]
    strengths = spread([table[column].to_numpy(dtype=np.float64) for column in columns], 0.01)
    maps = []
    for column in columns:
        side, pair = column.split("_")
        note = "as writer, mean over readers" if side == "out" else "as reader, mean over writers"
        maps.append(layer_map(table, column, strengths, pair, note))
    words = (
        "Layers run down, heads across. Mean overlap of each head with the heads it is compared "
        "with; point at a cell for its value."
    )
    bar = legend_bar(strengths, "mean PK; the colours end at the 1% and 99% quantiles")
    drawn = f'<p>{words}</p>{bar}<div class="panels maps">{"".join(maps)}</div>'
    return drawn + (_within_heads(table) if analysis.within_head else "")


def _within_heads(table: pd.DataFrame) -> str:
    own = spread([table["pk_vo"].to_numpy(dtype=np.float64)], 0.0)
    signed = Scale(-1.0, 1.0, "PuOr_r")
    note = "copies or writes the negative"
    maps = (
        layer_map(table, "pk_vo", own, "PK(V,O)", "values against output") + legend_bar(own, ""),
        layer_map(table, "identity_signed", signed, "Signed identity", note)
        + legend_bar(signed, ""),
    )
    return (
        "<h3>Within single heads</h3><p>PK(V,O): how much of the subspace that a head reads "
        "values from it also writes to. The signed identity score is 1 for a head that copies "
        "that subspace unchanged, −1 for one that writes its negative, near 0 for unrelated "
        f'directions.</p><div class="panels maps"><div>{maps[0]}</div><div>{maps[1]}</div></div>'
    )


def matrices(analysis: Analysis) -> str:
    """Heat map of every pair kind."""
    kernel = analysis.kernel
    defined = ~np.isnan(kernel.values)
    rows, columns = (np.flatnonzero(np.any(defined, axis=(1 - side, 2))) for side in (0, 1))
    values = [kernel.values[rows][:, columns, p] for p in range(len(kernel.pairs))]
    scale = spread(values)
    maps = "".join(
        heat_map(matrix, kernel.rows.iloc[rows], kernel.columns.iloc[columns], scale, pair)
        for pair, matrix in zip(kernel.pairs, values, strict=True)
    )
    words = (
        "Overlap of every writing head (down) with every reading head (across), ordered and "
        "labelled by layer."
    )
    if analysis.scope == "forward":
        words += " Pairs that do not run from an earlier to a later layer stay blank."
    return (
        f"<p>{words}</p>{legend_bar(scale, 'PK; the colours end at the 0.2% and 99.8% quantiles')}"
        f'<div class="panels matrices">{maps}</div>'
    )


def composition(analysis: Analysis, scores: Similarity, numbers: Mapping[str, Any]) -> str:
    """Composition scores beside the projection kernel."""
    found = numbers["composition"]
    samples = {pair: scores_of(scores, pair) for pair in found}
    limits = limits_of(list(samples.values()), [row["chance"] for row in found.values()])
    panels = []
    for pair, row in found.items():
        shown = Histogram(pair, samples[pair], limits, row["chance"], None, None, "composition")
        note = (
            f"{row['above_chance']:,} of {row['pairs']:,} pairs above random "
            f"{number(row['chance'])}; largest {number(row['max'], 3)}"
        )
        panels.append(_panel(shown, note))
    return (
        f"<p>{escape(composition_words(found, analysis.info.d_model))}</p>"
        f'<div class="panels">{"".join(panels)}</div>{composition_tables(analysis, numbers)}'
    )
