"""
Head classes of GPT-2 small, by nested cross-validation
=======================================================

Which attention heads are name movers, which are induction heads? For GPT-2 small, published work
has classed a few of its 144 heads by what they do. This script asks whether weights alone tell the
classes: a pipeline goes from the heads table to classes, a grid search chooses how the weights are
processed, and an outer cross-validation, which the search never sees, says how well that works.
It then names unclassed heads that are most like each class.

It needs the attention weights of GPT-2 small: a directory in Hugging Face layout, or ``gpt2`` from
the hub. A run takes some minutes, so that this page shows the script without its output::

    python examples/gpt2_head_classes.py --source gpt2 --labels wang2022

The figures that it prints are listed in :ref:`head-classes`.
"""

# %%
# One pipeline from the table to classes
# --------------------------------------
# Heads of one class are alike in what they read and write, so that pairs of the same role (Q with
# Q, K with K, V with V, O with O) are compared, in both directions of the layers.

from __future__ import annotations

import argparse
import tempfile
import time
import warnings

import pandas as pd
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline

import skhead
from skhead.metrics import MacroAveragePrecision, baseline_scores, cross_val_classes

SAME_ROLE = ("QQ", "KK", "VV", "OO")
READING = ("QQ", "KK", "QK", "KQ")


def make_pipeline(memory=None):
    compare = Pipeline(
        [
            ("subspaces", skhead.SubspaceExtractor()),
            ("kernel", skhead.ProjectionKernel(pairs=SAME_ROLE, layer_order="all")),
        ]
    )
    return Pipeline(
        [
            ("compare", skhead.WholeModelSimilarity(compare, memory=memory)),
            ("null", skhead.NullCalibrator()),
            ("classes", skhead.HeadClassifier(rare="none")),
        ]
    )


# %%
# What is searched
# ----------------
# How the weights are processed, how the kernel is normalised, which roles are compared, which null
# it is held against, how the similarities to the heads of a class are put together: 64 candidates.
# The similarity of two heads does not depend on the fold, so that ``WholeModelSimilarity`` with a
# ``memory`` computes 16 kernels for all candidates and folds together, and cuts them.

GRID = {
    "compare__estimator__subspaces__fold_norm": [False, True],
    "compare__estimator__subspaces__center": [False, True],
    "compare__estimator__kernel__normalize": [None, "cosine"],
    "compare__estimator__kernel__pairs": [SAME_ROLE, READING],
    "null__null": ["haar", "empirical"],
    "classes__aggregate": ["mean", "max"],
}


def load_classes(name, heads):
    """Published classes; backup name movers are name movers in one of the sets."""
    y = skhead.datasets.load_head_classes(name, heads)
    return y.replace("Backup Name Mover", "Name Mover") if name == "wang2022" else y


def search(scorer, memory, seed, n_jobs):
    inner = StratifiedKFold(3, shuffle=True, random_state=1000 + seed)
    return GridSearchCV(
        make_pipeline(memory), GRID, scoring=scorer, cv=inner, n_jobs=n_jobs, error_score="raise"
    )


# %%
# Nested cross-validation, beside what is reached without subspaces
# ------------------------------------------------------------------


def nested(heads, y, scorer, seeds, n_jobs, memory):
    rows = []
    for seed in range(seeds):
        outer = StratifiedKFold(3, shuffle=True, random_state=seed)
        started = time.perf_counter()
        scores = cross_val_score(
            search(scorer, memory, seed, n_jobs), heads, y, cv=outer, scoring=scorer
        )
        seconds = time.perf_counter() - started
        baselines = baseline_scores(heads, y, cv=outer, scoring=scorer)["mean"]
        fixed = cross_val_score(make_pipeline(memory), heads, y, cv=outer, scoring=scorer)
        rows.append({"nested": scores.mean(), "defaults": fixed.mean(), **baselines, "s": seconds})
        print(f"seed {seed}: nested {scores.round(3)}, {seconds:.0f} s", flush=True)
    return pd.DataFrame(rows)


# %%
# Candidates among the unclassed heads
# ------------------------------------


def candidates(heads, y, k=3):
    """The unclassed heads most like each class, by models that have not seen them."""
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    confidence = cross_val_classes(make_pipeline(), heads, y, cv=folds)
    unclassed = confidence[y == "None"].drop(columns="None")
    return {name: unclassed[name].nlargest(k) for name in unclassed.columns}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default="gpt2")
    parser.add_argument("--labels", default="wang2022", choices=["wang2022", "yamagiwa2026"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-jobs", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="The least populated class")
    warnings.filterwarnings("ignore", message=".*fewer than 2 heads each")
    heads = skhead.load_heads(options.source)
    y = load_classes(options.labels, heads)
    counts = y[y != "None"].value_counts()
    print(counts.to_string())
    scorer = MacroAveragePrecision(classes=tuple(counts.index[counts >= 3]))
    with tempfile.TemporaryDirectory() as memory:
        table = nested(heads, y, scorer, options.seeds, options.n_jobs, memory)
    print(table.round(3).to_string())
    print("mean over seeds\n" + table.mean().round(3).to_string())
    for name, best in candidates(heads, y).items():
        print(name, {label: round(float(p), 3) for label, p in best.items()})
    model = make_pipeline().fit(heads, y)
    told = model[-1].explain("L5H1")
    print("what speaks for L5H1 as an induction head")
    print(told[told["class"] == "Induction"].head(6).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
