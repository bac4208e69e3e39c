"""Contrast of one feature: sums over pairs, and the subspaces that come out of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skhead._frozen import Frozen
from skhead._qk.weights import weigh_pairs
from skhead.linalg.contrast import ContrastMoments, PermutedMoments, contrast_spectrum, energy_rank
from skhead.qk_pairs import QKPairs

__all__ = ["Decomposition", "FeatureSums", "Solver"]

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
    moments : ContrastMoments
    permuted : PermutedMoments or None
        The same for permuted labels.
    n_pos, n_neg, n_queries : int
    """

    name: str
    column: int
    asked: Any
    moments: ContrastMoments
    permuted: PermutedMoments | None = None
    n_pos: int = 0
    n_neg: int = 0
    n_queries: int = 0

    @classmethod
    def empty(
        cls,
        name: str,
        column: int,
        asked: Any,
        d_head: int,
        solver: Solver,
        n_permutations: int,
        device: torch.device,
    ) -> FeatureSums:
        """Sums over nothing yet."""
        moments = ContrastMoments(d_head, solver.center, solver.whiten, device)
        permuted = PermutedMoments(n_permutations, d_head, device) if n_permutations else None
        return cls(name, column, asked, moments, permuted)

    def add(self, pairs: QKPairs, weighting: str, rng: np.random.Generator) -> None:
        """Add the pairs that count for this feature."""
        weighted = weigh_pairs(pairs, self.column, weighting, self.asked)
        device = self.moments.device
        data = [torch.as_tensor(a, device=device) for a in (pairs.queries, pairs.keys)]
        index = torch.as_tensor(pairs.query_index, device=device)
        weights = None
        if weighted.weights is not None:
            weights = torch.as_tensor(weighted.weights, device=device)
        kinds = torch.as_tensor(weighted.kinds, device=device)
        self.moments.add(data[0], data[1], index, kinds, weights)
        self.n_pos += int(np.count_nonzero(weighted.kinds == 1))
        self.n_neg += int(np.count_nonzero(weighted.kinds == 0))
        self.n_queries += weighted.n_queries
        if self.permuted is not None:
            for part in weighted.permutations(self.permuted.n_permutations, rng):
                keys = torch.as_tensor(part.keys, device=device)
                assigned = torch.as_tensor(part.weights, device=device)
                self.permuted.add(part.which, data[0][index[keys]], data[1][keys], assigned)

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
    alpha : float
    """

    rank: int | float | str
    center: bool
    whiten: bool
    weighting: str
    alpha: float

    def solve(self, sums: FeatureSums, caller: str) -> Decomposition:
        """Decompose the contrast of a feature.

        Raises
        ------
        ValueError
            If there is no contrast, or fewer directions in it than components asked for.
        """
        totals = None
        if self.weighting == "released":
            totals = torch.full_like(sums.moments.weights, sums.n_queries)
        means = sums.moments.means(totals)
        squares = sums.moments.squares() if self.whiten else (None, None)
        spectrum = contrast_spectrum(means[0] - means[1], *squares)
        values = spectrum.singular_values
        scale = float(torch.linalg.matrix_norm(means).max())
        if not self.whiten and float(values[0]) <= _ROUNDING * scale:
            raise ValueError(
                f"{caller}: feature {sums.name!r} makes no difference: queries and keys that agree "
                "on it have the same second moments as those that differ"
            )
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
        contrasts = sums.permuted.contrasts(self.center, sums.moments.weights, totals)
        found = [float(contrast_spectrum(c, *squares).singular_values[0]) for c in contrasts]
        return np.asarray(found)

    def _rank(self, values: torch.Tensor, threshold: float, name: str, caller: str) -> int:
        if self.rank == "null":
            return int((values > threshold).sum())
        if isinstance(self.rank, float):
            return energy_rank(values, self.rank)
        present = int((values > _ROUNDING * values[0]).sum())
        if int(self.rank) > present:
            raise ValueError(
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
