"""Importing skhead is cheap, and every public name is there, documented and findable."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import skhead

PACKAGE = Path(skhead.__file__).parent
HEAVY = ("matplotlib", "networkx", "pandas", "scipy", "sklearn", "torch", "transformer_lens")
LAZY = ("huggingface_hub", "networkx", "transformer_lens", "transformers")
PUBLIC = [name for name in skhead.__all__ if name != "__version__"]


def _modules_after(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout))


def _module_level_imports(tree: ast.Module) -> set[str]:
    """Top-level names of the packages that a module imports when it is itself imported."""
    found: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        pending.extend(ast.iter_child_nodes(node))
    return found


def test_import_loads_no_heavy_library():
    assert not _modules_after("import skhead").intersection(HEAVY)


def test_a_public_name_loads_its_own_module_only_when_asked_for():
    before = _modules_after("import skhead; dir(skhead)")
    after = _modules_after("import skhead; skhead.load_heads")
    assert "skhead.weights" not in before
    assert "skhead.weights" in after
    assert "skhead.kernels" not in after


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_model_and_graph_libraries_are_imported_inside_functions(path):
    imported = _module_level_imports(ast.parse(path.read_text(encoding="utf-8")))
    assert not imported.intersection(LAZY)


def test_module_level_imports_are_seen_where_they_hide():
    tree = ast.parse(
        "if TYPE_CHECKING:\n    import typed\n"
        "try:\n    import tried.deep\nexcept ImportError:\n    tried = None\n"
        "def f():\n    import inside\n"
        "class C:\n    from held import x\n"
    )
    assert _module_level_imports(tree) == {"tried", "held"}


def test_dir_lists_the_public_names():
    assert set(dir(skhead)) == set(skhead.__all__)
    assert len(skhead.__all__) == len(set(skhead.__all__))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves_with_documentation(name):
    value = getattr(skhead, name)
    assert inspect.getdoc(value)
    if not inspect.ismodule(value):
        assert value.__name__ == name
        assert ">>>" in inspect.getdoc(value), f"skhead.{name} has no example in its docstring"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'skhead' has no attribute 'ProjectionKernal'"):
        _ = skhead.ProjectionKernal


def test_version_is_that_of_the_installed_distribution():
    assert skhead.__version__ == importlib.metadata.version("skhead")
