"""The contract that estimators of attention heads keep, as checks for anyone's estimator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import SkipTest

import pandas as pd

from skhead.testing import (
    _doors,
    _errors,
    _invariance,
    _output,
    _parameters,
    _state,
)
from skhead.testing._bench import Bench
from skhead.testing._checks import CHECKS, HeadCheck

__all__ = [
    "HeadCheck",
    "check_head_estimator",
    "head_estimator_checks",
    "parametrize_with_head_checks",
]

#: Modules that register checks as they are imported.
GROUPS = (_parameters, _state, _doors, _invariance, _errors, _output)


def head_estimator_checks(estimator: Any) -> Iterator[tuple[Any, HeadCheck]]:
    """Every check of the contract with an estimator, for a loop or a test runner of one's own.

    Parameters
    ----------
    estimator : estimator
        An instance, whose parameters are those that are checked.

    Yields
    ------
    estimator : estimator
        The same one.
    check : HeadCheck
        Call it with the estimator: it raises AssertionError where the contract is broken, and
        unittest.SkipTest, with the reason, where it does not apply.

    Raises
    ------
    TypeError
        If a class is given instead of an instance.
    ValueError
        If the estimator neither declares `HeadTags` nor takes 3-D stacks.

    Examples
    --------
    >>> import skhead
    >>> from skhead.testing import head_estimator_checks
    >>> checks = list(head_estimator_checks(skhead.ProjectionKernel()))
    >>> len(checks) > 50
    True
    """
    if isinstance(estimator, type):
        raise TypeError(
            f"head_estimator_checks: got the class {estimator.__name__}; pass an instance, "
            f"{estimator.__name__}(...)"
        )
    Bench(estimator)
    for check in CHECKS.values():
        yield estimator, check


def check_head_estimator(
    estimator: Any,
    *,
    skip: Mapping[str, str] | None = None,
    on_fail: str = "raise",
) -> pd.DataFrame:
    """Hold an estimator of attention heads to the contract that skhead's own estimators keep.

    The counterpart of ``sklearn.utils.estimator_checks.check_estimator``, which runs nothing on
    estimators that take no 2-D array. Which checks apply follows from what the estimator declares
    (scikit-learn's tags and `skhead.base.HeadTags`), from the parameters of its constructor and
    from its methods. Heads are those of small random models.

    Parameters
    ----------
    estimator : estimator
        An instance, whose parameters are those that are checked.
    skip : mapping of str to str, default=None
        By name, checks that are not run, with the reason.
    on_fail : {"raise", "warn", "record"}, default="raise"
        Raise the first failure, warn of each, or say nothing but in the table.

    Returns
    -------
    DataFrame
        One row per check, by name: ``status`` ("passed", "failed", "skipped", or "not applicable"),
        ``detail`` (why it was skipped or does not apply, or what fails) and ``description``.

    Raises
    ------
    AssertionError
        With ``on_fail="raise"``, if a check fails; the message names the check.
    TypeError
        If a class is given instead of an instance.
    ValueError
        If a parameter is wrong, or the estimator neither declares `HeadTags` nor takes 3-D stacks.

    See Also
    --------
    parametrize_with_head_checks : One pytest test for every check.

    Examples
    --------
    >>> import skhead
    >>> from skhead.testing import check_head_estimator
    >>> found = check_head_estimator(
    ...     skhead.LinearCKA(), skip={"check_cross_validation": "starts processes"}
    ... )
    >>> bool((found["status"] == "passed").sum() > 40)
    True
    """
    if on_fail not in ("raise", "warn", "record"):
        raise ValueError(
            f"check_head_estimator: on_fail must be 'raise', 'warn' or 'record'; got {on_fail!r}"
        )
    reasons = _known(skip, "check_head_estimator")
    rows = {}
    for _, check in head_estimator_checks(estimator):
        status, detail = _outcome(check, estimator, reasons, on_fail)
        rows[check.name] = (status, detail, check.description)
    columns = ["status", "detail", "description"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _outcome(
    check: HeadCheck, estimator: Any, reasons: Mapping[str, str], on_fail: str
) -> tuple[str, str]:
    if check.name in reasons:
        return "skipped", reasons[check.name]
    try:
        check(estimator)
    except SkipTest as found:
        return "not applicable", str(found)
    except Exception as error:
        message = f"{check.name}: {type(error).__name__}: {error}"
        if on_fail == "raise":
            raise AssertionError(message) from error
        if on_fail == "warn":
            warnings.warn(message, UserWarning, stacklevel=3)
        return "failed", message
    return "passed", ""


def _known(skip: Mapping[str, str] | None, caller: str) -> dict[str, str]:
    """Reasons by check, of which each exists."""
    reasons = dict(skip or {})
    unknown = [name for name in reasons if name not in CHECKS]
    if unknown:
        raise ValueError(
            f"{caller}: skip names {unknown[0]!r}, which is no check; the checks are "
            f"{', '.join(CHECKS)}"
        )
    return reasons


def parametrize_with_head_checks(
    estimators: Sequence[Any],
    *,
    skip: Callable[[Any], Mapping[str, str]] | None = None,
) -> Any:
    """Decorator that makes one pytest test of every check of some estimators.

    The counterpart of ``sklearn.utils.estimator_checks.parametrize_with_checks``. pytest is
    imported when it is called.

    Parameters
    ----------
    estimators : sequence of estimator
    skip : callable, default=None
        From an estimator to the checks that are not run, with reasons, as for
        `check_head_estimator`.

    Returns
    -------
    decorator
        For a function of ``estimator`` and ``check``, which calls ``check(estimator)``. Checks that
        do not apply show as skipped, with the reason.

    Raises
    ------
    TypeError, ValueError
        As for `head_estimator_checks`.

    Examples
    --------
    >>> import skhead
    >>> from skhead.testing import parametrize_with_head_checks
    >>> @parametrize_with_head_checks([skhead.LinearCKA(), skhead.ProjectionKernel()])
    ... def test_contract(estimator, check):
    ...     check(estimator)
    """
    import pytest

    cases = []
    for estimator in estimators:
        reasons = _known(skip(estimator) if skip else None, "parametrize_with_head_checks")
        for _, check in head_estimator_checks(estimator):
            why = reasons.get(check.name)
            marks = [] if why is None else [pytest.mark.skip(reason=why)]
            name = f"{type(estimator).__name__}-{check.name}"
            cases.append(pytest.param(estimator, check, marks=marks, id=name))
    return pytest.mark.parametrize("estimator, check", cases)
