"""Store what gallery pages on GPT-2 small show to readers who do not have its weights.

``SKHEAD_MODELS=DIR python scripts/store_gallery_numbers.py`` runs the pages with the weights under
``DIR/gpt2-small-attention`` and writes their numbers beside them.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAGES = ("gpt2_wiring", "gpt2_classes")


def measure(page: str, models: Path) -> dict[str, object]:
    """Numbers of a page, by the page's own code.

    Parameters
    ----------
    page : str
        Name of the script, without ``plot_``.
    models : Path
        Directory that holds ``gpt2-small-attention``.
    """
    weights = models / "gpt2-small-attention"
    if not weights.is_dir():
        raise SystemExit(f"{weights} is not there; name its parent in SKHEAD_MODELS")
    found = runpy.run_path(str(EXAMPLES / f"plot_{page}.py"))["measured"]
    assert isinstance(found, dict)
    return found


def main() -> None:
    """Write the numbers of every page."""
    os.environ["MPLBACKEND"] = "Agg"
    models = Path(os.environ.get("SKHEAD_MODELS", ""))
    for page in PAGES:
        text = json.dumps(measure(page, models), indent=None, separators=(",", ":"))
        (EXAMPLES / f"{page}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
