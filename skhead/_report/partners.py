"""Whom a head reads from and who reads what it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skhead.containers import Similarity
from skhead.weights import head_labels

__all__ = ["Link", "Links", "find_links", "strongest_partners"]


@dataclass(frozen=True)
class Link:
    """A head on the other side of a pair.

    Attributes
    ----------
    label : str
    score : float
        Projection kernel.
    ratio : float
        Over its mean between random subspaces of the same ranks.
    z, q : float or None
        Deviation from the chosen null law in its standard deviations, and the false discovery rate
        at which the pair is called; None where the law says nothing.
    composition : float or None
        Composition score over its baseline, if computed.
    """

    label: str
    score: float
    ratio: float
    z: float | None
    q: float | None
    composition: float | None


#: By label of the head, side ("in" for heads that it reads from, "out" for its readers) and kind.
Links = Mapping[str, Mapping[str, Mapping[str, tuple[Link, ...]]]]


def find_links(
    kernel: Similarity,
    composition: Similarity | None,
    constant: frozenset[str],
    count: int,
) -> Links:
    """The strongest partners of every head, on both sides, by pair kind.

    Parameters
    ----------
    kernel : Similarity
    composition : Similarity or None
        Of the same heads.
    constant : frozenset of str
        Kinds whose overlaps are fixed by the ranks, so that composition decides, if there is one.
    count : int
        Partners of each kind and side.

    Returns
    -------
    Links
    """
    labels = {"in": head_labels(kernel.columns), "out": head_labels(kernel.rows)}
    others = {"in": labels["out"], "out": labels["in"]}
    found: dict[str, dict[str, dict[str, tuple[Link, ...]]]] = {}
    for p, pair in enumerate(kernel.pairs):
        ordering = kernel.listed(pair).astype(np.float64)
        if pair in constant:
            if composition is None:
                continue
            ordering = np.where(np.isnan(ordering), np.nan, composition.values[:, :, p])
        for side, strength in (("out", ordering), ("in", ordering.T)):
            for i, label in enumerate(labels[side]):
                links = []
                for j in _largest(strength[i], count):
                    place = (i, int(j)) if side == "out" else (int(j), i)
                    links.append(_link(kernel, composition, p, place, others[side][int(j)]))
                found.setdefault(label, {"in": {}, "out": {}})[side][pair] = tuple(links)
    return found


def strongest_partners(composition: Similarity) -> dict[str, dict[str, dict[str, str]]]:
    """By side, pair kind and head, the one head that it composes with most.

    Parameters
    ----------
    composition : Similarity

    Returns
    -------
    dict
    """
    rows, columns = head_labels(composition.rows), head_labels(composition.columns)
    found: dict[str, dict[str, dict[str, str]]] = {"in": {}, "out": {}}
    for p, pair in enumerate(composition.pairs):
        values = np.nan_to_num(composition.values[:, :, p], nan=-np.inf)
        for side, strength, own, others in (
            ("out", values, rows, columns),
            ("in", values.T, columns, rows),
        ):
            best = strength.argmax(axis=1)
            found[side][pair] = {
                label: others[int(j)]
                for label, j, row in zip(own, best, strength, strict=True)
                if np.isfinite(row[j])
            }
    return found


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Places of the largest defined values, the first of equal ones first."""
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:count]
    return order[~np.isnan(values[order])]


def _link(
    kernel: Similarity,
    composition: Similarity | None,
    p: int,
    place: tuple[int, int],
    label: str,
) -> Link:
    at = (*place, p)
    shape = kernel.values.shape
    score = float(kernel.values[at])
    z = q = None
    if kernel.calibration is not None and np.isfinite(kernel.calibration.z[at]):
        z, q = float(kernel.calibration.z[at]), float(kernel.calibration.q[at])
    weighed = None
    if composition is not None:
        chance = np.broadcast_to(composition.null_mean, shape)[at]
        weighed = float(composition.values[at] / chance)
    expected = float(np.broadcast_to(kernel.null_mean, shape)[at])
    return Link(label, score, score / expected, z, q, weighed)
