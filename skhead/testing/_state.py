"""Checks of what an estimator keeps: fitting, repeating, pickling, sharing."""

from __future__ import annotations

import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib
import numpy as np
import torch
from sklearn.exceptions import NotFittedError

from skhead.exceptions import MemoryBudgetError
from skhead.testing._bench import HEAD_DOORS, METHODS, Bench, NotApplicableError, fingerprint, same
from skhead.testing._checks import check, door, parameter, refused, require
from skhead.testing._toys import random_toy

#: Budgets that are tried in turn until one is enough for the smallest piece of the work.
_BUDGETS = tuple(2**power for power in range(12, 29, 2))


@check()
def check_fit_returns_self(bench: Bench) -> None:
    """Fit returns the estimator."""
    estimator = bench.new()
    require(
        bench.fitted(bench.given(), estimator) is estimator,
        f"{bench.name}: fit must return self",
    )


@check()
def check_not_fitted_error(bench: Bench) -> None:
    """What needs a fit says so before it looks at anything else."""
    given = bench.given()
    for name in METHODS:
        if hasattr(bench.estimator, name):
            what = f"{name} before fit"
            with refused(bench, what, "not fitted", kinds=(NotFittedError,)):
                getattr(bench.new(), name)(given.X)


@check()
def check_fitted_attributes_end_with_underscore(bench: Bench) -> None:
    """What fit learns is kept under public names that end with an underscore."""
    fitted = bench.fitted(bench.given())
    new = set(vars(fitted)) - set(vars(bench.new()))
    wrong = sorted(name for name in new if not name.startswith("_") and not name.endswith("_"))
    require(not wrong, f"{bench.name}: fit sets {wrong}; learned attributes end with '_'")


@check()
def check_repeats(bench: Bench) -> None:
    """Two clones fitted on the same heads say the same."""
    given = bench.given()
    same(bench.run(given), bench.run(given), f"{bench.name}: two fits of the same heads", 1e-6)


@check()
def check_transform_changes_nothing(bench: Bench) -> None:
    """Asking a fitted estimator twice gives the same answer."""
    given = bench.given()
    fitted = bench.fitted(given)
    first = bench.apply(fitted, given.X)
    bench.apply(fitted, bench.take(given, np.arange(2)))
    same(first, bench.apply(fitted, given.X), f"{bench.name}: the same question asked twice", 1e-6)


@check(door(*HEAD_DOORS))
def check_refit_forgets(bench: Bench) -> None:
    """A second fit leaves nothing of the first."""
    if bench.head_tags.one_model and "table" not in bench.doors:
        raise NotApplicableError("takes no heads table of another model")
    first, second = bench.given(), bench.given(toy=random_toy(1))
    estimator = bench.fitted(second, bench.fitted(first))
    what = f"{bench.name}: fitted on other heads before"
    same(bench.run(second), bench.apply(estimator, second.X), what, 1e-6)


@check(parameter("random_state"))
def check_random_state(bench: Bench) -> None:
    """A seed repeats what is drawn."""
    given = bench.given()
    first, second = (bench.run(given, random_state=7) for _ in range(2))
    same(first, second, f"{bench.name}: fitted twice with random_state=7", 1e-6)


@check()
def check_global_random_state_is_left_alone(bench: Bench) -> None:
    """Neither fit nor what follows moves the global random state of numpy, torch or Python."""
    given = bench.given()
    before = _global_states()
    bench.run(given)
    moved = [name for name, state in _global_states().items() if state != before[name]]
    require(not moved, f"{bench.name}: draws from the global random state of {', '.join(moved)}")


def _global_states() -> dict[str, Any]:
    return {
        "numpy": joblib.hash(np.random.get_state()),  # noqa: NPY002  the state that must not move
        "torch": fingerprint(torch.random.get_rng_state()),
        "random": random.getstate(),
    }


@check()
def check_pickle(bench: Bench) -> None:
    """A fitted estimator says the same after it was pickled; so does one that is not fitted."""
    given = bench.given()
    fitted = bench.fitted(given)
    copy = _pickled(fitted)
    same(
        bench.apply(fitted, given.X),
        bench.apply(copy, given.X),
        f"{bench.name}: pickled after fit",
        1e-6,
    )
    again = bench.fitted(given, _pickled(bench.new()))
    same(
        bench.apply(fitted, given.X),
        bench.apply(again, given.X),
        f"{bench.name}: pickled before fit",
        1e-6,
    )


