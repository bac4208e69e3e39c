"""Bases of heads as files in a directory: written whole or not at all, read piece by piece.

A file holds the distinct bases of one role of one layer, as a safetensors file with one tensor of
shape ``(d_model, rank)`` for each head, named by the head's number. Its name tells the role, the
layer and a digest of everything that the bases depend on; its metadata say that once more, with a
checksum of the data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skhead._callers import warn_user
from skhead.exceptions import CacheError, CheckpointError
from skhead.linalg.stacks import StoredStack
from skhead.weights.atomic import sync_directory, temporary_beside
from skhead.weights.headers import header_of
from skhead.weights.transfers import Transfers, transfers_to

__all__ = ["FORMAT", "BasisFile", "BasisStack", "BasisStore", "BasisWriter"]

#: Changes whenever the files, or what the bases in them are, do.
FORMAT = "skhead-bases-2"
#: Data begin at a multiple of this, behind a header that is padded to it.
_PAGE = 4096
#: Bytes of the header for one head, more than its entry can take.
_ENTRY = 160
_PIECE = 2**20
#: Seconds after which a temporary file that nobody wrote to is an interrupted run's.
_STALE = 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class BasisFile:
    """A file of bases, and the checksum of the data that it had when it was found good.

    Attributes
    ----------
    path : str
    checksum : str
    numbers, ranks : tuple of int
        Of the heads in the file, in order.
    """

    path: str
    checksum: str
    numbers: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class _Layout:
    """Where the heads of a verified file begin, in the order of its header."""

    file: BasisFile
    starts: tuple[int, ...]


class _Verified:
    """Layouts of files that were found good, in the state that they were in; the latest used.

    Files are read tile by tile, and their data are held against the checksum once in each state.
    Threads that ask for a new file at once each read it, and find the same.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._layouts: OrderedDict[tuple[str, tuple[int, ...]], _Layout] = OrderedDict()

    def layout(self, path: str, file: FileIO) -> _Layout:
        key = path, _stamp(os.fstat(file.fileno()))
        with self._lock:
            if key in self._layouts:
                self._layouts.move_to_end(key)
                return self._layouts[key]
        found = _verify(path, file)
        with self._lock:
            self._layouts[key] = found
            while len(self._layouts) > self._most:
                self._layouts.popitem(last=False)
        return found


#: Knows addresses and checksums alone, of which a stack in a worker process has no other memory.
_VERIFIED = _Verified(most=4096)


def _verify(path: str, file: FileIO) -> _Layout:
    """Layout of a file whose header and data have the checksum that it claims.

    Raises
    ------
    CheckpointError
        If the file is truncated, damaged or of another format.
    """
    header = header_of(file, Path(path))
    found = header.metadata.get("format")
    if found != FORMAT:
        raise CheckpointError(f"{path}: its format is {found!r}, not {FORMAT!r}.")
    entries = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": header.offsets[name]}
        for name, info in header.infos.items()
    }
    digest = _new_digest(header.metadata.get("bases", ""))
    piece = bytearray(_PIECE)
    while count := file.readinto(piece):
        digest.update(memoryview(piece)[:count])
    if _finished(digest, entries) != header.metadata.get("checksum"):
        raise CheckpointError(f"{path}: its content does not have the checksum that was written.")
    kinds = {(info.dtype, len(info.shape)) for info in header.infos.values()}
    if not kinds <= {("F32", 2)} or not all(map(str.isdecimal, entries)):
        raise CheckpointError(f"{path}: it holds other things than bases.")
    whole = BasisFile(
        path,
        header.metadata["checksum"],
        tuple(map(int, entries)),
        tuple(info.shape[1] for info in header.infos.values()),
    )
    return _Layout(whole, tuple(header.start + begin for begin, _ in header.offsets.values()))


def _new_digest(description: str) -> hashlib.blake2b:
    return hashlib.blake2b(description.encode(), digest_size=16)


def _finished(digest: hashlib.blake2b, entries: Mapping[str, Any]) -> str:
    """Checksum of description and data, with the entries of the header in their order."""
    digest.update(json.dumps(list(entries.items())).encode())
    return digest.hexdigest()


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is written or replaced."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


