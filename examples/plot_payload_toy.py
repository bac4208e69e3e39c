"""
Features of queries and keys where they are known
=================================================

A query looks for the token that shares two things with it, and reads a payload there. Heads that
were trained to do this come with the package, and what they must have learned is known: two
features, of 3 and of 5 dimensions. Here both are recovered from queries and keys, scores are split
between them, and keys trade places in them. At last a head without enough dimensions.
"""

# %%
# The task
# --------
#
# A token of the context is the sum of 3 latent signs ``z1``, 5 latent signs ``z2``, each along a
# direction of its own, and a payload. The query holds the same latents as one of the 16 tokens,
# along *other* directions, so that similarity of the tokens themselves does not help. The head
# attends to the right token nearly always.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.pipeline import make_pipeline

import skhead
from skhead.datasets import (
    load_payload_head,
    make_contrast_pairs,
    make_payload_retrieval,
    payload_head,
)
from skhead.inspection import AttributionDisplay, FeatureScatterDisplay, SpectrumDisplay

head = load_payload_head("d16-r3-r5")
task, held_out = (
    make_payload_retrieval(n, embeddings=head.embeddings, unique_latents=True, random_state=seed)
    for seed, n in enumerate((4000, 1000))
)
attention = head.attention(held_out)[np.arange(1000), held_out.i_star].mean()
print(f"payloads named: {head.accuracy(held_out):.3f}, mean attention: {attention:.3f}")

# %%
# Pairs, and their contrast
# -------------------------
#
# Each query and its 16 keys are pairs, which agree on a feature or differ on it. For ``z1``, keys
# of one context are compared that have equal ``z2``, and for ``z2`` keys with equal ``z1``. The
# ranks are those components that permuted labels do not give. They are 3 and 5, and what comes
# behind is more than six hundred times smaller.

pairs = task.pairs(head)
decomposer = skhead.ContrastiveQKDecomposer(rank="null", random_state=0).fit(pairs)
display = SpectrumDisplay.from_estimator(decomposer)
display.figure_.set_size_inches(7.6, 3.8)

# %%
# The subspaces are the right ones: the smallest cosine between the components and the space into
# which the head maps the latents is close to one, on both sides.


def least_cosine(components, weights, directions):
    truth, _ = np.linalg.qr(weights.T @ directions)
    return np.linalg.svd(components @ truth, compute_uv=False).min()


known = head.embeddings
sides = {"z1": (known.B1, known.A1), "z2": (known.B2, known.A2)}
table = decomposer.summary()[["rank", "rank_share", "energy", "gap", "null_threshold"]]
for name, (of_query, of_key) in sides.items():
    found = decomposer.decompositions_[name]
    table.loc[name, "cosine of queries"] = least_cosine(found.query_components, head.W_Q, of_query)
    table.loc[name, "cosine of keys"] = least_cosine(found.key_components, head.W_K, of_key)
table.round(3)

# %%
# Queries lie among the keys that they look for. The eight labels are the eight combinations of
# three signs, which two of the three coordinates of ``z1`` already tell apart.

test = held_out.pairs(head)
display = FeatureScatterDisplay.from_estimator(decomposer, test[:60], feature="z1")

# %%
# Why does this query attend to that key?
# ---------------------------------------
#
# Every score is the sum of what both features add, and of a residual. Dots mark the keys that agree
# with the query. Only key 1 agrees on both and collects both parts in full. Key 6 comes nearest: it
# agrees on ``z1``, and four of the five signs of ``z2`` are right. Key 4 has all of ``z2`` and
# loses on ``z1``, of which it has no sign, more than half of what it gets.

display = AttributionDisplay.from_estimator(decomposer, test, query=9)
# sphinx_gallery_thumbnail_number = 3

# %%
# What the features truly add is known as well, so that the share of its variance can be given that
# the parts explain. The oblique ones do not depend on the order of features, nor on the basis in
# which the head is written: below, queries and keys are mapped such that every score stays, and
# subspaces (found with ``whiten="qk"``) move along. The released formula projects the query on one
# feature and then on the next. It explains less of the feature in front, .94 of ``z1`` or .96 of
# ``z2``, where the oblique parts explain .99; in the other basis .71 and .90 are left. What the
# oblique parts miss is where latents of ``z1`` and ``z2`` meet, which is little in this head.

truth = head.scale * skhead.true_logits(head, held_out).reshape(-1, 2)


def explained(table):
    left = np.square(table[["z1", "z2"]] - truth).sum()
    return 1 - left / np.square(truth - truth.mean(axis=0)).sum(axis=0)


def split(attribution, order=("z1", "z2"), basis=None):
    basis = np.eye(head.d_head) if basis is None else basis
    moved, inverse = [], np.linalg.inv(basis).T
    for part in (pairs, test):
        maps = {"queries": part.queries @ basis, "keys": part.keys @ inverse}
        moved.append(skhead.QKPairs(**{**vars(part), **maps}))
    first, *others = (
        skhead.ContrastiveQKDecomposer(rank=rank, whiten="qk", attribution=attribution).fit(
            moved[0].feature(name)
        )
        for name, rank in ((name, {"z1": 3, "z2": 5}[name]) for name in order)
    )
    return explained(first.attribute(moved[1], others=others))


