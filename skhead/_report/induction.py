"""Induction circuits of a report: pairs of heads, or why they cannot be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from skhead.exceptions import SkheadError
from skhead.induction import induction_pairs

__all__ = ["InductionPairs", "find_induction", "induction_numbers"]

#: Pairs by matching that are decomposed, and those by score that the page lists.
_SOUGHT, _LISTED = 200, 12
_COLUMNS = (
    "previous_head", "induction_head", "score", "previous_token", "matching", "matching_z",
    "copying", "k_ratio", "is_induction",
)  # fmt: skip


@dataclass(frozen=True)
class InductionPairs:
    """Pairs of a previous-token head and a head that reads it.

    Attributes
    ----------
    table : DataFrame
        From `induction_pairs`, the best ones by score; empty if refused.
    refusal : str or None
        Why there are none.
    """

    table: pd.DataFrame
    refusal: str | None

    @property
    def called(self) -> pd.DataFrame:
        """Pairs that are called."""
        return self.table if self.table.empty else self.table[self.table["is_induction"]]


def find_induction(heads: pd.DataFrame, processing: Mapping[str, Any]) -> InductionPairs:
    """Look for induction circuits in the weights.

    Parameters
    ----------
    heads : DataFrame
        Heads table of one model.
    processing : mapping
        ``fold_norm, center, device``.

    Returns
    -------
    InductionPairs
    """
    try:
        found = induction_pairs(heads, top=_SOUGHT, **processing)
    except SkheadError as error:
        return InductionPairs(pd.DataFrame(), str(error).removeprefix("induction_pairs: "))
    return InductionPairs(found.head(_LISTED).reset_index(drop=True), None)


def induction_numbers(found: InductionPairs) -> dict[str, Any]:
    """Pairs and refusal, ready for JSON."""
    rows = [] if found.table.empty else found.table[list(_COLUMNS)].to_dict("records")
    return {"refused": found.refusal, "pairs": rows}
