"""Every benchmark runs, at sizes that take a moment, and what is published is what was measured."""

from __future__ import annotations

import importlib
import itertools
import json
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


@pytest.fixture
def tiny_peers(monkeypatch):
    """The comparison with models of a few heads, and its workers in this process."""
    peer, models = (importlib.import_module(name) for name in ("peer", "peer_models"))
    contestants = importlib.import_module("peer_contestants")
    tiny = {
        "gpt2-small": models.Shape("gpt2", 3, 4, 4, 32, 8),
        "llama-3-8b": models.Shape("llama", 3, 4, 2, 32, 8),
    }
    for name, shape in tiny.items():
        monkeypatch.setitem(models.SHAPES, name, shape)
    monkeypatch.setitem(contestants.SAMPLES, "scipy-loop", 10)
    monkeypatch.setattr(peer, "measured", peer.measure)
    monkeypatch.setattr(peer, "plain_gemm_rate", lambda: 1e9)
    monkeypatch.setenv("SKHEAD_MODELS", "nowhere")
    return peer


@pytest.mark.parametrize("shape, n_pairs", [("gpt2-small", 3 * 48), ("llama-3-8b", 48 + 2 * 24)])
def test_contestants_agree_and_are_stored(shape, n_pairs, tiny_peers, tmp_path, capsys):
    pytest.importorskip("transformer_lens")
    stored = tmp_path / "results.json"
    assert tiny_peers.main(["--shape", shape, "--rounds", "2", "--json", str(stored)]) == 0
    found = json.loads(stored.read_text())
    assert {"cpu", "cores", "torch", "threads", "date", "commit"} <= set(found["machine"])
    names = {task: [r["contestant"] for r in results] for task, results in found["tasks"].items()}
    assert names == {
        "pk": ["skhead", "peer", "bases-loop", "scipy-loop"],
        "cs": ["skhead", "peer"],
    }
    for own, *others in found["tasks"].values():
        assert own["flops"] > 0 and 0 < own["gemm_share"] <= own["product_gemm_share"]
        for other in others:
            assert other["difference"] < 2e-5
            assert other["ratio"]["cpu"] == pytest.approx(other["cpu"] / own["cpu"])
    sampled = {r["contestant"]: r.get("sampled") for r in found["tasks"]["pk"]}
    assert sampled == {
        "skhead": None, "peer": None, "bases-loop": None, "scipy-loop": [10, n_pairs]
    }  # fmt: skip
    assert f"extrapolated from 10 of {n_pairs} pairs" in capsys.readouterr().out


def test_what_does_not_fit_the_machine_is_not_tried(tiny_peers, monkeypatch, capsys):
    models = importlib.import_module("peer_models")
    xl = models.SHAPES["gpt2-xl"]
    assert models.bytes_needed("peer", "cs", xl) > 2 * 589e9
    assert models.bytes_needed("skhead", "cs", xl) < 5e9
    limit = models.bytes_needed("peer", "cs", models.SHAPES["gpt2-small"]) - 1
    monkeypatch.setattr(tiny_peers, "machine_bytes", lambda: limit)
    assert tiny_peers.main(["--rounds", "1", "--tasks", "cs"]) == 0
    assert "TransformerLens" in (out := capsys.readouterr().out)
    assert "not run: needs 0 GB" in out


def test_a_contestant_that_fails_is_told(tiny_peers, monkeypatch, capsys):
    def fail(*_):
        return {"failed": "MemoryError"}

    monkeypatch.setattr(tiny_peers, "measured", fail)
    assert tiny_peers.main(["--rounds", "1", "--tasks", "pk"]) == 1
    assert capsys.readouterr().out.count("MemoryError") == 4