skewed = np.random.default_rng(0).normal(size=(16, 16))
pd.DataFrame(
    {
        "oblique": split("oblique"),
        "oblique, other basis": split("oblique", basis=skewed),
        "released, z1 first": split("query"),
        "released, z2 first": split("query", ("z2", "z1")),
        "released, other basis": split("query", basis=skewed),
    }
).T.round(3)

# %%
# In a pipeline queries and keys can be scaled first, as any features. The ranks stay, but the
# scores that are split are then no longer those of the model.

scaled = make_pipeline(skhead.QKTransformer(), skhead.ContrastiveQKDecomposer())
scaled.fit(pairs)
print("ranks behind a scaler:", dict(zip(("z1", "z2"), scaled[-1].rank_.tolist(), strict=True)))

# %%
# Does attention follow?
# ----------------------
#
# The key that is looked for and another, which agrees with the query on nothing, trade places in
# the subspace of a feature. One feature takes attention away, and both together hand all of it to
# the other key. Random subspaces of the same rank do less. But they do more than nothing: a
# subspace of rank r holds r / d_head of any difference.

small = payload_head(known, d_head=8)
crowded = skhead.ContrastiveQKDecomposer().fit(task.pairs(small))
tables = {
    "16 dimensions": decomposer.intervene(test, original="agreeing", random_state=0),
    "8 dimensions": crowded.intervene(held_out.pairs(small), original="agreeing", random_state=0),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained", sharey=True)
for ax, (title, moved) in zip(axes, tables.items(), strict=True):
    at = np.arange(4)
    for start, rows_of in ((0, moved.index[:4]), (1, ["none", *moved.index[4:]])):
        chosen = moved.loc[rows_of]
        side = at + 0.38 * start - 0.19
        shown = chosen["attention_target"].to_numpy()
        colour = ("#0072B2", "0.7")[start]
        label = ("subspace of the feature", "random subspaces")[start]
        ax.bar(side, shown, 0.36, color=colour, label=label)
    shares = moved["rank_share"].iloc[1:4]
    ticks = [f"{name}\nr/d = {share:.2f}" for name, share in shares.items()]
    ax.set_xticks(at, ["no\nexchange", *ticks])
    ax.set_title(f"d_head: {title}", fontsize="medium")
axes[0].set_ylabel("attention to the other key")
_ = axes[0].legend(frameon=False, loc="upper left")

# %%
# On the left, each feature hands over more than three times as much attention as chance does. On
# the right is a head that solves the same task in 8 dimensions: random subspaces hand over more
# than those of the features, and "all" is the whole space, which would move all attention whatever
# it meant. Nor does ``shift``, the change of the other key's share of the attention on both, set
# features apart there: .28 against .33 by chance for ``z1``, and .72 against .69 for ``z2``. An
# exchange says something only where its rank is a small part of the head, or beside its random row.

pd.concat(tables)[
    ["rank", "rank_share", "attention_original", "attention_target", "shift", "flip_rate"]
].round(3)

# %%
# More features than dimensions
# -----------------------------
#
# This head was trained on twice 5 latents, with 8 dimensions for them, and names 99% of payloads.
# It keeps all five dimensions of ``z2``. Of ``z1`` it keeps three, and little of a fourth, which
# holds just under 1% of the energy, so that the rank at 99% is 3. Behind the fourth value the
# spectrum ends as cleanly as that of ``z2`` behind the fifth: a clean spectrum says what the head
# uses, and not that this is all of the feature.

full = load_payload_head("d8-r5-r5")
found = {
    name: skhead.ContrastiveQKDecomposer().fit(
        make_contrast_pairs(name, 20000, head=full, random_state=0)
    )
    for name in ("z1", "z2")
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for name, marker, colour in (("z1", "o", "#0072B2"), ("z2", "s", "#E69F00")):
    values = found[name].singular_values_
    label = f"{name}: rank {found[name].rank_} of 5"
    axes[0].semilogy(np.arange(1, 9), values, marker=marker, color=colour, label=label)
axes[0].set(xlabel="component", ylabel="singular value", title=full.name)
axes[0].legend(frameon=False)
for ax, shown in zip(axes[1:], (head, full), strict=True):
    report: skhead.SuperpositionReport = skhead.analyse_superposition(shown)
    most = np.abs(report.interaction).max()
    image = ax.imshow(report.interaction, cmap="PuOr", vmin=-most, vmax=most)
    split_at = shown.embeddings.r1 - 0.5
    ax.axhline(split_at, color="black", linewidth=0.8)
    ax.axvline(split_at, color="black", linewidth=0.8)
    title = f"{shown.name}: diagonal {report.diagonal_share:.2f}"
    ax.set(xlabel="latent of the key", ylabel="latent of the query", title=title)
    figure.colorbar(image, ax=ax, shrink=0.8)

# %%
# The matrices show what latent i of a query and latent j of a key add to their product. In the head
# with enough dimensions latents meet themselves, and little else. In the crowded one a third of the
# energy lies off the diagonal, nearly all of it in two rows. Its keys hardly show latents 2 and 4,
# both of ``z1``. What a query holds there is held against other latents instead: 2 against 1 and 3,
# and 4 against 0 and all those of ``z2``, which have nothing to do with it and raise or lower the
# score.
