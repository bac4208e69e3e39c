"""The section on classes: which heads look like heads of a known class, and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd

from skhead._report.classes import Guess
from skhead._report.data import Analysis
from skhead._report.roles import head_link
from skhead._report.text import because, number

__all__ = ["LEAST", "class_numbers", "classes", "probability"]

#: Heads of a class that are listed, and the least probability of one.
_LISTED, LEAST = 6, 0.1
_TITLES = {"zoo": "By tiny models of known behaviour", "labels": "By labelled heads of this model"}


def classes(analysis: Analysis) -> str:
    """Likeliest heads of every class, by both ways of learning.

    Parameters
    ----------
    analysis : Analysis

    Returns
    -------
    str
    """
    words = (
        "Probabilities that a classifier gives from weights alone, as suggestions of which heads "
        "to look at. The table of all heads has them head by head."
    )
    parts = []
    for name, guess in analysis.guesses.items():
        parts.append(f"<h3>{_TITLES[name]}</h3><p>{escape(_account(name, guess, analysis))}</p>")
        if guess.probabilities is None:
            why = because("Not told here", str(guess.refusal), analysis.info.source)
            parts.append(f'<p class="lacking">{escape(why)}</p>')
        else:
            parts.append(_table(name, guess, guess.probabilities, analysis))
    return f"<p>{words}</p>{''.join(parts)}"


def class_numbers(guesses: Mapping[str, Guess]) -> dict[str, Any]:
    """What was learned, and the likeliest head of every class, ready for JSON."""
    return {
        name: {
            "refused": guess.refusal,
            "models": guess.models,
            "learned": dict(guess.learned),
            "average_precision": None
            if guess.precisions is None
            else {str(k): float(v) for k, v in guess.precisions["average_precision"].items()},
            "probabilities": None
            if guess.probabilities is None
            else {
                str(label): {str(c): float(p) for c, p in row.items()}
                for label, row in guess.probabilities.iterrows()
            },
        }
        for name, guess in guesses.items()
    }


def _account(name: str, guess: Guess, analysis: Analysis) -> str:
    """How a guess came about, and what speaks against it."""
    if name == "zoo":
        from_models = f"{guess.models} " if guess.models else "the bundled "
        folded = "with norm gains folded in" if analysis.options.fold_norm else "from raw weights"
        return (
            f"Learned from {from_models}tiny transformers whose heads were labelled by running "
            f"them, by three scores that need no common basis ({folded}): attention to the "
            "previous token, copying, induction strength. Among the tiny models it hardly errs. On "
            "a small language model that was checked it found previous-token heads poorly from raw "
            "weights and better with folded gains. Classes are common in the tiny models, so that "
            "probabilities are too high where such heads are rare. No other class is asked about."
        )
    labels = analysis.classes
    what = labels.name if labels is not None else "the labels"
    return (
        f"Learned from the heads that {what} labels, by the projection kernels between matrices "
        "of one role. Every head is judged by models that have not seen it, also the labelled "
        "ones, which is how the average precision is measured: 1 if all heads of the class come "
        "first, about the share of the class if they come anywhere. Other sets of labels would "
        "name other heads."
    )


def _table(name: str, guess: Guess, found: pd.DataFrame, analysis: Analysis) -> str:
    precisions = guess.precisions
    head = "<th scope=col>Class</th><th scope=col class=n>Learned from</th>"
    if precisions is not None:
        head += "<th scope=col class=n>Average precision</th><th scope=col class=n>Share</th>"
    head += "<th scope=col>Likeliest heads</th>"
    known = analysis.table["class"] if name == "labels" else None
    rows = []
    for class_ in found:
        cells = f"<td class=n>{guess.learned[str(class_)]} heads</td>"
        if precisions is not None:
            for column in ("average_precision", "base_rate"):
                cells += f"<td class=n>{number(float(precisions[column][str(class_)]), 2)}</td>"
        best = found[class_].nlargest(_LISTED)
        best = best[best >= LEAST]
        listed = ", ".join(
            f"{head_link(str(label), analysis.carded)} {probability(value)}"
            + _mark(known, str(label), str(class_))
            for label, value in best.items()
        )
        listed = listed or f"none of probability {LEAST} or more"
        rows.append(
            f"<tr><th scope=row>{escape(str(class_))}</th>{cells}"
            f'<td class="wrap">{listed}</td></tr>'
        )
    note = '<p class="note">✓ carries the label.</p>' if known is not None else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_TITLES[name]}">'
        f'<table id="class-{name}" class="plainrows"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{''.join(rows)}</tbody></table></div>{note}"
    )


def _mark(known: pd.Series | None, label: str, class_: str) -> str:
    return " ✓" if known is not None and known[label] == class_ else ""


def probability(value: float) -> str:
    """A probability to two decimals, never rounded to certainty."""
    if value > 0.99:
        return "&gt; 0.99"
    return "&lt; 0.01" if value < 0.01 else f"{value:.2f}"
