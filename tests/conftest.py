"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# The same few examples at every run, or with SKHEAD_HYPOTHESIS=thorough many new ones.
settings.register_profile("quick", max_examples=5, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=400, deadline=None)
settings.load_profile(os.environ.get("SKHEAD_HYPOTHESIS", "quick"))


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


@pytest.fixture(scope="session")
def stories_tokenizer(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the byte-pair encoding of stories260k as tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    listed = json.loads((models_dir / "stories260k" / "tokens.json").read_text(encoding="utf-8"))
    ids = {entry["text"]: entry["id"] for entry in listed[3:]}
    texts = [text for text in ids if not text.startswith("<0x")]
    merges = [
        (text[:cut], text[cut:])
        for text in texts
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    model = tokenizers.models.BPE({text: ids[text] for text in texts}, merges)
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizers.Tokenizer(model).save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def cluster():
    """A Dask cluster of two worker processes."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as local,
        distributed.Client(local) as client,
    ):
        yield client
