"""A document and tensors in one safetensors file, with a checksum over both."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from skhead.exceptions import CheckpointError, EstimatorFileError, UnstorableError
from skhead.weights.atomic import write_whole
from skhead.weights.headers import header_of

__all__ = ["read_archive", "write_archive"]

_DOCUMENT = "document"
_CHECKSUM = "checksum"
#: Characters of a document, of which the header of a safetensors file has room for about twice.
_LONGEST = 40_000_000


def write_archive(
    path: Path, document: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]
) -> None:
    """Write a file that is whole or not there at all.

    Parameters
    ----------
    path : Path
    document : str
    tensors : mapping of str to Tensor
        Contiguous, on the CPU, none of them sharing memory with another.
    facts : mapping of str to str
        Kept beside the document, readable without it.

    Raises
    ------
    UnstorableError
        If the document is too long for the header of a safetensors file.
    OSError
        If the file cannot be written.
    """
    if len(document) > _LONGEST:
        raise UnstorableError(
            f"{path}: texts, labels and single numbers take {len(document)} characters, and a file "
            f"has room for {_LONGEST}; save parts of it"
        )
    checksum = _checksum(document, tensors, facts)
    metadata = {**facts, _DOCUMENT: document, _CHECKSUM: checksum}
    write_whole(path, save_tensors(dict(tensors), metadata))


def read_archive(path: Path) -> tuple[str, dict[str, torch.Tensor], dict[str, str]]:
    """Read what `write_archive` wrote, into memory of its own.

    Parameters
    ----------
    path : Path

    Returns
    -------
    document : str
    tensors : dict of str to Tensor
    facts : dict of str to str

    Raises
    ------
    EstimatorFileError
        If the file is truncated, was altered, or is another file.
    """
    raw = path.read_bytes()
    try:
        metadata = dict(header_of(io.BytesIO(raw), path).metadata)
    except CheckpointError as error:
        raise EstimatorFileError(
            f"{error} It is no file of skhead.save as it was written."
        ) from None
    document, checksum = metadata.pop(_DOCUMENT, None), metadata.pop(_CHECKSUM, None)
    if document is None or checksum is None:
        raise EstimatorFileError(
            f"{path} is a safetensors file, and not one of skhead.save. For the weights of a model "
            "use skhead.load_heads."
        )
    try:
        tensors = load_tensors(raw)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise EstimatorFileError(f"{path} holds tensors that cannot be read ({error}).") from error
    if _checksum(document, tensors, metadata) != checksum:
        raise EstimatorFileError(
            f"{path} does not have the checksum that was written: it was damaged or altered. Save "
            "the estimator again."
        )
    return document, tensors, metadata


def _checksum(document: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> str:
    names = sorted(tensors)
    told = {name: [str(tensors[name].dtype), list(tensors[name].shape)] for name in names}
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([document, dict(facts), told], sort_keys=True).encode())
    for name in names:
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
