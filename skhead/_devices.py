"""Where estimators compute: the devices that users name, and what happens when one is full."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from skhead._callers import users_level
from skhead.exceptions import MemoryBudgetError
from skhead.linalg.devices import is_out_of_memory, supports_float64

__all__ = [
    "check_device",
    "default_device",
    "halved",
    "naming_full_device",
    "reason_if_full",
    "resolve_device",
    "with_less_memory",
]

Device = torch.device | str | None
_Result = TypeVar("_Result")


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


def with_less_memory(
    compute: Callable[[int], _Result], budget: int, caller: str, smallest: int = 2**16
) -> _Result:
    """Compute within a budget, and again within half of it whenever the device's memory is full.

    Parameters
    ----------
    compute : callable
        From bytes of scratch to a result; nothing of an attempt that failed may stay.
    budget : int
        Bytes to begin with.
    caller : str
        Estimator to name in warnings and errors.
    smallest : int, default=65536
        Bytes that are not halved any more.

    Raises
    ------
    MemoryBudgetError
        If the budget is too small, or the device has no room for the smallest tiles.
    """
    reason = None
    while True:
        try:
            return compute(budget)
        except MemoryBudgetError as error:
            message = f"{caller}: {str(error).removeprefix(f'{caller}: ')}"
            if reason is not None:
                message += f" (max_memory was lowered because the device said: {reason})"
            raise MemoryBudgetError(message) from None
        except RuntimeError as error:
            reason = reason_if_full(error)
        # Here the frames of the failed attempt, and the tensors in them, are gone.
        budget = halved(budget, reason, caller, "max_memory of {} bytes", smallest=smallest)


def reason_if_full(error: RuntimeError) -> str:
    """What a device says whose memory is full; any other error is raised again."""
    if not is_out_of_memory(error):
        raise error
    return str(error).splitlines()[0]


def halved(size: int, reason: str, caller: str, what: str, *, smallest: int = 1) -> int:
    """Half of a size that a device had no memory for, with a warning.

    Parameters
    ----------
    size : int
    reason : str
        What the device said.
    caller : str
        Estimator to name.
    what : str
        What is halved, with braces in the place of its size.
    smallest : int, default=1
        What cannot be halved any more.

    Raises
    ------
    MemoryBudgetError
        If the size is the smallest one.
    """
    if size <= smallest:
        raise MemoryBudgetError(
            f"{caller}: the device is out of memory even with a {what.format(size)} ({reason}); "
            "free its memory, take fewer heads at once, or use device='cpu'"
        )
    less = max(size // 2, smallest)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    warnings.warn(
        f"{caller}: the device is out of memory with a {what.format(size)} ({reason}); trying "
        f"again with a {what.format(less)}",
        UserWarning,
        stacklevel=users_level(),
    )
    return less


@contextmanager
def naming_full_device(caller: str, what: str, remedy: str) -> Iterator[None]:
    """Say what did not fit where nothing can be done about a device whose memory is full.

    Parameters
    ----------
    caller : str
        Estimator to name.
    what, remedy : str

    Raises
    ------
    MemoryBudgetError
    """
    try:
        yield
    except RuntimeError as error:
        reason = reason_if_full(error)
        raise MemoryBudgetError(
            f"{caller}: {what} do not fit into the memory of the device ({reason}); {remedy}"
        ) from error
