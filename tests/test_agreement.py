"""Static scores against dynamic ones: correlations, overlap of the best heads, bad input."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from skhead._agreement import compare_scores
from skhead.exceptions import HeadTableError


def comparison_input(static, dynamic, k=1):
    heads = pd.Index([f"L0H{i}" for i in range(len(static))], name="head")
    frames = [
        pd.DataFrame(
            {"feature": "x", "template": str(t), "context": "with", "k": k, "score": column},
            index=heads,
        )
        for t, column in enumerate(np.atleast_2d(dynamic))
    ]
    return pd.Series(static, index=heads, name="x", dtype=float), pd.concat(frames)


def test_comparison_repeats_static_scores_for_every_template():
    rng = np.random.default_rng(0)
    static, dynamic = comparison_input(rng.random(12), rng.random((3, 12)))
    shuffled = static.sample(frac=1, random_state=0)
    row = compare_scores(shuffled, dynamic, m=4).loc[("x", "with")]
    repeated, scores = np.tile(static, 3), dynamic["score"]
    assert row["pearson"] == pytest.approx(np.corrcoef(repeated, scores)[0, 1])
    assert row["spearman"] == pytest.approx(stats.spearmanr(repeated, scores).statistic)
    means = dynamic.groupby("head", sort=False)["score"].mean()[static.index]
    expected = len(set(static.nlargest(4).index) & set(means.nlargest(4).index)) / 4
    assert row["overlap"] == expected
    assert row["static_max"] == static.max() and row["dynamic_max"] == pytest.approx(means.max())
    assert row["chance"] == pytest.approx(1 / 3)


def test_overlap_of_tied_scores_is_the_mean_over_choices():
    rng = np.random.default_rng(3)
    static, dynamic = comparison_input(
        rng.integers(0, 3, 8).astype(float), rng.integers(0, 3, 8).astype(float)
    )
    row = compare_scores(static, dynamic, m=3).loc[("x", "with")]
    own, other = static.to_numpy(), dynamic["score"].to_numpy()
    overlaps = []
    for _ in range(4000):
        tops = [set(np.lexsort((rng.random(8), -values))[:3]) for values in (own, other)]
        overlaps.append(len(tops[0] & tops[1]) / 3)
    assert row["overlap"] == pytest.approx(np.mean(overlaps), abs=0.02)


def test_comparison_of_scores_without_spread_is_nan():
    row = compare_scores(*comparison_input(np.zeros(5), np.arange(5)), m=2).loc[("x", "with")]
    assert np.isnan(row["pearson"]) and np.isnan(row["spearman"])
    assert row["overlap"] == pytest.approx(row["chance"])


def test_comparison_knows_columns_of_several_k():
    static, once = comparison_input(np.arange(5), np.arange(5))
    _, five = comparison_input(np.arange(5), -np.arange(5), k=5)
    table = pd.DataFrame({"x@1": static, "x@5": static, "other": static})
    found = compare_scores(table, pd.concat([once, five]), m=2)["pearson"]
    assert found.to_dict() == pytest.approx({("x@1", "with"): 1, ("x@5", "with"): -1})


def test_comparison_refuses_what_does_not_belong_together():
    static, dynamic = comparison_input(np.arange(5), np.arange(5))
    with pytest.raises(HeadTableError, match="head L0H4 is not in static"):
        compare_scores(static.iloc[:4], dynamic, m=2)
    with pytest.raises(ValueError, match="static has no feature of dynamic: y against x"):
        compare_scores(static.rename("y"), dynamic)
    with pytest.raises(ValueError, match="m must be from 1 to the 5 heads compared, got 6"):
        compare_scores(static, dynamic, m=6)
    with pytest.raises(ValueError, match="static score 'x' of L0H0 is not finite"):
        compare_scores(static.replace(0, np.nan), dynamic, m=2)
    with pytest.raises(ValueError, match="dynamic has no column 'context'"):
        compare_scores(static, dynamic.drop(columns="context"))
