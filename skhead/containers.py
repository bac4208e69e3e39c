"""What flows between estimators: subspaces of heads, and similarities between heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import DTypeLike, NDArray

from skhead.exceptions import HeadShapeError
from skhead.linalg.topk import largest_entries
from skhead.weights import head_labels

if TYPE_CHECKING:
    import networkx

__all__ = ["Calibration", "RoleBases", "Similarity", "Subspaces", "head_codes"]

_HEAD = ["source", "layer", "head"]


def _freeze(value: Any) -> Any:
    """Plain, content-hashable form of a field: tensors as numpy, tables as columns of lists."""
    if isinstance(value, torch.Tensor):
        return np.ascontiguousarray(value.detach().cpu().numpy())
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    if isinstance(value, pd.DataFrame):
        columns = {name: value[name].tolist() for name in value.columns}
        return {"index": list(value.index), "columns": columns}
    return value


class _Frozen:
    """Pickling by content: no tensor and no view of a larger array ever enters the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: _freeze(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, self._thaw(name, value))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    @staticmethod
    def _thaw(name: str, value: Any) -> Any:
        if name in ("heads", "rows", "columns"):
            return pd.DataFrame(value["columns"], index=pd.Index(value["index"], dtype=object))
        return value


@dataclass(frozen=True, eq=False)
class RoleBases(_Frozen):
    """Orthonormal bases of one role: each distinct basis once, and which head uses which.

    Attributes
    ----------
    vectors : Tensor of shape (n_distinct, d_model, max_rank)
        Orthonormal columns; those past the rank are zero.
    ranks : ndarray of shape (n_distinct,), int64
    index : ndarray of shape (n_heads,), int64
        Row of `vectors` that each head uses: grouped-query heads share keys and values, and layers
        may share all their weights.
    """

    vectors: torch.Tensor
    ranks: NDArray[np.int64]
    index: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> RoleBases:
        """Bases of some of the heads, without those that none of them uses."""
        used, index = np.unique(self.index[rows], return_inverse=True)
        return RoleBases(
            self.vectors[torch.as_tensor(used, device=self.vectors.device)],
            self.ranks[used],
            index.astype(np.int64),
        )

    @staticmethod
    def _thaw(name: str, value: Any) -> Any:
        return torch.from_numpy(value) if name == "vectors" else value


@dataclass(frozen=True, eq=False)
class Subspaces(_Frozen):
    """Orthonormal bases of the subspaces that heads read from and write to.

    Made by `SubspaceExtractor`; indexing selects heads.

    Attributes
    ----------
    heads : DataFrame
        Heads table, one row per head.
    bases : mapping of str to RoleBases
        One entry per role.
    record : mapping
        How the weights were processed: ``fold_norm``, ``center``, ``rank``.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> subspaces = skhead.SubspaceExtractor().fit_transform(heads)
    >>> subspaces
    Subspaces(16 heads, roles Q K V O, d_model 128, ranks 16)
    >>> subspaces.numpy("O").shape
    (16, 128, 16)
    """

    heads: pd.DataFrame
    bases: Mapping[str, RoleBases]
    record: Mapping[str, Any]

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that have bases, in order."""
        return tuple(self.bases)

    @property
    def d_model(self) -> int:
        """Dimension of the residual stream."""
        return int(next(iter(self.bases.values())).vectors.shape[1])

    @property
    def rereadable(self) -> bool:
        """Whether the weights can be read again from where the heads table says they are."""
        return bool((self.heads["layer"] >= 0).all())

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_heads, d_model)``."""
        return len(self), self.d_model

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, key: Any) -> Subspaces:
        rows = _row_positions(key, len(self))
        bases = {role: basis.take(rows) for role, basis in self.bases.items()}
        return replace(self, heads=self.heads.iloc[rows], bases=bases)

    def role(self, role: str) -> RoleBases:
        """Bases of one role.

        Parameters
        ----------
        role : str
            One of `roles`.

        Returns
        -------
        RoleBases

        Raises
        ------
        HeadShapeError
            If the role was not extracted.
        """
        if role not in self.bases:
            raise HeadShapeError(
                f"Subspaces holds the roles {' '.join(self.roles)}, not {role!r}; "
                f"extract it with SubspaceExtractor(roles=...)"
            )
        return self.bases[role]

    def ranks(self, role: str) -> NDArray[np.int64]:
        """Rank of every head's subspace.

        Parameters
        ----------
        role : str
            One of `roles`.

        Returns
        -------
        ndarray of shape (n_heads,), int64
        """
        basis = self.role(role)
        return basis.ranks[basis.index]

    def numpy(self, role: str) -> NDArray[np.floating]:
        """Bases of every head.

        Parameters
        ----------
        role : str
            One of `roles`.

        Returns
        -------
        ndarray of shape (n_heads, d_model, max_rank)
            Orthonormal columns; those past a head's rank are zero.
        """
        basis = self.role(role)
        return basis.vectors.cpu().numpy()[basis.index]

    def __repr__(self) -> str:
        ranks = np.concatenate([basis.ranks for basis in self.bases.values()])
        if not ranks.size:
            return f"Subspaces(0 heads, roles {' '.join(self.roles)}, d_model {self.d_model})"
        low, high = int(ranks.min()), int(ranks.max())
        span = f"{low}" if low == high else f"{low} to {high}"
        return (
            f"Subspaces({len(self)} heads, roles {' '.join(self.roles)}, "
            f"d_model {self.d_model}, ranks {span})"
        )


