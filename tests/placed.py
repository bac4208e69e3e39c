"""What can be computed on a device, as functions of the device: small pieces of all estimators."""

from __future__ import annotations

import numpy as np
import pandas as pd

import skhead
from skhead.induction import induction_pairs
from skhead.paths import virtual_heads
from skhead.stream import erasures, stream_usage
from skhead.trigrams import skip_trigrams

HEADS = skhead.load_heads("skhead/induction-2l")
OPERATIONS = {"shift": [(2 * i, 2 * i + 1) for i in range(10)]}


def _contrast(device, **options):
    rng = np.random.default_rng(0)
    q, k, other = rng.standard_normal((3, 60, 6))
    model = skhead.ContrastiveQKDecomposer(device=device, **options)
    return np.asarray(model.fit_pairs(q, k, q, other).cross_gram_)


def _null(name):
    def log10_p(device):
        similarity = skhead.ProjectionKernel(device=device).fit_transform(HEADS)
        return skhead.NullCalibrator(null=name).fit_transform(similarity).calibration.log10_p

    return log10_p


def _kernel(kernel):
    return lambda device: kernel(device=device).fit_transform(HEADS).values


#: What runs wherever float32 matrix products do; float64 is taken to the CPU where it must.
ANYWHERE = {
    "extraction": lambda device: (
        skhead.SubspaceExtractor(device=device).fit_transform(HEADS).numpy("O")
    ),
    "truncated": lambda device: (
        skhead.SubspaceExtractor(device=device, rank=0.9, fold_norm=True, center=True)
        .fit_transform(HEADS)
        .numpy("K")
    ),
    "projection": _kernel(skhead.ProjectionKernel),
    "composition": _kernel(skhead.CompositionScore),
    "grassmann": _kernel(skhead.GrassmannDistance),
    "geodesic": lambda device: (
        skhead.GrassmannDistance(metric="geodesic", device=device).fit_transform(HEADS).values
    ),
    "procrustes": _kernel(skhead.ProcrustesSimilarity),
    "cka": _kernel(skhead.LinearCKA),
    "spectrum": _kernel(skhead.SpectrumSimilarity),
    "anisotropic": _null("anisotropic"),
    "signflip": _null("signflip"),
    "contrast": lambda device: _contrast(device, rank=2),
    "whitened": lambda device: _contrast(device, rank=2, whiten="qk"),
    "permuted": lambda device: _contrast(device, rank="null", n_permutations=99),
}

#: What needs float64 where the weights are.
EXACT = {
    "CircuitScorer": lambda device: skhead.CircuitScorer(
        device=device, errors="ignore"
    ).fit_transform(HEADS),
    "identity_scores": lambda device: skhead.identity_scores(HEADS, device=device),
    "SubspaceReadout": lambda device: (
        skhead.SubspaceReadout(device=device).fit(HEADS).transform(HEADS)
    ),
    "SalientOperations": lambda device: (
        skhead.SalientOperations(device=device, source_embedding="raw")
        .fit(HEADS)
        .mappings(HEADS)
        .table
    ),
    "OperationMapper": lambda device: skhead.OperationMapper(
        OPERATIONS, min_pairs=1, missing_mlp="raw", device=device
    ).fit_transform(HEADS),
    "virtual_heads": lambda device: virtual_heads(HEADS, device=device).table,
    "stream_usage": lambda device: stream_usage(HEADS, device=device),
    "erasures": lambda device: erasures(HEADS, device=device),
    "induction_pairs": lambda device: induction_pairs(HEADS, device=device),
    "skip_trigrams": lambda device: skip_trigrams(HEADS, device=device),
}


def numbers(found):
    """What was found as one float64 array."""
    table = found.select_dtypes("number") if isinstance(found, pd.DataFrame) else found
    return np.asarray(table, dtype=np.float64)
