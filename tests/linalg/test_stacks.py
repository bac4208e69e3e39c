"""Stacks that are read piece by piece, without any file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skhead.linalg.kernels import overlap_blocks, plan_overlaps
from skhead.linalg.stacks import (
    StoredStack,
    copy_transposed,
    dense,
    expand,
    new_empty,
)


class Recorded(StoredStack):
    """A stack in memory that notes what is read and where to."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.reads = []

    def read(self, heads, rows, out):
        out.copy_(self.tensor[heads, rows])
        self.reads.append((out.data_ptr(), out.numel()))

    def take(self, heads):
        return Recorded(self.tensor[torch.as_tensor(heads)])

    def to(self, target):
        return Recorded(self.tensor.to(target))


@pytest.fixture
def tensor():
    return torch.randn(5, 12, 3, generator=torch.Generator().manual_seed(0))


def test_every_head_gets_the_matrix_that_it_uses(tensor):
    assert expand(tensor, np.arange(5)) is tensor
    for index in ([0, 0, 3, 3], [0, 1], [4, 3, 2, 1, 0], []):
        assert torch.equal(expand(tensor, np.array(index, dtype=int)), tensor[index])


def test_turned_heads_are_copies_of_slices(tensor):
    for stack in (tensor, Recorded(tensor)):
        turned = torch.empty(2, 3, 12)
        copy_transposed(stack, slice(1, 3), turned)
        assert torch.equal(turned, tensor[1:3].mT)
        assert torch.equal(dense(stack), tensor)
        assert new_empty(stack, 2, 7).shape == (2, 7)
        assert len(stack) == 5 and stack.element_size() == 4


def test_heads_pass_through_the_memory_of_one(tensor):
    """Memory of its own for each would leave holes that an allocator may not fill again."""
    stack = Recorded(tensor)
    copy_transposed(stack, slice(0, 5), torch.empty(5, 3, 12))
    assert len(stack.reads) == 5 and len(set(stack.reads)) == 1
    assert stack.reads[0][1] == tensor[0].numel()


@pytest.mark.parametrize(("max_memory", "times"), [(2**30, 1), (70_000, 1.875)])
def test_a_stored_stack_is_read_as_seldom_as_memory_allows(max_memory, times):
    tensor = torch.randn(6, 512, 4, generator=torch.Generator().manual_seed(0))
    stack = Recorded(tensor)
    plan = plan_overlaps([stack], None, [(0, 0)], max_memory, "packed")
    assert plan.scratch_bytes <= max_memory
    found = overlap_blocks([stack], None, [(0, 0)], max_memory=max_memory, method="packed")[0, 0]
    torch.testing.assert_close(found, overlap_blocks([tensor], None, [(0, 0)])[0, 0])
    panels = -(-512 // plan.width)
    reads = sum(panels - start for start in range(0, panels, plan.group))
    assert len(stack.reads) == reads
    assert reads / panels == times