@dataclass(frozen=True, eq=False)
class Calibration(_Frozen):
    """What a null law says of every pair of a similarity.

    Every array has the shape of the similarity's values and is NaN where they are.

    Attributes
    ----------
    null : str
        Name of the null law.
    side : {"two", "upper", "lower"}
        Which deviations count as evidence.
    score : ndarray, float32
        The similarity before calibration.
    z : ndarray, float32
        Deviation from the expectation in units of the null's standard deviation.
    log10_p : ndarray, float64
        Decimal logarithm of the p-value, which may lie below the smallest float.
    q : ndarray, float64
        Smallest false discovery rate at which the pair is called.
    ratio, excess : ndarray, float32
        Effect sizes: the score divided by its expectation, and the score minus it.
    """

    null: str
    side: str
    score: NDArray[np.float32]
    z: NDArray[np.float32]
    log10_p: NDArray[np.float64]
    q: NDArray[np.float64]
    ratio: NDArray[np.float32]
    excess: NDArray[np.float32]

    def take(self, rows: NDArray[np.int64]) -> Calibration:
        """The calibration of some of the rows."""
        parts = {name: getattr(self, name)[rows] for name in ("score", *CALIBRATED)}
        return replace(self, **parts)


#: Units in which the strongest pairs have the smallest values.
_SMALL_IS_STRONG = ("log10_p", "q")
_SUBSPACES = ("row_subspaces", "column_subspaces")

#: What calibration knows of every pair, in the order in which tables list it.
CALIBRATED = ("z", "log10_p", "q", "ratio", "excess")


