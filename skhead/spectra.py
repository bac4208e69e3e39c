"""Comparison of heads by singular values alone, which needs no common basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from skhead._base import ANONYMOUS, HeadInput, defined_pairs
from skhead._compared import check_same_kind, open_weights, refuse_zero
from skhead._pairwise import ROLE_PAIRS, PairwiseKernel, head_widths
from skhead._progress import reports_fit
from skhead._tags import HeadTags
from skhead.containers import Similarity
from skhead.linalg.alignments import map_singular_values, singular_values, unit_stack
from skhead.linalg.stacks import expand

__all__ = ["SpectrumSimilarity"]

#: Sides of the maps that a head computes with.
_MAPS = {"QK": "QK", "OV": "VO"}
#: Norm of a map, relative to those of its sides, that float64 cannot tell from zero.
_ZERO_MAP = 1e-13

#: By part, such as "Q" or "OV": spectra of shape (n_heads, n_values), at norm 1.
Spectra = Mapping[str, NDArray[np.float64]]


class SpectrumSimilarity(PairwiseKernel):
    """Cosine between the sorted singular values of two heads' maps or matrices.

    With singular values ``a_1 >= a_2 >= ...`` and ``b_1 >= b_2 >= ...``,

        ``sum a_i b_i / sqrt(sum a_i^2 sum b_i^2)``

    which by von Neumann's trace inequality is the largest cosine that the two matrices can reach
    when both their sides are rotated freely: what `ProcrustesSimilarity` would be if the residual
    streams were aligned as well as they can be for this pair. As it needs no common basis, it keeps
    its meaning between heads of different models, whose widths may differ.

    Parameters
    ----------
    pairs : sequence of str, default=("QKQK", "OVOV")
        Pair kinds: part of the row head, part of the column head; either two of the maps QK
        (``W_Q W_K^T``) and OV (``W_V W_O``), such as "OVOV", or two of the matrices Q, K, V, O,
        such as "OO". A bare stack has one role and one kind, "XX".
    layer_order : {"forward", "all"}, default="all"
        As for `ProjectionKernel`, except that "all" is the default: how alike two heads are does
        not ask which comes first.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`.
    device : str, torch.device or None, default=None
        Where to compute.

    Attributes
    ----------
    reference_spectra_ : dict of str to ndarray of shape (n_reference_heads, n_values)
        By part, singular values of the fitted heads, the largest first, at norm 1.
    reference_heads_ : DataFrame
        Heads table of the fitted heads, which become the columns; of models of any width.
    pairs_ : tuple of str
        Pair kinds that are computed.
    d_model_ : int
        Dimension of the residual stream of the first fitted head.

    See Also
    --------
    ProcrustesSimilarity : Compares matrices in a basis that they share.

    Notes
    -----
    Range: (0, 1]; 1 if and only if the spectra are proportional, and at least ``1/sqrt(k)`` for k
    singular values, between a map of rank one and one whose singular values are all equal. Spectra
    of unequal length are compared as if the shorter one went on with zeros. Symmetric. Invariant
    under any rotation of the residual stream, also of one head alone, under rotations of the head
    space, and under scale. The spectra of QK and OV are also invariant under every change of basis
    of the head space that leaves what the head computes as it is; those of single matrices are not.

    As spectra are sorted and positive, values crowd below 1: half of the pairs of GPT-2 small lie
    above .99. Random orientation changes nothing, so that there is no law of random heads: the null
    moments are NaN, and undefined pairs stay NaN in the 2-D form.

    References
    ----------
    .. [1] L. Mirsky, "A trace inequality of John von Neumann", Monatshefte für Mathematik 79
       (1975).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> skhead.SpectrumSimilarity().fit_transform(heads)
    Similarity(16 x 16 heads, pairs QKQK OVOV, unit spectrum)
    """

    _allowed_pairs: ClassVar = (*ROLE_PAIRS, *(a + b for a in _MAPS for b in _MAPS))

    head_tags = HeadTags(
        ("table", "roles", "stack"),
        invariant_to=("rotation", "head_rotation", "scale"),
        any_width=True,
    )

    def __init__(
        self,
        pairs: Sequence[str] = ("QKQK", "OVOV"),
        layer_order: str = "all",
        fold_norm: bool = False,
        center: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        self.pairs = pairs
        self.layer_order = layer_order
        self.fold_norm = fold_norm
        self.center = center
        self.device = device

    @reports_fit
    def fit(self, X: Any, y: Any = None) -> SpectrumSimilarity:
        """Keep the spectra of the reference heads.

        Parameters
        ----------
        X : DataFrame, or array or Tensor of shape (n_heads, d_model, d_head)
            Heads table, whose models may differ in width; matrices of one role; or ``(n_heads, 4,
            d_model, d_head)`` holding W_Q, W_K, W_V and W_O transposed.
        y : ignored

        Returns
        -------
        self
        """
        self._fit(X)
        return self

    def _fit(self, X: Any) -> None:
        pairs = self._check_parameters()
        parts = list(dict.fromkeys(half for pair in pairs for half in _halves(pair)))
        self.reference_heads_, self.reference_spectra_ = self._read(X, parts)
        anonymous = ANONYMOUS in self.reference_spectra_
        self.pairs_ = (ANONYMOUS * 2,) if anonymous else pairs
        self.d_model_ = int(self.reference_heads_["d_model"].iloc[0])

    def transform(self, X: Any) -> Any:
        """Compare heads with the reference heads.

        Parameters
        ----------
        X : DataFrame, array or Tensor
            As for `fit`; of any d_model.

        Returns
        -------
        Similarity
            Or a DataFrame of its 2-D form, after ``set_output(transform="pandas")``.
        """
        check_is_fitted(self)
        anonymous = self.pairs_ == (ANONYMOUS * 2,)
        parts = list(dict.fromkeys(_halves(pair)[0] for pair in self.pairs_))
        heads, spectra = self._read(X, ["Q"] if anonymous else parts)
        check_same_kind(anonymous, ANONYMOUS in spectra, type(self).__name__)
        return self._compare(heads, spectra)

    def _compare_with_reference(self) -> Any:
        return self._compare(self.reference_heads_, self.reference_spectra_)

    def _compare(self, rows: pd.DataFrame, spectra: Spectra) -> Any:
        columns = self.reference_heads_
        values = np.empty((len(rows), len(columns), len(self.pairs_)), dtype=np.float32)
        for p, pair in enumerate(self.pairs_):
            first, second = _halves(pair)
            a, b = spectra[first], self.reference_spectra_[second]
            shared = min(a.shape[1], b.shape[1])
            defined = defined_pairs(rows, columns, first == second, self.layer_order)
            values[:, :, p] = np.where(defined, a[:, :shared] @ b[:, :shared].T, np.nan)
        ranks = tuple(head_widths(heads, self.pairs_) for heads in (rows, columns))
        record = {"fold_norm": self.fold_norm, "center": self.center, "rank": None}
        unknown = np.full((1, 1, 1), np.nan)
        return self._output(
            Similarity(
                values, self.pairs_, rows, columns, "spectrum", record, self.d_model_,
                ranks[0], ranks[1], unknown, unknown,
            )
        )  # fmt: skip

    def _read(self, X: Any, parts: Sequence[str]) -> tuple[pd.DataFrame, Spectra]:
        """Heads with the spectra of their parts, models of one shape at a time."""
        if isinstance(X, pd.DataFrame):
            blocks = _shapes(X)
            sources = [open_weights(X.iloc[rows], self) for rows in blocks]
        else:
            sources = [open_weights(X, self)]
            blocks = [np.arange(len(sources[0].heads))]
        wanted = [ANONYMOUS] if sources[0].anonymous else parts
        order = np.argsort(np.concatenate(blocks))
        spectra = {
            part: _stacked([self._spectra(source, part) for source in sources])[order]
            for part in wanted
        }
        return pd.concat([source.heads for source in sources]).iloc[order], spectra

    def _spectra(self, source: HeadInput, part: str) -> NDArray[np.float64]:
        """Singular values of one part of every head, at norm 1."""
        sides = []
        for role in _MAPS.get(part, part):
            read = source.read(
                role, fold_norm=self.fold_norm, center=self.center, device=self.device
            )
            sides.append((unit_stack(read.tensor)[0], read.index))
        if len(sides) == 1:
            stack, index = sides[0]
            values = singular_values(stack).cpu().numpy()[index]
        else:
            left, right = (expand(stack, index) for stack, index in sides)
            values = map_singular_values(left, right).cpu().numpy()
        norms = np.linalg.norm(values, axis=1)
        refuse_zero(norms < _ZERO_MAP, source.heads, part, type(self).__name__)
        return np.asarray(values / norms[:, None])


def _halves(pair: str) -> tuple[str, str]:
    """Part of the row head and part of the column head."""
    middle = len(pair) // 2
    return pair[:middle], pair[middle:]


def _shapes(heads: pd.DataFrame) -> list[NDArray[np.int64]]:
    """Positions of the heads of every shape; all of them where the table does not say."""
    columns = ["d_model", "d_head"]
    if heads.empty or any(list(heads.columns).count(name) != 1 for name in columns):
        return [np.arange(len(heads))]
    groups = heads.groupby(columns, sort=False, dropna=False).ngroup().to_numpy()
    return [np.flatnonzero(groups == group) for group in np.unique(groups)]


def _stacked(blocks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Spectra one below the other, the shorter ones followed by zeros."""
    width = max(block.shape[1] for block in blocks)
    return np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in blocks])
