"""Size of tiles, number and kind of workers, and bases in files change no number."""

from __future__ import annotations

import joblib
import numpy as np
import pytest
from safetensors.torch import save_file
from sklearn.base import clone
from toys import random_weights

import skhead

KERNELS = {
    "PK": skhead.ProjectionKernel(),
    "PK-all": skhead.ProjectionKernel(("OQ", "KO", "VV"), layer_order="all", normalize="cosine"),
    "CS": skhead.CompositionScore(),
    "CS-all": skhead.CompositionScore(layer_order="all", baseline="ratio"),
}
#: Bytes allowed, from the smallest tiles to all at once.
BUDGETS = ("200kB", "600kB", "1GiB")
#: Backend and number of workers.
WORKERS = [
    pytest.param("threading", 1, id="alone"),
    pytest.param("threading", 2, id="threads"),
    pytest.param("loky", 2, id="processes"),
    pytest.param("dask", 2, id="dask", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Heads in a file, with grouped queries, unequal ranks and in no order."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    weights = random_weights(n_layers=4, n_heads=6, n_kv_heads=2, d_model=48, d_head=8)
    weights["blocks.1.attn.W_O"][1, 5:] = 0
    save_file(weights, path)
    table = skhead.load_heads(path)
    return table.iloc[np.random.default_rng(0).permutation(len(table))]


@pytest.fixture(scope="module")
def references(heads):
    """One process, everything in memory."""
    return {name: kernel.fit_transform(heads).values for name, kernel in KERNELS.items()}


def assert_equal(found, expected):
    """To a millionth of every number."""
    assert np.isfinite(expected).any()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("backend, n_jobs", WORKERS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.filterwarnings("ignore:.*times the work of one process")
def test_workers_and_tiles(name, backend, n_jobs, budget, heads, references, request):
    if backend == "dask":
        request.getfixturevalue("cluster")
    kernel = clone(KERNELS[name]).set_params(max_memory=budget)
    with joblib.parallel_config(backend=backend, n_jobs=n_jobs):
        assert_equal(kernel.fit_transform(heads).values, references[name])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("filled", [0, 7, 24])
@pytest.mark.parametrize("name", ["PK", "PK-all"])
def test_bases_in_files(name, filled, budget, heads, references, tmp_path):
    """Computed now, found in part, or found entirely; composition scores keep no bases."""
    extractor = skhead.SubspaceExtractor(cache=tmp_path, max_memory=budget)
    if filled:
        extractor.fit_transform(heads.sort_index().iloc[:filled])
    before = {path.name for path in tmp_path.iterdir()}
    subspaces = extractor.fit_transform(heads)
    after = {path.name for path in tmp_path.iterdir()}
    assert before <= after
    assert {0: 0, 7: 8, 24: 16}[filled] == len(before)
    assert len(after) == 16
    kernel = clone(KERNELS[name]).set_params(max_memory=budget)
    assert_equal(kernel.fit_transform(subspaces).values, references[name])
