"""Affinities of heads to classes, as features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import TransformerMixin
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import check_is_fitted

from skhead._base import check_option
from skhead._callers import warn_user
from skhead._classes import Targets, open_targets
from skhead._estimators import SkheadEstimator
from skhead._progress import reports_fit
from skhead._tags import HeadEstimatorTags, HeadTags, declare
from skhead.containers import Similarity, head_codes, similarity_in
from skhead.exceptions import HeadShapeError, ProvenanceMismatchError
from skhead.stats.affinity import AGGREGATES, affinity_weights, class_affinity

__all__ = ["ClassAffinity"]

#: Share of undefined affinities beyond which there is a warning.
_UNDEFINED_SHARE = 0.1


class ClassAffinity(TransformerMixin, SkheadEstimator):
    """How similar a head is to the training heads of each class, by each pair kind.

    `fit_transform` leaves every training head out of its own class, so that its affinities are
    measured as those of a new head are; `transform` compares with all training heads. As with
    target encoding, the two differ on the training heads.

    Parameters
    ----------
    aggregate : {"mean", "max", "topk"}, default="mean"
        Mean similarity to the members of the class, the largest, or the mean of the `k` largest.
    k : int, default=3
        For "topk".
    contrast : bool, default=True
        Subtract the mean similarity to the training heads outside the class, the unclassed ones
        among them.
    none_label : str, default="None"
        The label of heads without a class; it gets no affinity.
    rare : {"raise", "none"}, default="raise"
        Refuse a class with a single training head, or count that head as unclassed with a warning.
        Such a column of a multilabel indicator is always refused.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Classes that have an affinity.
    affinity_ : DataFrame of shape (n_heads, n_classes * n_pairs)
        Of the training heads, each left out of its own class; columns (class, pair).
    pairs_ : tuple of str

    See Also
    --------
    HeadClassifier : Takes similarities directly, and predicts.

    Notes
    -----
    Where fewer-is-closer numbers come in (p-values, distances), their sign is changed. A pair that
    is undefined is left out of means; an affinity without any defined pair takes the mean of the
    training heads.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> similarity = skhead.ProjectionKernel(pairs=["QQ", "KK"], layer_order="all")
    >>> layer = heads["layer"].map({0: "early", 1: "late"})
    >>> affinity = skhead.ClassAffinity().fit(similarity.fit_transform(heads), layer)
    >>> affinity.get_feature_names_out().tolist()
    ['early:QQ', 'early:KK', 'late:QQ', 'late:KK']
    """

    def __init__(
        self,
        aggregate: str = "mean",
        k: int = 3,
        contrast: bool = True,
        none_label: str = "None",
        rare: str = "raise",
    ) -> None:
        self.aggregate = aggregate
        self.k = k
        self.contrast = contrast
        self.none_label = none_label
        self.rare = rare

    @reports_fit
    def fit(self, X: Similarity, y: Any) -> ClassAffinity:
        """Remember which reference heads belong to which class.

        Parameters
        ----------
        X : Similarity
            The training heads compared with each other.
        y : array-like of shape (n_heads,) or (n_heads, n_classes)
            Class of each row of X, or a multilabel indicator, whose columns are classes.

        Returns
        -------
        self

        Raises
        ------
        HeadShapeError
            If X is no similarity of heads with each other.
        ValueError
            If labels do not fit the heads, or a class is too small.
        """
        self._fit(X, y, type(self).__name__)
        return self

    @reports_fit
    def fit_transform(self, X: Similarity, y: Any) -> Any:
        """Affinities of the training heads, each left out of its own class.

        Parameters
        ----------
        X : Similarity
            The training heads compared with each other.
        y : array-like of shape (n_heads,) or (n_heads, n_classes)
            As for `fit`.

        Returns
        -------
        ndarray of shape (n_heads, n_classes * n_pairs)
            Or a DataFrame, after ``set_output(transform="pandas")``.
        """
        self._fit(X, y, type(self).__name__)
        return self._output(self.affinity_.to_numpy(), self.affinity_.index)

    def transform(self, X: Similarity) -> Any:
        """Affinities of heads to the training heads of each class.

        Parameters
        ----------
        X : Similarity
            Any heads compared with the training heads, as the fitted kernel does.

        Returns
        -------
        ndarray of shape (n_heads, n_classes * n_pairs)
            Or a DataFrame, after ``set_output(transform="pandas")``. A head that is among the
            training heads is not compared with itself.

        Raises
        ------
        ProvenanceMismatchError
            If X was compared with other heads, by other pairs, in another unit, or comes from
            weights processed in another way.
        """
        check_is_fitted(self)
        similarity = self._compared(X, type(self).__name__)
        return self._output(self._affinities(similarity), pd.Index(similarity.row_labels))

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the affinities, such as ``"Induction:QQ"``.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        ndarray of shape (n_classes * n_pairs,)
        """
        check_is_fitted(self)
        names = [f"{c}:{pair}" for c in self.classes_ for pair in self.pairs_]
        return np.asarray(names, dtype=object)

    def __sklearn_tags__(self) -> HeadEstimatorTags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.two_d_array = False
        return declare(tags, HeadTags(("similarity",)))

    def _fit(self, given: Any, y: Any, name: str) -> Targets:
        check_option("aggregate", self.aggregate, AGGREGATES, name)
        X = similarity_in(given)
        if X is None:
            raise HeadShapeError(
                f"{name}: expected a Similarity of the training heads with each other, got "
                f"{type(given).__name__}; put ProjectionKernel or a sibling in front"
            )
        rows, columns = _codes_of_training(X, name)
        targets = open_targets(y, len(X), self.none_label, self.rare, X.row_labels, name)
        self.classes_ = targets.classes[targets.named]
        self.pairs_ = X.pairs
        row_of = {code: row for row, code in enumerate(rows)}
        of_columns = np.array([row_of[code] for code in columns])
        self._members = targets.members[np.ix_(of_columns, targets.named)]
        self._reference, self._record, self._unit = X.columns, dict(X.record), X.unit
        self._training = replace(X, row_subspaces=None, column_subspaces=None)
        found = self._raw(X)
        self._warn_of_undefined(found, name)
        never = np.isnan(found).all(axis=0)
        self._undefined = np.nanmean(np.where(never, 0.0, found), axis=0)
        columns_of = pd.MultiIndex.from_product(
            [self.classes_, self.pairs_], names=["class", "pair"]
        )
        self.affinity_ = pd.DataFrame(self._filled(found), X.row_labels, columns_of)
        return targets

    def _raw(self, X: Similarity) -> NDArray[np.float64]:
        found = class_affinity(
            _rising(X), self._members, _own(X), self.aggregate, self.k, self.contrast
        )
        return found.reshape(len(X), len(self.classes_) * len(self.pairs_))

    def _affinities(self, X: Similarity) -> NDArray[np.float64]:
        return self._filled(self._raw(X))

    def _filled(self, found: NDArray[np.float64]) -> NDArray[np.float64]:
        """Affinities with the mean of the training heads in place of those that are undefined."""
        return np.where(np.isnan(found), self._undefined, found)

    def _warn_of_undefined(self, found: NDArray[np.float64], name: str) -> None:
        share = float(np.isnan(found).mean()) if found.size else 0.0
        if share > _UNDEFINED_SHARE:
            warn_user(
                f"{name}: {share:.0%} of the affinities of the training heads are undefined, and "
                "tell nothing of their heads. A kernel with layer_order='forward' compares a head "
                "with later layers only: use layer_order='all', and pairs of one role (QQ, KK, VV, "
                "OO)"
            )

    def _warn_of_strangers(self, X: Similarity, name: str) -> None:
        strange = [s for s in X.rows["source"].unique() if s not in set(self._reference["source"])]
        if strange and (X.rows["layer"] >= 0).all() and X.unit != "spectrum":
            warn_user(
                f"{name}: {strange[0]} is not among the models of the training heads. Directions "
                "of two models have nothing in common unless one was trained from the other; "
                "across models, use features without a basis (CircuitScorer)"
            )

    def _compared(self, given: Any, name: str) -> Similarity:
        """The similarity of heads to the training heads, or why it is none."""
        X = similarity_in(given)
        if X is None:
            raise HeadShapeError(
                f"{name}: was fitted on a Similarity, and this is a {type(given).__name__}; "
                "compare the heads with the training heads by the same fitted kernel"
            )
        codes, expected = head_codes(X.columns, self._reference)
        if not np.array_equal(codes, expected):
            raise ProvenanceMismatchError(
                f"{name}: was fitted on similarities to {len(self._reference)} training heads, and "
                f"these are to {len(X.columns)} others or in another order; use the kernel that "
                "was fitted on the training heads"
            )
        for what, fitted, found in (
            ("pairs", self.pairs_, X.pairs),
            ("unit", self._unit, X.unit),
            ("record", self._record, dict(X.record)),
        ):
            if fitted != found:
                raise ProvenanceMismatchError(
                    f"{name}: was fitted on similarities of {what} {fitted!r}, and these have "
                    f"{found!r}; use the same steps for both"
                )
        self._warn_of_strangers(X, name)
        return X

    def _output(self, values: NDArray[np.float64], index: pd.Index) -> Any:
        if _get_output_config("transform", self)["dense"] != "pandas":
            return values
        return pd.DataFrame(values, index, self.get_feature_names_out())

    def _explain(
        self, X: Similarity, row: int, class_name: Any, weights: NDArray[np.float64] | None
    ) -> pd.DataFrame:
        """One line for every similarity that counts in the affinity of one head to one class."""
        c = self.classes_.tolist().index(class_name)
        one = X[[row]]
        counted = affinity_weights(
            _rising(one), self._members[:, c], _own(one), self.aggregate, self.k, self.contrast
        )[0]
        columns, pairs = np.nonzero(counted)
        table = {
            "reference": np.asarray(one.column_labels, dtype=object)[columns],
            "pair": np.asarray(self.pairs_, dtype=object)[pairs],
            "member": self._members[columns, c],
            "similarity": one.values[0, columns, pairs],
        }
        share = counted[columns, pairs] * _rising(one)[0, columns, pairs]
        if weights is not None:
            table["contribution"] = share * weights[pairs]
        else:
            table["affinity"] = share
        return pd.DataFrame(table)


def _codes_of_training(X: Similarity, caller: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of rows and of columns, which must be the same heads."""
    rows, columns = head_codes(X.rows, X.columns)
    strangers = np.flatnonzero(~np.isin(columns, rows))
    if len(strangers):
        label = X.column_labels[strangers[0]]
        raise HeadShapeError(
            f"{caller}: reference head {label} is not among the rows, so that its class is not "
            "known; fit on the training heads compared with each other (fit_transform of the "
            "kernel), and give transform any others"
        )
    missing = np.flatnonzero(~np.isin(rows, columns))
    if len(missing):
        label = X.row_labels[missing[0]]
        raise HeadShapeError(
            f"{caller}: training head {label} is not among the reference heads; fit the kernel and "
            "the classifier on the same heads"
        )
    return rows, columns


def _own(X: Similarity) -> NDArray[np.bool_]:
    rows, columns = head_codes(X.rows, X.columns)
    return np.asarray(rows[:, None] == columns[None, :])


def _rising(X: Similarity) -> NDArray[np.float64]:
    """Values that are large for similar heads."""
    return np.asarray(X.values if X.large_is_similar else -X.values, dtype=np.float64)
