"""Who called: warnings point at the line of the user's code, however deep they arise."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["users_level"]

_OWN = f"{Path(__file__).parent}{os.sep}"
#: Where scikit-learn wraps what estimators do.
_WRAPPERS = ("sklearn.callback", "sklearn.utils._set_output")


def users_level() -> int:
    """The ``stacklevel`` for which `warnings.warn`, called beside this, names the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_inner(frame.f_code.co_filename, frame.f_globals):
        frame, level = frame.f_back, level + 1
    return level


def _is_inner(file: str, names: dict[str, object]) -> bool:
    return file.startswith(_OWN) or str(names.get("__name__", "")).startswith(_WRAPPERS)
