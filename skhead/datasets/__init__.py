"""Bundled models and published classes of attention heads.

Nothing here reads weights or imports torch: bundled models are files, read by
:func:`skhead.load_heads` like any other source.
"""

from __future__ import annotations

from skhead.datasets._bundled import bundled_path, list_models, load_model_card
from skhead.datasets._head_classes import load_head_classes

__all__ = ["bundled_path", "list_models", "load_head_classes", "load_model_card"]
