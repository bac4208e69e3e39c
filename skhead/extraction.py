"""From heads to the subspaces that they read from and write to."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from skhead._base import (
    ANONYMOUS,
    ROLES,
    Cache,
    HeadEstimator,
    HeadInput,
    check_processable,
    extract_subspaces,
    open_door,
    parse_bytes,
)
from skhead._devices import check_device
from skhead._progress import reports_fit
from skhead._tags import HeadTags
from skhead.containers import Subspaces
from skhead.exceptions import HeadShapeError

__all__ = ["SubspaceExtractor"]


class SubspaceExtractor(HeadEstimator, auto_wrap_output_keys=None):  # type: ignore[call-arg]
    """Orthonormal bases of the column spaces of W_Q, W_K, W_V and W_O^T, head by head.

    All bases lie in residual coordinates, so that what one head writes (role O) can be held against
    what another reads (roles Q, K, V). The rank of every head is measured, and heads of unequal
    rank are normal: a singular value counts if it is above the rounding of the stored entries (see
    `skhead.linalg.bases.rank_tolerance`).

    Parameters
    ----------
    roles : str, default="QKVO"
        Which roles to extract from a heads table. A bare stack has one role, called "X".
    rank : int, float or None, default=None
        ``None`` keeps the whole column space; an int keeps at most so many leading singular
        directions; a float in (0, 1) keeps the fewest that hold this share of the squared Frobenius
        norm.
    fold_norm : bool, default=False
        Fold the gain of the norm in front of the head (and after it, where there is one) into the
        weights.
    center : bool, default=False
        Subtract from every residual vector of the weights its mean over d_model.
    device : str, torch.device or None, default=None
        Where to compute; None means the input's device, or the GPU if there is one.
    cache : str, path-like or None, default=None
        Directory in which the bases of a heads table are kept as files, for models whose bases do
        not fit into memory. Bases that are there are not computed again, whether they come from
        this run, an interrupted one or another process; those of weights that have changed since,
        or of other parameters, are never used. None keeps all bases in memory.
    max_memory : int or str, default="1GiB"
        With a cache, the memory that computing the bases may take, beside the heads table. The
        heads of a layer that takes more are processed in groups.

    Attributes
    ----------
    d_model_ : int
        Dimension of the residual stream.
    roles_ : tuple of str
        Roles that are extracted.

    See Also
    --------
    ProjectionKernel : Compares the subspaces.

    References
    ----------
    .. [1] H. Yamagiwa, Y. Takase and H. Shimodaira, arXiv:2601.10266 (2026).

    Examples
    --------
    >>> import skhead
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> skhead.SubspaceExtractor(roles="OK", rank=0.9).fit_transform(heads).roles
    ('O', 'K')
    """

    head_tags = HeadTags(
        ("table", "roles", "stack"), invariant_to=("head_rotation", "gauge", "scale")
    )

    def __init__(
        self,
        roles: str = "QKVO",
        rank: int | float | None = None,
        fold_norm: bool = False,
        center: bool = False,
        device: str | torch.device | None = None,
        cache: str | os.PathLike[str] | None = None,
        max_memory: int | str = "1GiB",
    ) -> None:
        self.roles = roles
        self.rank = rank
        self.fold_norm = fold_norm
        self.center = center
        self.device = device
        self.cache = cache
        self.max_memory = max_memory

    @reports_fit
    def fit(self, X: Any, y: Any = None) -> SubspaceExtractor:
        """Check the heads and remember their width; nothing else is learned.

        Parameters
        ----------
        X : DataFrame, or array or Tensor of shape (n_heads, d_model, d_head)
            Heads table or stack; a stack of shape (n_heads, 4, d_model, d_head) holds W_Q, W_K, W_V
            and W_O transposed.
        y : ignored

        Returns
        -------
        self
        """
        self._fit(X)
        return self

    def _fit(self, X: Any) -> HeadInput:
        source = open_door(X, type(self).__name__)
        check_device(self.device, type(self).__name__)
        self._check_rank(int(source.heads["d_head"].iloc[0]))
        self.roles_ = self._roles_of(source)
        self.d_model_ = source.d_model
        return source

    def transform(self, X: Any) -> Subspaces:
        """Bases of the heads.

        Parameters
        ----------
        X : DataFrame, or array or Tensor
            As for `fit`, of the same d_model.

        Returns
        -------
        Subspaces
        """
        check_is_fitted(self)
        source = open_door(X, type(self).__name__)
        self._check_width(source.d_model)
        if self._roles_of(source) != self.roles_:
            raise HeadShapeError(
                f"{type(self).__name__}: was fitted on roles {' '.join(self.roles_)}, but these "
                f"heads come as roles {' '.join(self._roles_of(source))}; use one kind of input "
                "for both"
            )
        return self._extract(source)

    @reports_fit
    def fit_transform(self, X: Any, y: Any = None) -> Subspaces:
        """Fit and transform in one pass; see `fit` and `transform`.

        Parameters
        ----------
        X : DataFrame, or array or Tensor of shape (n_heads, d_model, d_head)
            As for `fit`.
        y : ignored

        Returns
        -------
        Subspaces
        """
        return self._extract(self._fit(X))

    def set_output(self, *, transform: str | None = None) -> SubspaceExtractor:
        """Do nothing: subspaces have no tabular form, and the next step needs the container.

        Parameters
        ----------
        transform : ignored

        Returns
        -------
        self
        """
        return self

    def _extract(self, source: HeadInput) -> Subspaces:
        return extract_subspaces(
            source,
            self.roles_,
            rank=self.rank if self.rank is None or self.rank < 1 else int(self.rank),
            fold_norm=self.fold_norm,
            center=self.center,
            device=check_device(self.device, type(self).__name__),
            caller=type(self).__name__,
            cache=self._open_cache(),
        )

    def _open_cache(self) -> Cache | None:
        name = type(self).__name__
        max_memory = parse_bytes(self.max_memory, name)
        if self.cache is None:
            return None
        if not isinstance(self.cache, str | os.PathLike) or not os.fspath(self.cache):
            raise ValueError(f"{name}: cache must be None or a directory; got {self.cache!r}")
        return Cache(self.cache, max_memory)

    def _roles_of(self, source: HeadInput) -> tuple[str, ...]:
        name = type(self).__name__
        check_processable(source, name, fold_norm=self.fold_norm, center=self.center)
        if source.stacks is not None and self.cache is not None:
            raise ValueError(
                f"{name}: cache keeps the bases of a model that is read from files; a stack is in "
                "memory already, so leave cache=None"
            )
        if source.anonymous:
            return (ANONYMOUS,)
        roles = tuple(self.roles) if np.iterable(self.roles) else ()
        if not roles or len(set(roles)) != len(roles) or not set(roles) <= set(ROLES):
            raise ValueError(
                f"{name}: roles must be distinct letters of 'QKVO', got {self.roles!r}"
            )
        return roles

    def _check_rank(self, d_head: int) -> None:
        rank = self.rank
        if rank is None:
            return
        name = type(self).__name__
        if isinstance(rank, bool) or not isinstance(rank, int | float | np.number):
            raise ValueError(f"{name}: rank must be None, an int or a float; got {rank!r}")
        whole = isinstance(rank, int | np.integer)
        if whole and not 1 <= rank <= d_head:
            raise ValueError(
                f"{name}: rank={rank} must lie between 1 and the head dimension {d_head}"
            )
        if not whole and not 0 < rank < 1:
            raise ValueError(
                f"{name}: a float rank is a share of the squared norm and must lie strictly "
                f"between 0 and 1; got {rank!r} (use None for the whole space)"
            )
