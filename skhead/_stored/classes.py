"""Classes that a file of an estimator may name, and names of them; there are no others."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import numpy as np
import torch

__all__ = ["CLASSES", "PADDED", "SCALARS", "TORCH_DTYPES", "class_of", "name_of"]

#: What users save, and what it holds, by module.
_SKHEAD = {
    "skhead": (
        "CircuitScorer",
        "ClassAffinity",
        "CompositionScore",
        "ContrastiveQKDecomposer",
        "GrassmannDistance",
        "HeadClassifier",
        "LinearCKA",
        "NullCalibrator",
        "OperationMapper",
        "ProcrustesSimilarity",
        "ProjectionKernel",
        "QKPairs",
        "QKTransformer",
        "SalientMappings",
        "SalientOperations",
        "Similarity",
        "SimpleComposition",
        "SpectrumSimilarity",
        "SubspaceExtractor",
        "SubspaceReadout",
        "Subspaces",
        "VirtualHeads",
        "WholeModelSimilarity",
    ),
    "skhead._base": ("HeadInput",),
    "skhead._classes": ("Targets",),
    "skhead._nulls": (
        "AnisotropicNull",
        "CovarianceNull",
        "EmpiricalLaw",
        "GaussianNull",
        "HaarNull",
        "SignflipNull",
        "_FittedSide",
    ),
    "skhead._qk.decomposition": ("Decomposition", "FeatureSums", "Solver"),
    "skhead.containers": ("Calibration",),
    "skhead.linalg.contrast": ("ContrastMoments", "PermutedMoments"),
    "skhead.stats.anisotropic": ("AnisotropicMoments", "MeanProjector"),
    "skhead.stats.empirical": ("EmpiricalNull",),
    "skhead.stats.polish": ("MedianPolish",),
    "skhead.subspaces": ("RoleBases",),
}
#: Estimators of scikit-learn whose state is numbers and texts alone.
_SKLEARN = {
    "sklearn.decomposition": ("PCA",),
    "sklearn.discriminant_analysis": ("LinearDiscriminantAnalysis",),
    "sklearn.linear_model": ("LogisticRegression", "Ridge", "RidgeClassifier"),
    "sklearn.pipeline": ("FeatureUnion", "Pipeline"),
    "sklearn.preprocessing": (
        "LabelBinarizer",
        "LabelEncoder",
        "MaxAbsScaler",
        "MinMaxScaler",
        "Normalizer",
        "RobustScaler",
        "StandardScaler",
    ),
    "sklearn.svm": ("LinearSVC",),
}


#: Every class that a file may name, to its module; no other is ever imported or made.
CLASSES: Mapping[str, tuple[str, str]] = {
    f"{module}.{name}": (module, name)
    for table in (_SKHEAD, _SKLEARN)
    for module, names in table.items()
    for name in names
}

#: Bytes of all texts that are padded to a width, of which a short file could else ask for any
#: amount.
PADDED = 2**28
SCALARS = {
    name: np.dtype(name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64",
    )
}  # fmt: skip
TORCH_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def class_of(name: str) -> type:
    """Return the class of a name in `CLASSES`."""
    module, attribute = CLASSES[name]
    found: type = getattr(importlib.import_module(module), attribute)
    return found


def name_of(cls: type) -> str | None:
    """Return the name of a class that may be stored; None for all others, of whatever name."""
    if cls.__module__.partition(".")[0] not in ("skhead", "sklearn"):
        return None
    same = (name for name, (_, attribute) in CLASSES.items() if attribute == cls.__name__)
    return next((name for name in same if class_of(name) is cls), None)
