"""
Which similarity finds duplicate heads?
=======================================

Training can leave a model with two heads that do the same. Their matrices need not look alike: a
head may be written in another basis, share only some of its directions, or sit in another model.
Here duplicates are planted in five disguises, and six similarities are asked to find them.
"""

# %%
# Heads with a known duplicate
# ----------------------------
#
# A head is a matrix of 96 by 8, whose spectrum decays more or less steeply. Three of its eight
# directions lie near directions that all heads prefer, as in trained models. Twenty heads get a
# duplicate each, and twenty more have none.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import skhead
from skhead.metrics import pair_detection

N_HEADS, D_MODEL, D_HEAD = 20, 96, 8
generator = np.random.default_rng(0)
common = generator.normal(size=(D_MODEL, 3))


def rotation(size):
    return np.linalg.qr(generator.normal(size=(size, size)))[0]


def new_heads(count):
    """Matrices of shape (count, 96, 8)."""
    preferred = common + 0.5 * generator.normal(size=(count, D_MODEL, 3))
    own = generator.normal(size=(count, D_MODEL, D_HEAD - 3))
    bases, _ = np.linalg.qr(np.concatenate([preferred, own], axis=2))
    slopes = generator.uniform(0, 1.5, size=(count, 1))
    gains = np.arange(1, D_HEAD + 1) ** -slopes
    return bases * gains[:, None, :] @ rotation(D_HEAD)


# %%
# Five disguises
# --------------
#
# - *head space rotated*: the same matrix in other coordinates of the head space;
# - *head space mixed*: those coordinates are stretched as well, by a factor of ten. A head that
#   stretches its queries and shrinks its keys attends as before, so that this is no other head;
# - *half of it*: four of the eight columns are those of another head;
# - *noise*: as much noise as signal in every entry;
# - *stream rotated*: the same head in another model, whose stream has another basis.

other_stream = rotation(D_MODEL)


def mixed(heads):
    stretch = rotation(D_HEAD) * np.geomspace(1, 0.1, D_HEAD) @ rotation(D_HEAD)
    return heads @ stretch


def halved(heads):
    half = D_HEAD // 2
    joined = [heads[..., :half], new_heads(len(heads))[..., half:]]
    return np.concatenate(joined, axis=2) @ rotation(D_HEAD)


def noisy(heads):
    size = np.sqrt((heads**2).mean(axis=(1, 2), keepdims=True))
    return heads + size * generator.normal(size=heads.shape)


DISGUISES = {
    "head space rotated": lambda heads: heads @ rotation(D_HEAD),
    "head space mixed": mixed,
    "half of it": halved,
    "noise": noisy,
    "stream rotated": lambda heads: other_stream @ heads @ rotation(D_HEAD),
}
SIMILARITIES = {
    "ProjectionKernel": skhead.ProjectionKernel(),
    "GrassmannDistance": skhead.GrassmannDistance(metric="geodesic"),
    "ProcrustesSimilarity": skhead.ProcrustesSimilarity(),
    "LinearCKA": skhead.LinearCKA(),
    "SimpleComposition": skhead.SimpleComposition(),
    "SpectrumSimilarity": skhead.SpectrumSimilarity(),
}

# %%
# Who finds what
# --------------
#
# Every pair of the sixty heads is ranked, and :func:`~skhead.metrics.pair_detection` gives the
# average precision of the twenty pairs that belong together among all 1770. Distances are ranked
# from the smallest.

twins = np.array([f"twin {i}" for i in range(N_HEADS)] * 2 + ["None"] * N_HEADS)
together = [(name, name) for name in twins[:N_HEADS]]


def precision(similarity: skhead.Similarity) -> float:
    wiring = dict.fromkeys(similarity.pairs, together)
    return pair_detection(similarity, twins, wiring)["average_precision"].iloc[0]


found, noise = {}, {}
for disguise, change in DISGUISES.items():
    originals = new_heads(N_HEADS)
    stack = np.concatenate([originals, change(originals), new_heads(N_HEADS)])
    compared = {name: measure.fit_transform(stack) for name, measure in SIMILARITIES.items()}
    found[disguise] = {name: precision(similarity) for name, similarity in compared.items()}
    if disguise == "head space mixed":
        shown = compared
table = pd.DataFrame(found)
table.round(2)

# %%

figure, ax = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
image = ax.imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
for (row, column), value in np.ndenumerate(table.to_numpy()):
    ax.text(
        column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "k"
    )
ax.set_xticks(range(table.shape[1]), [name.replace(" ", "\n", 1) for name in table.columns])
ax.set_yticks(range(table.shape[0]), table.index)
ax.set(title="How well planted duplicates are found", xlabel="disguise of the duplicates")
_ = figure.colorbar(image, ax=ax, label="average precision")
# sphinx_gallery_thumbnail_number = 1

# %%
# Measures of subspaces, the projection kernel and the Grassmann distances, do not see a change of
# basis at all. Those that weigh directions by their gain, Procrustes and CKA, lose pairs when gains
# change or half of the columns do. ``SimpleComposition`` is not made for this: its value for a head
# with itself depends on the spectrum, so that two heads with steep spectra come before two equal
# ones with flat spectra. Across streams only spectra are left to compare. The price is that any two
# heads of like spectra are alike.

# %%
# Where the two groups meet
# -------------------------
#
# The scores behind the second column, each on its own scale. A threshold that separates the twenty
# pairs from all others exists for the first two.

UNITS = {"pk": "shared dimensions", "distance/geodesic": "distance (radians)"}

pairs = np.triu_indices(len(twins), k=1)
same = (twins[:, None] == twins[None, :])[pairs] & (twins[pairs[0]] != "None")
figure, axes = plt.subplots(2, 3, figsize=(9, 4.6), layout="constrained", sharey=True)
for ax, (name, similarity) in zip(axes.flat, shown.items(), strict=True):
    scores = similarity.values[:, :, 0][pairs]
    bins = np.linspace(scores.min(), scores.max(), 30)
    for chosen, colour, label in (
        (~same, "0.65", "other pairs"),
        (same, "#D55E00", "planted duplicates"),
    ):
        weights = np.full(chosen.sum(), 1 / chosen.sum())
        ax.hist(scores[chosen], bins, weights=weights, color=colour, alpha=0.75, label=label)
    ax.set(title=name, xlabel=UNITS.get(similarity.unit, similarity.unit))
    ax.spines[["top", "right"]].set_visible(False)
figure.supylabel("share of pairs")
_ = figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2)

# %%
# A similarity is chosen by what may differ between two heads that count as the same: the basis of
# the head space, gains, or the stream.
