"""Values and reasons as readers of the page, and of ``summary.json``, get them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["because", "json_value", "listed", "number", "rate"]


def number(value: float | None, digits: int = 4) -> str:
    """A number with some significant digits and a real minus sign, or a dash for None."""
    if value is None or not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    text = f"{value:,.{min(decimals, 8)}f}"
    return text.replace("-", "−")


def rate(value: float) -> str:
    """A false discovery rate, however small; one that underflows is told as a bound."""
    if value == 0:
        return "< 1e−300"
    return f"{value:.0e}".replace("e-", "e−") if value < 1e-4 else f"{value:.4f}"


def listed(words: Sequence[str]) -> str:
    """Words in a row, with "and" before the last."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def because(words: str, reason: str, source: str = "") -> str:
    """A sentence with its reason, which does not repeat the address of the model.

    Parameters
    ----------
    words : str
    reason : str
        With or without a full stop at its end, such as the message of an error.
    source : str, default=""
        Address of the model.
    """
    short = reason.replace(f"{source}/", "") if source else reason
    return f"{words}: {short.rstrip('.')}."


def json_value(value: Any) -> Any:
    """A value that JSON knows; None for what is undefined or infinite."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
