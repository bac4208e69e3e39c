"""Checkpoints that follow TransformerLens' names, whose shapes say everything."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

from skhead.exceptions import CheckpointError, ConfigMismatchError, HeadShapeError
from skhead.weights.layouts import (
    ROLES,
    STREAM_NORMALISED,
    LayerPlan,
    ModelPlan,
    NormFacts,
    Placement,
    Projection,
    Slot,
)
from skhead.weights.planning import check_tensors
from skhead.weights.readers import TensorReader
from skhead.weights.token_layouts import NormKind

__all__ = ["LENS_FAMILY", "has_lens_names", "plan_lens_model"]

LENS_FAMILY = "transformer_lens"

_MATRIX = re.compile(r"blocks\.(\d{1,18})\.attn\.(_?)W_([QKVO])")
_ATTENTION = re.compile(r"blocks\.(\d{1,18})\.attn\.")
_BLOCK = re.compile(r"blocks\.(\d{1,18})\.")
_GAINS_BEFORE = re.compile(r"blocks\.\d+\.ln1\.w")
_GAINS_AFTER = re.compile(r"blocks\.\d+\.ln1_post\.w")
_STREAM_NORM = "embed.ln.w"


def has_lens_names(names: Collection[str]) -> bool:
    """Return whether attention matrices are stored under TransformerLens' names."""
    return any(_MATRIX.fullmatch(name) for name in names)


def plan_lens_model(reader: TensorReader, norm: NormFacts | None = None) -> ModelPlan:
    """Plan a model from tensors ``blocks.{i}.attn.W_Q`` (heads, d_model, d_head) and the like.

    K and V stored once per key-value head are ``_W_K`` and ``_W_V``. A block without attention
    matrices is a layer without heads. ``ln1.w`` is the gain of the norm in front of the readers,
    ``ln1_post.w`` that of a norm after the writer.

    Parameters
    ----------
    reader : TensorReader
    norm : NormFacts, optional
        What is known of the model's norms; read off the tensors' names if not given.

    Returns
    -------
    ModelPlan

    Raises
    ------
    CheckpointError
        If a matrix or a whole block is missing.
    ConfigMismatchError
        If the shapes of a layer's matrices contradict each other.
    """
    names = reader.names()
    tensors: dict[int, dict[str, str]] = defaultdict(dict)
    for name in sorted(names, reverse=True):
        if attention := _ATTENTION.match(name):
            layer = tensors[int(attention[1])]
            if matrix := _MATRIX.fullmatch(name):
                layer.setdefault(matrix[3], name)
    blocks = {int(match[1]) for name in names if (match := _BLOCK.match(name))}
    n_layers = max(blocks) + 1
    gap = next((block for block in range(n_layers) if block not in blocks), None)
    if gap is not None:
        raise CheckpointError(
            f"{reader.label}: block {gap} is missing: there is no tensor 'blocks.{gap}...', and "
            f"blocks go up to {n_layers - 1}."
        )
    gains = _gain_templates(names)
    layers = tuple(_plan_layer(layer, tensors[layer], gains, reader) for layer in sorted(tensors))
    d_model, d_head = _common_sizes(layers, reader)
    norm = _norm(reader) if norm is None else norm
    plan = ModelPlan(LENS_FAMILY, None, d_model, d_head, n_layers, layers, norm)
    check_tensors(plan, reader, "shapes of the other matrices")
    return plan


def _plan_layer(
    layer: int, tensors: dict[str, str], gains: dict[str, str | None], reader: TensorReader
) -> LayerPlan:
    for role in ROLES:
        if role not in tensors:
            raise CheckpointError(
                f"{reader.label}: L{layer} W_{role} is missing: there is no tensor "
                f"'blocks.{layer}.attn.W_{role}'."
            )
    shapes = {role: reader.info(tensors[role]).shape for role in ROLES}
    for role, shape in shapes.items():
        if len(shape) != 3 or 0 in shape:
            raise ConfigMismatchError(
                f"{reader.label}: tensor {tensors[role]!r} has shape {shape}; expected "
                + ("(heads, d_head, d_model)." if role == "O" else "(heads, d_model, d_head).")
            )
    n_heads, d_model, d_head = shapes["Q"]
    n_kv_heads = shapes["K"][0]
    expected = {
        "K": (n_kv_heads, d_model, d_head),
        "V": (n_kv_heads, d_model, d_head),
        "O": (n_heads, d_head, d_model),
    }
    for role, shape in expected.items():
        if shapes[role] != shape:
            raise ConfigMismatchError(
                f"{reader.label}: tensor {tensors[role]!r} has shape {shapes[role]}; beside "
                f"{tensors['Q']!r} of shape {shapes['Q']} it must have {shape}."
            )
    if n_heads % n_kv_heads:
        raise ConfigMismatchError(
            f"{reader.label}: L{layer} has {n_heads} query heads in {tensors['Q']!r}, which "
            f"{n_kv_heads} key-value heads in {tensors['K']!r} cannot serve evenly."
        )
    slots = {
        role: Slot(tensors[role], shapes[role], Projection(tensors[role], role, "per_head"))
        for role in ROLES
    }
    own = {role: template and template.format(i=layer) for role, template in gains.items()}
    return LayerPlan(layer, n_heads, n_kv_heads, slots, own)


def _gain_templates(names: Collection[str]) -> dict[str, str | None]:
    """Names of the gains beside the roles, ``{i}`` for the layer; None where no layer has any."""
    before = "blocks.{i}.ln1.w" if _matching(_GAINS_BEFORE, names) else None
    after = "blocks.{i}.ln1_post.w" if _matching(_GAINS_AFTER, names) else None
    return {"Q": before, "K": before, "V": before, "O": after}


def _matching(pattern: re.Pattern[str], names: Collection[str]) -> list[str]:
    return [name for name in names if pattern.fullmatch(name)]


def _common_sizes(layers: tuple[LayerPlan, ...], reader: TensorReader) -> tuple[int, int]:
    first = layers[0].slots["Q"]
    for layer in layers[1:]:
        slot = layer.slots["Q"]
        if slot.shape[1:] != first.shape[1:]:
            raise HeadShapeError(
                f"{reader.label}: tensor {slot.tensor!r} has (d_model, d_head) {slot.shape[1:]}, "
                f"and {first.tensor!r} has {first.shape[1:]}; all heads must have one size."
            )
    return first.shape[1], first.shape[2]


def _norm(reader: TensorReader) -> NormFacts:
    names = reader.names()
    if _STREAM_NORM in names:
        return NormFacts("layernorm", "post", STREAM_NORMALISED)
    before, after = _matching(_GAINS_BEFORE, names), _matching(_GAINS_AFTER, names)
    if not before and not after:
        return NormFacts(known=False)
    example = (before or after)[0]
    kind: NormKind = "layernorm" if example.removesuffix("w") + "b" in names else "rmsnorm"
    placement: Placement = "pre+post" if before and after else "pre" if before else "post"
    return NormFacts(kind, placement)
