"""Similarities of whole models, computed once and cut for every fold and candidate."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from joblib import Memory
from joblib import hash as joblib_hash
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.utils._set_output import _get_output_config
from sklearn.utils.validation import check_is_fitted

from skhead import __version__
from skhead._estimators import SkheadEstimator
from skhead._progress import reports_fit
from skhead._tags import HeadEstimatorTags, HeadTags, declare
from skhead.containers import Similarity, feature_names, head_codes
from skhead.exceptions import HeadTableError
from skhead.weights import check_heads, load_heads

__all__ = ["WholeModelSimilarity"]


class WholeModelSimilarity(TransformerMixin, SkheadEstimator):
    """A kernel computed once between all heads of the models, of which folds are parts.

    The similarity of two heads does not depend on which other heads are in the training fold. This
    wraps a kernel, or a pipeline that ends with one, computes it for all heads of the models that
    the table names, and hands out rows and columns. With `memory`, candidates of a grid search that
    differ only in later steps, and all their folds, share one computation; nothing but the
    numbers is stored.

    Parameters
    ----------
    estimator : estimator
        Kernel, or pipeline of `SubspaceExtractor` and a kernel, that takes a heads table. What is
        learned from training heads, such as `NullCalibrator`, belongs behind this step.
    memory : str, path-like, joblib.Memory or None, default=None
        Where similarities are kept. None computes them at every fit.

    Attributes
    ----------
    reference_heads_ : DataFrame
        Heads table of the fitted heads, which become the columns.
    pairs_ : tuple of str
        Pair kinds that are computed.

    Notes
    -----
    As with a pipeline's ``memory=``, what is stored is found again by the address of the model, not
    by its weights: clear the directory after weights changed under the same path. Weights of models
    larger than the memory that the kernel is given are streamed, but all pairs of heads are held
    at once.

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> kernel = skhead.ProjectionKernel(pairs=["KK"], layer_order="all")
    >>> whole = skhead.WholeModelSimilarity(kernel).fit(heads[::2])
    >>> whole.transform(heads[1::2])
    Similarity(8 x 8 heads, pairs KK, unit pk)
    """

    def __init__(
        self, estimator: Any, memory: str | os.PathLike[str] | Memory | None = None
    ) -> None:
        self.estimator = estimator
        self.memory = memory

    @reports_fit
    def fit(self, X: pd.DataFrame, y: Any = None) -> WholeModelSimilarity:
        """Remember the reference heads, and compute the similarities of their models.

        Parameters
        ----------
        X : DataFrame
            Heads table.
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        HeadTableError
            If X is no heads table.
        ValueError
            If the estimator makes no similarities, or calibrated ones.
        """
        self.reference_heads_ = check_heads(X, type(self).__name__)
        self._whole = self._of_models(list(dict.fromkeys(self.reference_heads_["source"])))
        self.pairs_ = self._whole.pairs
        return self

    def transform(self, X: pd.DataFrame) -> Any:
        """Similarities of heads to the reference heads.

        Parameters
        ----------
        X : DataFrame
            Heads table.

        Returns
        -------
        Similarity
            Or a DataFrame of its 2-D form, after ``set_output(transform="pandas")``.

        Raises
        ------
        HeadTableError
            If X is no heads table, or names a head that its model does not have.
        """
        check_is_fitted(self)
        rows = check_heads(X, type(self).__name__)
        sources = dict.fromkeys([*self.reference_heads_["source"], *rows["source"]])
        known = set(self._whole.rows["source"])
        whole = self._whole if set(sources) <= known else self._of_models(list(sources))
        found = self._cut(whole, rows)
        wanted = _get_output_config("transform", self)["dense"]
        return found.to_features() if wanted == "pandas" else found

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

    def __sklearn_tags__(self) -> HeadEstimatorTags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        return declare(tags, HeadTags(("table",)))

    def _of_models(self, sources: Sequence[str]) -> Similarity:
        memory = self.memory
        if not isinstance(memory, Memory):
            memory = Memory(None if memory is None else os.fspath(memory), verbose=0)
        name = type(self).__name__
        if not hasattr(self.estimator, "fit_transform"):
            raise ValueError(
                f"{name}: estimator must be a kernel or a pipeline that ends with one, got "
                f"{type(self.estimator).__name__}"
            )
        compute = memory.cache(_similarity_of_models, ignore=["estimator"])
        key = json.dumps({"recipe": _recipe_of(self.estimator), "sources": sources})
        found = compute(clone(self.estimator), key)
        if not isinstance(found, Similarity) or found.calibration is not None:
            what = "calibrated similarities" if isinstance(found, Similarity) else type(found)
            raise ValueError(
                f"{name}: estimator must make the plain Similarity of a kernel, got {what}; put "
                "steps that learn from the training heads behind this one"
            )
        return found

    def _cut(self, whole: Similarity, rows: pd.DataFrame) -> Similarity:
        sides = [self._places(whole, heads) for heads in (rows, self.reference_heads_)]
        means = [
            value[_where(value, 0, sides[0])][:, _where(value, 1, sides[1])]
            for value in (whole.null_mean, whole.null_sd)
        ]
        return replace(
            whole,
            values=whole.values[np.ix_(*sides)],
            rows=rows,
            columns=self.reference_heads_,
            row_ranks=whole.row_ranks[sides[0]],
            column_ranks=whole.column_ranks[sides[1]],
            null_mean=means[0],
            null_sd=means[1],
            row_subspaces=None,
            column_subspaces=None,
        )

    def _places(self, whole: Similarity, heads: pd.DataFrame) -> NDArray[np.int64]:
        """Row of the whole similarity for every head."""
        codes, given = head_codes(whole.rows, heads)
        unknown = np.flatnonzero(given >= len(codes))
        if len(unknown):
            row = heads.iloc[unknown[0]]
            raise HeadTableError(
                f"{type(self).__name__}: row L{row['layer']}H{row['head']} of the heads table does "
                f"not exist in {row['source']}. Make the table again with load_heads."
            )
        return given


def _where(value: NDArray[np.float64], axis: int, places: NDArray[np.int64]) -> Any:
    """Index into an array that may be broadcast along an axis."""
    return slice(None) if value.shape[axis] == 1 else places


def _recipe_of(estimator: BaseEstimator) -> list[str]:
    """Everything that decides what an estimator computes, as a text.

    joblib's hash of equal estimators differs between processes, since it depends on which of their
    strings are one object.
    """
    parts = {"": type(estimator), **estimator.get_params(deep=True)}
    texts = [f"skhead {__version__}"]
    for name, value in sorted(parts.items()):
        if isinstance(value, type | BaseEstimator):
            kind = value if isinstance(value, type) else type(value)
            texts.append(f"{name}: {kind.__module__}.{kind.__qualname__}")
        elif isinstance(value, np.ndarray):
            texts.append(f"{name} = {joblib_hash(value)}")
        elif name.split("__")[-1] == "steps" and isinstance(value, list):
            texts.append(f"{name} = {[step for step, _ in value]!r}")
        else:
            texts.append(f"{name} = {value!r}")
    return texts


def _similarity_of_models(estimator: Any, key: str) -> Any:
    """Compare all heads of the models with each other; the key tells the estimator's recipe too."""
    sources = json.loads(key)["sources"]
    heads = load_heads(sources if len(sources) > 1 else sources[0])
    found = estimator.fit_transform(heads)
    if not isinstance(found, Similarity):
        return found
    return replace(found, row_subspaces=None, column_subspaces=None)
