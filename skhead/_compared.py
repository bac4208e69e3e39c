"""Heads that are compared: how they come in, their distinct matrices, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._base import (
    ANONYMOUS,
    HeadInput,
    check_processable,
    defined_pairs,
    goes_forward,
    open_door,
)
from skhead.containers import Subspaces
from skhead.exceptions import DegenerateHeadError, HeadShapeError
from skhead.linalg.alignments import Measure, cross_measures
from skhead.linalg.bands import Spans
from skhead.linalg.stacks import Stack
from skhead.weights import head_labels

__all__ = [
    "Compared",
    "Law",
    "Measured",
    "Sides",
    "check_same_kind",
    "forward_spans",
    "open_weights",
    "refuse_zero",
    "roles_in",
]


@dataclass(frozen=True)
class Sides:
    """Stacks to be compared, each role once, and which against which.

    Attributes
    ----------
    rows : sequence of Tensor or StoredStack, of shape (n_distinct, d_model, width)
    columns : sequence of Tensor or StoredStack, or None
        None where the rows are compared with themselves.
    blocks : dict of str to (int, int)
        By pair kind, the position of its stacks.
    """

    rows: Sequence[Stack]
    columns: Sequence[Stack] | None
    blocks: dict[str, tuple[int, int]]

    @classmethod
    def of(
        cls,
        pairs: Sequence[str],
        rows: Callable[[str], Stack],
        columns: Callable[[str], Stack] | None,
    ) -> Sides:
        """Stacks of the roles that the pair kinds name, brought to one dtype.

        Parameters
        ----------
        pairs : sequence of str
        rows, columns : callable
            From a role to its stack; None for columns that are the rows.
        """
        if columns is None:
            roles = roles_in(pairs)
            blocks = {pair: (roles.index(pair[0]), roles.index(pair[1])) for pair in pairs}
            return cls([rows(role) for role in roles], None, blocks)
        first, second = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
        left, right = [rows(role) for role in first], [columns(role) for role in second]
        dtype = torch.promote_types(left[0].dtype, right[0].dtype)
        blocks = {pair: (first.index(pair[0]), second.index(pair[1])) for pair in pairs}
        return cls([x.to(dtype) for x in left], [x.to(dtype) for x in right], blocks)

    def stacks(self, pair: str) -> tuple[Stack, Stack]:
        """The two stacks of a pair kind."""
        i, j = self.blocks[pair]
        return self.rows[i], (self.rows if self.columns is None else self.columns)[j]


@dataclass(frozen=True)
class Compared:
    """Heads to be compared: which they are, their distinct matrices, and who uses which.

    Attributes
    ----------
    sides : Sides
    row_heads, column_heads : DataFrame
        Heads tables.
    row_index, column_index : mapping of str to ndarray of shape (n_heads,)
        By role, the matrix of its stack that every head uses.
    row_ranks, column_ranks : ndarray of shape (n_heads, n_pairs), int64
    layer_order : {"forward", "all"}
    """

    sides: Sides
    row_heads: pd.DataFrame
    column_heads: pd.DataFrame
    row_index: Mapping[str, NDArray[np.int64]]
    column_index: Mapping[str, NDArray[np.int64]]
    row_ranks: NDArray[np.int64]
    column_ranks: NDArray[np.int64]
    layer_order: str

    @property
    def pairs(self) -> tuple[str, ...]:
        """Pair kinds."""
        return tuple(self.sides.blocks)

    def index(self, pair: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Matrices of a pair kind that every row head and every column head uses."""
        return self.row_index[pair[0]], self.column_index[pair[1]]

    def defined(self, pair: str) -> NDArray[np.bool_]:
        """Which pairs of heads are defined."""
        same = pair[0] == pair[1]
        return defined_pairs(self.row_heads, self.column_heads, same, self.layer_order)

    def wanted(self, pair: str) -> NDArray[np.bool_]:
        """Which pairs of distinct matrices some defined pair of heads uses."""
        rows, columns = self.defined(pair).nonzero()
        row_index, column_index = self.index(pair)
        found = np.zeros([len(stack) for stack in self.sides.stacks(pair)], dtype=bool)
        found[row_index[rows], column_index[columns]] = True
        return found

    def spans(self) -> Spans:
        """By block, the distinct column matrices between which those lie that each row meets."""
        if not goes_forward(self.row_heads, self.column_heads, self.layer_order):
            return {}
        return {
            block: forward_spans(self.row_heads, self.column_heads, *self.index(pair))
            for pair, block in self.sides.blocks.items()
        }

    def measured(
        self,
        wanted: Mapping[str, NDArray[np.bool_]],
        measure_of: Callable[[str], tuple[Measure, int]],
        *,
        max_memory: int,
        progress: Callable[[float], None],
    ) -> dict[str, NDArray[np.float64]]:
        """A number from the cross product of wanted distinct matrices, mirrored ones once.

        Parameters
        ----------
        wanted : mapping of str to ndarray of shape (n_distinct_rows, n_distinct_columns), bool
            By pair kind.
        measure_of : callable
            From a pair kind to its measure and the bytes of scratch that this takes.
        max_memory : int
        progress : callable

        Returns
        -------
        dict of str to ndarray of shape (n_distinct_rows, n_distinct_columns)
            NaN where neither the pair nor its mirror image is wanted.
        """
        symmetric = self.sides.columns is None
        found: dict[str, NDArray[np.float64]] = {}
        for done, (pair, asked) in enumerate(wanted.items()):
            mirror = pair[::-1] if symmetric else ""
            if mirror in found:
                found[pair] = found[mirror].T
                continue
            if mirror in wanted:
                asked = asked | wanted[mirror].T
            if mirror == pair:
                asked = np.triu(asked)
            measure, reserved = measure_of(pair)
            values = cross_measures(
                *self.sides.stacks(pair),
                torch.from_numpy(asked),
                measure,
                max_memory=max_memory,
                reserved=reserved,
                progress=partial(_advance, progress, done, len(wanted)),
            ).numpy()
            found[pair] = np.where(np.isnan(values), values.T, values) if mirror == pair else values
        return found

    def spread(
        self,
        found: Mapping[str, NDArray[np.floating]],
        scale: Callable[[int], NDArray[Any] | float] | None = None,
    ) -> NDArray[np.float32]:
        """Numbers of distinct matrices as values of heads, NaN where undefined.

        Parameters
        ----------
        found : mapping of str to ndarray of shape (n_distinct_rows, n_distinct_columns)
            By pair kind.
        scale : callable, optional
            From the position of a pair kind to what its values are divided by, broadcastable to
            ``(n_rows, n_columns)``.
        """
        shape = (len(self.row_heads), len(self.column_heads), len(self.pairs))
        values = np.empty(shape, dtype=np.float32)
        for p, pair in enumerate(self.pairs):
            numbers = found[pair][np.ix_(*self.index(pair))]
            numbers = numbers if scale is None else numbers / scale(p)
            values[:, :, p] = np.where(self.defined(pair), numbers, np.nan)
        return values


