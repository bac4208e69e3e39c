"""A CUDA device against the CPU. The tests run on the CPU too, so that they are known to run."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from placed import ANYWHERE, EXACT, numbers
from toys import random_weights, registered

import skhead
from skhead.linalg.bases import orthonormal_bases
from skhead.linalg.kernels import overlap_blocks
from skhead.weights.transfers import CudaLanes, Transfers, deliver, transfers_to

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = pytest.param("cuda", marks=needs_cuda)
#: Rounding of float32 sums of a few hundred terms of size 1; TF32 is off by 100 times as much.
SINGLE = 2e-5


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def heads():
    with registered(random_weights(n_layers=4, n_heads=4, d_model=160, d_head=16)) as table:
        yield table


def _mixed_stack():
    """Heads of full rank, of condition 1e5 and 1e7, of lower rank, and of wild scale."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(70, 96, 12, generator=generator)
    stack[3] = (stack[3].double() * torch.logspace(0, -5, 12, dtype=torch.float64)).float()
    stack[4] = (stack[4].double() * torch.logspace(0, -7, 12, dtype=torch.float64)).float()
    stack[5, :, 2] = stack[5, :, 7]
    stack[6] *= 1e12
    stack[7] *= 1e-12
    return stack


@pytest.mark.parametrize("rank", [None, 5, 0.8])
def test_bases_span_what_a_float64_decomposition_spans(device, rank):
    stack = _mixed_stack()
    found = orthonormal_bases(stack.to(device), rank=rank)
    assert found.vectors.device.type == device
    expected = orthonormal_bases(stack.double(), rank=rank, eps=torch.finfo(torch.float32).eps)
    assert torch.equal(found.ranks.cpu(), expected.ranks)
    own, other = found.vectors.cpu().double(), expected.vectors
    assert float((own @ own.mT - other @ other.mT).abs().max()) < SINGLE


@pytest.mark.parametrize("method", ["packed", "direct"])
@pytest.mark.parametrize("max_memory", [2**18, 2**22, 2**30])
def test_overlaps_are_those_of_float64(device, method, max_memory):
    generator = torch.Generator().manual_seed(1)
    rows, columns = (
        torch.linalg.qr(torch.randn(n, 160, 16, generator=generator))[0] for n in (20, 30)
    )
    expected = torch.einsum("adr,bds->abrs", rows.double(), columns.double()).square().sum((2, 3))
    found = overlap_blocks(
        [rows.to(device)], [columns.to(device)], [(0, 0)], max_memory=max_memory, method=method
    )[0, 0]
    assert found.device.type == device
    assert float((found.cpu() - expected).abs().max()) < SINGLE


@pytest.mark.parametrize("name", [*ANYWHERE, *EXACT])
@pytest.mark.parametrize("place", [CUDA])
def test_every_estimator_gives_what_it_gives_on_the_cpu(name, place):
    compute = (ANYWHERE | EXACT)[name]
    found, expected = numbers(compute(place)), numbers(compute("cpu"))
    atol = 5e-3 if name in ("signflip", "anisotropic") else 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("null", ["anisotropic", "signflip"])
def test_nulls_read_subspaces_where_they_are(device, null, heads):
    calibrator = skhead.NullCalibrator(null=null)
    z = []
    for place in (device, "cpu"):
        subspaces = skhead.SubspaceExtractor(device=place).fit_transform(heads)
        assert subspaces.role("O").vectors.device.type == place
        similarity = skhead.ProjectionKernel().fit_transform(subspaces)
        z.append(calibrator.fit_transform(similarity).calibration.z)
    np.testing.assert_allclose(z[0], z[1], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kernel", [skhead.ProjectionKernel, skhead.CompositionScore])
@pytest.mark.parametrize("max_memory", ["300kB", "3MB"])
def test_values_do_not_depend_on_the_tiles(device, kernel, max_memory, heads):
    expected = kernel(device="cpu").fit_transform(heads).values
    found = kernel(device=device, max_memory=max_memory).fit_transform(heads).values
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=SINGLE)


def test_folded_and_centred_weights(device):
    source = skhead.load_heads("skhead/induction-2l")
    extract = [
        skhead.SubspaceExtractor(fold_norm=True, center=True, device=place).fit_transform(source)
        for place in (device, "cpu")
    ]
    for role in "QKVO":
        own, other = (subspaces.numpy(role) for subspaces in extract)
        np.testing.assert_allclose(
            own @ own.swapaxes(1, 2), other @ other.swapaxes(1, 2), atol=SINGLE
        )


