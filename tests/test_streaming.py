"""Bases in a cache on disk, and kernels that read them from there."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from toys import toy_heads

import skhead
from skhead import NullCalibrator, ProjectionKernel, SubspaceExtractor
from skhead.exceptions import (
    CacheError,
    CheckpointError,
    DegenerateHeadError,
    MemoryBudgetError,
)
from skhead.linalg.kernels import overlap_blocks, plan_overlaps
from skhead.weights import basis_cache, basis_store

ROOT = Path(__file__).resolve().parents[1]
N_LAYERS, N_HEADS, N_KV, D_MODEL, D_HEAD = 3, 6, 2, 96, 8
PAIRS = ("OQ", "OK", "OV", "OO")


@pytest.fixture
def write_checkpoint(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from make_shaped_checkpoint import Shape, write_checkpoint

    def write(folder, n_layers=N_LAYERS, sizes=(N_HEADS, N_KV, D_MODEL, D_HEAD), **options):
        write_checkpoint(folder, Shape(n_layers, *sizes, 4 * sizes[2], 100), n_layers, **options)
        return folder

    return write


def edit(shard, change):
    tensors = load_file(shard)
    change({name.split(".")[-2]: tensor for name, tensor in tensors.items()})
    save_file(tensors, shard)


def make_deficient(tensors):
    """Ranks 8, 5 and 1 among the heads that write and the keys."""
    o, k = tensors["o_proj"], tensors["k_proj"]
    o[:, 5:8] = o[:, :3]
    o[:, 9:16] = 2 * o[:, 8:9]
    k[:2] = k[2:4]


@pytest.fixture
def model(tmp_path, write_checkpoint):
    """Grouped queries in three shards, some heads of lower rank."""
    folder = write_checkpoint(tmp_path / "model")
    edit(folder / "model-00001.safetensors", make_deficient)
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch):
    """Names of the layers and roles whose bases are computed."""
    names = []
    original = basis_cache._write_layer

    def count(writer, job, request):
        names.append(f"{request.processing.role}{job.layer.layer}")
        original(writer, job, request)

    monkeypatch.setattr(basis_cache, "_write_layer", count)
    return names


def assert_same_subspaces(streamed, whole):
    assert streamed.roles == whole.roles and streamed.record == whole.record
    for role in whole.roles:
        assert streamed.role(role).vectors.shape == whole.role(role).vectors.shape
        np.testing.assert_array_equal(streamed.ranks(role), whole.ranks(role))
        np.testing.assert_array_equal(streamed.role(role).index, whole.role(role).index)
        np.testing.assert_allclose(streamed.numpy(role), whole.numpy(role), atol=1e-6)


def extract(X, cache=None, **options):
    return SubspaceExtractor(cache=cache, **options).fit_transform(X)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3},
        {"rank": 0.6},
        {"fold_norm": True, "center": True},
        {"max_memory": "300KB"},
    ],
)
@pytest.mark.filterwarnings("ignore:center=True")
def test_bases_are_those_in_memory(model, cache, options):
    heads = skhead.load_heads(model)
    streamed = extract(heads, cache, **options)
    assert_same_subspaces(streamed, extract(heads, **options))
    assert not isinstance(streamed.role("O").vectors, torch.Tensor)
    assert len(list(cache.iterdir())) == 4 * N_LAYERS


def test_the_size_of_groups_does_not_change_the_files(model, tmp_path):
    heads = skhead.load_heads(model)
    for name, budget in (("small", "220KB"), ("large", "1GiB")):
        extract(heads, tmp_path / name, max_memory=budget)
    small, large = (sorted((tmp_path / name).iterdir()) for name in ("small", "large"))
    assert [file.read_bytes() for file in small] == [file.read_bytes() for file in large]


def test_a_budget_below_one_head_is_refused(model, cache):
    with pytest.raises(MemoryBudgetError, match="SubspaceExtractor: max_memory is 1000 .*L0 W_Q"):
        extract(skhead.load_heads(model), cache, max_memory=1000)


@pytest.mark.parametrize("budget", [2**15, 2**17, 2**30])
@pytest.mark.parametrize("rank", [None, 2])
def test_kernel_is_that_of_bases_in_memory(model, cache, budget, rank):
    heads = skhead.load_heads(model)
    whole, streamed = extract(heads, rank=rank), extract(heads, cache, rank=rank)
    kernel = ProjectionKernel(PAIRS, layer_order="all", max_memory=budget)
    expected = kernel.fit_transform(whole).values
    np.testing.assert_allclose(kernel.fit_transform(streamed).values, expected, rtol=1e-6)
    mixed = kernel.fit(streamed).transform(whole[3:9]).values
    np.testing.assert_allclose(mixed, kernel.fit(whole).transform(whole[3:9]).values, rtol=1e-6)


@pytest.mark.parametrize("method", ["packed", "direct"])
@pytest.mark.parametrize("budget", [2**16, 2**18, 2**24])
def test_both_products_read_what_they_need(model, cache, method, budget):
    heads = skhead.load_heads(model)
    blocks = [(0, 1), (0, 2), (0, 0)]
    stored = [extract(heads, cache, rank=2).role(role).vectors for role in "OQK"]
    dense = [stack[:] for stack in stored]
    found, expected = (
        overlap_blocks(stacks, None, blocks, method=method, max_memory=budget)
        for stacks in (stored, dense)
    )
    for block in blocks:
        torch.testing.assert_close(found[block], expected[block], rtol=1e-6, atol=1e-7)


def test_the_direct_plan_counts_the_head_that_is_turned(model, cache):
    stacks = [extract(skhead.load_heads(model), cache).role(role).vectors for role in "OQ"]
    stored, dense = (
        plan_overlaps(x, None, [(0, 1)], 2**30, "direct").scratch_bytes
        for x in (stacks, [stack[:] for stack in stacks])
    )
    assert stored == dense + 4 * D_MODEL * D_HEAD


def test_what_follows_is_the_same(model, cache):
    heads = skhead.load_heads(model)
    for null in ("haar", "anisotropic", "signflip", "empirical"):
        options = {"rank": 3} if null == "signflip" else {}
        whole, streamed = (
            NullCalibrator(null=null, output="z", random_state=0).fit_transform(
                ProjectionKernel().fit_transform(extract(heads, where, **options))
            )
            for where in (None, cache)
        )
        np.testing.assert_allclose(streamed.values, whole.values, rtol=1e-3, atol=1e-3)
    whole, streamed = (
        skhead.GrassmannDistance().fit_transform(extract(heads, where)) for where in (None, cache)
    )
    np.testing.assert_allclose(streamed.values, whole.values, atol=1e-6)


def test_finished_layers_are_reused(model, cache, computed):
    heads = skhead.load_heads(model)
    extract(heads.iloc[:N_HEADS], cache, roles="OK")
    assert computed == ["O0", "K0"]
    extract(heads, cache, roles="OK")
    assert computed == ["O0", "K0", "O1", "O2", "K1", "K2"]
    part = heads.iloc[[14, 3]]
    assert_same_subspaces(extract(part, cache, roles="OK"), extract(part, roles="OK"))
    assert len(computed) == 6
    extract(heads, cache, roles="O", rank=2)
    assert len(computed) == 9


def test_damaged_and_old_files_are_computed_again(model, cache, computed):
    heads = skhead.load_heads(model)
    extract(heads, cache, roles="O")
    first, second, _ = sorted(cache.iterdir())
    os.truncate(first, first.stat().st_size - 100)
    second.write_bytes(second.read_bytes().replace(basis_store.FORMAT.encode(), b"skhead-bases-0"))
    with pytest.warns(UserWarning, match="SubspaceExtractor: cached bases cannot be used"):
        again = extract(heads, cache, roles="O")
    assert computed[3:] == ["O0", "O1"]
    assert_same_subspaces(again, extract(heads, roles="O"))


def test_a_shard_that_changed_gives_new_bases(model, cache, computed):
    heads = skhead.load_heads(model)
    extract(heads, cache, roles="OV")
    edit(model / "model-00002.safetensors", lambda tensors: tensors["o_proj"].mul_(-1)[0].add_(1))
    del computed[:]
    assert_same_subspaces(extract(heads, cache, roles="OV"), extract(heads, roles="OV"))
    assert computed == ["O2", "V2"]


def test_a_shard_that_changes_while_it_is_read(model, cache, monkeypatch):
    original = basis_cache._write_layer

    def touch(writer, job, how):
        original(writer, job, how)
        os.utime(model / "model-00000.safetensors", (1, 1))

    monkeypatch.setattr(basis_cache, "_write_layer", touch)
    with pytest.raises(CheckpointError, match="changed while they were read"):
        extract(skhead.load_heads(model), cache)
    assert list(cache.iterdir()) == []


def test_a_live_model_that_is_trained_further(cache, computed):
    with toy_heads() as heads:
        extract(heads, cache, roles="O")
        extract(heads, cache, roles="O")
        assert len(computed) == 3
    with toy_heads(seed=1) as other:
        assert_same_subspaces(extract(other, cache, roles="O"), extract(other, roles="O"))


def test_damaged_heads_matter_only_where_they_are_listed(model, cache):
    def spoil(tensors):
        tensors["o_proj"][0, D_HEAD] = torch.nan
        tensors["o_proj"][:, 2 * D_HEAD : 3 * D_HEAD] = 0

    edit(model / "model-00000.safetensors", spoil)
    heads = skhead.load_heads(model)
    kept = heads.drop(index=["L0H1", "L0H2"])
    assert_same_subspaces(extract(kept, cache, roles="O"), extract(kept, roles="O"))
    for label, words in (("L0H1", "L0H1 W_O.*holds 1 NaN"), ("L0H2", "L0H2 W_O is zero")):
        for where in (None, cache):
            with pytest.raises(DegenerateHeadError, match=words):
                extract(heads.loc[["L0H0", label]], where, roles="O")


def test_a_full_disk(model, cache, monkeypatch):
    def refuse(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(basis_store.os, "fsync", refuse)
    with pytest.raises(CacheError, match=f"SubspaceExtractor: cache {cache} has no space left"):
        extract(skhead.load_heads(model), cache)
    assert list(cache.iterdir()) == []


def test_bad_parameters(model, tmp_path):
    heads = skhead.load_heads(model)
    with pytest.raises(ValueError, match="SubspaceExtractor: cache must be None or a directory"):
        extract(heads, 3)
    with pytest.raises(ValueError, match="SubspaceExtractor: max_memory must be"):
        extract(heads, max_memory="much")
    with pytest.raises(ValueError, match="a stack is in memory already"):
        extract(np.ones((2, 4, 1)), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"SubspaceExtractor: cache .*file cannot be"):
        extract(heads, tmp_path / "file")


def test_containers_carry_addresses(model, cache):
    heads = skhead.load_heads(model)
    streamed = extract(heads, cache)
    again = pickle.loads(pickle.dumps(streamed))
    assert_same_subspaces(again, streamed)
    assert joblib.hash(again) == joblib.hash(streamed) == joblib.hash(extract(heads, cache))
    assert joblib.hash(streamed) != joblib.hash(streamed[:4])
    assert len(pickle.dumps(streamed)) < 0.2 * len(pickle.dumps(extract(heads)))
    part = streamed[[11, 2]]
    assert not isinstance(part.role("K").vectors, torch.Tensor)
    assert_same_subspaces(part, extract(heads)[[11, 2]])


def test_clone_and_grid_search(model, cache, computed):
    extractor = SubspaceExtractor(roles="OQ", cache=cache, max_memory="1MB")
    assert clone(extractor).get_params() == extractor.get_params()
    heads = skhead.load_heads(model)
    classes = np.arange(len(heads)) % 2
    search = GridSearchCV(
        make_pipeline(
            extractor, ProjectionKernel(("OQ",), layer_order="all"), skhead.HeadClassifier()
        ),
        {"subspaceextractor__rank": [2, None]},
        cv=3,
        error_score="raise",
    )
    search.fit(heads, classes)
    assert len(computed) == 2 * 2 * N_LAYERS


SLOW = """
import os, sys, time
from skhead.weights import basis_cache
original = basis_cache._bases_of
def slow(*arguments):
    open(sys.argv[3], "a").write("x")
    time.sleep(float(sys.argv[4]))
    return original(*arguments)
