"""What a check is: a function of a bench, the conditions under which it applies, and its errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

from skhead.testing._bench import Bench, NotApplicableError

__all__ = [
    "CHECKS",
    "HeadCheck",
    "check",
    "door",
    "invariance",
    "method",
    "parameter",
    "refused",
    "require",
]

#: From a bench to the reason why a check does not apply, or None if it does.
Need = Callable[[Bench], str | None]


@dataclass(frozen=True)
class HeadCheck:
    """One check of the contract; call it with an estimator.

    Attributes
    ----------
    name : str
    function : callable
        Raises AssertionError where a bench shows a violation.
    needs : sequence of callable
        From a bench to the reason why the check does not apply, or None.

    Examples
    --------
    >>> import skhead
    >>> from skhead.testing import head_estimator_checks
    >>> estimator, check = next(head_estimator_checks(skhead.ProjectionKernel()))
    >>> type(check).__name__
    'HeadCheck'
    """

    name: str
    function: Callable[[Bench], None]
    needs: Sequence[Need]

    @property
    def description(self) -> str:
        """What is checked, in a sentence."""
        return (inspect.getdoc(self.function) or "").partition("\n\n")[0].replace("\n", " ")

    def reason(self, estimator: Any) -> str | None:
        """Why the check does not apply to an estimator, or None if it does.

        Parameters
        ----------
        estimator : estimator

        Examples
        --------
        >>> import skhead
        >>> from skhead.testing import head_estimator_checks
        >>> checks = head_estimator_checks(skhead.ProjectionKernel())
        >>> named = {check.name: check.reason(estimator) for estimator, check in checks}
        >>> named["check_pickle"] is None
        True
        """
        bench = Bench(estimator)
        return next((why for need in self.needs if (why := need(bench)) is not None), None)

    def __call__(self, estimator: Any) -> None:
        """Check an estimator, which is cloned and stays as it is.

        Parameters
        ----------
        estimator : estimator

        Raises
        ------
        AssertionError
            If the estimator breaks the contract.
        unittest.SkipTest
            If the check does not apply, with the reason.
        """
        why = self.reason(estimator)
        if why is not None:
            raise SkipTest(why)
        with Bench(estimator) as bench:
            try:
                self.function(bench)
            except NotApplicableError as found:
                raise SkipTest(str(found)) from None

    def __repr__(self) -> str:
        return self.name


#: Every check by name, in the order in which they run.
CHECKS: dict[str, HeadCheck] = {}


def check(*needs: Need) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """Register a function as a check that applies where all needs are met."""

    def register(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
        name = function.__name__
        CHECKS[name] = HeadCheck(name, function, needs)
        return function

    return register


def door(*names: str) -> Need:
    """The estimator declares one of these doors."""

    def need(bench: Bench) -> str | None:
        if set(names) & set(bench.doors):
            return None
        return f"declares no door {' or '.join(map(repr, names))} in its head_tags"

    return need


def parameter(name: str) -> Need:
    """The constructor has a parameter of this name."""
    return lambda bench: None if name in bench.parameters else f"has no parameter {name!r}"


def method(name: str) -> Need:
    """The estimator has a method of this name."""
    return lambda bench: None if hasattr(bench.estimator, name) else f"has no method {name!r}"


def invariance(name: str) -> Need:
    """The estimator declares that a change of the weights leaves its results as they are."""

    def need(bench: Bench) -> str | None:
        if name in bench.head_tags.invariant_to:
            return None
        return f"does not declare {name!r} in invariant_to of its head_tags"

    return need


def require(condition: bool, message: str) -> None:
    """Fail a check unless a condition holds."""
    if not condition:
        raise AssertionError(message)


@contextmanager
def refused(
    bench: Bench, what: str, *mentions: str, kinds: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Fail a check unless the block raises an error that names the estimator and some values.

    Parameters
    ----------
    bench : Bench
    what : str
        What must be refused.
    *mentions : str
        What the message must hold beside the estimator's name; of alternatives joined by ``"|"``
        one.
    kinds : tuple of type, default=()
        What the error must be one of; ValueError or TypeError by default.
    """
    wanted = kinds or (ValueError, TypeError)
    names = " or ".join(kind.__name__ for kind in wanted)
    try:
        yield
    except NotApplicableError:
        raise
    except wanted as error:
        text = str(error)
        for mention in ("|".join(sorted(bench.names)), *mentions):
            if not any(part in text for part in mention.split("|")):
                raise AssertionError(
                    f"{bench.name}: the error for {what} does not name {mention!r}: {text}"
                ) from error
    except Exception as error:
        raise AssertionError(
            f"{bench.name}: {what} must raise {names}, and raised {type(error).__name__}: {error}"
        ) from error
    else:
        raise AssertionError(f"{bench.name}: {what} must raise {names}, and was taken")