@dataclass(frozen=True, eq=False)
class Similarity(_Frozen):
    """Similarities of heads (rows) to reference heads (columns), one layer of values per pair kind.

    A pair kind names the role of the row head and the role of the column head: ``"OQ"`` compares
    what the row head writes with what the column head's queries read. Indexing selects rows.

    Attributes
    ----------
    values : ndarray of shape (n_rows, n_columns, n_pairs), float32
        NaN where the pair is undefined: against the layer order, or a head with itself in one role.
    pairs : tuple of str
    rows, columns : DataFrame
        Heads tables.
    unit : str
        What the numbers are, such as ``"pk"``.
    record : mapping
        How the weights were processed.
    d_model : int
    row_ranks, column_ranks : ndarray of shape (n_rows, n_pairs), (n_columns, n_pairs), int64
    null_mean, null_sd : ndarray, broadcastable to `values`
        Expectation and standard deviation between independent random subspaces; NaN if unknown.
    row_subspaces, column_subspaces : Subspaces or None
        What was compared, while it is at hand: a part of a similarity, or one that was pickled,
        does not carry subspaces that can be read again.
    calibration : Calibration or None
        What a null law says of every pair; set by `NullCalibrator`.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
    >>> similarity
    Similarity(16 x 16 heads, pairs OQ OK OV, unit pk)
    >>> similarity.to_frame().shape
    (192, 4)
    """

    values: NDArray[np.float32]
    pairs: tuple[str, ...]
    rows: pd.DataFrame
    columns: pd.DataFrame
    unit: str
    record: Mapping[str, Any]
    d_model: int
    row_ranks: NDArray[np.int64]
    column_ranks: NDArray[np.int64]
    null_mean: NDArray[np.float64]
    null_sd: NDArray[np.float64]
    row_subspaces: Subspaces | None = None
    column_subspaces: Subspaces | None = None
    calibration: Calibration | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the 2-D feature matrix, ``(n_rows, n_pairs * n_columns)``."""
        return len(self.rows), len(self.pairs) * len(self.columns)

    @property
    def row_labels(self) -> list[str]:
        """Labels of the row heads; a head that is also a column has one label for both."""
        return self._labels()[0]

    @property
    def column_labels(self) -> list[str]:
        """Labels of the column heads."""
        return self._labels()[1]

    def _labels(self) -> tuple[list[str], list[str]]:
        both = pd.concat([self.rows, self.columns])
        codes = np.concatenate(head_codes(self.rows, self.columns))
        _, first = np.unique(codes, return_index=True)
        names = np.asarray(head_labels(both.iloc[first]), dtype=object)
        return list(names[codes[: len(self.rows)]]), list(names[codes[len(self.rows) :]])

    @property
    def feature_names(self) -> list[str]:
        """Names of the 2-D features, such as ``"OQ:L4H7"``."""
        labels = head_labels(self.columns)
        return [f"{pair}:{label}" for pair in self.pairs for label in labels]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Similarity:
        rows = _row_positions(key, len(self))
        return replace(
            self,
            values=self.values[rows],
            rows=self.rows.iloc[rows],
            row_ranks=self.row_ranks[rows],
            null_mean=_take_rows(self.null_mean, rows),
            null_sd=_take_rows(self.null_sd, rows),
            row_subspaces=_only_copies(self.row_subspaces, rows),
            calibration=None if self.calibration is None else self.calibration.take(rows),
        )

    def __getstate__(self) -> dict[str, Any]:
        sides = {name: _only_copies(getattr(self, name)) for name in _SUBSPACES}
        return super().__getstate__() | sides

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("Similarity: its 2-D feature matrix is always a new array")
        filled = np.where(np.isnan(self.values), self.null_mean, self.values)
        flat = filled.transpose(0, 2, 1).reshape(self.shape)
        return np.asarray(flat, dtype=np.float32 if dtype is None else dtype)

    def pair(self, pair: str) -> pd.DataFrame:
        """Values of one pair kind as a table of row labels by column labels.

        Parameters
        ----------
        pair : str
            One of `pairs`.

        Returns
        -------
        DataFrame of shape (n_rows, n_columns)

        Raises
        ------
        HeadShapeError
            If the similarity lacks the pair kind.
        """
        values = self.values[:, :, self._position(pair)]
        return pd.DataFrame(values, index=self.row_labels, columns=self.column_labels)

    def _position(self, pair: str) -> int:
        if pair not in self.pairs:
            raise HeadShapeError(f"Similarity holds the pairs {' '.join(self.pairs)}, not {pair!r}")
        return self.pairs.index(pair)

    def listed(self, pair: str) -> NDArray[np.float32]:
        """Values of one pair kind with every pair that must not be listed set to NaN.

        A pair kind of one role compared among the same heads is symmetric; each unordered pair is
        then listed once.

        Parameters
        ----------
        pair : str
            One of `pairs`.

        Returns
        -------
        ndarray of shape (n_rows, n_columns), float32
        """
        values = self.values[:, :, self._position(pair)]
        return np.where(self._mirror(pair)[0], np.float32(np.nan), values)

    def fill_mirrored(self, pair: str, values: NDArray[np.floating]) -> NDArray[np.floating]:
        """Give pairs that `listed` leaves out the value of their mirror image.

        Parameters
        ----------
        pair : str
            One of `pairs`.
        values : ndarray of shape (n_rows, n_columns)
            Something known of the listed pairs.

        Returns
        -------
        ndarray of shape (n_rows, n_columns)
        """
        unlisted, rows, columns = self._mirror(pair)
        return np.where(unlisted, values[rows[None, :], columns[:, None]], values)

    def _mirror(self, pair: str) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """Which pairs are listed as their mirror image; rows of columns, columns of rows."""
        values = self.values[:, :, self._position(pair)]
        row_codes, column_codes = head_codes(self.rows, self.columns)
        n_codes = 1 + max(row_codes.max(initial=-1), column_codes.max(initial=-1))
        at_row, at_column = np.full((2, n_codes), -1)
        at_row[row_codes[::-1]] = np.arange(len(row_codes))[::-1]
        at_column[column_codes[::-1]] = np.arange(len(column_codes))[::-1]
        rows, columns = at_row[column_codes], at_column[row_codes]
        unlisted = np.zeros(values.shape, dtype=bool)
        if pair[0] == pair[1]:
            known = (rows[None, :] >= 0) & (columns[:, None] >= 0)
            later = row_codes[:, None] > column_codes[None, :]
            unlisted = known & later & ~np.isnan(values[rows[None, :], columns[:, None]])
        return unlisted, rows, columns

    def to_frame(self) -> pd.DataFrame:
        """Every defined pair as a row: ``pair``, ``source``, ``target``, ``score``."""
        parts = []
        for pair in self.pairs:
            values = self.listed(pair)
            rows, columns = np.nonzero(~np.isnan(values))
            parts.append(self._edges(pair, rows, columns))
        return pd.concat(parts, ignore_index=True)

    def top_pairs(self, k: int = 20) -> pd.DataFrame:
        """The `k` strongest of every pair kind, with their ``rank`` from 1; ties in table order.

        The strongest have the largest values, or the smallest where these are log10 p or q.

        Parameters
        ----------
        k : int, default=20
            Pairs of each kind; all of them where there are fewer.

        Returns
        -------
        DataFrame
            Columns ``pair``, ``rank``, ``source``, ``target``, ``score``.

        Raises
        ------
        ValueError
            If `k` is not a positive integer.
        """
        if int(k) != k or k < 1:
            raise ValueError(f"Similarity.top_pairs: k must be a positive integer, got {k!r}")
        falling = -1.0 if self.unit in _SMALL_IS_STRONG else 1.0
        parts = []
        for pair in self.pairs:
            rows, columns = largest_entries(falling * self.listed(pair), int(k))
            edges = self._edges(pair, rows, columns)
            edges.insert(1, "rank", np.arange(1, len(edges) + 1))
            parts.append(edges)
        return pd.concat(parts, ignore_index=True)

    def _edges(
        self, pair: str, rows: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> pd.DataFrame:
        source = np.asarray(self.row_labels, dtype=object)[rows]
        target = np.asarray(self.column_labels, dtype=object)[columns]
        at = (rows, columns, self._position(pair))
        table = {"pair": pair, "source": source, "target": target, "score": self.values[at]}
        if self.calibration is not None:
            table["score"] = self.calibration.score[at]
            table |= {name: getattr(self.calibration, name)[at] for name in CALIBRATED}
        return pd.DataFrame(table)

    def to_graph(self, k: int = 20) -> networkx.MultiDiGraph:
        """Wiring graph of the `k` largest pairs of every kind; see `skhead.wiring_graph`.

        Parameters
        ----------
        k : int, default=20
            Edges of each pair kind.

        Returns
        -------
        networkx.MultiDiGraph
        """
        from skhead.graph import wiring_graph

        return wiring_graph(self, k)

    def plot(self, pair: str | None = None, ax: Any = None) -> Any:
        """Draw the similarity as a matrix; see `skhead.inspection.SimilarityDisplay`.

        Parameters
        ----------
        pair : str, optional
            Which pair kind; may be left out when there is only one.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        SimilarityDisplay
        """
        from skhead.inspection import SimilarityDisplay

        return SimilarityDisplay.from_similarity(self, pair=pair, ax=ax)

    def __repr__(self) -> str:
        return (
            f"Similarity({len(self.rows)} x {len(self.columns)} heads, "
            f"pairs {' '.join(self.pairs)}, unit {self.unit})"
        )


def head_codes(
    rows: pd.DataFrame, columns: pd.DataFrame
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers that are equal for equal heads, by source, layer and head.

    Parameters
    ----------
    rows, columns : DataFrame
        Heads tables.

    Returns
    -------
    row_codes, column_codes : ndarray of shape (n_rows,), (n_columns,), int64
        In order of first appearance, rows first.
    """
    both = pd.concat([rows[_HEAD], columns[_HEAD]], ignore_index=True)
    codes = both.groupby(_HEAD, sort=False).ngroup().to_numpy().astype(np.int64)
    return codes[: len(rows)], codes[len(rows) :]


