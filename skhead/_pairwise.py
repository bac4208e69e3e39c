"""What estimators of similarities between heads share: the doors, the fit, the form of the output.

A kernel of subspaces reads orthonormal bases, a kernel of weights reads the heads' matrices.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import Tags, TransformerTags
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import check_is_fitted

from skhead._base import (
    ANONYMOUS,
    ROLES,
    HeadEstimator,
    HeadInput,
    as_subspaces,
    check_option,
    check_pairs,
    check_same_record,
    parse_bytes,
    progress_fraction,
)
from skhead._compared import (
    Compared,
    Measured,
    Sides,
    check_same_kind,
    open_weights,
    refuse_zero,
    roles_in,
)
from skhead.containers import Similarity, Subspaces, feature_names
from skhead.exceptions import HeadShapeError, MemoryBudgetError
from skhead.linalg.alignments import Measure, unit_stack
from skhead.linalg.kernels import overlap_blocks
from skhead.linalg.stacks import Stack

__all__ = [
    "LAYER_ORDERS",
    "ROLE_PAIRS",
    "PairwiseKernel",
    "SubspaceKernel",
    "WeightKernel",
]

LAYER_ORDERS = ("forward", "all")
#: Every kind of pair of two of the four roles.
ROLE_PAIRS = tuple(a + b for a in ROLES for b in ROLES)
_ANONYMOUS_PAIRS = (ANONYMOUS * 2,)


class PairwiseKernel(HeadEstimator):
    """What the kernels share: checks, names of features, and the form of the output."""

    #: Parameters that are one of some values.
    _options: ClassVar[Mapping[str, Sequence[Any]]] = {"layer_order": LAYER_ORDERS}
    _allowed_pairs: ClassVar[Sequence[str]] = ROLE_PAIRS

    def _check_parameters(self) -> tuple[str, ...]:
        """Refuse bad parameters; the pair kinds."""
        name = type(self).__name__
        for option, allowed in self._options.items():
            check_option(option, getattr(self, option), allowed, name)
        if hasattr(self, "max_memory"):
            parse_bytes(self.max_memory, name)
        return check_pairs(self.pairs, self._allowed_pairs, name)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags = TransformerTags(preserves_dtype=["float32"])
        return tags

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the columns of the 2-D form, such as ``"OQ:L4H7"``.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        ndarray of shape (n_pairs * n_reference_heads,)
        """
        check_is_fitted(self)
        return np.asarray(feature_names(self.pairs_, self.reference_heads_), dtype=object)

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """Fit on the heads and compare them with each other.

        Parameters
        ----------
        X : Subspaces, DataFrame, array or Tensor
            As for `fit`.
        y : ignored

        Returns
        -------
        Similarity
            Or a DataFrame of its 2-D form, after ``set_output(transform="pandas")``.
        """
        self._fit(X)
        return self._compare_with_reference(None)

    def _output(self, similarity: Similarity) -> Any:
        """The container, or its 2-D form where the user has asked for data frames."""
        wanted = _get_output_config("transform", self)["dense"]
        if wanted != "pandas":
            return similarity if wanted == "default" else np.asarray(similarity)
        return similarity.to_features()

    def _overlaps(self, sides: Sides) -> dict[str, NDArray[np.floating]]:
        """``||Y^T Z||_F^2`` between the distinct matrices of every pair kind."""
        blocks = list(sides.blocks.values())
        found = self._within_budget(partial(overlap_blocks, sides.rows, sides.columns, blocks))
        return {pair: found[block].cpu().numpy() for pair, block in sides.blocks.items()}

    def _cross_measures(
        self,
        compared: Compared,
        wanted: Mapping[str, NDArray[np.bool_]],
        measure_of: Callable[[str], tuple[Measure, int]],
    ) -> dict[str, NDArray[np.float64]]:
        """A number from the cross product of wanted distinct matrices; see `Compared.measured`."""
        found: dict[str, NDArray[np.float64]] = self._within_budget(
            partial(compared.measured, wanted, measure_of)
        )
        return found

    def _within_budget(self, compute: Callable[..., Any]) -> Any:
        """Compute something with a memory budget and progress, and errors that name the caller."""
        name = type(self).__name__
        budget = parse_bytes(self.max_memory, name)
        with progress_fraction(name) as progress:
            try:
                return compute(max_memory=budget, progress=progress)
            except MemoryBudgetError as error:
                raise MemoryBudgetError(f"{name}: {error}") from None


