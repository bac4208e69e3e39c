"""scikit-learn's own checks, on every public estimator."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from lifting import (
    LiftedCircuitScorer,
    LiftedClassAffinity,
    LiftedCompositionScore,
    LiftedContrastiveQKDecomposer,
    LiftedGrassmannDistance,
    LiftedLinearCKA,
    LiftedProcrustesSimilarity,
    LiftedProjectionKernel,
    LiftedSalientOperations,
    LiftedSimpleComposition,
    LiftedSpectrumSimilarity,
    LiftedSubspaceExtractor,
    LiftedSubspaceReadout,
    WideNullCalibrator,
)
from sklearn.base import BaseEstimator
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks

import skhead
from skhead import HeadClassifier

LIFTED = (
    HeadClassifier,
    LiftedCircuitScorer,
    LiftedClassAffinity,
    LiftedSubspaceExtractor,
    LiftedProjectionKernel,
    LiftedCompositionScore,
    LiftedContrastiveQKDecomposer,
    LiftedGrassmannDistance,
    LiftedLinearCKA,
    LiftedProcrustesSimilarity,
    LiftedSimpleComposition,
    LiftedSpectrumSimilarity,
    LiftedSubspaceReadout,
    LiftedSalientOperations,
    WideNullCalibrator,
)


#: Estimators whose rows are no heads, so that rows of integers are as good as any.
MATRIX_READERS = (
    WideNullCalibrator,
    HeadClassifier,
    LiftedClassAffinity,
    LiftedContrastiveQKDecomposer,
)

#: Estimators that no matrix of numbers can feed, and where clones and pickles of them are tested.
ONLY_TABLES = {
    "OperationMapper": "test_operations.py",
    "QKTransformer": "test_contrastive.py",
    "WholeModelSimilarity": "test_whole_models.py",
}


def public_estimators():
    found = [getattr(skhead, name) for name in skhead.__all__]
    return [x for x in found if inspect.isclass(x) and issubclass(x, BaseEstimator)]


def expected_failures(estimator):
    if isinstance(estimator, MATRIX_READERS):
        return {}
    return {
        "check_estimators_dtypes": "casts samples to integers, which makes every head zero; "
        "integer input is checked in test_extraction.py, where zero heads are refused"
    }


@parametrize_with_checks([cls() for cls in LIFTED], expected_failed_checks=expected_failures)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_every_public_estimator_is_checked():
    checked = {base for cls in LIFTED for base in cls.__mro__}
    public = {cls.__name__ for cls in public_estimators()}
    assert public <= {cls.__name__ for cls in checked} | set(ONLY_TABLES)
    for file in ONLY_TABLES.values():
        text = (Path(__file__).parent / file).read_text()
        assert "clone(" in text and "pickle.loads(" in text


@pytest.mark.parametrize("cls", LIFTED)
def test_checks_do_run(cls):
    """`check_estimator` passes silently on estimators that it cannot feed; count what it runs."""
    assert len(list(estimator_checks_generator(cls()))) >= 40
