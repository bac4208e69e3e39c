"""Which pairs count for a feature, and how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead.exceptions import NoContrastError
from skhead.qk_pairs import QKPairs, pair_kinds

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

    def count(self, kind: int) -> int:
        """Pairs that agree (1) or differ (0)."""
        return int(np.count_nonzero(self.kinds == kind))

    def permutations(self, n: int, rng: np.random.Generator) -> Iterator[Permutations]:
        """Kinds exchanged as chance would if the feature meant nothing.

        Pairs of one stratum exchange their kinds. Strata with pairs of one kind only, such as
        queries with a single key, exchange theirs as wholes.

        Parameters
        ----------
        n : int
            How many permutations.
        rng : numpy Generator

        Yields
        ------
        Permutations
            Some of them at a time.

        Raises
        ------
        NoContrastError
            If no two pairs of different kinds may be exchanged.
        """
        used = np.flatnonzero(self.kinds >= 0)
        if not used.size:
            return
        strata = np.unique(self.strata[used], return_inverse=True)[1]
        agrees = self.kinds[used] == 1
        counts = np.bincount(strata)
        share = np.bincount(strata, agrees) / counts
        mixed = (share > 0) & (share < 1)
        inside = np.flatnonzero(mixed[strata])
        outside = np.flatnonzero(~mixed[strata])
        of_stratum = share[~mixed]
        if not inside.size and of_stratum.min() == of_stratum.max():
            raise NoContrastError(
                "labels cannot be permuted: all these pairs are of one kind; give pairs of both "
                "kinds at once, or another rank than 'null'"
            )
        weights = np.ones(len(used)) if self.weights is None else self.weights[used]
        giver = inside[np.argsort(strata[inside], kind="stable")]
        whole = np.cumsum(~mixed)[strata[outside]] - 1
        size = max(1, _NUMBERS // len(used))
        for start in range(0, n, size):
            part = slice(start, min(n, start + size))
            rows = np.arange(part.stop - start)[:, None]
            assigned = np.zeros((len(rows), 2, len(used)), dtype=np.float32)
            noise = rng.random((len(rows), len(inside)))
            receiver = inside[np.argsort(strata[inside] + noise, axis=1)]
            assigned[rows, np.where(agrees[giver], 0, 1), receiver] = weights[giver]
            kinds = rng.permuted(np.tile(of_stratum, (len(rows), 1)), axis=1)[:, whole]
            assigned[rows, np.where(kinds > 0, 0, 1), outside] = weights[outside]
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
    found = pd.unique(labels[~pd.isna(labels)]).tolist()
    try:
        return sorted(found)
    except TypeError:
        return sorted(found, key=str)


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
    index, queries = pairs.query_index, pairs.query_labels[:, column]
    rows = np.arange(len(index))
    if asked is not None:
        rows = np.flatnonzero((queries == asked)[index])
    kinds = np.full(len(index), -1, dtype=np.int8)
    kinds[rows] = pair_kinds(queries[index[rows]], pairs.key_labels[rows, column])
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
