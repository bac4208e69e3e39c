"""
Is it more than chance?
=======================

Two heads overlap by 2.6 dimensions of 16. Is that much? It depends on what unrelated heads do.
The law of random subspaces is known exactly, and so are its limits. From a single overlap to the
whole graph of a model, this is how to ask.
"""

# %%
# What random subspaces do
# ------------------------
#
# :func:`~skhead.stats.haar_moments` gives mean and variance of the overlap of random subspaces, and
# :func:`~skhead.stats.haar_logsf` the probability of a larger one. For small heads the law leans to
# the right, so that a normal law of the same mean and variance, as is often used, gives p-values
# that are too small. Here are two subspaces of 4 dimensions in 64.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import norm

import skhead
from skhead.inspection import NullDisplay, SimilarityDisplay
from skhead.stats import (
    haar_logsf,
    haar_moments,
    haar_sample,
    nearest_neighbour_divergence,
)

BLUE, ORANGE = "#0072B2", "#D55E00"

moments = haar_moments(4, 4, 64)
sample = np.sort(haar_sample(4, 4, 64, size=100_000, random_state=0))
overlap = np.linspace(0.1, 1.05, 100)
tails = {
    "exact law": (np.exp(haar_logsf(overlap, 4, 4, 64)), BLUE, "-"),
    "normal law": (norm.sf(overlap, moments.mean, moments.variance**0.5), ORANGE, "--"),
}
figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
beyond = 1 - np.arange(len(sample)) / len(sample)
ax.plot(sample[::20], beyond[::20], ".", color="0.6", label="100 000 draws")
for label, (tail, colour, line) in tails.items():
    ax.plot(overlap, tail, line, color=colour, label=label)
ax.set(yscale="log", ylim=(1e-6, 2), xlim=(0.05, 1.05))
ax.set(xlabel="overlap (dimensions)", ylabel="probability of a larger overlap")
_ = ax.legend(frameon=False)

# %%
# A check that should find nothing
# --------------------------------
#
# Weights that were never trained are random subspaces. At a false discovery rate of 5%, nothing
# should be called, whatever the null.

NULLS = ["haar", "anisotropic", "signflip", "empirical"]


def called(similarity):
    """Pairs called by each null."""
    counts = {}
    for null in NULLS:
        calibrated = skhead.NullCalibrator(null=null, side="upper").fit_transform(similarity)
        counts[null] = int((calibrated.to_frame()["q"] < 0.05).sum())
    return counts


generator = torch.Generator().manual_seed(0)
untrained = {
    f"blocks.{layer}.attn.W_{role}": torch.randn(
        (8, 16, 128) if role == "O" else (8, 128, 16), generator=generator
    )
    for layer in range(2)
    for role in "QKVO"
}
kernel = skhead.ProjectionKernel()
trained = kernel.fit_transform(skhead.load_heads("skhead/induction-2l"))
random = kernel.fit_transform(skhead.load_heads(skhead.register_model(untrained, "untrained")))
skhead.unregister_model("untrained")
pd.DataFrame({"untrained": called(random), "skhead/induction-2l": called(trained)})

# %%
# One pair at a time
# ------------------
#
# The empirical null calls a pair without any training. It learns from the pairs themselves, and 64
# of a kind are few.
#
# Of the trained model, here are the K-pairs against random subspaces: where the bulk lies, whether
# p-values are uniform as they would be without any structure, and how many pairs are called. One
# pair is far away from all others.

calibrated = skhead.NullCalibrator(side="upper").fit_transform(trained)
display = NullDisplay.from_similarity(calibrated, pair="OK", bins=40)
display.figure_.set_size_inches(10, 3.4)

# %%
# The same pairs by head, in standard deviations of the null. The colours stop at 6 so that the
# other pairs can be seen; L0H0 to L1H1, the induction circuit, is at 72.

display = SimilarityDisplay.from_similarity(calibrated, pair="OK", im_kw={"vmin": -6, "vmax": 6})
# sphinx_gallery_thumbnail_number = 1

# %%
# The whole graph
# ---------------
#
# Statements about many pairs can be tested with fewer assumptions, by exchanging the heads of a
# layer. Is L0H0 to L1H1 stronger than a pair of these layers taken at random? And is a head a hub
# among the ten strongest pairs of every kind?

circuit = skhead.head_permutation_test(
    trained, "edge_mean", edges=[("L0H0", "L1H1")], pair="OK", n_permutations=999, random_state=0
)
hubs = skhead.head_permutation_test(trained, "hub_degree", k=10, n_permutations=999, random_state=0)
pd.concat({"edge L0H0 > L1H1": circuit, "hubs": hubs.head(4)}).round(3)

# %%
# The circuit is about as improbable as it can be, with 64 pairs of heads that might have met. No
# head is a hub: some one of sixteen is always the most connected, and the adjusted p-value allows
# for it.

# %%
# One number for a model, and what it depends on
# ----------------------------------------------
#
# :func:`~skhead.informativeness` is the divergence of all pairs from random ones, by bins. With 64
# pairs most of 255 bins are empty, and that is what it measures: the untrained model is twice as
# "informative" as the trained one. By nearest neighbours, without bins, it is not.

bins = [8, 16, 32, 64, 128, 255]
models = {"trained": (trained, ORANGE, "o"), "untrained": (random, "0.5", "s")}
reference = haar_sample(16, 16, 128, size=20_000, random_state=0)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for i, (name, (similarity, colour, marker)) in enumerate(models.items()):
    curve = [skhead.informativeness(similarity, bins=count)["OV"] for count in bins]
    axes[0].plot(bins, curve, color=colour, marker=marker, label=name)
    without = [
        nearest_neighbour_divergence(similarity.values[:8, 8:, kind].ravel(), reference)
        for kind in range(3)
    ]
    axes[1].bar(np.arange(3) + 0.4 * (i - 0.5), without, width=0.4, color=colour)
axes[0].set(xscale="log", xlabel="bins", ylabel="divergence (nats)", title="OV, by bins")
axes[0].set_xticks(bins, bins)
axes[0].minorticks_off()
axes[0].legend(frameon=False)
axes[1].set_xticks(range(3), similarity.pairs)
axes[1].set(title="by nearest neighbours", xlabel="kind of pair", ylabel="divergence (nats)")
_ = axes[1].axhline(0, color="0.2", linewidth=0.8)
