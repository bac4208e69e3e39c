"""Reading attention heads from checkpoints and live models."""

from __future__ import annotations

from skhead.weights.basis_cache import BasisRequest, CachedBases, cached_bases
from skhead.weights.labels import head_labels
from skhead.weights.live import register_model, unregister_model
from skhead.weights.stacks import Processing, RoleStack, load_weights, read_role
from skhead.weights.table import (
    HEAD_COLUMNS,
    SourceInfo,
    check_heads,
    describe_sources,
    load_heads,
)
from skhead.weights.tokens import Rotary, TokenSpace, read_token_space

__all__ = [
    "HEAD_COLUMNS",
    "BasisRequest",
    "CachedBases",
    "Processing",
    "RoleStack",
    "Rotary",
    "SourceInfo",
    "TokenSpace",
    "cached_bases",
    "check_heads",
    "describe_sources",
    "head_labels",
    "load_heads",
    "load_weights",
    "read_role",
    "read_token_space",
    "register_model",
    "unregister_model",
]
