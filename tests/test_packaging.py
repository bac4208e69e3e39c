"""What is said of requirements is what is tested."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def pinned(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pattern = re.compile(r"^([\w.-]+)>=([\d.]+)")
    return dict(pattern.match(text).groups() for text in project["dependencies"])


def test_the_oldest_versions_are_those_that_are_allowed():
    oldest, allowed = pinned("constraints-oldest.txt"), lower_bounds()
    assert len(allowed) > 9
    assert oldest.pop("torch") == pinned("constraints.txt")["torch"]
    assert oldest == {name: bound for name, bound in allowed.items() if name != "torch"}