def _pickled(estimator: Any) -> Any:
    """A copy by pickle; where the class lives in an interactive session, by its pickled state."""
    cls: Any = type(estimator)
    if getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls:
        return pickle.loads(pickle.dumps(estimator))  # noqa: S301  made in this line
    copy = cls.__new__(cls)
    copy.__setstate__(pickle.loads(pickle.dumps(estimator.__getstate__())))  # noqa: S301
    return copy


@check()
def check_threads(bench: Bench) -> None:
    """Threads that share a fitted estimator do not disturb each other."""
    given = bench.given()
    if given.door == "pairs":
        parts = [np.arange(0, 100), np.arange(100, 250)]
    else:
        parts = [np.arange(0, 3), np.arange(3, len(given.heads))]
    fitted = bench.fitted(given)
    asked = [bench.take(given, rows) for rows in parts] * 4
    alone = [bench.apply(fitted, X) for X in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda X: bench.apply(fitted, X), asked))
    for one, other in zip(alone, together, strict=True):
        same(one, other, f"{bench.name}: asked by several threads", 1e-6)


@check()
def check_input_is_not_changed(bench: Bench) -> None:
    """Neither fit nor what follows writes into X or y."""
    for name in bench.doors:
        given = bench.given(name)
        before = fingerprint(given.X), fingerprint(given.y)
        bench.run(given)
        after = fingerprint(given.X), fingerprint(given.y)
        require(before == after, f"{bench.name}: changes the {name} that it is given")


@check(door("roles", "stack"))
def check_keeps_no_view_of_input(bench: Bench) -> None:
    """Overwriting a stack after fit changes nothing that was learned."""
    for name in {"roles", "stack"} & set(bench.doors):
        given = bench.given(name)
        asked = given.X.clone()
        fitted = bench.fitted(given)
        before = bench.apply(fitted, asked)
        kept = given.X.clone()
        given.X.fill_(3.0)
        after = bench.apply(fitted, asked)
        given.X.copy_(kept)
        same(before, after, f"{bench.name}: the caller's stack overwritten after fit", 1e-6)


@check(parameter("n_jobs"), door("table"))
def check_n_jobs(bench: Bench) -> None:
    """Two workers find what one finds."""
    given = bench.given("table")
    with joblib.parallel_config(backend="threading"):
        one, two = (bench.run(given, n_jobs=n_jobs) for n_jobs in (1, 2))
    same(one, two, f"{bench.name}: n_jobs=1 and n_jobs=2")


@check(parameter("max_memory"))
def check_max_memory(bench: Bench) -> None:
    """A small memory budget, which cuts the work into pieces, changes no number."""
    given = bench.given()
    for budget in _BUDGETS:
        try:
            small = bench.run(given, max_memory=budget)
        except MemoryBudgetError:
            continue
        large = bench.run(given, max_memory="1GiB")
        same(small, large, f"{bench.name}: max_memory={budget} and '1GiB'")
        return
    raise AssertionError(
        f"{bench.name}: asks for more than {_BUDGETS[-1]} bytes for {len(given.heads)} heads of "
        f"d_model {given.toy.d_model}"
    )


@check(parameter("device"))
def check_device(bench: Bench) -> None:
    """A device may be given as a text or as a torch.device."""
    given = bench.given()
    named = bench.run(given, device="cpu")
    same(named, bench.run(given, device=torch.device("cpu")), f"{bench.name}: device as an object")
    same(named, bench.run(given, device=None), f"{bench.name}: device=None and 'cpu'", 1e-3)


@check()
def check_html(bench: Bench) -> None:
    """The estimator shows itself as text and as HTML under its name, fitted or not."""
    for estimator in (bench.new(), bench.fitted(bench.given())):
        for shown in (repr(estimator), estimator._repr_html_()):
            require(
                bench.name in shown,
                f"{bench.name}: does not show its name where it is displayed",
            )
