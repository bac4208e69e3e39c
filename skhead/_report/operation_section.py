"""The section on operations on tokens: a table of all, then maps and heads of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from skhead._report.charts import layer_map, legend_bar
from skhead._report.data import Analysis
from skhead._report.operations import LARGEST_Q, LEAST_LIFT, SIGNS, HeadOperations
from skhead._report.raster import Scale
from skhead._report.tables import head_cell, number_cell, rate_cell, table, text_cell

__all__ = ["operations"]

Numbers = Mapping[str, Any]

#: Heads times operations up to which maps tell values on pointing, for the size of the page.
_MOST_READ_OUT = 2000
_TITLES = {"carried_out": "Carried out", "suppressed": "Suppressed"}
_READS = {
    "raw": "its embedding",
    "mlp0": "what the first block's MLP makes of its embedding (in the first layer: its embedding)",
    "resid_post_mlp0": "its embedding plus what the first block's MLP makes of it (in the first "
    "layer: its embedding)",
}
_BEST = [("Head", False), ("Score", True), ("Expected", True), ("Lift", True), ("q", True)]
_BEST += [("Median rank", True), ("Mean 1/rank", True)]


def operations(analysis: Analysis, found: HeadOperations, numbers: Mapping[str, Any]) -> str:
    """All operations as a table, and each of them in full.

    Parameters
    ----------
    analysis : Analysis
    found : HeadOperations
    numbers : mapping
        From `skhead._report.numbers.summarize`.

    Returns
    -------
    str
    """
    told = numbers["operations"]
    remarks = "".join(f'<p class="lacking">{escape(text)}</p>' for text in found.remarks)
    overview = table("operation-table", "Operations", _heads(), _rows(analysis, told))
    score = Scale(0.0, float(found.tables["score"].to_numpy().max()) or 1.0)
    lifts = found.tables["lift"]
    largest = float(np.abs(lifts.to_numpy()).max()) or 1.0
    lift = Scale(-largest, largest, "PuOr_r")
    furthest = str(lifts.max().idxmax()).removeprefix("-")
    parts = "".join(
        _one(i, name, analysis, found, told["operations"][name], (lift, score), furthest)
        for i, name in enumerate(found.names)
    )
    return (
        f"<p>{escape(_introduction(told))}</p><p>{escape(_how_to_read())}</p>{remarks}"
        '<p class="note narrow">The table scrolls sideways.</p><div class="scroll" tabindex="0" '
        f'role="region" aria-label="All operations">{overview}</div>{_without_pairs(told)}'
        "<h3>Operation by operation</h3><p>Layers run down, heads across; the colours are the same "
        "for all operations. Up to eight heads are listed by lift, if they are above what is "
        "expected.</p>"
        f"{legend_bar(lift, 'lift')}{legend_bar(score, 'score')}"
        f'<div id="operation-list">{parts}</div>'
    )


def _introduction(told: Numbers) -> str:
    settings = told["settings"]
    k, copying_k = settings["k"][0], settings["copying_k"][0]
    copies = any("copying" in name for name in told["operations"])
    ks = f"{k}" + (f" ({copying_k} in copying)" if copies and k != copying_k else "")
    return (
        "An operation is a list of pairs of tokens, such as countries and their capitals. A head "
        f"turns a source token, read as {_READS[settings['source_embedding']]}, into a logit "
        "of every token of the vocabulary. Its score is the "
        f"share of pairs whose target is among the {ks} highest; for suppression, among the "
        f"lowest. Pairs count if both words are one token, operations if {settings['min_pairs']} "
        "pairs are left."
    )


def _how_to_read() -> str:
    return (
        "A head that writes the same tokens whatever it reads scores high on operations of few "
        "targets. Expected is what the same head gets on average with the targets permuted among "
        "the sources, lift the score less that; q is the false discovery rate over all heads and "
        "operations. A head is said to carry out, or suppress, an operation at a lift of "
        f"{LEAST_LIFT} or more and q of {LARGEST_Q} or less. The limit on the lift is a "
        "convention. No text is run: a head may never read such a token where it would matter."
    )


def _heads() -> list[tuple[str, bool]]:
    heads = [("Operation", False), ("Pairs given", True), ("Kept", True)]
    heads += [("Source not one token", True), ("Target not one token", True), ("Targets", True)]
    for title in _TITLES.values():
        heads += [(f"{title} by", True), ("Largest lift", True), ("of", False)]
    return [*heads, ("Left out", False)]


def _rows(analysis: Analysis, told: Numbers) -> list[list[str]]:
    """One row for every operation that keeps a pair."""
    place = {name: i for i, name in enumerate(told["operations"])}
    rows = []
    for name, counts in told["counts"].items():
        if not counts["n_kept"]:
            continue
        text = escape(name)
        used = name in place
        link = f'<a href="#operation-{place[name]}">{text}</a>' if used else text
        columns = ("n_pairs", "n_kept", "n_source_dropped", "n_target_dropped", "n_targets")
        cells = [f"<td>{link}</td>", *(number_cell(counts[column], 0) for column in columns)]
        for key in _TITLES:
            cells += _best_cells(analysis, told["operations"][name][key] if used else None)
        needed = told["settings"]["min_pairs"]
        cells.append(text_cell("" if used else f"fewer than {needed}"))
        rows.append(cells)
    return rows


def _best_cells(analysis: Analysis, side: Numbers | None) -> list[str]:
    """How many heads are called, and the one of largest lift."""
    if side is None:
        return [number_cell(None, 0), number_cell(None, 3), text_cell("–")]
    count = number_cell(len(side["heads"]), 0)
    if not side["top"]:
        return [count, number_cell(None, 3), text_cell("–")]
    best = side["top"][0]
    return [count, number_cell(best["lift"], 3), head_cell(best["head"], analysis)]


def _without_pairs(told: Numbers) -> str:
    names = [name for name, counts in told["counts"].items() if not counts["n_kept"]]
    if not names:
        return ""
    listed = ", ".join(names)
    return f'<p class="note">No pair of single tokens is left of: {escape(listed)}.</p>'


def _one(
    i: int,
    name: str,
    analysis: Analysis,
    found: HeadOperations,
    sides: Numbers,
    scales: tuple[Scale, Scale],
    furthest: str,
) -> str:
    """Maps and best heads of one operation, open where a head is called or the lift is largest."""
    brief = "; ".join(
        f"{_TITLES[key].lower()} by {_some(side['heads'])}"
        for key, side in sides.items()
        if side["heads"]
    )
    is_open = " open" * (bool(brief) or name == furthest)
    halves = "".join(_half(i, name, key, analysis, found, sides[key], scales) for key in SIGNS)
    return (
        f'<details class="operation" id="operation-{i}"{is_open}><summary><strong>{escape(name)}'
        f'</strong><span class="note">{escape(brief or "no head reaches the limits")}</span>'
        f'</summary><div class="sides">{halves}</div></details>\n'
    )


def _some(heads: Sequence[str], most: int = 5) -> str:
    more = f" and {len(heads) - most} more" if len(heads) > most else ""
    return ", ".join(heads[:most]) + more


def _half(
    i: int,
    name: str,
    key: str,
    analysis: Analysis,
    found: HeadOperations,
    side: Numbers,
    scales: tuple[Scale, Scale],
) -> str:
    """Lift, score and best heads of one sign."""
    column = SIGNS[key][0] + name
    grid = analysis.heads[["layer", "head"]].copy()
    drawn = []
    for kind, scale in zip(("lift", "score"), scales, strict=True):
        grid[kind] = found.tables[kind][column]
        note = f"{_TITLES[key].lower()}: {name}"
        few = len(grid) * len(found.names) <= _MOST_READ_OUT
        drawn.append(layer_map(grid, kind, scale, kind.capitalize(), note, readout=few))
    expected = (
        f"Expected score under permuted targets: {side['mean_null']:.3f} on average over heads, "
        f"{side['largest_null']:.3f} at most."
    )
    caption = f"{_TITLES[key]}: {name}, heads by lift"
    rows = [
        [
            head_cell(row["head"], analysis),
            *(number_cell(row[kind], 3) for kind in ("score", "null_expectation", "lift")),
            rate_cell(row["q"]),
            number_cell(row["median_rank"], 1),
            number_cell(row["mrr"], 3),
        ]
        for row in side["top"]
    ]
    body = (
        f'<div class="scroll">{table(f"operation-{i}-{key}", caption, _BEST, rows)}</div>'
        if rows
        else "<p>No head has more hits than expected.</p>"
    )
    return (
        f'<div><h4>{_TITLES[key]}</h4><div class="panels maps">{"".join(drawn)}</div>'
        f'<p class="note">{expected}</p>{body}</div>'
    )
