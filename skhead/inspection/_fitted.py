"""Similarities that displays draw: of fitted estimators, and one pair kind of them."""

from __future__ import annotations

from typing import Any

from skhead.containers import Similarity, similarity_in
from skhead.exceptions import HeadShapeError

__all__ = ["checked_pair", "similarity_of"]


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


def checked_pair(similarity: Similarity, pair: str | None, display: str) -> str:
    """The pair kind that is named, or the only one there is.

    Raises
    ------
    HeadShapeError
        If the similarity lacks the pair kind, or has several and none is named.
    """
    held = f"{display}: the similarity holds {' '.join(similarity.pairs)}"
    if pair is None and len(similarity.pairs) > 1:
        raise HeadShapeError(
            f"{held}; say which one to draw, for example pair={similarity.pairs[0]!r}"
        )
    pair = similarity.pairs[0] if pair is None else pair
    if pair not in similarity.pairs:
        raise HeadShapeError(f"{held}, not {pair!r}")
    return pair
