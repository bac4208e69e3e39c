"""Who called: warnings point at the line of the user's code, and are said once for a call of it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

__all__ = ["saying_once", "users_level", "warn_user"]

#: What was said inside of `saying_once`; None outside.
_SAID: ContextVar[set[str] | None] = ContextVar("skhead_said", default=None)

_OWN = f"{Path(__file__).parent}{os.sep}"
#: Libraries that stand between the user and an estimator: mixins, pipelines, searches.
_BETWEEN = ("sklearn.", "joblib.")


@contextmanager
def saying_once() -> Iterator[None]:
    """Give each warning of `warn_user` once inside, however often weights are read."""
    outer = _SAID.set(set() if _SAID.get() is None else _SAID.get())
    try:
        yield
    finally:
        _SAID.reset(outer)


def warn_user(message: str) -> None:
    """Give a UserWarning at the user's line, unless `saying_once` has seen it given."""
    said = _SAID.get()
    if said is not None:
        if message in said:
            return
        said.add(message)
    warnings.warn(message, UserWarning, stacklevel=users_level())


def users_level() -> int:
    """The ``stacklevel`` for which `warnings.warn`, called beside this, names the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_inner(frame.f_code.co_filename, frame.f_globals):
        frame, level = frame.f_back, level + 1
    return level


def _is_inner(file: str, names: dict[str, object]) -> bool:
    return file.startswith(_OWN) or str(names.get("__name__", "")).startswith(_BETWEEN)
