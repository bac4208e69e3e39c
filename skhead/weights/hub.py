"""Checkpoints on the Hugging Face hub, through huggingface_hub's cache and its own rules.

Offline mode (``HF_HUB_OFFLINE``), the cache directory and the token come from the environment as
huggingface_hub reads it.
"""

from __future__ import annotations

from pathlib import Path

from skhead.exceptions import CheckpointError, SourceNotFoundError
from skhead.weights.files import (
    CONFIG_NAME,
    FILE_NAME,
    INDEX_NAME,
    Checkpoint,
    read_index,
    read_json,
)
from skhead.weights.readers import SafetensorsReader

__all__ = ["open_repository"]


def open_repository(repo: str, revision: str | None) -> Checkpoint:
    """Open a hub repository, pinned to the commit that the revision stands for.

    Downloads ``config.json`` and the single safetensors file or the index; of a sharded checkpoint
    only those shards that a later read asks for.

    Parameters
    ----------
    repo : str
        ``"organisation/name"``.
    revision : str or None
        Branch, tag or commit; None is the default branch.

    Returns
    -------
    Checkpoint

    Raises
    ------
    SourceNotFoundError
        If the hub, or the cache in offline mode, has no such repository or revision.
    CheckpointError
        If the repository holds no safetensors weights, or the download fails.
    """
    config_path = _download(repo, CONFIG_NAME, revision)
    commit = _commit(config_path)
    label = f"{repo}@{commit}"

    def fetch(name: str) -> Path:
        return _download(repo, name, commit)

    if _has(repo, FILE_NAME, commit):
        reader = SafetensorsReader(label, fetch, FILE_NAME)
    elif _has(repo, INDEX_NAME, commit):
        reader = SafetensorsReader(label, fetch, read_index(fetch(INDEX_NAME)))
    else:
        raise CheckpointError(
            f"{label}: neither {FILE_NAME} nor {INDEX_NAME} is in the repository (or, offline, in "
            "the local cache). Weights in pickled files (pytorch_model.bin) are not read from the "
            "hub, because unpickling can execute code: download them, convert them to safetensors, "
            "and pass the directory."
        )
    return Checkpoint(label, reader, read_json(config_path), revision=commit)


def _has(repo: str, name: str, commit: str) -> bool:
    """Return whether a file can be had; it is in the cache then."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=commit)
    if cached is not None:
        return isinstance(cached, str)
    try:
        _download(repo, name, commit)
    except (_FileNotInRepositoryError, _FileNotCachedError):
        return False
    return True


class _FileNotInRepositoryError(CheckpointError):
    """The repository does not have the file."""


class _FileNotCachedError(SourceNotFoundError):
    """The hub cannot be asked, and the cache does not have the file."""


def _words(repo: str, revision: str | None) -> str:
    return f"hub repository {repo!r}" + (f" at revision {revision!r}" if revision else "")


def _commit(path: Path) -> str:
    """Return the commit whose snapshot directory of the cache holds `path`."""
    return path.parent.name


def _download(repo: str, name: str, revision: str | None) -> Path:
    """Return the path of a file in the cache, after downloading it if need be."""
    import huggingface_hub
    from huggingface_hub import errors

    where = _words(repo, revision)
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
    except errors.GatedRepoError as error:
        raise SourceNotFoundError(
            f"{where} is gated: ask for access on its page, and set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        message = f"{where} does not exist: there is no such branch, tag or commit."
        raise SourceNotFoundError(message) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise SourceNotFoundError(
            f"{repo!r} is no registered live model, no bundled model, no existing path, and no hub "
            "repository that can be seen (a private one needs HF_TOKEN)."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _FileNotCachedError(
            f"{where}: {name} is not in the local cache, and the hub cannot be reached (offline "
            "mode, or no network). Load it once while online, or pass a local directory."
        ) from error
    except errors.EntryNotFoundError as error:
        message = f"{where}: there is no file {name} in the repository."
        raise _FileNotInRepositoryError(message) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{where}: downloading {name} failed: {error}") from error
