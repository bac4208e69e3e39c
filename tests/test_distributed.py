"""Kernels whose pairs are shared out among workers give what one process gives."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from toys import random_weights, toy_heads
from workers import DeadlyKernel, FatalKernel

import skhead
from skhead import CompositionScore, NullCalibrator, ProjectionKernel, SubspaceExtractor
from skhead._distributed import _Task
from skhead._tiling import Tiling
from skhead.exceptions import DegenerateHeadError, HeadShapeError, MemoryBudgetError
from skhead.similarities import (
    GrassmannDistance,
    LinearCKA,
    ProcrustesSimilarity,
    SimpleComposition,
)

ALL = [a + b for a in "QKVO" for b in "QKVO"]
KERNELS = [
    ProjectionKernel(),
    ProjectionKernel(pairs=ALL, layer_order="all", normalize="cosine"),
    CompositionScore(baseline="ratio", layer_order="all", center=True),
    ProcrustesSimilarity(pairs=("OK", "KO", "VV"), layer_order="all"),
    LinearCKA(fold_norm=True),
    SimpleComposition(),
    GrassmannDistance(output="similarity"),
]


@pytest.fixture(scope="module")
def heads():
    return skhead.load_heads("skhead/induction-2l")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Heads of a grouped-query model on disk, of unequal ranks, with a few heads to a tile."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    weights = random_weights(n_layers=4, n_heads=4, n_kv_heads=2, d_model=48, d_head=8)
    weights["blocks.1.attn.W_O"][1, 5:] = 0
    weights["blocks.3.attn.W_O"][2, 3:] = 0
    save_file(weights, path)
    return skhead.load_heads(path)


def check_equal(found, expected):
    """All that a similarity says, but the subspaces."""
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6, atol=2e-7)
    for name in ("row_ranks", "column_ranks", "null_mean", "null_sd"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9)
    for name in ("pairs", "unit", "d_model", "record", "row_labels", "column_labels"):
        assert getattr(found, name) == getattr(expected, name)


def jobs(kernel, n_jobs=2, **parameters):
    return clone(kernel).set_params(n_jobs=n_jobs, **parameters)


def tiles_of(kernel, rows, columns=None, workers=2, max_memory=2**30):
    pairs = tuple(kernel.pairs)
    tiling = Tiling(rows, columns, pairs, kernel.layer_order, kernel._factors_of, max_memory)
    return tiling, tiling.plan(workers, "test")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{type(k).__name__}-{k.layer_order}")
def test_workers_give_what_one_process_gives(kernel, heads):
    one = clone(kernel).fit_transform(heads)
    with joblib.parallel_config(backend="threading"):
        check_equal(jobs(kernel).fit_transform(heads), one)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{type(k).__name__}-{k.layer_order}")
@pytest.mark.parametrize("budget", ["180kB", "250kB"])
def test_size_of_tiles_changes_nothing(kernel, budget, saved):
    kernel = clone(kernel)
    if isinstance(kernel, LinearCKA | CompositionScore):
        kernel.set_params(fold_norm=False, center=False)
    order = np.random.default_rng(0).permutation(len(saved))
    shuffled, part = saved.iloc[order], saved.iloc[order[3:9]]
    one, across = kernel.fit_transform(shuffled), kernel.transform(part)
    assert len(np.unique(one.row_ranks)) > 1 or not isinstance(kernel, ProjectionKernel)
    small = jobs(kernel, max_memory=budget)
    with joblib.parallel_config(backend="threading"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*times the work of one process")
        check_equal(small.fit_transform(shuffled), one)
        check_equal(small.fit(shuffled).transform(part), across)


def test_heads_listed_twice_and_heads_of_no_defined_pair(saved):
    for rows, columns in ((saved.iloc[12:], saved.iloc[:4]), (pd.concat([saved, saved]), saved)):
        one = ProjectionKernel().fit(columns).transform(rows)
        with joblib.parallel_config(backend="threading", n_jobs=2):
            check_equal(ProjectionKernel().fit(columns).transform(rows), one)


def test_only_tiles_with_defined_pairs_are_computed(saved):
    """In layer order, no head meets one of its own layer or below but to tell its rank."""
    _, tiles = tiles_of(ProjectionKernel(), saved, max_memory=24_000)
    layers = saved["layer"].to_numpy()
    idle = [t for t in tiles if not (layers[t.rows][:, None] < layers[t.columns]).any()]
    pairs = sum(t.rows.size * t.columns.size for t in tiles)
    assert len(tiles) > 8
    assert all(set(layers[t.rows]) == {3} or set(layers[t.columns]) == {0} for t in idle)
    assert pairs <= 16 * 6 + 16


def test_mirror_images_are_computed_once(saved):
    kernel = ProjectionKernel(pairs=ALL, layer_order="all")
    _, tiles = tiles_of(kernel, saved, max_memory=100_000)
    n_groups = len({tuple(tile.rows) for tile in tiles})
    assert n_groups > 2
    assert len(tiles) == n_groups * (n_groups + 1) // 2


@pytest.mark.parametrize("kernel", [ProjectionKernel(), CompositionScore()])
def test_what_travels_is_small(kernel, gpt2_path):
    heads = skhead.load_heads(gpt2_path)
    fitted = jobs(kernel)
    fitted.pairs_ = fitted.pairs
    for workers in (2, 16):
        tiling, tiles = tiles_of(fitted, heads, workers=workers)
        sizes = [len(pickle.dumps(_Task.of(fitted, tiling, tile, 0))) for tile in tiles]
        assert max(sizes) < 100_000


def test_processes(heads, saved):
    for table in (heads, saved):
        one = ProjectionKernel().fit_transform(table)
        check_equal(ProjectionKernel(n_jobs=2).fit_transform(table), one)
        with joblib.parallel_config(backend="loky", n_jobs=2):
            check_equal(ProjectionKernel().fit_transform(table), one)


@pytest.mark.parametrize(
    "kernel", [ProjectionKernel(), CompositionScore(layer_order="all", n_jobs=2)]
)
def test_dask_cluster(kernel, gpt2_path, cluster):
    heads = skhead.load_heads(gpt2_path)
    one = jobs(kernel, None).fit_transform(heads)
    with joblib.parallel_config(backend="dask"):
        check_equal(kernel.fit_transform(heads), one)


def test_dask_hands_on_the_work_of_a_killed_worker(saved, tmp_path, cluster):
    one = ProjectionKernel().fit_transform(saved)
    before = set(cluster.run(os.getpid).values())
    fatal = FatalKernel(str(tmp_path / "killed"), max_memory="100kB")
    with joblib.parallel_config(backend="dask"):
        check_equal(fatal.fit_transform(saved), one)
    assert (tmp_path / "killed").exists()
    cluster.wait_for_workers(2)
    assert set(cluster.run(os.getpid).values()) != before


def test_a_killed_process_is_an_error_and_no_number(saved, tmp_path):
    fatal = FatalKernel(str(tmp_path / "killed"), n_jobs=2)
    with pytest.raises(BrokenProcessPool, match="FatalKernel: a worker process died.*lower n_jobs"):
        fatal.fit_transform(saved)
    one = ProjectionKernel().fit_transform(saved)
    check_equal(ProjectionKernel(n_jobs=2).fit_transform(saved), one)


@pytest.mark.slow
def test_dask_gives_up_work_that_kills_every_worker(heads, cluster):
    with joblib.parallel_config(backend="dask"), pytest.raises(Exception, match="workers died"):
        DeadlyKernel().fit_transform(heads)
    cluster.wait_for_workers(2)


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing_behind(saved, tmp_path):
    script = f"""
