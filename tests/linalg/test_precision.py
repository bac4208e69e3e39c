"""Settings of the process that last as long as a call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from skhead.linalg import precision
from skhead.linalg.precision import matmul_precision


@pytest.fixture
def setting():
    holder = SimpleNamespace(mode="none")
    return holder, precision._ScopedSetting(lambda: holder, "mode", ["ieee", "tf32"])


def test_the_setting_lasts_as_long_as_somebody_is_inside(setting):
    holder, scoped = setting
    first, second = scoped("tf32"), scoped("tf32")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert holder.mode == "tf32"
    second.__exit__(None, None, None)
    assert holder.mode == "none"


def test_the_most_exact_of_what_threads_ask_for_holds(setting):
    """Whoever asked for exact products first or last must not get rounded ones."""
    holder, scoped = setting
    rounded, exact = scoped("tf32"), scoped("ieee")
    rounded.__enter__()
    exact.__enter__()
    assert holder.mode == "ieee"
    rounded.__exit__(None, None, None)
    assert holder.mode == "ieee"
    exact.__exit__(None, None, None)
    assert holder.mode == "none"


def test_an_error_inside_restores_the_setting(setting):
    holder, scoped = setting
    with pytest.raises(RuntimeError), scoped("tf32"):
        raise RuntimeError
    assert holder.mode == "none"


@pytest.mark.parametrize(("asked", "mode"), [("highest", 0), ("high", 1), ("medium", 1)])
def test_cuda_rounds_only_where_that_was_asked_for(asked, mode):
    """The setting exists without a GPU too."""
    name = precision._CUDA_MODE._name
    expected = list(precision._CUDA_MODE._inside)[mode]
    before = getattr(torch.backends.cuda.matmul, name)
    with matmul_precision(torch.device("cuda"), asked):
        assert getattr(torch.backends.cuda.matmul, name) == expected
    assert getattr(torch.backends.cuda.matmul, name) == before
