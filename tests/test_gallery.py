"""The gallery shows every public name, tells a story in each script, and runs."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import skhead
from skhead import inspection, metrics

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("plot_*.py"))
STORED = sorted(EXAMPLES.glob("*.json"))
#: Least number of text blocks of a page, its opening docstring among them.
BLOCKS = 4
#: Processor time that a page may take, and how long it may be waited for.
SECONDS, PATIENCE = 30, 240

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def _used(script: Path) -> set[str]:
    """Names of skhead that the code of a script refers to, as ``skhead.x`` or by an import."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "skhead":
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and _dotted(node).startswith("skhead."):
            found.add(node.attr)
    return found


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _public() -> set[str]:
    members = {name: getattr(skhead, name) for name in skhead.__all__ if not name.startswith("_")}
    own = {name for name, value in members.items() if not inspect.ismodule(value)}
    return own | set(inspection.__all__) | set(metrics.__all__)


def test_only_code_that_refers_to_skhead_counts_as_use(tmp_path):
    script = tmp_path / "plot_x.py"
    script.write_text('"""skhead.ablate"""\nimport skhead\n# skhead.erasures\nother.load_heads\n')
    assert _used(script) == set()
    script.write_text("import skhead\nfrom skhead.metrics import head_detection\nskhead.ablate()\n")
    assert _used(script) == {"head_detection", "ablate"}


def test_every_public_name_is_shown_in_the_gallery():
    shown = set().union(*(_used(script) for script in SCRIPTS))
    assert not _public() - shown


@scripts
def test_a_script_has_a_title_and_tells_a_story(script):
    text = script.read_text(encoding="utf-8")
    title, underline, *rest = ast.get_docstring(ast.parse(text)).splitlines()
    assert title and set(underline) == {"="} and len(underline) == len(title)
    assert any(line.strip() for line in rest), "no introduction below the title"
    told = re.findall(r"^# %%\n(#.*\n)+", text, flags=re.MULTILINE)
    assert 1 + len(told) >= BLOCKS
    assert "plt." in text or "Display" in text, "no picture"


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_stored_numbers_are_small(stored):
    assert (EXAMPLES / f"plot_{stored.stem}.py").is_file()
    assert stored.stat().st_size < 100_000


@pytest.mark.slow
@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_stored_numbers_are_those_of_the_weights(stored, gpt2_path, monkeypatch):
    monkeypatch.setenv("SKHEAD_MODELS", str(Path(gpt2_path).parent))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    page = runpy.run_path(str(EXAMPLES / f"plot_{stored.stem}.py"))
    assert page["origin"].startswith("computed")
    _compare(json.loads(stored.read_text(encoding="utf-8")), page["measured"])


def _compare(stored, measured):
    """Equal up to the rounding of numbers that are computed in float32."""
    if isinstance(stored, dict):
        assert stored.keys() == measured.keys()
        stored, measured = list(stored.values()), list(measured.values())
    if isinstance(stored, list):
        assert len(stored) == len(measured)
        for one, other in zip(stored, measured, strict=True):
            _compare(one, other)
    elif isinstance(stored, float):
        assert measured == pytest.approx(stored, rel=1e-2, abs=5e-3)
    else:
        assert measured == stored


def _run(script: Path, folder: Path, **environment: str) -> None:
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-W", "ignore:.*non-GUI backend", str(script)],
        cwd=folder,
        env={**os.environ, "MPLBACKEND": "Agg", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = os.times()
    took = after.children_user - before.children_user
    assert 0 < took < SECONDS
    assert not list(folder.iterdir()), "a gallery script leaves files behind"


# The build of the documentation runs every script as well.
@pytest.mark.slow
@scripts
def test_a_script_runs(script, tmp_path):
    _run(script, tmp_path)


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_a_page_is_drawn_from_stored_numbers_without_weights(stored, tmp_path):
    nowhere = tmp_path / "models"
    folder = tmp_path / "run"
    folder.mkdir()
    _run(EXAMPLES / f"plot_{stored.stem}.py", folder, SKHEAD_MODELS=str(nowhere))
