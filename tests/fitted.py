"""Every public estimator fitted on the bundled model, with something that it can be asked."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from contrasts import feature_pairs
from sklearn.pipeline import FeatureUnion, make_pipeline

import skhead

BUNDLED = "skhead/induction-2l"
COPYING = [(token, token) for token in range(2, 66)]
#: Two classes of eight heads; the model has no published ones of more than one head.
CLASSES = np.array(["even", "odd"] * 8)
_ALL = {"layer_order": "all"}


def heads():
    return skhead.load_heads(BUNDLED)


def similarity(**options):
    return skhead.ProjectionKernel(**options).fit_transform(heads())


def _transformed(X, estimator):
    return estimator.transform(X)


def _decided(X, estimator):
    return [estimator.predict_proba(X), estimator.predict(X), estimator.decision_function(X)]


def _attributed(X, estimator):
    return [estimator.transform(X), estimator.score(X), estimator.cross_gram_]


def _on_heads(estimator, X=heads):
    return estimator.fit(X()), partial(_transformed, X())


def _calibrated(**options):
    given = similarity()
    return skhead.NullCalibrator(**options).fit(given), partial(_transformed, given)


def _classified(X, **options):
    return skhead.HeadClassifier(**options).fit(X, CLASSES), partial(_decided, X)


def _pairwise(name, **options):
    return lambda: _on_heads(getattr(skhead, name)(**options))


def _stack():
    return skhead.load_weights(heads(), role="O")


def _decomposer():
    pairs = feature_pairs(n_queries=60)
    found = skhead.ContrastiveQKDecomposer(rank="null", n_permutations=99, random_state=0)
    return found.fit(pairs), partial(_attributed, pairs)


def _transformer():
    pairs = feature_pairs(n_queries=60)
    return skhead.QKTransformer().fit(pairs), partial(_transformed, pairs)


def _affinity():
    given = similarity(**_ALL)
    return skhead.ClassAffinity().fit(given, CLASSES), partial(_transformed, given)


def _pipeline():
    steps = make_pipeline(
        skhead.SubspaceExtractor(),
        skhead.ProjectionKernel(pairs=("QQ", "KK", "VV", "OO"), layer_order="all"),
        skhead.NullCalibrator(),
        skhead.HeadClassifier(),
    )
    return steps.fit(heads(), CLASSES), partial(_decided, heads())


def _union():
    steps = FeatureUnion(
        [
            ("kernel", skhead.ProjectionKernel()),
            ("scores", skhead.CircuitScorer(scores=["ov_copying"])),
        ]
    )
    return steps.fit(heads()), partial(_transformed, heads())


MAKERS = {
    "SubspaceExtractor": _pairwise("SubspaceExtractor", rank=0.9),
    "ProjectionKernel": _pairwise("ProjectionKernel"),
    "ProjectionKernel of a stack": lambda: _on_heads(skhead.ProjectionKernel(), _stack),
    "CompositionScore": _pairwise("CompositionScore"),
    "CompositionScore of a stack": lambda: _on_heads(
        skhead.CompositionScore(), lambda: np.stack([_stack()] * 4, axis=1)
    ),
    "GrassmannDistance": _pairwise("GrassmannDistance"),
    "LinearCKA": _pairwise("LinearCKA"),
    "ProcrustesSimilarity": _pairwise("ProcrustesSimilarity"),
    "SimpleComposition": _pairwise("SimpleComposition"),
    "SpectrumSimilarity": _pairwise("SpectrumSimilarity"),
    "WholeModelSimilarity": lambda: _on_heads(
        skhead.WholeModelSimilarity(skhead.ProjectionKernel(**_ALL))
    ),
    "NullCalibrator": _calibrated,
    "NullCalibrator gaussian": lambda: _calibrated(null="gaussian"),
    "NullCalibrator anisotropic": lambda: _calibrated(null="anisotropic"),
    "NullCalibrator covariance": lambda: _calibrated(
        null="anisotropic", covariance=np.diag(np.linspace(1, 2, 128))
    ),
    "NullCalibrator signflip": lambda: _calibrated(null="signflip"),
    "NullCalibrator empirical": lambda: _calibrated(null="empirical"),
    "ClassAffinity": _affinity,
    "HeadClassifier": lambda: _classified(similarity(**_ALL)),
    "HeadClassifier of a matrix": lambda: _classified(np.asarray(similarity(**_ALL))),
    "CircuitScorer": _pairwise("CircuitScorer", scores=["ov_copying", "qk_matching"]),
    "SubspaceReadout": _pairwise("SubspaceReadout", tokens=[1, 2]),
    "OperationMapper": lambda: _on_heads(
        skhead.OperationMapper({"token_copying": COPYING}, source_embedding="raw")
    ),
    "SalientOperations": _pairwise("SalientOperations", source_embedding="raw", n_salient=2),
    "ContrastiveQKDecomposer": _decomposer,
    "QKTransformer": _transformer,
    "Pipeline": _pipeline,
    "FeatureUnion": _union,
}


def assert_same(found, expected):
    """Equal to the last bit, whatever it is."""
    assert type(found) is type(expected)
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    elif isinstance(expected, pd.Series):
        pd.testing.assert_series_equal(found, expected, check_exact=True)
    elif hasattr(expected, "__getstate__") and type(expected).__module__.startswith("skhead"):
        assert_same(found.__getstate__(), expected.__getstate__())
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    else:
        assert found == expected
