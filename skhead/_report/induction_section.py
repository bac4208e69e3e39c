"""The section on induction: pairs of heads that carry it out."""

from __future__ import annotations

from html import escape

from skhead._report.data import Analysis
from skhead._report.induction import InductionPairs
from skhead._report.tables import head_cell, number_cell, table, text_cell
from skhead._report.text import because

__all__ = ["induction"]

_FIGURES = (
    ("score", "Score"),
    ("previous_token", "Previous token"),
    ("matching", "Matching"),
    ("matching_z", "Matching z"),
    ("copying", "Copying"),
    ("k_ratio", "K-composition × random"),
)


def induction(found: InductionPairs, analysis: Analysis) -> str:
    """Table of the best pairs, with what the figures are.

    Parameters
    ----------
    found : InductionPairs
    analysis : Analysis

    Returns
    -------
    str
    """
    words = (
        "Induction continues what came after an earlier occurrence of the same token. It takes a "
        "head that attends to the previous token and a later head that finds its own token in "
        "what the first one wrote, and copies. The score is the least of the three parts, 1 at "
        "most; z says how far the matching exceeds that of an earlier head rotated at random. "
        "MLPs between the heads are left out."
    )
    if found.refusal is not None:
        why = because("Cannot be told here", found.refusal, analysis.info.source)
        return f'<p>{words}</p><p class="lacking">{escape(why)}</p>'
    if found.table.empty:
        return f"<p>{words}</p><p>In no pair are all three parts positive.</p>"
    called = len(found.called)
    verdict = (
        f"{called} pair{'s' * (called != 1)} reach{'es' * (called == 1)} a score of 0.5 and a z "
        "beyond what chance allows among all pairs of the model."
        if called
        else "No pair reaches a score of 0.5 with a z beyond what chance allows among all pairs of "
        "the model; the best are listed."
    )
    heads = [("Writes (previous token)", False), ("Reads (induction)", False)]
    heads += [(title, True) for _, title in _FIGURES]
    rows = [
        [
            head_cell(row["previous_head"], analysis),
            head_cell(row["induction_head"], analysis),
            *(number_cell(row[name], 2 if name.endswith(("_z", "ratio")) else 3)
              for name, _ in _FIGURES),
            text_cell("yes" if row["is_induction"] else "no"),
        ]
        for row in found.table.to_dict("records")
    ]  # fmt: skip
    body = table("induction-table", "Induction pairs", [*heads, ("Called", False)], rows)
    return (
        f'<p>{words}</p><p>{verdict}</p><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Pairs of induction">{body}</div>'
    )
