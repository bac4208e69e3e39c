"""The section on chance: what each null law asks, and how many pairs it calls."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from skhead._report.tables import kind_cell, number_cell, table, text_cell
from skhead._report.text import because

__all__ = ["chance"]

#: Of every null law: the question it asks, and what an answer to it is good for.
QUESTIONS = {
    "haar": (
        "Would heads with random weights overlap like this?",
        (
            "Every direction counts alike. Right for untrained heads, and as a scale. Training "
            "draws heads towards common directions, so that nearly all pairs of a trained model "
            "are called in one direction or the other: a call says that the weights were trained, "
            "not that the two heads are wired together."
        ),
    ),
    "gaussian": (
        "Would heads with random weights overlap like this, if their overlap were normal?",
        (
            "The question of haar with the same mean and spread but thinner tails; right for "
            "comparison with published figures."
        ),
    ),
    "anisotropic": (
        "Do these two heads overlap more than any two that live in the same preferred directions?",
        (
            "The preferred directions are the mean subspaces of the heads, each pair being judged "
            "without itself. Right for measuring how far a pair departs from what all share. "
            "Heads differ from their mean in many ways, so that many pairs are called: read ratio "
            "and z as effect sizes, and the count as no list of discoveries."
        ),
    ),
    "signflip": (
        "Would the pair overlap as much if one head used the common directions with random signs?",
        (
            "Each head keeps how much it uses every common direction; only how it combines them "
            "is random. Right for telling an alignment in detail from a shared taste for "
            "directions."
        ),
    ),
    "empirical": (
        "Which pairs stand out from the other pairs of this model?",
        (
            "Most pairs are taken to be null, and how far they scatter around the level of writer "
            "and reader is the measure. Right for choosing pairs to look at. It cannot see what "
            "all pairs have in common, and it is rough where there are few."
        ),
    ),
}


def chance(numbers: Mapping[str, Any]) -> str:
    """Questions and counts of the null laws.

    Parameters
    ----------
    numbers : mapping
        From `skhead._report.numbers.summarize`.

    Returns
    -------
    str
    """
    nulls, kinds = numbers["nulls"], list(numbers["projection_kernel"])
    percent = f"{100 * nulls['fdr']:g}%"
    words = (
        "Whether an overlap is more than chance depends on what chance means. Each null law below "
        "stands for one meaning, and answers its own question only. A pair counts as called at a "
        f"false discovery rate of {percent} within its kind, two-sided: if unrelated pairs follow "
        f"the law, no more than about {percent} of the pairs called are false alarms. No law holds "
        "exactly, so that a q far below one in a million is nominal."
    )
    refusals = [law["refused"] for law in nulls["laws"].values()]
    if None not in refusals and len(set(refusals)) == 1:
        counted = f"<p>{escape(because('No null law can judge these heads', refusals[0]))}</p>"
        refusals = [None] * len(refusals)
    else:
        counted = _counts(nulls, kinds)
    asked = "".join(map(_question, nulls["laws"], refusals))
    return f'<p>{words}</p>{counted}<dl class="questions">{asked}</dl>'


def _question(name: str, refusal: str | None) -> str:
    question, use = QUESTIONS[name]
    refused = ""
    if refusal is not None:
        refused = f'<p class="refused">{escape(because("Not computed here", refusal))}</p>'
    return (
        f"<div><dt>{name}</dt><dd><strong>{escape(question)}</strong>"
        f"<p>{escape(use)}</p>{refused}</dd></div>"
    )


def _counts(nulls: Mapping[str, Any], kinds: list[str]) -> str:
    heads = [("Null", False), ("Kind", False), ("More", True), ("Less", True)]
    heads += [("Neither", True), ("Pairs", True), ("Median ratio", True)]
    rows = []
    for name, law in nulls["laws"].items():
        for pair in (kind for kind in kinds if kind in law["calls"]):
            found = law["calls"][pair]
            neither = found["pairs"] - found["more"] - found["less"]
            counts = (_share(n, found["pairs"]) for n in (found["more"], found["less"], neither))
            rows.append(
                [
                    text_cell(name),
                    kind_cell(pair),
                    *counts,
                    number_cell(found["pairs"], 0),
                    number_cell(found["ratio"], 2),
                ]
            )
    if not rows:
        return "<p>No null law can judge these heads, so that no pair is called.</p>"
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Pairs called">'
        f"{table('null-table', 'Pairs called by each null law', heads, rows)}</div>"
        '<p class="note narrow">The table scrolls sideways.</p>'
        '<p class="note">More and Less: pairs called for more, and for less, overlap than '
        "expected. Median ratio: of overlap over expectation, all pairs of the kind.</p>"
    )


def _share(count: int, total: int) -> str:
    """A cell with a count and its share in percent."""
    share = 100 * count / total
    shown = f"{share:.0f}" if share in (0.0, 100.0) else f"{share:.1f}"
    return f'<td class="n" data-v="{count}">{count:,} <span class="note">{shown}%</span></td>'
