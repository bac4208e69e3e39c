"""Checks of what callers pass, for rooms below the estimators too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["check_count", "check_number", "check_operation_names", "label_array"]


def check_count(name: str, value: Any, caller: str, *, smallest: int = 1) -> int:
    """A whole number of at least `smallest`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < smallest:
        raise ValueError(
            f"{caller}: {name} must be an integer of at least {smallest}; got {value!r}"
        )
    return int(value)


def check_number(name: str, value: Any, caller: str) -> float:
    """A finite number."""
    real = isinstance(value, int | float | np.integer | np.floating)
    if not real or isinstance(value, bool) or not np.isfinite(value):
        raise ValueError(f"{caller}: {name} must be a finite number; got {value!r}")
    return float(value)


def check_operation_names(operations: Mapping[str, Any], caller: str) -> None:
    """Refuse names of operations that are no texts, or look like those of suppression."""
    for name in operations:
        if not isinstance(name, str) or not name or name.startswith("-"):
            raise ValueError(
                f"{caller}: names of operations must be texts that do not begin with '-', which "
                f"marks suppression; got {name!r}"
            )


def label_array(values: Any) -> NDArray[np.generic]:
    """Labels as an array in which None and NaN stay what they are, also among texts."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind in "US" and not isinstance(values, np.ndarray):
        objects = np.asarray(values, dtype=object)
        if pd.isna(objects).any():
            return objects
    return array
