"""The table of all heads: class, what it does, scores, edges and strongest partner."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead._report.class_section import LEAST, probability
from skhead._report.classes import likeliest
from skhead._report.data import Analysis
from skhead._report.roles import head_link
from skhead._report.tables import filtered, head_cell, number_cell, table, text_cell
from skhead.containers import Similarity
from skhead.weights import head_labels

__all__ = ["all_heads", "strongest_partner"]

#: Heads up to which all have a row; of more, those with a card.
MOST_ROWS = 600
#: Scores that have a column, as far as they are known.
_SCORES = (
    ("previous_token", "Previous token"),
    ("ov_copying", "Copying"),
    ("qk_matching", "Matching"),
    ("induction_strength", "Induction"),
    ("identity_signed", "Signed identity"),
)
_GUESSED = {"zoo": "Like (tiny models)", "labels": "Like (labelled heads)"}


@dataclass(frozen=True)
class Partner:
    """The head on the other side of a head's strongest pair.

    Attributes
    ----------
    label, pair : str
    reads : bool
        Whether the partner reads what the head writes.
    strength : float
    """

    label: str
    pair: str
    reads: bool
    strength: float


def strongest_partner(kernel: Similarity) -> dict[str, Partner]:
    """Of every head, the pair furthest above its expectation.

    Parameters
    ----------
    kernel : Similarity
        By z if it is calibrated, else by the ratio to random subspaces.

    Returns
    -------
    dict of str to Partner
        By label, without heads that have no pair to be judged.
    """
    rows, columns = head_labels(kernel.rows), head_labels(kernel.columns)
    found: dict[str, Partner] = {}
    for p, pair in enumerate(kernel.pairs):
        listed = kernel.listed(pair).astype(np.float64)
        if kernel.calibration is None:
            strength = listed / np.broadcast_to(kernel.null_mean, kernel.values.shape)[:, :, p]
        else:
            strength = np.where(np.isnan(listed), np.nan, kernel.calibration.z[:, :, p])
        for values, own, others, reads in (
            (strength, rows, columns, True),
            (strength.T, columns, rows, False),
        ):
            for i, j in _largest_of_rows(values):
                known = found.get(own[i])
                if known is None or values[i, j] > known.strength:
                    found[own[i]] = Partner(others[j], pair, reads, float(values[i, j]))
    return found


def _largest_of_rows(values: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Row and column of the largest entry of every row that has one."""
    filled = np.nan_to_num(values, nan=-np.inf)
    best = filled.argmax(axis=1)
    return [(i, int(j)) for i, j in enumerate(best) if np.isfinite(filled[i, j])]


def all_heads(analysis: Analysis) -> str:
    """Every head in a row.

    Parameters
    ----------
    analysis : Analysis

    Returns
    -------
    str
    """
    data = analysis.table
    if len(data) > MOST_ROWS and analysis.carded:
        data = data[data.index.isin(analysis.carded)]
    elif len(data) > MOST_ROWS:
        data = data[data["degree"] > 0]
    missing = set() if analysis.cards is None else set(analysis.cards.scores.missing)
    scores = [(name, title) for name, title in _SCORES if name in data and name not in missing]
    partners = strongest_partner(analysis.kernel)
    guessed = {
        name: likeliest(guess)
        for name, guess in analysis.guesses.items()
        if guess.probabilities is not None
    }
    measure = "× random" if analysis.kernel.calibration is None else f"z {analysis.options.null}"
    heads = [("Head", False), ("Layer", True)]
    if "class" in data:
        heads.append(("Class", False))
    heads += [(_GUESSED[name], True) for name in guessed]
    heads += [(title, True) for _, title in scores]
    heads += [("Edges", True), ("Out", True), ("In", True)]
    heads += [("Strongest partner", False), (f"Its {measure}", True)]
    if analysis.cards is not None:
        heads.append(("Does", False))
    rows = [
        _row(str(label), data.loc[label], analysis, guessed, scores, partners)
        for label in data.index
    ]
    body = table("head-table", "All heads", heads, rows)
    words = _introduction(analysis, len(data), bool(guessed))
    return f"<p>{escape(words)}</p>" + filtered(
        "head-table", "head", body, len(rows), "All heads", "induction or L5"
    )


def _row(
    label: str,
    row: pd.Series,
    analysis: Analysis,
    guessed: dict[str, pd.DataFrame],
    scores: list[tuple[str, str]],
    partners: dict[str, Partner],
) -> list[str]:
    values: dict[str, Any] = {str(name): value for name, value in row.items()}
    cells = [head_cell(label, analysis), number_cell(int(values["layer"]), 0)]
    if "class" in values:
        cells.append(text_cell("–" if values["class"] == "None" else values["class"]))
    for found in guessed.values():
        name, likely = str(found["class"][label]), float(found["probability"][label])
        shown = f"{escape(name)} {probability(likely)}" if likely >= LEAST else "–"
        cells.append(f'<td class="n" data-v="{likely!r}">{shown}</td>')
    cells += [number_cell(float(values[name]), 3) for name, _ in scores]
    cells += [number_cell(int(values[name]), 0) for name in ("degree", "out_degree", "in_degree")]
    partner = partners.get(label)
    if partner is None:
        cells += [text_cell("–"), number_cell(None, 1)]
    else:
        arrow = "→" if partner.reads else "←"
        link = head_link(partner.label, analysis.carded)
        cells.append(f'<td class="pair-{partner.pair}"><span class="dot"></span>{partner.pair} '
                     f"{arrow} {link}</td>")  # fmt: skip
        cells.append(number_cell(partner.strength, 1))
    if analysis.cards is not None:
        held = analysis.cards.verdicts[label]
        words = "; ".join(rule.words.format(partner="one head") for rule in held)
        cells.append(f'<td class="wrap does">{escape(words or "–")}</td>')
    return cells


def _introduction(analysis: Analysis, shown: int, guessed: bool) -> str:
    total = len(analysis.table)
    words = f"All {total:,} heads." if shown == total else (
        f"{shown:,} of {total:,} heads, those with a card or an edge; heads.csv has all."
    )  # fmt: skip
    words += " Edges counts pairs of the diagram. The strongest partner is the one "
    if analysis.kernel.calibration is None:
        words += "of largest ratio to random subspaces"
    else:
        words += (
            f"furthest above what the null law {analysis.options.null} expects, in its standard "
            "deviations"
        )
    words += ", drawn or not; → reads what the head writes, ← writes what it reads."
    if guessed:
        words += f" Like is the likeliest class, if its probability is {LEAST} or more."
    return words
