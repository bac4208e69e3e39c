"""Errors that skhead raises; each is also a ``ValueError`` so that callers may catch either."""

from __future__ import annotations

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigMismatchError",
    "DegenerateHeadError",
    "EstimatorFileError",
    "HeadShapeError",
    "HeadTableError",
    "MemoryBudgetError",
    "NoContrastError",
    "ProvenanceMismatchError",
    "SkheadError",
    "SourceNotFoundError",
    "UnsafeCheckpointError",
    "UnstorableError",
    "UnsupportedLayoutError",
]


class SkheadError(Exception):
    """Base class of every error that skhead raises on purpose."""


class HeadTableError(SkheadError, ValueError):
    """A heads table is empty, lacks columns, or its rows do not describe heads of its source."""


class HeadShapeError(SkheadError, ValueError):
    """Head matrices, ranks or model widths do not fit together."""


class DegenerateHeadError(SkheadError, ValueError):
    """A head's matrix is zero or holds NaN or infinite values, so that it spans no subspace."""


class MemoryBudgetError(SkheadError, ValueError, MemoryError):
    """The memory allowed is less than the smallest piece of the work needs."""


class CacheError(SkheadError, ValueError, OSError):
    """A directory that keeps bases cannot be written, or what it kept has changed while in use."""


class UnsupportedLayoutError(SkheadError, ValueError):
    """The architecture, storage format or processing is not one that skhead can read."""


class CheckpointError(SkheadError, ValueError):
    """A checkpoint file is missing, truncated or contradicts itself."""


class ConfigMismatchError(CheckpointError):
    """The configuration and the stored tensors disagree about the model's shape."""


class UnsafeCheckpointError(SkheadError, ValueError):
    """Reading the checkpoint as given could execute code or leave its directory."""


class SourceNotFoundError(SkheadError, ValueError, FileNotFoundError):
    """No live model, bundled model, local path or hub repository answers to the source."""


class EstimatorFileError(SkheadError, ValueError):
    """A file that should hold a saved estimator is truncated, altered, foreign or too new."""


class UnstorableError(SkheadError, ValueError, TypeError):
    """An estimator holds something that a file without code cannot keep."""


class NoContrastError(SkheadError, ValueError):
    """Pairs that agree and pairs that differ are alike, or in fewer directions than asked for."""


class ProvenanceMismatchError(SkheadError, ValueError):
    """Two containers were made from weights that were processed differently."""
