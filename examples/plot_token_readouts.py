"""
What heads read and write, token by token
=========================================

The weights of a head can be read in the words of its model: which tokens it attends to, which ones
it promotes, and which ones its subspaces point at. And one thing that decides what comes out of
such a list: the order in which token vectors are centred and normalised.
"""

# %%
# Skip-trigrams
# -------------
#
# In a model's first layer, nothing but tokens and positions is on the stream. A head there comes
# down to a table: a source token, the destinations that attend to it, and the outputs that it
# promotes there. This model of the bundled zoo has learned, among other things, to answer *ask
# word* by *yes* or *no*.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import skhead

source = "skhead/zoo/learned-attn-1"
heads = skhead.load_heads(source)
card = skhead.datasets.load_model_card(source)
names = {int(token): name for token, name in card["tokens"].items() if token.isdecimal()}
vocabulary = {token: names.get(token, f"w{token}") for token in range(69)}

first = heads[heads["layer"] == 0]
trigrams = skhead.skip_trigrams(first, sources=list(names), k=69, vocabulary=vocabulary)
columns = ["source_text", "rank", "out_text", "logit"]
trigrams.query("head == 'L0H1' and source_text == 'ask'")[columns].head(4).round(2)

# %%
# L0H1 attends to the previous token, whatever it is. Where that was *ask*, it promotes both answers
# above all words: the destination is the word in question, and an answer comes next. Which answer
# is right no single token tells. The heads L0H2 and L0H3 do the same.

figure, axes = plt.subplots(1, 4, figsize=(10, 3), layout="constrained", sharey=True)
largest = trigrams["logit"].abs().max()
for ax, (label, table) in zip(axes, trigrams.groupby("head"), strict=True):
    logits = table.pivot(index="source_text", columns="out_text", values="logit")
    logits = logits.loc[list(names.values()), list(names.values())]
    image = ax.imshow(logits, cmap="RdBu_r", vmin=-largest, vmax=largest)
    ax.set(title=label, xlabel="promoted", xticks=range(5), yticks=range(5))
    ax.set_xticklabels(logits.columns, rotation=60)
    ax.set_yticklabels(logits.index)
axes[0].set_ylabel("attended to")
_ = figure.colorbar(image, ax=axes, label="logit above mean")

# %%
# Tokens near a subspace
# ----------------------
#
# In deeper layers there is no such table, but still a subspace that the head writes into, or reads
# from. :class:`~skhead.SubspaceReadout` lists the tokens nearest to it. A score is the cosine of
# the angle between the subspace and the vector that reads a token's logit off the stream. In
# another bundled model, L1H0 writes what *ask* and *yes* are read by, L1H1 what words are read by,
# and L1H2, a head that was restarted late in training, nothing in particular: random subspaces of
# this size score 0.35 on average, and 0.49 for the nearest of 68 tokens.

source = "skhead/induction-2l"
heads = skhead.load_heads(source)
special = {64: "bos", 65: "ask", 66: "yes", 67: "no"}
vocabulary = {token: special.get(token, f"w{token}") for token in range(68)}
readout = skhead.SubspaceReadout(n_tokens=6, vocabulary=vocabulary).fit(heads)
table = readout.top_tokens(heads.loc[["L1H0", "L1H1", "L1H2"]])
table["shown"] = table["text"] + " " + table["score"].map("{:.2f}".format)
table.pivot(index="head", columns="rank", values="shown")

# %%
# Centre first, normalise after
# -----------------------------
#
# Logits are compared between tokens. A vector that is added to all tokens' vectors changes no
# probability, so that a list of tokens should not change either. And a token of a long vector gets
# large logits from everything, which says nothing about a head. The default order takes care of
# both. Here each order is tried on the twelve restarted heads, which have nothing to tell: where
# does *bos* come among the 68 tokens, whose vector is the longest? And how much of each list of ten
# stays when one vector, as long as those of tokens, is added to all of them?

restarted = heads.drop(index=["L0H0", "L0H2", "L1H0", "L1H1"])
space = skhead.weights.read_token_space(source)
vectors = space.unembedding.numpy()
step = np.random.default_rng(0).normal(size=vectors.shape[1])
moved = vectors + step / np.linalg.norm(step) * np.median(np.linalg.norm(vectors, axis=1))

orders = ["center-normalize", "normalize-center", "center", "normalize", "none"]
places, kept = {}, {}
for order in orders:
    readout = skhead.SubspaceReadout(order=order, n_tokens=68)
    before = readout.fit(heads).top_tokens(restarted)
    after = readout.fit(heads, vectors=moved).top_tokens(restarted)
    places[order] = before.loc[before["token"] == 64, "rank"].to_numpy()
    tops = [
        list_.query("rank <= 10").groupby("head")["token"].apply(set) for list_ in (before, after)
    ]
    kept[order] = [len(a & b) / 10 for a, b in zip(*tops, strict=True)]
pd.DataFrame({"rank of bos": pd.DataFrame(places).median(), "kept": pd.DataFrame(kept).mean()})

# %%
# Only one order passes both.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
for ax, found, label in (
    (axes[0], places, "rank of the longest vector, of 68"),
    (axes[1], kept, "share of a list that stays"),
):
    for i, order in enumerate(orders):
        colour = "tab:green" if order == "center-normalize" else "0.5"
        height = i + np.linspace(-0.25, 0.25, len(restarted))
        ax.scatter(found[order], height, color=colour, s=18)
    ax.set(xlabel=label, yticks=range(5), yticklabels=orders)
axes[0].axvline(34.5, color="0.3", linestyle=":", linewidth=1)
axes[0].invert_yaxis()
# sphinx_gallery_thumbnail_number = 1
