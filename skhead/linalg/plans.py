"""How all-pairs overlaps will be computed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OverlapPlan"]


@dataclass(frozen=True)
class OverlapPlan:
    """How a set of overlap blocks will be computed.

    Attributes
    ----------
    method : {"packed", "direct"}
    width : int
        Residual-space block width (packed) or heads per row tile (direct).
    column_width : int
        Heads per column tile (direct); 0 for packed.
    group : int
        Panels of rows of stored stacks held at once (packed), so often are they read less; 0 for
        direct.
    chunk : int
        Numbers formed at a time (packed); 0 for direct.
    wide_sums : bool
        Whether the blocks' contributions are added up in float64 (packed), which takes the largest
        error of a projection kernel from 1e-5 to 2e-6; only where memory allows.
    scratch_bytes : int
        Largest scratch that the plan allocates at once, results not counted.
    flops : float
        Floating-point operations of the plan.
    """

    method: str
    width: int
    column_width: int
    group: int
    chunk: int
    wide_sums: bool
    scratch_bytes: int
    flops: float
