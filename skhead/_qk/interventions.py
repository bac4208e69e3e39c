"""Exchange of two keys inside a subspace, and what it does to the attention of their query."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from skhead.qk_pairs import QKPairs

__all__ = [
    "ALL",
    "NONE",
    "Choices",
    "Swapped",
    "check_conditions",
    "measure_swap",
    "random_conditions",
    "swap_in_subspace",
]

#: Conditions beside the features: no exchange, and one in all features together.
NONE, ALL = "none", "all"

#: How the key that counts as attended may be chosen.
ORIGINALS = ("attended", "agreeing")


def swap_in_subspace(
    first: NDArray[np.floating], second: NDArray[np.floating], basis: NDArray[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Exchange the coordinates of vectors in a subspace, and leave the rest of them.

    Parameters
    ----------
    first, second : ndarray of shape (n, d_head)
        Row i of one is exchanged with row i of the other.
    basis : ndarray of shape (d_head, rank)
        Orthonormal columns.

    Returns
    -------
    first, second : ndarray of shape (n, d_head)
    """
    moved = (second - first) @ basis @ basis.T
    return first + moved, second - moved


def check_conditions(features: Sequence[str], caller: str) -> None:
    """Refuse features whose name is that of a condition of its own.

    Raises
    ------
    ValueError
    """
    if {NONE, ALL} & set(features):
        raise ValueError(
            f"{caller}: features must not be named {NONE!r} or {ALL!r}, which are conditions of "
            f"their own; got {', '.join(features)}"
        )


def random_conditions(
    bases: Iterable[NDArray[np.floating]], d_head: int, n_random: int, rng: np.random.Generator
) -> dict[str, list[NDArray[np.floating]]]:
    """Uniformly distributed subspaces of each rank that some bases have.

    Parameters
    ----------
    bases : iterable of ndarray of shape (d_head, rank)
    d_head, n_random : int
        Subspaces of each rank; 0 for none.
    rng : numpy Generator

    Returns
    -------
    dict of str to list of ndarray of shape (d_head, rank)
        By name, such as ``"random (rank 3)"``.
    """
    ranks = sorted({basis.shape[1] for basis in bases} - {0}) if n_random else []
    return {
        f"random (rank {rank})": [
            np.linalg.qr(rng.standard_normal((d_head, rank)))[0] for _ in range(n_random)
        ]
        for rank in ranks
    }


@dataclass(frozen=True)
class Choices:
    """Of every query, the key that it attends to and the one that is exchanged with it.

    Attributes
    ----------
    queries : ndarray of shape (n,), int64
        Queries that have both.
    originals, targets : ndarray of shape (n,), int64
        Rows of the keys.
    """

    queries: NDArray[np.int64]
    originals: NDArray[np.int64]
    targets: NDArray[np.int64]

    @classmethod
    def of(
        cls, pairs: QKPairs, original: Any, target: Any, rng: np.random.Generator, caller: str
    ) -> Choices:
        """Take the keys that are named, and choose those that are not.

        Parameters
        ----------
        pairs : QKPairs
        original : "attended", "agreeing", int, or array of shape (n_queries,) of int
            The key with the largest score; the one with the largest among those that agree with
            the query on every feature; or its place among the keys of its query.
        target : int, array of shape (n_queries,) of int, or None
            None draws among those that agree with the query on no feature.
        rng : numpy Generator
        caller : str

        Raises
        ------
        ValueError
            If a named key is none of its query's, original and target are one key, or no query has
            both.
        """
        agreement = pairs.agreement
        if isinstance(original, str):
            if original not in ORIGINALS:
                raise ValueError(
                    f"{caller}: original must be 'attended', 'agreeing' or places of keys; got "
                    f"{original!r}"
                )
            among = (agreement == 1).all(axis=1) if original == "agreeing" else None
            originals = _largest(pairs, among)
        else:
            originals = _named(pairs, original, "original", caller)
        if target is not None:
            targets = _named(pairs, target, "target", caller)
        else:
            eligible = (agreement == 0).all(axis=1)
            eligible[originals[originals >= 0]] = False
            targets = _drawn(pairs, eligible, rng)
        found = np.flatnonzero((originals >= 0) & (targets >= 0))
        if not found.size:
            raise ValueError(
                f"{caller}: no query has both a key to take for the original and another one that "
                "differs from it on every feature; name the keys to exchange by original= and "
                "target="
            )
        if (originals[found] == targets[found]).any():
            at = int(found[originals[found] == targets[found]][0])
            raise ValueError(
                f"{caller}: original and target of query {at} are one key; name two of its keys"
            )
        return cls(found, originals[found], targets[found])


