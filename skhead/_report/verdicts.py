"""What heads do in plain words, by thresholds on their circuit scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from skhead._report.glossary import BEST_PARTNER, RATIO_SPREAD
from skhead._report.text import number

__all__ = ["Condition", "Rule", "called", "rules_for"]

#: Positional attention above uniform that is told, of 1 possible.
_POSITION = 0.3
#: Eigenvalue ratios that are told, and the standard deviations of random heads that they exceed.
_RATIO, _DEVIATIONS = 0.5, 3
#: How many of the largest ratio of random partners are told.
_TIMES = 3
#: Diagonal that is told, as a share of the square root of d_head, which a full copier reaches.
_DIAGONAL = 0.25
#: Signed identity that is told, of 1 possible.
_IDENTITY = 0.4
_INDUCTION = 0.5
#: Largest composition with one other head that is told, over its baseline.
_COMPOSITION = 2.5


@dataclass(frozen=True)
class Condition:
    """A threshold on a score.

    Attributes
    ----------
    score : str
    threshold : float
        Least value if positive, largest value if negative.
    random : str
        What a random head gets.
    """

    score: str
    threshold: float
    random: str

    def met(self, value: float) -> bool:
        """Whether a score passes; one that is undefined does not."""
        return value >= self.threshold if self.threshold > 0 else value <= self.threshold

    @property
    def words(self) -> str:
        """The threshold in words."""
        side = "at least" if self.threshold > 0 else "at most"
        return f"{side} {number(self.threshold, 2)}"


@dataclass(frozen=True)
class Rule:
    """Words that are said of a head whose scores meet all conditions.

    Attributes
    ----------
    key : str
        Name in ``summary.json``.
    words : str
        With ``{partner}`` where another head is named.
    conditions : tuple of Condition
    pair, side : str
        Pair kind and side ("in" or "out") of the partner that is named; empty without one.
    """

    key: str
    words: str
    conditions: tuple[Condition, ...]
    pair: str = ""
    side: str = ""

    def holds(self, scores: Mapping[Any, float]) -> bool:
        """Whether the scores of a head meet all conditions."""
        return all(condition.met(scores[condition.score]) for condition in self.conditions)


def rules_for(d_model: int, d_head: int, composition: bool) -> tuple[Rule, ...]:
    """All rules, with thresholds out of reach of random heads of the model's shape.

    Parameters
    ----------
    d_model, d_head : int
    composition : bool
        Whether composition was scored.

    Returns
    -------
    tuple of Rule
    """
    spread = RATIO_SPREAD / d_head
    ratio, around = max(_RATIO, _DEVIATIONS * spread), f"0 ± {number(spread, 2)}"
    diagonal = _DIAGONAL * d_head**0.5
    unit = f"0 ± {number((d_model * d_head) ** -0.5, 2)}"
    partner = max(_RATIO, _TIMES * BEST_PARTNER / d_head)
    best = f"{number(BEST_PARTNER / d_head, 2)}, the best of its partners"
    previous = Condition("previous_token", _POSITION, "0")

    def signed(name: str, sign: int) -> tuple[Condition, ...]:
        first, second = ("ov_copying", "ov_diagonal") if name == "ov" else (
            "qk_matching", "qk_diagonal"
        )  # fmt: skip
        return Condition(first, sign * ratio, around), Condition(second, sign * diagonal, "0")

    rules = [
        Rule("previous_token", "by position, attends to the previous token", (previous,)),
        Rule("current_token", "by position, attends to itself",
             (Condition("current_token", _POSITION, "0"),)),
        Rule("first_token", "by position, attends to the first token",
             (Condition("first_token", _POSITION, "0"),)),
        Rule("copies", "copies the token it attends to", signed("ov", 1)),
        Rule("suppresses", "lowers the token it attends to", signed("ov", -1)),
        Rule("matches", "attends to tokens equal to its own", signed("qk", 1)),
        Rule("avoids", "avoids tokens equal to its own", signed("qk", -1)),
        Rule("writes_back", "writes back what it reads",
             (Condition("identity_signed", _IDENTITY, unit),)),
        Rule("erases", "erases what it reads",
             (Condition("identity_signed", -_IDENTITY, unit),)),
        Rule("induction", "continues what came after a repeat (induction)",
             (Condition("induction_strength", _INDUCTION, "about 0"),)),
        Rule("feeds_induction", "lets later heads find repeats (feeds induction)",
             (previous, Condition("induction_feeding", partner, best))),
    ]  # fmt: skip
    return tuple(rules + (_compositions() if composition else []))


def _compositions() -> list[Rule]:
    """Rules on the strongest single partner."""
    rules = []
    for side, verb, link in (("in", "builds its", "on"), ("out", "shapes the", "of")):
        for kind, what in (("q", "queries"), ("k", "keys"), ("v", "values")):
            condition = Condition(f"{kind}_composition_{side}_max", _COMPOSITION, "1")
            words = f"{verb} {what} {link} {{partner}}"
            key = f"{kind}_composition_{side}"
            rules.append(Rule(key, words, (condition,), f"O{kind.upper()}", side))
    return rules


def called(scores: pd.DataFrame, rules: tuple[Rule, ...]) -> dict[str, tuple[Rule, ...]]:
    """Rules that hold, by label of the head.

    Parameters
    ----------
    scores : DataFrame
        One row per head; columns hold the scores.
    rules : tuple of Rule

    Returns
    -------
    dict of str to tuple of Rule
    """
    return {
        str(label): tuple(rule for rule in rules if rule.holds(row))
        for label, row in scores.to_dict("index").items()
    }
