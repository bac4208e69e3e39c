"""Laws of the kernels between random subspaces, tests and measures against them."""

from __future__ import annotations

from skhead.stats.affinity import class_affinity
from skhead.stats.anisotropic import (
    AnisotropicMoments,
    MeanProjector,
    anisotropic_moments,
    mean_projector,
    projector_traces,
    shrink_projector,
)
from skhead.stats.divergence import gaussian_divergence, nearest_neighbour_divergence
from skhead.stats.edge_statistics import (
    edge_mean,
    head_average_precision,
    in_class_nodes,
    pair_average_precision,
    top_degrees,
)
from skhead.stats.empirical import EmpiricalNull, LocalFDR, fit_empirical_null, local_fdr
from skhead.stats.exchange import permute_heads
from skhead.stats.haar import HaarMoments, haar_moments
from skhead.stats.haar_sampling import haar_sample
from skhead.stats.haar_tails import haar_log_pvalue, haar_logcdf, haar_logsf
from skhead.stats.leave_out import leave_one_out_means
from skhead.stats.macg import covariance_from_projector, projector_from_covariance, sample_macg
from skhead.stats.multiple import adjust_log_p
from skhead.stats.permutation import PermutationResult, label_permutation_test, permutation_test
from skhead.stats.platt import fit_sigmoids
from skhead.stats.polish import MedianPolish, layer_block_scores, median_polish
from skhead.stats.signflip import SignflipMoments, pooled_eigenbasis, signflip_moments

__all__ = [
    "AnisotropicMoments",
    "EmpiricalNull",
    "HaarMoments",
    "LocalFDR",
    "MeanProjector",
    "MedianPolish",
    "PermutationResult",
    "SignflipMoments",
    "adjust_log_p",
    "anisotropic_moments",
    "class_affinity",
    "covariance_from_projector",
    "edge_mean",
    "fit_empirical_null",
    "fit_sigmoids",
    "gaussian_divergence",
    "haar_log_pvalue",
    "haar_logcdf",
    "haar_logsf",
    "haar_moments",
    "haar_sample",
    "head_average_precision",
    "in_class_nodes",
    "label_permutation_test",
    "layer_block_scores",
    "leave_one_out_means",
    "local_fdr",
    "mean_projector",
    "median_polish",
    "nearest_neighbour_divergence",
    "pair_average_precision",
    "permutation_test",
    "permute_heads",
    "pooled_eigenbasis",
    "projector_from_covariance",
    "projector_traces",
    "sample_macg",
    "shrink_projector",
    "signflip_moments",
    "top_degrees",
]
