"""Check that the API page of every public name shows the gallery scripts that use it.

python scripts/check_gallery.py docs/_build/html          # after the pages were built
python scripts/check_gallery.py docs/_build/html --list   # names with their scripts, or none
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from pathlib import Path

import skhead

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def dotted(node: ast.AST) -> str:
    """``"skhead.stats.haar_moments"`` of such an expression, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def names_used(script: str) -> set[str]:
    """Dotted names of skhead in a script, imported ones by what they stand for."""
    tree = ast.parse(script)
    meaning = {"skhead": "skhead"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "skhead":
            meaning |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    found = set()
    for node in ast.walk(tree):
        root, _, rest = dotted(node).partition(".")
        if root in meaning and isinstance(node, ast.Name | ast.Attribute):
            found.add(f"{meaning[root]}.{rest}".rstrip("."))
    return found


def scripts_by_name(pages: list[str], examples: Path = EXAMPLES) -> dict[str, set[str]]:
    """For every public name, the gallery scripts that use it."""
    by_name: dict[str, set[str]] = defaultdict(set)
    for script in sorted(examples.glob("*.py")):
        for name in names_used(script.read_text(encoding="utf-8")) & set(pages):
            by_name[name].add(script.stem)
    return by_name


def public_pages(folder: Path) -> dict[str, Path]:
    """Public names by the pages that document them, ``skhead.ProjectionKernel.html``."""
    pages = {path.stem: path for path in (folder / "api" / "generated").glob("skhead.*.html")}
    missing = {f"skhead.{name}" for name in skhead._EXPORTS} - set(pages)
    if missing:
        raise SystemExit(f"no page for {', '.join(sorted(missing))}: build the documentation first")
    return pages


def main() -> int:
    """Compare the scripts with the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the built pages")
    parser.add_argument("--list", action="store_true", help="list every name with its scripts")
    options = parser.parse_args()
    pages = public_pages(options.folder)
    by_name = scripts_by_name(list(pages))
    missing = 0
    for name, page in sorted(pages.items()):
        text = page.read_text(encoding="utf-8")
        for script in sorted(by_name[name]):
            if f"gallery/{script}.html" not in text:
                missing += 1
                print(f"{name}: its page does not show {script}", file=sys.stderr)
        if options.list:
            print(f"{name}: {', '.join(sorted(by_name[name])) or 'no script'}")
    shown = sum(bool(scripts) for scripts in by_name.values())
    print(f"{shown} of {len(pages)} public names have an example in the gallery")
    print(f"{missing} examples are missing on their pages")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
