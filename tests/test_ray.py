"""Kernels whose pairs are shared out on a Ray cluster; only where Ray is installed."""

from __future__ import annotations

import os
import sys

import joblib
import numpy as np
import pytest
from workers import FatalKernel

import skhead
from skhead import CompositionScore, ProjectionKernel

ray = pytest.importorskip("ray", reason="Ray comes with `pip install ray`")


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    """Two Ray workers on this machine, which find the modules that these tests find."""
    from ray.util.joblib import register_ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
    )
    register_ray()
    with joblib.parallel_config(backend="ray", n_jobs=2):
        yield
    ray.shutdown()


@pytest.mark.parametrize("kernel", [ProjectionKernel(), CompositionScore(layer_order="all")])
def test_a_ray_cluster_gives_what_one_process_gives(kernel, gpt2_path):
    heads = skhead.load_heads(gpt2_path)
    found = kernel.fit_transform(heads)
    one = type(kernel)(layer_order=kernel.layer_order, n_jobs=1).fit_transform(heads)
    np.testing.assert_allclose(found.values, one.values, rtol=1e-6, atol=2e-7)


def test_a_killed_worker_is_an_error_and_no_number(tmp_path):
    heads = skhead.load_heads("skhead/induction-2l")
    fatal = FatalKernel(str(tmp_path / "killed"), max_memory="100kB")
    with pytest.raises(ray.exceptions.ActorDiedError):
        fatal.fit_transform(heads)
    assert (tmp_path / "killed").exists()
    one = ProjectionKernel(n_jobs=1).fit_transform(heads)
    found = ProjectionKernel(max_memory="100kB").fit_transform(heads)
    np.testing.assert_allclose(found.values, one.values, rtol=1e-6, atol=2e-7)
