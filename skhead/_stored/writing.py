"""Objects as plain documents with tensors beside them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from skhead._stored.classes import PADDED, SCALARS, TORCH_DTYPES, name_of
from skhead.exceptions import UnstorableError
from skhead.linalg.stacks import StoredStack, dense

__all__ = ["Writer"]


class Writer:
    """Turns objects into documents.

    Parameters
    ----------
    caller : str
        To name in errors.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Arrays of the objects seen so far, which the documents name.
    """

    def __init__(self, caller: str) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._caller = caller
        self._arrays: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._open: list[int] = []
        self._padded = 0

    def write(self, value: Any, where: str) -> Any:
        """Return the document of an object.

        Parameters
        ----------
        value : object
        where : str
            What it is of the estimator, to name in errors.

        Raises
        ------
        UnstorableError
            If a part of it is no number, text, table or known class.
        """
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, np.ndarray | torch.Tensor):
            if id(value) not in self._arrays:
                self._arrays[id(value)] = value, self._array(value, where)
            return self._arrays[id(value)][1]
        if id(value) in self._open:
            raise UnstorableError(f"{self._caller}: {where} holds itself, and cannot be saved")
        self._open.append(id(value))
        try:
            return self._compound(value, where)
        finally:
            self._open.pop()

    def _compound(self, value: Any, where: str) -> Any:
        if type(value) in (list, tuple, set, frozenset):
            items = [self.write(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return items if type(value) is list else {type(value).__name__: items}
        if type(value) is dict:
            return {"dict": [self._pair(*pair, where) for pair in list(value.items())]}
        if type(value) in (pd.DataFrame, pd.Series) or isinstance(value, pd.Index):
            return self._table(value, where)
        if isinstance(value, np.generic):
            return self._scalar(value, where)
        if isinstance(value, StoredStack):
            return self.write(dense(value), where)
        return self._small(value, where) or self._object(value, where)

    def _pair(self, key: Any, value: Any, where: str) -> list[Any]:
        return [self.write(key, f"a key of {where}"), self.write(value, f"{where}[{key!r}]")]

    def _small(self, value: Any, where: str) -> dict[str, Any] | None:
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.dtype) and str(value)[6:] in TORCH_DTYPES:
            return {"torch_dtype": str(value)[6:]}
        if isinstance(value, Path):
            return {"path": str(value)}
        if type(value) is slice:
            return {"slice": [self.write(x, where) for x in (value.start, value.stop, value.step)]}
        return self._random(value, where)

    def _random(self, value: Any, where: str) -> dict[str, Any] | None:
        if _is_plain_generator(value):
            return {"generator": self.write(value.bit_generator.state, where)}
        if type(value) is np.random.RandomState:
            return {"random_state": self.write(value.get_state(legacy=False), where)}
        return None

    def _scalar(self, value: np.generic, where: str) -> dict[str, Any]:
        if type(value) is np.str_:
            return {"scalar": ["str", str(value)]}
        if value.dtype.name not in SCALARS:
            raise self._refusal(value, where)
        return {"scalar": [value.dtype.name, self.write(value.item(), where)]}

    def _array(self, value: NDArray[Any] | torch.Tensor, where: str) -> dict[str, Any]:
        if isinstance(value, torch.Tensor):
            return {"tensor": self._tensor(value, where)}
        if type(value) is not np.ndarray:
            raise self._refusal(value, where)
        if value.dtype.kind == "O":
            items = [self.write(x, f"{where}[{i}]") for i, x in enumerate(value.ravel())]
            return {"objects": items, "shape": list(value.shape)}
        if value.dtype.kind == "U":
            width = max(value.dtype.itemsize // 4, 1)
            self._padded += width * max(value.size, 1) * 4
            if self._padded > PADDED:
                raise UnstorableError(
                    f"{self._caller}: {where} holds texts of {value.nbytes} bytes, and a file has "
                    f"room for {PADDED} of all such arrays; give an array of dtype object"
                )
            return {"texts": value.ravel().tolist(), "shape": list(value.shape), "width": width}
        if value.dtype.name not in SCALARS:
            raise self._refusal(value, where)
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        turned = native.flags.f_contiguous and not native.flags.c_contiguous
        plain = np.ascontiguousarray(native.T if turned else native).reshape(
            native.T.shape if turned else native.shape
        )
        signed = plain.view(f"i{plain.itemsize}") if plain.dtype.kind == "u" else plain
        found = {"array": self._tensor(torch.from_numpy(signed.copy()), where), "turned": turned}
        return found | ({"unsigned": True} if plain.dtype.kind == "u" else {})

    def _tensor(self, value: torch.Tensor, where: str) -> str:
        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_meta:
            raise self._refusal(value, where)
        name = str(len(self.tensors))
        self.tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return name

    def _table(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, pd.MultiIndex):
            levels = [value.get_level_values(i) for i in range(value.nlevels)]
            columns = [self._column(level, where) for level in levels]
            return {"multiindex": columns, "names": self.write(list(value.names), where)}
        if type(value) is pd.RangeIndex:
            span = [value.start, value.stop, value.step]
            return {"range": span, "name": self.write(value.name, where)}
        if type(value) is pd.Index:
            return {"index": self._column(value, where), "name": self.write(value.name, where)}
        if isinstance(value, pd.Index):
            raise self._refusal(value, where)
        found = {"rows": self.write(value.index, where), "attrs": self.write(value.attrs, where)}
        if isinstance(value, pd.Series):
            return {"series": self._column(value, where), "name": self.write(value.name, where)} | (
                found
            )
        columns = [
            self._column(value.iloc[:, i], f"{where}[{name!r}]")
            for i, name in enumerate(value.columns)
        ]
        return {"frame": columns, "columns": self.write(value.columns, where)} | found

    def _column(self, value: Any, where: str) -> list[Any]:
        """Kind of a column, and its values as an array."""
        if isinstance(value.dtype, np.dtype):
            return ["numpy", self.write(value.to_numpy(), where)]
        if value.dtype == "str":
            texts = [None if pd.isna(text) else str(text) for text in value.tolist()]
            return ["str", texts]
        raise self._refusal(value, where)

    def _object(self, value: Any, where: str) -> dict[str, Any]:
        cls = type(value)
        name = name_of(cls)
        if name is None:
            raise self._refusal(value, where)
        if dataclasses.is_dataclass(cls) and cls.__getstate__ is object.__getstate__:
            state = {f.name: getattr(value, f.name) for f in dataclasses.fields(cls)}
        else:
            state = value.__getstate__() or {}
        held = {key: self._held(value, item) for key, item in state.items()}
        found = {key: self.write(item, f"{where}.{key}") for key, item in held.items()}
        return {"object": name, "state": found}

    @staticmethod
    def _held(owner: Any, value: Any) -> Any:
        """What is stored of an attribute: tensors come back on the CPU, and parts say so."""
        on_gpu = isinstance(value, torch.device) and not isinstance(owner, BaseEstimator)
        return torch.device("cpu") if on_gpu else value

    def _refusal(self, value: Any, where: str) -> UnstorableError:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        dtype = f" of {value.dtype}" if hasattr(value, "dtype") else ""
        return UnstorableError(
            f"{self._caller}: {where} is a {kind}{dtype}, which a file without code cannot keep; "
            "fit with plain values in its place (a path, a name, texts), or pickle the estimator "
            "where you trust whoever may write the file"
        )


def _is_plain_generator(value: Any) -> bool:
    kinds = (np.random.PCG64, np.random.PCG64DXSM)
    return type(value) is np.random.Generator and type(value.bit_generator) in kinds
