"""Sphinx directive that shows the layers of the import contract as they stand in pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
WIDTH = 76


def layers(path: Path = PYPROJECT) -> list[str]:
    """Lines of the contract, the highest first, long ones folded."""
    settings = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["importlinter"]
    contract = next(found for found in settings["contracts"] if found["id"] == "layers")
    lines = []
    for layer in contract["layers"]:
        line = ""
        for word in layer.split():
            if line and len(line) + 1 + len(word) > WIDTH:
                lines.append(line)
                line = "   "
            line = f"{line} {word}" if line else word
        lines.append(line)
    return lines


class ImportLayers(SphinxDirective):
    """``.. import-layers::``"""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(PYPROJECT))
        text = "\n".join(layers())
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("import-layers", ImportLayers)
    return {"parallel_read_safe": True}
