"""Tokens and positions of checkpoints under TransformerLens' names, and of bridges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from skhead.exceptions import UnsupportedLayoutError
from skhead.weights.readers import TensorReader
from skhead.weights.token_layouts import (
    UNKNOWN_POSITIONS,
    FinalNormKind,
    Norm,
    NormKind,
    Positions,
    Rope,
    Tokens,
)

__all__ = ["NATIVE", "lens_tokens", "native_norm_kind", "under_lens_names"]

NATIVE = "TransformerLensNative"

_EMBEDDING = ("embed.W_E",)
_UNEMBEDDING = ("unembed.W_U",)
_POSITIONS = "pos_embed.W_pos"
_FINAL_GAIN = "ln_final.w"
_STREAM_GAIN = "embed.ln.w"
_QUERY_NORM = "blocks.0.attn.q_norm.w"
_NATIVE_ROPE = Rope(
    "adjacent",
    base=("rotary_base",),
    n_dims="rotary_dim",
    scalings=("default",),
)
_NATIVE_POSITIONS = {
    "standard": Positions("learned", _POSITIONS),
    "rotary": Positions("rotary", ropes=(_NATIVE_ROPE,)),
}


def native_norm_kind(config: Mapping[str, Any]) -> NormKind:
    """Return the kind of norm that a configuration of TransformerLens' own models names."""
    name = str(config.get("normalization_type") or "").upper()
    if name.startswith("RMS"):
        return "rmsnorm+1" if config.get("rmsnorm_uses_offset") else "rmsnorm"
    return "layernorm" if name.startswith("LN") else "none"


def _final_kind(config: Mapping[str, Any]) -> NormKind:
    return "rmsnorm" if config.get("final_rms") else native_norm_kind(config)


def under_lens_names(tokens: Tokens) -> Tokens:
    """Return the facts of an architecture for tensors that a bridge shows under its own names."""
    final = None if tokens.final_norm is None else replace(tokens.final_norm, gain=_FINAL_GAIN)
    return replace(
        tokens,
        embedding=_EMBEDDING,
        unembedding=_UNEMBEDDING,
        columns=True,
        final_norm=final,
        positions=replace(
            tokens.positions, table=_POSITIONS if tokens.positions.kind == "learned" else None
        ),
        embedding_norm=(
            None
            if tokens.embedding_norm is None
            else replace(tokens.embedding_norm, gain=_STREAM_GAIN)
        ),
    )


def lens_tokens(reader: TensorReader, config: Mapping[str, Any] | None) -> Tokens:
    """Describe tensors under TransformerLens' names.

    A configuration counts if its ``architecture`` is that of TransformerLens' own models; else the
    names of the tensors say what is there.

    Parameters
    ----------
    reader : TensorReader
    config : mapping or None

    Returns
    -------
    Tokens

    Raises
    ------
    UnsupportedLayoutError
        If the configuration names a kind of positions that is not known.
    """
    names = reader.names()
    native = config is not None and config.get("architecture") == NATIVE
    final = None
    if _FINAL_GAIN in names:
        kind: NormKind = "layernorm" if "ln_final.b" in names else "rmsnorm"
        final = Norm(_final_kind(config) if native and config else kind, _FINAL_GAIN)
    positions = Positions("learned", _POSITIONS) if _POSITIONS in names else UNKNOWN_POSITIONS
    final_kind: FinalNormKind | None = None if final is not None else "unknown"
    if native and config is not None:
        stated = str(config.get("positional_embedding_type") or "standard").lower()
        if stated not in _NATIVE_POSITIONS:
            raise UnsupportedLayoutError(
                f"{reader.label}: positional_embedding_type={stated!r} of the configuration is not "
                f"known; skhead reads {', '.join(map(repr, _NATIVE_POSITIONS))}."
            )
        positions = _NATIVE_POSITIONS[stated]
        final_kind = _final_kind(config) if final is None else None
    return Tokens(
        _EMBEDDING,
        positions,
        final_norm=final,
        final_kind=final_kind,
        unembedding=_UNEMBEDDING,
        columns=True,
        embedding_norm=Norm("layernorm", _STREAM_GAIN) if _STREAM_GAIN in names else None,
        query_key_norm=_QUERY_NORM in names,
    )
