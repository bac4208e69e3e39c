"""Where an estimator is checked: what it declares, heads in every form, and its results."""

from __future__ import annotations

import inspect
import itertools
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils import get_tags

from skhead._tags import HeadTags
from skhead.containers import Similarity, Subspaces
from skhead.datasets import load_payload_head, make_contrast_pairs
from skhead.extraction import SubspaceExtractor
from skhead.kernels import ProjectionKernel
from skhead.qk_pairs import QKPairs
from skhead.testing._toys import Toy, random_toy
from skhead.weights import load_heads, register_model, unregister_model

__all__ = ["Bench", "Given", "NotApplicableError", "fingerprint", "frame", "numbers", "same"]

#: Arguments of ``fit`` by which a stack, which has no tokens, gets vectors of tokens.
TOKEN_ARGUMENTS = {
    "vectors": "unembedding",
    "embedding": "embedding",
    "unembedding": "unembedding",
}
#: Pair kinds under which every two heads are compared, also across models.
SAME_ROLE = ("QQ", "KK", "VV", "OO")
#: Methods that show what was learned, the first that there is.
METHODS = ("transform", "predict_proba", "decision_function", "predict")
#: Doors by which heads themselves come in, so that weights decide what comes out.
HEAD_DOORS = ("table", "roles", "stack", "subspaces")

_NUMBERS = itertools.count()


class NotApplicableError(Exception):
    """A check finds out on the way that there is nothing for it to check."""


@dataclass(frozen=True)
class Given:
    """Heads as they come in by one door.

    Attributes
    ----------
    door : str
    toy : Toy
        The model that they are of.
    heads : DataFrame
        Their heads table.
    X : object
    y : Series or None
    fit_arguments : dict
    """

    door: str
    toy: Toy
    heads: pd.DataFrame
    X: Any
    y: pd.Series | None
    fit_arguments: dict[str, Any]


class Bench:
    """An estimator with what it declares, and heads to check it on.

    Parameters
    ----------
    estimator : estimator
        Cloned whenever it is used.
    """

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator
        self.name = type(estimator).__name__
        self.tags = get_tags(estimator)
        self.head_tags = self._head_tags()
        self.parameters: dict[str, Any] = estimator.get_params(deep=False)
        nested = [part for part in estimator.get_params().values() if hasattr(part, "get_params")]
        #: Names by which errors may call the estimator: its own, and those of estimators in it.
        self.names = {self.name, *(type(part).__name__ for part in nested)}
        self._open = ExitStack()

    def __enter__(self) -> Bench:
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        warnings.simplefilter("ignore", UserWarning)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()
        self._quiet.__exit__(kind, error, trace)

    def _head_tags(self) -> HeadTags:
        declared = getattr(self.tags, "head_tags", None)
        if isinstance(declared, HeadTags):
            return declared
        if self.tags.input_tags.three_d_array:
            return HeadTags()
        raise ValueError(
            f"check_head_estimator: {self.name} declares no head_tags and takes no 3-D stack; say "
            "by which doors heads come in (skhead.base.HeadTags), or use scikit-learn's "
            "check_estimator for an estimator of 2-D features"
        )

    @property
    def doors(self) -> tuple[str, ...]:
        """Forms in which heads may come in, the preferred one first."""
        return self.head_tags.doors

    @property
    def supervised(self) -> bool:
        """Whether fitting needs labels."""
        return bool(self.tags.target_tags.required)

    def new(self, **parameters: Any) -> Any:
        """A clone with other parameters, and a fixed seed where there is none."""
        fresh = clone(self.estimator).set_params(**parameters)
        if self.parameters.get("random_state", 0) is None and "random_state" not in parameters:
            fresh.set_params(random_state=0)
        return fresh

    def table(self, toy: Toy | None = None) -> pd.DataFrame:
        """The heads table of a model that is there until the check ends."""
        toy = random_toy() if toy is None else toy
        name = f"skhead-check-{os.getpid()}-{next(_NUMBERS)}"
        register_model(toy.tensors(), name)
        self._open.callback(unregister_model, name)
        return load_heads(name)

    def given(
        self,
        door: str | None = None,
        toy: Toy | None = None,
        heads: pd.DataFrame | None = None,
    ) -> Given:
        """Heads of a model by a door; all of them, or those of a table."""
        door = self.doors[0] if door is None else door
        toy = random_toy() if toy is None else toy
        heads = self.table(toy) if heads is None else heads
        y = heads["layer"].map({0: "early", 1: "late"}) if self.supervised else None
        if door == "pairs":
            y = None
        X = self._opened(door, toy, heads)
        arguments: dict[str, Any] = {}
        if door in ("stack", "roles"):
            known = inspect.signature(self.estimator.fit).parameters
            arguments = {
                name: getattr(toy, part) for name, part in TOKEN_ARGUMENTS.items() if name in known
            }
        return Given(door, toy, heads, X, y, arguments)

    def _opened(self, door: str, toy: Toy, heads: pd.DataFrame) -> Any:
        makers: dict[str, Callable[[], Any]] = {
            "table": lambda: heads,
            "roles": toy.roles,
            "stack": lambda: toy.stack(self.role),
            "subspaces": lambda: self.subspaces(heads),
            "similarity": lambda: self.similarity(heads, heads),
            "matrix": lambda: np.random.default_rng(0).uniform(0.2, 0.9, size=(len(heads), 6)),
            "pairs": _pairs,
        }
        return makers[door]()

    @property
    def role(self) -> str:
        """The role that a stack of one role stands for."""
        asked = self.parameters.get("role")
        return asked if isinstance(asked, str) and asked in set("QKVO") else "O"

    def subspaces(self, heads: pd.DataFrame, **changes: Any) -> Subspaces:
        """Subspaces of heads, processed as the estimator's own parameters say."""
        names = [name for name in ("rank", "fold_norm", "center") if name in self.parameters]
        chosen: dict[str, Any] = {name: self.parameters[name] for name in names} | changes
        return SubspaceExtractor(**chosen).fit_transform(heads)

    def similarity(self, heads: pd.DataFrame, reference: pd.DataFrame, **how: Any) -> Similarity:
        """Projection kernels of heads with reference heads."""
        kernel = ProjectionKernel(pairs=SAME_ROLE, layer_order="all")
        extractor = SubspaceExtractor(**how)
        kernel.fit(extractor.fit_transform(reference))
        found: Similarity = kernel.transform(extractor.fit_transform(heads))
        return found

    def fitted(self, given: Given, estimator: Any = None, **parameters: Any) -> Any:
        """A fitted clone, or a given estimator fitted."""
        estimator = self.new(**parameters) if estimator is None else estimator
        return estimator.fit(given.X, given.y, **given.fit_arguments)

    def apply(self, fitted: Any, X: Any) -> Any:
        """What the fitted estimator says of X."""
        for name in METHODS:
            if hasattr(fitted, name):
                return getattr(fitted, name)(X)
        raise NotApplicableError(f"has none of the methods {', '.join(METHODS)}")

    def run(self, given: Given, **parameters: Any) -> Any:
        """What a fitted clone says of the heads that it was fitted on."""
        return self.apply(self.fitted(given, **parameters), given.X)

    def take(self, given: Given, rows: NDArray[np.int64]) -> Any:
        """Some of the heads, as they come in by the same door."""
        if given.door == "table":
            return given.X.iloc[rows]
        if given.door in ("roles", "stack"):
            return given.X[torch.as_tensor(rows)]
        return given.X[rows]


