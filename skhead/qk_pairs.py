"""Queries and keys of one head, and which key agrees with its query on which feature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from skhead._checks import label_array
from skhead._frozen import Frozen, row_positions
from skhead._html import Listing, ShowsSummary, Summary, span
from skhead.exceptions import HeadShapeError

__all__ = ["QKPairs", "pair_kinds"]

_HINT = "; each brings its keys along"


@dataclass(frozen=True, eq=False)
class QKPairs(ShowsSummary, Frozen):
    """Queries of an attention head with the keys that they choose from, labelled by feature.

    A sample is a query, together with all keys of its context: ``len``, indexing, cross-validation
    and grid search count queries, so that the keys of a query never part. A key agrees with its
    query on a feature where their labels are equal (a positive pair), and differs where they are
    not (a negative pair); where either label is missing the pair does not count.

    Parameters
    ----------
    queries : array of shape (n_queries, d_head)
        As they enter the dot product: behind rotary positions and query norms.
    keys : array of shape (n_keys, d_head)
        Of all contexts, in any order.
    query_index : array of shape (n_keys,), int
        The query in whose context each key stands.
    query_labels : array of shape (n_queries,) or (n_queries, n_features)
        What a query looks for, a column per feature. None or NaN is a missing label.
    key_labels : array of shape (n_keys,) or (n_keys, n_features)
        What a key is.
    key_groups : array of shape (n_keys,) or (n_keys, n_features), or None, default=None
        Nuisance stratum of each key, for example the values of all other features. Pairs are then
        only contrasted among keys of one context and one group.
    features : sequence of str, default=()
        Names of the features; if empty "feature", or "feature_0" onwards.
    head : str, default=""
        Label of the head, such as ``"L16H19"``.
    scale : float or None, default=None
        What the model multiplies ``q @ k`` with; ``1 / sqrt(d_head)`` by default.
    query_names, key_names : array of str or None, default=None
        Texts of the tokens, for displays.

    Attributes
    ----------
    queries : ndarray of shape (n_queries, d_head), float32 or float64
    keys : ndarray of shape (n_keys, d_head), float32 or float64
    query_index : ndarray of shape (n_keys,), int64
    query_labels : ndarray of shape (n_queries, n_features)
    key_labels : ndarray of shape (n_keys, n_features)
    key_groups : ndarray of shape (n_keys, n_features) or None
    features : tuple of str
    head : str
    scale : float
    query_names, key_names : ndarray or None

    Raises
    ------
    HeadShapeError
        If queries and keys have different widths, or other shapes do not fit.
    ValueError
        If labels have the wrong length, or a key belongs to no query.

    Examples
    --------
    Two queries, of which the first chooses from three keys and the second from two.

    >>> import numpy as np
    >>> import skhead
    >>> rng = np.random.default_rng(0)
    >>> pairs = skhead.QKPairs(
    ...     rng.normal(size=(2, 4)),
    ...     rng.normal(size=(5, 4)),
    ...     query_index=[0, 0, 0, 1, 1],
    ...     query_labels=["fruit", "animal"],
    ...     key_labels=["fruit", "animal", "animal", "animal", "fruit"],
    ... )
    >>> pairs
    QKPairs(2 queries, 5 keys, d_head 4, feature: 2 positive, 3 negative)
    >>> len(pairs[[1]].keys)
    2
    """

    queries: NDArray[np.floating]
    keys: NDArray[np.floating]
    query_index: NDArray[np.int64]
    query_labels: NDArray[Any]
    key_labels: NDArray[Any]
    key_groups: NDArray[Any] | None = None
    features: tuple[str, ...] = ()
    head: str = ""
    scale: Any = None
    query_names: NDArray[Any] | None = None
    key_names: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        queries, keys = _matrix(self.queries, "queries"), _matrix(self.keys, "keys")
        if queries.shape[1] != keys.shape[1]:
            raise HeadShapeError(
                f"QKPairs: queries have d_head {queries.shape[1]} and keys {keys.shape[1]}; they "
                "must be those of one head (repeat grouped keys for each query head)"
            )
        dtype = np.result_type(queries, keys)
        queries, keys = queries.astype(dtype, copy=False), keys.astype(dtype, copy=False)
        index = _index(self.query_index, len(queries), len(keys))
        query_labels = _columns(self.query_labels, len(queries), "query_labels", "queries")
        key_labels = _columns(self.key_labels, len(keys), "key_labels", "keys")
        if query_labels.shape[1] != key_labels.shape[1]:
            raise ValueError(
                f"QKPairs: query_labels have {query_labels.shape[1]} features and key_labels "
                f"{key_labels.shape[1]}; give both a column for each feature"
            )
        n_features = key_labels.shape[1]
        values = {
            "queries": queries,
            "keys": keys,
            "query_index": index,
            "query_labels": query_labels,
            "key_labels": key_labels,
            "key_groups": self._groups(len(keys), n_features),
            "features": _feature_names(self.features, n_features),
            "scale": queries.shape[1] ** -0.5 if self.scale is None else float(self.scale),
            "query_names": _names(self.query_names, len(queries), "query_names"),
            "key_names": _names(self.key_names, len(keys), "key_names"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _groups(self, n_keys: int, n_features: int) -> NDArray[Any] | None:
        if self.key_groups is None:
            return None
        groups = _columns(self.key_groups, n_keys, "key_groups", "keys")
        if groups.shape[1] not in (1, n_features):
            raise ValueError(
                f"QKPairs: key_groups have {groups.shape[1]} columns; give one for all features, "
                f"or one for each of the {n_features}"
            )
        return np.broadcast_to(groups, (n_keys, n_features))

    @classmethod
    def from_pairs(
        cls,
        Q_pos: Any,
        K_pos: Any,
        Q_neg: Any,
        K_neg: Any,
        *,
        feature: str = "feature",
        head: str = "",
        scale: float | None = None,
    ) -> QKPairs:
        """Pairs of which the negatives have queries of their own, as counterfactual prompts give.

        Parameters
        ----------
        Q_pos, K_pos : array of shape (n_pos, d_head)
            Row i of both is a pair that agrees on the feature.
        Q_neg, K_neg : array of shape (n_neg, d_head)
            Row i of both is a pair that differs.
        feature : str, default="feature"
            Name of the feature.
        head : str, default=""
            Label of the head.
        scale : float or None, default=None
            What the model multiplies ``q @ k`` with.

        Returns
        -------
        QKPairs
            Every pair a query with one key; positives first.

        Raises
        ------
        HeadShapeError
            If the rows do not pair up.
        """
        parts = [_matrix(a, n) for n, a in zip(_PARTS, (Q_pos, K_pos, Q_neg, K_neg), strict=True)]
        for first, second, names in ((0, 1, "Q_pos and K_pos"), (2, 3, "Q_neg and K_neg")):
            if parts[first].shape != parts[second].shape:
                raise HeadShapeError(
                    f"QKPairs: {names} must have one shape, row i of both being a pair; got "
                    f"{parts[first].shape} and {parts[second].shape}"
                )
        n_pos, n_neg = len(parts[0]), len(parts[2])
        return cls(
            np.concatenate([parts[0], parts[2]]),
            np.concatenate([parts[1], parts[3]]),
            np.arange(n_pos + n_neg),
            np.ones(n_pos + n_neg, dtype=np.int8),
            np.repeat(np.array([1, 0], dtype=np.int8), [n_pos, n_neg]),
            features=(feature,),
            head=head,
            scale=scale,
        )

    @property
    def d_head(self) -> int:
        """Width of queries and keys."""
        return int(self.queries.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix of queries, ``(n_queries, d_head)``."""
        return len(self.queries), self.d_head

    @property
    def agreement(self) -> NDArray[np.int8]:
        """Kind of every pair, ``(n_keys, n_features)``: 1 positive, 0 negative, -1 not counted."""
        return pair_kinds(self.query_labels[self.query_index], self.key_labels)

    def with_query_labels(self, labels: Any) -> QKPairs:
        """The same pairs, for queries that look for something else.

        Parameters
        ----------
        labels : array of shape (n_queries,) or (n_queries, n_features)

        Returns
        -------
        QKPairs

        Raises
        ------
        ValueError
            If there are not as many labels as queries, or not as many features.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> pairs = task.pairs(head).feature("z1")
        >>> pairs.with_query_labels([0] * len(pairs))
        QKPairs(d16-r3-r5: 500 queries, 8000 keys, d_head 16, z1: 980 positive, 7020 negative)
        """
        return replace(self, query_labels=labels)

    def feature(self, name: str) -> QKPairs:
        """The same pairs with one of the features only.

        Parameters
        ----------
        name : str
            One of ``features``.

        Returns
        -------
        QKPairs

        Raises
        ------
        ValueError
            If there is no such feature.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> task.pairs(head).feature("z1").features
        ('z1',)
        """
        if name not in self.features:
            raise ValueError(f"QKPairs: has the features {', '.join(self.features)}, not {name!r}")
        at = [self.features.index(name)]
        return replace(
            self,
            query_labels=self.query_labels[:, at],
            key_labels=self.key_labels[:, at],
            key_groups=None if self.key_groups is None else self.key_groups[:, at],
            features=(name,),
        )

    def logits(self) -> NDArray[np.floating]:
        """Attention scores of all pairs before the softmax, ``scale * q @ k``, ``(n_keys,)``.

        Examples
        --------
        >>> import skhead
        >>> from skhead.datasets import load_payload_head, make_payload_retrieval
        >>> head = load_payload_head("d16-r3-r5")
        >>> task = make_payload_retrieval(500, embeddings=head.embeddings, random_state=0)
        >>> task.pairs(head).logits().shape
        (8000,)
        """
        return self.scale * np.einsum("nd,nd->n", self.queries[self.query_index], self.keys)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, key: Any) -> QKPairs:
        rows = row_positions(key, len(self), "queries", _HINT)
        order = np.argsort(self.query_index, kind="stable")
        counts = np.bincount(self.query_index, minlength=len(self))
        ends = np.cumsum(counts)
        taken = counts[rows]
        within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        keys = order[np.repeat((ends - counts)[rows], taken) + within]
        return replace(
            self,
            queries=self.queries[rows],
            keys=self.keys[keys],
            query_index=np.repeat(np.arange(len(rows)), taken),
            query_labels=self.query_labels[rows],
            key_labels=self.key_labels[keys],
            key_groups=None if self.key_groups is None else self.key_groups[keys],
            query_names=None if self.query_names is None else self.query_names[rows],
            key_names=None if self.key_names is None else self.key_names[keys],
        )

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("QKPairs: as an array it is a copy of its queries")
        return np.array(self.queries, dtype=dtype)

    def _summary(self) -> Summary:
        n_keys = np.bincount(self.query_index, minlength=len(self))
        facts = {
            "head": self.head or "not named",
            "queries": f"{len(self):,}",
            "keys": f"{len(self.keys):,}, of a query {span(n_keys)}",
            "d_head": f"{self.d_head}",
            "scale": f"{self.scale:.4g}",
            "number format": str(self.queries.dtype),
            "groups": "none" if self.key_groups is None else "of every key and feature",
        }
        agreement = self.agreement
        counts = pd.DataFrame(
            {
                "feature": self.features,
                "positive": np.count_nonzero(agreement == 1, axis=0),
                "negative": np.count_nonzero(agreement == 0, axis=0),
                "not labelled": np.count_nonzero(agreement == -1, axis=0),
            }
        )
        return Summary(facts, [Listing("pairs of a query and a key", counts)])

    def __repr__(self) -> str:
        agreement = self.agreement
        counted = "; ".join(
            f"{name}: {np.count_nonzero(agreement[:, i] == 1)} positive, "
            f"{np.count_nonzero(agreement[:, i] == 0)} negative"
            for i, name in enumerate(self.features)
        )
        of = f"{self.head}: " if self.head else ""
        return (
            f"QKPairs({of}{len(self)} queries, {len(self.keys)} keys, d_head {self.d_head}, "
            f"{counted})"
        )


