"""The wiring diagram: heads in columns by layer, the strongest pairs as curves between them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from html import escape
from typing import Any

from skhead._report.chance import FDR, STANDS_OUT
from skhead._report.data import Analysis
from skhead._report.layout import BOX_HEIGHT, Layout, Node, lay_out
from skhead._report.text import number

__all__ = ["CLASS_COLOURS", "class_colours", "wiring_diagram"]

#: Fills that colour-blind readers can tell apart (P. Tol's "muted" scheme), and the text on each.
CLASS_COLOURS = (
    ("#88ccee", "#111"), ("#ddcc77", "#111"), ("#cc6677", "#111"), ("#117733", "#fff"),
    ("#332288", "#fff"), ("#44aa99", "#111"), ("#aa4499", "#fff"), ("#999933", "#111"),
    ("#882255", "#fff"),
)  # fmt: skip
_FURTHER = ("#6b6f76", "#fff")


def class_colours(names: list[str]) -> dict[str, tuple[str, str]]:
    """Fill and text colour of every class, in the order given; those past nine share a grey."""
    return {
        name: CLASS_COLOURS[i] if i < len(CLASS_COLOURS) else _FURTHER
        for i, name in enumerate(names)
    }


def wiring_diagram(analysis: Analysis, colours: dict[str, tuple[str, str]]) -> str:
    """SVG of the wiring graph; every head is focusable and carries its details.

    Parameters
    ----------
    analysis : Analysis
    colours : dict
        From `class_colours`.

    Returns
    -------
    str
    """
    layout = lay_out(analysis)
    described = _descriptions(analysis)
    drawn = _edges(analysis, layout)
    heads = [
        _node(node, layout.box, analysis, colours, described[node.label])
        for node in dict.fromkeys(layout.nodes.values())
    ]
    titles = "".join(
        f'<text class="column" x="{x:.1f}" y="16">{escape(name)}</text>'
        for x, name in layout.headings
    )
    label = f"Wiring diagram: {len(drawn)} pairs between {len(described)} heads"
    return (
        f'<svg id="wiring" viewBox="0 0 {layout.width:.0f} {layout.height:.0f}" '
        f'width="{layout.width:.0f}" role="group" aria-label="{label}">{titles}'
        f'<g class="edges">{"".join(drawn)}</g><g class="nodes">{"".join(heads)}</g></svg>'
    )


def _edges(analysis: Analysis, layout: Layout) -> list[str]:
    """Curves of all kinds; within its kind the strongest pair is the darkest."""
    edges, null = analysis.edges, analysis.options.null
    kinds = list(dict.fromkeys(edges["pair"]))
    drawn = []
    for place, kind in enumerate(kinds):
        shift = (place - (len(kinds) - 1) / 2) * 4
        among = edges[edges["pair"] == kind]
        low, high = float(among["score"].min()), float(among["score"].max())
        for edge in among.to_dict("records"):
            strength = (edge["score"] - low) / (high - low) if high > low else 0.5
            drawn.append(_edge(edge, layout, shift, strength, null))
    return drawn


def _edge(edge: dict[str, Any], layout: Layout, shift: float, strength: float, null: str) -> str:
    path = _curve(edge["source"], edge["target"], layout, shift)
    text = (
        f"{edge['pair']} {edge['source']} → {edge['target']}: PK {number(edge['score'])}, "
        f"{number(edge['ratio'], 3)} × random{_judged(edge, null)}"
    )
    weak = ("" if edge["above"] else " weak") + " standing" * (edge[f"q_{STANDS_OUT}"] <= FDR)
    return (
        f'<g class="edge{weak} pair-{edge["pair"]}" data-pair="{edge["pair"]}" '
        f'data-source="{escape(edge["source"])}" data-target="{escape(edge["target"])}" '
        f'style="--o:{0.35 + 0.6 * strength:.2f};--w:{1.1 + 1.9 * strength:.1f}">'
        f'<path class="hit" d="{path}"><title>{escape(text)}</title></path>'
        f'<path class="line" d="{path}"/></g>'
    )


def _judged(edge: Mapping[Any, Any], null: str) -> str:
    """What the null laws say of an edge, as far as they say anything."""
    text = ""
    if edge[f"z_{null}"] == edge[f"z_{null}"]:
        text = f", z {number(edge[f'z_{null}'], 3)} ({null})"
    return text + ", stands out" * (edge[f"q_{STANDS_OUT}"] <= FDR)


def _curve(source: str, target: str, layout: Layout, shift: float) -> str:
    """Path from the writer's right to the reader's left, level where it passes a column."""
    start, end = layout.nodes["writes", source], layout.nodes["reads", target]
    x, y = start.x + layout.box, start.y + BOX_HEIGHT / 2 + shift
    path = [f"M{x:.1f} {y:.1f}"]
    stops = [(left, middle + shift, layout.box) for left, middle in layout.routes[source, target]]
    for left, height, level in [*stops, (end.x, end.y + BOX_HEIGHT / 2 + shift, 0.0)]:
        reach = (left - x) * 0.5
        path.append(
            f"C{x + reach:.1f} {y:.1f} {left - reach:.1f} {height:.1f} {left:.1f} {height:.1f}"
        )
        if level:
            path.append(f"h{level:.1f}")
        x, y = left + level, height
    return "".join(path)


def _node(
    node: Node,
    box: float,
    analysis: Analysis,
    colours: dict[str, tuple[str, str]],
    details: dict[str, Any],
) -> str:
    name = analysis.table["class"][node.label] if "class" in analysis.table else "None"
    style = ""
    if name != "None":
        fill, ink = colours[name]
        style = f' style="--fill:{fill};--ink-on:{ink}"'
    spoken = f"{node.label}, {details['head']}; {'; '.join(details['edges'])}"
    kind = "node classed" if style else "node"
    linked = node.label in analysis.carded
    tag, way = ("a", f'href="#{escape(node.label)}"') if linked else ("g", 'role="img"')
    return (
        f'<{tag} class="{kind}" tabindex="0" {way} '
        f'data-head="{escape(node.label)}" aria-label="{escape(spoken)}" '
        f'data-details="{escape(json.dumps(details))}"{style}>'
        f'<rect x="{node.x:.1f}" y="{node.y:.1f}" width="{box:.1f}" height="{BOX_HEIGHT}" rx="6"/>'
        f'<text x="{node.x + box / 2:.1f}" y="{node.y + 15.5:.1f}">{escape(node.label)}</text>'
        f"</{tag}>"
    )


def _descriptions(analysis: Analysis) -> dict[str, dict[str, Any]]:
    """What the page shows about a head that is pointed at: a line on the head, a line per edge."""
    edges: dict[str, list[str]] = defaultdict(list)
    for edge in analysis.edges.to_dict("records"):
        score = f"PK {number(edge['score'])}, {number(edge['ratio'], 3)} × random"
        score += _judged(edge, analysis.options.null)
        edges[edge["source"]].append(f"{edge['pair']} → {edge['target']} {score}")
        edges[edge["target"]].append(f"{edge['pair']} ← {edge['source']} {score}")
    described = {}
    for label, listed in edges.items():
        row: dict[str, Any] = analysis.table.loc[label].to_dict()  # type: ignore[assignment]
        words = [] if row.get("class", "None") == "None" else [str(row["class"])]
        words.append(f"{row['out_degree']:.0f} out, {row['in_degree']:.0f} in")
        if analysis.within_head:
            words.append(
                f"PK(V,O) {number(row['pk_vo'], 3)}, signed identity "
                f"{number(row['identity_signed'], 3)}"
            )
        described[label] = {"head": " · ".join(words), "edges": listed}
    return described
