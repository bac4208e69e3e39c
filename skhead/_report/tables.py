"""Tables of a report: hubs, edges and composition, sortable by the page's script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from skhead._report.chance import STANDS_OUT
from skhead._report.data import Analysis
from skhead._report.roles import head_link
from skhead._report.text import because, rate

__all__ = [
    "composition_tables",
    "edge_table",
    "filtered",
    "furthest_table",
    "head_cell",
    "hub_table",
    "kind_cell",
    "log_cell",
    "number_cell",
    "rate_cell",
    "table",
    "text_cell",
]


def hub_table(analysis: Analysis, numbers: Mapping[str, Any]) -> str:
    """Heads with the most edges in the diagram."""
    pairs = analysis.kernel.pairs
    heads = [("Head", False)]
    if analysis.classes is not None:
        heads.append(("Class", False))
    heads += [("Edges", True), ("Out", True), ("In", True)]
    heads += [(f"{pair} {side}", True) for pair in pairs for side in ("out", "in")]
    if analysis.within_head:
        heads += [("PK(V,O)", True), ("Signed identity", True)]
    fit = _decimals(numbers["projection_kernel"][pair]["max"] for pair in pairs)
    rows = []
    for hub in numbers["hubs"]:
        cells = [head_cell(hub["label"], analysis)]
        if analysis.classes is not None:
            cells.append(text_cell("–" if hub["class"] == "None" else hub["class"]))
        cells += [number_cell(hub[name], 0) for name in ("degree", "out_degree", "in_degree")]
        cells += [
            number_cell(hub[f"{side}_{pair}"], fit) for pair in pairs for side in ("out", "in")
        ]
        if analysis.within_head:
            cells += [number_cell(hub["pk_vo"], fit), number_cell(hub["identity_signed"], 3)]
        rows.append(cells)
    words = (
        "Heads that most edges of the diagram meet in. Edges counts pairs of all kinds; the "
        "columns per kind are mean overlaps over all compared heads, not only those drawn. "
        "heads.csv lists every head."
    )
    return f'<p>{words}</p><div class="scroll">{table("hub-table", "Hubs", heads, rows)}</div>'


def edge_table(analysis: Analysis) -> str:
    """The pairs drawn in the diagram, with a filter box."""
    null, judged = analysis.options.null, analysis.kernel.calibration is not None
    apart = null != STANDS_OUT and not analysis.edges[f"q_{STANDS_OUT}"].isna().all()
    heads = [("Kind", False), ("Rank", True), ("Writes", False), ("Reads", False), ("PK", True)]
    heads += [("Random", True), ("Ratio", True)]
    if judged:
        heads += [(f"{name} ({null})", True) for name in ("Ratio", "z", "p", "q")]
    if apart:
        heads.append((f"q ({STANDS_OUT})", True))
    if analysis.composition is not None:
        heads.append(("Composition", True))
    if analysis.classes is not None:
        heads += [("Class of writer", False), ("Class of reader", False)]
    fit = _decimals(analysis.edges["score"])
    rows = [
        _edge_cells(edge, analysis, fit, judged=judged, apart=apart)
        for edge in analysis.edges.to_dict("records")
    ]
    words = _edge_words(null, judged=judged, apart=apart)
    body = table("edge-table", "Strongest pairs of heads", heads, rows)
    return f"<p>{words}</p>" + filtered(
        "edge-table", "edge", body, len(rows), "Strongest pairs", "L4H7 or OK L5"
    )


def _edge_cells(
    edge: Mapping[Any, Any], analysis: Analysis, fit: int, *, judged: bool, apart: bool
) -> list[str]:
    """Cells of one edge, with what the null laws say of it."""
    cells = [
        kind_cell(edge["pair"]),
        number_cell(edge["rank"], 0),
        head_cell(edge["source"], analysis),
        head_cell(edge["target"], analysis),
        number_cell(edge["score"], fit),
        number_cell(edge["expected"], fit),
        number_cell(edge["ratio"], 2),
    ]
    null = analysis.options.null
    if judged:
        cells += [
            number_cell(edge[f"ratio_{null}"], 2),
            number_cell(edge[f"z_{null}"], 1),
            log_cell(edge[f"log10_p_{null}"]),
            rate_cell(edge[f"q_{null}"]),
        ]
    if apart:
        cells.append(rate_cell(edge[f"q_{STANDS_OUT}"]))
    if analysis.composition is not None:
        cells.append(number_cell(edge["composition"], 4))
    if analysis.classes is not None:
        named = analysis.table["class"]
        ends = (named[edge["source"]], named[edge["target"]])
        cells += [text_cell("–" if name == "None" else name) for name in ends]
    return cells


def _edge_words(null: str, *, judged: bool, apart: bool) -> str:
    """What the columns of edges are."""
    words = (
        "The pairs drawn in the diagram. Random is the mean between random subspaces of the same "
        "ranks, Ratio the overlap divided by it. "
    )
    if judged:
        words += (
            f"The columns marked {null} hold the pair against that null law: overlap over its "
            "expectation, deviation in its standard deviations, two-sided p-value, and the false "
            "discovery rate q at which the pair is called. "
        )
    if apart:
        words += (
            f"q ({STANDS_OUT}) is the rate at which the pair stands out from the other pairs of "
            "this model. "
        )
    return words + "A click on a heading sorts, a second click turns the order round."


def furthest_table(analysis: Analysis) -> str:
    """The pairs that stand out most from the other pairs of the model."""
    verdict = analysis.verdicts[STANDS_OUT]
    words = (
        "The strongest overlaps above tend to be those of hubs, heads that overlap with all "
        f"others. The null law {STANDS_OUT} takes off the level of writer and reader, so that the "
        "pairs below are those that stand out from what their two heads do with others."
    )
    if verdict.furthest.empty:
        why = verdict.refusal or "no pair lies above its expectation"
        return f'<p>{words}</p><p class="lacking">{escape(because("Not told here", why))}</p>'
    heads = [("Kind", False), ("Rank", True), ("Writes", False), ("Reads", False), ("PK", True)]
    heads += [("Ratio", True), ("z", True), ("p", True), ("q", True)]
    fit = _decimals(verdict.furthest["score"])
    rows = [
        [
            kind_cell(row["pair"]),
            number_cell(row["rank"], 0),
            head_cell(row["source"], analysis),
            head_cell(row["target"], analysis),
            number_cell(row["score"], fit),
            number_cell(row["ratio"], 2),
            number_cell(row["z"], 1),
            log_cell(row["log10_p"]),
            rate_cell(row["q"]),
        ]
        for row in verdict.furthest.to_dict("records")
    ]
    body = table("furthest-table", "Pairs that stand out", heads, rows)
    return f"<p>{words}</p>" + filtered(
        "furthest-table", "furthest", body, len(rows), "Pairs that stand out", "OQ or L10H7"
    )


def filtered(name: str, key: str, body: str, count: int, title: str, hint: str) -> str:
    """A table with a box that filters its rows, in a region that scrolls."""
    return (
        f'<div class="tools scripted"><label>Filter <input type="search" data-filter="{name}" '
        f'data-count="{key}-count" placeholder="{hint}"></label><span class="note" '
        f'id="{key}-count" role="status">{count:,} of {count:,}</span></div>'
        '<p class="note narrow">The table scrolls sideways.</p>'
        f'<div class="scroll tall" tabindex="0" role="region" aria-label="{title}">{body}</div>'
    )


def composition_tables(analysis: Analysis, numbers: Mapping[str, Any]) -> str:
    """Quantiles of both measures side by side, and the strongest pairs by composition."""
    kernel, composition = numbers["projection_kernel"], numbers["composition"]
    heads = [("Kind", False), ("Measure", False), ("Random", True), ("Median", True)]
    heads += [("97% quantile", True), ("Largest", True), ("Shared top pairs", True)]
    fit = _decimals(found["max"] for found in kernel.values())
    rows, best = [], []
    for pair, found in composition.items():
        overlap = kernel[pair]
        for name, row, chance, digits in (
            ("PK", overlap, overlap["null_mean"], fit),
            ("composition", found, found["chance"], 4),
        ):
            quantiles = row["quantiles"]
            values = (chance, quantiles["0.5"], quantiles["0.97"], row["max"])
            common = found["shared_top"]
            shared = f'<td class="n" data-v="{common}">{common} of {found["top"]}</td>'
            rows.append(
                [
                    kind_cell(pair),
                    text_cell(name),
                    *(number_cell(v, digits) for v in values),
                    shared,
                ]
            )
        best += [
            [
                kind_cell(pair), number_cell(edge["rank"], 0),
                head_cell(edge["source"], analysis), head_cell(edge["target"], analysis),
                number_cell(edge["score"], 4), number_cell(edge["score"] / found["chance"], 2),
            ]
            for edge in found["top_pairs"]
        ]  # fmt: skip
    columns = [("Kind", False), ("Rank", True), ("Writes", False), ("Reads", False)]
    columns += [("Composition", True), ("Ratio to random", True)]
    side_by_side = table("composition-table", "Composition and overlap", heads, rows)
    return (
        "<h3>Side by side with the projection kernel</h3>"
        f'<div class="scroll">{side_by_side}</div>'
        "<h3>Strongest pairs by composition</h3>"
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Strongest by composition">'
        f"{table('composition-edges', 'Strongest pairs by composition', columns, best)}</div>"
    )


def table(
    name: str, caption: str, heads: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]
) -> str:
    head = "".join(
        f'<th scope="col"{" class=n" if numeric else ""}><button '
        f'type="button">{escape(text)}</button></th>'
        for text, numeric in heads
    )
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in rows)
    return (
        f'<table class="sortable" id="{name}" '
        f'aria-label="{escape(caption)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}</tbody></table>"
    )


def text_cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def head_cell(label: str, analysis: Analysis) -> str:
    """A cell with a head, linked to its card."""
    return f"<td>{head_link(label, analysis.carded)}</td>"


def kind_cell(pair: str) -> str:
    return f'<td class="pair-{pair}"><span class="dot"></span>{pair}</td>'


def _decimals(values: Iterable[float]) -> int:
    """Decimals that give the largest of the values four digits."""
    largest = max(abs(value) for value in values)
    return max(0, 4 - len(f"{largest:.0f}"))


def rate_cell(value: float) -> str:
    """A cell with a false discovery rate."""
    if value != value:
        return number_cell(None, 0)
    return f'<td class="n" data-v="{value!r}">{escape(rate(value))}</td>'


def log_cell(value: float) -> str:
    """A cell with a p-value from its logarithm to base 10, by which it sorts."""
    if value != value:
        return number_cell(None, 0)
    if value == -math.inf:
        return '<td class="n" data-v="-Infinity">0</td>'
    if value > -4:
        shown = f"{10**value:.4f}"
    else:
        power = math.floor(value)
        digit = round(10 ** (value - power))
        power, digit = (power + 1, 1) if digit == 10 else (power, digit)
        shown = f"{digit}e−{-power}"
    return f'<td class="n" data-v="{value!r}">{shown}</td>'


def number_cell(value: float | None, decimals: int) -> str:
    """A cell that sorts by its full value and shows it to some decimals."""
    if value is None or value != value:
        return '<td class="n" data-v="NaN">–</td>'
    shown = f"{value:,.{decimals}f}".replace("-", "−")
    return f'<td class="n" data-v="{value!r}">{shown}</td>'