class SubspaceKernel(PairwiseKernel):
    """What kernels of orthonormal bases share: the door, the fit and the form of the result."""

    def fit(self, X: Any, y: Any = None) -> SubspaceKernel:
        """Keep the subspaces of the reference heads.

        Parameters
        ----------
        X : Subspaces, DataFrame, or array or Tensor of shape (n_heads, d_model, d_head)
            Subspaces, or heads whose raw full-rank subspaces are taken.
        y : ignored

        Returns
        -------
        self
        """
        self._fit(X)
        return self

    def _fit(self, X: Any) -> None:
        pairs = self._check_parameters()
        name = type(self).__name__
        self.reference_ = as_subspaces(X, roles_in(pairs), self.device, name)
        anonymous = self.reference_.roles == (ANONYMOUS,)
        self.pairs_ = _ANONYMOUS_PAIRS if anonymous else pairs
        for role in roles_in(self.pairs_):
            self.reference_.role(role)
        self.reference_heads_ = self.reference_.heads
        self.d_model_ = self.reference_.d_model

    def transform(self, X: Any) -> Any:
        """Compare heads with the reference heads.

        Parameters
        ----------
        X : Subspaces, DataFrame, array or Tensor
            As for `fit`, of the same d_model and processed in the same way.

        Returns
        -------
        Similarity
            Or a DataFrame of its 2-D form, after ``set_output(transform="pandas")``.
        """
        check_is_fitted(self)
        name = type(self).__name__
        anonymous = self.pairs_ == _ANONYMOUS_PAIRS
        needed = list(dict.fromkeys(pair[0] for pair in self.pairs_))
        rows = as_subspaces(X, ROLES if anonymous else needed, self.device, name)
        self._check_width(rows.d_model)
        if anonymous != (rows.roles == (ANONYMOUS,)):
            raise HeadShapeError(
                f"{name}: was fitted on the roles {' '.join(self.reference_.roles)}, but these "
                f"heads have the roles {' '.join(rows.roles)}; use one kind of input for both"
            )
        check_same_record(self.reference_.record, rows.record, name)
        return self._compare_with_reference(rows)

    def _compare_with_reference(self, given: Subspaces | None) -> Any:
        """Compare heads, or with None the reference heads themselves, with the reference."""
        reference, rows = self.reference_, self.reference_ if given is None else given
        columns = None if given is None else partial(self._stack, reference)
        compared = Compared(
            Sides.of(self.pairs_, partial(self._stack, rows), columns),
            rows.heads,
            reference.heads,
            {pair[0]: rows.role(pair[0]).index for pair in self.pairs_},
            {pair[1]: reference.role(pair[1]).index for pair in self.pairs_},
            np.stack([rows.ranks(pair[0]) for pair in self.pairs_], axis=1),
            np.stack([reference.ranks(pair[1]) for pair in self.pairs_], axis=1),
            self.layer_order,
        )
        measured = self._measure(compared)
        return self._output(
            Similarity(
                measured.values, self.pairs_, rows.heads, reference.heads, measured.unit,
                dict(reference.record), self.d_model_, compared.row_ranks, compared.column_ranks,
                measured.null_mean, measured.null_sd, rows, reference,
            )
        )  # fmt: skip

    def _stack(self, subspaces: Subspaces, role: str) -> Stack:
        vectors = subspaces.role(role).vectors
        return vectors if self.device is None else vectors.to(self.device)

    @abstractmethod
    def _measure(self, compared: Compared) -> Measured:
        """Values of all pairs, their unit, and what random heads give."""


