"""Similarities between heads: the projection kernel and composition scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from skhead._base import HeadInput, defined_pairs, goes_forward, rank_scale
from skhead._compared import Compared, Law, Measured, Sides, forward_spans
from skhead._inputs import refuse_zero_maps
from skhead._pairwise import LAYER_ORDERS, MatrixKernel, SubspaceKernel
from skhead._progress import reports_fit
from skhead._tags import HeadTags
from skhead._tiling import Factors
from skhead.exceptions import HeadShapeError
from skhead.linalg.factored import facing_factors, map_factors
from skhead.linalg.precision import MATMUL_PRECISIONS
from skhead.linalg.stacks import expand
from skhead.stats.haar import haar_moments

__all__ = ["CompositionScore", "ProjectionKernel"]


class ProjectionKernel(SubspaceKernel):
    """Overlap of head subspaces, the sum of squared cosines of their principal angles.

    For orthonormal bases U and V of ranks r and s in d_model dimensions, ``PK = ||U^T V||_F^2``
    lies between ``max(0, r + s - d_model)`` and ``min(r, s)``; random subspaces have ``r s /
    d_model`` on average. All pairs are computed exactly, in tiles that keep to a memory budget.

    Parameters
    ----------
    pairs : sequence of str, default=("OQ", "OK", "OV")
        Pair kinds: role of the row head, role of the column head, any two of Q, K, V, O. A bare
        stack has one role and one kind, "XX".
    layer_order : {"forward", "all"}, default="forward"
        "forward" leaves NaN unless the row head's layer lies strictly below the column head's;
        "all" compares every pair, a head with itself only between different roles. Heads of a bare
        stack have no layers and are all compared.
    normalize : {None, "rank", "cosine"}, default=None
        Divide by ``min(r, s)`` or by ``sqrt(r s)``, the cosine between the two projectors.
    max_memory : int or str, default="1GiB"
        Scratch allowed beyond the input and the result.
    matmul_precision : {"highest", "high", "medium"}, default="highest"
        Of float32 products, named as in ``torch.set_float32_matmul_precision``. "high" is TF32 on
        CUDA and float32 elsewhere. "medium" rounds to bfloat16 what full-rank heads are compared
        by: the error stays below .05 of the spread of random subspaces plus 2^-7 of the distance
        from their mean. It pays only where the processor multiplies bfloat16.
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
    SubspaceExtractor : Makes the subspaces, with options.
    CompositionScore : Weighs directions by their gain instead of counting them alike.

    References
    ----------
    .. [1] H. Yamagiwa, Y. Takase and H. Shimodaira, arXiv:2601.10266 (2026).
    .. [2] J. Hamm and D. D. Lee, "Grassmann discriminant analysis", ICML (2008).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> kernel = skhead.ProjectionKernel(pairs=("OK", "VO"), layer_order="all")
    >>> kernel.fit_transform(heads).values.shape
    (16, 16, 2)
    """

    _options: ClassVar = {
        "layer_order": LAYER_ORDERS,
        "matmul_precision": MATMUL_PRECISIONS,
        "normalize": (None, "rank", "cosine"),
    }

    def __init__(
        self,
        pairs: Sequence[str] = ("OQ", "OK", "OV"),
        layer_order: str = "forward",
        normalize: str | None = None,
        max_memory: int | str = "1GiB",
        matmul_precision: str = "highest",
        device: str | torch.device | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.pairs = pairs
        self.layer_order = layer_order
        self.normalize = normalize
        self.max_memory = max_memory
        self.matmul_precision = matmul_precision
        self.device = device
        self.n_jobs = n_jobs

    def _measure(self, compared: Compared) -> Measured:
        ranks = compared.row_ranks, compared.column_ranks

        def scale(p: int) -> Any:
            return rank_scale(ranks[0][:, None, p], ranks[1][None, :, p], self.normalize)

        found = self._overlaps(compared.sides, compared.spans())
        return Measured(compared.spread(found, scale), *ranks)

    def _law(self, row_facts: NDArray[Any], column_facts: NDArray[Any], dimension: int) -> Law:
        unit = "pk" if self.normalize is None else f"pk/{self.normalize}"
        return Law(unit, *_haar_summary(row_facts, column_facts, dimension, self.normalize))


class CompositionScore(MatrixKernel):
    """How much of what one head writes passes through what another reads, gains included.

    With the OV map ``W_V W_O`` of the row head and, for the column head, its QK map ``W_Q W_K^T``
    (OQ), that map transposed (OK) or its OV map (OV),

        ``||W_OV A||_F / (||W_OV||_F ||A||_F)``

    lies in [0, 1]; independent isotropic maps have ``1/sqrt(d_model)`` whatever their ranks.

    Parameters
    ----------
    pairs : sequence of {"OQ", "OK", "OV"}, default=("OQ", "OK", "OV")
        Q-, K- and V-composition.
    layer_order : {"forward", "all"}, default="forward"
        "forward" leaves NaN unless both heads are of one model and the row head's layer lies
        strictly below the column head's. Heads of a stack have no layers and are all compared.
    baseline : {None, "difference", "ratio"}, default=None
        Subtract ``1/sqrt(d_model)`` from the score, or divide the score by it.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`. Folding changes the ranking of pairs entirely.
    max_memory : int or str, default="1GiB"
        Scratch allowed beyond the head factors and the result.
    matmul_precision : {"highest", "high", "medium"}, default="highest"
        Of float32 products, named as in ``torch.set_float32_matmul_precision``. "high" is TF32 on
        CUDA and float32 elsewhere. "medium" rounds to bfloat16 as for `ProjectionKernel`; scores of
        GPT-2 small move by less than .001, and by 2% of themselves at most.
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
    ProjectionKernel : Counts shared directions alike, whatever their gain.

    Notes
    -----
    ``||W_OV A||_F^2`` is the inner product of two positive semidefinite matrices, which are
    compared through factors of shape ``(d_model, d_head)``; no map of model width is formed. The
    score needs all four matrices, so a stack must have shape (n_heads, 4, d_model, d_head).

    References
    ----------
    .. [1] N. Elhage et al., "A Mathematical Framework for Transformer Circuits", Transformer
       Circuits Thread (2021).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> score = skhead.CompositionScore(pairs=["OK"], baseline="ratio").fit_transform(heads)
    >>> score.top_pairs(1)[["pair", "rank"]].values.tolist()
    [['OK', 1]]
    """

    head_tags = HeadTags(
        ("table", "roles"), invariant_to=("rotation", "head_rotation", "gauge", "scale")
    )
    _options: ClassVar = {
        "layer_order": LAYER_ORDERS,
        "matmul_precision": MATMUL_PRECISIONS,
        "baseline": (None, "difference", "ratio"),
    }
    _allowed_pairs = ("OQ", "OK", "OV")

    def __init__(
        self,
        pairs: Sequence[str] = ("OQ", "OK", "OV"),
        layer_order: str = "forward",
        baseline: str | None = None,
        fold_norm: bool = False,
        center: bool = False,
        max_memory: int | str = "1GiB",
        matmul_precision: str = "highest",
        device: str | torch.device | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.pairs = pairs
        self.layer_order = layer_order
        self.baseline = baseline
        self.fold_norm = fold_norm
        self.center = center
        self.max_memory = max_memory
        self.matmul_precision = matmul_precision
        self.device = device
        self.n_jobs = n_jobs

    @reports_fit
    def fit(self, X: Any, y: Any = None) -> CompositionScore:
        """Remember the reference heads.

        Parameters
        ----------
        X : DataFrame, or array or Tensor of shape (n_heads, 4, d_model, d_head)
            Heads table, or W_Q, W_K, W_V and W_O transposed.
        y : ignored

        Returns
        -------
        self
        """
        super().fit(X)
        return self

    def _open(self, X: Any) -> HeadInput:
        source = super()._open(X)
        if source.anonymous:
            raise HeadShapeError(
                f"{type(self).__name__}: a composition score needs all four matrices of a head; "
                "pass a heads table or a stack of shape (n_heads, 4, d_model, d_head)"
            )
        return source

    def _measure(self, rows: HeadInput, columns: HeadInput | None) -> Measured:
        reference = rows if columns is None else columns
        reading = [pair[1] for pair in self.pairs_]
        read = self._factors(reference, [*reading, "O"] if columns is None else reading)
        own = read if columns is None else self._factors(rows, ["O"])
        writer, writer_norms = own["O"]
        readers = [read[role] for role in reading]
        dtype = torch.promote_types(writer.dtype, readers[0][0].dtype)
        stacks = [reader.to(dtype) for reader, _ in readers]
        blocks = {pair: (0, p) for p, pair in enumerate(self.pairs_)}
        spans = {}
        if goes_forward(rows.heads, reference.heads, self.layer_order):
            spans = dict.fromkeys(blocks.values(), forward_spans(rows.heads, reference.heads))
        found = self._overlaps(Sides([writer.to(dtype)], stacks, blocks), spans)
        values = np.empty((len(rows.heads), len(reference.heads), len(readers)), dtype=np.float32)
        defined = defined_pairs(rows.heads, reference.heads, False, self.layer_order)
        for p, pair in enumerate(self.pairs_):
            score = np.sqrt(np.maximum(found[pair], 0.0)) / np.outer(writer_norms, readers[p][1])
            values[:, :, p] = np.where(defined, self._above_baseline(score), np.nan)
        none = (np.zeros((len(side.heads), len(readers))) for side in (rows, reference))
        return Measured(values, *none)

    def _law(self, row_facts: NDArray[Any], column_facts: NDArray[Any], dimension: int) -> Law:
        chance = np.full((1, 1, len(self.pairs_)), self.d_model_**-0.5)
        unit = "composition" if self.baseline is None else f"composition/{self.baseline}"
        return Law(unit, self._above_baseline(chance), np.full((1, 1, 1), np.nan))

    def _factors_of(self, pairs: Sequence[str]) -> Factors:
        blocks = tuple((0, p) for p in range(len(pairs)))
        return Factors(("O",), ("Q",) * len(pairs), blocks, copies=2)

    def _above_baseline(self, score: NDArray[np.float64]) -> NDArray[np.float64]:
        chance = self.d_model_**-0.5
        if self.baseline is None:
            return score
        return score - chance if self.baseline == "difference" else score / chance

    def _factors(
        self, source: HeadInput, roles: Sequence[str]
    ) -> dict[str, tuple[torch.Tensor, NDArray[np.float64]]]:
        """Factors of the maps that face other heads with a role, and their norms, none zero."""
        found = {}
        opened: dict[str, Any] = {}
        for name in ("QK", "OV"):
            facing = [role for role in name if role in roles]
            if not facing:
                continue
            ends = name if facing[0] == name[0] else name[::-1]
            first, second = (self._matrices(source, end, opened) for end in ends)
            if len(facing) == 2:
                factored = facing_factors(first, second, overwrite=source.stacks is None)
            else:
                factored = [map_factors(first, second)]
            for role, (factors, norms) in zip(facing, factored, strict=True):
                refuse_zero_maps(norms, source.heads, name, type(self).__name__)
                found[role] = factors, norms.cpu().numpy().astype(np.float64)
        return found

    def _matrices(self, source: HeadInput, role: str, opened: dict[str, Any]) -> torch.Tensor:
        """A matrix of that role for every head."""
        read = source.read(
            role,
            fold_norm=self.fold_norm,
            center=self.center,
            device=self.device,
            opened=opened,
        )
        return expand(read.tensor, read.index)


def _haar_summary(
    row_ranks: NDArray[np.int64],
    column_ranks: NDArray[np.int64],
    dimension: int,
    normalize: str | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and sd between random subspaces, of shape (1, 1, n_pairs) where ranks are all equal."""
    if (row_ranks == row_ranks[:1]).all() and (column_ranks == column_ranks[:1]).all():
        row_ranks, column_ranks = row_ranks[:1], column_ranks[:1]
    r, s = row_ranks[:, None, :], column_ranks[None, :, :]
    moments = haar_moments(r, s, dimension)
    scale = rank_scale(r, s, normalize)
    return moments.mean / scale, np.sqrt(moments.variance) / scale