class BasisStore:
    """A directory of files of bases, which several processes may fill at once.

    Parameters
    ----------
    directory : Path
        Made when the first file is written.
    caller : str
        Estimator to name in errors.
    """

    def __init__(self, directory: Path, caller: str) -> None:
        self.directory = directory
        self._caller = caller

    def path(self, description: Mapping[str, Any]) -> Path:
        """Return the path of the bases that `description` tells everything of."""
        text = json.dumps(description, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        name = f"{description['role']}{description['layer']:04d}-{digest}.safetensors"
        return self.directory / name

    def find(self, path: Path) -> BasisFile | None:
        """Return a file if it is there and whole; warn if it is there and is not."""
        try:
            with path.open("rb", buffering=0) as file:
                return _VERIFIED.layout(str(path), file).file
        except FileNotFoundError:
            return None
        except CheckpointError as error:
            warn_user(
                f"{self._caller}: cached bases cannot be used and are computed again ({error})"
            )
        except OSError as error:
            raise self._error("cannot be read", error) from error
        return None

    @contextmanager
    def writing(self, path: Path, description: Mapping[str, Any]) -> Iterator[BasisWriter]:
        """Write a file under another name, and give it its own once it is whole and on the disk.

        Raises
        ------
        CacheError
            If the directory cannot be written or the disk is full; nothing is left behind.
        """
        temporary = temporary_beside(path)
        with self._writable():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_interrupted(path)
            before = _state(path)
            file = temporary.open("xb", buffering=0)
        try:
            with file:
                writer = BasisWriter(file, description, self._writable)
                yield writer
                writer.finish()
            with self._writable():
                # Another process may have finished the same bases, and be reading them already.
                if _state(path) == before:
                    temporary.replace(path)
                    sync_directory(self.directory)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Say what is wrong with the directory where the system refuses to write."""
        try:
            yield
        except OSError as error:
            what = "has no space left" if error.errno in _FULL else "cannot be written"
            raise self._error(what, error) from error

    def _remove_interrupted(self, path: Path) -> None:
        """Remove what earlier runs that were killed have left of this file."""
        for left in self.directory.glob(f"{path.name}.*.tmp"):
            try:
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()
            except FileNotFoundError:
                continue

    def _error(self, what: str, error: OSError) -> CacheError:
        remedy = (
            "free some space and run again: finished layers are kept; or give cache= another disk"
            if error.errno in _FULL
            else "give cache= a directory in which this process may write"
        )
        return CacheError(f"{self._caller}: cache {self.directory} {what} ({error}); {remedy}")


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        return _stamp(path.stat())
    except FileNotFoundError:
        return None


class BasisWriter:
    """The heads of one file, added one after the other.

    Parameters
    ----------
    file : FileIO
        Empty.
    description : mapping
        With the number of heads as ``n_heads``.
    writable : callable
        Gives the context in which to write, which names the directory in errors.
    """

    def __init__(
        self,
        file: FileIO,
        description: Mapping[str, Any],
        writable: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._file = file
        self._writable = writable
        self._description = json.dumps(description, sort_keys=True)
        room = 1024 + 2 * len(self._description) + _ENTRY * description["n_heads"]
        self._start = -(-room // _PAGE) * _PAGE
        self._entries: dict[str, Any] = {}
        self._end = 0
        self._digest = _new_digest(self._description)
        file.seek(self._start)

    def add(self, number: int, basis: torch.Tensor) -> None:
        """Write the basis of a head.

        Parameters
        ----------
        number : int
        basis : torch.Tensor of shape (d_model, rank)
        """
        array = np.ascontiguousarray(basis.to(device="cpu", dtype=torch.float32).numpy(), "<f4")
        begin, self._end = self._end, self._end + array.nbytes
        self._entries[str(number)] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [begin, self._end],
        }
        self._digest.update(array.data)
        with self._writable():
            self._write(_bytes_of(array))

    def finish(self) -> None:
        """Write the header in front of the data, and bring all of it to the disk."""
        metadata = {
            "format": FORMAT,
            "checksum": _finished(self._digest, self._entries),
            "bases": self._description,
        }
        header = json.dumps({"__metadata__": metadata, **self._entries}).encode()
        with self._writable():
            self._file.seek(0)
            self._write(memoryview((self._start - 8).to_bytes(8, "little")))
            self._write(memoryview(header.ljust(self._start - 8)))
            os.fsync(self._file.fileno())

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view) :]


class BasisStack(StoredStack):
    """Bases that lie in files, as a stack of shape ``(n_distinct, d_model, max_rank)``.

    Nothing but the addresses is in memory. Every read opens, reads and closes the files; a file
    that is no longer what it was is refused. Columns past a head's rank are zero.

    Parameters
    ----------
    files : sequence of BasisFile
    members : ndarray of shape (n_distinct, 2), int64
        File of each basis, and its place in there.
    d_model, max_rank : int
    device : torch.device
    dtype : torch.dtype, default=torch.float32
    """

    def __init__(
        self,
        files: tuple[BasisFile, ...],
        members: NDArray[np.int64],
        d_model: int,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.files = files
        self.members = members
        self.shape = torch.Size((len(members), d_model, max_rank))
        self.device = device
        self.dtype = dtype
        self._transfers: Transfers | None = None

    def take(self, heads: NDArray[np.int64]) -> BasisStack:
        """Return the stack of some of the bases; nothing is read."""
        members = self.members[heads]
        _, d_model, max_rank = self.shape
        return BasisStack(self.files, members, d_model, max_rank, self.device, self.dtype)

    def to(self, target: torch.dtype | torch.device | str) -> BasisStack:
        """Return the same stack in another dtype or on another device."""
        dtype, device = self.dtype, self.device
        if isinstance(target, torch.dtype):
            dtype = target
        else:
            device = torch.device(target)
        _, d_model, max_rank = self.shape
        return BasisStack(self.files, self.members, d_model, max_rank, device, dtype)

    def read(self, heads: slice, rows: slice, out: torch.Tensor) -> None:
        """Fill `out`, of shape (n_heads, n_rows, max_rank), with some rows of some bases.

        Raises
        ------
        CacheError
            If a file is gone, damaged, or holds other bases than when the stack was made.
        """
        members = self.members[heads]

        def fill(part: slice, target: torch.Tensor) -> None:
            self._fill(members[part], rows, target.numpy())

        if self._transfers is None:
            self._transfers = transfers_to(out.device)
        if self._transfers is not None and out.device.type != "cpu":
            self._transfers.bring(torch.float32, fill, out)
            return
        direct = out.device.type == "cpu" and out.dtype == torch.float32 and out.is_contiguous()
        target = out if direct else torch.empty(out.shape, dtype=torch.float32)
        fill(slice(None), target)
        if target is not out:
            out.copy_(target)

    def _fill(self, members: NDArray[np.int64], rows: slice, panels: NDArray[np.float32]) -> None:
        first, stop, _ = rows.indices(self.shape[1])
        chosen = zip(members.tolist(), panels, strict=True)
        for number, heads_of_file in groupby(chosen, key=lambda item: item[0][0]):
            known = self.files[number]
            with _opened(known) as (file, layout):
                for (_, place), panel in heads_of_file:
                    rank = known.ranks[place]
                    file.seek(layout.starts[place] + 4 * first * rank)
                    _read_rows(file, panel[: stop - first], rank)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle addresses and checksums of the bases in use, which have no device of their own."""
        used = np.unique(self.members[:, 0])
        members = self.members.copy()
        members[:, 0] = np.searchsorted(used, members[:, 0])
        files = tuple(self.files[file] for file in used)
        cpu = torch.device("cpu")
        return BasisStack, (files, members, *self.shape[1:], cpu, self.dtype)


@contextmanager
def _opened(known: BasisFile) -> Iterator[tuple[FileIO, _Layout]]:
    """A file that is still the one that is known."""
    try:
        with Path(known.path).open("rb", buffering=0) as file:
            layout = _VERIFIED.layout(known.path, file)
            if layout.file.checksum != known.checksum:
                raise CheckpointError(f"{known.path} holds other bases than before.")
            yield file, layout
    except (CheckpointError, OSError) as error:
        raise CacheError(
            f"cached bases have changed while they were in use ({error}); extract them again with "
            "SubspaceExtractor(cache=...)"
        ) from error


def _read_rows(file: FileIO, out: NDArray[np.float32], rank: int) -> None:
    """Read rows of a basis from where the file stands, and fill the columns past its rank."""
    whole = rank == out.shape[1]
    rows = out if whole else np.empty((len(out), rank), dtype=np.float32)
    view = _bytes_of(rows)
    while view:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{file.name} ends too early.")
        view = view[count:]
    if not whole:
        out[:, :rank] = rows
        out[:, rank:] = 0.0


def _bytes_of(array: NDArray[np.float32]) -> memoryview:
    """The memory of a contiguous array; one without entries has no shape that can be cast."""
    return array.data.cast("B") if array.size else memoryview(b"")
