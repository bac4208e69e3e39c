"""Bundled models, published classes of attention heads, and operations as lists of words.

Nothing here reads weights, and importing it imports no torch: bundled models are files, read by
:func:`skhead.load_heads` like any other source.
"""

from __future__ import annotations

from skhead.datasets._binding_prompts import make_binding_prompts
from skhead.datasets._bundled import bundled_path, list_models, load_model_card
from skhead.datasets._head_classes import load_head_classes
from skhead.datasets._operations import (
    FilteredOperations,
    copying_operation,
    filter_operations,
    list_operations,
    load_operations,
)
from skhead.datasets._payload import (
    PayloadRetrieval,
    make_contrast_pairs,
    make_payload_retrieval,
)
from skhead.datasets._payload_heads import (
    PayloadHead,
    list_payload_heads,
    load_payload_card,
    load_payload_head,
    payload_head,
)
from skhead.datasets._payload_latents import PayloadEmbeddings
from skhead.datasets._prompt_text import load_prompt_words
from skhead.datasets._qk_prompts import make_category_prompts
from skhead.datasets._zoo import load_head_zoo

__all__ = [
    "FilteredOperations",
    "PayloadEmbeddings",
    "PayloadHead",
    "PayloadRetrieval",
    "bundled_path",
    "copying_operation",
    "filter_operations",
    "list_models",
    "list_operations",
    "list_payload_heads",
    "load_head_classes",
    "load_head_zoo",
    "load_model_card",
    "load_operations",
    "load_payload_card",
    "load_payload_head",
    "load_prompt_words",
    "make_binding_prompts",
    "make_category_prompts",
    "make_contrast_pairs",
    "make_payload_retrieval",
    "payload_head",
]
