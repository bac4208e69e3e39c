"""
Head classes of GPT-2 small, by weights alone
=============================================

Of the 144 heads of GPT-2 small, 26 have a known task in a circuit that was found by experiments
[1]_. Here every head is judged by a classifier that has not seen it: how high do the heads of each
class rank, and which heads without a class does the classifier put among them?

The weights are not part of the package. They are read from the directory ``gpt2-small-attention``
under the one that the environment variable ``SKHEAD_MODELS`` names. Without them the figures are
drawn from stored numbers, which this very code computed from GPT-2 small's weights
(``scripts/store_gallery_numbers.py``).

.. [1] K. Wang et al., "Interpretability in the Wild: a Circuit for Indirect Object Identification
   in GPT-2 small", ICLR (2023), arXiv:2211.00593.
"""

# %%
# One pipeline, five folds
# ------------------------
#
# Heads of a class read and write alike, so that pairs of one role are compared. Everything that is
# learned is learned in the training folds. Backup name movers count as name movers. A class of two
# heads leaves one to learn from where the other is judged, so that it counts as no class here.

import json
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline

import skhead
from skhead.datasets import load_head_classes
from skhead.inspection import HeadClassDisplay
from skhead.metrics import class_average_precisions, cross_val_classes

warnings.filterwarnings("ignore", message="The least populated class")


def measure(directory):
    """Classes, and log-odds of every head by models that have not seen it."""
    heads = skhead.load_heads(directory)
    y = load_head_classes("wang2022", heads).replace("Backup Name Mover", "Name Mover")
    y = y.where(y.map(y.value_counts()) > 2, "None")
    pairs = ("QQ", "KK", "VV", "OO")
    similarity = make_pipeline(
        skhead.SubspaceExtractor(), skhead.ProjectionKernel(pairs=pairs, layer_order="all")
    )
    model = make_pipeline(
        skhead.WholeModelSimilarity(similarity),
        skhead.NullCalibrator(),
        skhead.HeadClassifier(rare="none"),
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    odds = cross_val_classes(model, heads, y, cv=folds, method="decision_function")
    return {
        "head": heads.index.tolist(),
        "class": y.tolist(),
        "other set": load_head_classes("yamagiwa2026", heads).tolist(),
        "log-odds": {name: odds[name].round(3).tolist() for name in odds.columns},
    }


root = Path(skhead.__file__).parents[1]
models = Path(os.environ.get("SKHEAD_MODELS", root.parent / "shared" / "models"))
if (models / "gpt2-small-attention").is_dir():
    measured = measure(models / "gpt2-small-attention")
    origin = "computed here from GPT-2 small's weights"
else:
    stored = root / "examples" / "gpt2_classes.json"
    measured = json.loads(stored.read_text(encoding="utf-8"))
    origin = "stored numbers, made from GPT-2 small's weights"
print(origin)
y = pd.Series(measured["class"], index=measured["head"])
odds = pd.DataFrame(measured["log-odds"], index=measured["head"])
y.value_counts()

# %%
# How well classes are found
# --------------------------
#
# Average precision is 1 if all heads of the class come before all others. A random ranking gets
# about the base rate. Classes with three or four heads have two or three to learn from, so that one
# head more or less in a fold makes a large difference.

kinds = [name for name in odds.columns if name != "None"]
class_average_precisions(y, odds[kinds], kinds).round(2)

# %%

display = HeadClassDisplay.from_predictions(y, odds, odds.columns.tolist())
_ = display.figure_.suptitle(f"GPT-2 small, wang2022 ({origin})")

# %%
# Where the heads of each class rank
# ----------------------------------
#
# A dot is a head, placed by its rank among all 144 for the class of the row. Heads of the class are
# filled.

colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000"]
figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
for row, name in enumerate(kinds):
    rank = odds[name].rank(ascending=False)
    member = (y == name).to_numpy()
    ax.plot(rank[~member], np.full((~member).sum(), row), "|", color="0.75")
    ax.plot(rank[member], np.full(member.sum(), row), "o", color=colours[row % len(colours)])
ax.set_yticks(range(len(kinds)), kinds)
ax.set_ylim(len(kinds) - 0.5, -0.5)
ax.set(xscale="log", xlabel="rank of the head for the class, of 144")
ax.set_xticks([1, 2, 5, 10, 20, 50, 144], [1, 2, 5, 10, 20, 50, 144])
ax.minorticks_off()
_ = ax.set_title(origin, fontsize="medium")
# sphinx_gallery_thumbnail_number = 2

# %%
# Candidates
# ----------
#
# Heads without a class that are most like one. In brackets stands the class that another set of
# labels (``yamagiwa2026``) gives them, which the classifier was not shown.

unclassed = odds[y == "None"]
elsewhere = pd.Series(measured["other set"], index=measured["head"])
top = {name: unclassed[name].nlargest(4).index for name in kinds}
pd.DataFrame({name: [f"{head} ({elsewhere[head]})" for head in top[name]] for name in kinds}).T
