"""
What folding a norm changes
===========================

A norm in front of a layer multiplies every coordinate of the stream by a gain. Whether this gain
counts as part of the weights is a choice, ``fold_norm``. It changes nothing in one model and
everything in another. Which of the two it is can be seen before any score is computed.
"""

# %%
# Gains that hardly differ
# ------------------------
#
# K-composition of all pairs of the bundled zoo, from raw weights and with the gains folded in, over
# the value of random heads.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import skhead


def compositions(heads):
    """K-composition of every pair, raw and folded, in units of random heads."""
    scores = {
        label: skhead.CompositionScore(pairs=["OK"], baseline="ratio", fold_norm=fold)
        for label, fold in (("raw", False), ("folded", True))
    }
    tables = {label: score.fit_transform(heads).to_frame() for label, score in scores.items()}
    pair = tables["raw"]["source"] + " > " + tables["raw"]["target"]
    return pd.DataFrame({label: table["score"] for label, table in tables.items()}).set_index(pair)


zoo = skhead.datasets.load_head_zoo().heads
in_zoo = pd.concat([compositions(heads) for _, heads in zoo.groupby("source")])
in_zoo.corr("spearman").round(3)

# %%
# A few large gains
# -----------------
#
# The gains of language models are not as even: in GPT-2 small, four of 768 coordinates hold half of
# what some keys read once the gain is folded in. Here is a model like that, under TransformerLens'
# names: random matrices, two pairs of heads that share directions on purpose, and a norm in front
# of the second layer with 4 of 96 gains that are eight times the others.

N_HEADS, D_MODEL, D_HEAD, LARGE = 8, 96, 8, 4
generator = torch.Generator().manual_seed(0)
weights = {}
for layer in range(2):
    for role in "QKVO":
        shape = (N_HEADS, D_HEAD, D_MODEL) if role == "O" else (N_HEADS, D_MODEL, D_HEAD)
        weights[f"blocks.{layer}.attn.W_{role}"] = torch.randn(shape, generator=generator)
    gain = torch.ones(D_MODEL)
    gain[:LARGE] = 8.0 if layer == 1 else 1.0
    weights[f"blocks.{layer}.ln1.w"] = gain
planted = {"L0H0 > L1H0", "L0H1 > L1H1"}
for head in range(2):
    written = weights["blocks.0.attn.W_O"][head]
    weights["blocks.1.attn.W_K"][head] = written.mT + 0.5 * weights["blocks.1.attn.W_K"][head]
# One head that writes to the four coordinates, for whatever reason.
weights["blocks.0.attn.W_O"][2, :, :LARGE] *= 6

heads = skhead.load_heads(skhead.register_model(weights, "large gains"))
uneven = compositions(heads)
uneven.loc[uneven["folded"].nlargest(8).index].round(2)

# %%
# Raw, the two planted pairs come first. Folded, every pair of the head that writes to the four
# coordinates comes before them: all keys of the second layer read these coordinates eight times as
# strongly, and random heads read nothing that strongly. Neither order is wrong. The first asks
# about the matrices, the second about what reaches the keys when the stream is even. Where a few
# coordinates are large the baseline of even directions holds for neither.

figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
for ax, table, title in (
    (axes[0], in_zoo, "bundled zoo"),
    (axes[1], uneven, "4 of 96 gains are 8 times larger"),
):
    known = table.index.isin(planted) if table is uneven else np.zeros(len(table), dtype=bool)
    by_third = table.index.str.startswith("L0H2") & (table is uneven)
    for chosen, colour, marker, label in (
        (~known & ~by_third, "0.6", "o", "other pairs"),
        (known, "#D55E00", "s", "planted pairs"),
        (by_third, "#0072B2", "^", "pairs of L0H2"),
    ):
        if chosen.any():
            ax.scatter(*table[chosen].to_numpy().T, c=colour, marker=marker, label=label, alpha=0.8)
    ax.axline((1, 1), slope=1, color="0.8", zorder=0)
    ax.set(title=title, xlabel="K-composition / random, raw weights")
    ax.set_aspect("equal", adjustable="datalim")
axes[0].set_ylabel("K-composition / random, folded")
_ = axes[1].legend(frameon=False)
# sphinx_gallery_thumbnail_number = 1

# %%
# Where the weight of a matrix lies
# ---------------------------------
#
# :func:`~skhead.load_weights` reads the matrices either way. The share of the squared norm that
# lies in the four coordinates of largest share tells the two models apart before any pair is
# compared: evenly spread it would be 4%.


def share_of_four(table, fold):
    """Squared norm in the four coordinates with most of it, by head."""
    energy = (skhead.load_weights(table, role="K", fold_norm=fold) ** 2).sum(axis=2)
    return np.sort(energy, axis=1)[:, -4:].sum(axis=1) / energy.sum(axis=1)


first = skhead.load_heads("skhead/zoo/learned-mlp-1")
concentration = pd.DataFrame(
    {
        (name, "folded" if fold else "raw"): share_of_four(table[table["layer"] == 1], fold).mean()
        for name, table in (("zoo/learned-mlp-1", first), ("large gains", heads))
        for fold in (False, True)
    },
    index=["share of four coordinates"],
)
concentration.round(2)

# %%
# Subspaces and folding
# ---------------------
#
# Counting directions alike does not help: the gain turns the subspaces towards the large
# coordinates. The axes are the overlap of two key subspaces of the second layer.


def key_overlap(fold):
    """Projection kernel of every pair of the second layer's keys."""
    subspaces: skhead.Subspaces = skhead.SubspaceExtractor(roles="K", fold_norm=fold).fit_transform(
        heads[heads["layer"] == 1]
    )
    kernel = skhead.ProjectionKernel(pairs=["KK"], layer_order="all")
    return kernel.fit_transform(subspaces).values[:, :, 0][np.triu_indices(N_HEADS, k=1)]


figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
bins = np.linspace(0, 3.5, 29)
ax.hist(key_overlap(False), bins, color="0.6", alpha=0.8, label="raw")
ax.hist(key_overlap(True), bins, color="#0072B2", alpha=0.8, label="folded")
ax.axvline(D_HEAD**2 / D_MODEL, color="k", linestyle="--", linewidth=1, label="random subspaces")
ax.set(xlabel="overlap of two heads' keys (dimensions)", ylabel="pairs of heads")
ax.legend(frameon=False)
skhead.unregister_model("large gains")

# %%
# Folded, any two of these heads share the large coordinates and have some two and a half
# dimensions in common. This is true of the heads, and it is one fact about the norm rather than 28
# about pairs. A null that is fitted to the heads' common directions
# (``NullCalibrator(null="anisotropic")``) allows for it; the law of random subspaces does not.
