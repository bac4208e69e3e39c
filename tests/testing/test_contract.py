"""The contract of head estimators: kept by skhead's own, and broken by every mutant."""

from __future__ import annotations

import inspect
import subprocess
import sys

import more_mutants  # noqa: F401  fills MUTANTS
import pytest
from mutants import MUTANTS
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils import get_tags

import skhead
from skhead.base import HeadTags, declare
from skhead.testing import (
    check_head_estimator,
    head_estimator_checks,
    parametrize_with_head_checks,
)
from skhead.testing._checks import CHECKS

COPYING = [(token, token) for token in range(40)]
OWN = [
    skhead.CircuitScorer(errors="ignore", n_tokens=16),
    skhead.ClassAffinity(),
    skhead.CompositionScore(),
    skhead.ContrastiveQKDecomposer(),
    skhead.GrassmannDistance(),
    skhead.HeadClassifier(),
    skhead.LinearCKA(),
    skhead.NullCalibrator(d_model=24, rank=4),
    skhead.OperationMapper({"copying": COPYING}, source_embedding="raw"),
    skhead.ProcrustesSimilarity(),
    skhead.ProjectionKernel(),
    skhead.QKTransformer(),
    skhead.SalientOperations(source_embedding="raw"),
    skhead.SimpleComposition(),
    skhead.SpectrumSimilarity(),
    skhead.SubspaceExtractor(),
    skhead.SubspaceReadout(),
    skhead.WholeModelSimilarity(skhead.ProjectionKernel(pairs=["KK"], layer_order="all")),
]
#: By what share of the checks applies at least: weights come in as stacks, too; only as a table.
SHARES = [
    (estimator, 0.5 if get_tags(estimator).head_tags.doors == ("table",) else 0.7)
    for estimator in OWN
    if "table" in get_tags(estimator).head_tags.doors
]


@parametrize_with_head_checks(OWN)
def test_own_estimators_keep_the_contract(estimator, check):
    check(estimator)


def test_every_own_estimator_is_checked():
    public = [getattr(skhead, name) for name in skhead.__all__]
    estimators = {x for x in public if inspect.isclass(x) and issubclass(x, BaseEstimator)}
    assert estimators == {type(estimator) for estimator in OWN}


def test_there_are_many_checks():
    assert len(CHECKS) >= 70
    assert all(check.description.endswith(".") for check in CHECKS.values())


@pytest.mark.parametrize("estimator, share", SHARES, ids=lambda x: type(x).__name__)
def test_most_checks_apply_to_estimators_of_heads(estimator, share):
    reasons = [check.reason(estimator) for _, check in head_estimator_checks(estimator)]
    assert reasons.count(None) >= share * len(reasons)


def test_every_check_applies_to_some_own_estimator():
    for check in CHECKS.values():
        assert any(check.reason(estimator) is None for estimator in OWN), check.name


def test_every_check_has_a_mutant():
    assert set(MUTANTS) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_mutant_is_found(name):
    found = outcome(name, MUTANTS[name].estimator)
    assert found.status == "failed", found.detail
    assert name in found.detail


def outcome(name, estimator):
    """What the report says of one check."""
    others = dict.fromkeys(set(CHECKS) - {name}, "not asked for")
    return check_head_estimator(estimator, skip=others, on_fail="record").loc[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_mutant_breaks_nothing_else(name):
    mutant = MUTANTS[name]
    found = check_head_estimator(mutant.estimator, on_fail="record")
    failed = set(found.index[found["status"] == "failed"])
    assert name in failed
    if mutant.also is not None:
        assert failed == {name, *mutant.also}


class Plain(BaseEstimator):
    """Takes stacks by scikit-learn's tags, and declares nothing else."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


def test_estimator_of_features_is_sent_to_scikit_learn():
    with pytest.raises(
        ValueError, match="LogisticRegression declares no head_tags.*check_estimator"
    ):
        check_head_estimator(LogisticRegression())


def test_three_d_tag_stands_for_table_and_stack():
    assert CHECKS["check_strided_stacks"].reason(Plain()) is None
    assert "declares no door 'subspaces'" in CHECKS["check_other_processing_is_refused"].reason(
        Plain()
    )


def test_documented_defaults_that_are_no_literals():
    """An infinite default is documented as Python shows it; np.inf is another text."""

    class Bounded(BaseEstimator):
        __doc__ = "Parameters\n----------\nbound : float, default={}\n"

        def __init__(self, bound=float("inf")):
            self.bound = bound

        def __sklearn_tags__(self):
            return declare(super().__sklearn_tags__(), HeadTags())

    template = Bounded.__doc__
    check = CHECKS["check_documented_defaults"]
    Bounded.__doc__ = template.format("inf")
    check(Bounded())
    Bounded.__doc__ = template.format("np.inf")
    with pytest.raises(AssertionError, match=r"bound has the default inf, and .* says np\.inf"):
        check(Bounded())


def test_class_in_place_of_an_instance_is_refused():
    with pytest.raises(TypeError, match=r"got the class LinearCKA; pass an instance"):
        check_head_estimator(skhead.LinearCKA)


def test_unknown_names_of_checks_are_refused():
    with pytest.raises(ValueError, match="skip names 'check_nothing', which is no check"):
        check_head_estimator(skhead.LinearCKA(), skip={"check_nothing": "why not"})


def test_unknown_tags_are_refused():
    with pytest.raises(ValueError, match="doors holds 'window'"):
        HeadTags(doors=("window",))
    with pytest.raises(ValueError, match="invariant_to holds 'time'"):
        HeadTags(invariant_to=("time",))


def test_failures_are_raised_warned_of_or_recorded():
    name = "check_fitted_attributes_end_with_underscore"
    broken = MUTANTS[name].estimator
    skip = dict.fromkeys(set(CHECKS) - {name}, "not asked for")
    with pytest.raises(AssertionError, match=f"{name}: .*fit sets \\['seen'\\]"):
        check_head_estimator(broken, skip=skip)
    with pytest.warns(UserWarning, match=name):
        table = check_head_estimator(broken, skip=skip, on_fail="warn")
    assert table["status"].value_counts().to_dict() == {"skipped": len(CHECKS) - 1, "failed": 1}
    with pytest.raises(ValueError, match="on_fail must be .* got 'shrug'"):
        check_head_estimator(broken, on_fail="shrug")


def test_what_does_not_apply_says_why():
    table = check_head_estimator(
        skhead.QKTransformer(), skip={"check_cross_validation": "starts processes"}
    )
    idle = table[table["status"] == "not applicable"]
    assert len(idle) > 30
    assert (idle["detail"].str.len() > 10).all()


def test_pytest_is_not_needed():
    code = "import sys, skhead.testing; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
