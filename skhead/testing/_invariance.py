"""Checks of what results must not depend on: the order of heads, the company, the basis."""

from __future__ import annotations

import numpy as np
import pandas as pd

from skhead.containers import Similarity
from skhead.testing._bench import HEAD_DOORS, Bench, NotApplicableError, frame, numbers, same
from skhead.testing._checks import check, door, invariance, method, refused, require
from skhead.testing._toys import Toy, random_toy

_ORDER = np.array([5, 2, 7, 0, 3, 6, 1, 4])


def _by_weights(bench: Bench) -> str:
    """The door by which weights come in, the heads table if there is one."""
    return next(name for name in HEAD_DOORS if name in bench.doors)


@check(method("transform"), door("table", "similarity"))
def check_order_of_heads(bench: Bench) -> None:
    """Heads in another order give the same numbers in that order."""
    heads = bench.table()
    door_ = "table" if "table" in bench.doors else "similarity"
    straight = bench.given(door_, heads=heads)
    turned = bench.given(door_, heads=heads.iloc[_ORDER])
    first, second = bench.fitted(straight), bench.fitted(turned)
    one, other = bench.apply(first, straight.X), bench.apply(second, turned.X)
    what = f"{bench.name}: heads in another order"
    if set(numbers(one)) != {"values"}:
        one = {name: values[_ORDER] for name, values in numbers(one).items()}
        for name, values in numbers(other).items():
            same(one[name], values, what)
        return
    left, right = frame(first, one).iloc[_ORDER], frame(second, other)
    require(
        sorted(map(str, left.columns)) == sorted(map(str, right.columns)),
        f"{what}: other features come out",
    )
    same(left[right.columns].to_numpy(), right.to_numpy(), what)


@check(door("table", "roles", "stack", "subspaces", "similarity"))
def check_subset_of_heads(bench: Bench) -> None:
    """What is said of a head does not depend on which others it comes with."""
    for name in set(bench.doors) - {"matrix", "pairs"}:
        given = bench.given(name)
        fitted = bench.fitted(given)
        everything = bench.apply(fitted, given.X)
        for rows in (np.array([6, 1, 3]), np.array([2])):
            some = bench.apply(fitted, bench.take(given, rows))
            what = f"{bench.name}: heads {rows.tolist()} by themselves, by the door {name!r}"
            for part, values in numbers(everything).items():
                same(values[rows], numbers(some)[part], what)


@check(door("table"))
def check_two_models(bench: Bench) -> None:
    """Heads of two models in one table are told apart, or refused where one model is needed."""
    first, second = bench.table(), bench.table(random_toy(1))
    both = pd.concat([first, second]).iloc[[*range(0, 16, 2), *range(1, 16, 2)]]
    sources = first["source"].iloc[0], second["source"].iloc[0]
    if bench.head_tags.one_model:
        with refused(bench, "a table of two models", *sources):
            bench.run(bench.given("table", heads=both))
        return
    given = bench.given("table", heads=first)
    fitted = bench.fitted(given)
    own = np.flatnonzero(both["source"] == sources[0])
    rows = [int(np.flatnonzero(first.index == label)[0]) for label in both.index[own]]
    for part, values in numbers(bench.apply(fitted, both)).items():
        alone = numbers(bench.apply(fitted, first))[part]
        what = f"{bench.name}: heads in one table with those of another model"
        same(alone[rows], values[own], what)
    bench.run(bench.given("table", heads=both))


@check(door("table", "similarity"))
def check_labels_are_kept(bench: Bench) -> None:
    """Heads keep the labels that the user gave them."""
    name = "table" if "table" in bench.doors else "similarity"
    heads = bench.table()
    heads.index = pd.Index([f"mine-{i}" for i in range(len(heads))])
    given = bench.given(name, heads=heads)
    result = bench.run(given)
    labels = None
    if isinstance(result, pd.DataFrame):
        labels = result.index
    elif isinstance(result, Similarity):
        labels = result.rows.index
    elif hasattr(result, "heads"):
        labels = result.heads.index
    if labels is None:
        raise NotApplicableError("gives an array, which has no labels")
    require(
        list(labels) == list(heads.index),
        f"{bench.name}: heads are called {list(labels)[:3]} instead of {list(heads.index)[:3]}",
    )


def _unchanged(bench: Bench, toy: Toy, what: str) -> None:
    name = _by_weights(bench)
    before, after = bench.given(name), bench.given(name, toy)
    same(bench.run(before), bench.run(after), f"{bench.name}: {what}", 2e-3)


@check(invariance("rotation"), door(*HEAD_DOORS))
def check_rotation(bench: Bench) -> None:
    """A rotation of the residual stream that all heads and tokens share changes nothing."""
    keep_ones = bool(bench.parameters.get("center", False))
    toy = random_toy().rotated(keep_ones)
    _unchanged(bench, toy, "the residual stream rotated, to which it declares to be invariant")


@check(invariance("head_rotation"), door(*HEAD_DOORS))
def check_head_rotation(bench: Bench) -> None:
    """An orthogonal change of basis of every head space changes nothing."""
    toy = random_toy().gauged(orthogonal=True)
    _unchanged(bench, toy, "head spaces rotated, to which it declares to be invariant")


@check(invariance("gauge"), door(*HEAD_DOORS))
def check_gauge(bench: Bench) -> None:
    """A change of basis that leaves W_Q W_K^T and W_V W_O as they are changes nothing."""
    toy = random_toy().gauged(orthogonal=False)
    _unchanged(bench, toy, "other bases of the head spaces, to which it declares to be invariant")


@check(invariance("scale"), door(*HEAD_DOORS))
def check_scale(bench: Bench) -> None:
    """Positive factors on the matrices change nothing."""
    toy = random_toy().scaled()
    _unchanged(bench, toy, "matrices multiplied by numbers, to which it declares to be invariant")
