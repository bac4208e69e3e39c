"""What all estimators share: the doors by which heads come in, devices, budgets, output policy."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import TransformerMixin

from skhead._devices import default_device, halved, naming_full_device
from skhead._estimators import SkheadEstimator
from skhead._progress import progress_bar, progress_fraction
from skhead._tags import HeadEstimatorTags, HeadTags, declare
from skhead.containers import RoleBases, Subspaces, head_codes
from skhead.exceptions import DegenerateHeadError, HeadShapeError, ProvenanceMismatchError
from skhead.linalg.bases import orthonormal_bases
from skhead.weights import (
    BasisRequest,
    CachedBases,
    Processing,
    RoleStack,
    cached_bases,
    check_heads,
    head_labels,
    read_role,
)

__all__ = [
    "Cache",
    "HeadEstimator",
    "HeadInput",
    "as_subspaces",
    "check_pairs",
    "check_processable",
    "check_same_record",
    "defined_pairs",
    "extract_subspaces",
    "free_dimension",
    "parse_bytes",
    "rank_scale",
]

ROLES = "QKVO"
#: The role of a stack that was brought without saying what its matrices are.
ANONYMOUS = "X"
#: The layer number of heads that have none.
NO_LAYER = -1

_FULL_REMEDY = "keep them in files with SubspaceExtractor(cache=...), or use device='cpu'"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


class HeadEstimator(TransformerMixin, SkheadEstimator):
    """Base of transformers whose samples are attention heads.

    Subclasses say in the class variable ``head_tags`` what they take and what their results do not
    depend on; `skhead.testing.check_head_estimator` holds them to it.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.base import HeadEstimator, HeadTags, validate_heads
    >>> class SquaredNorm(HeadEstimator):
    ...     head_tags = HeadTags(doors=("table", "stack"), invariant_to=("rotation",))
    ...
    ...     def fit(self, X, y=None):
    ...         validate_heads(self, X, "O", reset=True)
    ...         return self
    ...
    ...     def transform(self, X):
    ...         heads = validate_heads(self, X, "O", reset=False)
    ...         return heads.matrices.square().sum((1, 2)).numpy()[:, None]
    >>> SquaredNorm().fit_transform(np.ones((3, 8, 2))).ravel().tolist()
    [16.0, 16.0, 16.0]
    """

    head_tags: ClassVar[HeadTags] = HeadTags()
    d_model_: int

    def __sklearn_tags__(self) -> HeadEstimatorTags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.target_tags.required = False
        return declare(tags, self.head_tags)

    def _check_width(self, d_model: int) -> None:
        """Refuse heads of another model width than the fitted one."""
        if d_model != self.d_model_:
            raise HeadShapeError(
                f"{type(self).__name__}: was fitted on heads of d_model {self.d_model_}, "
                f"but these have d_model {d_model}; heads of different widths share no space"
            )


@dataclass(frozen=True)
class HeadInput:
    """Heads that came in by either door: a table to read from, or stacks already in memory.

    Attributes
    ----------
    heads : DataFrame
    stacks : mapping of str to Tensor, or None
        By role, at least float32; the caller's memory until `kept` copies it.
    eps : float
        Relative spacing of the format in which the stacks came.
    """

    heads: pd.DataFrame
    stacks: Mapping[str, torch.Tensor] | None
    eps: float = 0.0

    @property
    def d_model(self) -> int:
        """Dimension of the residual stream."""
        return int(self.heads["d_model"].iloc[0])

    @property
    def table(self) -> pd.DataFrame | None:
        """The heads table, if the weights can be read from it anywhere."""
        return self.heads if self.stacks is None else None

    @property
    def anonymous(self) -> bool:
        """Whether this is a stack of one role, which nobody named."""
        return self.stacks is not None and ANONYMOUS in self.stacks

    def kept(self) -> HeadInput:
        """The same heads in memory of their own, which the caller cannot change."""
        if self.stacks is None:
            return self
        copies = {role: stack.detach().clone() for role, stack in self.stacks.items()}
        return HeadInput(self.heads, copies, self.eps)

    def read(
        self,
        role: str,
        *,
        fold_norm: bool,
        center: bool,
        device: torch.device | str | None,
        opened: dict[str, Any] | None = None,
    ) -> RoleStack:
        """The matrices of one role, ``(n_distinct, d_model, d_head)``, with their index.

        Several roles are read with one dict of checkpoints that are `opened` by then.
        """
        if self.stacks is None:
            target = default_device() if device is None else device
            processed = {"fold_norm": fold_norm, "center": center}
            return read_role(self.heads, role, **processed, device=target, opened=opened)
        stack = self.stacks[role]
        stack = stack if device is None else stack.to(device)
        n_heads = len(stack)
        return RoleStack(stack, np.arange(n_heads, dtype=np.int64), np.full(n_heads, self.eps))

    def __getstate__(self) -> dict[str, Any]:
        stacks = None
        if self.stacks is not None:
            stacks = {role: stack.cpu().numpy() for role, stack in self.stacks.items()}
        return {"heads": self.heads, "stacks": stacks, "eps": self.eps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = state["stacks"]
        if arrays is not None:
            state["stacks"] = {role: torch.from_numpy(array) for role, array in arrays.items()}
        for name, value in state.items():
            object.__setattr__(self, name, value)


def open_door(X: Any, caller: str) -> HeadInput:
    """Heads from a heads table, a stack of one role, or a stack of all four.

    Parameters
    ----------
    X : DataFrame, array or Tensor
        A heads table; ``(n_heads, d_model, d_head)``; or ``(n_heads, 4, d_model, d_head)`` holding
        W_Q, W_K, W_V and W_O transposed, all in residual coordinates.
    caller : str
        Estimator to name in errors.

    Raises
    ------
    HeadTableError, HeadShapeError, DegenerateHeadError
        If the table or stack cannot be read as heads.
    """
    if isinstance(X, pd.DataFrame):
        return HeadInput(check_heads(X, caller), None)
    if isinstance(X, pd.Series):
        raise HeadShapeError(
            f"{caller}: expected a heads table, got a Series, which one row of a table is; keep "
            f"the table with two pairs of brackets, heads.loc[[{X.name!r}]]"
        )
    if isinstance(X, str):
        raise HeadShapeError(
            f"{caller}: expected a heads table, got the text {X!r}; list the heads of a model by "
            f"load_heads({X!r})"
        )
    stack = _as_tensor(X, caller)
    eps = torch.finfo(stack.dtype).eps
    stack = stack.to(torch.promote_types(stack.dtype, torch.float32))
    if stack.ndim == 4:
        stacks = {role: stack[:, i] for i, role in enumerate(ROLES)}
    else:
        stacks = {ANONYMOUS: stack}
    return HeadInput(_table_of_stack(stack), stacks, eps)


def check_processable(source: HeadInput, caller: str, **asked: bool) -> None:
    """Refuse to process a stack as only the weights of a model can be.

    Parameters
    ----------
    source : HeadInput
    caller : str
        Estimator or function to name in errors.
    **asked : bool
        The parameters by name.

    Raises
    ------
    ValueError
    """
    if source.stacks is not None and any(asked.values()):
        raise ValueError(
            f"{caller}: {' and '.join(asked)} need{'s' * (len(asked) == 1)} the model's norms; a "
            "stack has none, so pass a heads table or process the stack yourself"
        )


def _as_tensor(X: Any, caller: str) -> torch.Tensor:
    """A finite real stack as a tensor without history."""
    if not isinstance(X, torch.Tensor):
        X = _tensor_of_array(X, caller)
    if not X.dtype.is_floating_point and not X.dtype.is_complex:
        X = X.to(torch.float64)
    if X.dtype not in _DTYPES:
        raise HeadShapeError(
            f"{caller}: a stack must be real and of 16 bits or more, got {X.dtype}; convert it"
        )
    four_roles = X.ndim == 4 and X.shape[1] == len(ROLES)
    if not (X.ndim == 3 or four_roles) or 0 in X.shape:
        raise HeadShapeError(
            f"{caller}: a stack must have shape (n_heads, d_model, d_head), or (n_heads, 4, "
            "d_model, d_head) for Q, K, V, O, and hold at least one head; got shape "
            f"{tuple(X.shape)}"
        )
    bad = ~torch.isfinite(X).flatten(1).all(1)
    if bad.any():
        raise DegenerateHeadError(
            f"{caller}: head {int(bad.nonzero()[0])} of the stack holds NaN or infinite values; "
            "repair or remove it"
        )
    return X.detach()


def _tensor_of_array(X: Any, caller: str) -> torch.Tensor:
    expected = (
        f"{caller}: expected a heads table from load_heads, or a real numeric stack (n_heads, "
        "d_model, d_head); got"
    )
    try:
        array = np.asarray(X)
    except ValueError as error:
        raise HeadShapeError(f"{expected} a ragged {type(X).__name__} ({error})") from error
    if array.dtype.kind not in "fiu":
        raise HeadShapeError(f"{expected} {type(X).__name__} of dtype {array.dtype}")
    known = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    native = array.dtype.newbyteorder("=") if known else np.dtype(np.float64)
    return torch.from_numpy(np.require(array, dtype=native, requirements=["C", "W"]))


def _table_of_stack(stack: torch.Tensor) -> pd.DataFrame:
    """A heads table for matrices without a model.

    A head is recognised by its content, and equal ones by their order.
    """
    sources = [
        f"array:{hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=8).hexdigest()}"
        for row in stack.cpu().numpy()
    ]
    n_heads = len(sources)
    twins = pd.Series(sources).groupby(sources).cumcount().to_numpy()
    return pd.DataFrame(
        {
            "source": sources,
            "layer": NO_LAYER,
            "head": twins,
            "kv_head": twins,
            "n_layers": 0,
            "d_model": stack.shape[-2],
            "d_head": stack.shape[-1],
        },
        index=pd.Index([f"H{i}" for i in range(n_heads)], dtype=object),
    )


@dataclass(frozen=True)
class Cache:
    """Where bases are kept, and what computing them may take.

    Attributes
    ----------
    directory : path-like
    max_memory : int
        Bytes.
    """

    directory: str | os.PathLike[str]
    max_memory: int

    def bases(
        self,
        heads: pd.DataFrame,
        how: Processing,
        rank: int | float | None,
        device: torch.device | str | None,
        caller: str,
    ) -> CachedBases:
        """Bases of one role, computed where they are not there yet; see `cached_bases`."""
        target = default_device() if device is None else torch.device(device)
        request = BasisRequest(how, rank, target, self.max_memory, caller)
        with progress_fraction(f"{caller}: {how.role}") as progress:
            return cached_bases(heads, request, self.directory, progress)


def extract_subspaces(
    source: HeadInput,
    roles: Sequence[str],
    *,
    rank: int | float | None,
    fold_norm: bool,
    center: bool,
    device: torch.device | str | None,
    caller: str,
    cache: Cache | None = None,
) -> Subspaces:
    """Orthonormal bases of every head and role, in memory or in a cache.

    Raises
    ------
    DegenerateHeadError
        If a head's matrix is zero.
    """
    bases = {}
    opened: dict[str, Any] = {}
    for role in progress_bar(roles, "bases", unit="role"):
        if cache is not None:
            how = Processing(role, fold_norm, center)
            stored = cache.bases(source.heads, how, rank, device, caller)
            _refuse_zero(stored.ranks, stored.index, source.heads, role, caller)
            bases[role] = RoleBases(stored.stack, stored.ranks, stored.index)
            continue
        with naming_full_device(caller, f"the bases of role {role}", _FULL_REMEDY):
            read = source.read(
                role, fold_norm=fold_norm, center=center, device=device, opened=opened
            )
            found = orthonormal_bases(
                read.tensor,
                rank=rank,
                eps=torch.from_numpy(read.eps),
                overwrite=source.stacks is None,
                shrink=partial(halved, caller=caller, what="block of {} heads"),
            )
        ranks = found.ranks.cpu().numpy()
        _refuse_zero(ranks, read.index, source.heads, role, caller)
        bases[role] = RoleBases(found.vectors, ranks, read.index)
    record = {"fold_norm": fold_norm, "center": center, "rank": rank}
    return Subspaces(source.heads, bases, record)


def _refuse_zero(
    ranks: NDArray[np.int64], index: NDArray[np.int64], heads: pd.DataFrame, role: str, caller: str
) -> None:
    zero = np.flatnonzero(ranks[index] == 0)
    if zero.size:
        label = head_labels(heads)[zero[0]]
        name = f"W_{role}" if role in ROLES else "matrix"
        raise DegenerateHeadError(
            f"{caller}: {label} {name} is zero (rank 0), so that it spans no subspace; "
            "drop the head, for example heads.drop(index=...)"
        )


def as_subspaces(X: Any, roles: Sequence[str], device: Any, caller: str) -> Subspaces:
    """Subspaces as they are, or raw full-rank ones of heads that come by another door."""
    if isinstance(X, Subspaces):
        return X
    source = open_door(X, caller)
    wanted = [ANONYMOUS] if source.anonymous else roles
    return extract_subspaces(
        source, wanted, rank=None, fold_norm=False, center=False, device=device, caller=caller
    )


def check_pairs(pairs: Any, allowed: Sequence[str], caller: str) -> tuple[str, ...]:
    """Pair kinds as a tuple, each one of `allowed` and none twice."""
    listed = (pairs,) if isinstance(pairs, str) or not np.iterable(pairs) else tuple(pairs)
    unknown = [pair for pair in listed if pair not in allowed]
    if unknown or not listed or len(set(listed)) != len(listed):
        what = f"unknown pair {unknown[0]!r}" if unknown else f"got {pairs!r}"
        raise ValueError(
            f"{caller}: pairs must be distinct names from {', '.join(allowed)} "
            f"(role of the row head, role of the column head); {what}"
        )
    return listed


def check_option(name: str, value: Any, options: Sequence[Any], caller: str) -> None:
    """Refuse a parameter value that is not one of the options."""
    if not any(value is option or value == option for option in options):
        raise ValueError(
            f"{caller}: {name} must be one of {', '.join(map(repr, options))}; got {value!r}"
        )


def check_same_record(fitted: Mapping[str, Any], given: Mapping[str, Any], caller: str) -> None:
    """Refuse to compare heads whose weights were processed differently."""
    differing = [key for key in fitted if fitted[key] != given.get(key)]
    if differing:
        listed = ", ".join(f"{key}={fitted[key]!r} against {given.get(key)!r}" for key in differing)
        raise ProvenanceMismatchError(
            f"{caller}: fitted and given heads were processed differently ({listed}); "
            "extract both with the same SubspaceExtractor"
        )


def defined_pairs(
    rows: pd.DataFrame, columns: pd.DataFrame, same_role: bool, layer_order: str
) -> NDArray[np.bool_]:
    """Which (row, column) pairs of one kind are defined.

    Parameters
    ----------
    rows, columns : DataFrame
        Heads tables.
    same_role : bool
        Whether both heads play one role, in which a head against itself says nothing.
    layer_order : {"forward", "all"}
        "forward" asks for the row's layer to be strictly below the column's in the same model;
        heads that have no layers are all compared.

    Returns
    -------
    ndarray of shape (n_rows, n_columns)
    """
    if goes_forward(rows, columns, layer_order):
        earlier = rows["layer"].to_numpy()[:, None] < columns["layer"].to_numpy()[None, :]
        sources = pd.factorize(pd.concat([rows["source"], columns["source"]]))[0]
        return earlier & (sources[: len(rows), None] == sources[None, len(rows) :])
    if not same_role:
        return np.ones((len(rows), len(columns)), dtype=bool)
    row_codes, column_codes = head_codes(rows, columns)
    return row_codes[:, None] != column_codes[None, :]


def goes_forward(rows: pd.DataFrame, columns: pd.DataFrame, layer_order: str) -> bool:
    """Whether only pairs of an earlier and a later layer are defined.

    Parameters
    ----------
    rows, columns : DataFrame
        Heads tables; without layers, all pairs are.
    layer_order : {"forward", "all"}
    """
    layered = all((heads["layer"] != NO_LAYER).all() for heads in (rows, columns))
    return layer_order == "forward" and layered


def free_dimension(d_model: int, record: Mapping[str, Any]) -> int:
    """Dimension of the space in which random heads point anywhere; centring takes one away."""
    return d_model - int(bool(record.get("center")))


def rank_scale(r: NDArray[np.int64], s: NDArray[np.int64], normalize: str | None) -> Any:
    """What a projection kernel of ranks r and s is divided by."""
    if normalize is None:
        return 1.0
    return np.minimum(r, s) if normalize == "rank" else np.sqrt(r * s)


def parse_bytes(value: int | str, caller: str) -> int:
    """A memory budget in bytes from an int or a text such as ``"1GiB"`` or ``"500MB"``."""
    if isinstance(value, str):
        match = _BYTES.fullmatch(value)
        if match:
            number, prefix, binary = match.groups()
            base = 1024 if binary else 1000
            n_bytes = int(float(number) * base ** " KMGT".index(prefix.upper() or " "))
            if n_bytes:
                return n_bytes
    elif not isinstance(value, bool) and isinstance(value, int | np.integer) and value > 0:
        return int(value)
    raise ValueError(
        f"{caller}: max_memory must be a positive number of bytes or a text such as '1GiB'; "
        f"got {value!r}"
    )
