"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["sync_directory", "temporary_beside", "write_whole"]


def temporary_beside(path: Path) -> Path:
    """Return a name in the same directory that no other writer takes."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def sync_directory(directory: Path) -> None:
    """Bring the names of files to the disk, where the system has that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, and give it its own once it is on the disk.

    Parameters
    ----------
    path : Path
        A file that is there is replaced; a reader sees the old one or the new one.
    content : bytes

    Raises
    ------
    OSError
        If the file cannot be written; what was there stays, and nothing else is left behind.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
