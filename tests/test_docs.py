"""What README, guide, gallery and docstrings show is what skhead does."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numpydoc.docscrape import get_doc_object
from numpydoc.validate import validate

import skhead

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MODULES = (
    "base",
    "datasets",
    "exceptions",
    "graph",
    "inspection",
    "metrics",
    "report",
    "stats",
    "testing",
)
BUILT = {"_build", "gallery", "generated"}
DOCTEST_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
#: numpydoc's codes: documented at all, no parameter missing, none unknown, in the right order.
REQUIRED = {"GL08", "PR01", "PR02", "PR03"}
DEFAULT = re.compile(r"\bdefault[ :=]+(?P<value>.+)$")
#: A parameter without a stated default: None, explained in words, or there for the sake of the API.
UNSTATED = re.compile(r"\b(optional|ignored)\b", flags=re.IGNORECASE)


def _blocks(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _pages() -> list[Path]:
    return [
        path
        for path in sorted(DOCS.rglob("*.rst"))
        if not BUILT.intersection(path.relative_to(DOCS).parts)
    ]


def _public_objects() -> Iterator[tuple[str, Any]]:
    """Every public class, function and method, with its dotted import path."""
    found: dict[str, Any] = {}
    for name in skhead.__all__:
        value = getattr(skhead, name)
        if not inspect.ismodule(value) and name != "__version__":
            found[f"skhead.{name}"] = value
    for room in MODULES:
        module = importlib.import_module(f"skhead.{room}")
        for name in module.__all__:
            if name not in skhead.__all__:
                found[f"skhead.{room}.{name}"] = getattr(module, name)
    for path, value in sorted(found.items()):
        yield path, value
        if not inspect.isclass(value):
            continue
        for name, member in inspect.getmembers(value, inspect.isfunction):
            if not name.startswith("_") and member.__module__.startswith("skhead"):
                yield f"{path}.{name}", member


OBJECTS = dict(_public_objects())


def _parameters(value: Any) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(value)
    return {name: item for name, item in signature.parameters.items() if name != "self"}


def _documented_types(value: Any) -> dict[str, str]:
    """Type, as documented, of every parameter; "a, b : int" documents two."""
    return {
        name.lstrip("*"): item.type
        for item in get_doc_object(value)["Parameters"]
        for name in item.name.split(", ")
    }


def _takes_parameters(value: Any) -> bool:
    """Whether users call it; errors and what estimators return are made for them."""
    made = inspect.isclass(value) and issubclass(value, BaseException | tuple)
    return not (made or dataclasses.is_dataclass(value))


#: Methods of scikit-learn's estimators and displays; the example of their class shows them in use.
SHOWN_BY_CLASS = {
    "decision_function", "fit", "fit_transform", "get_feature_names_out", "partial_fit", "plot",
    "predict", "predict_proba", "set_output", "transform",
}  # fmt: skip
CALLED = [path for path, value in OBJECTS.items() if _takes_parameters(value)]
GIVEN = [path for path in OBJECTS if path not in CALLED]


def test_readme_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(ROOT / "README.md", "python")
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "L0H" in capsys.readouterr().out


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", "\n".join(texts), flags=re.MULTILINE))
    known = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= known


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_local_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(
        str(page), module_relative=False, optionflags=DOCTEST_FLAGS, encoding="utf-8"
    )
    assert result.failed == 0
    if page.name == "quickstart.rst":
        assert result.attempted > 5


def test_api_reference_lists_the_public_names_and_no_others():
    text = (DOCS / "api" / "index.rst").read_text(encoding="utf-8")
    names = re.findall(r"^   ([A-Za-z]\w*(?:\.\w+)?)$", text, flags=re.MULTILINE)
    listed = {f"skhead.{name}" for name in names}
    methods = {path for path in OBJECTS if path.rpartition(".")[0] in OBJECTS}
    assert listed == set(OBJECTS) - methods


def _examples(value: Any) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")


@pytest.mark.parametrize("path", [path for path in OBJECTS if ".exceptions." not in path])
def test_every_public_name_has_an_example_that_runs(path):
    """The examples themselves are run by ``pytest --doctest-modules skhead``."""
    owner, _, name = path.rpartition(".")
    examples = _examples(OBJECTS[path])
    if not examples and owner in OBJECTS and name in SHOWN_BY_CLASS:
        examples = _examples(OBJECTS[owner])
        shown = "".join(example.source for example in examples)
        assert re.search(r"\.(fit|fit_transform|from_\w+)\(", shown)
    assert examples
    assert not any(doctest.SKIP in example.options for example in examples)


@pytest.mark.parametrize("path", CALLED)
def test_docstring_names_every_parameter(path):
    errors = [(code, text) for code, text in validate(path)["errors"] if code in REQUIRED]
    assert not errors


@pytest.mark.parametrize("path", GIVEN)
def test_docstring_names_every_attribute(path):
    value = OBJECTS[path]
    assert inspect.getdoc(value)
    documented = {
        name for item in get_doc_object(value)["Attributes"] for name in item.name.split(", ")
    }
    fields = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", {})
    assert {name for name in fields if not name.startswith("_")} <= documented


@pytest.mark.parametrize("path", CALLED)
def test_documented_default_is_the_real_one(path):
    types = _documented_types(OBJECTS[path])
    for name, parameter in _parameters(OBJECTS[path]).items():
        if parameter.default is inspect.Parameter.empty or name not in types:
            continue
        stated = DEFAULT.search(types[name])
        if stated is None:
            assert UNSTATED.search(types[name]), f"{path}: {name} does not state its default"
            assert parameter.default is None
        else:
            value = ast.literal_eval(stated["value"].strip("` "))
            assert value == parameter.default, f"{path}: {name} documents the default {value!r}"
