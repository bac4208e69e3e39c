"""scikit-learn estimators for the attention heads of transformers, from weights alone."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "CircuitScorer": "skhead.circuits",
    "ClassAffinity": "skhead._affinity",
    "CompositionScore": "skhead.kernels",
    "ContrastiveQKDecomposer": "skhead.contrastive",
    "GrassmannDistance": "skhead.similarities",
    "HeadClassifier": "skhead.classification",
    "LinearCKA": "skhead.similarities",
    "NullCalibrator": "skhead.calibration",
    "OperationMapper": "skhead.operations",
    "ProcrustesSimilarity": "skhead.similarities",
    "ProjectionKernel": "skhead.kernels",
    "QKPairs": "skhead.qk_pairs",
    "QKPrompts": "skhead.qk_prompts",
    "QKTransformer": "skhead.qk_transform",
    "SalientMappings": "skhead._salient",
    "SalientOperations": "skhead.salience",
    "Similarity": "skhead.containers",
    "SimpleComposition": "skhead.similarities",
    "SpectrumSimilarity": "skhead.spectra",
    "SubspaceExtractor": "skhead.extraction",
    "SubspaceReadout": "skhead.readout",
    "Subspaces": "skhead.containers",
    "SuperpositionReport": "skhead.superposition",
    "TermImportance": "skhead.terms",
    "VirtualHeads": "skhead.paths",
    "WholeModelSimilarity": "skhead.whole_models",
    "ablate": "skhead.ablation",
    "analyse_superposition": "skhead.superposition",
    "class_counts": "skhead.graph",
    "collect_qk": "skhead.attention",
    "compare_scores": "skhead._agreement",
    "dynamic_scores": "skhead.dynamics",
    "erasures": "skhead.stream",
    "head_permutation_test": "skhead.permutations",
    "hub_table": "skhead.graph",
    "identity_scores": "skhead.circuits",
    "induction_pairs": "skhead.induction",
    "informativeness": "skhead.calibration",
    "intervene_on_model": "skhead.attention",
    "label_heads": "skhead.behaviour",
    "load": "skhead.persistence",
    "load_heads": "skhead.weights",
    "load_weights": "skhead.weights",
    "multi_token_pairs": "skhead.dynamics",
    "rank_heads": "skhead.ablation",
    "register_model": "skhead.weights",
    "save": "skhead.persistence",
    "skip_trigrams": "skhead.trigrams",
    "stream_usage": "skhead.stream",
    "term_importance": "skhead.terms",
    "true_logits": "skhead.superposition",
    "unregister_model": "skhead.weights",
    "virtual_heads": "skhead.paths",
    "wiring_graph": "skhead.graph",
    "write_edges": "skhead.graph",
    "write_graphml": "skhead.graph",
}
_MODULES = ("base", "datasets", "exceptions", "inspection", "metrics", "stats", "testing")

__all__ = sorted([*_EXPORTS, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"skhead.{name}")
    raise AttributeError(f"module 'skhead' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
