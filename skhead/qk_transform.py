"""Transformers of scikit-learn applied to the queries and keys of pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import TransformerMixin, clone
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from skhead._estimators import SkheadEstimator
from skhead._progress import reports_fit
from skhead._tags import HeadEstimatorTags, HeadTags, declare
from skhead.exceptions import HeadShapeError
from skhead.qk_pairs import QKPairs

__all__ = ["QKTransformer"]

_AS_IT_IS = "passthrough"


class QKTransformer(  # type: ignore[call-arg]
    TransformerMixin, SkheadEstimator, auto_wrap_output_keys=None
):
    """Apply one transformer to queries and one to keys, so that `QKPairs` go through a pipeline.

    Labels, contexts and names stay as they are.

    Parameters
    ----------
    queries, keys : transformer, "passthrough" or None, default=None
        Transformers of arrays, cloned before they are fitted; None is a ``StandardScaler()``.

    Attributes
    ----------
    queries_, keys_ : transformer or None
        The fitted ones.
    n_features_in_ : int
        d_head.

    See Also
    --------
    ContrastiveQKDecomposer : Whose ``whiten="qk"`` also makes it invariant to scale.

    Notes
    -----
    What comes out has other scores ``q @ k`` than the model. Fits that are to be compared with the
    model's attention are made on the queries and keys as they are.

    Examples
    --------
    >>> import skhead
    >>> from sklearn.pipeline import make_pipeline
    >>> from skhead.datasets import load_payload_head, make_contrast_pairs
    >>> pairs = make_contrast_pairs("z1", 2000, head=load_payload_head("d16-r3-r5"), random_state=0)
    >>> model = make_pipeline(skhead.QKTransformer(), skhead.ContrastiveQKDecomposer())
    >>> float(model.fit(pairs).score(pairs)) > 0.9
    True
    """

    def __init__(self, queries: Any = None, keys: Any = None) -> None:
        self.queries = queries
        self.keys = keys

    def __sklearn_tags__(self) -> HeadEstimatorTags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        return declare(tags, HeadTags(("pairs",)))

    @reports_fit
    def fit(self, X: QKPairs, y: Any = None) -> QKTransformer:
        """Fit one transformer on the queries and one on the keys.

        Parameters
        ----------
        X : QKPairs
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        TypeError
            If X is no `QKPairs`.
        """
        self._check(X)
        self.queries_ = _fitted(self.queries, X.queries)
        self.keys_ = _fitted(self.keys, X.keys)
        self.n_features_in_ = X.d_head
        return self

    def transform(self, X: QKPairs) -> QKPairs:
        """Transform queries and keys.

        Parameters
        ----------
        X : QKPairs

        Returns
        -------
        QKPairs

        Raises
        ------
        HeadShapeError
            If d_head is another than the fitted one, or queries and keys come out with different
            widths.
        """
        check_is_fitted(self, "queries_")
        self._check(X)
        if X.d_head != self.n_features_in_:
            raise HeadShapeError(
                f"{type(self).__name__}: was fitted on d_head {self.n_features_in_}, and these "
                f"pairs have {X.d_head}"
            )
        queries, keys = (
            values if fitted is None else np.asarray(fitted.transform(values))
            for fitted, values in ((self.queries_, X.queries), (self.keys_, X.keys))
        )
        return replace(X, queries=queries, keys=keys)

    def _check(self, X: Any) -> None:
        if not isinstance(X, QKPairs):
            raise TypeError(
                f"{type(self).__name__}: takes QKPairs, got {type(X).__name__}; a transformer of "
                "arrays can stand in the pipeline itself"
            )


def _fitted(transformer: Any, values: Any) -> Any:
    if isinstance(transformer, str) and transformer == _AS_IT_IS:
        return None
    return (StandardScaler() if transformer is None else clone(transformer)).fit(values)
