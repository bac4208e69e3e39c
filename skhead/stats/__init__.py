"""Laws of the kernels between random subspaces, and measures against them."""

from __future__ import annotations

from skhead.stats.divergence import gaussian_divergence
from skhead.stats.haar import HaarMoments, haar_moments

__all__ = ["HaarMoments", "gaussian_divergence", "haar_moments"]
