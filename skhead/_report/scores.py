"""Circuit scores of a report's heads, and which of them the model's file cannot give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from skhead._circuits.scores import GROUPS
from skhead.circuits import CircuitScorer
from skhead.weights.tokens import read_token_space

__all__ = ["MOST_TOKENS", "HeadScores", "score_heads"]

#: Tokens beyond which no token is asked for the one that it is led to, which takes longest.
MOST_TOKENS = 8192
_ASKING = ("ov_top1_self", "qk_top1_self")
#: What is defined of a head that reads one stream and writes to another.
_ACROSS = tuple(
    f"{circuit}_{name}"
    for circuit in ("ov", "qk")
    for name in ("norm", "effective_rank", "stable_rank", "spectral_entropy")
)
_WHY_ACROSS = (
    "cross-attention reads keys and values from another stream than the one that it writes to"
)


@dataclass(frozen=True)
class HeadScores:
    """Scores of some heads of one model.

    Attributes
    ----------
    table : DataFrame
        One row per head, one column per score of `CircuitScorer`; NaN in those that are missing.
    missing : mapping of str to str
        By score, why it cannot be told.
    """

    table: pd.DataFrame
    missing: Mapping[str, str]


def score_heads(
    heads: pd.DataFrame,
    *,
    across: bool,
    composition: bool,
    max_memory: int | str,
    processing: Mapping[str, Any],
) -> HeadScores:
    """Score heads as `CircuitScorer` does, and keep the reasons for what is missing.

    Parameters
    ----------
    heads : DataFrame
        Some rows of the heads table of one source.
    across : bool
        Whether the heads attend from one stream to another.
    composition : bool
        Whether to score the composition with other heads.
    max_memory : int or str
    processing : mapping
        ``fold_norm, center, device`` of `CircuitScorer`.

    Returns
    -------
    HeadScores
    """
    groups = [group for group in GROUPS if composition or group != "composition"]
    names = [name for group in groups for name in GROUPS[group]]
    left_out = _left_out(names, across, str(heads["source"].iloc[0]))
    asked = [name for name in names if name not in left_out]
    scorer = CircuitScorer(asked, errors="ignore", max_memory=max_memory, **processing)
    table = scorer.set_output(transform="pandas").fit_transform(heads)
    missing = scorer.missing_scores(heads) if table.isna().any(axis=None) else pd.DataFrame()
    reasons = {} if missing.empty else dict(zip(missing["score"], missing["reason"], strict=True))
    return HeadScores(table.reindex(columns=names), reasons | left_out)


def _left_out(names: Sequence[str], across: bool, source: str) -> dict[str, str]:
    """Scores that are not asked of a model, each with the reason."""
    if across:
        return {name: _WHY_ACROSS for name in names if name not in _ACROSS}
    embedding = read_token_space(source, tables=["embedding"]).embedding
    if embedding is None or len(embedding) <= MOST_TOKENS:
        return {}
    why = (
        f"its {len(embedding):,} tokens are more than the {MOST_TOKENS:,} up to which a report "
        "asks each token for the one it is led to; CircuitScorer does"
    )
    return dict.fromkeys(_ASKING, why)
