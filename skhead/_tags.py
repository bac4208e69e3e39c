"""What an estimator of heads declares about itself, beside scikit-learn's own tags."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sklearn.utils import Tags

__all__ = ["DOORS", "INVARIANCES", "HeadEstimatorTags", "HeadTags", "declare"]

#: Forms in which heads, or what was made of them, come into an estimator.
DOORS = ("table", "roles", "stack", "subspaces", "similarity", "matrix", "pairs")
#: Changes of the weights that may leave a result as it is.
INVARIANCES = ("rotation", "head_rotation", "gauge", "scale")


@dataclass(frozen=True)
class HeadTags:
    """What an estimator of heads takes, and what its results do not depend on.

    Attributes
    ----------
    doors : tuple of str
        Forms of X, the preferred one first: "table" (a heads table), "roles" (a stack ``(n_heads,
        4, d_model, d_head)``), "stack" (``(n_heads, d_model, d_head)``), "subspaces", "similarity",
        "matrix" (2-D features), "pairs" (`QKPairs`).
    invariant_to : tuple of str
        What leaves results as they are: "rotation" of the residual stream that all heads share;
        "head_rotation", an orthogonal change of basis of each head space; "gauge", any invertible
        change of basis that leaves ``W_Q W_K^T`` and ``W_V W_O`` as they are; "scale", a positive
        factor on each matrix.
    one_model : bool
        Whether all heads must be of one model, such as where its tokens are read.
    any_width : bool
        Whether heads may have another d_model than those fitted.

    Examples
    --------
    >>> from skhead.base import HeadTags
    >>> HeadTags(doors=("table", "stack"), invariant_to=("rotation",)).one_model
    False
    """

    doors: tuple[str, ...] = ("table", "stack")
    invariant_to: tuple[str, ...] = ()
    one_model: bool = False
    any_width: bool = False

    def __post_init__(self) -> None:
        for name, given, known in (
            ("doors", self.doors, DOORS),
            ("invariant_to", self.invariant_to, INVARIANCES),
        ):
            unknown = [value for value in given if value not in known]
            if unknown:
                raise ValueError(
                    f"HeadTags: {name} holds {unknown[0]!r}; it may hold {', '.join(known)}"
                )


@dataclass
class HeadEstimatorTags(Tags):
    """scikit-learn's tags of an estimator, and `HeadTags`.

    Attributes
    ----------
    head_tags : HeadTags
    """

    head_tags: HeadTags = HeadTags()


def declare(tags: Tags, head_tags: HeadTags) -> HeadEstimatorTags:
    """scikit-learn's tags with what an estimator of heads declares, for ``__sklearn_tags__``.

    Parameters
    ----------
    tags : Tags
        From ``super().__sklearn_tags__()``.
    head_tags : HeadTags

    Returns
    -------
    Tags
        With the field ``head_tags``.

    Examples
    --------
    >>> from sklearn.base import BaseEstimator
    >>> from skhead.base import HeadTags, declare
    >>> class Reader(BaseEstimator):
    ...     def __sklearn_tags__(self):
    ...         return declare(super().__sklearn_tags__(), HeadTags(doors=("table",)))
    >>> Reader().__sklearn_tags__().head_tags.doors
    ('table',)
    """
    known = {field.name: getattr(tags, field.name) for field in fields(Tags)}
    return HeadEstimatorTags(**known, head_tags=head_tags)
