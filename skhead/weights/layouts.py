"""How a checkpoint's tensors become head matrices: the vocabulary of the family table.

A :class:`Family` says where an architecture keeps its attention matrices and how they are packed.
Bound to one configuration and one set of tensor names it becomes a :class:`ModelPlan`, in which
every head matrix has an address (see :mod:`skhead.weights.planning`), and :func:`cut_heads` cuts
the matrices out of the stored tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from skhead.weights.token_layouts import Norm, NormKind, Tokens

__all__ = [
    "PART_NAMES",
    "ROLES",
    "STREAM_NORMALISED",
    "Family",
    "LayerPlan",
    "ModelPlan",
    "Norm",
    "NormFacts",
    "Part",
    "Projection",
    "Slot",
    "adapt_part",
    "cut_heads",
    "norm_facts",
    "slot_shape",
]

ROLES = "QKVO"
PART_NAMES = ("encoder", "decoder", "cross")

Placement = Literal["pre", "post", "pre+post", "none"]
Storage = Literal["linear", "conv1d", "per_head"]
Packing = Literal["concatenated", "grouped"]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Projection:
    """One stored tensor that holds the matrices of one or several roles.

    Attributes
    ----------
    tensor : str
        Name of the tensor after the family's prefix, with ``{i}`` for the layer.
    roles : str
        The roles it holds, in stored order: ``"Q"``, ``"QKV"``, ``"O"``.
    storage : {"linear", "conv1d", "per_head"}
        ``"linear"`` is ``(out, in)``, ``"conv1d"`` is ``(in, out)``, ``"per_head"`` is
        ``(heads, in, out)`` as TransformerLens keeps it.
    packing : {"concatenated", "grouped"}
        ``"concatenated"``: all queries, then all keys, then all values. ``"grouped"``: for every
        key-value head its query heads, its key, its value, so ``(kv, heads / kv + 2, d_head)``.
        With as many key-value heads as heads that is the per-head interleaving of GPT-NeoX, with
        one key-value head it is multi-query.
    """

    tensor: str
    roles: str
    storage: Storage = "linear"
    packing: Packing = "concatenated"


@dataclass(frozen=True)
class Part:
    """One stack of attention layers: the whole model, or a part of an encoder-decoder.

    Attributes
    ----------
    projections : tuple of Projection
        Together they hold each of the roles Q, K, V and O once.
    tokens : Tokens
        What stands at the ends of the stream.
    n_layers, n_heads : tuple of str
        Configuration keys, synonyms of each other, of the number of layers and of query heads.
    norm : Norm or None
        Applied to the stream in front of the readers.
    memory_norm : Norm or None
        Cross attention: applied to the stream that K and V read, in place of `norm`.
    writer_norm : Norm or None
        Applied to what the heads wrote, before it is added to the stream.
    stream_norm : NormKind or None
        Applied to the stream itself after every addition (BERT); nothing can be folded then.
    name : str or None
        ``"encoder"``, ``"decoder"``, ``"cross"``; None where the model has one stack only.
    """

    projections: tuple[Projection, ...]
    tokens: Tokens
    n_layers: tuple[str, ...] = ("num_hidden_layers",)
    n_heads: tuple[str, ...] = ("num_attention_heads",)
    norm: Norm | None = None
    memory_norm: Norm | None = None
    writer_norm: Norm | None = None
    stream_norm: NormKind | None = None
    name: str | None = None


def _one_place_per_layer(_config: Config, n_layers: int, _label: str) -> Iterator[dict[str, int]]:
    return ({"i": layer} for layer in range(n_layers))


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes
    ----------
    name : str
        Display name, and what :class:`ModelPlan` reports.
    model_types : tuple of str
        Values of ``model_type`` in ``config.json`` that it serves.
    prefixes : tuple of str
        What may stand in front of the tensor names.
    parts : tuple of Part
    d_model, kv_heads, d_head : tuple of str
        Configuration keys, synonyms of each other. No keys for `kv_heads`: as many as heads; no
        keys for `d_head`, or the key absent: ``d_model / n_heads``.
    defaults : mapping
        Values of keys that the configuration may leave out; a string names another key.
    nested : str or None
        Key of the inner configuration that describes the language model.
    places : callable
        ``(config, n_layers, label) -> template fields``, one per layer in the order of use, made
        one by one: the configuration's count is not yet checked. `label` is what errors name.
    adapt : callable or None
        ``(config, part) -> part``: what depends on switches in the configuration.
    choose_kv : callable or None
        ``config -> int or keys``, in place of `kv_heads` where switches decide.
    """

    name: str
    model_types: tuple[str, ...]
    prefixes: tuple[str, ...]
    parts: tuple[Part, ...]
    d_model: tuple[str, ...]
    kv_heads: tuple[str, ...] = ()
    d_head: tuple[str, ...] = ()
    defaults: Mapping[str, int | str] = field(default_factory=dict)
    nested: str | None = None
    places: Callable[[Config, int, str], Iterable[dict[str, int]]] = _one_place_per_layer
    adapt: Callable[[Config, Part], Part] | None = None
    choose_kv: Callable[[Config], int | tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Slot:
    """Where the matrices of one role of one layer are, and how to cut them out."""

    tensor: str
    shape: tuple[int, ...]
    projection: Projection


@dataclass(frozen=True)
class LayerPlan:
    """The attention of one layer: its head counts, tensors, and gains by role."""

    layer: int
    n_heads: int
    n_kv_heads: int
    slots: Mapping[str, Slot]
    gains: Mapping[str, str | None]

    def count(self, role: str) -> int:
        """Return how many distinct matrices the layer has for `role`."""
        return self.n_kv_heads if role in "KV" else self.n_heads


@dataclass(frozen=True)
class NormFacts:
    """Which normalisation stands between the residual stream and the heads.

    Attributes
    ----------
    kind : {"layernorm", "rmsnorm", "rmsnorm+1", "none"}
    placement : {"pre", "post", "pre+post", "none"}
    unfoldable : str or None
        Why no gain can be folded into the heads, as the end of a sentence about the model.
    known : bool
        False where the tensors tell nothing of a norm, so that ``"none"`` may mean a norm whose
        gain is not stored.
    """

    kind: NormKind = "none"
    placement: Placement = "none"
    unfoldable: str | None = None
    known: bool = True


STREAM_NORMALISED = (
    "normalises the residual stream itself, after each addition, so no gain lies between the "
    "stream and the heads"
)


@dataclass(frozen=True)
class ModelPlan:
    """A checkpoint as a list of attention layers with an address for every head matrix."""

    family: str
    part: str | None
    d_model: int
    d_head: int
    n_layers: int
    layers: tuple[LayerPlan, ...]
    norm: NormFacts

    def layer(self, index: int) -> LayerPlan | None:
        """Return the plan of layer `index`, None where that layer has no attention."""
        return self._by_number.get(index)

    @cached_property
    def _by_number(self) -> dict[int, LayerPlan]:
        return {plan.layer: plan for plan in self.layers}


def adapt_part(family: Family, config: Config, part: Part) -> tuple[Config, Part]:
    """Return the configuration of the language model, and the part as its switches make it."""
    inner = config.get(family.nested) if family.nested else None
    config = inner if isinstance(inner, dict) else config
    return config, part if family.adapt is None else family.adapt(config, part)


def norm_facts(part: Part) -> NormFacts:
    """Say which normalisation a part has, and where."""
    if part.stream_norm is not None:
        return NormFacts(part.stream_norm, "post", STREAM_NORMALISED)
    norm = part.norm or part.writer_norm
    if norm is None:
        return NormFacts()
    if part.writer_norm is None:
        return NormFacts(norm.kind, "pre")
    return NormFacts(norm.kind, "post" if part.norm is None else "pre+post")


def slot_shape(
    projection: Projection, d_model: int, d_head: int, n_heads: int, n_kv_heads: int
) -> tuple[int, ...]:
    """Return the shape that the stored tensor of `projection` must have."""
    count = sum(n_kv_heads if role in "KV" else n_heads for role in projection.roles)
    if projection.storage == "per_head":
        inner = (d_head, d_model) if projection.roles == "O" else (d_model, d_head)
        return (count, *inner)
    stream_first = (projection.storage == "conv1d") != (projection.roles == "O")
    return (d_model, count * d_head) if stream_first else (count * d_head, d_model)


def cut_heads(
    tensor: torch.Tensor, slot: Slot, role: str, layer: LayerPlan, d_head: int
) -> torch.Tensor:
    """Cut the matrices of `role` out of a stored tensor, as a view where that is possible.

    Parameters
    ----------
    tensor : torch.Tensor
        The stored tensor, of shape ``slot.shape``.
    slot : Slot
    role : {"Q", "K", "V", "O"}
    layer : LayerPlan
    d_head : int

    Returns
    -------
    torch.Tensor of shape (n_distinct, d_model, d_head)
        Residual coordinates first, also for O.
    """
    projection = slot.projection
    if projection.storage == "per_head":
        return tensor.transpose(1, 2) if role == "O" else tensor
    rows = tensor if (projection.storage == "conv1d") == (role == "O") else tensor.T
    if projection.packing == "grouped":
        per_group = layer.n_heads // layer.n_kv_heads
        groups = rows.reshape(layer.n_kv_heads, per_group + 2, d_head, -1)
        stack = {"Q": groups[:, :per_group], "K": groups[:, -2], "V": groups[:, -1]}[role]
        stack = stack.reshape(layer.count(role), d_head, -1)
    else:
        before = projection.roles[: projection.roles.index(role)]
        start = sum(layer.count(other) for other in before) * d_head
        stack = rows[start : start + layer.count(role) * d_head]
        stack = stack.reshape(layer.count(role), d_head, -1)
    return stack.transpose(1, 2)
