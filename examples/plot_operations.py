"""
Heads that copy, found and taken out
====================================

An operation is a list of (source, target) tokens. Here it is copying: every word leads to itself.
All heads of the bundled zoo of tiny models are scored at it from their weights, and held against
what the same heads would get if the targets were permuted. Then the models run without the heads
that were found.
"""

# %%
# Score and null
# --------------
#
# Beside copying, a second operation means nothing: every word leads to one of three tokens, drawn
# by lot. No head can know it.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import skhead

zoo = skhead.datasets.load_head_zoo()
words = range(64)
lots = np.random.default_rng(0).choice([66, 67, 68], 64).tolist()
operations = {
    "copying": [(word, word) for word in words],
    "by_lot": list(zip(words, lots, strict=True)),
}
mapper = skhead.OperationMapper(operations, source_embedding="raw", k=1).fit(zoo.heads)
called = mapper.implementing()["operation"].value_counts()
pd.DataFrame(
    {
        "score of .15 or more": (mapper.scores_ >= 0.15).sum(),
        "called": called.reindex(mapper.scores_.columns, fill_value=0),
    }
)

# %%
# The score alone finds heads for the operation that means nothing. They write one of the three
# tokens much of the time, whatever they read, so that permuted targets get the same score: these
# heads lie on the diagonal below. Copying heads lie far above it.

induction = (zoo.target == "Induction").to_numpy()
groups = {
    "copying, induction heads": ("copying", induction, "tab:orange", "o"),
    "copying, other heads": ("copying", ~induction, "tab:blue", "o"),
    "by lot, promoted": ("by_lot", slice(None), "0.45", "^"),
    "by lot, suppressed": ("-by_lot", slice(None), "0.45", "v"),
}
figure, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
for label, (column, rows, colour, marker) in groups.items():
    null, score = mapper.null_expectation_[column], mapper.scores_[column]
    ax.scatter(
        null[rows], score[rows], color=colour, marker=marker, label=label, alpha=0.7, linewidth=0
    )
ax.axline((0, 0), slope=1, color="0.8", zorder=0)
ax.axhline(0.15, color="0.3", linestyle="--", linewidth=1)
ax.text(0.345, 0.16, "published threshold", ha="right", va="bottom", fontsize="small")
ax.set(
    xlabel="expected of permuted targets", ylabel="score", xlim=(-0.01, 0.35), ylim=(-0.03, 1.03)
)
_ = ax.legend(frameon=False, loc="center right")
# sphinx_gallery_thumbnail_number = 1

# %%
# Without the heads
# -----------------
#
# Each model reads a block of 20 random words and the first eight of them again, and is to go on
# with the ninth. Heads that copy are taken out one after the other, the best first, at the last
# position only; and as many random other heads. Source vectors are embeddings in all models, also
# in those with MLPs.

blocks = np.random.default_rng(0).permuted(np.tile(np.arange(64), (40, 1)), axis=1)[:, :20]
prompts = [([*block, *block[:8]], block[8]) for block in blocks.tolist()]
names = skhead.weights.head_labels(zoo.heads)
curves, first = {}, {}
for source, rows in zoo.heads.groupby("source").indices.items():
    scores = mapper.scores_.iloc[rows]["copying"]
    scores.index = [str(names[row]).rpartition(":")[2] for row in rows]
    ranked = [head for head in skhead.rank_heads(scores) if scores[head] >= 0.15]
    curves[source] = skhead.ablate(source, ranked, prompts, [([64], [])], n_random=3)
    first[source] = " ".join(ranked)

figure, axes = plt.subplots(2, 4, figsize=(9, 4.4), layout="constrained", sharex=True, sharey=True)
for ax, (source, curve) in zip(axes.flat, curves.items(), strict=True):
    means = curve.groupby(["kind", "n_removed"])["accuracy"].mean()
    ax.plot(means["random"], color="0.6", marker="s", label="random others")
    ax.plot(means["operation"], color="tab:orange", marker="o", label="copying heads")
    ax.set_title(source.rpartition("/")[2], fontsize="medium")
    ax.set_xticks(range(6))
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
figure.supxlabel("heads taken out")
_ = figure.supylabel("accuracy")

# %%
# Where all copying heads are out, no model repeats its input, and no random heads matter. Before
# that, one head stands in for the others: no model needs the head that copies best.

accuracy = {
    source: curve[curve["kind"] == "operation"].set_index("n_removed")["accuracy"]
    for source, curve in curves.items()
}
pd.DataFrame(
    {
        "copying heads": first,
        "without the first": {source: found[1] for source, found in accuracy.items()},
        "without all": {source: found.iloc[-1] for source, found in accuracy.items()},
    }
).rename_axis("model")
