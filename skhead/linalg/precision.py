"""Precision of float32 matrix products, set for the time of a call and never for the process.

On CPUs "float32" is computed by a faster path where a probe shows float32 error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from skhead.linalg.devices import supports_float64

__all__ = [
    "MATMUL_PRECISIONS",
    "fast_float32_matmul",
    "matmul_precision",
    "product",
    "tall_product",
    "wide",
]

_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
#: Whether torch gives float32 products of bfloat16 matrices, on CUDA.
_WIDE_OUTPUT = _VERSION >= (2, 8)
#: Whether CUDA's products have a setting of its own name, which must not be mixed with the old one.
_MANY_PRECISIONS = _VERSION >= (2, 9)
#: Names of the precisions, which are those of ``torch.set_float32_matmul_precision``.
MATMUL_PRECISIONS = ("highest", "high", "medium")

#: A float32 product of random 256 x 256 matrices has a relative error near 3e-7; rounding the
#: factors to bfloat16 gives 3e-3. Anything above this is not float32.
_FLOAT32_ERROR = 2e-6


@contextmanager
def matmul_precision(device: torch.device, precision: str = "highest") -> Iterator[None]:
    """Within the context, let products of float32 matrices have a precision.

    On the CPU they have float32 error at any precision. On processors without tile units, asking
    oneDNN for its reduced-precision mode selects a faster kernel that still computes in float32.
    Whether that holds is measured once per process, on a product against float64; where it does
    not, nothing changes. On CUDA, TF32 is on for "high" and "medium" and off for "highest",
    whatever the process has set.

    Parameters
    ----------
    device : torch.device
        Where the products run.
    precision : {"highest", "high", "medium"}, default="highest"
        float32; TF32, with 10 bits of mantissa; bfloat16, with 7 bits, which only products of
        matrices that the caller has rounded have.
    """
    mode: AbstractContextManager[None] = nullcontext()
    if device.type == "cpu" and _probe():
        mode = _ONEDNN_MODE("bf16")
    elif device.type == "cuda":
        mode = _CUDA_MODE(_CUDA_MODES[precision])
    with mode:
        yield


def fast_float32_matmul(device: torch.device) -> AbstractContextManager[None]:
    """The fastest products with float32 error; see `matmul_precision`.

    Parameters
    ----------
    device : torch.device
    """
    return matmul_precision(device)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Product of two matrices; of bfloat16 ones, in float32 where the device gives that.

    On the CPU a product of bfloat16 matrices is rounded to bfloat16 too, a relative error of
    ``2^-9`` of each entry.

    Parameters
    ----------
    a : Tensor of shape (n, m)
    b : Tensor of shape (m, r)

    Returns
    -------
    Tensor of shape (n, r)
    """
    if a.dtype == torch.bfloat16 and a.device.type == "cuda" and _WIDE_OUTPUT:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


@cache
def _probe() -> bool:
    """Whether oneDNN's fast mode keeps float32 accuracy on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator, dtype=torch.float64).float()
    with _ONEDNN_MODE("bf16"):
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
    return values.double() if supports_float64(values.device) else values


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


class _ScopedSetting:
    """A setting of the process that has a value while any thread is inside.

    Where threads ask for different values at once, all get the most exact of them.

    Parameters
    ----------
    holder : callable
        The object that has the setting.
    name : str
    values : sequence
        What may be asked for, the most exact first.
    """

    def __init__(self, holder: Callable[[], Any], name: str, values: Sequence[Any]) -> None:
        self._holder, self._name = holder, name
        self._lock = threading.Lock()
        self._inside = dict.fromkeys(values, 0)
        self._before: Any = None

    @contextmanager
    def __call__(self, value: Any) -> Iterator[None]:
        with self._lock:
            if not any(self._inside.values()):
                self._before = getattr(self._holder(), self._name)
            self._count(value, 1)
        try:
            yield
        finally:
            with self._lock:
                self._count(value, -1)

    def _count(self, value: Any, change: int) -> None:
        self._inside[value] += change
        asked = (value for value, inside in self._inside.items() if inside)
        setattr(self._holder(), self._name, next(asked, self._before))


#: A setting is the process's, so its keeper is too; it holds nothing but who is inside.
_ONEDNN_MODE = _ScopedSetting(
    lambda: torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    "fp32_precision",
    ["bf16"],
)
_CUDA_MODES: dict[str, Any] = {"highest": "ieee", "high": "tf32", "medium": "tf32"}
if not _MANY_PRECISIONS:
    _CUDA_MODES = {"highest": False, "high": True, "medium": True}
_CUDA_MODE = _ScopedSetting(
    lambda: torch.backends.cuda.matmul,
    "fp32_precision" if _MANY_PRECISIONS else "allow_tf32",
    list(dict.fromkeys(_CUDA_MODES.values())),
)