def _only_copies(
    subspaces: Subspaces | None, rows: NDArray[np.int64] | None = None
) -> Subspaces | None:
    """Subspaces that exist nowhere else, of all heads or of some."""
    if subspaces is None or subspaces.rereadable:
        return None
    return subspaces if rows is None else subspaces[rows]


def _row_positions(key: Any, n_rows: int) -> NDArray[np.int64]:
    """Positions that an integer, slice, mask or list of positions selects."""
    if isinstance(key, tuple) and len(key) == 2 and key[1] is Ellipsis:
        key = key[0]
    if isinstance(key, int | np.integer):
        key = [key]
    if not isinstance(key, slice):
        whole = not isinstance(key, tuple) and key is not None
        key = np.asarray(key if whole else "not an index")
        if key.size == 0 and key.ndim == 1:
            key = key.astype(np.int64)
        mask = key.dtype.kind == "b" and len(key) == n_rows
        if key.ndim != 1 or not (mask or key.dtype.kind in "iu"):
            raise IndexError(
                f"heads are selected by an integer, a slice, a mask of length {n_rows} or a list "
                "of positions; for labels use .heads.index.get_indexer or .rows.index.get_indexer"
            )
    return np.arange(n_rows)[key]


def _take_rows(values: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    return values if values.shape[0] == 1 else values[rows]
