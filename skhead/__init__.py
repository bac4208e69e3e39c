"""scikit-learn estimators for the attention heads of transformers, from weights alone."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "CompositionScore": "skhead.kernels",
    "NullCalibrator": "skhead.calibration",
    "ProjectionKernel": "skhead.kernels",
    "Similarity": "skhead.containers",
    "SubspaceExtractor": "skhead.extraction",
    "Subspaces": "skhead.containers",
    "class_counts": "skhead.graph",
    "head_permutation_test": "skhead.calibration",
    "hub_table": "skhead.graph",
    "identity_scores": "skhead.circuits",
    "informativeness": "skhead.calibration",
    "load_heads": "skhead.weights",
    "load_weights": "skhead.weights",
    "register_model": "skhead.weights",
    "unregister_model": "skhead.weights",
    "wiring_graph": "skhead.graph",
    "write_edges": "skhead.graph",
    "write_graphml": "skhead.graph",
}
_MODULES = ("datasets", "exceptions", "inspection", "stats")

__all__ = sorted([*_EXPORTS, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"skhead.{name}")
    raise AttributeError(f"module 'skhead' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