def _largest(pairs: QKPairs, among: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    """Row of the key with the largest score of every query; -1 for a query without one."""
    order = np.lexsort((-pairs.logits(), pairs.query_index))
    if among is not None:
        order = order[among[order]]
    return _first(pairs, order)


def _drawn(
    pairs: QKPairs, eligible: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.int64]:
    """A random eligible key of every query; -1 where there is none."""
    return _first(pairs, rng.permutation(np.flatnonzero(eligible)))


def _first(pairs: QKPairs, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first of some keys that belongs to each query, or -1."""
    queries, first = np.unique(pairs.query_index[rows], return_index=True)
    found = np.full(len(pairs), -1, dtype=np.int64)
    found[queries] = rows[first]
    return found


def _named(pairs: QKPairs, given: Any, name: str, caller: str) -> NDArray[np.int64]:
    """Rows of keys that are named by their place among the keys of their query."""
    places = np.asarray(given)
    if places.dtype.kind not in "iu" or places.shape not in ((), (len(pairs),)):
        raise ValueError(
            f"{caller}: {name} must be an integer, or one for each of the {len(pairs)} queries, "
            "the place of a key among those of its query; got shape "
            f"{places.shape} of {places.dtype}"
        )
    counts = np.bincount(pairs.query_index, minlength=len(pairs))
    places = np.broadcast_to(places, counts.shape)
    wrong = np.flatnonzero((places < 0) | (places >= counts))
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(
            f"{caller}: {name} of query {at} is {places[at]}, and it has {counts[at]} keys, "
            "counted from 0"
        )
    order = np.argsort(pairs.query_index, kind="stable")
    return np.asarray(order[np.cumsum(counts) - counts + places], dtype=np.int64)


@dataclass(frozen=True)
class Swapped:
    """Two keys of every query after an exchange, the original and the target.

    Attributes
    ----------
    attention : ndarray of shape (n, 2)
    largest : ndarray of shape (n, 2), bool
        Whether it has the most attention of all keys.
    share : ndarray of shape (n,)
        Share of the target in the attention on both.
    """

    attention: NDArray[np.float64]
    largest: NDArray[np.bool_]
    share: NDArray[np.float64]


def measure_swap(pairs: QKPairs, choices: Choices, basis: NDArray[np.floating]) -> Swapped:
    """Attention after two keys of every query are exchanged in a subspace.

    Parameters
    ----------
    pairs : QKPairs
    choices : Choices
    basis : ndarray of shape (d_head, rank)
        Orthonormal columns; none of them leaves everything as it is.

    Returns
    -------
    Swapped
    """
    queries = pairs.queries[choices.queries]
    logits = pairs.logits()
    swapped = swap_in_subspace(pairs.keys[choices.originals], pairs.keys[choices.targets], basis)
    places = np.stack([choices.originals, choices.targets], axis=1)
    for i, keys in enumerate(swapped):
        logits[places[:, i]] = pairs.scale * np.einsum("nd,nd->n", queries, keys)
    highest = np.full(len(pairs), -np.inf)
    np.maximum.at(highest, pairs.query_index, logits)
    weights = np.exp(logits - highest[pairs.query_index])
    totals = np.bincount(pairs.query_index, weights, minlength=len(pairs))
    return Swapped(
        weights[places] / totals[choices.queries][:, None],
        logits[places] == highest[choices.queries][:, None],
        expit(logits[places[:, 1]] - logits[places[:, 0]]),
    )
