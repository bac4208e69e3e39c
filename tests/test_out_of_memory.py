"""When a device's memory is full: the same numbers from smaller pieces, or a clear error."""

from __future__ import annotations

import importlib
import re
import warnings
import weakref

import numpy as np
import pytest
import torch
from emulation import emulated
from toys import toy_heads

import skhead
from skhead import _pairwise
from skhead._devices import halved, with_less_memory
from skhead.exceptions import MemoryBudgetError
from skhead.linalg.bases import orthonormal_bases

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.fixture(scope="module")
def heads():
    with toy_heads(n_layers=4, n_heads=4, d_model=96, d_head=24) as table:
        yield table


def _budgets(recorded):
    """Budgets that the warnings tell of, as (before, after)."""
    pattern = r"with a max_memory of (\d+) bytes .* again with a max_memory of (\d+) bytes"
    found = [re.search(pattern, str(warning.message)) for warning in recorded]
    return [(int(match[1]), int(match[2])) for match in found if match]


@pytest.mark.parametrize(
    "kernel,room",
    [
        (skhead.ProjectionKernel, 300_000),
        (skhead.CompositionScore, 300_000),
        (skhead.ProcrustesSimilarity, 400_000),
    ],
)
def test_a_kernel_tries_again_with_half_of_its_budget(heads, kernel, room):
    estimator = kernel(device="cuda", max_memory=2**23)
    with emulated("cuda"):
        expected = estimator.fit_transform(heads).values
    with emulated("cuda", room=room) as gpu, warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        found = estimator.fit_transform(heads).values
    budgets = _budgets(recorded)
    assert gpu.refused == len(recorded)
    assert budgets[0][0] == 2**23
    assert all(after == before // 2 for before, after in budgets)
    assert [after for _, after in budgets[:-1]] == [before for before, _ in budgets[1:]]
    assert all(str(w.message).startswith(f"{kernel.__name__}: the device") for w in recorded)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_null_tries_again(heads, monkeypatch):
    similarity = skhead.ProjectionKernel(device="cpu").fit_transform(heads)
    calibrator = skhead.NullCalibrator(null="signflip")
    expected = calibrator.fit_transform(similarity).calibration.z
    real = torch.bmm

    def full(a, b, **options):
        if a.shape[:2].numel() * b.shape[2] > 16 * 10 * 96:
            raise torch.OutOfMemoryError(FULL)
        return real(a, b, **options)

    monkeypatch.setattr(torch, "bmm", full)
    with pytest.warns(UserWarning, match=r"NullCalibrator: the device is out of memory"):
        found = calibrator.fit_transform(similarity).calibration.z
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_budget_that_does_not_help_ends_in_an_error(heads, monkeypatch):
    def full(*_arguments, **_options):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(_pairwise, "overlap_blocks", full)
    message = r"^ProjectionKernel: .*even with a max_memory of 65536 bytes \(CUDA.*device='cpu'"
    with (
        pytest.warns(UserWarning, match="again with a max_memory of 65536") as recorded,
        pytest.raises(MemoryBudgetError, match=message),
    ):
        skhead.ProjectionKernel(max_memory=2**18, device="cpu").fit_transform(heads)
    assert len(_budgets(recorded)) == 2


def test_the_smallest_tiles_do_not_fit():
    def compute(budget):
        if budget > 1000:
            raise RuntimeError("CUDA error: out of memory")
        raise MemoryBudgetError("max_memory is 1000 bytes, but the smallest tiles need 2000")

    message = r"^Kernel: max_memory is 1000.*need 2000 \(max_memory was lowered.*CUDA error"
    with (
        pytest.warns(UserWarning, match="Kernel: the device is out of memory"),
        pytest.raises(MemoryBudgetError, match=message),
    ):
        with_less_memory(compute, 2000, "Kernel", smallest=1)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_raised_at_once(heads, monkeypatch, error):
    calls = []

    def full(*_arguments, **_options):
        calls.append(1)
        raise error

    monkeypatch.setattr(_pairwise, "overlap_blocks", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(error)):
            skhead.ProjectionKernel(device="cpu").fit_transform(heads)
    assert len(calls) == 1


def test_nothing_of_a_failed_attempt_stays_in_memory():
    held = []

    def compute(budget):
        tensor = torch.zeros(budget)
        held.append(weakref.ref(tensor))
        if budget > 4:
            raise torch.OutOfMemoryError(FULL)
        return [reference() is None for reference in held]

    with pytest.warns(UserWarning, match="again with"):
        assert with_less_memory(compute, 16, "Kernel", smallest=1) == [True, True, False]


def test_bases_go_on_where_they_stopped(monkeypatch):
    """The first blocks lie in the memory of the input by then, and must not be taken again."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(29, 40, 6, generator=generator)
    stack[5, :, 1] = stack[5, :, 0]
    stack[20] *= torch.logspace(0, -5, 6)
    expected = orthonormal_bases(stack)
    real, calls, asked = torch.bmm, [], []

    def full(a, b, **options):
        calls.append(len(a))
        if len(calls) in (3, 5):
            raise torch.OutOfMemoryError(FULL)
        return real(a, b, **options)

    def shrink(size, reason):
        asked.append(size)
        assert reason == FULL
        return size // 2

    monkeypatch.setattr(torch, "bmm", full)
    given = stack.clone()
    found = orthonormal_bases(given, overwrite=True, shrink=shrink)
    assert found.vectors.data_ptr() == given.data_ptr()
    assert asked == [8, 4]
    assert calls == [8, 8, 8, 4, 4, 2, 2, 2, 2, 1]
    assert torch.equal(found.ranks, expected.ranks)
    torch.testing.assert_close(found.vectors, expected.vectors)


def test_bases_on_a_small_device(heads):
    extractor = skhead.SubspaceExtractor(roles="QO", device="cuda")
    with emulated("cuda"):
        expected = extractor.fit_transform(heads).numpy("O")
    room = 4 * 16 * 96 * 24 * 2
    with (
        emulated("cuda", room=room) as gpu,
        pytest.warns(UserWarning, match="SubspaceExtractor: .*block of 16 heads.*block of 8 heads"),
    ):
        found = extractor.fit_transform(heads).numpy("O")
    assert gpu.refused == 2
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bases_larger_than_the_device(heads):
    message = "SubspaceExtractor: the bases of role Q do not fit.*cache=.*device='cpu'"
    with emulated("cuda", room=1000), pytest.raises(MemoryBudgetError, match=message):
        skhead.SubspaceExtractor(device="cuda").fit_transform(heads)


def test_cached_bases_on_a_small_device(heads, tmp_path):
    expected = skhead.SubspaceExtractor(roles="O", device="cpu").fit_transform(heads).numpy("O")
    extractor = skhead.SubspaceExtractor(roles="O", device="cuda", cache=tmp_path)
    with (
        emulated("cuda", room=2 * 8 * 96 * 24 * 2),
        pytest.warns(UserWarning, match="group of 4 heads.*group of 2 heads") as recorded,
    ):
        extractor.fit_transform(heads)
    assert len(recorded) == 4
    found = skhead.SubspaceExtractor(roles="O", device="cpu", cache=tmp_path).fit_transform(heads)
    np.testing.assert_allclose(found.numpy("O"), expected, atol=1e-6)


def test_a_single_head_that_does_not_fit(heads, tmp_path):
    extractor = skhead.SubspaceExtractor(roles="O", device="cuda", cache=tmp_path)
    with (
        emulated("cuda", room=1000),
        pytest.warns(UserWarning, match="group of 1 heads"),
        pytest.raises(MemoryBudgetError, match="even with a group of 1 heads"),
    ):
        extractor.fit_transform(heads)
    assert not list(tmp_path.glob("*.tmp"))


def test_halving_stops_at_the_smallest():
    with pytest.warns(UserWarning, match="with a tile of 3 heads .* with a tile of 2 heads"):
        assert halved(3, FULL, "Kernel", "tile of {} heads", smallest=2) == 2


@pytest.mark.parametrize(
    "module,function,estimator",
    [
        ("operations", "rank_operations", skhead.OperationMapper({"a": [(1, 2)]}, min_pairs=1)),
        ("circuits", "score_model", skhead.CircuitScorer(errors="ignore")),
    ],
)
def test_scores_of_models_try_again(module, function, estimator, monkeypatch):
    heads = skhead.load_heads("skhead/induction-2l").iloc[:2]
    estimator.set_params(device="cpu")
    if module == "operations":
        estimator.set_params(missing_mlp="raw")
    expected = np.asarray(estimator.fit_transform(heads))
    where = importlib.import_module(f"skhead.{module}")
    real, asked = getattr(where, function), []

    def full(*arguments, **options):
        budget = arguments[-1] if isinstance(arguments[-1], int) else arguments[-1].max_memory
        asked.append(budget)
        if budget > 2**28:
            raise torch.OutOfMemoryError(FULL)
        return real(*arguments, **options)

    monkeypatch.setattr(where, function, full)
    with pytest.warns(UserWarning, match=f"{type(estimator).__name__}: the device is out"):
        found = np.asarray(estimator.fit_transform(heads))
    assert asked == [2**30, 2**29, 2**28]
    np.testing.assert_array_equal(found, expected)