def test_scaling_tells_both_exponents(monkeypatch, tmp_path, capsys):
    scaling = importlib.import_module("scaling")
    monkeypatch.setattr(scaling, "SHAPE", (2, 32, 4, 2))
    monkeypatch.setattr(scaling, "plain_gemm_rate", lambda: 1e9)
    monkeypatch.setattr(scaling, "alone", lambda work, *args: work(*args))
    monkeypatch.setattr(scaling, "peak_growth", lambda work: (10**6, work()))
    stored = tmp_path / "results.json"
    scaling.main(["--layers", "2", "4", "8", "--rounds", "1", "--json", str(stored)])
    found = json.loads(stored.read_text())
    assert [row["layers"] for row in found["rows"]] == [2, 4, 8]
    assert all(row["scratch"] == 10**6 - 3 * 4 * row["heads"] ** 2 for row in found["rows"])
    assert found["fits"]["bases"]["model"] == pytest.approx(1)
    # Writers but of the last layer against readers but of the first, one band: (2 (n - 1))^2 pairs.
    assert found["fits"]["products"]["model"] == pytest.approx(np.log2(7))
    assert capsys.readouterr().out.count("exponent") == 3


def test_exponents_of_known_laws():
    scaling = importlib.import_module("scaling")
    rows = [
        {"layers": n, "cpu": dict.fromkeys(scaling.PARTS, n ** 2.1),
         "flops": {"bases": n, "products": n**2, "whole": n**1.95}}
        for n in (6, 12, 24)
    ]  # fmt: skip
    found = scaling.fits(rows)
    assert found["products"]["measured"] == pytest.approx(2.1)
    assert [found[part]["within"] for part in scaling.PARTS] == [False, True, True]


def test_page_is_what_the_stored_results_make():
    make_page = importlib.import_module("make_page")
    results = make_page.stored()
    assert {"peer"} <= {result["benchmark"] for result in results}
    assert make_page.PAGE.read_text(encoding="utf-8") == make_page.page(results)


def test_page_shows_every_kind_of_result():
    make_page = importlib.import_module("make_page")
    machine = {
        "cpu": "A", "cores": 2, "memory_gb": 8.0, "load": 0.1, "threads": 1, "python": "3.11",
        "torch": "2", "date": "2026-01-01", "commit": "abc",
    }  # fmt: skip
    common = {"machine": machine, "command": "python benchmarks/x.py"}
    one = {"contestant": "bases-loop", "cpu": 8.0, "wall": 9.0, "peak": 2e9, "added": 1e9}
    one |= {"direct_share": 0.25, "ratio": {"cpu": 4.0}, "difference": 2e-5, "sampled": [10, 40]}
    refused = {"contestant": "peer", "not_run": "needs 1182 GB"}
    peer = {"benchmark": "peer", "shape": "gpt2-xl", "layers": 48, "weights": "random weights"}
    row = {"layers": 6, "heads": 72, "scratch": 5e6}
    row |= {kind: {"whole": 1e9} for kind in ("cpu", "flops")}
    fit = {"whole": {"measured": 1.2, "model": 1.5, "within": False}}
    text = make_page.page(
        [
            {"benchmark": "hot_paths", "ratios": {"Bases": {"speedup": 2.5, "b": "why"}}, **common},
            {"benchmark": "scaling", "rows": [row], "fits": fit, "max_memory": "1MB", **common},
            peer | {"tasks": {"cs": [refused], "pk": [one]}, **common},
        ]
    )
    assert text.index("Beside other ways") < text.index("Growth") < text.index("Hot paths")
    assert "not run: needs 1182 GB" in text
    assert "extrapolated from 10 of 40 pairs" in text
    for cells in (
        ("8.00", "9.00", "2.00", "1.00", "4.0", "0.25", "2.0e-05"),
        ("1.20", "1.50", "no"),
    ):
        assert "".join(f"     - {cell}\n" for cell in cells) in text
    assert "     - why" in text


def test_sections_of_the_page_have_names_of_their_own():
    make_page = importlib.import_module("make_page")
    lines = make_page.page(make_page.stored()).splitlines()
    names = [a for a, b in itertools.pairwise(lines) if a and b == "~" * len(a)]
    assert len(names) > 3 and len(set(names)) == len(names)
