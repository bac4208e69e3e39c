"""What notebooks show of similarities, and the random reference of a pair kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from skhead._html import Listing, Summary, models_of, processing

__all__ = ["reference_law", "similarity_summary"]

#: Pairs of each kind that are listed.
_SHOWN = 3
_HEAD = ["source", "layer", "head"]


def similarity_summary(similarity: Any) -> Summary:
    """What a notebook shows of a similarity."""
    null, direction = "none", "large" if similarity.large_is_similar else "small"
    if similarity.calibration is not None:
        null = f"{similarity.calibration.null}, {similarity.calibration.side}-sided"
    elif np.isfinite(similarity.null_mean).any():
        null = "expectation between random subspaces"
    heads = pd.concat([similarity.rows, similarity.columns]).drop_duplicates(_HEAD)
    facts = {
        "heads": f"{len(similarity.rows):,} rows × {len(similarity.columns):,} columns",
        "models": models_of(heads),
        "d_model": f"{similarity.d_model:,}",
        "unit": f"{similarity.unit} ({direction} values are similar)",
        "weights": processing(similarity.record),
        "null": null,
    }
    kinds = [_kind_facts(similarity, pair) for pair in similarity.pairs]
    shown, caption = ["pair", "rank", "source", "target", "score"], "strongest pairs"
    if similarity.calibration is not None:
        shown += ["log10_p", "q"]
        caption += ", scores before calibration"
    return Summary(
        facts,
        [
            Listing(f"pair kinds, each pair once, in {similarity.unit}", pd.DataFrame(kinds)),
            Listing(caption, similarity.top_pairs(_SHOWN)[shown]),
        ],
    )


def _kind_facts(similarity: Any, pair: str) -> dict[str, Any]:
    values = similarity.listed(pair)
    values = values[~np.isnan(values)]
    mean, sd = reference_law(similarity, pair)
    ends = (values.min(), values.max()) if values.size else (np.nan, np.nan)
    middle = len(pair) // 2
    return {
        "pair": pair,
        "of row": pair[:middle],
        "of column": pair[middle:],
        "defined": values.size,
        "smallest": ends[0],
        "largest": ends[1],
        "random mean": mean,
        "random sd": sd,
    }


def reference_law(similarity: Any, pair: str) -> tuple[float, float]:
    """Random mean and standard deviation of one pair kind, over its defined pairs.

    Where ranks differ between heads the reference is a mixture: its variance is the mean of the
    pairs' variances plus the variance of their means.
    """
    p = similarity.pairs.index(pair)
    defined = ~np.isnan(similarity.listed(pair))
    mean, sd = (
        np.broadcast_to(values, similarity.values.shape)[:, :, p][defined]
        for values in (similarity.null_mean, similarity.null_sd)
    )
    if mean.size == 0:
        return float("nan"), float("nan")
    if (mean == mean[0]).all() and (sd == sd[0]).all():
        return float(mean[0]), float(sd[0])
    return float(mean.mean()), float(np.sqrt(np.mean(sd**2) + np.var(mean)))