class WeightKernel(PairwiseKernel):
    """What kernels of raw matrices share: every matrix is brought to Frobenius norm 1."""

    def __init__(
        self,
        pairs: Sequence[str] = ("OQ", "OK", "OV"),
        layer_order: str = "forward",
        fold_norm: bool = False,
        center: bool = False,
        max_memory: int | str = "1GiB",
        device: str | torch.device | None = None,
    ) -> None:
        self.pairs = pairs
        self.layer_order = layer_order
        self.fold_norm = fold_norm
        self.center = center
        self.max_memory = max_memory
        self.device = device

    def fit(self, X: Any, y: Any = None) -> WeightKernel:
        """Remember the reference heads.

        Parameters
        ----------
        X : DataFrame, or array or Tensor of shape (n_heads, d_model, d_head)
            Heads table; matrices of one role; or ``(n_heads, 4, d_model, d_head)`` holding W_Q,
            W_K, W_V and W_O transposed.
        y : ignored

        Returns
        -------
        self
        """
        self._fit(X)
        return self

    def _fit(self, X: Any) -> None:
        pairs = self._check_parameters()
        self._reference = open_weights(X, self).kept()
        self.pairs_ = _ANONYMOUS_PAIRS if self._reference.anonymous else pairs
        self.reference_heads_ = self._reference.heads
        self.d_model_ = self._reference.d_model

    def transform(self, X: Any) -> Any:
        """Compare heads with the reference heads.

        Parameters
        ----------
        X : DataFrame, array or Tensor
            As for `fit`, of the same d_model.

        Returns
        -------
        Similarity
            Or a DataFrame of its 2-D form, after ``set_output(transform="pandas")``.
        """
        check_is_fitted(self)
        rows = open_weights(X, self)
        self._check_width(rows.d_model)
        check_same_kind(self._reference.anonymous, rows.anonymous, type(self).__name__)
        return self._compare_with_reference(rows)

    def _compare_with_reference(self, given: HeadInput | None) -> Any:
        """Compare heads, or with None the reference heads themselves, with the reference."""
        reference = self._reference
        rows = reference if given is None else given
        read = {role: self._unit(reference, role) for role in self._roles(given is None)}
        own = read
        if given is not None:
            own = {role: self._unit(rows, role) for role in {pair[0] for pair in self.pairs_}}
        columns = None if given is None else (lambda role: read[role][0])
        row_ranks, column_ranks = (
            np.repeat(heads["d_head"].to_numpy()[:, None], len(self.pairs_), axis=1)
            for heads in (rows.heads, reference.heads)
        )
        compared = Compared(
            Sides.of(self.pairs_, lambda role: own[role][0], columns),
            rows.heads,
            reference.heads,
            {role: index for role, (_, index) in own.items()},
            {role: index for role, (_, index) in read.items()},
            row_ranks,
            column_ranks,
            self.layer_order,
        )
        measured = self._measure(compared)
        record = {"fold_norm": self.fold_norm, "center": self.center, "rank": None}
        return self._output(
            Similarity(
                measured.values, self.pairs_, rows.heads, reference.heads, measured.unit, record,
                self.d_model_, row_ranks, column_ranks, measured.null_mean, measured.null_sd,
            )
        )  # fmt: skip

    def _roles(self, both_sides: bool) -> list[str]:
        """Roles of the reference heads that are needed."""
        return roles_in(self.pairs_) if both_sides else [*{pair[1]: None for pair in self.pairs_}]

    def _unit(self, source: HeadInput, role: str) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Distinct matrices of a role at norm 1, none zero, and which every head uses."""
        read = source.read(role, fold_norm=self.fold_norm, center=self.center, device=self.device)
        unit, zero = unit_stack(read.tensor)
        refuse_zero(zero.cpu().numpy()[read.index], source.heads, role, type(self).__name__)
        return unit, read.index

    @abstractmethod
    def _measure(self, compared: Compared) -> Measured:
        """Values of all pairs, their unit, and what random heads give."""
