"""Live models: torch modules registered under a name, for this process only."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from skhead import datasets
from skhead.exceptions import UnsupportedLayoutError
from skhead.weights import bridges
from skhead.weights.files import Checkpoint
from skhead.weights.layouts import PART_NAMES
from skhead.weights.lens import has_lens_names
from skhead.weights.readers import MappingReader

__all__ = [
    "is_registered",
    "live_module",
    "open_live",
    "register_model",
    "uncompiled",
    "unregister_model",
]

_MODELS: dict[str, Any] = {}
_LOCK = threading.Lock()
_COMPILED = "_orig_mod"  # where torch.compile keeps the module that it wraps


def register_model(module: torch.nn.Module | Mapping[str, torch.Tensor], name: str) -> str:
    """Make a model in memory a source that :func:`load_heads` finds by name.

    The weights are read from the module whenever they are needed, so that training it further
    shows in later reads. Only this process knows the name: a worker process of joblib does not.

    Parameters
    ----------
    module : torch.nn.Module or mapping of str to torch.Tensor
        A Hugging Face model, a TransformerLens bridge, or tensors under TransformerLens names:
        ``blocks.0.attn.W_Q`` of shape (heads, d_model, d_head) and the like. A module that went
        through ``torch.compile`` is read like the module before.
    name : str
        A name in use is given to the new module.

    Returns
    -------
    str
        `name`.

    Raises
    ------
    ValueError
        If the name is empty, ends like a part of an address, or belongs to a bundled model.
    UnsupportedLayoutError
        If the module tells neither a configuration nor TransformerLens' names.

    Notes
    -----
    A heads table names the model, and does not hold its weights. A scikit-learn pipeline with
    ``memory=`` keeps results under the table's content, and so does any cache made with joblib:
    after the model was trained further, or its name given to another, clear that cache.

    Examples
    --------
    >>> import torch
    >>> import skhead
    >>> shapes = {"W_Q": (2, 8, 4), "W_K": (2, 8, 4), "W_V": (2, 8, 4), "W_O": (2, 4, 8)}
    >>> tensors = {f"blocks.0.attn.{key}": torch.randn(shape) for key, shape in shapes.items()}
    >>> skhead.load_heads(skhead.register_model(tensors, "toy")).index.tolist()
    ['L0H0', 'L0H1']
    >>> skhead.unregister_model("toy")
    """
    if not isinstance(name, str):
        raise ValueError(
            f"register_model: name must be a string, got {type(name).__name__}; "
            "give the model first, then its name"
        )
    if not name or name != name.strip():
        raise ValueError(f"register_model: name must be a non-empty string, got {name!r}.")
    if name.rpartition("#")[2] in PART_NAMES and "#" in name:
        raise ValueError(f"register_model: name {name!r} ends like a part; leave the '#...' out.")
    if name in datasets.list_models():
        raise ValueError(f"register_model: {name!r} is the name of a bundled model; take another.")
    _open(module, name)
    with _LOCK:
        _MODELS[name] = module
    return name


def unregister_model(name: str) -> None:
    """Forget a live model, so that its memory can be freed.

    Parameters
    ----------
    name : str

    Raises
    ------
    ValueError
        If no live model has that name.

    Examples
    --------
    >>> import torch, skhead
    >>> shapes = {"W_Q": (2, 8, 3), "W_K": (2, 8, 3), "W_V": (2, 8, 3), "W_O": (2, 3, 8)}
    >>> model = {f"blocks.0.attn.{name}": torch.ones(shape) for name, shape in shapes.items()}
    >>> name = skhead.register_model(model, "short-lived")
    >>> skhead.unregister_model(name)
    """
    with _LOCK:
        if name not in _MODELS:
            known = ", ".join(map(repr, sorted(_MODELS))) or "none"
            raise ValueError(
                f"unregister_model: no live model is named {name!r}; registered: {known}."
            )
        del _MODELS[name]


def is_registered(name: str) -> bool:
    """Return whether a live model has that name in this process."""
    return live_module(name) is not None


def live_module(name: str) -> Any:
    """Return what was registered under a name, None if nothing is."""
    with _LOCK:
        return _MODELS.get(name)


def uncompiled(module: torch.nn.Module) -> Any:
    """Return the module that ``torch.compile`` wraps, or the module itself."""
    return getattr(module, _COMPILED, module)


def open_live(name: str) -> Checkpoint | None:
    """Return a registered model's present weights, None if no model has that name."""
    module = live_module(name)
    return None if module is None else _open(module, name)


def _open(module: Any, name: str) -> Checkpoint:
    label = f"live model {name!r}"
    if isinstance(module, Mapping):
        tensors = _uncompiled_names(_named_tensors(module, label), label)
        return Checkpoint(name, MappingReader(label, _lens_tensors(tensors, label)), config=None)
    if not isinstance(module, torch.nn.Module):
        raise UnsupportedLayoutError(
            f"{label}: a {type(module).__name__} is neither a torch module nor a mapping of names "
            "to tensors."
        )
    module = uncompiled(module)
    if bridges.is_bridge(module):
        reader = MappingReader(label, bridges.BridgeTensors(module, label))
        config, tokens = bridges.tokens_of(module)
        return Checkpoint(name, reader, config, norm=bridges.norm_of(module), tokens=tokens)
    settings: Any = getattr(module, "config", None)
    if hasattr(settings, "to_dict"):
        tensors = _uncompiled_names(module.state_dict(), label)
        return Checkpoint(name, MappingReader(label, tensors), settings.to_dict())
    raise UnsupportedLayoutError(
        f"{label}: a {type(module).__name__} has no Hugging Face config and is no TransformerLens "
        "bridge. Pass a mapping of tensors named like blocks.0.attn.W_Q (heads, d_model, d_head)."
    )


def _named_tensors(tensors: Mapping[Any, Any], label: str) -> Mapping[str, torch.Tensor]:
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UnsupportedLayoutError(
                f"{label}: entry {key!r} is a {type(value).__name__}, not a tensor under a name."
            )
    return tensors


def _uncompiled_names(
    tensors: Mapping[str, torch.Tensor], label: str
) -> Mapping[str, torch.Tensor]:
    """Return the tensors under the names that they have without ``torch.compile``."""
    if not any(_COMPILED in name.split(".") for name in tensors):
        return tensors
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = ".".join(piece for piece in name.split(".") if piece != _COMPILED)
        if plain in renamed:
            raise UnsupportedLayoutError(
                f"{label}: two tensors have the name {plain!r} once the prefix '{_COMPILED}.' of "
                "torch.compile is taken off. Register the module before it was compiled."
            )
        renamed[plain] = tensor
    return renamed


def _lens_tensors(tensors: Mapping[str, torch.Tensor], label: str) -> Mapping[str, torch.Tensor]:
    if not has_lens_names(tensors):
        raise UnsupportedLayoutError(
            f"{label}: the mapping does not have TransformerLens names (blocks.0.attn.W_Q). Seen: "
            f"{', '.join(map(repr, sorted(tensors)[:8])) or 'none'}."
        )
    return tensors
