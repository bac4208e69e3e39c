"""Sphinx directive that shows the changelog: what is not released yet, then every release."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
MARKER = "<!-- towncrier: new releases go below -->\n"
NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def unreleased(root: Path = ROOT) -> str:
    """The fragments of ``changelog.d``, as towncrier would gather them, in Markdown."""
    command = [sys.executable, "-m", "towncrier", "build", "--draft"]
    done = subprocess.run(
        [*command, "--version", "Unreleased", "--date", "not yet", "--dir", str(root)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def released(root: Path = ROOT) -> str:
    """Past releases, in Markdown."""
    return (root / "CHANGELOG.md").read_text(encoding="utf-8").partition(MARKER)[2]


def as_rest(markdown: str, known: set[str]) -> list[str]:
    """Headings, bullets and code of a changelog as lines of reStructuredText.

    Code that is the name of something public becomes a link to its page.
    """
    lines: list[str] = []
    for line in markdown.splitlines():
        heading = re.fullmatch(r"(#{2,3}) (.+)", line)
        if heading is None:
            lines.append(re.sub(r"`([^`]+)`", lambda found: _code(found[1], known), line))
            continue
        title = heading[2].removesuffix(" (not yet)")
        lines += ["", title, {"##": "-", "###": "~"}[heading[1]] * len(title), ""]
    return lines


def _code(text: str, known: set[str]) -> str:
    linked = NAME.fullmatch(text) and text.removeprefix("skhead.") in known
    return f"`~skhead.{text.removeprefix('skhead.')}`" if linked else f"``{text}``"


class Changelog(SphinxDirective):
    """``.. changelog::``"""

    def run(self) -> list[nodes.Node]:
        import skhead

        for fragment in sorted((ROOT / "changelog.d").glob("+*.md")):
            self.env.note_dependency(str(fragment))
        self.env.note_dependency(str(ROOT / "CHANGELOG.md"))
        modules = ("datasets", "inspection", "metrics", "stats")
        known = set(skhead._EXPORTS) | {
            f"{name}.{member}" for name in modules for member in getattr(skhead, name).__all__
        }
        lines = as_rest(unreleased() + "\n" + released(), known)
        section = nodes.section()
        self.state.nested_parse(
            StringList(lines, source="changelog"), self.content_offset, section, match_titles=True
        )
        return list(section.children)


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("changelog", Changelog)
    return {"parallel_read_safe": True}
