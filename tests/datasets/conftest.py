"""Fixtures for the tests of the bundled model: its scripts, weights and card."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from skhead.datasets import bundled_path

NAME = "skhead/induction-2l"
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="session")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules that define, train and measure the bundled model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield SimpleNamespace(
            model=importlib.import_module("induction_2l_model"),
            card=importlib.import_module("induction_2l_card"),
            train=importlib.import_module("train_induction_2l"),
        )


@pytest.fixture(scope="session")
def parameters():
    return load_file(bundled_path(NAME) / "model.safetensors")


@pytest.fixture(scope="session")
def held_out(scripts):
    """The first part of the held-out sequences."""
    return scripts.card.held_out_batches(512)
