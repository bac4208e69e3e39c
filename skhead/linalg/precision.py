"""A faster float32 matrix product on CPUs, used only where a probe shows float32 error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

__all__ = ["fast_float32_matmul"]

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
    with _onednn_mode("bf16"):
        yield


@cache
def _probe() -> bool:
    """Whether oneDNN's fast mode keeps float32 accuracy on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator, dtype=torch.float64).float()
    with _onednn_mode("bf16"):
        product = a @ b
    exact = a.double() @ b.double()
    error = torch.linalg.norm(product - exact) / torch.linalg.norm(exact)
    return bool(error < _FLOAT32_ERROR)


@contextmanager
def _onednn_mode(mode: str) -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = mode
    try:
        yield
    finally:
        matmul.fp32_precision = before