import os, skhead
from workers import SlowKernel
heads = skhead.load_heads({saved["source"].iloc[0]!r})
try:
    SlowKernel({str(tmp_path)!r}, max_memory="100kB", n_jobs=2).fit_transform(heads)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    found = os.pathsep.join([str(Path(__file__).parent), str(Path(skhead.__file__).parents[1])])
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": found},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60)[0] == "interrupted\n"
    assert child.returncode == 0
    assert len(workers) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_errors_of_workers_name_estimator_and_head(tmp_path):
    weights = random_weights()
    weights["blocks.1.attn.W_K"][2] = 0
    save_file(weights, tmp_path / "model.safetensors")
    heads = skhead.load_heads(tmp_path / "model.safetensors")
    with pytest.raises(DegenerateHeadError, match="ProjectionKernel: L1H2 W_K is zero"):
        ProjectionKernel(n_jobs=2).fit_transform(heads)
    with pytest.raises(DegenerateHeadError, match="CompositionScore: the QK map of L1H2 is zero"):
        CompositionScore(n_jobs=2).fit_transform(heads)


def test_too_little_memory_is_refused(saved):
    with joblib.parallel_config(backend="threading", n_jobs=2):
        with pytest.raises(MemoryBudgetError, match="ProjectionKernel: max_memory is 100 bytes"):
            ProjectionKernel(max_memory=100).fit_transform(saved)
        with pytest.raises(MemoryBudgetError, match="in a worker.*of max_memory=60000 bytes"):
            GrassmannDistance(max_memory="60kB").fit_transform(saved)


