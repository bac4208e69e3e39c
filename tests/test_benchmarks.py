"""Every benchmark runs, at sizes that take a moment, and what is published is what was measured."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_found(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def suites():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return list(importlib.import_module("hot_paths").discover())
    finally:
        sys.path.remove(str(BENCHMARKS))


SUITES = suites()


def test_every_subject_has_a_suite():
    names = {suite.__name__ for suite in SUITES}
    assert {"Bases", "Overlaps", "Composition", "HaarLaw", "SignFlip", "Permutation"} <= names
    assert {"Streaming", "Report", "Operations", "Circuits", "Contrast", "GridSearch"} <= names


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
@pytest.mark.filterwarnings("ignore")
def test_ratios_at_tiny_sizes(suite, monkeypatch):
    hot_paths = importlib.import_module("hot_paths")
    monkeypatch.setenv("SKHEAD_MODELS", "nowhere")
    assert suite.tiny, f"{suite.__name__} names no sizes for this test"
    for name, value in suite.tiny.items():
        assert type(getattr(suite, name)) is type(value)
        monkeypatch.setattr(suite, name, value)
    found = hot_paths.measure(suite)
    assert set(found) == {name.removeprefix("track_") for name in hot_paths.tracked(suite)}
    numbers = {name: value for name, value in found.items() if not isinstance(value, str)}
    assert set(found) - set(numbers) <= {"gpt2_small"}
    assert np.isfinite(list(numbers.values())).all()
    assert all(value > 0 for name, value in numbers.items() if "peak" not in name)
