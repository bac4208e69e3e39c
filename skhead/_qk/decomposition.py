"""Contrast of one feature: sums over pairs, and the subspaces that come out of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skhead._frozen import Frozen
from skhead._progress import progress_fraction
from skhead._qk.weights import WeightedPairs, weigh_pairs
from skhead.exceptions import NoContrastError
from skhead.linalg.contrast import ContrastMoments, PermutedMoments, contrast_spectrum, energy_rank
from skhead.linalg.devices import put
from skhead.qk_pairs import QKPairs

__all__ = ["Decomposition", "FeaturePart", "FeatureSums", "Solver"]

#: Relative size below which a singular value is rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Decomposition(Frozen):
    """What one feature is in the query and key space of a head.

    Attributes
    ----------
    query_components, key_components : ndarray of shape (rank, d_head), float64
        Orthonormal rows.
    singular_values : ndarray of shape (d_head,), float64
        Of the contrast, whitened if that was asked for.
    explained_energy : float
        Share of their squares in the components.
    C_pos, C_neg : ndarray of shape (d_head, d_head), float64
        Mean outer products of query and key, of pairs that agree and that differ.
    n_pos, n_neg, n_queries : int
    null_singular_values : ndarray of shape (n_permutations,), float64, or None
        Largest singular values when labels are permuted.
    null_threshold : float
        What a singular value must exceed to be kept; NaN where no null was drawn.
    """

    query_components: NDArray[np.float64]
    key_components: NDArray[np.float64]
    singular_values: NDArray[np.float64]
    explained_energy: float
    C_pos: NDArray[np.float64]
    C_neg: NDArray[np.float64]
    n_pos: int
    n_neg: int
    n_queries: int
    null_singular_values: NDArray[np.float64] | None
    null_threshold: float

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.query_components)

    @property
    def cross_gram(self) -> NDArray[np.float64]:
        """Inner products of key with query components, ``(rank, rank)``."""
        found: NDArray[np.float64] = self.key_components @ self.query_components.T
        return found

    @property
    def condition(self) -> float:
        """Condition number of `cross_gram`; infinite where a projector along it is not defined."""
        if not self.rank:
            return 1.0
        values = np.linalg.svd(self.cross_gram, compute_uv=False)
        return float(values[0] / values[-1]) if values[-1] > 0 else np.inf

    @property
    def least_cosine(self) -> float:
        """Cosine of the largest angle between query and key components; 1 without any."""
        if not self.rank:
            return 1.0
        return float(np.linalg.svd(self.cross_gram, compute_uv=False)[-1])

    @property
    def spectral_gap(self) -> float:
        """Last singular value that is kept over the first that is not; NaN if one is missing."""
        if not 0 < self.rank < len(self.singular_values):
            return np.nan
        first = self.singular_values[self.rank]
        return float(self.singular_values[self.rank - 1] / first) if first > 0 else np.inf


@dataclass
class FeatureSums:
    """Sums of one feature over all pairs that were seen.

    Attributes
    ----------
    name : str
    column : int
        Of the labels.
    asked : label or None
        The class of queries that it is about.
    solver : Solver
    moments : ContrastMoments
    permuted : PermutedMoments or None
        The same for permuted labels.
    n_pos, n_neg, n_queries : int
    """

    name: str
    column: int
    asked: Any
    solver: Solver
    moments: ContrastMoments
    permuted: PermutedMoments | None = None
    n_pos: int = 0
    n_neg: int = 0
    n_queries: int = 0

    @classmethod
    def empty(
        cls, name: str, column: int, asked: Any, d_head: int, solver: Solver, device: torch.device
    ) -> FeatureSums:
        """Sums over nothing yet."""
        permuted = None
        if solver.rank == "null":
            permuted = PermutedMoments(solver.n_permutations, d_head, device)
        moments = ContrastMoments(d_head, solver.center, solver.whiten, device)
        return cls(name, column, asked, solver, moments, permuted)

    def weigh(self, pairs: QKPairs) -> WeightedPairs:
        """Which of some pairs count, and how much."""
        return weigh_pairs(pairs, self.column, self.solver.weighting, self.asked)

    def part(
        self, pairs: QKPairs, weighted: WeightedPairs, rng: np.random.Generator
    ) -> FeaturePart:
        """Sums over some pairs, which are not yet added.

        Raises
        ------
        NoContrastError
            If labels are to be permuted, and no two of these pairs may exchange theirs.
        """
        own = self.moments
        part = FeaturePart(
            weighted, ContrastMoments(own.d_head, own.center, own.whiten, own.device)
        )
        queries, keys, index, kinds = (
            put(values, own.device)
            for values in (pairs.queries, pairs.keys, pairs.query_index, weighted.kinds)
        )
        weights = None
        if weighted.weights is not None:
            weights = put(weighted.weights, own.device)
        part.moments.add(queries, keys, index, kinds, weights)
        if self.permuted is not None:
            n = self.permuted.n_permutations
            part.permuted = PermutedMoments(n, own.d_head, own.device)
            with progress_fraction(f"permutations of {self.name}") as progress:
                for some in weighted.permutations(n, rng):
                    rows = put(some.keys, own.device)
                    assigned = put(some.weights, own.device)
                    part.permuted.add(some.which, queries[index[rows]], keys[rows], assigned)
                    progress(some.which.stop / n)
        return part

    def add(self, part: FeaturePart) -> None:
        """Add the sums over some pairs."""
        self.moments.merge(part.moments)
        if self.permuted is not None and part.permuted is not None:
            self.permuted.merge(part.permuted)
        self.n_pos += part.pairs.count(1)
        self.n_neg += part.pairs.count(0)
        self.n_queries += part.pairs.n_queries

    @property
    def complete(self) -> bool:
        """Whether there are pairs of both kinds."""
        return self.n_pos > 0 and self.n_neg > 0


@dataclass
class FeaturePart:
    """Sums of one feature over some pairs."""

    pairs: WeightedPairs
    moments: ContrastMoments
    permuted: PermutedMoments | None = None

    @property
    def finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return bool(torch.isfinite(self.moments.cross).all())


@dataclass(frozen=True)
class Solver:
    """How sums become components.

    Attributes
    ----------
    rank : int, float or "null"
    center : bool
    whiten : bool
    weighting : {"pair", "query", "released"}
    per_class : bool
    n_permutations : int
    alpha : float
    """

    rank: int | float | str
    center: bool
    whiten: bool
    weighting: str
    per_class: bool
    n_permutations: int
    alpha: float

    @property
    def summed(self) -> dict[str, Any]:
        """The parameters that decide what is summed, which must not change in a stream."""
        null = self.rank == "null"
        return {
            "center": self.center,
            "whiten": "qk" if self.whiten else None,
            "pair_weighting": self.weighting,
            "per_class": self.per_class,
            "rank": "null" if null else "not 'null'",
            "n_permutations": self.n_permutations if null else None,
        }

    def solve(self, sums: FeatureSums, caller: str) -> Decomposition:
        """Decompose the contrast of a feature.

        Raises
        ------
        NoContrastError
            If there is no contrast, or fewer directions in it than components asked for.
        """
        totals = None
        if self.weighting == "released":
            totals = torch.full_like(sums.moments.weights, sums.n_queries)
        means = sums.moments.means(totals)
        contrast = means[0] - means[1]
        if not float(contrast.abs().max()) > _ROUNDING * float(means.abs().max()):
            raise NoContrastError(
                f"{caller}: feature {sums.name!r} makes no difference: queries and keys that agree "
                "on it have the same second moments as those that differ"
            )
        squares = sums.moments.squares() if self.whiten else (None, None)
        spectrum = contrast_spectrum(contrast, *squares)
        values = spectrum.singular_values
        null = self._null(sums, totals, squares)
        threshold = np.nan if null is None else _upper_quantile(null, self.alpha)
        rank = self._rank(values, threshold, sums.name, caller)
        query_basis, key_basis = spectrum.bases(rank)
        energies = values.square()
        return Decomposition(
            query_components=_array(query_basis.mT),
            key_components=_array(key_basis.mT),
            singular_values=_array(values),
            explained_energy=float(energies[:rank].sum() / energies.sum()),
            C_pos=_array(means[0]),
            C_neg=_array(means[1]),
            n_pos=sums.n_pos,
            n_neg=sums.n_neg,
            n_queries=sums.n_queries,
            null_singular_values=null,
            null_threshold=threshold,
        )

    def _null(
        self, sums: FeatureSums, totals: torch.Tensor | None, squares: Any
    ) -> NDArray[np.float64] | None:
        """Largest singular values of the contrasts of permuted labels."""
        if self.rank != "null" or sums.permuted is None:
            return None
        contrasts = sums.permuted.contrasts(self.center, totals)
        found = [float(contrast_spectrum(c, *squares).singular_values[0]) for c in contrasts]
        return np.asarray(found)

    def _rank(self, values: torch.Tensor, threshold: float, name: str, caller: str) -> int:
        if self.rank == "null":
            return int((values > threshold).sum())
        if isinstance(self.rank, float):
            return energy_rank(values, self.rank)
        present = int((values > _ROUNDING * values[0]).sum())
        if int(self.rank) > present:
            raise NoContrastError(
                f"{caller}: rank={self.rank} components of feature {name!r} are asked for, and its "
                f"contrast has {present} directions; lower the rank"
            )
        return int(self.rank)


def _upper_quantile(values: NDArray[np.float64], alpha: float) -> float:
    """What a draw of the same law exceeds with a probability of at most alpha."""
    place = int(np.ceil((1 - alpha) * (len(values) + 1) - 1e-9)) - 1
    return float(np.sort(values)[place])


def _array(values: torch.Tensor) -> NDArray[np.float64]:
    return np.ascontiguousarray(values.cpu().numpy(), dtype=np.float64)
