"""What a null law says of the pairs of a similarity."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from skhead._frozen import Frozen

__all__ = ["CALIBRATED", "Calibration"]

#: What calibration knows of every pair, in the order in which tables list it.
CALIBRATED = ("z", "log10_p", "q", "ratio", "excess")


@dataclass(frozen=True, eq=False)
class Calibration(Frozen):
    """What a null law says of every pair of a similarity.

    Every array has the shape of the similarity's values and is NaN where they are.

    Attributes
    ----------
    null : str
        Name of the null law.
    side : {"two", "upper", "lower"}
        Which deviations count as evidence.
    score : ndarray, float32
        The similarity before calibration.
    z : ndarray, float32
        Deviation from the expectation in units of the null's standard deviation.
    log10_p : ndarray, float64
        Decimal logarithm of the p-value, which may lie below the smallest float.
    q : ndarray, float64
        Smallest false discovery rate at which the pair is called.
    ratio, excess : ndarray, float32
        Effect sizes: the score divided by its expectation, and the score minus it.
    """

    null: str
    side: str
    score: NDArray[np.float32]
    z: NDArray[np.float32]
    log10_p: NDArray[np.float64]
    q: NDArray[np.float64]
    ratio: NDArray[np.float32]
    excess: NDArray[np.float32]

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.z.shape))
        return f"Calibration({shape}, null {self.null}, side {self.side})"

    def take(self, rows: NDArray[np.int64]) -> Calibration:
        """The calibration of some of the rows."""
        parts = {name: getattr(self, name)[rows] for name in ("score", *CALIBRATED)}
        return replace(self, **parts)
