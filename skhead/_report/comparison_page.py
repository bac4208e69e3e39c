"""The page on two models: what differs, and what cannot be compared and why."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from skhead._report.chance import FDR
from skhead._report.charts import Histogram, layer_map, legend_bar, limits_of
from skhead._report.class_section import probability
from skhead._report.classes import likeliest
from skhead._report.comparison import Comparison, title_of
from skhead._report.data import Analysis, ratios_of
from skhead._report.glossary import figures
from skhead._report.page import Download, assemble, download_list
from skhead._report.raster import Scale
from skhead._report.tables import filtered, kind_cell, number_cell, rate_cell, table, text_cell
from skhead._report.text import because, number

__all__ = ["render_comparison"]

#: Rows that the page lists of edges that differ; all are in the file.
_MOST_EDGES = 300
#: Scores that the table of heads shows; all are in the file.
_SHOWN = (
    ("qk_norm", "norm of QK"),
    ("ov_norm", "norm of OV"),
    ("previous_token", "previous token"),
    ("ov_copying", "copying"),
    ("induction_strength", "induction"),
    ("identity_signed", "signed identity"),
)

Section = tuple[str, str, str]


def render_comparison(found: Comparison, downloads: Sequence[Download]) -> str:
    """The whole page.

    Parameters
    ----------
    found : Comparison
    downloads : sequence of Download

    Returns
    -------
    str
    """
    sections: list[Section] = [
        ("read", "What is compared", _read(found)),
        ("summary", "What stands out", _summary(found)),
    ]
    if found.refusal is None:
        sections += [
            ("heads", "Head by head", _heads(found)),
            ("pairs", "Pairs of heads", _pairs(found)),
            ("edges", "Pairs that appear or vanish", _edges(found)),
        ]
    sections += [
        ("overlaps", "Overlap against random subspaces", _overlaps(found)),
        ("scores", "Scores of single heads", _scores(found)),
        ("roles", "What single heads do", _roles(found)),
        ("classes", "Classes of heads", _classes(found)),
        ("spectra", "Spectra", _spectra(found)),
        ("files", "Files", download_list(downloads)),
    ]
    names = [title_of(side) for side in found.sides]
    return assemble(
        title=f"{names[0]} and {names[1]}: attention heads compared",
        kicker="Attention heads compared, read from weights",
        name=" / ".join(dict.fromkeys(side.info.name for side in found.sides)),
        lead=f"A: {names[0]}. B: {names[1]}.",
        sections=sections,
    )


def _scroll(title: str, body: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{body}</div>'
    )


def _read(found: Comparison) -> str:
    if found.refusal is None:
        words = "Both have the same heads in one residual stream, so that they are compared head "
        words += "by head."
        if found.matched is not None:
            words += f" What {found.matched:.0%} of the heads of A write lies closest to what the "
            words += "same head of B writes."
    else:
        words = (
            f"Heads of A have no counterpart in B: {found.refusal}. Distances of subspaces, "
            "overlaps between heads of A and B, and edges that appear or vanish are therefore not "
            "told. What follows is what every head is within its own model: how its overlaps stand "
            "to random ones, its scores, its likely class, and the spectra of its maps."
        )
    rows, entries = [], [_entries(side) for side in found.sides]
    for title in entries[0]:
        cells = "".join(f"<td>{escape(entry[title])}</td>" for entry in entries)
        rows.append(f"<tr><th scope=row>{title}</th>{cells}</tr>")
    return (
        f"<p>{escape(words)}</p>"
        + _scroll(
            "What is compared",
            '<table id="side-table" class="plainrows"><thead><tr><td></td><th scope=col>A</th>'
            f"<th scope=col>B</th></tr></thead><tbody>{''.join(rows)}</tbody></table>",
        )
    )  # fmt: skip


def _entries(side: Analysis) -> dict[str, str]:
    """What was read of one side, by title."""
    info = side.info
    return {
        "Source": info.source,
        "Revision": info.revision or "none",
        "Family": info.family,
        "Layers × heads": f"{info.n_layers} × {info.n_heads}",
        "Heads compared": f"{len(side.heads):,}",
        "d_model, d_head": f"{info.d_model}, {info.d_head}",
        "Norm gains folded in": "yes" if side.options.fold_norm else "no",
        "Centred": "yes" if side.options.center else "no",
        "Class labels": side.classes.name if side.classes else "none",
    }


def _summary(found: Comparison) -> str:
    """What differs most, most important first."""
    told = _moved(found) if found.refusal is None else [_medians(found)]
    far = found.scores["ks"].drop(["qk_norm", "ov_norm"], errors="ignore")
    if len(far):
        names = {name: word for name, word, _ in figures()}
        name = str(far.idxmax())
        told.append(
            f"Of the scores of single heads, norms apart, {names.get(name, name)} is distributed "
            f"most differently (distance {number(float(far.max()), 2)} of 1)."
        )
    return f'<p class="prose">{escape(" ".join(told))}</p>'


def _moved(found: Comparison) -> list[str]:
    data = found.heads
    columns = [f"distance_{role}" for role in "QKVO" if f"distance_{role}" in data]
    means = [f"{number(float(data[c].mean()), 2)} for {c[-1]}" for c in columns]
    furthest = data[columns].max(axis=1).idxmax()
    told = [
        (
            f"The subspaces of A and B are {', '.join(means)} apart on average (0 is the same, 1 "
            f"orthogonal), those of {furthest} the furthest."
        )
    ]
    known = found.pairs["spearman"].dropna()
    if len(known):
        told.append(
            f"The overlaps of pairs rank alike with a correlation of {number(known.min(), 3)} "
            f"({known.idxmin()}) or more."
        )
    if _judges_both(found):
        change = found.edges["change"]
        told.append(
            f"Of the pairs called by the null law, {int(found.pairs['called_both'].sum()):,} are "
            f"so in both, {(change == 'vanishes').sum():,} in A only, "
            f"{(change == 'appears').sum():,} in B only."
        )
    return told


def _medians(found: Comparison) -> str:
    medians = found.overlaps.pivot(index="pair", columns="side", values="median").dropna()
    shown = [
        f"{pair} {number(row['A'], 3)} and {number(row['B'], 3)}"
        for pair, row in medians.to_dict("index").items()
    ]
    return f"Median overlap over random, in A and in B: {', '.join(shown)}."


def _heads(found: Comparison) -> str:
    data, (first, _) = found.heads, found.sides
    roles = [role for role in "QKVO" if f"distance_{role}" in data]
    random = 1 - first.info.d_head / first.info.d_model
    furthest = max(float(data[f"distance_{role}"].max()) for role in roles)
    scale = Scale(0.0, max(furthest, 1e-6))
    maps = "".join(
        layer_map(data, f"distance_{role}", scale, role, "distance of A and B") for role in roles
    )
    scores = [(name, title) for name, title in _SHOWN if f"{name}_a" in data]
    heads = [("Head", False), ("Layer", True)] + [(f"Distance {role}", True) for role in roles]
    heads += [(f"{title}, {side}", True) for _, title in scores for side in "AB"]
    heads += [("Edges, A", True), ("Edges, B", True)]
    if "class" in data:
        heads.insert(2, ("Class", False))
    rows = []
    for label, row in zip(data.index, data.to_dict("records"), strict=True):
        cells = [text_cell(str(label)), number_cell(row["layer"], 0)]
        if "class" in data:
            cells.append(text_cell("–" if row["class"] == "None" else row["class"]))
        cells += [number_cell(row[f"distance_{role}"], 4) for role in roles]
        cells += [number_cell(row[f"{name}_{side}"], 3) for name, _ in scores for side in "ab"]
        cells += [number_cell(row[f"degree_{side}"], 0) for side in "ab"]
        rows.append(cells)
    words = (
        "Distance is one less the projection kernel between the subspaces of A and B over their "
        "rank, the mean squared sine of their principal angles: 0 for one subspace, 1 for "
        f"orthogonal ones, {number(random, 3)} on average for unrelated ones. Edges counts pairs "
        "among the strongest of each kind."
    )
    body = table("head-table", "Head by head", heads, rows)
    return (
        f'<p>{words}</p>{legend_bar(scale, "distance")}<div class="panels maps">{maps}</div>'
        + filtered("head-table", "head", body, len(rows), "Head by head", "L4 or induction")
    )  # fmt: skip


def _pairs(found: Comparison) -> str:
    null = found.sides[0].options.null
    heads = [("Kind", False), ("Pairs", True), ("Rank correlation", True), ("Shared top", True)]
    heads += [("Called in A", True), ("in B", True), ("in both", True)]
    rows = [
        [
            kind_cell(str(pair)), number_cell(row["pairs"], 0), number_cell(row["spearman"], 4),
            f'<td class="n" data-v="{row["shared_top"]}">{row["shared_top"]} of {row["top"]}</td>',
            *(number_cell(row[f"called_{side}"], 0) for side in ("a", "b", "both")),
        ]
        for pair, row in found.pairs.to_dict("index").items()
    ]  # fmt: skip
    words = (
        "Rank correlation (Spearman) of the projection kernels of all pairs, how many of the "
        f"strongest pairs are the same, and how many pairs the null law {null} calls for more "
        f"overlap at a false discovery rate of {FDR:.0%}."
    )
    body = table("pair-table", "Agreement by pair kind", heads, rows)
    return f"<p>{words}</p>{_scroll('Agreement by pair kind', body)}{_refused(found)}"


def _judges_both(found: Comparison) -> bool:
    null = found.sides[0].options.null
    return all(side.verdicts[null].refusal is None for side in found.sides)


def _refused(found: Comparison) -> str:
    """Why a null law calls nothing on a side."""
    null = found.sides[0].options.null
    told = []
    for side, analysis in zip("AB", found.sides, strict=True):
        why = analysis.verdicts[null].refusal
        if why is not None:
            words = because(f"The null law calls no pair of {side}", why)
            told.append(f'<p class="lacking">{escape(words)}</p>')
    return "".join(told)


def _edges(found: Comparison) -> str:
    edges = found.edges.head(_MOST_EDGES)
    if not _judges_both(found):
        return f"<p>It takes a null law that judges both.</p>{_refused(found)}"
    if edges.empty:
        return "<p>The null law calls the same pairs in A and B.</p>"
    heads = [("Kind", False), ("Change", False), ("Writes", False), ("Reads", False)]
    heads += [(f"{what}, {side}", True) for what in ("PK", "z", "q") for side in "AB"]
    rows = [
        [
            kind_cell(row["pair"]), *(text_cell(row[c]) for c in ("change", "source", "target")),
            *(number_cell(row[f"score_{side}"], 3) for side in "ab"),
            *(number_cell(row[f"z_{side}"], 1) for side in "ab"),
            *(rate_cell(row[f"q_{side}"]) for side in "ab"),
        ]
        for row in edges.to_dict("records")
    ]  # fmt: skip
    counts = found.edges["change"].value_counts()
    words = (
        f"Pairs that are called in one of the two only: {counts.get('appears', 0):,} appear in B, "
        f"{counts.get('vanishes', 0):,} vanish, the largest change of z first. A pair whose q lies "
        "near the limit on both sides has changed little: read both."
    )
    if len(edges) < len(found.edges):
        words += f" The first {len(edges)} are listed, compare_edges.csv has all."
    body = table("edge-table", "Pairs that appear or vanish", heads, rows)
    return f"<p>{words}</p>" + filtered(
        "edge-table", "edge", body, len(rows), "Pairs that appear or vanish", "appears OK L5"
    )


def _overlaps(found: Comparison) -> str:
    heads = [("Kind", False), ("Side", False), ("Pairs", True), ("5% quantile", True)]
    heads += [("Median", True), ("95%", True), ("99%", True), ("Largest", True), ("Called", True)]
    rows = [
        [
            kind_cell(row["pair"]), text_cell(row["side"]), number_cell(row["pairs"], 0),
            *(number_cell(row[c], 3) for c in ("q05", "median", "q95", "q99", "largest")),
            number_cell(100 * row["called"], 2),
        ]
        for row in found.overlaps.to_dict("records")
    ]  # fmt: skip
    panels = []
    for pair in dict.fromkeys(found.overlaps["pair"]):
        known = [
            (name, ratios_of(side.kernel, pair))
            for name, side in zip("AB", found.sides, strict=True)
            if pair in side.kernel.pairs
        ]
        limits = limits_of([values for _, values in known], [1.0])
        for side, values in known:
            drawn = Histogram(pair, values, limits, 1.0, None, None, f"ratio of {side},").svg()
            panels.append(
                f"<figure><figcaption><strong>{pair}, {side}</strong></figcaption>{drawn}</figure>"
            )
    words = (
        "Projection kernel over its mean between random subspaces of the same ranks, which has one "
        "meaning in models of any width. Called is the share of pairs, in percent, that the null "
        f"law {found.sides[0].options.null} calls for more overlap at a false discovery rate of "
        f"{FDR:.0%}."
    )
    body = _scroll(
        "Ratio to random", table("overlap-table", "Ratio to random subspaces", heads, rows)
    )
    refused = _refused(found) if found.refusal else ""
    return f'<p>{words}</p>{body}{refused}<div class="panels two">{"".join(panels)}</div>'


def _scores(found: Comparison) -> str:
    told = {name: (word, what) for name, word, what in figures()}
    heads = [("Score", False), ("Distance", True)]
    heads += [(f"{q}, {side}", True) for side in "AB" for q in ("Quarter", "Median", "3 quarters")]
    heads.append(("What it is", False))
    rows = []
    for name, row in found.scores.sort_values("ks", ascending=False, kind="stable").iterrows():
        word, what = told.get(str(name), (str(name), ""))
        quartiles = [f"{q}_{side}" for side in "ab" for q in ("lower", "median", "upper")]
        cells = [text_cell(word), number_cell(float(row["ks"]), 3)]
        cells += [number_cell(float(row[q]), 3) for q in quartiles]
        rows.append([*cells, f'<td class="wrap">{escape(what)}</td>'])
    missing = {
        side: sorted(set(analysis.cards.scores.missing))
        for side, analysis in zip("AB", found.sides, strict=True)
        if analysis.cards is not None and analysis.cards.scores.missing
    }
    lacking = "".join(
        f'<p class="lacking">The file of {side} does not give: {escape(", ".join(names))}.</p>'
        for side, names in missing.items()
    )
    words = (
        "How the scores of all heads are distributed. Distance (Kolmogorov-Smirnov) is the largest "
        "difference between the shares of heads below a value, 0 for equal distributions and 1 for "
        "separate ones. Norms depend on the scale of a model's stream, and ranks and overlaps on "
        "d_head and d_model, so that they differ between models of different size in any case."
    )
    body = table("score-table", "Scores of single heads", heads, rows)
    return f"<p>{words}</p>{lacking}" + filtered(
        "score-table", "score", body, len(rows), "Scores of single heads", "copying"
    )


def _roles(found: Comparison) -> str:
    named: dict[str, str] = {}
    counts: list[dict[str, int]] = []
    for side in found.sides:
        assert side.cards is not None
        named |= {rule.key: rule.words.format(partner="one head") for rule in side.cards.rules}
        held = [rule.key for rules in side.cards.verdicts.values() for rule in rules]
        counts.append({rule.key: held.count(rule.key) for rule in side.cards.rules})
    totals = [len(side.heads) for side in found.sides]
    rows = []
    for key, words in named.items():
        cells = [text_cell(words)]
        for count, total in zip(counts, totals, strict=True):
            known = count.get(key)
            cells.append(number_cell(known, 0))
            cells.append(number_cell(None if known is None else 100 * known / total, 1))
        rows.append(cells)
    heads = [("What a head does", False)]
    heads += [(f"{what}, {side}", True) for side in "AB" for what in ("Heads", "Percent")]
    words = (
        "Heads whose scores reach the thresholds of the report on one model, which allow for "
        "d_model and d_head. A dash stands where the file lacks what it takes."
    )
    body = table("role-counts", "What single heads do", heads, rows)
    return f"<p>{words}</p>{_scroll('What single heads do', body)}"


def _classes(found: Comparison) -> str:
    words = (
        "Heads whose likeliest class has a probability of one half or more, by a classifier that "
        "learned from tiny models of known behaviour, and the likeliest head. The report on one "
        "model says how far to trust it. Labels, where there are some, are counted beside it."
    )
    heads = [("Side", False), ("Class", False), ("Heads", True), ("Likeliest", False)]
    heads.append(("Labelled", True))
    rows, lacking = [], []
    for side, analysis in zip("AB", found.sides, strict=True):
        guess = analysis.guesses["zoo"]
        labels = None if analysis.classes is None else analysis.classes.values
        names: dict[str, list[str]] = {}
        if guess.probabilities is None:
            why = because(f"Not told of {side}", str(guess.refusal), analysis.info.source)
            lacking.append(f'<p class="lacking">{escape(why)}</p>')
        else:
            best = likeliest(guess)
            sure = best[best["probability"] >= 0.5]
            for name in guess.probabilities:
                column = guess.probabilities[name]
                told = f"{column.idxmax()} {probability(float(column.max()))}"
                names[str(name)] = [
                    number_cell(int((sure["class"] == name).sum()), 0), f"<td>{told}</td>"
                ]  # fmt: skip
        listed = [] if labels is None else sorted(set(labels) - {"None"})
        for name in dict.fromkeys([*names, *listed]):
            count = None if labels is None else int((labels == name).sum())
            told_cells = names.get(name, [number_cell(None, 0), text_cell("–")])
            rows.append(
                [text_cell(side), text_cell(name), *told_cells, number_cell(count, 0)]
            )  # fmt: skip
    body = table("class-table", "Classes of heads", heads, rows) if rows else ""
    return f"<p>{words}</p>{''.join(lacking)}{_scroll('Classes of heads', body) if rows else ''}"


def _spectra(found: Comparison) -> str:
    heads = [("Map", False), ("Mean of all pairs", True), ("Mean of nearest", True)]
    shared = found.refusal is None
    if shared:
        heads.append(("Mean of namesakes", True))
    rows = []
    for name, row in found.spectra.to_dict("index").items():
        cells = [text_cell(str(name))]
        cells += [number_cell(row[column], 4) for column in ("mean", "nearest")]
        if shared:
            cells.append(number_cell(float(found.heads[f"spectrum_{name}"].mean()), 4))
        rows.append(cells)
    words = (
        "Cosine between the sorted singular values of the maps QK and OV of heads of A and of B, "
        "which needs no common basis. Nearest is the head of B whose spectrum is most like that of "
        "a head of A. Values crowd below 1, and a like spectrum is no like function."
    )
    body = table("spectrum-table", "Spectra", heads, rows)
    return f"<p>{words}</p>{_scroll('Spectra', body)}"