def pair_kinds(asked: NDArray[Any], found: NDArray[Any]) -> NDArray[np.int8]:
    """Kind of pairs by their labels: 1 where they agree, 0 where not, -1 where one is missing."""
    kinds = np.asarray(asked == found).astype(np.int8)
    kinds[pd.isna(asked) | pd.isna(found)] = -1
    return kinds


_PARTS = ("Q_pos", "K_pos", "Q_neg", "K_neg")


def _matrix(values: Any, name: str) -> NDArray[np.floating]:
    """Queries or keys as a 2-D array of 32 or 64 bits."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values if values.element_size() >= 4 else values.float()).numpy()
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind not in "fiu":
        raise HeadShapeError(
            f"QKPairs: {name} must be real numbers of shape (n, d_head), got shape {array.shape} "
            f"of {array.dtype}"
        )
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    return array


def _index(values: Any, n_queries: int, n_keys: int) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.shape != (n_keys,) or (array.dtype.kind not in "iu" and n_keys):
        raise ValueError(
            f"QKPairs: query_index must be {n_keys} integers, one for each key, got shape "
            f"{array.shape} of {array.dtype}"
        )
    outside = (array < 0) | (array >= n_queries)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"QKPairs: key {at} belongs to query {int(array[at])}, and there are {n_queries} "
            "queries, counted from 0"
        )
    return array.astype(np.int64)


def _columns(values: Any, length: int, name: str, of: str) -> NDArray[Any]:
    """Labels as a column per feature."""
    array = label_array(values)
    if array.ndim not in (1, 2) or len(array) != length:
        raise ValueError(
            f"QKPairs: {name} must hold a label for each of the {length} {of}, with a column for "
            f"each feature where there are several; got shape {array.shape}"
        )
    if array.ndim == 2 and array.shape[1] == 0:
        raise ValueError(f"QKPairs: {name} have no feature; give at least one column")
    return array[:, None] if array.ndim == 1 else array


def _feature_names(features: Sequence[str], n_features: int) -> tuple[str, ...]:
    if not len(features):
        if n_features == 1:
            return ("feature",)
        return tuple(f"feature_{i}" for i in range(n_features))
    names = (features,) if isinstance(features, str) else tuple(str(name) for name in features)
    if len(names) != n_features or len(set(names)) != n_features:
        raise ValueError(
            f"QKPairs: features must be {n_features} distinct names, one for each column of "
            f"labels; got {names}"
        )
    return names


def _names(values: Any, length: int, name: str) -> NDArray[Any] | None:
    if values is None:
        return None
    array = np.asarray(values, dtype=object)
    if array.shape != (length,):
        raise ValueError(f"QKPairs: {name} must be {length} texts, got shape {array.shape}")
    return array
