"""
Induction heads of a model that was never run
=============================================

Eight tiny transformers come with skhead. What each of their heads attends to was measured by
running them. Here a classifier learns from some of the models what weights go with which behaviour,
and names the previous-token and induction heads of the others from their weights alone.
"""

# %%
# Models, and features that mean the same in each
# -----------------------------------------------
#
# Two models that were trained from different random weights share no basis: a direction of one
# means nothing in another, and so does a similarity between their heads. What carries over are
# measures of a head within its own model, as :class:`~skhead.CircuitScorer` makes them: whether a
# head copies, whether it prefers the previous position, what it composes with.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline

import skhead
from skhead.inspection import HeadClassDisplay, HeadScoreDisplay
from skhead.metrics import (
    MacroAveragePrecision,
    baseline_scores,
    class_average_precisions,
    cross_val_classes,
)

zoo = skhead.datasets.load_head_zoo()
heads, y = zoo.heads, zoo.target
pd.crosstab(zoo.groups, y)

# %%
# Classes with a handful of heads in a few of the models cannot be learned across models, so that
# they count as unclassed here.

learned = ["Induction", "Previous Token"]
y = y.where(y.isin(learned), "None")
model = make_pipeline(skhead.CircuitScorer(), skhead.HeadClassifier())

# %%
# Models left out
# ---------------
#
# ``GroupKFold`` leaves out whole models: no head is judged by a classifier that has seen another
# head of its model.


def judge(cv, groups):
    scores = cross_val_classes(model, heads, y, groups=groups, cv=cv, method="decision_function")
    return HeadClassDisplay.from_predictions(y, scores, scores.columns.tolist())


display = judge(GroupKFold(4), heads["source"])
display.figure_.suptitle("Unseen models")
display.table_

# %%
# What else would do
# ------------------
#
# Two of these figures are cheap. Previous-token heads sit in the first layer of these models and
# induction heads in the second, and heads that training has used have other norms than those it has
# not. The same folds, judged by the layer alone and by the norms of the four matrices alone:

scorer = MacroAveragePrecision(classes=learned)
baseline_scores(heads, y, cv=GroupKFold(4), groups=heads["source"], scoring=scorer).round(2)

# %%
# So a model that is as small as these is no hard test, and a perfect score here promises nothing
# for a large one. The next figure is harder.
#
# A kind of model left out
# ------------------------
#
# Half of the models have learned positions, the others rotary ones. The same features, learned
# from one kind of model, are asked about the other, whose attention by position is computed in
# another way altogether.

position = zoo.groups.str.split("-").str[0]
display = judge(LeaveOneGroupOut(), position)
display.figure_.suptitle("Unseen kind of positions")
display.table_

# %%
# Which features decide
# ---------------------
#
# One feature at a time, ranked by average precision over all models. The mechanisms show: a
# previous-token head is one that prefers the previous position, an induction head one that copies
# *and* matches through such a head. Copying alone is not enough.

features = skhead.CircuitScorer().fit_transform(heads)
found = {
    name: class_average_precisions(y, pd.concat([column] * 3, axis=1), sorted(y.unique()))[
        "average_precision"
    ]
    for name, column in features.items()
}
best = pd.DataFrame(found).T
shown = pd.concat([best[name].nlargest(6) for name in learned]).index.unique()
ax = best.loc[shown, learned].sort_values("Induction").plot.barh(figsize=(7, 4.5))
ax.set(xlabel="average precision of one feature", xlim=(0, 1.02))
plt.tight_layout()
best.loc[["ov_copying", "induction_matching", "induction_strength", "previous_token"]].round(2)

# %%
# One model, head by head
# -----------------------
#
# A classifier learned from the whole zoo is asked about a model that is not part of it. It is kept
# in a file that holds numbers and names only, no code, and opened again as on another day; what it
# says is drawn on the grid of layers and heads.

model = make_pipeline(skhead.CircuitScorer(), skhead.HeadClassifier()).fit(heads, y)
with tempfile.TemporaryDirectory() as directory:
    skhead.save(model, Path(directory) / "classifier.safetensors")
    opened = skhead.load(Path(directory) / "classifier.safetensors")

asked = skhead.load_heads("skhead/induction-2l")
chances = pd.DataFrame(opened.predict_proba(asked), index=asked.index, columns=opened.classes_)
figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.6), layout="constrained")
for ax, name in zip(axes, learned, strict=True):
    HeadScoreDisplay.from_scores(chances[name], asked, f"probability of {name}", ax=ax)
chances[learned].loc[["L0H0", "L1H1"]].round(2)

# %%
# By behaviour, L0H0 is this model's previous-token head and L1H1 its induction head.
