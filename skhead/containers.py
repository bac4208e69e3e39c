"""What flows between estimators: subspaces of heads, and similarities between heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from skhead._calibrated import CALIBRATED, Calibration
from skhead._checks import check_count
from skhead._frozen import Frozen, row_positions
from skhead._html import ShowsSummary, Summary
from skhead._similarity_summary import reference_law, similarity_summary
from skhead.exceptions import HeadShapeError
from skhead.linalg.topk import largest_entries
from skhead.subspaces import RoleBases, Subspaces
from skhead.weights import head_labels

if TYPE_CHECKING:
    import networkx

__all__ = [
    "CALIBRATED",
    "SMALL_IS_STRONG",
    "Calibration",
    "RoleBases",
    "Similarity",
    "Subspaces",
    "feature_names",
    "head_codes",
    "reference_law",
    "similarity_in",
]

_HEAD = ["source", "layer", "head"]


#: Units in which the strongest pairs have the smallest values.
SMALL_IS_STRONG = ("log10_p", "q", "distance")
_SUBSPACES = ("row_subspaces", "column_subspaces")

#: Where a data frame keeps the similarity of which it is the features.
_ORIGIN = "skhead.similarity"


@dataclass(frozen=True, eq=False)
class Similarity(ShowsSummary, Frozen):
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
    def large_is_similar(self) -> bool:
        """Whether similar heads have large values; p-values and distances are small for them."""
        return self.unit.split("/")[0] not in SMALL_IS_STRONG

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
        return feature_names(self.pairs, self.columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Similarity:
        rows = row_positions(key, len(self))
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

    def to_features(self) -> pd.DataFrame:
        """The 2-D feature matrix with names, which still knows the similarity that it came from.

        Returns
        -------
        DataFrame of shape (n_rows, n_pairs * n_columns)
            Row labels and `feature_names`; the similarity in ``attrs``, where estimators of skhead
            find it again.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
        >>> similarity.to_features().shape
        (16, 48)
        """
        frame = pd.DataFrame(np.asarray(self), self.rows.index, self.feature_names)
        frame.attrs[_ORIGIN] = self
        return frame

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

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
        >>> similarity.pair("OK").loc["L0H0", "L1H1"].round(1).item()
        13.0
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

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> import numpy as np
        >>> similarity = skhead.ProjectionKernel(["KK"], layer_order="all").fit_transform(heads)
        >>> int(np.count_nonzero(~np.isnan(similarity.listed("KK"))))
        120
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

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> similarity = skhead.ProjectionKernel(["KK"], layer_order="all").fit_transform(heads)
        >>> once = similarity.listed("KK")
        >>> both = similarity.fill_mirrored("KK", once)
        >>> bool((both[0, 1] == both[1, 0]) and (both[0, 1] == once[0, 1]))
        True
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
        middle = len(pair) // 2
        if pair[:middle] == pair[middle:]:
            known = (rows[None, :] >= 0) & (columns[:, None] >= 0)
            later = row_codes[:, None] > column_codes[None, :]
            unlisted = known & later & ~np.isnan(values[rows[None, :], columns[:, None]])
        return unlisted, rows, columns

    def to_frame(self) -> pd.DataFrame:
        """Every defined pair as a row: ``pair``, ``source``, ``target``, ``score``.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
        >>> similarity.to_frame().columns.tolist()
        ['pair', 'source', 'target', 'score']
        """
        parts = []
        for pair in self.pairs:
            values = self.listed(pair)
            rows, columns = np.nonzero(~np.isnan(values))
            parts.append(self._edges(pair, rows, columns))
        return pd.concat(parts, ignore_index=True)

    def top_pairs(self, k: int = 20) -> pd.DataFrame:
        """The `k` strongest of every pair kind, with their ``rank`` from 1; ties in table order.

        The strongest have the largest values, or the smallest of p-values and distances.

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

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
        >>> similarity.top_pairs(1)[["pair", "source", "target"]].iloc[1].tolist()
        ['OK', 'L0H0', 'L1H1']
        """
        k = check_count("k", k, "Similarity.top_pairs")
        falling = 1.0 if self.large_is_similar else -1.0
        parts = []
        for pair in self.pairs:
            rows, columns = largest_entries(falling * self.listed(pair), k)
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

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
        >>> similarity.to_graph(5).number_of_edges()
        15
        """
        from skhead.graph import wiring_graph

        return wiring_graph(self, k)

    def to_transformer_lens(self, pair: str | None = None) -> Any:
        """One pair kind as the result that TransformerLens has for it.

        Parameters
        ----------
        pair : str, optional
            Which pair kind; may be left out when there is only one.

        Returns
        -------
        HeadAffinityResult or CompositionScores
            The first, of ``transformer_lens.tools.analysis.projection_kernel``, for projection
            kernels; the second, as from ``TransformerBridge.all_composition_scores``, for
            composition scores. Undefined pairs are 0, and those of kernels masked.

        Raises
        ------
        ValueError
            If the numbers are in another unit, or the ranks of a role differ.
        HeadShapeError, HeadTableError
            If the pair kind is missing or not named, or heads do not fill the layers of one model.
        ImportError
            If transformer_lens is not installed.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
        >>> result = similarity.to_transformer_lens("OK")
        >>> result.top_pairs(1)[0].source.label
        'L0H0'
        """
        from skhead._lens_exchange import to_transformer_lens

        return to_transformer_lens(self, pair)

    @classmethod
    def from_transformer_lens(
        cls,
        result: Any,
        heads: pd.DataFrame,
        pair: str | None = None,
        *,
        fold_norm: bool = False,
        center: bool = False,
    ) -> Similarity:
        """A result of TransformerLens as a similarity.

        Parameters
        ----------
        result : HeadAffinityResult or CompositionScores
            From ``attention_head_subspace_affinity`` or ``all_composition_scores``.
        heads : DataFrame
            Heads table of the model that was analysed; the result names neither model nor width.
        pair : str, optional
            Pair kind, which `CompositionScores` do not know; needed for them alone.
        fold_norm : bool, default=False
            Whether TransformerLens had folded norms into the weights.
        center : bool, default=False
            Whether it had centred them.

        Returns
        -------
        Similarity
            Heads that share keys or values have equal numbers.

        Raises
        ------
        TypeError
            If it is no such result.
        HeadTableError
            If the heads are not those of the result.
        ValueError
            If `pair` is missing or wrong.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> result = skhead.ProjectionKernel().fit_transform(heads).to_transformer_lens("OK")
        >>> skhead.Similarity.from_transformer_lens(result, heads)
        Similarity(16 x 16 heads, pairs OK, unit pk)
        """
        from skhead._lens_exchange import similarity_parts

        record = {"fold_norm": fold_norm, "center": center}
        return cls(**similarity_parts(result, heads, pair, record))

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

        Examples
        --------
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> similarity = skhead.ProjectionKernel().fit_transform(heads)
        >>> similarity.plot("OK").ax_.get_title()
        'OK'
        """
        from skhead.inspection import SimilarityDisplay

        return SimilarityDisplay.from_similarity(self, pair=pair, ax=ax)

    def _summary(self) -> Summary:
        return similarity_summary(self)

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


def feature_names(pairs: Sequence[str], columns: pd.DataFrame) -> list[str]:
    """Names of 2-D features, such as ``"OQ:L4H7"``: pair kinds in turn, column heads in each."""
    labels = head_labels(columns)
    return [f"{pair}:{label}" for pair in pairs for label in labels]


def similarity_in(X: Any) -> Similarity | None:
    """The similarity that X is, or that a data frame of all its features came from.

    Parameters
    ----------
    X : object

    Returns
    -------
    Similarity or None
        None for anything else, and for a data frame whose values were changed or selected.
    """
    if isinstance(X, Similarity):
        return X
    origin = X.attrs.get(_ORIGIN) if isinstance(X, pd.DataFrame) else None
    if not isinstance(origin, Similarity) or X.shape != origin.shape:
        return None
    return origin if np.array_equal(X.to_numpy(), np.asarray(origin)) else None


def _only_copies(
    subspaces: Subspaces | None, rows: NDArray[np.int64] | None = None
) -> Subspaces | None:
    """Subspaces that exist nowhere else, of all heads or of some."""
    if subspaces is None or subspaces.rereadable:
        return None
    return subspaces if rows is None else subspaces[rows]


def _take_rows(values: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    return values if values.shape[0] == 1 else values[rows]
