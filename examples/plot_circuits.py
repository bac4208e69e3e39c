"""
Induction circuits in a corner of a plot
========================================

An induction head continues a text that repeats itself. Two measures of its weights say so: it
copies the tokens that it attends to, and it looks for tokens that follow its own. Here both are
taken of every head of the bundled zoo of tiny models, and held against what the heads were measured
to do when the models ran.
"""

# %%
# Two scores of every head
# ------------------------
#
# ``ov_copying`` is 1 for a head that raises the logit of each token that it reads, in the sense of
# the eigenvalues of its token-to-token circuit. ``induction_matching`` is 1 for a head whose
# queries look for keys into which an earlier head has moved the token before. Random heads get
# about 0 in both.

import matplotlib.pyplot as plt
import pandas as pd

import skhead

zoo = skhead.datasets.load_head_zoo()
heads, behaviour = zoo.heads, zoo.target
scorer = skhead.CircuitScorer(["ov_copying", "induction_matching"])
scores = scorer.fit_transform(heads)
later = (heads["layer"] > 0).to_numpy()
scores[later].describe().loc[["min", "50%", "max"]].round(2)

# %%
# Heads of a first layer have no earlier head to look through, so they are left out. Colours are
# labels of behaviour: what a head pays at least half of its attention to, on repeated random
# tokens. They do not enter the scores.

COLOURS = {"Induction": "tab:orange", "First Token": "tab:blue", "None": "0.6"}

figure, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
for kind, colour in COLOURS.items():
    chosen = scores[later & (behaviour == kind).to_numpy()]
    label = f"{kind} ({len(chosen)})"
    ax.scatter(*chosen.to_numpy().T, color=colour, label=label, alpha=0.8, edgecolor="white")
ax.axhline(0, color="0.8", zorder=0)
ax.axvline(0, color="0.8", zorder=0)
ax.set(xlabel="ov_copying", ylabel="induction_matching", xlim=(-1.05, 1.05), ylim=(-0.3, 1.05))
_ = ax.legend(title="by behaviour", frameon=False, loc="lower left")

# %%
# All induction heads lie in the upper right corner, and no other head does. Either score alone
# would not do. Two heads match as induction heads do, but rest on the first token and copy nothing;
# and some heads of third layers copy, but do not match.

# %%
# From heads to pairs
# -------------------
#
# :func:`~skhead.induction_pairs` asks for the whole mechanism: an earlier head that attends to the
# previous position, a later one that copies, and a match between the two which is more than chance
# allows. The score of a pair is the least of the three parts. Beside it stands K-composition, which
# is often used for the same purpose: how much of what the first head writes lies in the way of the
# second one's keys, over the value of random heads.

pairs = skhead.induction_pairs(heads, top=None)
labels = skhead.weights.head_labels(heads)
kind = pd.Series(behaviour.to_numpy(), index=labels)
pairs["shown"] = (pairs["previous_head"].map(kind) == "Previous Token").to_numpy() & (
    pairs["induction_head"].map(kind) == "Induction"
).to_numpy()
called = pairs["is_induction"]
pd.crosstab(called.rename("called"), pairs["shown"].rename("by behaviour"))

# %%
# Every circuit that behaviour shows is called. Composition alone has no such threshold: the ranges
# overlap, and some pairs of twice the random value are no induction circuits. (Pairs of which a
# part is negative are not listed, and not drawn.)

figure, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
for shown, colour, label in ((True, "tab:orange", "an induction circuit"), (False, "0.6", "other")):
    chosen = pairs[pairs["shown"] == shown]
    ax.scatter(
        chosen["k_ratio"],
        chosen["score"],
        color=colour,
        label=f"{label} ({len(chosen)})",
        alpha=0.8,
        edgecolor="white",
    )
ax.axhline(0.5, color="0.3", linestyle="--", linewidth=1)
ax.axvline(1, color="0.3", linestyle=":", linewidth=1)
ax.set(xlabel="K-composition, in units of random heads", ylabel="least of the three parts")
_ = ax.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
# sphinx_gallery_thumbnail_number = 1

# %%
# Where the two disagree
# ----------------------
#
# Two previous-token heads compose strongly with a head that matches, but does not copy:

columns = ["previous_head", "induction_head", "k_ratio", "previous_token", "matching", "copying"]
pairs.loc[~pairs["shown"], columns].nlargest(2, "k_ratio").round(2)

# %%
# The pairs that are called, and are no circuits by behaviour, share one first head. By position
# alone it prefers the previous token; when the model ran it paid less than half of its attention to
# it, and so bears no label. With the gains of the norms folded into the weights, its score says
# so too.

attention = pd.Series(zoo.scores["previous_token"].to_numpy(), index=labels)
folded = skhead.induction_pairs(heads, top=None, fold_norm=True)
by_position = folded.groupby("previous_head")["previous_token"].first()
unshown = pairs[called & ~pairs["shown"]].groupby("previous_head")["previous_token"].first()
pd.DataFrame({"raw": unshown, "folded": by_position, "attention": attention}).loc[unshown.index]
