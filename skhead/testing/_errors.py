"""Checks of errors: bad input is refused by name, with what is wrong and where."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import pandas as pd

from skhead.exceptions import ProvenanceMismatchError
from skhead.testing._bench import HEAD_DOORS, Bench, Given
from skhead.testing._checks import check, door, refused
from skhead.testing._toys import random_toy

_STACKS = ("roles", "stack")
#: Another width than that of the usual toy.
_OTHER_WIDTH = 32
_LOST = "/no/such/model"
#: The last head of the toy, which is spoiled, and the one that shares its keys and values.
_SPOILED_IN_TABLE = "L1H3|L1H2"
_SPOILED_IN_STACK = "H7|head 7|H6|head 6"


def _has_fixed_width(bench: Bench) -> str | None:
    if bench.head_tags.any_width:
        return "declares any_width in its head_tags"
    return None


def _is_supervised(bench: Bench) -> str | None:
    return None if bench.supervised else "needs no labels (target_tags.required is False)"


def _spoiled(bench: Bench, value: float, what: str) -> None:
    """Expect an error that names the estimator and the spoiled head, by every door of weights."""
    toy = random_toy().spoiled(value)
    for name in ("table", *_STACKS):
        if name not in bench.doors:
            continue
        head = _SPOILED_IN_TABLE if name == "table" else _SPOILED_IN_STACK
        given = bench.given(name, toy)
        with refused(bench, f"a head of {what} (door {name!r})", head):
            bench.run(given)


@check(door("table", *_STACKS))
def check_zero_head_is_named(bench: Bench) -> None:
    """A head whose matrices are zero is an error that names it."""
    _spoiled(bench, 0.0, "zeros")


@check(door(*_STACKS))
def check_nan_head_is_named(bench: Bench) -> None:
    """A head of a stack that holds NaN is an error that names it."""
    _spoiled_stack(bench, float("nan"))


@check(door(*_STACKS))
def check_infinite_head_is_named(bench: Bench) -> None:
    """A head of a stack that holds an infinite value is an error that names it."""
    _spoiled_stack(bench, float("inf"))


def _spoiled_stack(bench: Bench, value: float) -> None:
    for name in _STACKS:
        if name in bench.doors:
            given = bench.given(name)
            given.X[7, ..., 0, 0] = value
            with refused(bench, f"a head of a stack that holds {value}", "H7|head 7"):
                bench.run(given)


@check(door("table"))
def check_weights_that_are_not_finite(bench: Bench) -> None:
    """A head whose stored weights hold NaN or infinite values is an error that names it."""
    for value in (float("nan"), float("inf")):
        given = bench.given("table", random_toy().spoiled(value))
        with _anyone_refuses(bench, f"a model whose weights hold {value}", _SPOILED_IN_TABLE):
            bench.run(given)


@check(_has_fixed_width, door(*HEAD_DOORS))
def check_width_is_compared(bench: Bench) -> None:
    """Heads of another d_model than fitted are an error that names both widths."""
    wide = random_toy(2, _OTHER_WIDTH)
    for name in set(HEAD_DOORS) & set(bench.doors):
        given, other = bench.given(name), bench.given(name, wide)
        fitted = bench.fitted(given)
        widths = str(given.toy.d_model), str(_OTHER_WIDTH)
        with refused(bench, f"heads of another d_model (door {name!r})", *widths):
            bench.apply(fitted, other.X)


@check(_has_fixed_width, door("table"))
def check_mixed_widths_are_refused(bench: Bench) -> None:
    """A table of models of several d_model is an error."""
    both = pd.concat([bench.table(), bench.table(random_toy(2, _OTHER_WIDTH))])
    given = bench.given("table")
    with refused(bench, "a table of models of two widths"):
        bench.run(replace(given, X=both))


@check(door("table"))
def check_lost_source_is_named(bench: Bench) -> None:
    """A source that does not exist is an error that names it."""
    given = bench.given("table")
    heads = given.X.assign(source=_LOST)
    with _anyone_refuses(bench, "a source that does not exist", _LOST):
        bench.run(replace(given, X=heads))


@check(door("table"))
def check_head_that_does_not_exist_is_named(bench: Bench) -> None:
    """A row that names a head which its model does not have is an error."""
    given = bench.given("table")
    heads = given.X.copy()
    heads.iloc[2, heads.columns.get_loc("head")] = 99
    with _anyone_refuses(bench, "a head that its model lacks", "99"):
        bench.run(replace(given, X=heads))


def _anyone_refuses(bench: Bench, what: str, *mentions: str) -> AbstractContextManager[None]:
    """As `refused`, by whoever reads the weights, who does not know the estimator."""
    return refused(_Nameless(bench.estimator), what, *mentions)


class _Nameless(Bench):
    """A bench whose estimator need not be named."""

    def __init__(self, estimator: object) -> None:
        super().__init__(estimator)
        self.names = {""}


@check(door("table"))
def check_missing_column_is_named(bench: Bench) -> None:
    """A table without one of its columns is an error that names the column."""
    given = bench.given("table")
    with refused(bench, "a table without kv_head", "kv_head"):
        bench.run(replace(given, X=given.X.drop(columns="kv_head")))


@check(door("table", *_STACKS))
def check_text_is_refused(bench: Bench) -> None:
    """The name of a model is not its heads table."""
    given = bench.given("table" if "table" in bench.doors else None)
    with refused(bench, "the text 'gpt2'"):
        bench.run(replace(given, X="gpt2"))


@check(door(*HEAD_DOORS, "similarity"))
def check_matrices_are_refused(bench: Bench) -> None:
    """A matrix of features is refused by whoever declares no such door."""
    if "matrix" not in bench.doors:
        given = bench.given()
        with refused(bench, "a 2-D array"):
            bench.run(replace(given, X=np.ones((8, 24))))


@check(door("table", *_STACKS))
def check_no_heads_are_refused(bench: Bench) -> None:
    """An empty table or stack is an error."""
    for name in ("table", *_STACKS):
        if name in bench.doors:
            given = bench.given(name)
            fitted = bench.fitted(given)
            empty = given.X.iloc[:0] if name == "table" else given.X[:0]
            with refused(bench, f"no heads at all (door {name!r})"):
                bench.run(replace(given, X=empty))
            with refused(bench, f"no heads at all after fit (door {name!r})"):
                bench.apply(fitted, empty)


@check(door("subspaces"))
def check_other_processing_is_refused(bench: Bench) -> None:
    """Subspaces of weights that were processed in another way are a ProvenanceMismatchError."""
    given = bench.given("subspaces")
    fitted = bench.fitted(given)
    centred = bench.subspaces(given.heads, center=not given.X.record["center"])
    with refused(bench, "other processing", "center", kinds=(ProvenanceMismatchError,)):
        bench.apply(fitted, centred)


@check(door("similarity"))
def check_other_reference_is_refused(bench: Bench) -> None:
    """Similarities to other heads than the fitted ones are a ProvenanceMismatchError."""
    given = bench.given("similarity")
    fitted = bench.fitted(given)
    other = bench.similarity(given.heads, given.heads.iloc[::2])
    with refused(bench, "similarities to other heads", kinds=(ProvenanceMismatchError,)):
        bench.apply(fitted, other)


@check(door("similarity"))
def check_other_record_is_refused(bench: Bench) -> None:
    """Similarities of weights that were processed otherwise are a ProvenanceMismatchError."""
    given = bench.given("similarity")
    fitted = bench.fitted(given)
    other = bench.similarity(given.heads, given.heads, center=True)
    with refused(bench, "other processing", "center", kinds=(ProvenanceMismatchError,)):
        bench.apply(fitted, other)


@check(door("matrix"))
def check_number_of_features_is_compared(bench: Bench) -> None:
    """A matrix with another number of columns than fitted is an error that names both."""
    given = bench.given("matrix")
    fitted = bench.fitted(given)
    width = given.X.shape[1]
    with refused(bench, "fewer features than fitted", str(width), str(width - 1)):
        bench.apply(fitted, given.X[:, :-1])


def _needs_labels_of_heads(bench: Bench) -> str | None:
    return "labels come with the pairs" if bench.doors == ("pairs",) else _is_supervised(bench)


@check(_needs_labels_of_heads)
def check_labels_must_fit_the_heads(bench: Bench) -> None:
    """As many labels as heads are needed."""
    given = bench.given()
    with refused(bench, "fewer labels than heads"):
        bench.run(_with_labels(given, given.y[:-1] if given.y is not None else None))


@check(_needs_labels_of_heads)
def check_labels_are_needed(bench: Bench) -> None:
    """Fit without labels is an error where the tags say that they are needed."""
    given = bench.given()
    with refused(bench, "no labels", "y|labels"):
        bench.run(_with_labels(given, None))


def _with_labels(given: Given, y: pd.Series | None) -> Given:
    return replace(given, y=y)
