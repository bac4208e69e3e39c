"""Similarities that fitted estimators make of heads, for displays."""

from __future__ import annotations

from typing import Any

from skhead.containers import Similarity, similarity_in
from skhead.exceptions import HeadShapeError

__all__ = ["similarity_of"]


def similarity_of(estimator: Any, X: Any, display: str) -> Similarity:
    """What a fitted estimator makes of heads.

    Raises
    ------
    HeadShapeError
        If it is no similarity.
    """
    found = estimator.transform(X)
    similarity = similarity_in(found)
    if similarity is None:
        raise HeadShapeError(
            f"{display}: {type(estimator).__name__} gives {type(found).__name__}, and a similarity "
            "is drawn; pass a kernel such as ProjectionKernel, a NullCalibrator, or a pipeline "
            "that ends with one"
        )
    return similarity
