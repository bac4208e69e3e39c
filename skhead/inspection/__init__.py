"""Displays: figures of similarities between heads and of their classes, with matplotlib."""

from __future__ import annotations

from skhead.inspection._classes import HeadClassDisplay
from skhead.inspection._distribution import DistributionDisplay
from skhead.inspection._null import NullDisplay
from skhead.inspection._similarity import SimilarityDisplay

__all__ = ["DistributionDisplay", "HeadClassDisplay", "NullDisplay", "SimilarityDisplay"]
