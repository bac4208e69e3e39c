"""What estimators of similarities between heads share: the doors, the fit, the form of the output.

A kernel of subspaces reads orthonormal bases, a kernel of weights reads the heads' matrices.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils import TransformerTags
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
    free_dimension,
    open_door,
    parse_bytes,
)
from skhead._compared import (
    Compared,
    Law,
    Measured,
    Sides,
    check_same_kind,
    open_weights,
    refuse_zero,
    roles_in,
)
from skhead._devices import check_device, with_less_memory
from skhead._distributed import measure_in_workers, workers_share
from skhead._progress import progress_fraction, reports_fit
from skhead._tags import HeadEstimatorTags, HeadTags
from skhead._tiling import Factors
from skhead.containers import Similarity, Subspaces, feature_names
from skhead.exceptions import HeadShapeError
from skhead.linalg.alignments import Measure, unit_stack
from skhead.linalg.bands import Spans
from skhead.linalg.kernels import overlap_blocks
from skhead.linalg.stacks import Stack

__all__ = [
    "LAYER_ORDERS",
    "ROLE_PAIRS",
    "MatrixKernel",
    "PairwiseKernel",
    "SubspaceKernel",
    "WeightKernel",
    "head_widths",
]

LAYER_ORDERS = ("forward", "all")
#: Every kind of pair of two of the four roles.
ROLE_PAIRS = tuple(a + b for a in ROLES for b in ROLES)
_ANONYMOUS_PAIRS = (ANONYMOUS * 2,)
#: How weights are processed by those who do not ask for it.
RAW = {"fold_norm": False, "center": False, "rank": None}


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
        check_device(self.device, name)
        if hasattr(self, "max_memory"):
            parse_bytes(self.max_memory, name)
        return check_pairs(self.pairs, self._allowed_pairs, name)

    def __sklearn_tags__(self) -> HeadEstimatorTags:
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

    @reports_fit
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
        return self._compare_with_reference()

    def _output(self, similarity: Similarity) -> Any:
        """The container, or its 2-D form where the user has asked for data frames."""
        wanted = _get_output_config("transform", self)["dense"]
        if wanted != "pandas":
            return similarity if wanted == "default" else np.asarray(similarity)
        return similarity.to_features()


class SharedKernel(PairwiseKernel):
    """What kernels share whose pairs cost enough to be computed by several workers."""

    pairs_: tuple[str, ...]

    def _overlaps(self, sides: Sides, spans: Spans) -> dict[str, NDArray[np.floating]]:
        """``||Y^T Z||_F^2`` between the distinct matrices of every pair kind; NaN outside spans."""
        blocks = list(sides.blocks.values())
        precision = getattr(self, "matmul_precision", "highest")
        compute = partial(
            overlap_blocks, sides.rows, sides.columns, blocks, spans=spans, precision=precision
        )
        found = self._within_budget(compute)
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
        """Compute something with a memory budget and progress, and errors that name the caller.

        Where the device's memory does not hold that much, the budget is halved.
        """
        name = type(self).__name__

        def attempt(budget: int) -> Any:
            with progress_fraction(name) as progress:
                return compute(max_memory=budget, progress=progress)

        return with_less_memory(attempt, parse_bytes(self.max_memory, name), name)

    def _shares(self, *sides: pd.DataFrame | None) -> bool:
        """Whether workers are to compare the heads of these tables; None for heads in memory."""
        return workers_share(sides, self.n_jobs, type(self).__name__)

    def _measure_in_workers(self, rows: pd.DataFrame, columns: pd.DataFrame | None) -> Measured:
        """What `_measure_tables` finds, tile by tile."""
        name = type(self).__name__
        budget = parse_bytes(self.max_memory, name)
        with progress_fraction(name) as progress:
            return measure_in_workers(self, rows, columns, self._factors_of, budget, progress)

    def _similarity(
        self,
        measured: Measured,
        heads: tuple[pd.DataFrame, pd.DataFrame],
        ranks: tuple[NDArray[np.int64], NDArray[np.int64]],
        record: Mapping[str, Any],
        subspaces: tuple[Subspaces | None, Subspaces | None] = (None, None),
    ) -> Similarity:
        """What was measured, with all that the next stage needs; each argument for both sides."""
        dimension = free_dimension(self.d_model_, record)
        law = self._law(measured.row_facts, measured.column_facts, dimension)
        return Similarity(
            measured.values, self.pairs_, *heads, law.unit, dict(record), self.d_model_, *ranks,
            law.null_mean, law.null_sd, *subspaces,
        )  # fmt: skip

    @abstractmethod
    def _factors_of(self, pairs: Sequence[str]) -> Factors:
        """What is multiplied for some pair kinds."""

    @abstractmethod
    def _measure_tables(self, rows: pd.DataFrame, columns: pd.DataFrame | None) -> Measured:
        """Read and compare the heads of two tables, with None those of one with each other."""

    @abstractmethod
    def _law(self, row_facts: NDArray[Any], column_facts: NDArray[Any], dimension: int) -> Law:
        """What the kernel gives between random heads of which these facts are known.

        They point anywhere in a space of this dimension.
        """


class SubspaceKernel(SharedKernel):
    """What kernels of orthonormal bases share: the door, the fit and the form of the result."""

    head_tags = HeadTags(
        ("table", "subspaces", "roles", "stack"),
        invariant_to=("rotation", "head_rotation", "gauge", "scale"),
    )

    @reports_fit
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
        self.pairs_ = self._check_parameters()
        name = type(self).__name__
        self._reference: Subspaces | pd.DataFrame
        if (table := self._for_workers(X)) is not None:
            self._reference = self.reference_heads_ = table
        else:
            subspaces = as_subspaces(X, roles_in(self.pairs_), self.device, name)
            if subspaces.roles == (ANONYMOUS,):
                self.pairs_ = _ANONYMOUS_PAIRS
            for role in roles_in(self.pairs_):
                subspaces.role(role)
            self._reference, self.reference_heads_ = subspaces, subspaces.heads
        self.d_model_ = int(self.reference_heads_["d_model"].iloc[0])

    @property
    def reference_(self) -> Subspaces:
        """The fitted heads; extracted anew at every access where workers were to read them."""
        roles = roles_in(self.pairs_)
        return as_subspaces(self._reference, roles, self.device, type(self).__name__)

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
        if isinstance(self._reference, pd.DataFrame):
            table = self._for_workers(X)
            if table is not None:
                self._check_width(int(table["d_model"].iloc[0]))
                return self._output(self._from_workers(table, self._reference))
        reference = self.reference_
        anonymous = self.pairs_ == _ANONYMOUS_PAIRS
        rows = as_subspaces(X, ROLES if anonymous else self._roles(0), self.device, name)
        self._check_width(rows.d_model)
        if anonymous != (rows.roles == (ANONYMOUS,)):
            raise HeadShapeError(
                f"{name}: was fitted on the roles {' '.join(reference.roles)}, but these "
                f"heads have the roles {' '.join(rows.roles)}; use one kind of input for both"
            )
        check_same_record(reference.record, rows.record, name)
        return self._output(self._compare(rows, reference))

    def _compare_with_reference(self) -> Any:
        """Compare the reference heads with each other."""
        if isinstance(self._reference, pd.DataFrame):
            return self._output(self._from_workers(self._reference, None))
        return self._output(self._compare(self.reference_, None))

    def _for_workers(self, X: Any) -> pd.DataFrame | None:
        """The heads table, if that is what came in and workers are to read it."""
        table = None
        if isinstance(X, pd.DataFrame):
            table = open_door(X, type(self).__name__).heads
        return table if self._shares(table) else None

    def _from_workers(self, rows: pd.DataFrame, columns: pd.DataFrame | None) -> Similarity:
        measured = self._measure_in_workers(rows, columns)
        heads = rows, rows if columns is None else columns
        ranks = measured.row_facts, measured.column_facts
        return self._similarity(measured, heads, ranks, RAW)

    def _compare(self, rows: Subspaces, columns: Subspaces | None) -> Similarity:
        measured = self._measure(self._compared(rows, columns))
        reference = rows if columns is None else columns
        ranks = measured.row_facts, measured.column_facts
        heads = rows.heads, reference.heads
        return self._similarity(measured, heads, ranks, reference.record, (rows, reference))

    def _compared(self, rows: Subspaces, columns: Subspaces | None) -> Compared:
        reference = rows if columns is None else columns
        return Compared(
            Sides.of(
                self.pairs_,
                partial(self._stack, rows),
                None if columns is None else partial(self._stack, columns),
            ),
            rows.heads,
            reference.heads,
            {role: rows.role(role).index for role in self._roles(0)},
            {role: reference.role(role).index for role in self._roles(1)},
            np.stack([rows.ranks(pair[0]) for pair in self.pairs_], axis=1),
            np.stack([reference.ranks(pair[1]) for pair in self.pairs_], axis=1),
            self.layer_order,
        )

    def _stack(self, subspaces: Subspaces, role: str) -> Stack:
        vectors = subspaces.role(role).vectors
        return vectors if self.device is None else vectors.to(self.device)

    def _roles(self, side: int) -> list[str]:
        """Roles of the row heads (0) or of the column heads (1)."""
        return list(dict.fromkeys(pair[side] for pair in self.pairs_))

    def _factors_of(self, pairs: Sequence[str]) -> Factors:
        return Factors.of(pairs, copies=1)

    def _measure_tables(self, rows: pd.DataFrame, columns: pd.DataFrame | None) -> Measured:
        self.pairs_ = self._check_parameters()
        name = type(self).__name__
        roles = roles_in(self.pairs_) if columns is None else self._roles(0)
        left = as_subspaces(rows, roles, self.device, name)
        right = None
        if columns is not None:
            right = as_subspaces(columns, self._roles(1), self.device, name)
        return self._measure(self._compared(left, right))

    @abstractmethod
    def _measure(self, compared: Compared) -> Measured:
        """Values of all pairs; the facts are the ranks."""


class MatrixKernel(SharedKernel):
    """What kernels of the heads' matrices share: the door, the fit and the form of the result."""

    head_tags = HeadTags(
        ("table", "roles", "stack"), invariant_to=("rotation", "head_rotation", "scale")
    )
    fold_norm: bool
    center: bool

    @reports_fit
    def fit(self, X: Any, y: Any = None) -> MatrixKernel:
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
        self._reference = self._open(X).kept()
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
        rows = self._open(X)
        self._check_width(rows.d_model)
        check_same_kind(self._reference.anonymous, rows.anonymous, type(self).__name__)
        return self._compare_with_reference(rows)

    def _open(self, X: Any) -> HeadInput:
        return open_weights(X, self)

    def _compare_with_reference(self, given: HeadInput | None = None) -> Any:
        """Compare heads, or with None the reference heads themselves, with the reference."""
        rows, columns = (self._reference, None) if given is None else (given, self._reference)
        reference = self._reference
        if self._shares(rows.table, reference.table):
            table = None if columns is None else columns.heads
            measured = self._measure_in_workers(rows.heads, table)
        else:
            measured = self._measure(rows, columns)
        ranks = head_widths(rows.heads, self.pairs_), head_widths(reference.heads, self.pairs_)
        record = RAW | {"fold_norm": self.fold_norm, "center": self.center}
        heads = rows.heads, reference.heads
        return self._output(self._similarity(measured, heads, ranks, record))

    def _measure_tables(self, rows: pd.DataFrame, columns: pd.DataFrame | None) -> Measured:
        self._fit(rows if columns is None else columns)
        return self._measure(self._open(rows), None if columns is None else self._reference)

    @abstractmethod
    def _measure(self, rows: HeadInput, columns: HeadInput | None) -> Measured:
        """Compare heads, with None those of one side with each other."""


