"""What devices can do, and which of their errors mean that their memory is full."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["exact_device", "is_out_of_memory", "put", "supports_float64"]

#: Types of devices that compute nothing in float64.
_WITHOUT_FLOAT64 = frozenset({"mps"})
#: How those who raise a plain RuntimeError say that a device's memory is full. A host that has none
#: left says "can't allocate memory", which trying again with less does not mend.
_FULL = ("out of memory", "cublas_status_alloc_failed", "cusolver_status_alloc_failed")


def supports_float64(device: torch.device | str) -> bool:
    """Whether a device computes in float64, which Apple's GPUs do not.

    Parameters
    ----------
    device : torch.device or str

    Returns
    -------
    bool

    Examples
    --------
    >>> from skhead.linalg.devices import supports_float64
    >>> supports_float64("cpu"), supports_float64("mps")
    (True, False)
    """
    return torch.device(device).type not in _WITHOUT_FLOAT64


def exact_device(device: torch.device | str) -> torch.device:
    """Where numbers of a device are taken for float64: there if it can, else the CPU.

    Parameters
    ----------
    device : torch.device or str

    Returns
    -------
    torch.device
    """
    return torch.device(device) if supports_float64(device) else torch.device("cpu")


def put(values: Any, device: torch.device) -> torch.Tensor:
    """Numbers on a device, in float32 where they are float64 and the device has none.

    Parameters
    ----------
    values : Tensor or array
    device : torch.device

    Returns
    -------
    Tensor
    """
    tensor = torch.as_tensor(values)
    if tensor.dtype == torch.float64 and not supports_float64(device):
        tensor = tensor.float()
    return tensor.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, not of the host, is full.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    bool
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _FULL)
