"""Containers that pickle and hash by content, and how positions of their rows are named."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

__all__ = ["Frozen", "row_positions"]

_HEADS_HINT = "; for labels use .heads.index.get_indexer or .rows.index.get_indexer"


def _freeze(value: Any) -> Any:
    """Plain, content-hashable form of a field: tensors as numpy, tables as columns of lists."""
    if isinstance(value, torch.Tensor):
        return np.ascontiguousarray(value.detach().cpu().numpy())
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    if isinstance(value, pd.DataFrame):
        columns = {name: value[name].tolist() for name in value.columns}
        return {"index": list(value.index), "columns": columns}
    return value


class Frozen:
    """Pickling by content: no tensor and no view of a larger array ever enters the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: _freeze(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, self._thaw(name, value))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    @staticmethod
    def _thaw(name: str, value: Any) -> Any:
        if name in ("heads", "rows", "columns"):
            return pd.DataFrame(value["columns"], index=pd.Index(value["index"], dtype=object))
        return value


def row_positions(
    key: Any, n_rows: int, what: str = "heads", hint: str = _HEADS_HINT
) -> NDArray[np.int64]:
    """Positions that an integer, slice, mask or list of positions selects.

    Parameters
    ----------
    key : int, slice, mask or list of int
    n_rows : int
    what, hint : str
        What is selected, and what the error adds to it.

    Raises
    ------
    IndexError
        If `key` is none of these.
    """
    if isinstance(key, tuple) and len(key) == 2 and key[1] is Ellipsis:
        key = key[0]
    if isinstance(key, int | np.integer):
        key = [key]
    if not isinstance(key, slice):
        whole = not isinstance(key, tuple) and key is not None
        key = np.asarray(key if whole else "not an index")
        if key.size == 0 and key.ndim == 1:
            key = key.astype(np.int64)
        mask = key.dtype.kind == "b" and len(key) == n_rows
        if key.ndim != 1 or not (mask or key.dtype.kind in "iu"):
            raise IndexError(
                f"{what} are selected by an integer, a slice, a mask of length {n_rows} or a list "
                f"of positions{hint}"
            )
    return np.arange(n_rows)[key]
