"""
Watching a circuit form
=======================

A model in memory is a source like any other, and its weights are read whenever they are asked for.
Here a small transformer is trained to repeat what it has read, in a few seconds, while the heads
are watched: at which step does the induction circuit show in the weights, and at which in the loss?
"""

# %%
# A model of two layers
# ---------------------
#
# Four heads a layer, no norm, no MLP; a dictionary of tensors under TransformerLens' names, which
# is all that :func:`~skhead.register_model` needs. (It takes Hugging Face models and bridges, too.)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import norm

import skhead

N_WORDS, D_MODEL, N_HEADS, D_HEAD, LENGTH, BATCH = 16, 64, 4, 16, 20, 64
generator = torch.Generator().manual_seed(0)


def drawn(*shape, size):
    return (torch.randn(shape, generator=generator) * size).requires_grad_()


model = {
    "embed.W_E": drawn(N_WORDS + 1, D_MODEL, size=0.5),
    "pos_embed.W_pos": drawn(LENGTH + 1, D_MODEL, size=0.5),
    "unembed.W_U": drawn(D_MODEL, N_WORDS + 1, size=D_MODEL**-0.5),
}
for layer in range(2):
    for role in "QKV":
        name = f"blocks.{layer}.attn.W_{role}"
        model[name] = drawn(N_HEADS, D_MODEL, D_HEAD, size=D_MODEL**-0.5)
    model[f"blocks.{layer}.attn.W_O"] = drawn(N_HEADS, D_HEAD, D_MODEL, size=D_MODEL**-0.5)

name = skhead.register_model(model, "in training")
heads = skhead.load_heads(name)
heads.head(2)

# %%
# The task
# --------
#
# A block of four to nine different words, over and over again. The length of the block differs, so
# that positions alone do not tell what comes next. The loss counts words that can be known.


def texts():
    """Tokens of shape (64, 21), and which of the last 20 are known from those before."""
    lengths = torch.randint(4, 10, (BATCH, 1), generator=generator)
    words = torch.rand(BATCH, N_WORDS, generator=generator).argsort(dim=1)
    place = torch.arange(LENGTH)
    start = torch.full((BATCH, 1), N_WORDS)
    return torch.cat([start, words.gather(1, place % lengths)], dim=1), place > lengths


def logits(tokens):
    stream = model["embed.W_E"][tokens] + model["pos_embed.W_pos"]
    hidden = torch.full((LENGTH + 1, LENGTH + 1), -torch.inf).triu(1)
    for layer in range(2):
        q, k, v, o = (model[f"blocks.{layer}.attn.W_{role}"] for role in "QKVO")
        queries, keys, values = (torch.einsum("bcd,hdr->bhcr", stream, w) for w in (q, k, v))
        pattern = (queries @ keys.mT / D_HEAD**0.5 + hidden).softmax(dim=-1)
        stream = stream + torch.einsum("bhcr,hrd->bcd", pattern @ values, o)
    return stream @ model["unembed.W_U"]


# %%
# Training, with a look at the weights
# ------------------------------------
#
# Every few steps the heads table, which was made once, is used again. Three parts make an induction
# circuit, and each is read from the weights as they are: an earlier head attends to the previous
# token, a later one compares that with its own token, and it copies.


def look():
    """The best pair's three parts, and the largest K-overlap in standard deviations of chance."""
    kernel = skhead.ProjectionKernel(pairs=["OK"])
    z = skhead.NullCalibrator().fit_transform(kernel.fit_transform(heads)).values
    scores = skhead.CircuitScorer(["previous_token", "ov_copying", "induction_matching"])
    parts = scores.fit_transform(heads)
    return {
        "attends to the previous token": parts["previous_token"].max(),
        "matches": parts["induction_matching"].max(),
        "copies": parts.loc[heads["layer"] == 1, "ov_copying"].max(),
        "largest OK overlap (z)": np.nanmax(z),
    }


optimiser = torch.optim.AdamW(model.values(), lr=2e-3, weight_decay=0.01)
history = []
for step in range(201):
    tokens, known = texts()
    guess = logits(tokens)[:, :-1][known]
    loss = torch.nn.functional.cross_entropy(guess, tokens[:, 1:][known])
    if step % 10 == 0:
        right = (guess.argmax(dim=1) == tokens[:, 1:][known]).double().mean()
        history.append({"step": step, "loss": loss.item(), "accuracy": right.item(), **look()})
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
history = pd.DataFrame(history).set_index("step")
history.iloc[::4].round(2)

# %%

COLOURS = {"attends to the previous token": "#0072B2", "matches": "#E69F00", "copies": "#009E73"}
figure, axes = plt.subplots(3, 1, figsize=(7, 7), layout="constrained", sharex=True)
axes[0].plot(history["loss"], color="k")
axes[0].axhline(np.log(N_WORDS), color="0.6", linestyle=":", linewidth=1)
axes[0].text(200, np.log(N_WORDS), "uniform guess", ha="right", va="bottom", color="0.4")
axes[0].set(ylabel="loss (nats)", ylim=(0, 3.4))
for label, colour in COLOURS.items():
    axes[1].plot(history[label], color=colour, label=label)
axes[1].set(ylabel="score from weights", ylim=(-0.1, 1.05))
axes[1].legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.6))
axes[2].plot(history["largest OK overlap (z)"], color="#CC79A7")
chance = norm.isf(0.01 / 16)
axes[2].axhline(chance, color="0.6", linestyle=":", linewidth=1)
axes[2].text(200, chance, "one in 100 random models", ha="right", va="bottom", color="0.4")
axes[2].set(ylabel="largest OK overlap (z)", xlabel="training step")
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)

# %%
# Copying comes first, and the loss falls by what it brings without a match: the next word is one of
# those that were there. After some fifty steps a first-layer head turns to the previous token, the
# match sharpens, and the rest of the loss goes in as many steps again. The overlap of one pair's
# subspaces leaves the range of chance meanwhile, near step 80, when the loss has come down from 2.0
# to 0.9: an overlap of O and K shows the circuit without asking for any of its parts.

# %%
# Who does what, at the end
# -------------------------
#
# Of all pairs, those that come closest. No pair is *called* an induction circuit: the first head
# prefers the previous token by a third of its attention, averaged over positions, where half is
# asked for. All four heads of the second layer share the work.

pairs = skhead.induction_pairs(heads, top=None)
columns = ["previous_head", "induction_head", "k_ratio", "previous_token", "matching", "copying"]
pairs[columns].head(5).round(2)

# %%
# A live model is forgotten when it is no longer needed, so that its memory can be freed.

skhead.unregister_model(name)
