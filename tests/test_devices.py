"""Where estimators compute: the rule, its errors, and that tensors of two devices never meet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation import emulated
from placed import ANYWHERE, EXACT, HEADS, numbers
from toys import toy_heads

import skhead
from skhead._devices import check_device, resolve_device
from skhead.linalg.devices import exact_device, is_out_of_memory, put, supports_float64


@pytest.mark.parametrize("name", [*ANYWHERE, *EXACT])
def test_a_gpu_is_the_default_and_gives_the_samenumbers(name):
    compute = (ANYWHERE | EXACT)[name]
    expected = numbers(compute("cpu"))
    with emulated("cuda:0") as gpu:
        found = numbers(compute(None))
    assert gpu.largest > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-3 if "sign" in name else 1e-5)


@pytest.mark.parametrize("name", ANYWHERE)
def test_a_device_without_float64_gives_the_samenumbers(name):
    expected = numbers(ANYWHERE[name]("cpu"))
    with emulated("mps") as gpu:
        found = numbers(ANYWHERE[name]("mps"))
    assert gpu.largest > 0
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3 if "sign" in name else 1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_work_in_float64_is_refused_by_a_device_without(name):
    with emulated("mps"), pytest.raises(ValueError, match=f"{name}: computes in float64.*'mps"):
        EXACT[name]("mps")


def test_a_device_without_float64_is_never_the_default():
    with emulated("mps") as gpu:
        skhead.ProjectionKernel().fit_transform(HEADS)
    assert gpu.largest == 0


def test_input_stays_on_its_device():
    stack = torch.randn(4, 20, 3, generator=torch.Generator().manual_seed(0))
    with emulated("cuda:0") as gpu:
        skhead.ProjectionKernel(layer_order="all").fit_transform(stack)
        assert gpu.largest == 0
        there = skhead.SubspaceExtractor().fit_transform(stack.to("cuda")).role("X").vectors
        assert there.device.type == "cuda"
        bases = skhead.SubspaceExtractor(device="cpu").fit_transform(stack.to("cuda"))
        assert bases.role("X").vectors.device.type == "cpu"


@pytest.mark.parametrize("name", [*ANYWHERE, *EXACT])
def test_a_device_that_is_not_there(name):
    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has eight GPUs")
    with pytest.raises(ValueError, match=r"^\w+: device 'cuda:7' cannot be used.*has cpu"):
        (ANYWHERE | EXACT)[name]("cuda:7")


def test_errors_tell_what_there_is():
    with emulated("mps"), pytest.raises(ValueError, match="machine has cpu, mps, and device=None"):
        check_device("abacus", "Kernel")
    with emulated("cuda"):
        with pytest.raises(ValueError, match="has cpu, cuda:0, and device=None takes cuda"):
            check_device(3.5, "Kernel")
        with pytest.raises(ValueError, match="Kernel: device 'meta' .* holds no numbers"):
            check_device("meta", "Kernel")
        assert resolve_device(None, "Kernel").type == "cuda"
    assert check_device(None, "Kernel") is None
    assert resolve_device("cpu", "Kernel") == torch.device("cpu")


def test_composition_of_degenerate_heads_without_float64():
    with toy_heads(d_head=4) as heads:
        four = np.stack([skhead.load_weights(heads, role) for role in "QKVO"], axis=1)
    four[0, 1, :, 2] = four[0, 1, :, 1]
    stack = torch.from_numpy(four)
    expected = skhead.CompositionScore().fit_transform(stack).values
    with emulated("mps"):
        found = skhead.CompositionScore(device="mps").fit_transform(stack).values
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_float64_by_device():
    assert supports_float64("cpu") and supports_float64(torch.device("cuda:1"))
    assert not supports_float64("mps")
    assert exact_device("cuda:1") == torch.device("cuda:1")
    assert exact_device("mps") == torch.device("cpu")
    assert put(np.ones(2), torch.device("cpu")).dtype == torch.float64
    with emulated("mps"):
        assert put(np.ones(2), torch.device("mps")).dtype == torch.float32


@pytest.mark.parametrize(
    "error,full",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("out of memory"), False),
    ],
)
def test_which_errors_say_that_a_device_is_full(error, full):
    assert is_out_of_memory(error) is full
