"""Stacks of matrices that need not lie in memory: what the tiled products ask of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "Stack",
    "StoredStack",
    "copy_transposed",
    "dense",
    "expand",
    "new_empty",
]


class StoredStack(ABC):
    """A stack of shape ``(n_heads, d_model, rank)`` whose numbers are read when they are asked for.

    Attributes
    ----------
    shape : torch.Size
    dtype : torch.dtype
    device : torch.device
        Where the numbers are put once they are read.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def read(self, heads: slice, rows: slice, out: torch.Tensor) -> None:
        """Fill `out` with some rows of some heads.

        Parameters
        ----------
        heads, rows : slice
            Without a step.
        out : Tensor of shape (n_heads, n_rows, rank)
        """

    @abstractmethod
    def take(self, heads: NDArray[np.int64]) -> Self:
        """The stack of some of the heads, none of which is read for it."""

    @abstractmethod
    def to(self, target: torch.dtype | torch.device | str) -> Self:
        """The same stack in another dtype or on another device."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, heads: slice) -> torch.Tensor:
        """Some of the heads, read into memory."""
        out = new_empty(self, len(range(len(self))[heads]), *self.shape[1:])
        self.read(heads, slice(None), out)
        return out

    def element_size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize


#: A stack in memory, or one that is read piece by piece.
Stack = torch.Tensor | StoredStack


def dense(stack: Stack) -> torch.Tensor:
    """A stack in memory, all of it.

    Parameters
    ----------
    stack : Tensor or StoredStack
    """
    return stack if isinstance(stack, torch.Tensor) else stack[:]


def expand(stack: torch.Tensor, index: NDArray[np.int64]) -> torch.Tensor:
    """One matrix for every head, of a stack that holds each distinct one once.

    Parameters
    ----------
    stack : Tensor of shape (n_distinct, d_model, width)
    index : ndarray of shape (n_heads,)
        Matrix of the stack that every head uses.

    Returns
    -------
    Tensor of shape (n_heads, d_model, width)
        The stack itself where every head has one of its own, in order.
    """
    if np.array_equal(index, np.arange(len(stack))):
        return stack
    return stack[torch.as_tensor(index, device=stack.device)]


def new_empty(stack: Stack, *shape: int) -> torch.Tensor:
    """Memory of the dtype and on the device of a stack.

    Parameters
    ----------
    stack : Tensor or StoredStack
    *shape : int
    """
    return torch.empty(shape, dtype=stack.dtype, device=stack.device)


def copy_transposed(stack: Stack, heads: slice, out: torch.Tensor) -> None:
    """Copy some heads, columns first; a stored stack takes the memory of one more head for it.

    Parameters
    ----------
    stack : Tensor or StoredStack of shape (n_heads, d_model, rank)
    heads : slice
    out : Tensor of shape (n_chosen, rank, d_model)
    """
    if isinstance(stack, torch.Tensor):
        out.copy_(stack[heads].mT)
        return
    single = new_empty(stack, 1, *stack.shape[1:])
    for place, head in enumerate(range(len(stack))[heads]):
        stack.read(slice(head, head + 1), slice(None), single)
        out[place].copy_(single[0].mT)
