"""Checkpoints on disk: directories in Hugging Face layout and single files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from skhead.exceptions import CheckpointError, UnsafeCheckpointError, UnsupportedLayoutError
from skhead.weights.layouts import ModelPlan, NormFacts
from skhead.weights.lens import has_lens_names, plan_lens_model
from skhead.weights.planning import plan_model
from skhead.weights.readers import SafetensorsReader, TensorReader, open_torch_file
from skhead.weights.token_layouts import Tokens

__all__ = [
    "CONFIG_NAME",
    "FILE_NAME",
    "INDEX_NAME",
    "Checkpoint",
    "open_path",
    "read_index",
    "read_json",
]

CONFIG_NAME = "config.json"
FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
#: Bytes of JSON, as many as the header of a safetensors file may have.
_LARGEST_JSON = 100_000_000
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes
    ----------
    address : str
        What :func:`reopen` needs to find it again, without the part.
    reader : TensorReader
    config : mapping or None
        Content of ``config.json``, None where there is none.
    revision : str or None
        Commit of a hub repository.
    norm : NormFacts or None
        What is known of the norms beside tensors under TransformerLens' names.
    tokens : Tokens or None
        What is known of tokens and positions beside tensors under these names.
    """

    address: str
    reader: TensorReader
    config: Mapping[str, Any] | None
    revision: str | None = None
    norm: NormFacts | None = None
    tokens: Tokens | None = None

    def plan(self, part: str | None) -> ModelPlan:
        """Return the address of every head matrix, checked against the tensors."""
        if has_lens_names(self.reader.names()):
            if part is not None:
                raise ValueError(
                    f"{self.reader.label}: part={part!r} was given, and a model under "
                    "TransformerLens names has one stack of layers only. Leave part out."
                )
            return plan_lens_model(self.reader, self.norm)
        if self.config is None:
            names = ", ".join(repr(name) for name in sorted(self.reader.names())[:8])
            raise UnsupportedLayoutError(
                f"{self.reader.label}: there is no {CONFIG_NAME} that names the architecture, and "
                "the tensors do not have TransformerLens names (blocks.0.attn.W_Q). Tensors seen: "
                f"{names or 'none'}."
            )
        return plan_model(self.config, self.reader, part)


def open_path(path: Path, address: str | None = None) -> Checkpoint:
    """Open a directory or a file that exists.

    Parameters
    ----------
    path : Path
        Absolute.
    address : str, optional
        What stands for it in the heads table, if not the path.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        If it holds no safetensors file, or several and no index.
    UnsafeCheckpointError
        If a directory has pickled weights only, or its index names files outside of it.
    UnsupportedLayoutError
        If the file's ending is not known.
    """
    address = str(path) if address is None else address
    folder = path if path.is_dir() else path.parent
    reader = _open_directory(path) if path.is_dir() else _open_file(path)
    config_path = folder / CONFIG_NAME
    config = read_json(config_path) if config_path.is_file() else None
    return Checkpoint(address, reader, config)


def _open_file(path: Path) -> TensorReader:
    if not _is_file(path):
        raise CheckpointError(f"{path} is no ordinary file.")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return SafetensorsReader(str(path), path.parent.joinpath, path.name)
    if path.suffix in _TORCH_SUFFIXES:
        return open_torch_file(path)
    raise UnsupportedLayoutError(
        f"{path}: cannot tell how to read a file with the ending {path.suffix!r}. Give a directory,"
        f" a .safetensors file, or a torch file ({', '.join(_TORCH_SUFFIXES)})."
    )


def _open_directory(path: Path) -> TensorReader:
    if (path / FILE_NAME).is_file():
        return _open_file(path / FILE_NAME)
    if (path / INDEX_NAME).is_file():
        return _open_index(path / INDEX_NAME)
    files = sorted(file for file in path.glob("*.safetensors") if _is_file(file))
    if len(files) == 1:
        return _open_file(files[0])
    if files:
        listed = ", ".join(file.name for file in files)
        raise CheckpointError(
            f"{path} holds several safetensors files and no {INDEX_NAME} that says which tensor is "
            f"where: {listed}. Give the path of the file that you mean."
        )
    pickled = sorted(file for file in path.iterdir() if file.suffix in _TORCH_SUFFIXES)
    if pickled:
        raise UnsafeCheckpointError(
            f"{path} holds weights in pickled files only ({pickled[0].name}), and unpickling can "
            f"execute code. Convert each of them: {_conversion_command(pickled[0])} . Or give the "
            "path of the file itself as source: it is then read with torch.load(weights_only=True)."
        )
    raise CheckpointError(f"{path} holds no safetensors file.")


def _conversion_command(path: Path) -> str:
    """A shell command that rewrites a torch file as safetensors without unpickling code.

    The file's name is an argument of its own, as it may be made to end a text in code.
    """
    target = path.with_name(path.stem.replace("pytorch_model", "model") + ".safetensors")
    return (
        'python -c "import sys, torch; from safetensors.torch import save_file; '
        "state = torch.load(sys.argv[1], weights_only=True); "
        "save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, "
        f'sys.argv[2])" {shlex.join([path.as_posix(), target.as_posix()])}'
    )


def _open_index(path: Path) -> TensorReader:
    shards = read_index(path)
    label = str(path.parent)

    def fetch(shard: str) -> Path:
        file = path.parent / shard
        if not _is_file(file):
            shown = shard if len(shard) <= 200 else f"{shard[:100]}... ({len(shard)} characters)"
            raise CheckpointError(
                f"{label}: shard {shown} is missing; {path.name} places tensors in it. Download or "
                "save the checkpoint again."
            )
        return file

    return SafetensorsReader(label, fetch, shards)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system takes
        return False


def read_index(path: Path) -> dict[str, str]:
    """Read the index of a sharded checkpoint: tensor name to shard name.

    Raises
    ------
    UnsafeCheckpointError
        If a shard's path leaves the directory of the index.
    CheckpointError
        If the file is not an index.
    """
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{path} has no weight_map that places tensors in shards.")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not shard:
            raise CheckpointError(f"{path} places tensor {name!r} in {shard!r}, not in a file.")
        if _leaves_directory(shard):
            raise UnsafeCheckpointError(
                f"{path} places tensor {name!r} in {shard!r}, outside its own directory. Refused; "
                "get the checkpoint from a source that you trust."
            )
    return shards


def _leaves_directory(shard: str) -> bool:
    windows = PureWindowsPath(shard)
    return (
        PurePosixPath(shard).is_absolute()
        or bool(windows.drive or windows.root)
        or ".." in windows.parts
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises
    ------
    CheckpointError
        If it does not, or is larger than any index or configuration.
    """
    size = path.stat().st_size
    if size > _LARGEST_JSON:
        raise CheckpointError(
            f"{path} has {size} bytes, and no configuration or index has more than {_LARGEST_JSON}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object.")
    return content
