"""Displays: figures of similarities, classes and features of heads, with matplotlib."""

from __future__ import annotations

from skhead.inspection._classes import HeadClassDisplay
from skhead.inspection._contrast import AttributionDisplay, SpectrumDisplay
from skhead.inspection._contrast_scatter import FeatureScatterDisplay
from skhead.inspection._distribution import DistributionDisplay
from skhead.inspection._null import NullDisplay
from skhead.inspection._scores import HeadScoreDisplay
from skhead.inspection._similarity import SimilarityDisplay

__all__ = [
    "AttributionDisplay",
    "DistributionDisplay",
    "FeatureScatterDisplay",
    "HeadClassDisplay",
    "HeadScoreDisplay",
    "NullDisplay",
    "SimilarityDisplay",
    "SpectrumDisplay",
]