@dataclass(frozen=True)
class Measured:
    """What a kernel finds out about compared heads.

    Attributes
    ----------
    values : ndarray of shape (n_rows, n_columns, n_pairs), float32
    row_facts, column_facts : ndarray of shape (n_rows, n_pairs), (n_columns, n_pairs)
        What the law of random heads asks of every head: ranks, or sizes of Gram matrices.
    """

    values: NDArray[np.float32]
    row_facts: NDArray[Any]
    column_facts: NDArray[Any]


@dataclass(frozen=True)
class Law:
    """What a kernel gives between independent random heads, and in which unit.

    Attributes
    ----------
    unit : str
    null_mean, null_sd : ndarray, broadcastable to the values
        NaN if unknown.
    """

    unit: str
    null_mean: NDArray[np.float64]
    null_sd: NDArray[np.float64]


def forward_spans(
    rows: pd.DataFrame,
    columns: pd.DataFrame,
    row_index: NDArray[np.int64] | None = None,
    column_index: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """First and last later layer's matrix of the columns, for each distinct matrix of the rows.

    Parameters
    ----------
    rows, columns : DataFrame
        Heads tables, with layers.
    row_index, column_index : ndarray of shape (n_heads,), optional
        Distinct matrix that every head uses; its own by default.

    Returns
    -------
    ndarray of shape (n_distinct_rows, 2), int64
        First column and the one after the last; equal where there is none.
    """
    codes = pd.factorize(pd.concat([rows["source"], columns["source"]]))[0]
    sides = []
    for heads, index, sources in (
        (rows, row_index, codes[: len(rows)]),
        (columns, column_index, codes[len(rows) :]),
    ):
        used = np.arange(len(heads)) if index is None else index
        frame = pd.DataFrame({"source": sources, "layer": heads["layer"].to_numpy()})
        sides.append(frame.groupby(used))
    earliest, latest = sides[0].min(), sides[1].max()
    spans = np.zeros((1 + int(earliest.index.max()), 2), dtype=np.int64)
    for (source, layer), group in earliest.groupby(["source", "layer"]):
        met = latest.index[(latest["source"] == source) & (latest["layer"] > layer)]
        if len(met):
            spans[group.index] = met.min(), met.max() + 1
    return spans


def roles_in(pairs: Sequence[str]) -> list[str]:
    """Roles that the pair kinds name, row roles first."""
    return list(dict.fromkeys([pair[0] for pair in pairs] + [pair[1] for pair in pairs]))


def open_weights(X: Any, kernel: Any) -> HeadInput:
    """Heads whose weights can be read as a kernel's parameters say.

    Parameters
    ----------
    X : DataFrame, array or Tensor
    kernel : estimator
        With parameters fold_norm and center.

    Raises
    ------
    HeadShapeError
        If X holds subspaces instead of weights.
    ValueError
        If a stack is to be processed as only a model's weights can be.
    """
    name = type(kernel).__name__
    if isinstance(X, Subspaces):
        raise HeadShapeError(
            f"{name}: compares weights with their gains, which Subspaces no longer hold; pass the "
            "heads table, with fold_norm and center as parameters"
        )
    source = open_door(X, name)
    check_processable(source, name, fold_norm=kernel.fold_norm, center=kernel.center)
    return source


def _advance(progress: Callable[[float], None], done: int, total: int, share: float) -> None:
    """Report a share of one piece of the work as one of all of it."""
    progress((done + share) / total)


def check_same_kind(fitted: bool, given: bool, caller: str) -> None:
    """Refuse to compare matrices of one unnamed role with heads of all four.

    Parameters
    ----------
    fitted, given : bool
        Whether these are matrices of one unnamed role.
    caller : str
        Estimator to name.

    Raises
    ------
    HeadShapeError
    """
    if fitted != given:
        kinds = "heads of all four roles", "matrices of one role"
        raise HeadShapeError(
            f"{caller}: was fitted on {kinds[fitted]}, but these are {kinds[given]}; use one kind "
            "of input for both"
        )


def refuse_zero(zero: NDArray[np.bool_], heads: pd.DataFrame, part: str, caller: str) -> None:
    """Raise if a matrix or map of some head is zero.

    Parameters
    ----------
    zero : ndarray of shape (n_heads,), bool
    heads : DataFrame
    part : str
        A role, or "QK" or "OV".
    caller : str
        Estimator to name.

    Raises
    ------
    DegenerateHeadError
    """
    if zero.any():
        label = head_labels(heads)[int(zero.argmax())]
        name = f"W_{part}" if len(part) == 1 else f"{part} map"
        name = "matrix" if part == ANONYMOUS else name
        raise DegenerateHeadError(
            f"{caller}: {label} {name} is zero, so that nothing can be compared with it; "
            "drop the head, for example heads.drop(index=...)"
        )