basis_cache._bases_of = slow
import skhead
heads = skhead.load_heads(sys.argv[1])
skhead.SubspaceExtractor(cache=sys.argv[2]).fit_transform(heads)
"""


def started(model, cache, log, delay):
    command = [sys.executable, "-c", SLOW, str(model), str(cache), str(log), str(delay)]
    return subprocess.Popen(command)


def test_a_killed_run_is_resumed(model, cache, tmp_path, computed):
    process = started(model, cache, tmp_path / "log", 0.5)
    deadline = time.monotonic() + 120
    while len(list(cache.glob("*.safetensors"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(cache.glob("*.safetensors")))
    assert 5 <= finished < 4 * N_LAYERS
    assert len(list(cache.glob("*.tmp"))) <= 1
    heads = skhead.load_heads(model)
    assert_same_subspaces(extract(heads, cache), extract(heads))
    assert len(computed) == 4 * N_LAYERS - finished


def test_two_processes_fill_one_cache(model, cache, tmp_path, computed):
    processes = [started(model, cache, tmp_path / f"log{i}", 0.05) for i in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(cache.iterdir())) == 4 * N_LAYERS
    heads = skhead.load_heads(model)
    assert_same_subspaces(extract(heads, cache), extract(heads))
    assert computed == []


MEASURED = """
import json, sys
from pathlib import Path
import skhead
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
def growth(work):
    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")
    result = work()
    return result, status("VmHWM:") - before
small, model, cache, budget = sys.argv[1:5]
def run(source, cache):
    heads = skhead.load_heads(source)
    extractor = skhead.SubspaceExtractor(cache=cache, max_memory=budget)
    subspaces, first = growth(lambda: extractor.fit_transform(heads))
    kernel = skhead.ProjectionKernel(max_memory=budget)
    similarity, second = growth(lambda: kernel.fit_transform(subspaces))
    sizes = [role.vectors.shape.numel() * 4 for role in subspaces.bases.values()]
    return first, second - 2 * similarity.values.nbytes, sum(sizes)
run(small, cache + "-small")
print(json.dumps(run(model, cache)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_memory_keeps_to_the_budget(tmp_path, cache, model, write_checkpoint):
    """Bases of several times the budget; a tenth of it is left to allocators and libraries."""
    budget = 64 * 2**20
    large = write_checkpoint(tmp_path / "large", 16, (32, 8, 1024, 64))
    command = [sys.executable, "-c", MEASURED, str(model), str(large), str(cache), str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    extracting, comparing, size = json.loads(done.stdout)
    assert size == 5 * budget
    assert extracting <= 1.1 * budget
    assert comparing <= 1.1 * budget
