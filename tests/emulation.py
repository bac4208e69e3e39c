"""A device that is not there, played by the CPU: where tensors are counts, and what they may hold.

Within `emulated`, tensors made on the device are computed on the CPU and claim to be on the device.
As on a real one, tensors of two devices do not meet, and numbers come to the host only by copies,
which are counted. A device may lack float64, and may run out of memory.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
#: Bring one number, or a number of elements that depends on numbers, to the host.
_WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
}
_COPIES = {aten.copy_.default, aten._to_copy.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


_ITEMS = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class _There(torch.Tensor):
    """A tensor that claims to be on the emulated device; to torch's own code it is on "meta"."""

    inner: torch.Tensor
    there: torch.device

    @staticmethod
    def __new__(cls, inner, device):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner, made.there = inner, device
        return made

    @property
    def device(self):
        return self.there

    def __repr__(self):
        return f"_There({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} met a tensor of the emulated device outside of `emulated`")


class Emulation(TorchDispatchMode):
    """What happens on the device.

    `syncs` lists what the host waited for, `largest` is the size in bytes of the largest tensor,
    and `refused` the number of tensors that there was no room for.
    """

    def __init__(self, device, float64, room):
        super().__init__()
        self.device, self.float64, self.room = torch.device(device), float64, room
        self.syncs, self.largest, self.refused = [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        flat = tree_flatten((args, kwargs))[0]
        theirs = [x for x in flat if isinstance(x, _There)]
        to_device = asked is not None and torch.device(asked).type in ("meta", self.device.type)
        if not theirs and not to_device:
            return func(*args, **kwargs)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if func not in _COPIES:
            self._refuse_mixtures(func, flat, args)
        self._count(func, args, asked, to_device)
        with torch.utils._python_dispatch._disable_current_modes():
            args, kwargs = tree_map(_inner, (args, kwargs))
            out = func(*args, **kwargs)
        stays = isinstance(flat[0], _There) if func is aten.copy_.default else asked is None
        return tree_map(self._wrapped, out) if stays or to_device else out

    def _wrapped(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.float64 and not self.float64:
            raise TypeError(f"{self.device} does not support float64")
        size = value.untyped_storage().nbytes()
        self.largest = max(self.largest, size)
        if size > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError(f"emulated device out of memory: {size} bytes")
        index = self.device.index or 0
        return _There(value, torch.device(self.device.type, index))

    def _count(self, func, args, asked, to_device):
        masked = func in _INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if func in _WAITING or masked:
            self.syncs.append(str(func))
        if func is aten._to_copy.default and asked is not None and not to_device:
            self.syncs.append("to the host")
        if func is aten.copy_.default and not isinstance(args[0], _There):
            self.syncs.append("to the host")

    @staticmethod
    def _refuse_mixtures(func, flat, args):
        """Tensors of two devices; single numbers and indices may be the host's, as on CUDA."""
        if func in _INDEXING and isinstance(args[0], _There):
            flat = [args[0], *args[2:3]]
        for value in flat:
            if isinstance(value, torch.Tensor) and not isinstance(value, _There) and value.ndim:
                raise RuntimeError(f"{func}: expected all tensors on one device")


class _Numbered(TorchFunctionMode):
    """Writes what torch would hand to a driver otherwise.

    "cuda" becomes "cuda:0", and lists of indices become tensors, which may be the host's.
    """

    def __init__(self, device):
        super().__init__()
        self.kind = torch.device(device).type

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.tolist and isinstance(args[0], _There):
            return args[0].cpu().tolist()
        if func in _ITEMS and isinstance(args[0], _There):
            args = (args[0], _with_tensors(args[1]), *args[2:])
        return func(*map(self._numbered, args), **tree_map(self._numbered, kwargs or {}))

    def _numbered(self, value):
        named = isinstance(value, torch.device | str) and str(value) == self.kind
        return torch.device(self.kind, 0) if named else value


class EmulatedLanes:
    """Copies that are made as late as they may be: when the work needs them."""

    def __init__(self, device):
        self._device, self._queued = device, {}
        self.log = []

    def host_buffer(self, n_bytes):
        return torch.empty(n_bytes, dtype=torch.uint8)

    def device_buffer(self, n_bytes):
        return torch.empty(n_bytes, dtype=torch.uint8, device=self._device)

    def wait_until_sent(self, slot):
        self.log.append(("wait", slot))

    def send(self, slot, host, device):
        self.log.append(("send", slot))
        self._queued[slot] = (host, device)

    def receive(self, slot):
        self.log.append(("receive", slot))
        host, device = self._queued.pop(slot)
        device.copy_(host)

    def let_go(self, slot):
        self.log.append(("let go", slot))


def _with_tensors(index):
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _inner(value):
    return value.inner if isinstance(value, _There) else value


@contextmanager
def emulated(device="cuda:0", *, room=float("inf")):
    """Pretend that the machine has a device; CUDA's becomes the default one.

    `room` is the number of bytes that its largest tensor may have.
    """
    kind = torch.device(device).type
    with (
        _lifting(),
        mock.patch("torch.cuda.is_available", return_value=kind == "cuda"),
        mock.patch("torch.cuda.device_count", return_value=int(kind == "cuda")),
        mock.patch("torch.cuda.empty_cache"),
        mock.patch("skhead.weights.transfers.CudaLanes", EmulatedLanes),
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.backends.mps.is_available", return_value=kind == "mps"),
        mock.patch.object(torch.Tensor, "numpy", _numpy),
        _Numbered(device),
        Emulation(device, kind != "mps", room) as mode,
    ):
        yield mode


@contextmanager
def _lifting():
    """Let torch.tensor and torch.as_tensor make numbers on the host, and copy them from there."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


_TO_NUMPY = torch.Tensor.numpy


def _numpy(tensor, **options):
    if isinstance(tensor, _There):
        raise TypeError("can't convert a tensor of the emulated device to numpy; use .cpu() first")
    return _TO_NUMPY(tensor, **options)
