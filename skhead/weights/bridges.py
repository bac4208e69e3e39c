"""TransformerLens bridges seen as tensors under TransformerLens' names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from skhead.exceptions import UnsupportedLayoutError
from skhead.weights.families import FAMILIES
from skhead.weights.layouts import ROLES, NormFacts, NormKind, Placement, norm_facts

__all__ = ["BridgeTensors", "is_bridge", "norm_of"]

_NATIVE = "TransformerLensNative"
_NORMS = {"ln1": "ln1.w", "ln1_post": "ln1_post.w"}


def is_bridge(module: torch.nn.Module) -> bool:
    """Return whether `module` is a TransformerBridge, without importing TransformerLens."""
    lens = sys.modules.get("transformer_lens.model_bridge")
    return lens is not None and isinstance(module, lens.TransformerBridge)


class BridgeTensors(Mapping[str, torch.Tensor]):
    """The attention matrices and norm gains of a bridge, made when they are asked for.

    Parameters
    ----------
    bridge : transformer_lens.model_bridge.TransformerBridge
    label : str
        The model to name in errors.

    Raises
    ------
    UnsupportedLayoutError
        If the bridge has no single list of blocks, or no per-head view of its attention.
    """

    def __init__(self, bridge: Any, label: str) -> None:
        if not hasattr(bridge, "blocks"):
            raise UnsupportedLayoutError(
                f"{label}: this TransformerBridge has no single list of blocks. Read an "
                "encoder-decoder from its checkpoint: load_heads(directory, part=...)."
            )
        self._makers: dict[str, Callable[[], torch.Tensor]] = {}
        for index, block in enumerate(bridge.blocks):
            self._add_block(f"blocks.{index}.", block, label)

    def _add_block(self, prefix: str, block: Any, label: str) -> None:
        self._makers[f"{prefix}present"] = lambda: torch.empty(0)
        attention = getattr(block, "attn", None)
        if attention is None:
            return
        for role in ROLES:
            maker = _attribute(attention, f"W_{role}")
            try:
                shape = tuple(maker().shape)
            except (AttributeError, NotImplementedError) as error:
                raise UnsupportedLayoutError(
                    f"{label}: {prefix}attn ({type(attention).__name__}) has no matrix W_{role} "
                    f"per head: {error}"
                ) from error
            if len(shape) != 3:
                raise UnsupportedLayoutError(
                    f"{label}: {prefix}attn.W_{role} has shape {shape}, not one matrix per head."
                )
            self._makers[f"{prefix}attn.W_{role}"] = maker
        for component, name in _NORMS.items():
            norm = getattr(block, component, None)
            if isinstance(getattr(norm, "weight", None), torch.Tensor):
                self._makers[prefix + name] = _attribute(norm, "weight")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _attribute(owner: Any, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        value: torch.Tensor = getattr(owner, name)
        return value

    return read


def norm_of(bridge: Any) -> NormFacts:
    """Say which norm stands in front of a bridge's heads, and where.

    The family table knows where the norms of an architecture sit; for an architecture that it does
    not hold, folding is refused rather than guessed.
    """
    settings = bridge.cfg
    if settings.architecture == _NATIVE:
        return NormFacts(_native_kind(settings), _native_placement(settings))
    config: Any = getattr(getattr(bridge, "original_model", None), "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    for family in FAMILIES:
        if values.get("model_type") in family.model_types and len(family.parts) == 1:
            part = family.parts[0]
            return norm_facts(part if family.adapt is None else family.adapt(values, part))
    return NormFacts(
        unfoldable=f"is a bridge of {settings.architecture}, and where the norms of that "
        "architecture sit is not known"
    )


def _native_kind(settings: Any) -> NormKind:
    name = (settings.normalization_type or "").upper()
    if name.startswith("RMS"):
        return "rmsnorm+1" if settings.rmsnorm_uses_offset else "rmsnorm"
    return "layernorm" if name.startswith("LN") else "none"


def _native_placement(settings: Any) -> Placement:
    return "none" if settings.normalization_type is None else "pre"
