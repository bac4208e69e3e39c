"""
Weights against behaviour
=========================

What a head does is seen when the model runs: where does it attend? What it can do is in its
weights. Here the models that come with skhead are run, their heads labelled, and the labels held
against scores that were read from weights alone.
"""

# %%
# Heads at work
# -------------
#
# :func:`~skhead.label_heads` lets a model read a block of random words twice, so that position,
# identity and succession of tokens are not confounded. Each score is a share of attention; half of
# it makes a label.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import skhead
from skhead.datasets import list_models, load_head_classes, load_model_card
from skhead.metrics import head_detection

source = "skhead/induction-2l"
labelled = skhead.label_heads(source, n_sequences=32)
labelled[labelled["label"] != "None"].round(2)

# %%
# The same of every bundled model. A row is a head.

measures = ["previous_token", "duplicate_token", "induction", "first_token", "current_token"]
behaviour = {name: skhead.label_heads(name, n_sequences=16) for name in list_models()}
figure, axes = plt.subplots(1, len(behaviour), figsize=(11, 5), layout="constrained")
for ax, (name, table) in zip(axes, behaviour.items(), strict=True):
    image = ax.imshow(table[measures], cmap="cividis", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(
        range(5), [measure.replace("_", " ") for measure in measures], rotation=90, fontsize=8
    )
    ax.set_yticks(range(len(table)), table.index, fontsize=8)
    ax.set_title(name.rpartition("/")[2].replace("-", "\n", 1), fontsize="medium")
_ = figure.colorbar(image, ax=axes, label="share of attention")

# %%
# A model's card holds what was measured when it was made, on other text. The labels agree, and
# :func:`~skhead.datasets.load_head_classes` gives them aligned to a heads table.

heads = skhead.load_heads(source)
classes = load_head_classes("induction-2l", heads)
card = {head["head"]: head["label"] for head in load_model_card(source)["heads"]}
assert classes.to_dict() == card
pd.crosstab(labelled["label"].rename("measured now"), classes.rename("card"))

# %%
# By weights alone
# ----------------
#
# A previous-token head needs nothing but positions, so that its weights should tell. For an
# induction head two parts must be there: it copies, and it matches tokens through an earlier head.
# ``induction_strength`` is the weakest part of the mechanism.

SCORES = {"previous_token": "previous_token", "induction": "induction_strength"}
found = []
for name, table in behaviour.items():
    model = skhead.load_heads(name)
    scored = skhead.CircuitScorer(list(SCORES.values()), fold_norm=True).fit_transform(model)
    for measure, score in SCORES.items():
        rows = {"attention": table[measure], "weights": scored[score], "measure": measure}
        found.append(pd.DataFrame(rows).assign(model=name, layer=model["layer"]))
found = pd.concat(found)

figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
for ax, (measure, title) in zip(
    axes, {"previous_token": "Previous token", "induction": "Induction"}.items(), strict=True
):
    shown = found[found["measure"] == measure]
    for layer, colour, marker in ((0, "#0072B2", "o"), (1, "#E69F00", "s"), (2, "#009E73", "^")):
        rows = shown[shown["layer"] == layer]
        ax.scatter(
            rows["weights"],
            rows["attention"],
            c=colour,
            marker=marker,
            alpha=0.75,
            label=f"layer {layer}",
        )
    rank = shown["weights"].corr(shown["attention"], method="spearman")
    ax.axhline(0.5, color="0.3", linestyle="--", linewidth=1)
    ax.set(title=f"{title} (rank correlation {rank:.2f})", xlabel=f"{SCORES[measure]} (weights)")
axes[0].set_ylabel("share of attention (running)")
_ = axes[1].legend(frameon=False, loc="upper left")
# sphinx_gallery_thumbnail_number = 2

# %%
# Positions alone place heads of the first layer well. Where heads of later layers attend depends on
# what is on the stream by then, which this score does not see.

# %%
# Does one kernel find them?
# --------------------------
#
# :func:`~skhead.metrics.head_detection` asks less: do labelled heads take part in strong pairs of
# the projection kernel? Of ``OK`` they do, since that is how the first head of an induction circuit
# reaches the second.

similarity = skhead.ProjectionKernel().fit_transform(heads)
detected = head_detection(similarity, classes)
detected.round(2)

# %%
# Heads by their strongest ``OK`` pair: the two labelled heads stand alone.

strongest = np.fmax(
    np.nanmax(np.nan_to_num(similarity.values[:, :, 1], nan=-1), axis=1),
    np.nanmax(np.nan_to_num(similarity.values[:, :, 1], nan=-1), axis=0),
)
order = np.argsort(-strongest)
colours = {"None": "0.7", "Previous Token": "#0072B2", "Induction": "#E69F00"}
figure, ax = plt.subplots(figsize=(7.6, 3.4), layout="constrained")
for kind, colour in colours.items():
    chosen = np.flatnonzero(classes.to_numpy()[order] == kind)
    ax.bar(chosen, strongest[order][chosen], color=colour, label=kind)
ax.axhline(16 * 16 / 128, color="k", linestyle=":", linewidth=1, label="random subspaces")
ax.set_xticks(range(len(order)), heads.index[order], rotation=60)
ax.set(ylabel="strongest OK pair (dimensions)", xlabel="head")
_ = ax.legend(frameon=False)
