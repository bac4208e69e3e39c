"""What estimators of attention heads are built on, for those who write their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from skhead._base import (
    ANONYMOUS,
    ROLES,
    HeadEstimator,
    check_option,
    check_processable,
    open_door,
)
from skhead._compared import refuse_zero
from skhead._tags import HeadTags, declare
from skhead.linalg.stacks import expand
from skhead.weights import head_labels

__all__ = [
    "HeadEstimator",
    "HeadMatrices",
    "HeadTags",
    "declare",
    "validate_heads",
]


class HeadMatrices(NamedTuple):
    """One matrix of every head, and which heads they are.

    Attributes
    ----------
    matrices : Tensor of shape (n_heads, d_model, d_head)
        In residual coordinates, float32 or wider.
    heads : DataFrame
        Heads table.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead import LinearCKA
    >>> from skhead.base import validate_heads
    >>> found = validate_heads(LinearCKA(), np.ones((3, 8, 2)), "O", reset=True)
    >>> tuple(found.matrices.shape), len(found.labels)
    ((3, 8, 2), 3)
    """

    matrices: torch.Tensor
    heads: pd.DataFrame

    @property
    def labels(self) -> list[str]:
        """Labels of the heads, such as ``"L4H7"``."""
        return list(head_labels(self.heads))


def validate_heads(
    estimator: HeadEstimator,
    X: Any,
    role: str,
    *,
    reset: bool,
    fold_norm: bool = False,
    center: bool = False,
    device: str | torch.device | None = None,
) -> HeadMatrices:
    """Open X, check it, and read one matrix of every head.

    What ``sklearn.utils.validation.validate_data`` is to matrices of features. Errors name the
    estimator and the head.

    Parameters
    ----------
    estimator : HeadEstimator
        Gets ``d_model_`` when it is fitted.
    X : DataFrame, or array or Tensor of shape (n_heads, d_model, d_head)
        Heads table; matrices of one role, which are taken as they are; or ``(n_heads, 4, d_model,
        d_head)`` holding W_Q, W_K, W_V and W_O transposed.
    role : {"Q", "K", "V", "O"}
        Which matrix.
    reset : bool
        True in ``fit``, which sets ``d_model_``; False in ``transform``, which compares with it.
    fold_norm : bool, default=False
        As for `SubspaceExtractor`.
    center : bool, default=False
        As for `SubspaceExtractor`.
    device : str, torch.device or None, default=None
        Where the matrices go; None means the input's device, or the GPU if there is one.

    Returns
    -------
    HeadMatrices
        A named tuple ``(matrices, heads)``.

    Raises
    ------
    HeadTableError, HeadShapeError
        If X is no heads table or stack, or of another d_model than fitted.
    DegenerateHeadError
        If a matrix is zero, or holds NaN or infinite values.
    ValueError
        If the role is unknown, or a stack is to be processed as only a model's weights can be.

    Examples
    --------
    >>> import skhead
    >>> from skhead.base import HeadEstimator, validate_heads
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> validate_heads(HeadEstimator(), heads, "O", reset=True).matrices.shape
    torch.Size([16, 128, 16])
    """
    name = type(estimator).__name__
    check_option("role", role, tuple(ROLES), name)
    source = open_door(X, name)
    check_processable(source, name, fold_norm=fold_norm, center=center)
    if reset:
        estimator.d_model_ = source.d_model
    else:
        estimator._check_width(source.d_model)
    read_as = ANONYMOUS if source.anonymous else role
    read = source.read(read_as, fold_norm=fold_norm, center=center, device=device)
    matrices = expand(read.tensor, read.index)
    zero = np.asarray((matrices == 0).flatten(1).all(1).cpu())
    refuse_zero(zero, source.heads, read_as, name)
    return HeadMatrices(matrices, source.heads)