class WeightKernel(MatrixKernel):
    """What kernels of single matrices share: every matrix is brought to Frobenius norm 1."""

    def __init__(
        self,
        pairs: Sequence[str] = ("OQ", "OK", "OV"),
        layer_order: str = "forward",
        fold_norm: bool = False,
        center: bool = False,
        max_memory: int | str = "1GiB",
        device: str | torch.device | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.pairs = pairs
        self.layer_order = layer_order
        self.fold_norm = fold_norm
        self.center = center
        self.max_memory = max_memory
        self.device = device
        self.n_jobs = n_jobs

    def _measure(self, rows: HeadInput, columns: HeadInput | None) -> Measured:
        reference = rows if columns is None else columns
        roles = roles_in(self.pairs_) if columns is None else [p[1] for p in self.pairs_]
        read = {role: self._unit(reference, role) for role in dict.fromkeys(roles)}
        own = read
        if columns is not None:
            roles = [pair[0] for pair in self.pairs_]
            own = {role: self._unit(rows, role) for role in dict.fromkeys(roles)}
        return self._measure_units(
            Compared(
                Sides.of(
                    self.pairs_,
                    lambda role: own[role][0],
                    None if columns is None else (lambda role: read[role][0]),
                ),
                rows.heads,
                reference.heads,
                {role: index for role, (_, index) in own.items()},
                {role: index for role, (_, index) in read.items()},
                head_widths(rows.heads, self.pairs_),
                head_widths(reference.heads, self.pairs_),
                self.layer_order,
            )
        )

    def _unit(self, source: HeadInput, role: str) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Distinct matrices of a role at norm 1, none zero, and which every head uses."""
        read = source.read(role, fold_norm=self.fold_norm, center=self.center, device=self.device)
        unit, zero = unit_stack(read.tensor)
        refuse_zero(zero.cpu().numpy()[read.index], source.heads, role, type(self).__name__)
        return unit, read.index

    def _factors_of(self, pairs: Sequence[str]) -> Factors:
        return Factors.of(pairs, copies=2)

    @abstractmethod
    def _measure_units(self, compared: Compared) -> Measured:
        """Values of all pairs, and what the law of random heads asks of every head."""


def head_widths(heads: pd.DataFrame, pairs: Sequence[str]) -> NDArray[np.int64]:
    """Columns of the matrices of every head, for every pair kind."""
    return np.repeat(heads["d_head"].to_numpy()[:, None], len(pairs), axis=1)
