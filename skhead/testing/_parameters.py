"""Checks of the constructor, its parameters and what the docstring says of them."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

from sklearn.base import clone

from skhead.testing._bench import Bench, fingerprint
from skhead.testing._checks import check, parameter, refused, require

NOT_AN_OPTION = "no such option"

_ENTRY = re.compile(r"^(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*) : (?P<kind>.+)$")
_DEFAULT = re.compile(r"\bdefault[ :=]+(?P<value>.+)$")
_OPTIONS = re.compile(r"\{(?P<options>[^}]*)\}")


def _constructor(bench: Bench) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(type(bench.estimator).__init__)
    return {name: item for name, item in signature.parameters.items() if name != "self"}


def _documented(bench: Bench) -> dict[str, str]:
    """Type of every parameter as the docstring of the class gives it."""
    lines = (inspect.getdoc(type(bench.estimator)) or "").splitlines()
    found: dict[str, str] = {}
    inside = False
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line and set(below.strip()) == {"-"}:
            inside = line.strip() == "Parameters"
        entry = _ENTRY.match(line) if inside else None
        if entry:
            found |= dict.fromkeys(entry["names"].split(", "), entry["kind"])
    return found


@check()
def check_constructor_keeps_parameters(bench: Bench) -> None:
    """The constructor stores every parameter as it is, and does nothing else."""
    given = {name: object() for name in _constructor(bench)}
    try:
        made = type(bench.estimator)(**given)
    except Exception as error:
        raise AssertionError(
            f"{bench.name}: the constructor must not look at its parameters, of which each may be "
            f"set later; check them in fit. It raised {type(error).__name__}: {error}"
        ) from error
    for name, value in given.items():
        stored = getattr(made, name, None)
        require(
            stored is value,
            f"{bench.name}: the constructor must store {name} as it is given, so that clone and "
            f"set_params see the same; it stores {stored!r}. Check and convert in fit",
        )
    added = set(vars(made)) - set(given)
    require(not added, f"{bench.name}: the constructor sets {sorted(added)} beside its parameters")


@check()
def check_signature_is_explicit(bench: Bench) -> None:
    """The constructor names its parameters one by one; get_params gives them."""
    signature = _constructor(bench)
    loose = [
        name
        for name, item in signature.items()
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD)
    ]
    require(not loose, f"{bench.name}: the constructor takes {loose}; name every parameter")
    got = set(bench.estimator.get_params(deep=False))
    require(
        got == set(signature),
        f"{bench.name}: get_params gives {sorted(got)}, and the constructor takes "
        f"{sorted(signature)}",
    )


@check()
def check_defaults_cannot_change(bench: Bench) -> None:
    """No default is a mutable object, which all instances would share."""
    for name, item in _constructor(bench).items():
        require(
            isinstance(item.default, int | float | str | bytes | tuple | frozenset | None | type),
            f"{bench.name}: the default of {name} is a {type(item.default).__name__}, which every "
            "instance shares; take None, and make the object in fit",
        )


@check()
def check_set_params(bench: Bench) -> None:
    """set_params changes what get_params gives, and returns the estimator."""
    estimator = bench.new()
    for name in bench.parameters:
        marker = object()
        require(
            estimator.set_params(**{name: marker}) is estimator,
            f"{bench.name}: set_params must return the estimator",
        )
        require(
            estimator.get_params(deep=False)[name] is marker,
            f"{bench.name}: set_params({name}=...) does not change what get_params gives",
        )


@check()
def check_set_params_refuses_unknown_names(bench: Bench) -> None:
    """A parameter that does not exist is an error which names it."""
    with refused(bench, "a parameter that does not exist", "no_such_parameter"):
        bench.new().set_params(no_such_parameter=1)


@check()
def check_clone(bench: Bench) -> None:
    """A clone has the same parameters, and nothing that was learned."""
    given = bench.given()
    estimator = bench.new()
    before = {name: fingerprint(value) for name, value in estimator.get_params().items()}
    bench.fitted(given, estimator)
    copy = clone(estimator)
    after = {name: fingerprint(value) for name, value in copy.get_params().items()}
    changed = [name for name in before if before[name] != after.get(name)]
    require(not changed, f"{bench.name}: a clone has other values of {changed}")
    learned = sorted(set(vars(copy)) - set(vars(clone(bench.estimator))))
    require(not learned, f"{bench.name}: a clone of a fitted estimator still holds {learned}")


@check()
def check_fit_leaves_parameters(bench: Bench) -> None:
    """Fit changes no parameter."""
    given = bench.given()
    estimator = bench.new()
    before = {name: fingerprint(value) for name, value in estimator.get_params(deep=False).items()}
    bench.apply(bench.fitted(given, estimator), given.X)
    for name, value in estimator.get_params(deep=False).items():
        require(
            before[name] == fingerprint(value),
            f"{bench.name}: fit changes the parameter {name}; keep what is derived from it in "
            f"{name}_",
        )


def _has_documented_options(bench: Bench) -> str | None:
    if _options(bench):
        return None
    return "documents no parameter of fixed text options ({'a', 'b'} in its docstring)"


def _options(bench: Bench) -> list[str]:
    """Parameters that the docstring says are one of some texts."""
    found = []
    for name, kind in _documented(bench).items():
        listed = _OPTIONS.search(kind)
        texts = listed is not None and re.search(r"[\"']", listed["options"])
        if texts and name in bench.parameters:
            found.append(name)
    return found


@check(_has_documented_options)
def check_unknown_options_are_refused(bench: Bench) -> None:
    """A value that is not one of the documented options is an error that names both."""
    given = bench.given()
    for name in _options(bench):
        with refused(bench, f"{name}={NOT_AN_OPTION!r}", NOT_AN_OPTION, name):
            bench.run(given, **{name: NOT_AN_OPTION})


@check()
def check_parameters_are_documented(bench: Bench) -> None:
    """The docstring of the class lists every parameter, and no other."""
    documented, real = set(_documented(bench)), set(_constructor(bench))
    require(
        documented == real,
        f"{bench.name}: the section Parameters of the docstring lacks {sorted(real - documented)} "
        f"and lists {sorted(documented - real)} that do not exist",
    )


@check()
def check_documented_defaults(bench: Bench) -> None:
    """The defaults that the docstring states are those of the constructor."""
    signature = _constructor(bench)
    for name, kind in _documented(bench).items():
        stated = _DEFAULT.search(kind)
        if stated is None or name not in signature:
            continue
        text, default = stated["value"].strip("` "), signature[name].default
        require(
            text == repr(default) or _literal(text) == default,
            f"{bench.name}: {name} has the default {default!r}, and the docstring says {text}",
        )


def _literal(text: str) -> Any:
    """The value of a literal; what is none, as np.inf, stays a text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@check(parameter("max_memory"))
def check_bad_memory_budget_is_refused(bench: Bench) -> None:
    """A max_memory that is no number of bytes is an error that names it."""
    given = bench.given()
    for value in ("a lot", -1):
        with refused(bench, f"max_memory={value!r}", "max_memory", repr(value)):
            bench.run(given, max_memory=value)


@check(parameter("role"))
def check_unknown_role_is_refused(bench: Bench) -> None:
    """A role that is none of Q, K, V, O is an error that names it."""
    given = bench.given()
    with refused(bench, "role='Z'", "'Z'"):
        bench.run(given, role="Z")


@check(parameter("pairs"))
def check_unknown_pairs_are_refused(bench: Bench) -> None:
    """Pair kinds that do not exist, or none at all, are errors."""
    given = bench.given()
    with refused(bench, "pairs=['ZZ']", "'ZZ'"):
        bench.run(given, pairs=["ZZ"])
    with refused(bench, "pairs=[]", "pairs"):
        bench.run(given, pairs=[])
