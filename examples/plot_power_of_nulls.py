"""
What each null finds, and how much of it is true
================================================

Models with a known answer: heads that prefer common directions, as trained heads do, and twenty
pairs of them that share some more on purpose. A null is good if it finds those twenty, and if few
of the other pairs that it calls come along.
"""

# %%
# A model with planted pairs
# --------------------------
#
# Every matrix is random, with a spectrum that decays along the residual stream, so that any two
# heads overlap more than uniformly random subspaces would. Then the keys of twenty heads of the
# second layer take over ``shared`` of the 8 directions that a head of the first layer writes.
# With ``uneven`` above 0, heads differ in how strongly they prefer the common directions.

import matplotlib.pyplot as plt
import numpy as np
import torch

import skhead

N_HEADS, D_MODEL, D_HEAD, N_PLANTED = 40, 96, 8, 20


def planted_model(shared, uneven, seed):
    """Weights of a two-layer model under TransformerLens names."""
    generator = torch.Generator().manual_seed(seed)
    coordinate = torch.arange(1, D_MODEL + 1).float()
    weights = {}
    for layer in range(2):
        for role in "QKVO":
            slope = 1 + uneven * (2 * torch.rand(N_HEADS, 1, 1, generator=generator) - 1)
            directions = torch.randn(N_HEADS, D_HEAD, D_MODEL, generator=generator)
            directions *= coordinate ** (-slope / 2)
            name = f"blocks.{layer}.attn.W_{role}"
            weights[name] = directions if role == "O" else directions.mT
    written = weights["blocks.0.attn.W_O"][:N_PLANTED, :shared]
    weights["blocks.1.attn.W_K"][:N_PLANTED, :, :shared] = written.mT
    return weights


# %%
# Who calls what
# --------------
#
# Each null calls the pairs whose overlap is larger than it expects, at a nominal false discovery
# rate of 5%. Since the planted pairs are known, so are the true shares: how many of the calls are
# wrong, and how many of the planted pairs are among them.

NULLS = ("haar", "anisotropic", "empirical")


def rates(shared, uneven, n_models=5):
    """False discovery proportion and power of every null, averaged over models."""
    found = np.empty((n_models, len(NULLS), 2))
    for seed in range(n_models):
        name = skhead.register_model(planted_model(shared, uneven, seed), "planted")
        heads = skhead.load_heads(name)
        similarity = skhead.ProjectionKernel(pairs=["OK"]).fit_transform(heads)
        for i, null in enumerate(NULLS):
            law = skhead.NullCalibrator(null=null, side="upper")
            q = law.fit_transform(similarity).calibration.q[:N_HEADS, N_HEADS:, 0]
            hits = np.count_nonzero(np.diag(q)[:N_PLANTED] < 0.05)
            calls = np.count_nonzero(q < 0.05)
            found[seed, i] = 1 - hits / max(calls, 1), hits / N_PLANTED
        skhead.unregister_model(name)
    return found.mean(axis=0)


sharing = [1, 2, 3, 4]
by_sharing = np.array([rates(shared, uneven=0.0) for shared in sharing])
unevenness = [0.0, 0.1, 0.2, 0.3, 0.4]
by_unevenness = np.array([by_sharing[-1], *(rates(4, uneven) for uneven in unevenness[1:])])

# %%
# Finding the planted pairs is easy: once two of eight directions are shared, every null has nearly
# all of them. The difference is in what else is called. Uniformly random subspaces (``haar``)
# explain none of the common preference, and nearly all calls are wrong. A law fitted to that
# preference (``anisotropic``), and one read off the pairs themselves (``empirical``), stay close to
# the promised rate.
#
# On the right the assumption of a common preference breaks: heads prefer it more or less. The
# anisotropic law soon calls every pair of two heads that prefer it strongly. The empirical null
# allows every head a level of its own and lasts longer, but not forever. No null is safe against
# every kind of structure, which is why a p-value is read together with its effect size.

COLOURS = {"haar": "tab:red", "anisotropic": "tab:blue", "empirical": "tab:green"}
panels = [
    ("False discoveries", sharing, by_sharing[:, :, 0]),
    ("Power", sharing, by_sharing[:, :, 1]),
    ("False discoveries, uneven heads", unevenness, by_unevenness[:, :, 0]),
]
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
for ax, (title, x, shares) in zip(axes, panels, strict=True):
    for null, share in zip(NULLS, shares.T, strict=True):
        ax.plot(x, share, "o-", color=COLOURS[null], label=null)
    ax.set(title=title, ylim=(-0.03, 1.03), xticks=x)
    ax.spines[["top", "right"]].set_visible(False)
for ax in axes[[0, 2]]:
    ax.axhline(0.05, color="black", linestyle=":", label="nominal 5%")
axes[0].set(xlabel="shared directions of 8", ylabel="share of calls that are wrong")
axes[1].set(xlabel="shared directions of 8", ylabel="share of planted pairs found")
axes[2].set(xlabel="unevenness of preference", ylabel="share of calls that are wrong")
for ax in axes[1:]:
    ax.tick_params(labelleft=True)
axes[0].legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.6))
