"""How well heads are classified, and what that has to be held against."""

from __future__ import annotations

from skhead.metrics._baselines import LayerPermutation, baseline_scores, layer_permutation_score
from skhead.metrics._detection import head_detection, pair_detection
from skhead.metrics._folds import cross_val_classes
from skhead.metrics._precision import (
    MacroAveragePrecision,
    class_average_precisions,
    macro_average_precision,
    macro_average_precision_score,
)

__all__ = [
    "LayerPermutation",
    "MacroAveragePrecision",
    "baseline_scores",
    "class_average_precisions",
    "cross_val_classes",
    "head_detection",
    "layer_permutation_score",
    "macro_average_precision",
    "macro_average_precision_score",
    "pair_detection",
]
