"""The cards of a report: one for every head, with what it does, reads, writes and is wired to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from skhead._report.chance import FDR
from skhead._report.data import Analysis, Cards
from skhead._report.glossary import (
    COMPOSITION,
    MAPS,
    PLACES,
    WORDS,
    figures,
    random_figures,
)
from skhead._report.operations import LARGEST_Q, LEAST_LIFT
from skhead._report.partners import Link, Links, find_links, strongest_partners
from skhead._report.roles import head_link, missing_words, plain
from skhead._report.text import because, number, rate
from skhead._report.words import READS

__all__ = ["head_cards"]

#: Partners that a card lists, of each kind and side.
_PARTNERS = 3

Numbers = Mapping[str, Any]


def head_cards(analysis: Analysis, cards: Cards, numbers: Numbers) -> str:
    """All cards, with a filter and an account of their figures.

    Parameters
    ----------
    analysis : Analysis
    cards : Cards
    numbers : mapping
        From `skhead._report.numbers.summarize`.

    Returns
    -------
    str
    """
    constant = frozenset(p for p, row in numbers["projection_kernel"].items() if row["constant"])
    writer = _Writer(analysis, cards, constant)
    drawn, layer = [], None
    for label in cards.labels:
        if (own := int(analysis.table["layer"][label])) != layer:
            layer = own
            drawn.append(f"<h3>Layer {layer}</h3>")
        drawn.append(writer.card(label))
    return (
        f"<p>{escape(_introduction(analysis, cards))}</p>{_key(analysis, cards)}"
        '<div class="tools scripted"><label>Filter <input type="search" id="card-filter" '
        'placeholder="L4H7 or induction"></label><button type="button" id="card-toggle">Open all'
        f'</button><span class="note" id="card-count" role="status">{len(cards.labels)} of '
        f'{len(cards.labels)}</span></div><div id="card-list">{"".join(drawn)}</div>'
    )


def _introduction(analysis: Analysis, cards: Cards) -> str:
    shown, total = len(cards.labels), len(analysis.heads)
    words = "A card for every head: what it does in plain words, its figures, and its partners."
    if shown < total:
        words = (
            f"Cards for {shown:,} of {total:,} heads: those in the diagram, and the ones with the "
            "largest scores of each kind. heads.csv has the figures of all."
        )
    words += (
        " Open a card with a click or the Enter key; every head's label on this page leads to its "
        "card, and so does the page's address followed by # and the label."
    )
    if analysis.scope == "shared":
        words += (
            " Layers share their weights: a card of layer 0 lists readers of what the head writes, "
            "the card of layer 1 with the same number the writers that it reads from."
        )
    if analysis.scope == "all":
        words += " In a model of one layer the partners listed are no path of information."
    return words


def _key(analysis: Analysis, cards: Cards) -> str:
    """What every figure is, and what random heads get."""
    info = analysis.info
    random = random_figures(info.d_model, info.d_head)
    missing = cards.scores.missing
    rows = "".join(
        f"<tr><th scope=row>{escape(word)}</th><td>{escape(random.get(name, '–'))}</td>"
        f'<td class="wrap">{escape(what)}</td><td><code>{name}</code></td></tr>'
        for name, word, what in figures()
        if name in cards.scores.table and name not in missing
    )
    more = _star(analysis)
    if cards.tokens.lists:
        chance = number((info.d_head / info.d_model) ** 0.5, 2)
        more += (
            "<p>Nearest tokens: cosine between the subspace that a head writes to and the row of "
            "the unembedding, centred over the vocabulary; a head may write towards a token or "
            f"away from it. A random direction gets about {chance}.</p>"
        )
    return (
        '<details class="glossary"><summary>What the figures mean, and what a random head gets'
        '</summary><div class="scroll" tabindex="0" role="region" aria-label="Figures of cards">'
        '<table id="figure-table"><thead><tr><th scope=col>Figure</th><th scope=col>Random</th>'
        "<th scope=col>What it is</th><th scope=col>Column of heads.csv</th></tr></thead>"
        f"<tbody>\n{rows}</tbody></table></div>{more}</details>"
    )


def _star(analysis: Analysis) -> str:
    if analysis.kernel.calibration is None:
        return ""
    return (
        "<p>Partners: PK is the overlap, × random its ratio to random subspaces of the same ranks, "
        f"z its deviation from the null law {escape(analysis.options.null)} in standard "
        "deviations; * marks pairs that this law calls, for more or for less overlap, at a false "
        f"discovery rate of {FDR:.0%}; "
        "composition is over its value for random maps.</p>"
    )


class _Writer:
    """Writes cards of one model."""

    def __init__(self, analysis: Analysis, cards: Cards, constant: frozenset[str]) -> None:
        self.analysis, self.cards, self.constant = analysis, cards, constant
        composition = analysis.composition
        self.links: Links = find_links(analysis.kernel, composition, constant, _PARTNERS)
        self.partners = {} if composition is None else strongest_partners(composition)
        self.operations = {} if analysis.operations is None else analysis.operations.said()
        self.lacking = "".join(
            f'<p class="lacking">{escape(text)}</p>'
            for text in missing_words(cards, analysis.info.source)
        )

    def card(self, label: str) -> str:
        row = {str(name): value for name, value in self.analysis.table.loc[label].items()}
        held = self.cards.verdicts[label]
        words = [plain(rule, label, self.partners) for rule in held]
        words += [said.words for said in self.operations.get(label, [])]
        name = row.get("class", "None")
        chip = "" if name == "None" else f'<span class="chip">{escape(str(name))}</span>'
        text = escape(label)
        return (
            f'<details class="card" id="{text}"><summary><strong>{text}</strong>{chip}'
            f'<span class="plain">{escape("; ".join(words) or "nothing above the thresholds")}'
            f"</span></summary>{self._evidence(label, row)}{self.lacking}"
            f'<div class="sides">{self._side(label, "in")}{self._side(label, "out")}</div>'
            f"{self._tokens(label, row)}{self._figures(label, row)}"
            f'<p class="back"><a href="#diagram">Diagram</a> <a href="#roles">What heads do</a></p>'
            "</details>\n"
        )

    def _evidence(self, label: str, row: Mapping[str, Any]) -> str:
        """What is said of the head, each with its figures and thresholds."""
        items = []
        for rule in self.cards.verdicts[label]:
            told = ", ".join(
                f"{WORDS[c.score]} {_figure(row[c.score])} ({c.words}; random {c.random})"
                for c in rule.conditions
            )
            words = escape(plain(rule, label, self.partners))
            items.append(f'<li>{words} <span class="note">{escape(told)}</span></li>')
        items += [
            f'<li>{escape(said.words)} <span class="note">score {_figure(said.score)}, lift '
            f"{_figure(said.lift)} (at least {LEAST_LIFT}), q {escape(rate(said.q))} "
            f"(at most {LARGEST_Q})</span></li>"
            for said in self.operations.get(label, [])
        ]
        if not items:
            return '<p class="said">No score reaches the threshold of any plain word.</p>'
        return f'<ul class="said">{"".join(items)}</ul>'

    def _side(self, label: str, side: str) -> str:
        """Partners on one side as a table; a sentence where there are none."""
        title = "Reads from" if side == "in" else "Is read by"
        which = "earlier" if side == "in" else "later"
        kinds = self.links.get(label, {}).get(side, {})
        rows = "".join(self._link(pair, link) for pair, links in kinds.items() for link in links)
        if not rows:
            none = f"There is no {which} head to compare with."
            if self.constant and not kinds:
                none = "All overlaps are fixed by the ranks and tell heads not apart."
            return f'<div><h4>{title}</h4><p class="note">{none}</p></div>'
        heads = ["", "Head", "PK", "× random"]
        if self.analysis.kernel.calibration is not None:
            heads.append("z")
        if self.analysis.composition is not None:
            heads.append("Composition")
        head = "".join(
            f"<th scope=col{' class=n' if i > 1 else ''}>{text}</th>"
            for i, text in enumerate(heads)
        )
        return (
            f'<div><h4>{title}</h4><div class="scroll"><table id="{escape(label)}-{side}"><thead>'
            f"<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></div>"
        )

    def _link(self, pair: str, link: Link) -> str:
        cells = [number(link.score), number(link.ratio, 3)]
        if self.analysis.kernel.calibration is not None:
            mark = "*" if link.q is not None and link.q <= FDR else ""
            cells.append(number(link.z, 3) + mark)
        if self.analysis.composition is not None:
            cells.append(number(link.composition, 3))
        figures = "".join(f"<td class=n>{text}</td>" for text in cells)
        return (
            f'<tr class="pair-{pair}"><td><span class="dot"></span>{READS[pair]}</td>'
            f"<td>{head_link(link.label, self.analysis.carded)}</td>{figures}</tr>"
        )

    def _tokens(self, label: str, row: Mapping[str, Any]) -> str:
        nearest, why = self.cards.tokens, self.cards.tokens.refusal
        if row["rank_O"] >= self.analysis.info.d_model:
            why = "it writes to the whole residual stream"
        if why is not None:
            what = "Tokens nearest to what it writes are not told"
            told = because(what, why, self.analysis.info.source)
            return f'<p class="lacking">{escape(told)}</p>'
        items = ", ".join(
            f"<code>{escape(text) if text is not None else token}</code> {number(score, 2)}"
            for token, text, score in nearest.lists[label]
        )
        what = "Tokens" if nearest.named else "Tokens (ids)"
        return f'<p class="tokens">{what} nearest to what it writes: {items}</p>'

    def _figures(self, label: str, row: Mapping[str, Any]) -> str:
        """The head's own scores in three tables; what is missing is left out."""
        known = set(self.cards.scores.table) - set(self.cards.scores.missing)

        def cell(column: str | None) -> str:
            if column is None or column not in known:
                return "<td></td>"
            return f"<td class=n>{_figure(row[column])}</td>"

        maps = [
            f"<tr><th scope=row>{word}</th>{cell(ov)}{cell(qk)}</tr>"
            for word, ov, qk, _ in MAPS
            if {ov, qk} & known
        ]
        places = [
            f"<tr><th scope=row>{word}</th>{cell(column)}</tr>"
            for word, column, _ in PLACES
            if column in known
        ]
        composed = [
            f"<tr><th scope=row>{reads}</th>"
            + "".join(
                cell(f"{kind}_composition_{side}_{how}")
                for side in ("in", "out")
                for how in ("max", "mean")
            )
            + "</tr>"
            for kind, reads in COMPOSITION
            if f"{kind}_composition_in_max" in known
        ]
        ranks = ", ".join(f"{role} {int(row[f'rank_{role}'])}" for role in "QKVO")
        text = escape(label)
        return (
            '<div class="sides figures">'
            + _table(f"{text}-maps", "Its maps", ("OV", "QK"), maps)
            + _table(f"{text}-places", "Attention and induction", ("score",), places)
            + _table(
                f"{text}-composition",
                "Composition × random",
                ("earlier: largest", "mean", "later: largest", "mean"),
                composed,
            )
            + f'</div><p class="note">Numerical ranks: {ranks}.</p>'
        )


def _table(name: str, title: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th scope=col class=n>{text}</th>" for text in columns)
    return (
        f'<div><h4>{title}</h4><table id="{name}"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure(value: float) -> str:
    """A score to three decimals, or four digits from ten on."""
    if abs(value) >= 10:
        return number(value)
    shown = f"{value:.3f}".replace("-", "−")
    return "0.000" if shown == "−0.000" else shown
