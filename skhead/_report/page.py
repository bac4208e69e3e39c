"""Assembly of the page: sections, tables and downloads around the drawings."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Any

import torch

import skhead
from skhead._report.cards import head_cards
from skhead._report.chance import FDR, STANDS_OUT
from skhead._report.class_section import classes
from skhead._report.data import Analysis
from skhead._report.diagram import class_colours, wiring_diagram
from skhead._report.figures import composition, distributions, layer_maps, matrices
from skhead._report.head_section import all_heads
from skhead._report.induction_section import induction
from skhead._report.operation_section import operations
from skhead._report.questions import chance
from skhead._report.roles import roles
from skhead._report.tables import edge_table, furthest_table, hub_table
from skhead._report.words import READS, notes, summary_words

__all__ = ["Download", "assemble", "download_list", "render"]

#: Bytes of a file up to which the page carries it.
_MOST_CARRIED = 250_000
#: Turns the colours round; the script shows it.
THEME = (
    '<button type="button" id="theme" class="scripted" aria-pressed="false">Dark colours</button>'
)
_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "rmsnorm+1": "RMSNorm, gain 1 + w"}


@dataclass(frozen=True)
class Download:
    """A file that lies beside the page.

    Attributes
    ----------
    name : str
        Empty where a file was left out and `what` says why.
    what : str
        What it holds.
    media : str
        Media type.
    content : bytes or None
        Carried inside the page too, unless None or long.
    """

    name: str
    what: str
    media: str
    content: bytes | None


def render(analysis: Analysis, numbers: Mapping[str, Any], downloads: Sequence[Download]) -> str:
    """The whole page.

    Parameters
    ----------
    analysis : Analysis
    numbers : mapping
        From `skhead._report.numbers.summarize`.
    downloads : sequence of Download

    Returns
    -------
    str
    """
    info = analysis.info
    layers = (
        len(numbers["source"]["layers_with_heads"]) if analysis.scope != "shared" else info.n_layers
    )
    lead = (
        f"{layers} layer{'s' * (layers != 1)} × {info.n_heads} head{'s' * (info.n_heads != 1)}, "
        f"d_model {info.d_model}. The projection kernel (PK) measures how much of what one head "
        "writes (O) lies in what another reads with its queries (Q), keys (K) or values (V)."
    )
    return assemble(
        title=f"{info.name}: wiring of attention heads",
        kicker="Wiring of attention heads, read from weights",
        name=info.name,
        lead=lead,
        sections=_sections(analysis, numbers, downloads),
    )


def _sections(
    analysis: Analysis, numbers: Mapping[str, Any], downloads: Sequence[Download]
) -> list[tuple[str, str, str]]:
    """Identifier, heading and markup of what there is to tell, in the order of the page."""
    cards, scores = analysis.cards, analysis.composition
    sections = [
        ("summary", "What stands out", _summary(analysis, numbers)),
        ("read", "What was read", _read(analysis, numbers)),
        ("diagram", "Wiring diagram", _diagram(analysis, numbers)),
    ]
    if cards is not None:
        sections.append(("roles", "What single heads do", roles(analysis, cards)))
    sections.append(("heads", "All heads", all_heads(analysis)))
    if analysis.guesses:
        sections.append(("classes", "Classes of heads", classes(analysis)))
    if analysis.induction is not None:
        drawn = induction(analysis.induction, analysis)
        sections.append(("induction", "Induction circuits", drawn))
    if analysis.operations is not None:
        drawn = operations(analysis, analysis.operations, numbers)
        sections.append(("operations", "Operations on tokens", drawn))
    sections += [
        ("distributions", "Overlap against random subspaces", distributions(analysis, numbers)),
        ("chance", "What is more than chance?", chance(numbers)),
        ("maps", "Heads by layer", layer_maps(analysis)),
        ("matrices", "Every pair of heads", matrices(analysis)),
        ("hubs", "Hubs", hub_table(analysis, numbers)),
        ("edges", "Strongest pairs", edge_table(analysis)),
        ("furthest", "Pairs that stand out", furthest_table(analysis)),
    ]
    if scores is not None:
        drawn = composition(analysis, scores, numbers)
        sections.append(("composition", "Composition scores", drawn))
    if cards is not None:
        sections.append(("cards", "Head cards", head_cards(analysis, cards, numbers)))
    return [*sections, ("files", "Files", download_list(downloads))]


def assemble(
    *, title: str, kicker: str, name: str, lead: str, sections: Sequence[tuple[str, str, str]]
) -> str:
    """A page of sections with style, script and links to the sections.

    Parameters
    ----------
    title, kicker, name, lead : str
        Plain texts of the window, above the heading, of the heading, and below it.
    sections : sequence of (str, str, str)
        Identifier, heading and markup of each.

    Returns
    -------
    str
    """
    texts = {
        "version": skhead.__version__,
        "torch": torch.__version__,
        "title": title,
        "kicker": kicker,
        "name": name,
        "lead": lead,
    }
    pieces = {key: escape(value) for key, value in texts.items()} | {
        "style": _asset("style.css"),
        "script": _asset("script.js"),
        "theme": THEME,
        "navigation": " ".join(f'<a href="#{key}">{words}</a>' for key, words, _ in sections),
        "sections": "\n".join(
            f'<section id="{key}" aria-labelledby="h-{key}"><h2 '
            f'id="h-{key}">{words}</h2>\n{body}\n</section>'
            for key, words, body in sections
        ),
    }
    return Template(_asset("template.html")).substitute(pieces)


def _asset(name: str) -> str:
    return resources.files("skhead._report").joinpath(name).read_text(encoding="utf-8").rstrip("\n")


def _summary(analysis: Analysis, numbers: Mapping[str, Any]) -> str:
    paragraphs = "".join(f"<p>{escape(text)}</p>" for text in summary_words(analysis, numbers))
    listed = "".join(f"<li>{escape(text)}</li>" for text in notes(analysis, numbers))
    beside = f'<ul class="notes">{listed}</ul>' if listed else ""
    return f'<div class="aside"><div class="prose first">{paragraphs}</div>{beside}</div>'


def _read(analysis: Analysis, numbers: Mapping[str, Any]) -> str:
    source, info = numbers["source"], analysis.info
    record = numbers["comparison"]["record"]
    processing = [
        text
        for key, text in (("fold_norm", "norm gains folded in"), ("center", "centred"))
        if record[key]
    ]
    ranks = {
        role: f"{low}" if low == high else f"{low} to {high}"
        for role, (low, high) in source["numerical_ranks"].items()
    }
    kv = f", {info.n_kv_heads} for keys and values" if info.n_kv_heads != info.n_heads else ""
    norm = _NORMS.get(info.norm, "none")
    placed = f", {info.norm_placement}" if info.norm_placement != "none" else ""
    entries = [
        ("Source", info.source),
        ("Family", info.family + (f", {info.part}" if info.part else "")),
        ("Revision", info.revision or "none (not from a hub)"),
        ("Layers × heads", f"{info.n_layers} × {info.n_heads}{kv}; {source['heads']} heads in all"),
        ("Dimensions", f"d_model {info.d_model}, d_head {info.d_head}"),
        ("Stored as", info.dtype),
        ("Processing", ", ".join(processing) or "none: raw weights as stored"),
        ("Norm of the model", norm + placed),
        ("Numerical ranks", _by_role(ranks)),
        ("Distinct matrices compared", _by_role(source["distinct_matrices"])),
        ("Layers share weights", "yes" if info.shared_layers else "no"),
        ("Class labels", analysis.classes.name if analysis.classes else "none"),
    ]
    listed = "".join(
        f"<div{' class=wide' * (k == 'Source')}><dt>{k}</dt><dd>{escape(v)}</dd></div>"
        for k, v in entries
    )
    return f"<dl>{listed}</dl>"


def _by_role(values: Mapping[str, Any]) -> str:
    if len(set(values.values())) == 1:
        return f"{next(iter(values.values()))} in each role"
    return ", ".join(f"{role} {value}" for role, value in values.items())


def _diagram(analysis: Analysis, numbers: Mapping[str, Any]) -> str:
    kernel = numbers["projection_kernel"]
    k = analysis.options.k
    if analysis.scope == "all":
        order = "Writing heads stand on the left, reading heads on the right."
    else:
        order = (
            "Heads stand in columns by layer; every edge runs from left to right, from the head "
            "that writes to the head that reads."
        )
    words = (
        f"The {k} strongest pairs of each kind (fewer where there are fewer). {order} Heads and "
        "layers without an edge are left out. Stronger pairs are drawn darker and wider, within "
        "their kind."
    )
    if all(found["constant"] for found in kernel.values()):
        words += (
            " Here all pairs have the same overlap, fixed by the ranks alone: the edges are drawn "
            "for completeness and carry no information."
        )
    dashed = ""
    if not analysis.edges["above"].all():
        dashed = '<span class="key"><span class="swatch dashed"></span>not above random</span>'
    toggles = "".join(
        f'<label class="pair-{pair}"><input type="checkbox" checked id="show-{pair}" '
        f'data-kind="{pair}"><span class="swatch"></span>{pair}, read by {READS[pair]}</label>'
        for pair in kernel
    )
    standing = ""
    if (analysis.edges[f"q_{STANDS_OUT}"] <= FDR).any():
        standing = (
            '<label class="scripted"><input type="checkbox" id="only-standing">only pairs that '
            f"stand out ({STANDS_OUT}, q ≤ {FDR})</label>"
        )
    colours = class_colours(sorted(numbers["classes"]["counts"]) if numbers["classes"] else [])
    legend, drawing = _legend(analysis, colours), wiring_diagram(analysis, colours)
    opens = " A click or the Enter key opens the card of a head." if analysis.carded else ""
    return (
        f'<p>{words}</p><div class="tools"><span class="scripted kinds">{toggles}</span>{standing}'
        f"{dashed}</div>{legend}"
        '<p class="note narrow">The diagram scrolls sideways.</p>'
        '<div class="wire"><div class="scroll" tabindex="0" role="region" aria-label="Diagram">'
        f"{drawing}</div>"
        '<div id="details" aria-live="polite"><p>Point at a head or an edge, or move to a head '
        f"with the Tab key, to see its pairs and scores here.{opens}</p></div></div>"
    )


def _legend(analysis: Analysis, colours: Mapping[str, tuple[str, str]]) -> str:
    """Colours of the classes that the diagram shows."""
    if analysis.classes is None:
        return ""
    active = analysis.table[analysis.table["degree"] > 0]["class"]
    items = [
        f'<li><span class="swatch" style="--fill:{fill}"></span>{escape(name)}</li>'
        for name, (fill, _) in colours.items()
        if (active == name).any()
    ]
    if (active == "None").any():
        items.append('<li><span class="swatch"></span>no class</li>')
    return f'<ul class="classes" aria-label="Classes of heads">{"".join(items)}</ul>'


def download_list(downloads: Sequence[Download]) -> str:
    """Links to the files beside the page."""
    items = []
    for file in downloads:
        if not file.name:
            link = escape(file.what)
        elif file.content is None or len(file.content) > _MOST_CARRIED:
            link = f'<a href="{file.name}">{file.name}</a>, beside this page: {escape(file.what)}'
        else:
            data = base64.b64encode(file.content).decode("ascii")
            link = (
                f'<a download="{file.name}" '
                f'href="data:{file.media};base64,{data}">{file.name}</a>: {escape(file.what)} '
                f'(also <a href="{file.name}">beside this page</a>)'
            )
        items.append(f"<li>{link}</li>")
    return (
        "<p>Where there is a pair of links, the first works from this page alone, wherever it is "
        "copied.</p>"
        f'<ul class="downloads">{"".join(items)}</ul>'
    )
