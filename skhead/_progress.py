"""How long jobs tell how far they are: bars in a terminal, and scikit-learn's callbacks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from skhead._callers import saying_once

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn has callbacks from 1.9 on

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's; an estimator then has no ``set_callbacks``."""

    def with_callbacks(method: Any) -> Any:
        """Leave a method as it is."""
        return method


__all__ = [
    "CallbackSupportMixin",
    "progress_bar",
    "progress_fraction",
    "progress_of_calls",
    "reports_fit",
]

_Fit = TypeVar("_Fit", bound=Callable[..., Any])
_PERCENT = 100


@dataclass(frozen=True)
class _Task:
    """A task of a fit of which callbacks are told.

    Attributes
    ----------
    estimator : estimator
    context : sklearn.callback.CallbackContext
    """

    estimator: Any
    context: Any

    def begin(self, name: str, n_subtasks: int = 0) -> _Task:
        """Begin a part of this task."""
        context = self.context.subcontext(task_name=name, max_subtasks=n_subtasks)
        context.call_on_fit_task_begin(estimator=self.estimator)
        return _Task(self.estimator, context)

    def end(self) -> None:
        """End this task; a callback's wish to stop is not followed, as half a result is none."""
        self.context.call_on_fit_task_end(estimator=self.estimator)


#: The fit whose long jobs are its subtasks; None inside of them, and where nobody listens.
_FIT: ContextVar[_Task | None] = ContextVar("skhead_fit", default=None)


def reports_fit(method: _Fit) -> _Fit:
    """Tell the callbacks of an estimator, if it has any, of its fit and the long jobs in it.

    A warning that several of its steps would give is given once.

    Parameters
    ----------
    method : function
        ``fit`` or ``fit_transform``; one that calls the other is told of once.
    """

    @with_callbacks
    def told(self: Any, X: Any, *args: Any, **kwargs: Any) -> Any:
        y = args[0] if args else kwargs.get("y")
        context = self._init_callback_context(max_subtasks=None)
        context.call_on_fit_task_begin(estimator=self, X=X, y=y)
        outer = _FIT.set(_Task(self, context))
        try:
            found = method(self, X, *args, **kwargs)
        finally:
            _FIT.reset(outer)
        context.call_on_fit_task_end(estimator=self, X=X, y=y)
        return found

    @functools.wraps(method)
    def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        untold = getattr(self, "_skl_callbacks", None) and not hasattr(self, "_callback_fit_ctx")
        with saying_once():
            return (told if untold else method)(self, *args, **kwargs)

    return fit  # type: ignore[return-value]


def progress_bar(items: Iterable[Any], description: str, unit: str) -> Iterator[Any]:
    """Iterate over items whose number is known, and tell how many are done.

    Callbacks are told of every item. Where there are none, a bar shows itself in a terminal if the
    work takes over two seconds.
    """
    listed = list(items)
    fit = _FIT.get()
    if fit is None:
        yield from tqdm(listed, desc=description, unit=unit, delay=2.0, leave=False, disable=None)
        return
    job = fit.begin(description, len(listed))
    with _alone():
        for item in listed:
            part = job.begin(unit)
            yield item
            part.end()
    job.end()


@contextmanager
def progress_fraction(description: str) -> Iterator[Callable[[float], None]]:
    """A function to call with the fraction done, which tells it as `progress_bar` does.

    Callbacks are told of every percent.
    """
    fit = _FIT.get()
    if fit is not None:
        with _alone(), _percents(fit, description) as advance:
            yield advance
        return
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with tqdm(
        total=1.0, desc=description, delay=2.0, leave=False, disable=None, bar_format=bar_format
    ) as bar:

        def advance(fraction: float) -> None:
            bar.update(fraction - bar.n)

        yield advance


@contextmanager
def progress_of_calls(
    function: Callable[..., Any], n_calls: int, description: str
) -> Iterator[Callable[..., Any]]:
    """The same function, which tells as `progress_fraction` does how many calls it has served."""
    with progress_fraction(description) as progress:
        served = itertools.count(1)

        def counted(*args: Any) -> Any:
            found = function(*args)
            progress(next(served) / n_calls)
            return found

        yield counted


@contextmanager
def _percents(fit: _Task, description: str) -> Iterator[Callable[[float], None]]:
    job, told = fit.begin(description, _PERCENT), 0

    def advance(fraction: float) -> None:
        nonlocal told
        while told < min(int(fraction * _PERCENT + 1e-9), _PERCENT):
            job.begin("percent").end()
            told += 1

    yield advance
    job.end()


@contextmanager
def _alone() -> Iterator[None]:
    """Leave jobs inside of this one untold."""
    outer = _FIT.set(None)
    try:
        yield
    finally:
        _FIT.reset(outer)
