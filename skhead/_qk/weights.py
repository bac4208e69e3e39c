"""Which pairs count for a feature, and how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead.qk_pairs import QKPairs

__all__ = ["WEIGHTINGS", "Permutations", "WeightedPairs", "classes_asked", "weigh_pairs"]

WEIGHTINGS = ("pair", "query", "released")
#: Weights of permuted pairs that are held at once.
_NUMBERS = 1 << 23


@dataclass(frozen=True)
class WeightedPairs:
    """Pairs of one feature.

    Attributes
    ----------
    kinds : ndarray of shape (n_keys,), int8
        1 for a pair that agrees, 0 for one that differs, -1 for one that does not count.
    weights : ndarray of shape (n_keys,), float64, or None
        None where all pairs that count weigh 1.
    strata : ndarray of shape (n_keys,), int64
        Keys among which kinds may be exchanged if the feature means nothing.
    n_queries : int
        Queries with a pair that counts.
    """

    kinds: NDArray[np.int8]
    weights: NDArray[np.float64] | None
    strata: NDArray[np.int64]
    n_queries: int

    def permutations(self, n: int, rng: np.random.Generator) -> Iterator[Permutations]:
        """Kinds and weights exchanged as chance would if the feature meant nothing.

        They are exchanged within strata; where no stratum has pairs of both kinds, among all.

        Parameters
        ----------
        n : int
            How many permutations.
        rng : numpy Generator

        Yields
        ------
        Permutations
            Some of them at a time.
        """
        used = np.flatnonzero(self.kinds >= 0)
        strata, kinds = self.strata[used], self.kinds[used]
        if not len(np.intersect1d(strata[kinds == 1], strata[kinds == 0])):
            strata = np.zeros_like(strata)
        giver = np.argsort(strata, kind="stable")
        weights = np.ones(len(used)) if self.weights is None else self.weights[used]
        places = np.where(kinds[giver] == 1, 0, 1)
        size = max(1, _NUMBERS // max(1, len(used)))
        for start in range(0, n, size):
            part = slice(start, min(n, start + size))
            count = part.stop - start
            receiver = np.argsort(strata + rng.random((count, len(used))), axis=1)
            assigned = np.zeros((count, 2, len(used)), dtype=np.float32)
            assigned[np.arange(count)[:, None], places, receiver] = weights[giver]
            yield Permutations(part, used, assigned)


@dataclass(frozen=True)
class Permutations:
    """Some permutations of the pairs that count.

    Attributes
    ----------
    which : slice
        Numbers of the permutations.
    keys : ndarray of shape (n_used,), int64
    weights : ndarray of shape (n_chosen, 2, n_used), float32
        Weight of each pair as one that agrees, and as one that differs.
    """

    which: slice
    keys: NDArray[np.int64]
    weights: NDArray[np.float32]


def classes_asked(pairs: QKPairs, column: int) -> list[Any]:
    """Labels that queries look for, in sorted order."""
    labels = pairs.query_labels[:, column]
    return sorted(pd.unique(labels[~pd.isna(labels)]).tolist())


def weigh_pairs(pairs: QKPairs, column: int, weighting: str, asked: Any = None) -> WeightedPairs:
    """Kinds and weights of all pairs for one feature.

    Parameters
    ----------
    pairs : QKPairs
    column : int
        Which feature.
    weighting : {"pair", "query", "released"}
    asked : label or None
        Only queries that look for this class count.

    Returns
    -------
    WeightedPairs
    """
    kinds = pairs.agreement[:, column]
    index = pairs.query_index
    if asked is not None:
        kinds[pairs.query_labels[index, column] != asked] = -1
    strata = index
    if pairs.key_groups is not None:
        codes, groups = pd.factorize(pairs.key_groups[:, column], use_na_sentinel=False)
        strata = pd.factorize(index * len(groups) + codes)[0]
        both = (_counts(strata, kinds == 1) > 0) & (_counts(strata, kinds == 0) > 0)
        kinds[~both[strata]] = -1
    used = kinds >= 0
    n_queries = int(np.count_nonzero(_counts(index, used)))
    if weighting != "query" and (weighting == "released" or pairs.key_groups is None):
        return WeightedPairs(kinds, None, strata, n_queries)
    weights = used.astype(np.float64)
    if weighting == "query":
        for kind in (1, 0):
            counts = _counts(index, kinds == kind)
            weights[kinds == kind] = 1 / counts[index[kinds == kind]]
    if pairs.key_groups is not None:
        differs = kinds == 0
        agreeing = np.bincount(strata, weights * (kinds == 1))
        weights[differs] = (agreeing / np.maximum(1, _counts(strata, differs)))[strata[differs]]
    return WeightedPairs(kinds, weights, strata, n_queries)


def _counts(of: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many chosen rows have each number, with room for every number that may occur."""
    return np.bincount(of[chosen], minlength=int(of.max(initial=-1)) + 1)
