"""Documents of objects turned into objects; only listed classes are ever made."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from skhead._stored.classes import CLASSES, PADDED, SCALARS, TORCH_DTYPES, class_of
from skhead.exceptions import EstimatorFileError

__all__ = ["Reader"]

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
#: Numbers in the state of a Mersenne twister.
_TWISTER = 624
_DEVICES = ("cpu", "cuda", "mps", "xpu")
#: Texts in a table: pandas' own type where it has one.
_TEXT = pd.Series([], dtype="str").dtype


def _own_fields(cls: type) -> set[str] | None:
    """Names that the state of a class must have, and no other; None where it may have more."""
    return {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else None


class Reader:
    """Turns documents into objects; what a document asks for is checked before it is done.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        That the documents name.
    caller : str
        To name in errors.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], caller: str) -> None:
        self._tensors = tensors
        self._caller = caller
        self._arrays: dict[tuple[str, str], Any] = {}
        self._padded = 0
        self._copied = 0

    def read(self, document: Any) -> Any:
        """Return the object of a document.

        Raises
        ------
        EstimatorFileError
            If the document is none of `Writer`, or names a class that is not listed.
        """
        if document is None or type(document) in (bool, int, float, str):
            return document
        if type(document) is list:
            return [self.read(item) for item in document]
        for tag, build in _BUILDERS.items():
            if tag in document:
                return build(self, document)
        raise self._error(f"entries {sorted(document)[:4]} are none of a saved estimator")

    def _error(self, what: str) -> EstimatorFileError:
        return EstimatorFileError(f"{self._caller}: {what}; save the estimator again")

    def _tensor(self, name: Any) -> torch.Tensor:
        if type(name) is not str or name not in self._tensors:
            raise self._error(f"there is no tensor {name!r}")
        return self._tensors[name]

    def _array(self, document: dict[str, Any]) -> NDArray[Any]:
        name = document["array"]
        tensor = self._tensor(name)
        key = "array", name
        if key not in self._arrays:
            array = tensor.numpy()
            if document.get("unsigned"):
                array = array.view(f"u{array.itemsize}")
            self._arrays[key] = array.T if document["turned"] else array
        return self._arrays[key]

    def _shaped(self, flat: NDArray[Any], document: dict[str, Any]) -> NDArray[Any]:
        shape = document["shape"]
        if not all(type(size) is int and size >= 0 for size in shape):
            raise self._error(f"an array has the impossible shape {shape!r}")
        return flat.reshape(shape)

    def _objects(self, document: dict[str, Any]) -> NDArray[Any]:
        items = self._list(document["objects"])
        flat = np.empty(len(items), dtype=object)
        for i, item in enumerate(items):
            flat[i] = self.read(item)
        return self._shaped(flat, document)

    def _texts(self, document: dict[str, Any]) -> NDArray[Any]:
        texts, width = self._list(document["texts"]), document["width"]
        if type(width) is not int or width < 1:
            raise self._error(f"{len(texts)} texts have the impossible width {width!r}")
        self._padded += width * max(len(texts), 1) * 4
        if self._padded > PADDED:
            raise self._error(f"texts of a width of {width} take more than {PADDED} bytes")
        if not all(type(text) is str and len(text) <= width for text in texts):
            raise self._error("a text is longer than it claims, or is none")
        return self._shaped(np.array(texts, dtype=f"<U{width}"), document)

    def _list(self, value: Any) -> list[Any]:
        if type(value) is not list:
            raise self._error(f"a {type(value).__name__} stands in the place of a list")
        return value

    def _dict(self, document: dict[str, Any]) -> dict[Any, Any]:
        return {self.read(key): self.read(value) for key, value in self._list(document["dict"])}

    def _scalar(self, document: dict[str, Any]) -> np.generic:
        name, value = document["scalar"]
        if name == "str":
            return np.str_(value)
        dtype, number = SCALARS[name], self.read(value)
        if dtype.kind in "iu" and not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
            raise self._error(f"{number!r} is no {name}")
        return dtype.type(number)

    def _device(self, document: dict[str, Any]) -> torch.device:
        if str(document["device"]).partition(":")[0] not in _DEVICES:
            raise self._error(f"{document['device']!r} is no device")
        return torch.device(document["device"])

    def _generator(self, document: dict[str, Any]) -> np.random.Generator:
        state = self.read(document["generator"])
        if state["bit_generator"] not in ("PCG64", "PCG64DXSM"):
            raise self._error(f"{state['bit_generator']!r} is no generator that is stored")
        bits = getattr(np.random, state["bit_generator"])(0)
        bits.state = state
        return np.random.Generator(bits)

    def _random_state(self, document: dict[str, Any]) -> np.random.RandomState:
        state = self.read(document["random_state"])
        key, position = state["state"]["key"], state["state"]["pos"]
        if key.shape != (_TWISTER,) or not 0 <= position <= _TWISTER:  # numpy takes any position
            raise self._error("the state of a generator of random numbers is impossible")
        made = np.random.RandomState(0)
        made.set_state(state)
        return made

    def _column(self, column: Any) -> Any:
        kind, values = column
        if kind == "str":
            if not all(text is None or type(text) is str for text in self._list(values)):
                raise self._error("a column of texts holds something else")
            column = pd.Series(values, dtype=_TEXT)
            return column.array if isinstance(_TEXT, pd.StringDtype) else column.to_numpy()
        found = self.read(values)
        if kind != "numpy" or not isinstance(found, np.ndarray) or found.ndim != 1:
            raise self._error("a column is no array")
        return found

    def _index(self, document: dict[str, Any]) -> pd.Index:
        values = self._column(document["index"])
        return pd.Index(values, dtype=values.dtype, name=self.read(document["name"]))

    def _multiindex(self, document: dict[str, Any]) -> pd.MultiIndex:
        levels = [pd.Index(v, dtype=v.dtype) for v in map(self._column, document["multiindex"])]
        return pd.MultiIndex.from_arrays(levels, names=self.read(document["names"]))

    def _range(self, document: dict[str, Any]) -> pd.RangeIndex:
        start, stop, step = document["range"]
        return pd.RangeIndex(start, stop, step, name=self.read(document["name"]))

    def _rows(self, document: dict[str, Any], n_rows: int) -> pd.Index:
        rows = self.read(document["rows"])
        if not isinstance(rows, pd.Index) or len(rows) != n_rows:
            raise self._error(f"a table has {n_rows} rows, and other labels")
        return rows

    def _series(self, document: dict[str, Any]) -> pd.Series:
        values = self._column(document["series"])
        found = pd.Series(
            values, self._rows(document, len(values)), values.dtype, self.read(document["name"])
        )
        found.attrs = self.read(document["attrs"])
        return found

    def _frame(self, document: dict[str, Any]) -> pd.DataFrame:
        columns = [self._column(column) for column in self._list(document["frame"])]
        names, rows = self.read(document["columns"]), self.read(document["rows"])
        if not isinstance(rows, pd.Index) or not isinstance(names, pd.Index):
            raise self._error("a table has no labels")
        if len(names) != len(columns) or any(len(column) != len(rows) for column in columns):
            raise self._error(f"a table has {len(columns)} columns and other labels")
        self._copied += sum(column.nbytes for column in columns)
        if self._copied > PADDED + sum(tensor.nbytes for tensor in self._tensors.values()):
            raise self._error("tables take more memory than the columns that are stored")
        found = pd.DataFrame(dict(enumerate(columns)), index=rows)
        found.columns = names
        found.attrs = self.read(document["attrs"])
        return found

    def _object(self, document: dict[str, Any]) -> Any:
        name, state = document["object"], document["state"]
        if type(name) is not str or name not in CLASSES:
            raise self._error(f"class {name!r} is not one that may be loaded")
        cls = class_of(name)
        self._check_names(name, cls, state)
        made: Any = object.__new__(cls)
        found = {key: self.read(value) for key, value in state.items()}
        restore: Callable[[dict[str, Any]], None] = getattr(made, "__setstate__", vars(made).update)
        restore(found)
        return made

    def _check_names(self, name: str, cls: type, state: dict[str, Any]) -> None:
        fields = _own_fields(cls)
        if fields is not None and fields != state.keys():
            raise self._error(f"{name} lacks or has too many of {sorted(fields ^ state.keys())}")
        if issubclass(cls, BaseEstimator):
            missing = set(inspect.signature(cls).parameters) - state.keys()
            if missing:
                raise self._error(f"{name} lacks its parameters {sorted(missing)}")
        for key in state:
            taken = fields is None and hasattr(cls, key) and not key.startswith("_sklearn")
            if not key.isidentifier() or key.startswith("__") or taken:
                raise self._error(f"{name} has no attribute {key!r} that could be set")


_BUILDERS: Mapping[str, Callable[[Reader, dict[str, Any]], Any]] = {
    "object": Reader._object,
    "array": Reader._array,
    "tensor": lambda reader, document: reader._tensor(document["tensor"]),
    "float": lambda _, document: _FLOATS[document["float"]],
    "tuple": lambda reader, document: tuple(reader.read(reader._list(document["tuple"]))),
    "set": lambda reader, document: set(reader.read(reader._list(document["set"]))),
    "frozenset": lambda reader, d: frozenset(reader.read(reader._list(d["frozenset"]))),
    "dict": Reader._dict,
    "scalar": Reader._scalar,
    "objects": Reader._objects,
    "texts": Reader._texts,
    "frame": Reader._frame,
    "series": Reader._series,
    "index": Reader._index,
    "multiindex": Reader._multiindex,
    "range": Reader._range,
    "device": Reader._device,
    "torch_dtype": lambda _, document: TORCH_DTYPES[document["torch_dtype"]],
    "path": lambda _, document: Path(document["path"]),
    "slice": lambda reader, document: slice(*reader.read(document["slice"])),
    "generator": Reader._generator,
    "random_state": Reader._random_state,
}
