"""A faster float32 matrix product on CPUs, used only where a probe shows float32 error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

__all__ = ["fast_float32_matmul", "tall_product", "wide"]

#: A float32 product of random 256 x 256 matrices has a relative error near 3e-7; rounding the
#: factors to bfloat16 gives 3e-3. Anything above this is not float32.
_FLOAT32_ERROR = 2e-6


@contextmanager
def fast_float32_matmul(device: torch.device) -> Iterator[None]:
    """Within the context, let CPU products take oneDNN's path if its error is float32's.

    On processors without tile units, asking oneDNN for its reduced-precision mode selects a faster
    kernel that still computes in float32. Whether that holds is measured once per process, on a
    product against float64; where it does not, nothing changes.

    Parameters
    ----------
    device : torch.device
        Where the products run; the context does nothing off the CPU.
    """
    if device.type != "cpu" or not _probe():
        yield
        return
    with _FAST_MODE:
        yield


@cache
def _probe() -> bool:
    """Whether oneDNN's fast mode keeps float32 accuracy on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator, dtype=torch.float64).float()
    with _FAST_MODE:
        product = a @ b
    exact = a.double() @ b.double()
    error = torch.linalg.norm(product - exact) / torch.linalg.norm(exact)
    return bool(error < _FLOAT32_ERROR)


def wide(values: torch.Tensor) -> torch.Tensor:
    """Float64 where the device has it, for small things that are summed.

    Parameters
    ----------
    values : Tensor
    """
    return values if values.device.type == "mps" else values.double()


def tall_product(tall: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """Product of a tall matrix and one of few columns, in float64 about twice as fast on CPUs.

    Libraries block the last side of a product, which is the tall one if both are transposed.

    Parameters
    ----------
    tall : Tensor of shape (n, m)
    narrow : Tensor of shape (m, r)

    Returns
    -------
    Tensor of shape (n, r)
    """
    return (narrow.T @ tall.T).T.contiguous()


def _matmul() -> Any:
    """OneDNN's settings of matrix products, of which torch's types know nothing."""
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


class _FastMode:
    """oneDNN's reduced-precision mode, on while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = "none"

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = _matmul().fp32_precision
                _matmul().fp32_precision = "bf16"
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                _matmul().fp32_precision = self._before


#: The setting is the process's, so its keeper is too; it holds nothing but who is inside.
_FAST_MODE = _FastMode()
