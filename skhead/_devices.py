"""Where estimators compute: the devices that users name, and what happens when one is full."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from skhead.exceptions import MemoryBudgetError
from skhead.linalg.devices import is_out_of_memory, supports_float64

__all__ = ["check_device", "default_device", "halved", "resolve_device", "with_less_memory"]

Device = torch.device | str | None
_Result = TypeVar("_Result")

#: Bytes below which a budget is not halved any more.
_SMALLEST_BUDGET = 2**16


def default_device() -> torch.device:
    """The GPU that CUDA puts first, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: Device, caller: str, *, float64: bool = False) -> torch.device | None:
    """A device that is there; None stays None, which means that of the input or the default.

    Parameters
    ----------
    device : torch.device, str or None
    caller : str
        Estimator or function to name in errors.
    float64 : bool, default=False
        Whether the work needs float64 on the device itself.

    Raises
    ------
    ValueError
        If there is no such device, or it cannot do the work.
    """
    if device is None:
        return None
    try:
        wanted = torch.device(device)
        if wanted.type == "meta":
            raise RuntimeError("the meta device holds no numbers")
        torch.empty(0, device=wanted)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{caller}: device {device!r} cannot be used: {reason}; this machine has "
            f"{', '.join(_available())}, and device=None takes {default_device()}"
        ) from error
    if float64 and not supports_float64(wanted):
        raise ValueError(
            f"{caller}: computes in float64, which device {str(wanted)!r} does not have; use "
            "device='cpu'"
        )
    return wanted


def resolve_device(device: Device, caller: str, *, float64: bool = False) -> torch.device:
    """The device that is asked for, as `check_device`, or the default."""
    wanted = check_device(device, caller, float64=float64)
    return default_device() if wanted is None else wanted


def _available() -> list[str]:
    """Names of the devices of this machine."""
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names


def with_less_memory(compute: Callable[[int], _Result], budget: int, caller: str) -> _Result:
    """Compute within a budget, and again within half of it whenever the device's memory is full.

    Parameters
    ----------
    compute : callable
        From bytes of scratch to a result; nothing of an attempt that failed may stay.
    budget : int
        Bytes to begin with.
    caller : str
        Estimator to name in warnings and errors.

    Raises
    ------
    MemoryBudgetError
        If the device has no room for the smallest tiles.
    """
    full = None
    while True:
        try:
            return compute(budget)
        except MemoryBudgetError as error:
            if full is None:
                raise MemoryBudgetError(f"{caller}: {error}") from None
            raise MemoryBudgetError(
                f"{caller}: the device has no room for the smallest tiles ({full}; then: {error}); "
                "free its memory, compare fewer heads at once, or use device='cpu'"
            ) from None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            full = str(error).splitlines()[0]
        # Outside of the except clause, where the failed attempt's frames hold no tensors any more.
        budget = halved(budget, full, caller, "max_memory", "bytes", smallest=_SMALLEST_BUDGET)


def halved(
    size: int, reason: str, caller: str, name: str, unit: str, *, smallest: int, stacklevel: int = 3
) -> int:
    """Half of a size that the device had no memory for, with a warning.

    Parameters
    ----------
    size : int
    reason : str
        What the device said.
    caller : str
        Estimator to name.
    name, unit : str
        What is halved.
    smallest : int
        What cannot be halved any more.
    stacklevel : int, default=3
        As for `warnings.warn`.

    Raises
    ------
    MemoryBudgetError
        If the size is the smallest one.
    """
    if size <= smallest:
        raise MemoryBudgetError(
            f"{caller}: the device has no room even for {name}={size} {unit} ({reason}); free its "
            "memory, take fewer heads at once, or use device='cpu'"
        )
    less = max(size // 2, smallest)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    warnings.warn(
        f"{caller}: the device is out of memory ({reason}); trying again with {name}={less} "
        f"{unit} in place of {size}",
        UserWarning,
        stacklevel=stacklevel,
    )
    return less
