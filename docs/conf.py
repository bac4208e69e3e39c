"""Sphinx configuration; built by ``make docs`` with warnings as errors and without network."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TQDM_DISABLE", "1")

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import skhead

project = "skhead"
author = "skhead developers"
copyright = "2026, skhead developers"
version = release = skhead.__version__

extensions = [
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "changelog_pages",
    "import_layers",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
# Links what can be imported; a parameter in backticks is set in italics.
default_role = "autolink"
add_module_names = False

autosummary_generate = True
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# The pages are built without network, so names of other libraries have no page to link to.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|huggingface_hub|matplotlib|networkx|numpy|os|pandas|pathlib)\b.*"),
    (r"py:.*", r"(scipy|sklearn|torch|transformer_lens|transformers|typing)\b.*"),
    (r"py:.*", r"skhead\.(linalg|weights|containers|_base)\b.*"),
]

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    # Lists of examples by what they use, which the pages of the API show.
    "backreferences_dir": "api/generated/backreferences",
    "doc_module": ("skhead",),
    "filename_pattern": r"plot_",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "plot_gallery": True,
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
}

html_theme = "pydata_sphinx_theme"
html_title = f"skhead {release}"
html_theme_options = {
    "header_links_before_dropdown": 5,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": False,
    "show_toc_level": 2,
}
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Pages that stand alone have no neighbours to list beside them.
html_sidebars = {
    name: []
    for name in (
        *("benchmarks", "citing", "contributing/architecture", "faq", "glossary"),
        *("index", "install", "quickstart", "whats_new"),
    )
}
html_copy_source = False
html_show_sourcelink = False

# A figure on a page is drawn by the Agg backend, which has no window to show it in.
warnings.filterwarnings("ignore", message=".*Agg, which is a non-GUI backend.*")


def escape_initials(*event: Any) -> None:
    """Keep "[1] H. Name" a reference; reStructuredText reads "H." as the eighth item of a list."""
    lines = event[-1]
    lines[:] = [re.sub(r"^(\.\. \[\w+\] )([A-Z]\.)", r"\1\\\2", line) for line in lines]


def skip_foreign_members(*event: Any) -> bool | None:
    """Leave out what classes inherit from other libraries, and the properties of named tuples."""
    member = event[3]
    foreign = callable(member) and not str(getattr(member, "__module__", "")).startswith("skhead")
    field = str(getattr(member, "__doc__", "")).startswith("Alias for field number")
    return True if foreign or field else None


def setup(app: Any) -> None:
    # Before numpydoc, which splits the docstring into sections at the default priority.
    app.connect("autodoc-process-docstring", escape_initials, priority=100)
    app.connect("autodoc-skip-member", skip_foreign_members)