def test_bases_in_files(device, tmp_path, heads):
    expected = skhead.ProjectionKernel(device="cpu").fit_transform(heads).values
    subspaces = skhead.SubspaceExtractor(cache=tmp_path, device=device).fit_transform(heads)
    kernel = skhead.ProjectionKernel(max_memory="1MB", device=device)
    found = kernel.fit_transform(subspaces).values
    np.testing.assert_allclose(found, expected, atol=SINGLE)


@pytest.mark.parametrize("whiten", [None, "qk"])
def test_a_stream_of_contrasts(device, whiten):
    rng = np.random.default_rng(0)
    q, k, other = rng.standard_normal((3, 300, 12)).astype(np.float32)
    k += q @ rng.standard_normal((12, 12)).astype(np.float32)
    whole = skhead.ContrastiveQKDecomposer(rank=3, whiten=whiten, device="cpu")
    whole.fit_pairs(q, k, q, other)
    stream = skhead.ContrastiveQKDecomposer(rank=3, whiten=whiten, device=device)
    for start in range(0, 300, 50):
        part = slice(start, start + 50)
        stream.partial_fit(skhead.QKPairs.from_pairs(q[part], k[part], q[part], other[part]))
    for name in ("query_components_", "key_components_"):
        own, expected = getattr(stream, name), getattr(whole, name)
        np.testing.assert_allclose(own.T @ own, expected.T @ expected, atol=1e-4)


@pytest.fixture(params=[False, True])
def allowed(request):
    """Whether the process lets CUDA products take TF32, as set for the length of a test."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, request.param
    yield request.param
    matmul.allow_tf32 = before


def test_settings_of_the_process_stay_as_they_are(device, allowed, heads):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    kernel = skhead.ProjectionKernel(device=device)
    skhead.NullCalibrator(null="signflip").fit_transform(kernel.fit_transform(heads))
    skhead.CompositionScore(device=device).fit_transform(heads)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("buffer_bytes", [2**10, 2**16, None])
def test_transfers_while_the_device_is_busy(device, buffer_bytes):
    place = torch.device(device)
    transfers = transfers_to(place)
    if transfers is not None and buffer_bytes is not None:
        transfers = Transfers(CudaLanes(place), buffer_bytes)
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(64, 50, 9, generator=generator).bfloat16() for _ in range(6)]
    size = 4000 if device == "cuda" else 100
    busy = torch.randn(size, size, device=place)
    found = []
    for source in sources:
        busy = (busy @ busy).tanh_()
        out = torch.empty(64, 9, 50, device=place)
        deliver(source.mT, out, transfers)
        found.append(out * 2)
        del out
    for source, out in zip(sources, found, strict=True):
        assert torch.equal(out.cpu(), 2 * source.mT.float())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestOnlyOnCuda:
    """What needs a real device: its limits and its waits."""

    def test_the_default_device(self, heads):
        subspaces = skhead.SubspaceExtractor(roles="O").fit_transform(heads)
        assert subspaces.role("O").vectors.device.type == "cuda"

    def test_a_full_device(self):
        generator = torch.Generator().manual_seed(0)
        stack = torch.randn(1024, 1024, 64, generator=generator)
        subspaces = skhead.SubspaceExtractor(device="cuda").fit_transform(stack)
        kernel = skhead.ProjectionKernel(layer_order="all", max_memory="4GiB")
        torch.cuda.reset_peak_memory_stats()
        expected = kernel.fit_transform(subspaces).values
        held = self._allocated()
        scratch = torch.cuda.max_memory_allocated() - held
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        limit = torch.cuda.memory_reserved() + scratch // 2
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            with pytest.warns(UserWarning, match="ProjectionKernel: the device is out of memory"):
                found = kernel.fit_transform(subspaces).values
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=SINGLE)
        assert self._allocated() == held

    def test_bases_on_a_full_device(self):
        generator = torch.Generator().manual_seed(0)
        stack = torch.randn(512, 2048, 64, generator=generator)
        expected = skhead.SubspaceExtractor(device="cpu").fit_transform(stack).numpy("X")
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        # The stack and its bases take 512 MiB, and the float64 block of 256 heads as much again.
        limit = torch.cuda.memory_reserved() + 800 * 2**20
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            with pytest.warns(UserWarning, match="SubspaceExtractor.*block of .* heads"):
                found = skhead.SubspaceExtractor(device="cuda").fit_transform(stack).numpy("X")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        np.testing.assert_allclose(found, expected, atol=SINGLE)

    def test_bases_wait_for_the_device_once_a_block(self):
        stack = torch.randn(64, 512, 64, device="cuda")
        orthonormal_bases(stack)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as recorded:
                warnings.simplefilter("always")
                orthonormal_bases(stack)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in recorded if "synchroniz" in str(w.message)]
        # The spacing comes from the host, which heads are plain goes there, and the largest rank.
        assert len(waits) <= 3

    @staticmethod
    def _allocated():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
