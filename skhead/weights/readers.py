"""Readers: one protocol for tensors by name, whatever holds them."""

from __future__ import annotations

import hashlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from skhead.exceptions import CheckpointError, UnsafeCheckpointError, UnsupportedLayoutError
from skhead.weights.headers import Header, TensorInfo, read_header

__all__ = ["MappingReader", "SafetensorsReader", "TensorReader", "open_torch_file", "torch_dtype"]

_TORCH_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_META = "META"
_NOT_DENSE = "layout "
_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
#: What bytes that are no torch file, or a damaged one, can make torch's own reader raise.
_MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class TensorReader(Protocol):
    """What the rest of the room needs of a checkpoint.

    Attributes
    ----------
    label : str
        The directory, file or model to name in errors.
    """

    label: str

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and holder of a tensor without reading its data."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; its data is read when it is used."""

    def fingerprint(self, name: str) -> str:
        """Return a text that changes when the stored tensor does."""

    def release(self) -> None:
        """Let go of open files, and so of what they hold in memory."""


def torch_dtype(info: TensorInfo, what: str) -> torch.dtype:
    """Return the torch dtype of a stored tensor that holds ordinary floating-point numbers.

    Parameters
    ----------
    info : TensorInfo
    what : str
        The tensor, to name in the error.

    Raises
    ------
    UnsupportedLayoutError
        If the storage is quantised (integers, or floats of eight bits or fewer) or sparse, or
        there is none because a live tensor is on the meta device.
    """
    if info.dtype == _META:
        raise UnsupportedLayoutError(
            f"{info.file}: tensor {what} is on the meta device, which holds no values. Load the "
            "model's weights before it is read."
        )
    if info.dtype.startswith(_NOT_DENSE):
        raise UnsupportedLayoutError(
            f"{info.file}: tensor {what} is stored in the {info.dtype}, not as a dense array. "
            "Convert it with its method to_dense(), and save or register the result."
        )
    if info.dtype not in _TORCH_DTYPES:
        raise UnsupportedLayoutError(
            f"{info.file}: tensor {what} is stored as {info.dtype}. Quantised weights cannot be "
            "read as they are; give the float16, bfloat16 or float32 checkpoint of the model."
        )
    return _TORCH_DTYPES[info.dtype]


class SafetensorsReader:
    """Tensors of one safetensors file or of the shards of an index.

    Parameters
    ----------
    label : str
    fetch : callable
        ``shard name -> Path``: finds a shard, or downloads it.
    shards : mapping of str to str, or str
        Tensor name to shard name, as in an index; or the one file that holds everything.
    """

    def __init__(
        self, label: str, fetch: Callable[[str], Path], shards: Mapping[str, str] | str
    ) -> None:
        self.label = label
        self._fetch = fetch
        self._headers: dict[str, Header] = {}
        self._files: dict[str, Any] = {}
        if isinstance(shards, str):
            self._shard_of: Mapping[str, str] = dict.fromkeys(self._header(shards).infos, shards)
        else:
            self._shard_of = shards

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return self._shard_of.keys()

    def info(self, name: str) -> TensorInfo:
        """Return what the header of its shard says of a tensor."""
        shard = self._shard_of[name]
        try:
            return self._header(shard).infos[name]
        except KeyError:
            raise CheckpointError(
                f"{self.label}: the index places tensor {name!r} in {shard}, which does not hold "
                "it. Download or save the checkpoint again."
            ) from None

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor over the memory map of its shard."""
        shard = self._shard_of[name]
        file = self.info(name).file
        try:
            opened = self._files.get(shard)
            if opened is None:
                opened = safe_open(self._fetch(shard), framework="pt", device="cpu")
                self._files[shard] = opened
            tensor: torch.Tensor = opened.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{file}: safetensors cannot read tensor {name!r} ({error}). Download or save the "
                "file again."
            ) from error
        return tensor

    def fingerprint(self, name: str) -> str:
        """Return size, time of change and checksum of the header of a tensor's shard."""
        shard = self._shard_of[name]
        stat = self._fetch(shard).stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}-{self._header(shard).digest}"

    def release(self) -> None:
        """Close the memory maps; those of tensors that are still in use go with them."""
        self._files.clear()

    def _header(self, shard: str) -> Header:
        if shard not in self._headers:
            self._headers[shard] = read_header(self._fetch(shard))
        return self._headers[shard]


class MappingReader:
    """Tensors of a state dict, of a live module or of a torch file."""

    def __init__(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.label = label
        self._tensors = tensors

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return self._tensors.keys()

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and holder of a tensor."""
        tensor = self._tensors[name]
        dtype = _NAMES.get(tensor.dtype, str(tensor.dtype))
        if tensor.is_meta:
            dtype = _META
        elif tensor.layout is not torch.strided:
            dtype = f"{_NOT_DENSE}{tensor.layout}"
        return TensorInfo(dtype, tuple(tensor.shape), self.label)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, detached from its graph."""
        return self._tensors[name].detach()

    def fingerprint(self, name: str) -> str:
        """Return a checksum of a tensor's numbers, which have no file that shows a change."""
        content = self.tensor(name).cpu().reshape(-1).view(torch.uint8).numpy()
        return hashlib.blake2b(content.data, digest_size=16).hexdigest()

    def release(self) -> None:
        """Do nothing: the tensors belong to whoever holds the mapping."""


def open_torch_file(path: Path) -> MappingReader:
    """Read a file written by ``torch.save`` without executing what it may contain.

    Parameters
    ----------
    path : Path

    Raises
    ------
    UnsafeCheckpointError
        If ``torch.load(weights_only=True)`` refuses the file.
    CheckpointError
        If the file is damaged, is not a flat mapping of names to tensors, or holds a tensor that
        repeats few numbers.
    """
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{path} holds more than tensors, and torch.load(weights_only=True) refuses it. Save "
            "the state dict alone, best as safetensors."
        ) from error
    except _MALFORMED as error:
        raise CheckpointError(
            f"{path} cannot be read as a torch file ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no mapping of names to tensors.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} is not a flat state dict: its entry {name!r} is a "
                f"{type(value).__name__}. Save the state dict alone."
            )
        if _repeats_numbers(value):
            raise CheckpointError(
                f"{path}: tensor {name!r} has the shape {tuple(value.shape)} and fewer numbers: it "
                "was expanded. Save it with its method contiguous()."
            )
    return MappingReader(str(path), content)


def _repeats_numbers(tensor: torch.Tensor) -> bool:
    """Whether a tensor claims more numbers than its storage has, as an expanded one does."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return False
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
