"""Headers of safetensors files, checked before anything they claim is believed.

The format: eight bytes with the length of the header (little endian), the header as a JSON object
``name -> {dtype, shape, data_offsets}``, then the data, which the offsets must tile without a gap.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from skhead.exceptions import CheckpointError

__all__ = ["TensorInfo", "read_header"]

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_MAX_HEADER = 100_000_000
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor before its data is read.

    Attributes
    ----------
    dtype : str
        Name as in safetensors: ``"F16"``, ``"BF16"``, ``"F32"``, ...
    shape : tuple of int
    file : str
        The file, or other holder, to name in errors.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and verify the header of a safetensors file, without touching its data.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict of str to TensorInfo
        In the order of the file.

    Raises
    ------
    CheckpointError
        If the file is truncated or its header contradicts itself or the size of the file. The
        file, and the tensor where there is one, are named.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise CheckpointError(
                f"{path} is truncated: {size} bytes, and a safetensors file begins with 8 bytes "
                "that give the length of its header. Download or save it again."
            )
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: its header claims {length} "
                f"bytes, and {size - 8} follow. Download or save it again."
            )
        raw = file.read(length)
    entries = _parse(raw, path)
    infos = {name: _info(name, entry, path) for name, entry in entries.items()}
    _check_offsets(entries, size - 8 - length, path)
    return infos


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header holds the key {twice!r} twice.")
        return table

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a {type(header).__name__}, not an object.")
    header.pop(_METADATA, None)
    return header


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _info(name: str, entry: Any, path: Path) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(
            f"{path}: the header's entry for tensor {name!r} lacks dtype, shape or data_offsets."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}.")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{path}: tensor {name!r} has the impossible shape {shape!r}.")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_count, offsets))
        or offsets[0] > offsets[1]
    ):
        raise CheckpointError(f"{path}: tensor {name!r} has impossible offsets {offsets!r}.")
    claimed = prod(shape) * _BITS[dtype]
    if claimed != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{path}: the header lies about tensor {name!r}: shape {tuple(shape)} of {dtype} "
            f"takes {claimed / 8:g} bytes, its offsets hold {offsets[1] - offsets[0]}."
        )
    return TensorInfo(dtype, tuple(shape), str(path))


def _check_offsets(entries: dict[str, Any], data_size: int, path: Path) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if end > data_size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {end} of the data, and the "
                f"file holds {data_size}. Download or save it again."
            )
        if start != position:
            raise CheckpointError(
                f"{path}: the header lies about tensor {name!r}: it begins at byte {start} of the "
                f"data, and the tensor before it ends at byte {position}."
            )
        position = end
    if position != data_size:
        raise CheckpointError(
            f"{path}: {data_size - position} bytes follow the last tensor that the header names."
        )
