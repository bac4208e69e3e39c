"""
Does an operation hold in action?
=================================

Parameters say what a head would do with a token if it attended to it. Whether it attends is another
matter. Here heads are asked for their operation twice, by weights and while the model runs, and a
head without any operation in mind is asked what it does at all.
"""

# %%
# What does this head do?
# -----------------------
#
# :class:`~skhead.SalientOperations` needs no list of word pairs. It lists the tokens to which a
# head responds most, and what it makes of them.

import matplotlib.pyplot as plt
import pandas as pd

import skhead
from skhead.datasets import copying_operation, filter_operations, list_operations, load_operations

source = "skhead/induction-2l"
heads = skhead.load_heads(source)
texts = [f" w{word}" for word in range(64)] + ["<bos>", " ask", " yes", " no"]
salient = skhead.SalientOperations(
    n_salient=4, n_targets=3, source_embedding="raw", vocabulary=texts
).fit(heads)
found: skhead.SalientMappings = salient.mappings(heads.loc[["L1H0", "L1H1", "L1H2"]])
print(found.to_text())

# %%
# L1H0 answers questions and L1H1 copies. L1H2 was started again late in training; something is
# always the most salient, and its list shows no pattern. The logits of the targets tell how much
# each head makes of it.

figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained", sharex=True)
for ax, (label, rows) in zip(axes, found.table.groupby("head"), strict=True):
    first = rows[rows["target_rank"] == 1]
    names = first["text"].str.strip() + " > " + first["target_text"].str.strip()
    ax.barh(names, first["logit"], color="#0072B2")
    ax.set_title(label)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
_ = figure.supxlabel("logit of the strongest target, per salient token")

# %%
# By weights, and in action
# -------------------------
#
# Copying, scored from weights, and then from what heads write at the last position of a prompt:
# *without* context, where the head attends to nothing but the word, and *with* it, as it attends by
# itself.

words = {"copying": [(word, word) for word in range(64)]}
agreement, points = {}, {}
for name in (source, "skhead/zoo/learned-attn-1", "skhead/zoo/rope-attn-1"):
    mapper = skhead.OperationMapper(words, source_embedding="raw", k=1)
    static = mapper.fit(skhead.load_heads(name)).scores_
    prompts = [([64, 5], []), ([64], [7])]
    dynamic = skhead.dynamic_scores(name, words, prompts, k=1)
    agreement[name] = skhead.compare_scores(static, dynamic, m=4).loc["copying"]
    chosen = dynamic[dynamic["feature"] == "copying"]
    acting = chosen.groupby(["context", "head"])["score"].mean().unstack(0)
    points[name] = acting.assign(weights=static["copying"])
table = pd.concat(agreement)
table[["pearson", "overlap", "chance", "static_max", "dynamic_max"]].round(2)

# %%
# Heads that score nothing by weights do nothing in action. Of those that score highly, most copy in
# half of the prompts or in all without context, though one of ``learned-attn-1`` does in none. With
# context nearly all scores vanish: these heads look for a word that has come *before*, and in
# prompts of two or three tokens there is none. A static score tells what a head does if it attends.

figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.2), layout="constrained", sharey=True)
styles = zip(points.items(), ("#0072B2", "#E69F00", "#009E73"), "os^", strict=True)
for (name, rows), colour, marker in styles:
    for ax, context in zip(axes, ("without", "with"), strict=True):
        label = name.removeprefix("skhead/")
        ax.scatter(
            rows["weights"], rows[context], color=colour, marker=marker, alpha=0.7, label=label
        )
for ax, context in zip(axes, ("without", "with"), strict=True):
    ax.axline((0, 0), slope=1, color="0.8", zorder=0)
    ax.set(title=f"{context} context", xlabel="copying, by weights", xlim=(-0.04, 1.04))
axes[0].set(ylabel="copying, in action", ylim=(-0.04, 1.04))
_ = axes[1].legend(frameon=False, loc="upper left")
# sphinx_gallery_thumbnail_number = 2

# %%
# Operations as words
# -------------------
#
# For language models the package holds operations as word pairs. What a tokenizer leaves of them is
# what can be scored: a pair counts if both words are one token. A toy tokenizer, which knows words
# of at most six letters and takes others to pieces, shows what is lost.


def toy_tokenizer(text):
    """One token for a short word; one for every three letters of a long one."""
    word = text.strip()
    pieces = [word] if len(word) <= 6 else [word[i : i + 3] for i in range(0, len(word), 3)]
    return [hash_of(piece) for piece in pieces]


def hash_of(piece):
    return sum(ord(letter) * 31**place for place, letter in enumerate(piece)) % 50_000


operations = load_operations()
left = filter_operations(operations, toy_tokenizer)
counts = left.counts
counts.loc[list_operations()[:6]]

# %%
# Pairs whose *source* is several tokens have no row in the embedding, so that weights alone cannot
# score them. :func:`~skhead.multi_token_pairs` keeps exactly those for ``dynamic_scores``.

several = {
    name: len(skhead.multi_token_pairs(pairs, toy_tokenizer)) for name, pairs in operations.items()
}
shares = pd.DataFrame(
    {"one token": counts["n_kept"] / counts["n_pairs"], "source of several": pd.Series(several)}
)
shares["source of several"] /= counts["n_pairs"]
shares = shares.sort_values("one token")
figure, ax = plt.subplots(figsize=(7.6, 5.2), layout="constrained")
shares.plot.barh(ax=ax, stacked=True, color=["#0072B2", "#E69F00"], width=0.8)
ax.set(xlabel="share of pairs", xlim=(0, 1), ylabel="")
ax.legend(frameon=False, loc="lower right")
ax.spines[["top", "right"]].set_visible(False)

# %%
# Copying needs no list: words of the vocabulary itself do.

copying_operation(["<bos>", " park", " dog", "ing", " house"])
