"""The script that changes the package to see whether tests notice."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="cosmic-ray comes with `make mutation`")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

mutation_check = importlib.import_module("mutation_check")
mutation_operators = importlib.import_module("mutation_operators")


def changes(source):
    """Every change of a source, as the changed line before and after."""
    found = []
    for mutant in mutation_operators.mutants_of("x.py", source):
        text = mutation_operators.mutated(mutant, source)
        if text:
            found.append(mutation_operators.change(mutant, source, text).split("  ->  "))
    return found


@pytest.mark.parametrize(
    "before, after",
    [
        ("a < b", {"a <= b", "a >= b"}),
        ("a * b", {"a / b"}),
        ("x[a:b]", {"x[:b]", "x[a:]"}),
        ("x.clamp_min(y)", {"x.clamp_max(y)", "pass"}),
        ("x += y", {"pass"}),
        ("x[a] = y", {"pass"}),
        ("x = max(a, b)", {"x = min(a, b)"}),
        ("x = f(max=a)", set()),
        ("del x", set()),
    ],
)
def test_every_sign_has_its_changes(before, after):
    found = changes(before + "\n")
    assert {line for line, _ in found} <= {before}
    assert {line for _, line in found} == after


def test_returns_and_raises_are_left_out_but_not_changed_inside():
    source = 'def f(x):\n    if x:\n        raise ValueError(f"{x + 1} < 2")\n    return x\n'
    assert sorted(changes(source)) == [
        ["if x:", "if not x:"],
        ['raise ValueError(f"{x + 1} < 2")', "pass"],
        ["return x", "return None"],
    ]


def test_what_never_changes_a_result_is_not_changed():
    source = """'''One < two.'''
__all__ = ["a" + "b"]
_CHUNK = 8
_LIMIT: int | None = None


@lru_cache(maxsize=8)
def f(x: int | None = None, *, y: Literal[1] = y) -> int | None:
    '''Not 3.'''
    warnings.warn(f"{x - 1}", stacklevel=y)
    for a, b in zip(x, y, strict=True):
        g = f"{a + b}"
"""
    assert {line for line, _ in changes(source)} == {
        'warnings.warn(f"{x - 1}", stacklevel=y)',
        "for a, b in zip(x, y, strict=True):",
    }
    assert len(changes(source)) == 2


def test_a_name_passed_on_by_a_room_counts_for_its_module():
    tests = mutation_check.tests_by_module()
    assert "tests/stats/test_divergence.py" in tests["skhead.stats.divergence"]
    assert "tests/linalg/test_topk.py" in tests["skhead.linalg.topk"]
    assert {mutation_check.module_of(file) for file in mutation_check.sources()} <= set(tests)


def test_places_are_drawn_by_seed():
    texts = {file: text for file, text in mutation_check.sources().items() if "topk" in file}
    first = mutation_check.drawn(texts, 10, 0)
    assert len({(m.start, m.end) for m in first}) == 10
    assert list(first) == list(mutation_check.drawn(texts, 10, 0))
    assert list(first) != list(mutation_check.drawn(texts, 10, 1))
    assert list(first)[:5] == list(mutation_check.drawn(texts, 5, 0))


@pytest.mark.slow
def test_mutants_of_a_well_tested_module_die(tmp_path):
    report = tmp_path / "report.json"
    options = ["--module", "linalg/topk", "--mutants", "5", "--json", str(report)]
    command = [sys.executable, str(ROOT / "scripts" / "mutation_check.py"), *options]
    before = (ROOT / "skhead" / "linalg" / "topk.py").read_bytes()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["share"] >= 0.8
    assert all(e["by"].startswith("tests/") for e in found["mutants"] if e["verdict"] == "killed")
    assert (ROOT / "skhead" / "linalg" / "topk.py").read_bytes() == before
