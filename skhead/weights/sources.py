"""From what the user names to an open checkpoint: live models, bundled models, paths, the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from skhead import datasets
from skhead.exceptions import HeadTableError, SourceNotFoundError
from skhead.weights import live
from skhead.weights.files import Checkpoint, open_path
from skhead.weights.hub import open_repository
from skhead.weights.layouts import PART_NAMES

__all__ = ["absolute_path", "cut_part", "locate", "reopen", "split_address", "split_source"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
_PINNED = re.compile(r"(?P<repo>[^@]+)@(?P<commit>[0-9a-f]{40})")


def cut_part(text: str) -> tuple[str, str | None]:
    """Split ``"ADDRESS#decoder"`` by its letters alone, whatever exists."""
    head, mark, tail = text.rpartition("#")
    return (head, tail) if mark and tail in PART_NAMES else (text, None)


def split_address(address: str) -> tuple[str, str | None]:
    """Split an address of a heads table into that of the checkpoint and the part.

    Raises
    ------
    HeadTableError
        If it may be a path that itself ends like a part, as well as a part of another path.
    """
    return _split(address, Path(address) if Path(address).is_absolute() else None)


def split_source(source: str) -> tuple[str, str | None]:
    """Split what the user names, as :func:`split_address`; it may be a relative path."""
    return _split(source, absolute_path(source))


def _split(text: str, path: Path | None) -> tuple[str, str | None]:
    head, part = cut_part(text)
    if part is None or path is None or _is_named(head) or not _exists(path):
        return head, part
    whole = path.with_name(cut_part(path.name)[0])
    if _exists(whole):
        raise HeadTableError(
            f"{text!r} is ambiguous: {path} exists, and so does {whole}, whose {part} has the same "
            "address. Rename one of them."
        )
    return text, None


def locate(source: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Find and open what the user names.

    Looked up in this order: a live model registered under the name, a bundled model, an existing
    path, a hub repository. A path-like object is a path only.

    Parameters
    ----------
    source : str or path-like
        Without a part.
    revision : str, optional
        Branch, tag or commit; for the hub only.

    Returns
    -------
    Checkpoint

    Raises
    ------
    SourceNotFoundError
        If nothing answers to the name.
    ValueError
        If `revision` is given for something that is not on the hub.
    """
    text = os.fspath(source)
    if not text:
        raise SourceNotFoundError("source is empty: give a directory, a hub id or a name.")
    found = _find_named(text) if isinstance(source, str) else None
    path = absolute_path(text)
    if found is None and _exists(path):
        found = open_path(path)
    if found is not None:
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} applies to hub repositories only, and {text!r} is "
                f"{found.reader.label!r} on this machine. Leave revision out."
            )
        return found
    if not isinstance(source, str) or not _HUB_ID.fullmatch(text):
        raise SourceNotFoundError(
            f"source {text!r} does not exist: it is no registered live model, no bundled model, no "
            f"path (looked for {path}), and cannot be a hub id."
        )
    repo, _, pinned = text.partition("@")
    if pinned and revision is not None and revision != pinned:
        raise ValueError(f"source {text!r} and revision={revision!r} name different revisions.")
    return open_repository(repo, pinned or revision)


def reopen(address: str) -> Checkpoint:
    """Open a checkpoint again from the ``source`` column of a heads table, without its part.

    Raises
    ------
    SourceNotFoundError
        If the path is gone, or a live model is not registered in this process.
    """
    found = _find_named(address)
    if found is not None:
        return found
    path = Path(address)
    if path.is_absolute():
        if _exists(path):
            return open_path(path)
        raise SourceNotFoundError(
            f"the heads table reads from {address}, which does not exist any more (or not on this "
            "machine). Make the table again with load_heads."
        )
    if pinned := _PINNED.fullmatch(address):
        return open_repository(pinned["repo"], pinned["commit"])
    raise SourceNotFoundError(
        f"the heads table reads from {address!r}, and no live model of that name is registered in "
        "this process. A live model is known only to the process that called register_model: "
        "use n_jobs=1 or joblib's threading backend, or save the model with save_pretrained and "
        "make the table from its directory."
    )


def _is_named(name: str) -> bool:
    """Return whether a live or a bundled model has that name."""
    return live.is_registered(name) or name in datasets.list_models()


def absolute_path(text: str) -> Path:
    """Return an absolute path without ``..``, with the directory of a user for ``~``."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # "~name" of a user whom the system does not know is a name like others
        path = Path(text)
    return Path(os.path.normpath(path.absolute()))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file system takes
        return False


def _find_named(name: str) -> Checkpoint | None:
    found = live.open_live(name)
    if found is None and name in datasets.list_models():
        return open_path(Path(datasets.bundled_path(name)), address=name)
    return found
