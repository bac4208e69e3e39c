"""TransformerLens bridges seen as tensors under TransformerLens' names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from skhead.exceptions import UnsupportedLayoutError
from skhead.weights.families import FAMILIES
from skhead.weights.layouts import (
    ROLES,
    Config,
    NormFacts,
    Part,
    Placement,
    adapt_part,
    norm_facts,
)
from skhead.weights.lens_tokens import NATIVE, native_norm_kind, under_lens_names
from skhead.weights.token_layouts import Tokens

__all__ = ["BridgeTensors", "is_bridge", "norm_of", "tokens_of"]

_Places = Mapping[str, tuple[str, str]]

_OPTIONAL = {
    "ln1.w": ("ln1", "weight"),
    "ln1.b": ("ln1", "bias"),
    "ln1_post.w": ("ln1_post", "weight"),
    "attn.b_Q": ("attn", "b_Q"),
    "attn.b_K": ("attn", "b_K"),
    "attn.b_V": ("attn", "b_V"),
}
_ENDS = {
    "embed.W_E": ("embed", "W_E"),
    "unembed.W_U": ("unembed", "W_U"),
    "pos_embed.W_pos": ("pos_embed", "W_pos"),
    "ln_final.w": ("ln_final", "weight"),
    "ln_final.b": ("ln_final", "bias"),
    "embed.ln.w": ("embed_ln", "weight"),
}
_NATIVE_SETTINGS = (
    "architecture",
    "normalization_type",
    "rmsnorm_uses_offset",
    "final_rms",
    "positional_embedding_type",
    "rotary_dim",
    "rotary_base",
    "rope_scaling",
)


def is_bridge(module: torch.nn.Module) -> bool:
    """Return whether `module` is a TransformerBridge, without importing TransformerLens."""
    lens = sys.modules.get("transformer_lens.model_bridge")
    return lens is not None and isinstance(module, lens.TransformerBridge)


class BridgeTensors(Mapping[str, torch.Tensor]):
    """The attention, norms and token tables of a bridge, made when they are asked for.

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
        self._add_optional("", bridge, _ENDS)

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
        self._add_optional(prefix, block, _OPTIONAL)

    def _add_optional(self, prefix: str, parent: Any, places: _Places) -> None:
        """Tensors that not every model has, by their component and its attribute."""
        for name, (component, attribute) in places.items():
            owner = getattr(parent, component, None)
            if isinstance(getattr(owner, attribute, None), torch.Tensor):
                self._makers[prefix + name] = _attribute(owner, attribute)

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
    config, part = _known(bridge)
    if config.get("architecture") == NATIVE:
        placement: Placement = "none" if config["normalization_type"] is None else "pre"
        return NormFacts(native_norm_kind(config), placement)
    if part is not None:
        return norm_facts(part)
    return NormFacts(
        unfoldable=f"is a bridge of {bridge.cfg.architecture}, and where the norms of that "
        "architecture sit is not known"
    )


def tokens_of(bridge: Any) -> tuple[Config, Tokens | None]:
    """Return a bridge's configuration, and what the family table knows of its tokens."""
    config, part = _known(bridge)
    return config, None if part is None else under_lens_names(part.tokens)


def _known(bridge: Any) -> tuple[Config, Part | None]:
    """Return a bridge's configuration, and the part of the family table that describes it."""
    settings = bridge.cfg
    if settings.architecture == NATIVE:
        return {name: getattr(settings, name, None) for name in _NATIVE_SETTINGS}, None
    config: Any = getattr(getattr(bridge, "original_model", None), "config", None)
    values: Config = config.to_dict() if hasattr(config, "to_dict") else {}
    for family in FAMILIES:
        if values.get("model_type") in family.model_types and len(family.parts) == 1:
            return adapt_part(family, values, family.parts[0])
    return values, None
