"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Directory of real trained weights, which are not part of the project."""
    given = os.environ.get("SKHEAD_MODELS")
    path = Path(given) if given else ROOT.parent / "shared" / "models"
    if not path.is_dir():
        pytest.skip("real weights not found: set SKHEAD_MODELS to the directory that holds them")
    return path


@pytest.fixture(scope="session")
def reference_dir(models_dir: Path) -> Path:
    """Directory of published tables, beside the real weights."""
    path = models_dir.parent / "reference"
    if not path.is_dir():
        pytest.skip(f"published tables not found beside the real weights ({path})")
    return path


@pytest.fixture(scope="session")
def gpt2_path(models_dir: Path) -> str:
    return str(models_dir / "gpt2-small-attention")
