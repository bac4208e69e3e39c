"""From files to a GPU: the next piece is read while the one before is still being copied.

Pieces are read into two buffers of pinned memory, which the GPU fetches from by itself. Copies run
beside the work on a stream of their own, into two buffers on the GPU, out of which the work takes
the numbers where and in which dtype it wants them. On the CPU there is nothing to transfer.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["CudaLanes", "Lanes", "Transfers", "deliver", "transfers_to"]

#: Bytes of a buffer, unless a single row takes more. Twice as much is pinned, and taken of the GPU.
_BUFFER_BYTES = 2**25
_SLOTS = 2


class Lanes(Protocol):
    """What runs by itself on a device, copies and work, and how one waits for the other.

    Each slot has a buffer on the host and one on the device.
    """

    def host_buffer(self, n_bytes: int) -> torch.Tensor:
        """Memory of the host that the device can fetch from, uint8."""

    def device_buffer(self, n_bytes: int) -> torch.Tensor:
        """Memory of the device that copies may write to at once, uint8."""

    def wait_until_sent(self, slot: int) -> None:
        """Let the host wait until the last copy out of the slot's host buffer is over."""

    def send(self, slot: int, host: torch.Tensor, device: torch.Tensor) -> None:
        """Copy once the work has let go of the slot's device buffer; the host does not wait."""

    def receive(self, slot: int) -> None:
        """Let the work wait until the slot's copy is over; the host does not wait."""

    def let_go(self, slot: int) -> None:
        """Say that the work so far is all that needs the slot's device buffer."""


class CudaLanes:
    """The current stream of a CUDA device for the work, and another one for copies.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._sent = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._let_go = [torch.cuda.Event() for _ in range(_SLOTS)]

    def host_buffer(self, n_bytes: int) -> torch.Tensor:
        """Pinned memory."""
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def device_buffer(self, n_bytes: int) -> torch.Tensor:
        """Memory that the work may have used for something else just before."""
        buffer = torch.empty(n_bytes, dtype=torch.uint8, device=self._device)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        return buffer

    def wait_until_sent(self, slot: int) -> None:
        """Block until the slot's copy is over."""
        self._sent[slot].synchronize()

    def send(self, slot: int, host: torch.Tensor, device: torch.Tensor) -> None:
        """Queue a copy."""
        self._copies.wait_event(self._let_go[slot])
        with torch.cuda.stream(self._copies):
            device.copy_(host, non_blocking=True)
            self._sent[slot].record(self._copies)

    def receive(self, slot: int) -> None:
        """Queue a wait."""
        torch.cuda.current_stream(self._device).wait_event(self._sent[slot])

    def let_go(self, slot: int) -> None:
        """Queue a mark."""
        self._let_go[slot].record(torch.cuda.current_stream(self._device))


class Transfers:
    """Brings what is read to a device, piece by piece through two slots by turns.

    Parameters
    ----------
    lanes : Lanes
    buffer_bytes : int, default=33554432
        Bytes of a buffer, unless a single row takes more.
    """

    def __init__(self, lanes: Lanes, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._lanes = lanes
        self._buffer_bytes = buffer_bytes
        self._buffers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * _SLOTS
        self._next = 0
        self._lock = threading.Lock()

    def bring(
        self, dtype: torch.dtype, read: Callable[[slice, torch.Tensor], None], out: torch.Tensor
    ) -> None:
        """Fill a tensor on the device.

        Parameters
        ----------
        dtype : torch.dtype
            Of the numbers that are read; they are converted on the device.
        read : callable
            Told which rows of `out`, and a tensor of the host to put their numbers into.
        out : Tensor of shape (n_rows, ...)
            Of any dtype and strides. Work that is queued from now on finds it filled.
        """
        if not out.numel():
            return
        each = math.prod(out.shape[1:]) * dtype.itemsize
        step = max(self._buffer_bytes // each, 1)
        with self._lock:
            for start in range(0, len(out), step):
                part = out[start : start + step]
                slot, self._next = self._next, (self._next + 1) % _SLOTS
                self._lanes.wait_until_sent(slot)
                host, there = (
                    buffer[: len(part) * each].view(dtype).view(part.shape)
                    for buffer in self._slot(slot, len(part) * each)
                )
                read(slice(start, start + len(part)), host)
                self._lanes.send(slot, host, there)
                self._lanes.receive(slot)
                part.copy_(there)
                self._lanes.let_go(slot)

    def _slot(self, slot: int, n_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers of a slot, made anew if they are too small."""
        found = self._buffers[slot]
        if found is None or len(found[0]) < n_bytes:
            self._buffers[slot] = None
            found = self._lanes.host_buffer(n_bytes), self._lanes.device_buffer(n_bytes)
            self._buffers[slot] = found
        return found


def transfers_to(device: torch.device) -> Transfers | None:
    """Transfers to a CUDA device; None for others, where numbers are copied as they are.

    Parameters
    ----------
    device : torch.device
    """
    return Transfers(CudaLanes(device)) if device.type == "cuda" else None


def deliver(source: torch.Tensor, out: torch.Tensor, transfers: Transfers | None) -> None:
    """Copy a tensor, through pinned memory if it has to go from the host to a GPU.

    Parameters
    ----------
    source : Tensor
        It is read in the order in which it lies in memory.
    out : Tensor of the same shape
    transfers : Transfers or None
    """
    if transfers is None or source.device.type != "cpu" or not source.ndim:
        out.copy_(source)
        return
    strides = source.stride()
    order = sorted(range(source.ndim), key=lambda axis: -strides[axis])
    laid = source.permute(order)

    def read(rows: slice, host: torch.Tensor) -> None:
        host.copy_(laid[rows])

    transfers.bring(source.dtype, read, out.permute(order))
