"""
Who reads, and who takes back
=============================

Heads meet in the residual stream. How much of it do they use, do later layers look where earlier
ones wrote, and does a head remove what another one put there? Three questions to the weights of
the bundled models.
"""

# %%
# Use of the stream
# -----------------
#
# :func:`~skhead.stream_usage` takes the heads of a layer together. ``effective_dimension`` is what
# their subspaces fill, and random subspaces of the same ranks would fill ``effective_random``.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import skhead

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"

sources = [name for name in skhead.datasets.list_models() if "zoo" in name]
usage = pd.concat([skhead.stream_usage(skhead.load_heads(name)) for name in sources])
usage["model"] = usage["source"].str.removeprefix("skhead/zoo/")
usage["filled"] = usage["effective_dimension"] / usage["effective_random"]
usage.query("layer == 1").pivot(index="model", columns="role", values="filled").round(2)

# %%
# Queries and keys of second layers fill less than random subspaces would: the heads of a layer look
# for the same things. Do they look where the first layer wrote? ``earlier_ratio`` is 1 where they
# take no notice.

read = usage.query("layer == 1 and role != 'O'")
figure, ax = plt.subplots(figsize=(7.6, 4), layout="constrained")
for role, colour, marker in (("Q", BLUE, "o"), ("K", ORANGE, "s"), ("V", GREEN, "^")):
    rows = read[read["role"] == role]
    ax.plot(rows["earlier_ratio"], rows["model"], marker, color=colour, markersize=8, label=role)
ax.axvline(1, color="0.3", linestyle="--", linewidth=1)
ax.text(1.02, 7.4, "random", fontsize="small", va="bottom")
ax.set(
    xlabel="second layer reads what the first wrote (ratio to random subspaces)",
    ylim=(7.9, -0.5),
    xlim=(0, 2.4),
)
ax.grid(axis="y", color="0.9")
_ = ax.legend(title="role", frameon=False, loc="lower right")
# sphinx_gallery_thumbnail_number = 1

# %%
# Keys do, in all eight models, and queries do not: they read around what the first layer wrote.
# These models repeat what they have seen. Keys must tell which token stood *before*, which only an
# earlier head can bring there; queries ask for the token that is here already.

# %%
# Does a head keep its subspace?
# ------------------------------
#
# :func:`~skhead.identity_scores` looks at single heads. ``pk_vo`` is the overlap of what a head
# reads as values with what it writes; ``identity_signed`` is 1 if the subspace is written back as
# it is, and -1 if it is erased. Of the models of three layers:

deep = {name: skhead.load_heads(name) for name in sources if name.endswith("-2")}
deep = {name: heads for name, heads in deep.items() if heads["n_layers"].iloc[0] == 3}
identity = pd.concat({name[11:]: skhead.identity_scores(heads) for name, heads in deep.items()})
identity["identity_signed"].unstack(0).round(2)

# %%
# Most heads turn against their own subspace a little, and the last layer of ``learned-mlp-2`` does
# so most of all: it lowers what it reads.

# %%
# Who erases whom
# ---------------
#
# :func:`~skhead.erasures` compares what a later head makes of an earlier head's output with that
# output: ``signed_overlap`` is -1 if the one points against the other. ``z`` says how far beyond
# chance this is, when the later head is turned at random.

pairs = pd.concat([skhead.erasures(heads, top=None) for heads in deep.values()])
pairs["model"] = pairs["source"].str.removeprefix("skhead/zoo/")
columns = ["model", "writer", "eraser", "signed_overlap", "removed", "z"]
pairs[columns].head(4).round(2)

# %%
# In the model without MLPs it is one head of the last layer, L2H2, that works against the whole
# layer before it. In the one with MLPs all heads of the last layer do, L2H1 most of all.

figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
largest = pairs["z"].abs().max()
for ax, (model, table) in zip(axes, pairs.groupby("model"), strict=True):
    grid = table.pivot(index="writer", columns="eraser", values="z")
    image = ax.imshow(grid, cmap="PuOr", vmin=-largest, vmax=largest)
    for (row, column), value in np.ndenumerate(grid.to_numpy()):
        if np.isfinite(value):
            strong = abs(value) > 0.6 * largest
            ax.text(
                column,
                row,
                f"{round(value) + 0:d}",
                ha="center",
                va="center",
                fontsize="small",
                color="white" if strong else "black",
            )
    ax.set_xticks(range(grid.shape[1]), grid.columns, rotation=60)
    ax.set_yticks(range(grid.shape[0]), grid.index)
    ax.set(title=model, xlabel="later head", ylabel="head that wrote")
_ = figure.colorbar(image, ax=axes, label="z: takes back (negative), adds to (positive)")

# %%
# The overlap has no size. ``removed`` does: the share of the output that is taken back if the later
# head attends to nothing else. It has the scale of the weights, and what a norm in between does to
# it is only counted with ``fold_norm=True``:

folded = pd.concat([skhead.erasures(heads, top=2, fold_norm=True) for heads in deep.values()])
folded["model"] = folded["source"].str.removeprefix("skhead/zoo/")
folded[columns].round(2)
