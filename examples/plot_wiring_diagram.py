"""
How the heads of a small model are wired
========================================

A wiring diagram of the model that comes with skhead: which of its first-layer heads write where its
second-layer heads read. Only the weights are looked at; the model is never run.
"""

# %%
# One subspace per head and role
# ------------------------------
#
# The table of heads holds one row per head. :class:`skhead.SubspaceExtractor` reads their four
# matrices and takes an orthonormal basis of each one's column space.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd

import skhead
from skhead.inspection import DistributionDisplay

heads = skhead.load_heads("skhead/induction-2l")
subspaces = skhead.SubspaceExtractor().fit_transform(heads)
subspaces

# %%
# Overlap of what is written with what is read
# --------------------------------------------
#
# The projection kernel of two subspaces sums the squared cosines of their principal angles. A
# dashed line shows where random subspaces of the same ranks would be on average, with a band of
# three standard deviations. Most pairs lie close to it, and two far beyond.

kernel = skhead.ProjectionKernel(pairs=("OQ", "OK", "OV"))
similarity = kernel.fit_transform(subspaces)
display = DistributionDisplay.from_similarity(similarity, bins=30)

# %%
# The strongest pairs
# -------------------
#
# The wiring graph keeps the ``k`` strongest pairs of each kind. It is an ordinary networkx graph,
# so that any tool that draws or analyses those can take it from here.

graph = skhead.wiring_graph(similarity, k=5)
hubs = skhead.hub_table(similarity, k=5)
hubs[["degree", "out_degree", "in_degree"]].head()

# %%
# Heads are placed by layer. The width of a line is its score beyond the random mean, its colour the
# use that the later head makes of the connection. The thick line is the circuit by which this model
# repeats what it has seen: L0H0 notes which token came before, and the keys of L1H1 look that up.

COLOURS = {"OQ": "tab:blue", "OK": "tab:orange", "OV": "tab:green"}
BENDS = {"OQ": -0.12, "OK": 0.0, "OV": 0.12}

places = {label: (node["head"], node["layer"]) for label, node in graph.nodes(data=True)}
random_mean = float(similarity.null_mean.mean())
largest = max(score for _, _, score in graph.edges(data="score"))

figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
for source, target, edge in graph.edges(data=True):
    share = (edge["score"] - random_mean) / (largest - random_mean)
    arrow = {
        "arrowstyle": "-|>",
        "color": COLOURS[edge["pair"]],
        "connectionstyle": f"arc3,rad={BENDS[edge['pair']]}",
        "linewidth": 0.8 + 5 * share,
        "shrinkA": 16,
        "shrinkB": 16,
    }
    ax.annotate("", xy=places[target], xytext=places[source], arrowprops=arrow)
for label, (x, y) in places.items():
    ax.scatter(x, y, s=900, color="white", edgecolor="black", zorder=2)
    ax.text(x, y, label, ha="center", va="center", zorder=3)
for pair, colour in COLOURS.items():
    ax.plot([], [], color=colour, label=pair)
ax.legend(title="pair", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
ax.set(xticks=np.arange(8), yticks=[0, 1], xlabel="head", ylabel="layer")
ax.margins(0.15, 0.25)
ax.spines[:].set_visible(False)
# sphinx_gallery_thumbnail_number = 2

# %%
# Take it elsewhere
# -----------------
#
# With classes, the nodes carry what is known of the heads, and :func:`~skhead.class_counts` says
# how many of them the graph holds. The graph goes to other programs as GraphML (Gephi, Cytoscape,
# yEd) or as a table of edges. Of a calibrated similarity the edges carry p-values too.

calibrated = skhead.NullCalibrator(side="upper").fit_transform(similarity)
classes = skhead.datasets.load_head_classes("induction-2l", heads)
classed = skhead.wiring_graph(calibrated, k=5, classes=classes)
skhead.class_counts(classed)

# %%

with tempfile.TemporaryDirectory() as folder:
    skhead.write_graphml(classed, Path(folder) / "wiring.graphml")
    skhead.write_edges(classed, Path(folder) / "edges.csv")
    read_back = nx.read_graphml(Path(folder) / "wiring.graphml")
    edges = pd.read_csv(Path(folder) / "edges.csv")
print(read_back.number_of_edges(), "edges,", read_back.nodes["L1H1"])
edges.head(3).round(2)