def test_small_tiles_are_told():
    """Of the shape of a model of eight billion parameters, which nobody needs to read for it."""
    layer, head = np.divmod(np.arange(1024), 32)
    sizes = {"n_layers": 32, "d_model": 4096, "d_head": 128}
    table = pd.DataFrame(
        {"source": "x", "layer": layer, "head": head, "kv_head": head // 4} | sizes
    )
    with pytest.warns(UserWarning, match="within max_memory=300000000 bytes.*raise max_memory"):
        tiles_of(ProjectionKernel(), table, max_memory=300_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, tiles = tiles_of(ProjectionKernel(), table, max_memory=10 * 2**30)
    assert 1 < len(tiles) <= 16


@pytest.mark.parametrize("kernel", [ProjectionKernel(), CompositionScore()])
def test_what_only_this_process_holds_stays_in_it(kernel, heads):
    four = np.random.default_rng(0).standard_normal((5, 4, 12, 3))
    with pytest.warns(UserWarning, match="n_jobs=2 has no effect on arrays"):
        found = jobs(kernel).fit_transform(four)
    check_equal(found, kernel.fit_transform(four))
    with toy_heads() as live:
        one = kernel.fit_transform(live)
        with pytest.warns(UserWarning, match="n_jobs=2 has no effect on live models"):
            check_equal(jobs(kernel).fit_transform(live), one)
        with warnings.catch_warnings(), joblib.parallel_config(backend="threading", n_jobs=2):
            warnings.simplefilter("error")
            check_equal(kernel.fit_transform(live), one)


def test_subspaces_at_hand_are_compared_in_this_process(heads):
    subspaces = SubspaceExtractor(fold_norm=True).fit_transform(heads)
    one = ProjectionKernel().fit_transform(subspaces)
    with pytest.warns(UserWarning, match="n_jobs=2 has no effect on .*ready-made Subspaces"):
        check_equal(ProjectionKernel(n_jobs=2).fit_transform(subspaces), one)
    with joblib.parallel_config(backend="threading", n_jobs=2):
        kernel = ProjectionKernel().fit(heads)
        found = kernel.transform(SubspaceExtractor().fit_transform(heads))
    check_equal(found, ProjectionKernel().fit(heads).transform(heads))


def test_other_width_is_refused_before_anything_is_sent(heads, saved):
    with joblib.parallel_config(n_jobs=2):
        for kernel in (ProjectionKernel(), CompositionScore()):
            with pytest.raises(HeadShapeError, match="d_model"):
                kernel.fit(heads).transform(saved)


def test_clone_pickle_and_what_comes_after(heads):
    with joblib.parallel_config(backend="threading", n_jobs=2):
        fitted = ProjectionKernel(n_jobs=2).fit(heads)
        again = pickle.loads(pickle.dumps(fitted))
        assert len(pickle.dumps(fitted)) < 20_000
        np.testing.assert_array_equal(fitted.transform(heads).values, again.transform(heads).values)
        assert clone(fitted).get_params() == fitted.get_params()
        assert fitted.reference_.roles == ("O", "Q", "K", "V")
        steps = make_pipeline(
            ProjectionKernel(), NullCalibrator(null="anisotropic", random_state=0)
        )
        found = steps.fit_transform(heads)
        frame = ProjectionKernel().set_output(transform="pandas").fit_transform(heads)
    one = make_pipeline(ProjectionKernel(), NullCalibrator(null="anisotropic", random_state=0))
    np.testing.assert_allclose(found.values, one.fit_transform(heads).values, atol=1e-4)
    assert frame.columns[0] == "OQ:L0H0"


def test_grid_search_over_kernels_that_have_jobs_of_their_own(heads):
    steps = make_pipeline(
        ProjectionKernel(pairs=("OQ", "VO"), layer_order="all", n_jobs=2), LogisticRegression()
    )
    grid = {"projectionkernel__normalize": [None, "rank"]}
    search = GridSearchCV(steps, grid, cv=StratifiedKFold(2), n_jobs=2, error_score="raise")
    alone = GridSearchCV(
        clone(steps).set_params(projectionkernel__n_jobs=None), grid, cv=StratifiedKFold(2)
    )
    y = heads["layer"].to_numpy()
    scores = [s.fit(heads, y).cv_results_["mean_test_score"] for s in (search, alone)]
    np.testing.assert_allclose(*scores)


def test_threads_of_torch_are_restored(heads, monkeypatch):
    """Workers that share a process run torch on one thread each, and it has its own again after."""
    seen = []
    measure = ProjectionKernel._measure_tables

    def spy(self, rows, columns):
        seen.append(torch.get_num_threads())
        return measure(self, rows, columns)

    monkeypatch.setattr(ProjectionKernel, "_measure_tables", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with joblib.parallel_config(backend="threading", n_jobs=2):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            ProjectionKernel(max_memory="200kB").fit_transform(heads)
            assert set(seen) == {1} and len(seen) > 1
            assert torch.get_num_threads() == 3
            monkeypatch.setenv("OMP_NUM_THREADS", "3")
            ProjectionKernel().fit_transform(heads)
            assert seen[-1] == 3
    finally:
        torch.set_num_threads(before)
