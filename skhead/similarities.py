"""Siblings of the projection kernel: other ways to compare the matrices of two heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from skhead._compared import Compared, Law, Measured
from skhead._pairwise import LAYER_ORDERS, SubspaceKernel, WeightKernel
from skhead.linalg.alignments import Measure, gram_sizes, nuclear_norms
from skhead.linalg.angles import GRASSMANN_METRICS, AngleDistance, largest_distance
from skhead.linalg.stacks import dense
from skhead.stats.haar import haar_moments
from skhead.stats.orientation import oriented_overlap_moments, root_moments

__all__ = ["GrassmannDistance", "LinearCKA", "ProcrustesSimilarity", "SimpleComposition"]

#: Squared chordal distance below which it is measured from sines: as a difference of ranks and
#: cosines it has lost too many digits.
_CLOSE = 0.05

_UNKNOWN = np.full((1, 1, 1), np.nan)


class ProcrustesSimilarity(WeightKernel):
    """Overlap of two heads' matrices after the best rotation of their head spaces.

    For matrices X and Y of shape (d_model, d_head), in residual coordinates,

        ``||X^T Y||_* / (||X||_F ||Y||_F)``

    with the nuclear norm, the sum of singular values. It is the largest cosine between ``X`` and
    ``Y P`` over all rotations P of the head space, and 1 minus half the squared Procrustes distance
    of the two matrices at norm 1.

    Parameters
    ----------
    pairs : sequence of str, default=("OQ", "OK", "OV")
        Pair kinds: role of the row head, role of the column head, any two of Q, K, V, O. A bare
        stack has one role and one kind, "XX".
    layer_order : {"forward", "all"}, default="forward"
        As for `ProjectionKernel`.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`.
    max_memory : int or str, default="1GiB"
        Scratch allowed beyond the head matrices and the result.
    device : str, torch.device or None, default=None
        Where to compute.
    n_jobs : int or None, default=None
        Workers that share the pairs of a heads table, as for joblib; None means 1 unless joblib's
        context says more. Each reads the weights of its heads itself, and `max_memory` is then all
        that it may hold. Heads that only this process holds are not shared out.

    Attributes
    ----------
    reference_heads_ : DataFrame
        Heads table of the fitted heads, which become the columns.
    pairs_ : tuple of str
        Pair kinds that are computed.
    d_model_ : int
        Dimension of the residual stream.

    See Also
    --------
    ProjectionKernel : Counts directions alike, whatever their gain.
    LinearCKA : Weighs directions by the square of their gain, and is cheaper.

    Notes
    -----
    Range: [0, 1]; 1 if and only if ``Y = c X P`` with a rotation P and ``c > 0``, and 0 for
    orthogonal column spaces. Symmetric: ``XY`` and ``YX`` mirror each other. Invariant under a
    rotation of the residual stream that both heads share, under rotations of each head space, and
    under scale. Not invariant under other changes of basis of the head space: replacing W_Q by
    ``W_Q A`` and W_K by the inverse transpose changes no attention pattern, but this number.
    No closed form is known for heads in random orientation, so that the null moments are NaN and
    undefined pairs stay NaN in the 2-D form.

    References
    ----------
    .. [1] P. H. Schönemann, "A generalized solution of the orthogonal Procrustes problem",
       Psychometrika 31 (1966).
    .. [2] A. H. Williams, E. Kunz, S. Kornblith and S. W. Linderman, "Generalized shape metrics on
       neural representations", NeurIPS (2021).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> skhead.ProcrustesSimilarity(pairs=["OK"]).fit_transform(heads)
    Similarity(16 x 16 heads, pairs OK, unit procrustes)
    """

    def _measure_units(self, compared: Compared) -> Measured:
        wanted = {pair: compared.wanted(pair) for pair in compared.pairs}
        found = self._cross_measures(compared, wanted, lambda _: (nuclear_norms, 0))
        return Measured(compared.spread(found), compared.row_ranks, compared.column_ranks)

    def _law(self, row_facts: NDArray[Any], column_facts: NDArray[Any], dimension: int) -> Law:
        return Law("procrustes", _UNKNOWN, _UNKNOWN)


class LinearCKA(WeightKernel):
    """Cosine between the Gram matrices ``X X^T`` and ``Y Y^T`` of two heads' matrices.

    For matrices X and Y of shape (d_model, d_head), in residual coordinates,

        ``||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)``

    which weighs directions of the residual stream by the square of their gain.

    Parameters
    ----------
    pairs : sequence of str, default=("OQ", "OK", "OV")
        Pair kinds: role of the row head, role of the column head, any two of Q, K, V, O. A bare
        stack has one role and one kind, "XX".
    layer_order : {"forward", "all"}, default="forward"
        As for `ProjectionKernel`.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`. Centring subtracts from every column its mean over the residual
        coordinates, which is the centring of [1]_ with these coordinates as the examples.
    max_memory : int or str, default="1GiB"
        Scratch allowed beyond the head matrices and the result.
    device : str, torch.device or None, default=None
        Where to compute.
    n_jobs : int or None, default=None
        Workers that share the pairs of a heads table, as for joblib; None means 1 unless joblib's
        context says more. Each reads the weights of its heads itself, and `max_memory` is then all
        that it may hold. Heads that only this process holds are not shared out.

    Attributes
    ----------
    reference_heads_ : DataFrame
        Heads table of the fitted heads, which become the columns.
    pairs_ : tuple of str
        Pair kinds that are computed.
    d_model_ : int
        Dimension of the residual stream.

    See Also
    --------
    ProcrustesSimilarity : Weighs directions by their gain.
    ProjectionKernel : The same for orthonormal bases, up to its normalisation.

    Notes
    -----
    Range: [0, 1]; 1 if and only if ``Y = c X P`` with a rotation P, and 0 for orthogonal column
    spaces. Symmetric. Invariant under a rotation of the residual stream that both heads share
    (after centring, only such that keep the vector of ones), under rotations of each head space,
    and under scale; not under other changes of basis of the head space. For heads in random
    orientation the expectation is ``1 / (d_model ||M||_F ||N||_F)`` with M and N the Gram matrices
    at trace 1, that is ``sqrt(p q) / d_model`` for participation ratios p and q of the squared
    singular values; it and the standard deviation are exact, and differ from pair to pair.

    References
    ----------
    .. [1] S. Kornblith, M. Norouzi, H. Lee and G. Hinton, "Similarity of Neural Network
       Representations Revisited", ICML (2019).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> skhead.LinearCKA(pairs=["OK"]).fit_transform(heads)
    Similarity(16 x 16 heads, pairs OK, unit cka)
    """

    def _measure_units(self, compared: Compared) -> Measured:
        rows, columns = _gram_sizes(compared)
        found = self._overlaps(compared.sides, compared.spans())
        values = compared.spread(found, lambda p: rows[:, None, p] * columns[None, :, p])
        return Measured(values, rows, columns)

    def _law(self, row_facts: NDArray[Any], column_facts: NDArray[Any], dimension: int) -> Law:
        sizes = row_facts[:, None], column_facts[None]
        law = oriented_overlap_moments(*sizes, dimension)
        scale = sizes[0] * sizes[1]
        return Law("cka", law.mean / scale, np.sqrt(law.variance) / scale)


class SimpleComposition(WeightKernel):
    """Composition score of single matrices instead of the maps that they are part of.

    For matrices X and Y of shape (d_model, d_head), in residual coordinates,

        ``||X^T Y||_F / (||X||_F ||Y||_F)``

    so that "OK" says how much of W_O of the row head W_K of the column head reads, whatever W_V and
    W_Q do around them.

    Parameters
    ----------
    pairs : sequence of str, default=("OQ", "OK", "OV")
        Pair kinds: role of the row head, role of the column head, any two of Q, K, V, O. A bare
        stack has one role and one kind, "XX".
    layer_order : {"forward", "all"}, default="forward"
        As for `ProjectionKernel`.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`.
    max_memory : int or str, default="1GiB"
        Scratch allowed beyond the head matrices and the result.
    device : str, torch.device or None, default=None
        Where to compute.
    n_jobs : int or None, default=None
        Workers that share the pairs of a heads table, as for joblib; None means 1 unless joblib's
        context says more. Each reads the weights of its heads itself, and `max_memory` is then all
        that it may hold. Heads that only this process holds are not shared out.

    Attributes
    ----------
    reference_heads_ : DataFrame
        Heads table of the fitted heads, which become the columns.
    pairs_ : tuple of str
        Pair kinds that are computed.
    d_model_ : int
        Dimension of the residual stream.

    See Also
    --------
    CompositionScore : The same for the QK and OV maps.
    LinearCKA : Its square, divided by what the norms of the Gram matrices allow.

    Notes
    -----
    Range: [0, 1]; 1 if and only if both matrices have rank one and one direction, and for a matrix
    with itself ``1/sqrt(p)`` with p the participation ratio of its squared singular values: it
    prefers heads of few directions. Symmetric. Invariant under a rotation of the residual stream
    that both heads share, under rotations of each head space, and under scale; not under other
    changes of basis of the head space. For heads in random orientation the mean square is exactly
    ``1/d_model`` and the variance of the square is known; the mean and standard deviation given
    follow from these as if the square had a Beta law.

    References
    ----------
    .. [1] H. Yamagiwa, Y. Takase and H. Shimodaira, arXiv:2601.10266 (2026), where it is a
       baseline.
    .. [2] N. Elhage et al., "A Mathematical Framework for Transformer Circuits", Transformer
       Circuits Thread (2021).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> skhead.SimpleComposition(pairs=["OK"]).fit_transform(heads)
    Similarity(16 x 16 heads, pairs OK, unit simple-composition)
    """

    def _measure_units(self, compared: Compared) -> Measured:
        overlaps = self._overlaps(compared.sides, compared.spans())
        found = {pair: np.sqrt(np.maximum(values, 0.0)) for pair, values in overlaps.items()}
        return Measured(compared.spread(found), *_gram_sizes(compared))

    def _law(self, row_facts: NDArray[Any], column_facts: NDArray[Any], dimension: int) -> Law:
        sizes = row_facts[:, None], column_facts[None]
        squared = oriented_overlap_moments(*sizes, dimension)
        law = root_moments(*squared, upper=1.0)
        return Law("simple-composition", law.mean, np.sqrt(law.variance))


class GrassmannDistance(SubspaceKernel):
    """Distance between head subspaces on the Grassmannian, from their principal angles.

    With principal angles ``t_1 <= ... <= t_k``, ``k = min(r, s)``, of subspaces of ranks r and s:

    ============== ======================================= ==========================
    metric         distance                                largest
    ============== ======================================= ==========================
    chordal        ``sqrt(sum sin^2 t_i)``                 ``sqrt(k)``
    geodesic       ``sqrt(sum t_i^2)``                     ``pi/2 sqrt(k)``
    procrustes     ``2 sqrt(sum sin^2(t_i / 2))``          ``sqrt(2 k)``
    binet-cauchy   ``sqrt(1 - prod cos^2 t_i)``            ``1``
    martin         ``sqrt(-sum log cos^2 t_i)``            infinite
    max-angle      ``t_k``                                 ``pi/2``
    ============== ======================================= ==========================

    Parameters
    ----------
    pairs : sequence of str, default=("OQ", "OK", "OV")
        Pair kinds: role of the row head, role of the column head, any two of Q, K, V, O. A bare
        stack has one role and one kind, "XX".
    layer_order : {"forward", "all"}, default="forward"
        As for `ProjectionKernel`.
    metric : str, default="chordal"
        One of "chordal", "geodesic", "procrustes", "binet-cauchy", "martin" and "max-angle".
    output : {"distance", "similarity"}, default="distance"
        "similarity" gives ``1 - distance / largest``, which is 1 for equal subspaces and 0 for
        orthogonal ones; not for "martin".
    max_memory : int or str, default="1GiB"
        Scratch allowed beyond the input and the result.
    device : str, torch.device or None, default=None
        Where to compute; None means where the subspaces are.
    n_jobs : int or None, default=None
        Workers that share the pairs of a heads table, as for joblib; None means 1 unless joblib's
        context says more. Each reads the weights of its heads itself, and `max_memory` is then all
        that it may hold. Heads that only this process holds are not shared out.

    Attributes
    ----------
    reference_ : Subspaces
        The fitted heads, which become the columns; extracted anew whenever it is asked for if
        workers were to read them.
    reference_heads_ : DataFrame
        Their heads table.
    pairs_ : tuple of str
        Pair kinds that are computed.
    d_model_ : int
        Dimension of the residual stream.

    See Also
    --------
    ProjectionKernel : ``k`` minus the squared chordal distance.

    Notes
    -----
    Subspaces of unequal ranks are compared by their ``min(r, s)`` principal angles: the distance is
    that of the smaller subspace to the nearest one of its dimension inside the larger, and 0 if the
    larger contains it. It is a metric among subspaces of one rank only [1]_.

    Symmetric. Invariant under a rotation of the residual stream that both heads share and under
    every change of basis of a head space, its scale included. For random subspaces the mean and
    standard deviation of the chordal distance follow from the moments of the projection kernel as
    if it had a Beta law; for the other metrics they are not given (NaN), and undefined pairs stay
    NaN in the 2-D form.

    "binet-cauchy" is made for few dimensions: between heads of rank 64 the product of cosines is
    so small that all distances equal 1 to float32 rounding. "martin" puts the same product in the
    same order without saturating.

    References
    ----------
    .. [1] K. Ye and L.-H. Lim, "Schubert varieties and distances between subspaces of different
       dimensions", SIAM Journal on Matrix Analysis and Applications 37 (2016).
    .. [2] J. Hamm and D. D. Lee, "Grassmann discriminant analysis", ICML (2008).
    .. [3] Å. Björck and G. H. Golub, "Numerical methods for computing angles between linear
       subspaces", Mathematics of Computation 27 (1973).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> skhead.GrassmannDistance(pairs=["OK"], metric="geodesic").fit_transform(heads)
    Similarity(16 x 16 heads, pairs OK, unit distance/geodesic)
    """

    _options: ClassVar = {
        "layer_order": LAYER_ORDERS,
        "metric": GRASSMANN_METRICS,
        "output": ("distance", "similarity"),
    }

    def __init__(
        self,
        pairs: Sequence[str] = ("OQ", "OK", "OV"),
        layer_order: str = "forward",
        metric: str = "chordal",
        output: str = "distance",
        max_memory: int | str = "1GiB",
        device: str | torch.device | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.pairs = pairs
        self.layer_order = layer_order
        self.metric = metric
        self.output = output
        self.max_memory = max_memory
        self.device = device
        self.n_jobs = n_jobs

    def _check_parameters(self) -> tuple[str, ...]:
        pairs = super()._check_parameters()
        if self.output == "similarity" and self.metric == "martin":
            raise ValueError(
                f"{type(self).__name__}: output='similarity' needs a largest distance, and "
                "metric='martin' has none; use output='distance' or another metric"
            )
        return pairs

    def _measure(self, compared: Compared) -> Measured:
        values = compared.spread(self._distances(compared))
        ranks = compared.row_ranks, compared.column_ranks
        if self.output == "similarity":
            values = (1 - values / self._largest(*ranks)).astype(np.float32)
        return Measured(values, *ranks)

    def _law(self, row_facts: NDArray[Any], column_facts: NDArray[Any], dimension: int) -> Law:
        mean, sd = _UNKNOWN, _UNKNOWN
        if self.metric == "chordal":
            mean, sd = _chordal_summary(row_facts[:, None], column_facts[None], dimension)
        if self.output == "similarity":
            largest = self._largest(row_facts, column_facts)
            mean, sd = 1 - mean / largest, sd / largest
        return Law(f"{self.output}/{self.metric}", mean, sd)

    def _largest(self, r: NDArray[np.int64], s: NDArray[np.int64]) -> NDArray[np.float64]:
        """The largest distance that each pair can have."""
        smaller = torch.from_numpy(np.minimum(r[:, None], s[None]))
        return np.asarray(largest_distance(smaller, self.metric).numpy())

    def _distances(self, compared: Compared) -> dict[str, NDArray[np.floating]]:
        """Distances between the distinct subspaces; chordal ones from the projection kernel."""
        wanted = {pair: compared.wanted(pair) for pair in compared.pairs}
        found: dict[str, NDArray[np.floating]] = {}
        if self.metric == "chordal":
            for pair, kernel in self._overlaps(compared.sides, compared.spans()).items():
                ranks = self._distinct_ranks(compared, pair)
                squared = np.minimum(ranks[0][:, None], ranks[1][None]) - kernel.astype(np.float64)
                found[pair] = np.sqrt(np.maximum(squared, 0.0))
                wanted[pair] &= squared < _CLOSE
        measured = self._cross_measures(compared, wanted, lambda pair: self._angles(compared, pair))
        for pair, values in measured.items():
            close = ~np.isnan(values)
            found[pair] = np.where(close, values, found[pair]) if pair in found else values
        return found

    def _angles(self, compared: Compared, pair: str) -> tuple[Measure, int]:
        ranks = (torch.from_numpy(x) for x in self._distinct_ranks(compared, pair))
        measure = AngleDistance(self.metric, *map(dense, compared.sides.stacks(pair)), *ranks)
        return measure, measure.scratch_bytes

    def _distinct_ranks(
        self, compared: Compared, pair: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ranks of the distinct subspaces of a pair kind; those that no head uses count as 1."""
        p = compared.pairs.index(pair)
        out = []
        for stack, index, ranks in zip(
            compared.sides.stacks(pair),
            compared.index(pair),
            (compared.row_ranks, compared.column_ranks),
            strict=True,
        ):
            distinct = np.ones(len(stack), dtype=np.int64)
            distinct[index] = ranks[:, p]
            out.append(distinct)
        return out[0], out[1]


def _gram_sizes(compared: Compared) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``||X^T X||_F`` of every row and column head and pair kind."""
    known: dict[int, NDArray[np.float64]] = {}
    sizes: tuple[list[NDArray[np.float64]], ...] = ([], [])
    for pair in compared.pairs:
        stacks = compared.sides.stacks(pair)
        for side, stack, index in zip(sizes, stacks, compared.index(pair), strict=True):
            if id(stack) not in known:
                known[id(stack)] = gram_sizes(dense(stack)).cpu().numpy()
            side.append(known[id(stack)][index])
    rows, columns = (np.stack(side, axis=1) for side in sizes)
    return rows, columns


def _chordal_summary(
    r: NDArray[Any], s: NDArray[Any], dimension: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and sd of the chordal distance of random subspaces, its square as if of a Beta law."""
    if (r == r[:1]).all() and (s == s[:, :1]).all():
        r, s = r[:1], s[:, :1]
    kernel = haar_moments(r, s, dimension)
    smaller = np.minimum(r, s)
    most = smaller - np.maximum(r + s - dimension, 0)
    law = root_moments(smaller - kernel.mean, kernel.variance, most)
    return law.mean, np.sqrt(law.variance)
