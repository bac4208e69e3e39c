"""Transfers to a GPU: what waits for what, and the numbers that arrive."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from emulation import EmulatedLanes, emulated
from toys import random_weights, registered

import skhead
from skhead.exceptions import DegenerateHeadError
from skhead.weights.transfers import Transfers, deliver, transfers_to

CPU = torch.device("cpu")


def _run(n_rows, buffer_bytes=64):
    """Events of bringing rows of 8 float32 each, and what arrived."""
    lanes = EmulatedLanes(CPU)
    source = torch.randn(n_rows, 8, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(source)

    def read(rows, host):
        lanes.log.append(("read", rows.start))
        host.copy_(source[rows])

    Transfers(lanes, buffer_bytes).bring(torch.float32, read, out)
    assert torch.equal(out, source)
    return lanes.log


def test_the_order_of_events():
    assert _run(5) == [
        *[("wait", 0), ("read", 0), ("send", 0), ("receive", 0), ("let go", 0)],
        *[("wait", 1), ("read", 2), ("send", 1), ("receive", 1), ("let go", 1)],
        *[("wait", 0), ("read", 4), ("send", 0), ("receive", 0), ("let go", 0)],
    ]


def test_the_next_piece_is_read_while_the_last_one_is_copied():
    log = _run(20)
    sends = [i for i, (event, _) in enumerate(log) if event == "send"]
    for sent, following in pairwise(sends):
        between = log[sent + 1 : following]
        assert ("wait", log[sent][1]) not in between
        assert any(event == "read" for event, _ in between)


def test_no_buffer_is_written_while_it_is_in_use():
    """The host waits before it reads into a slot, and copies wait for the work of the slot."""
    sent, held = set(), set()
    slot = None
    for event, value in _run(50):
        if event == "wait":
            slot = value
            sent.discard(slot)
        elif event == "read":
            assert slot not in sent
        elif event == "send":
            assert value == slot and value not in held
            sent.add(value)
            held.add(value)
        elif event == "let go":
            held.discard(value)


@pytest.mark.parametrize("buffer_bytes", [1, 100, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_any_layout_and_dtype_arrives(buffer_bytes, dtype, axes):
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(6, 10, 9, generator=generator).to(dtype)
    source = fused[:, :, 2:7].permute(axes)
    out = torch.empty(source.shape)
    deliver(source, out, Transfers(EmulatedLanes(CPU), buffer_bytes))
    assert torch.equal(out, source.float())


def test_nothing_and_single_numbers_arrive():
    transfers = Transfers(EmulatedLanes(CPU))
    for source in (torch.empty(0, 3), torch.empty(3, 0), torch.tensor(2.5)):
        out = torch.empty_like(source)
        deliver(source, out, transfers)
        assert torch.equal(out, source)


def test_a_buffer_grows_with_what_is_brought():
    transfers = Transfers(EmulatedLanes(CPU), 10)
    for size in (1, 50, 3):
        source = torch.arange(4.0 * size).view(4, size)
        out = torch.empty_like(source)
        deliver(source, out, transfers)
        assert torch.equal(out, source)


def test_there_is_nothing_to_transfer_to_the_cpu():
    assert transfers_to(CPU) is None
    assert transfers_to(torch.device("mps")) is None


def test_layers_come_to_a_gpu_without_waiting_for_each():
    with registered(random_weights(n_layers=6)) as heads, emulated("cuda") as gpu:
        skhead.SubspaceExtractor(roles="O", center=True).fit_transform(heads)
    # Are all numbers finite, which heads are plain, the largest rank, and all ranks.
    assert len(gpu.syncs) == 4


def test_damaged_heads_are_named_as_on_the_cpu():
    weights = random_weights()
    weights["blocks.1.attn.W_V"][2, 3, 1] = float("nan")
    weights["blocks.2.attn.W_V"][1, 0, 0] = float("inf")
    with registered(weights) as heads:
        messages = []
        for device in ("cpu", "cuda"):
            with emulated("cuda"), pytest.raises(DegenerateHeadError) as raised:
                skhead.SubspaceExtractor(device=device).fit_transform(heads)
            messages.append(str(raised.value))
        with emulated("cuda"):
            rest = heads.drop(index=["L1H2", "L2H1"])
            skhead.SubspaceExtractor(device="cuda").fit_transform(rest)
    assert "L1H2 W_V" in messages[0] and messages[0] == messages[1]


def test_numbers_whose_sum_is_too_large_are_not_taken_for_damaged():
    weights = random_weights(n_layers=1)
    weights["blocks.0.attn.W_Q"] = 1e38 * torch.rand(4, 24, 5)
    assert weights["blocks.0.attn.W_Q"].sum().isinf()
    with registered(weights) as heads, emulated("cuda"):
        bases = skhead.SubspaceExtractor(roles="Q").fit_transform(heads).numpy("Q")
    assert np.isfinite(bases).all()


def test_panels_of_stored_bases_go_through_pinned_memory(tmp_path):
    with registered(random_weights(n_layers=3)) as heads:
        expected = skhead.ProjectionKernel(device="cpu").fit_transform(heads).values
        with emulated("cuda") as gpu:
            subspaces = skhead.SubspaceExtractor(cache=tmp_path).fit_transform(heads)
            found = skhead.ProjectionKernel().fit_transform(subspaces).values
            stack = subspaces.role("O").vectors
            assert isinstance(stack._transfers, Transfers)
            panel = torch.empty(2, 3, 5, device="cuda")
            stack.read(slice(1, 3), slice(4, 7), panel)
            assert torch.equal(panel.cpu(), stack[1:3].cpu()[:, 4:7])
        assert gpu.largest > 0
    np.testing.assert_allclose(found, expected, atol=1e-5)
