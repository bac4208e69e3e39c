"""Where estimators compute: the rule, its errors, and that tensors of two devices never meet."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from emulation import emulated
from toys import toy_heads

import skhead
from skhead._devices import check_device, resolve_device
from skhead.induction import induction_pairs
from skhead.linalg.devices import exact_device, is_out_of_memory, put, supports_float64
from skhead.paths import virtual_heads
from skhead.stream import erasures, stream_usage
from skhead.trigrams import skip_trigrams

HEADS = skhead.load_heads("skhead/induction-2l")
OPERATIONS = {"shift": [(2 * i, 2 * i + 1) for i in range(10)]}


def _contrast(device, **options):
    rng = np.random.default_rng(0)
    q, k, other = rng.standard_normal((3, 60, 6))
    model = skhead.ContrastiveQKDecomposer(device=device, **options)
    return np.asarray(model.fit_pairs(q, k, q, other).cross_gram_)


def _null(name):
    def log10_p(device):
        similarity = skhead.ProjectionKernel(device=device).fit_transform(HEADS)
        return skhead.NullCalibrator(null=name).fit_transform(similarity).calibration.log10_p

    return log10_p


def _kernel(kernel):
    return lambda device: kernel(device=device).fit_transform(HEADS).values


#: What runs wherever float32 matrix products do; float64 is taken to the CPU where it must.
ANYWHERE = {
    "extraction": lambda device: (
        skhead.SubspaceExtractor(device=device).fit_transform(HEADS).numpy("O")
    ),
    "truncated": lambda device: (
        skhead.SubspaceExtractor(device=device, rank=0.9, fold_norm=True, center=True)
        .fit_transform(HEADS)
        .numpy("K")
    ),
    "projection": _kernel(skhead.ProjectionKernel),
    "composition": _kernel(skhead.CompositionScore),
    "grassmann": _kernel(skhead.GrassmannDistance),
    "geodesic": lambda device: (
        skhead.GrassmannDistance(metric="geodesic", device=device).fit_transform(HEADS).values
    ),
    "procrustes": _kernel(skhead.ProcrustesSimilarity),
    "cka": _kernel(skhead.LinearCKA),
    "spectrum": _kernel(skhead.SpectrumSimilarity),
    "anisotropic": _null("anisotropic"),
    "signflip": _null("signflip"),
    "contrast": lambda device: _contrast(device, rank=2),
    "whitened": lambda device: _contrast(device, rank=2, whiten="qk"),
    "permuted": lambda device: _contrast(device, rank="null", n_permutations=99),
}

#: What needs float64 where the weights are.
EXACT = {
    "CircuitScorer": lambda device: skhead.CircuitScorer(
        device=device, errors="ignore"
    ).fit_transform(HEADS),
    "identity_scores": lambda device: skhead.identity_scores(HEADS, device=device),
    "SubspaceReadout": lambda device: (
        skhead.SubspaceReadout(device=device).fit(HEADS).transform(HEADS)
    ),
    "SalientOperations": lambda device: (
        skhead.SalientOperations(device=device, source_embedding="raw")
        .fit(HEADS)
        .mappings(HEADS)
        .table
    ),
    "OperationMapper": lambda device: skhead.OperationMapper(
        OPERATIONS, min_pairs=1, missing_mlp="raw", device=device
    ).fit_transform(HEADS),
    "virtual_heads": lambda device: virtual_heads(HEADS, device=device).table,
    "stream_usage": lambda device: stream_usage(HEADS, device=device),
    "erasures": lambda device: erasures(HEADS, device=device),
    "induction_pairs": lambda device: induction_pairs(HEADS, device=device),
    "skip_trigrams": lambda device: skip_trigrams(HEADS, device=device),
}


def _numbers(found):
    table = found.select_dtypes("number") if isinstance(found, pd.DataFrame) else found
    return np.asarray(table, dtype=np.float64)


@pytest.mark.parametrize("name", [*ANYWHERE, *EXACT])
def test_a_gpu_is_the_default_and_gives_the_same_numbers(name):
    compute = (ANYWHERE | EXACT)[name]
    expected = _numbers(compute("cpu"))
    with emulated("cuda:0") as gpu:
        found = _numbers(compute(None))
    assert gpu.largest > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-3 if "sign" in name else 1e-5)


@pytest.mark.parametrize("name", ANYWHERE)
def test_a_device_without_float64_gives_the_same_numbers(name):
    expected = _numbers(ANYWHERE[name]("cpu"))
    with emulated("mps") as gpu:
        found = _numbers(ANYWHERE[name]("mps"))
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
