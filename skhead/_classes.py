"""What is asked of class labels of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from skhead._base import check_option
from skhead._callers import warn_user

__all__ = ["LEAST", "RARE", "Targets", "open_targets"]

#: Heads that a class needs, so that each has another to be compared with.
LEAST = 2
RARE = ("raise", "none")


@dataclass(frozen=True)
class Targets:
    """Classes of heads, read from labels or from a multilabel indicator.

    Attributes
    ----------
    classes : ndarray of shape (n_classes,)
        All classes, with that of the unclassed heads if there is one.
    members : ndarray of bool of shape (n_heads, n_classes)
    none : int or None
        Position of the class of unclassed heads.
    multilabel : bool
    """

    classes: NDArray[Any]
    members: NDArray[np.bool_]
    none: int | None
    multilabel: bool

    @property
    def named(self) -> NDArray[np.int64]:
        """Positions of the classes proper."""
        return np.array([c for c in range(len(self.classes)) if c != self.none], dtype=np.int64)


def open_targets(
    y: Any, n_heads: int, none_label: Any, rare: str, labels: Sequence[str], caller: str
) -> Targets:
    """Read class labels, and see to it that every class has enough heads.

    Parameters
    ----------
    y : array-like of shape (n_heads,) or (n_heads, n_classes)
    n_heads : int
    none_label : object
        The label of heads without a class.
    rare : {"raise", "none"}
        What becomes of a class of a single head.
    labels : sequence of str
        Names of the heads, for errors.
    caller : str

    Returns
    -------
    Targets

    Raises
    ------
    ValueError
        If labels are missing, of a wrong number, or of no class; or a class is too small.
    """
    check_option("rare", rare, RARE, caller)
    if y is None:
        raise ValueError(f"{caller} requires y to be passed, but the target y is None")
    if not (isinstance(y, pd.DataFrame | pd.Series) or hasattr(y, "toarray")):
        y = np.asarray(y)
    shape = y.shape
    if len(shape) == 0 or shape[0] != n_heads:
        raise ValueError(
            f"{caller}: {n_heads} heads need as many labels, got y of shape {shape}; pass the "
            "labels of these very heads, in their order"
        )
    if n_heads == 1:
        raise ValueError(f"{caller}: classes are learned from several heads, got n_samples = 1")
    missing = pd.isna(pd.DataFrame(y)).to_numpy().any(axis=1) if len(shape) < 3 else [False]
    if np.any(missing):
        raise ValueError(
            f"{caller}: Input y contains NaN: the label of {labels[int(np.argmax(missing))]} is "
            f"missing. Give every head a class, {none_label!r} for one without"
        )
    if type_of_target(y, input_name="y") == "multilabel-indicator":
        return _indicator(y, caller)
    flat = column_or_1d(y, warn=True)
    check_classification_targets(flat)
    classes, codes = np.unique(flat, return_inverse=True)
    members = codes[:, None] == np.arange(len(classes))
    none = next((c for c, name in enumerate(classes) if name == none_label), None)
    small = [c for c in range(len(classes)) if c != none and members[:, c].sum() < LEAST]
    if small:
        classes, members, none = _without(
            small, classes, members, none, none_label, rare, labels, caller
        )
    if len(classes) < 2 or len(classes) == (none is not None):
        raise ValueError(
            f"{caller}: needs heads of two classes at least, got one class: "
            f"{', '.join(map(repr, classes.tolist()))}"
        )
    return Targets(classes, members, none, False)


def _indicator(y: Any, caller: str) -> Targets:
    names = y.columns.to_numpy() if isinstance(y, pd.DataFrame) else np.arange(np.shape(y)[1])
    dense = y.toarray() if hasattr(y, "toarray") else np.asarray(y)
    members = dense.astype(bool)
    counts = members.sum(axis=0)
    for c in np.flatnonzero(counts < LEAST)[:1]:
        raise ValueError(
            f"{caller}: class {names.tolist()[c]!r} has {counts[c]} of the heads, and needs "
            f"{LEAST} at least; drop its column of y"
        )
    return Targets(names, members, None, True)


def _without(
    small: list[int],
    classes: NDArray[Any],
    members: NDArray[np.bool_],
    none: int | None,
    none_label: Any,
    rare: str,
    labels: Sequence[str],
    caller: str,
) -> tuple[NDArray[Any], NDArray[np.bool_], int | None]:
    """Classes without those that are too small, whose heads have no class from now on."""
    first = small[0]
    names = classes.tolist()
    holder = labels[int(members[:, first].argmax())]
    listed = ", ".join(repr(names[c]) for c in small)
    if rare == "raise":
        raise ValueError(
            f"{caller}: class {names[first]!r} has one head ({holder}), which leaves nothing to "
            f"compare it with; a class needs {LEAST} heads at least. Merge it with another class, "
            f"label it {none_label!r}, or use rare='none' (concerns {listed})"
        )
    warn_user(
        f"{caller}: {listed} have fewer than {LEAST} heads each, which count as {none_label!r}"
    )
    orphans = members[:, small].any(axis=1)
    if none is None:
        classes = np.append(classes.astype(object), none_label)
        members = np.column_stack([members, np.zeros(len(members), dtype=bool)])
        none = len(classes) - 1
    members[:, none] |= orphans
    kept = [c for c in range(len(classes)) if c not in small]
    return classes[kept], members[:, kept], kept.index(none)
