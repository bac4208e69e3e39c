"""
What heads do alone, and what they do together
==============================================

The loss of a transformer can be taken apart by how many heads lie on the way from a token to the
prediction. Here this is done for a model of two layers, beside what its weights say about pairs of
heads that act as one.
"""

# %%
# Virtual heads
# -------------
#
# A head that moves on what an earlier head has written forms one head with it, a virtual head.
# :func:`~skhead.virtual_heads` lists them by how strongly the two compose, in units of random
# heads, without running the model. Twelve of the sixteen heads of the bundled model were started
# again from random weights late in training, when there was little left to learn. They are the
# model's own picture of chance.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import skhead

source = "skhead/induction-2l"
heads = skhead.load_heads(source)
virtual: skhead.VirtualHeads = skhead.virtual_heads(heads, top=64, min_ratio=0)
table = virtual.table
columns = ["composition", "ratio", "effective_rank", "identity_signed", "ov_copying"]
table[columns].head(5).round(2)

# %%
# Of the 64 paths, three stand out, and each of them joins two heads that were trained throughout.
# The fourth such pair, L0H0 and L1H1, comes last of all: they are this model's induction circuit,
# in which the second head reads the first one's work for its keys and does not move it on.

trained = {"L0H0", "L0H2", "L1H0", "L1H1"}
both = table["head_1"].isin(trained) & table["head_2"].isin(trained)

figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
place = np.arange(len(table))
for chosen, colour, label in (
    (both, "tab:green", "two of the heads trained throughout"),
    (~both, "0.7", "at least one restarted head"),
):
    ax.bar(place[chosen], table["ratio"][chosen], color=colour, width=0.9, label=label)
for i in range(3):
    ax.text(i + 0.7, table["ratio"].iloc[i], table.index[i].replace(">", " > "), va="center")
ax.axhline(1, color="0.2", linestyle="--", linewidth=1)
ax.set(xlabel="path, by rank", ylabel="V-composition / random", xlim=(-1, 64))
_ = ax.legend(frameon=False)

# %%
# What would it do?
# -----------------
#
# A virtual head is a head: its factors go into every estimator that takes a stack. The strongest
# one acts on few directions, five of its sixteen.

maps = ["ov_norm", "ov_effective_rank", "ov_positive_share", "pk_vo"]
features = skhead.CircuitScorer(maps).fit_transform(virtual.stack()[:3])
pd.DataFrame(features, index=table.index[:3], columns=maps).round(2)

# %%
# Which path matters for what?
# ----------------------------
#
# :func:`~skhead.term_importance` runs the model with its attention patterns frozen, and lets first
# no head write, then every head once, then heads on what heads have written. Two kinds of text: a
# block of random words that comes twice, and questions *ask word*, to be answered by *yes* if the
# word has occurred before and by *no* otherwise.

BOS, ASK, YES, NO = 64, 65, 66, 67
generator = np.random.default_rng(0)
block = generator.permuted(np.tile(np.arange(64), (32, 1)), axis=1)[:, :30]
repeats = np.concatenate([np.full((32, 1), BOS), block, block], axis=1)


def ask_questions(words):
    """One sequence of 64 tokens: eight words, then questions."""
    told, new = list(words[:8]), list(words[8:])
    sequence = [BOS, *told]
    while len(sequence) < 63:
        known = generator.random() < 0.5
        word = generator.choice(told) if known else new.pop()
        sequence += [ASK, word, YES if known else NO]
        told.append(word)
    return sequence[:63]


questions = np.array([ask_questions(generator.permutation(64)) for _ in range(32)])
texts = {"a block, twice": repeats, "questions": questions}
terms: dict[str, skhead.TermImportance] = {
    name: skhead.term_importance(source, tokens) for name, tokens in texts.items()
}
effects = pd.DataFrame({name: found.to_frame()["effect"] for name, found in terms.items()})
effects.round(2)

# %%
# The four numbers of a column add up to the model's loss. On the repeats, the direct path from each
# token to its own prediction is worse than a uniform guess. Copying is then the work of one head,
# L1H1. Of what heads do for the questions, a fourth goes through virtual heads.

single = pd.DataFrame({name: found.heads for name, found in terms.items()})
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
effects.iloc[1:].plot.barh(ax=axes[0], color=["tab:orange", "tab:green"])
axes[0].set(title="Terms", xlabel="change of the loss (nats per token)", ylabel="")
axes[0].invert_yaxis()
shown = single.loc[["L0H0", "L0H2", "L1H0", "L1H1", "L1H2"]]
shown.plot.barh(ax=axes[1], color=["tab:orange", "tab:green"], legend=False)
axes[1].set(title="Single heads", xlabel="change of the loss (nats per token)", ylabel="")
axes[1].invert_yaxis()
for ax in axes:
    ax.axvline(0, color="0.2", linewidth=0.8)
# sphinx_gallery_thumbnail_number = 2

# %%
# A head that is needed and brings nothing
# ----------------------------------------
#
# L0H0, the previous-token head, changes the loss by next to nothing here. Yet with L0H0 switched
# off the model loses its copying altogether:

card = skhead.datasets.load_model_card(source)
without = {head["head"]: head["accuracy_without"] for head in card["heads"]}
pd.DataFrame(without).T.loc[["L0H0", "L0H2", "L1H0", "L1H1", "L1H2"]]

# %%
# This is no contradiction. Patterns are frozen, so that what L0H0 does for the *keys*
# of L1H1 is counted with L1H1, whose pattern it makes. Terms tell where the content flows that
# reaches the prediction; what steers attention is for K- and Q-composition to tell.
#
# L0H2 and L1H0, the strongest path of the first figure, are needed for questions and not for
# copying.
