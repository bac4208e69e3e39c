"""What flows between estimators: subspaces of heads, and similarities between heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray

from skhead.exceptions import HeadShapeError
from skhead.linalg.topk import largest_entries
from skhead.weights import head_labels

if TYPE_CHECKING:
    import networkx

__all__ = ["RoleBases", "Similarity", "Subspaces"]


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
        low, high = int(ranks.min()), int(ranks.max())
        span = f"{low}" if low == high else f"{low} to {high}"
        return (
            f"Subspaces({len(self)} heads, roles {' '.join(self.roles)}, "
            f"d_model {self.d_model}, ranks {span})"
        )


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

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the 2-D feature matrix, ``(n_rows, n_pairs * n_columns)``."""
        return len(self.rows), len(self.pairs) * len(self.columns)

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
        )

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
        return pd.DataFrame(values, index=head_labels(self.rows), columns=head_labels(self.columns))

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
        if pair[0] == pair[1] and self.rows.equals(self.columns):
            mirrored = np.tril(np.ones(values.shape, dtype=bool), -1) & ~np.isnan(values.T)
            values = np.where(mirrored, np.float32(np.nan), values)
        return values

    def to_frame(self) -> pd.DataFrame:
        """Every defined pair as a row: ``pair``, ``source``, ``target``, ``score``."""
        parts = []
        for pair in self.pairs:
            values = self.listed(pair)
            rows, columns = np.nonzero(~np.isnan(values))
            parts.append(self._edges(pair, rows, columns))
        return pd.concat(parts, ignore_index=True)

    def top_pairs(self, k: int = 20) -> pd.DataFrame:
        """The `k` largest of every pair kind, with their ``rank`` from 1; ties in table order.

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
        parts = []
        for pair in self.pairs:
            rows, columns = largest_entries(self.listed(pair), int(k))
            edges = self._edges(pair, rows, columns)
            edges.insert(1, "rank", np.arange(1, len(edges) + 1))
            parts.append(edges)
        return pd.concat(parts, ignore_index=True)

    def _edges(
        self, pair: str, rows: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> pd.DataFrame:
        source = np.asarray(head_labels(self.rows), dtype=object)[rows]
        target = np.asarray(head_labels(self.columns), dtype=object)[columns]
        scores = self.values[rows, columns, self._position(pair)]
        return pd.DataFrame({"pair": pair, "source": source, "target": target, "score": scores})

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


def _row_positions(key: Any, n_rows: int) -> NDArray[np.int64]:
    """Positions that an index, slice, mask or array of positions selects."""
    if isinstance(key, tuple) and len(key) == 2 and key[1] is Ellipsis:
        key = key[0]
    if isinstance(key, int | np.integer):
        key = [key]
    return np.arange(n_rows)[key if isinstance(key, slice) else _as_positions(key)]


def _as_positions(key: ArrayLike | Sequence[int]) -> NDArray[Any]:
    positions = np.asarray(key)
    return positions.astype(np.int64) if positions.size == 0 else positions


def _take_rows(values: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    return values if values.shape[0] == 1 else values[rows]
