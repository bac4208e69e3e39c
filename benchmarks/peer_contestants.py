"""The ways to compute the same numbers that `peer.py` holds against each other.

Each contestant is prepared once, models loaded and weights read, and then timed. It returns the
score of every pair, or of a sample of pairs with the seconds that the sample took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from peer_models import KINDS, load_bridge

import skhead

CONTESTANTS = {
    "skhead": "skhead",
    "peer": "TransformerLens",
    "bases-loop": "loop over pairs of cached bases",
    "scipy-loop": "loop over scipy.linalg.subspace_angles",
}
#: Loops exist for the projection kernel only.
LOOPS = ("bases-loop", "scipy-loop")
#: Pairs that a loop computes of all; the rest of its time is extrapolated.
SAMPLES = {"bases-loop": 20_000, "scipy-loop": 200}


@dataclass
class Found:
    """Scores (n_heads, n_heads) by pair kind, NaN where not computed."""

    scores: dict[str, np.ndarray]
    #: Pairs computed and pairs asked for, where they are not the same.
    sampled: tuple[int, int] | None = None
    #: Wall and processor seconds that were spent on the sample.
    loop: tuple[float, float] = (0.0, 0.0)


Run = Callable[[], Found]
Measure = Callable[[str, int, int], float]


def clocks() -> tuple[float, float]:
    """Wall and processor seconds."""
    return time.perf_counter(), time.process_time()


def prepared(contestant: str, task: str, directory: str) -> Run:
    """What is timed."""
    if contestant == "skhead":
        return _skhead(task, directory)
    if contestant == "peer":
        return _peer(task, directory)
    return _loop(contestant, directory)


def _skhead(task: str, directory: str) -> Run:
    """The library's call, as a user writes it; weights are read within."""
    import skhead.kernels

    def run() -> Found:
        heads = skhead.load_heads(directory)
        estimator = skhead.CompositionScore if task == "cs" else skhead.ProjectionKernel
        similarity = estimator(pairs=KINDS).fit_transform(heads)
        return Found({kind: similarity.values[:, :, p] for p, kind in enumerate(KINDS)})

    return run


def _peer(task: str, directory: str) -> Run:
    """The peer's three calls on a bridge that is already built."""
    from transformer_lens.tools.analysis.projection_kernel import attention_head_subspace_affinity

    bridge = load_bridge(directory)

    def run() -> Found:
        found = {}
        with torch.no_grad():
            for kind in KINDS:
                if task == "cs":
                    scores = bridge.all_composition_scores(kind[1]).scores
                else:
                    scores = attention_head_subspace_affinity(bridge, target_role=kind[1]).scores
                layers, heads, _, readers = scores.shape
                shared = scores.numpy().repeat(heads // readers, axis=3)
                found[kind] = shared.reshape(layers * heads, layers * heads)
        return Found(found)

    return run


def _loop(contestant: str, directory: str) -> Run:
    """The double loop of a notebook, on a sample of the pairs."""
    heads = skhead.load_heads(directory)
    stacks = {role: skhead.load_weights(heads, role) for role in "OQKV"}
    pairs = _defined_pairs(heads)
    chosen = np.random.default_rng(0).permutation(len(pairs))[: SAMPLES[contestant]]
    sample = [pairs[i] for i in np.sort(chosen)]

    def run() -> Found:
        scipy = contestant == "scipy-loop"
        score = _angles(stacks) if scipy else _cached_bases(heads, stacks)
        found = {kind: np.full((len(heads), len(heads)), np.nan) for kind in KINDS}
        start = clocks()
        for kind, i, j in sample:
            found[kind][i, j] = score(kind, i, j)
        wall, cpu = (after - before for after, before in zip(clocks(), start, strict=True))
        sampled = (len(sample), len(pairs)) if len(sample) < len(pairs) else None
        return Found(found, sampled, (wall, cpu))

    return run


def _distinct(heads: pd.DataFrame, role: str) -> np.ndarray:
    """Rows of the table that stand for a matrix of their own: one for each key-value head."""
    if role in "OQ":
        return np.arange(len(heads))
    return np.flatnonzero(~heads.duplicated(["layer", "kv_head"]))


def _defined_pairs(heads: pd.DataFrame) -> list[tuple[str, int, int]]:
    """Pair kind and two rows of the table, the first in a layer below the second's."""
    layer = heads["layer"].to_numpy()
    found = []
    for kind in KINDS:
        columns = _distinct(heads, kind[1])
        rows, places = np.nonzero(layer[:, None] < layer[columns])
        found += [(kind, int(i), int(columns[j])) for i, j in zip(rows, places, strict=True)]
    return found


def _angles(stacks: dict[str, np.ndarray]) -> Measure:
    """Principal angles from the two matrices, every pair for itself."""
    from scipy.linalg import subspace_angles

    def score(kind: str, i: int, j: int) -> float:
        angles = subspace_angles(stacks[kind[0]][i], stacks[kind[1]][j])
        return float(np.square(np.cos(angles)).sum())

    return score


def _cached_bases(heads: pd.DataFrame, stacks: dict[str, np.ndarray]) -> Measure:
    """A basis for every matrix once, and a product of two bases for every pair."""
    bases = {
        role: {
            int(i): torch.linalg.svd(torch.from_numpy(stacks[role][i]), full_matrices=False)[0]
            for i in _distinct(heads, role)
        }
        for role in "OQKV"
    }

    def score(kind: str, i: int, j: int) -> float:
        return (bases[kind[0]][i].T @ bases[kind[1]][j]).square().sum().item()

    return score
