"""Headers of safetensors files, checked before anything they claim is believed.

The format: eight bytes with the length of the header (little endian), the header as a JSON object
``name -> {dtype, shape, data_offsets}``, then the data, which the offsets must tile without a gap.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from skhead.exceptions import CheckpointError

__all__ = ["Header", "TensorInfo", "header_of", "read_header"]

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_MAX_HEADER = 100_000_000
_METADATA = "__metadata__"
_TOO_LARGE = 2**63


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


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes
    ----------
    infos : dict of str to TensorInfo
        In the order of the header.
    offsets : dict of str to list of int
        First byte of each tensor in the data, and the first one behind it.
    metadata : dict of str to str
    start : int
        Byte of the file at which the data begins.
    digest : str
        Checksum of the header as it is stored.
    """

    infos: dict[str, TensorInfo]
    offsets: dict[str, list[int]]
    metadata: dict[str, str]
    start: int
    digest: str


def read_header(path: Path) -> Header:
    """Read and verify the header of a safetensors file, without touching its data.

    Parameters
    ----------
    path : Path

    Returns
    -------
    Header

    Raises
    ------
    CheckpointError
        If the file is truncated or its header contradicts itself or the size of the file. The
        file, and the tensor where there is one, are named.
    """
    with path.open("rb") as file:
        return header_of(file, path)


def header_of(file: BinaryIO, path: Path) -> Header:
    """Read and verify the header of an open file, from wherever it stands, as `read_header`.

    Parameters
    ----------
    file : binary file
        Stands behind the header afterwards.
    path : Path
        To name in errors.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
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
    metadata = _check_metadata(entries.pop(_METADATA, None), path)
    infos = {name: _info(name, entry, path) for name, entry in entries.items()}
    _check_offsets(entries, size - 8 - length, path)
    digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
    offsets = {name: entry["data_offsets"] for name, entry in entries.items()}
    return Header(infos, offsets, metadata, 8 + length, digest)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: the header holds the key {twice!r} twice.")
        for text in (text for pair in pairs for text in pair if isinstance(text, str)):
            if not _is_unicode(text):
                raise CheckpointError(
                    f"{path}: the header holds {reprlib.repr(text)}, which is no Unicode text."
                )
        return table

    def refuse(constant: str) -> Any:
        raise CheckpointError(f"{path}: the header is not JSON (it holds {constant}).")

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a {type(header).__name__}, not an object.")
    return header


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogate, which JSON can escape and no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{path}: the header's {_METADATA} is a {type(metadata).__name__}, not a mapping of "
            "text to text. Download or save it again."
        )
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{path}: the header's {_METADATA} holds {reprlib.repr(value)} under {key!r}, and "
                "only text is allowed there. Download or save it again."
            )
    return metadata


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOO_LARGE


def _count_bits(shape: list[int], dtype: str) -> int | None:
    """Return the size of a tensor, None if it is beyond what can be counted in 64 bits."""
    bits = _BITS[dtype]
    for size in shape:
        bits *= size
        if bits >= 8 * _TOO_LARGE:
            return None
    return bits


def _info(name: str, entry: Any, path: Path) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(
            f"{path}: the header's entry for tensor {name!r} lacks dtype, shape or data_offsets."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the unknown dtype {reprlib.repr(dtype)}."
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(
            f"{path}: tensor {name!r} has the impossible shape {reprlib.repr(shape)}."
        )
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_count, offsets))
        or offsets[0] > offsets[1]
    ):
        raise CheckpointError(
            f"{path}: tensor {name!r} has impossible offsets {reprlib.repr(offsets)}."
        )
    claimed = _count_bits(shape, dtype)
    if claimed != 8 * (offsets[1] - offsets[0]):
        words = "2**63 bytes or more" if claimed is None else f"{claimed / 8:g} bytes"
        raise CheckpointError(
            f"{path}: the header lies about tensor {name!r}: shape {reprlib.repr(tuple(shape))} of "
            f"{dtype} takes {words}, its offsets hold {offsets[1] - offsets[0]}."
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
