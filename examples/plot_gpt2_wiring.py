"""
How the heads of GPT-2 small are wired
======================================

The wiring diagram of [1]_: which heads of GPT-2 small write where later heads read, by the
projection kernel of raw weights; how far each kind of pair is from random subspaces; and which of
the heads in the diagram have a known task.

The weights are not part of the package. They are read from the directory ``gpt2-small-attention``
under the one that the environment variable ``SKHEAD_MODELS`` names. Without them the figures are
drawn from stored numbers, which this very code computed from GPT-2 small's weights
(``scripts/store_gallery_numbers.py``).

.. [1] H. Yamagiwa, Y. Takase and H. Shimodaira, arXiv:2601.10266 (2026).
"""

# %%
# What is measured
# ----------------
#
# Bases of all 144 heads, the sixteen kinds of pairs from earlier to later layers, and of the three
# kinds that wire heads the twenty strongest pairs each.

import itertools
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import norm

import skhead
from skhead.datasets import load_head_classes
from skhead.stats import haar_moments

KINDS = ("OQ", "OK", "OV")
EDGES = np.linspace(0, 64, 257)


def measure(directory):
    """All numbers of this page, from weights."""
    heads = skhead.load_heads(directory)
    subspaces = skhead.SubspaceExtractor().fit_transform(heads)
    every = ["".join(pair) for pair in itertools.product("QKVO", repeat=2)]
    sixteen = skhead.ProjectionKernel(pairs=every).fit_transform(subspaces)
    wiring = skhead.ProjectionKernel(pairs=KINDS).fit_transform(subspaces)
    classes = load_head_classes("yamagiwa2026", heads)
    graph = skhead.wiring_graph(wiring, k=20, classes=classes)
    edges = wiring.top_pairs(20)[["pair", "source", "target", "score"]]
    hubs = skhead.hub_table(wiring, k=20)["degree"].head(5)
    values = {kind: wiring.pair(kind).to_numpy() for kind in KINDS}
    return {
        "edges": edges.round({"score": 3}).astype({"score": float}).values.tolist(),
        "classes": dict(graph.nodes(data="head_class")),
        "counts": {name: int(count) for name, count in skhead.class_counts(graph).items()},
        "hubs": {label: int(degree) for label, degree in hubs.items()},
        "informativeness": skhead.informativeness(sixteen).round(3).to_dict(),
        "histograms": {
            kind: np.histogram(of[np.isfinite(of)], EDGES)[0].tolist()
            for kind, of in values.items()
        },
    }


root = Path(skhead.__file__).parents[1]
models = Path(os.environ.get("SKHEAD_MODELS", root.parent / "shared" / "models"))
if (models / "gpt2-small-attention").is_dir():
    measured = measure(models / "gpt2-small-attention")
    origin = "computed here from GPT-2 small's weights"
else:
    stored = root / "examples" / "gpt2_wiring.json"
    measured = json.loads(stored.read_text(encoding="utf-8"))
    origin = "stored numbers, made from GPT-2 small's weights"
print(origin)
edges = pd.DataFrame(measured["edges"], columns=["pair", "source", "target", "score"])
edges.groupby("pair").head(3).round(2)

# %%
# The diagram
# -----------
#
# Twenty strongest pairs of each kind. Layers go from left to right, colours are classes of heads
# that were found by experiments.

PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]
names = sorted({name for name in measured["classes"].values() if name != "None"})
colours = {**dict(zip(names, itertools.cycle(PALETTE))), "None": "0.8"}


def place(label):
    layer, head = label[1:].split("H")
    return int(layer), int(head)


figure, axes = plt.subplots(1, 3, figsize=(11, 5), layout="constrained", sharey=True)
for ax, kind in zip(axes, KINDS, strict=True):
    chosen = edges[edges["pair"] == kind]
    width = chosen["score"] / edges["score"].max()
    for source, target, share in zip(chosen["source"], chosen["target"], width, strict=True):
        ax.plot(
            *zip(place(source), place(target), strict=True), color="0.55", lw=3 * share**2, zorder=1
        )
    for label in pd.unique(chosen[["source", "target"]].to_numpy().ravel()):
        x, y = place(label)
        ax.scatter(x, y, s=130, color=colours[measured["classes"][label]], edgecolor="k", zorder=2)
        ax.annotate(label[1:].replace("H", "."), (x, y), (0, 8), textcoords="offset points",
                    ha="center", fontsize=7)  # fmt: skip
    ax.set(title=kind, xlabel="layer", xticks=range(12), yticks=range(12), ylim=(-0.7, 12))
    ax.set_xlim(-0.7, 11.7)
axes[0].set_ylabel("head")
for name, colour in colours.items():
    shown = "no class" if name == "None" else name
    axes[0].scatter([], [], color=colour, edgecolor="k", label=shown)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
_ = figure.suptitle(f"GPT-2 small ({origin})", fontsize="medium")
# sphinx_gallery_thumbnail_number = 1

# %%
# The heads of the diagram, how many of them carry a class, and the most connected ones. Of 144
# heads 29 have a class in this set.

print(measured["counts"])
print("degree:", measured["hubs"])

# %%
# Far from random
# ---------------
#
# Random subspaces of 64 dimensions in 768 share 5.33 of them, give or take .11. Hardly a pair of
# heads is like that: most of OQ and OK share more, most of OV less.

law = haar_moments(64, 64, 768)
middles = (EDGES[:-1] + EDGES[1:]) / 2
figure, ax = plt.subplots(figsize=(7.6, 4), layout="constrained")
for kind, colour in zip(KINDS, PALETTE, strict=False):
    counts = np.array(measured["histograms"][kind])
    ax.step(middles, counts / counts.sum() / np.diff(EDGES), where="mid", color=colour, label=kind)
overlap = np.linspace(4.8, 5.9, 200)
ax.fill_between(
    overlap, norm.pdf(overlap, law.mean, law.variance**0.5), color="0.8", label="random subspaces"
)
ax.set(xlim=(0, 18), ylim=(0, 0.6), xlabel="overlap (dimensions)", ylabel="density of pairs")
ax.text(5.9, 0.575, f"peak of random subspaces: {norm.pdf(0) / law.variance**0.5:.1f}", va="top")
ax.set_title(origin, fontsize="medium")
_ = ax.legend(frameon=False, loc="center right")

# %%
# Which kinds of pair are informative
# -----------------------------------
#
# :func:`~skhead.informativeness` of all sixteen kinds, in nats over 255 bins, as printed in the
# paper's figure 8. Pairs of one role, QQ and KK, come first; of the kinds that wire heads, OK does.

grid = pd.Series(measured["informativeness"]).to_numpy().reshape(4, 4)
figure, ax = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
image = ax.imshow(grid, cmap="cividis")
for (row, column), value in np.ndenumerate(grid):
    dark = value < grid.mean()
    ax.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if dark else "k")
ax.set_xticks(range(4), list("QKVO"))
ax.set_yticks(range(4), list("QKVO"))
ax.set(xlabel="role of the later head", ylabel="role of the earlier head")
ax.set_title(origin, fontsize="medium")
_ = figure.colorbar(image, ax=ax, label="informativeness (nats)")