def _pairs() -> QKPairs:
    head = load_payload_head("d16-r3-r5")
    return make_contrast_pairs("z1", 400, head=head, random_state=0)


def numbers(result: Any) -> dict[str, NDArray[np.floating]]:
    """The numbers in a result by name, one row per head, whatever holds them."""
    if isinstance(result, Similarity):
        return {"values": result.values}
    if isinstance(result, Subspaces):
        bases = {role: result.numpy(role) for role in result.roles}
        return {role: basis @ basis.transpose(0, 2, 1) for role, basis in bases.items()}
    if isinstance(result, QKPairs):
        return {"queries": np.asarray(result.queries), "keys": np.asarray(result.keys)}
    if isinstance(result, torch.Tensor):
        return {"values": result.detach().cpu().numpy()}
    array = np.asarray(result)
    if array.dtype.kind not in "fiub" or array.ndim < 1:
        raise AssertionError(
            f"a result must hold numbers, one row per head; got {type(result).__name__} of dtype "
            f"{array.dtype} and shape {array.shape}"
        )
    return {"values": array.astype(np.float64) if array.dtype.kind != "f" else array}


def frame(fitted: Any, result: Any) -> pd.DataFrame:
    """A result as a table of rows by named features, NaN where undefined."""
    if isinstance(result, pd.DataFrame):
        return result
    values = numbers(result)["values"]
    if isinstance(result, Similarity):
        flat = values.transpose(0, 2, 1).reshape(result.shape)
        return pd.DataFrame(flat, columns=result.feature_names)
    values = values.reshape(len(values), -1)
    names = None
    if hasattr(fitted, "get_feature_names_out"):
        names = list(fitted.get_feature_names_out())
    return pd.DataFrame(values, columns=names)


def same(first: Any, second: Any, what: str, rtol: float = 1e-4) -> None:
    """Fail a check unless two results hold the same numbers.

    Parameters
    ----------
    first, second : Similarity, Subspaces, QKPairs, DataFrame, array or Tensor
    what : str
        What must be the same, for the message.
    rtol : float, default=1e-4
        Largest difference, in units of the largest number.
    """
    left, right = numbers(first), numbers(second)
    if set(left) != set(right):
        raise AssertionError(f"{what}: one result holds {list(left)}, the other {list(right)}")
    for name, a in left.items():
        b = right[name]
        if a.shape != b.shape:
            raise AssertionError(f"{what}: shapes differ, {a.shape} and {b.shape}")
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            raise AssertionError(f"{what}: other entries are NaN")
        if not np.array_equal(np.isinf(a), np.isinf(b)):
            raise AssertionError(f"{what}: other entries are infinite")
        finite = np.isfinite(a)
        if not finite.any():
            raise AssertionError(f"{what}: there are no finite numbers to compare")
        a64, b64 = a[finite].astype(np.float64), b[finite].astype(np.float64)
        gap = np.abs(a64 - b64).max()
        if gap > rtol * max(np.abs(a64).max(), 1e-12):
            raise AssertionError(f"{what}: numbers differ by up to {gap:.3g}")


def fingerprint(X: Any) -> str:
    """A text that changes when anything in X does."""
    if isinstance(X, torch.Tensor):
        X = X.detach().cpu().numpy()
    found: str = joblib.hash(X)
    return found
