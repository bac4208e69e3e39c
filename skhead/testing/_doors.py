"""Checks of the doors: the same heads give the same numbers however they come in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from skhead.testing._bench import Bench, Given, frame, numbers, same
from skhead.testing._checks import check, door, refused, require
from skhead.testing._toys import random_toy

_STACKS = ("roles", "stack")


def _stacks(bench: Bench) -> list[Given]:
    return [bench.given(name) for name in _STACKS if name in bench.doors]


def _result(bench: Bench, given: Given, X: Any) -> Any:
    return bench.run(replace(given, X=X))


@check(door(*_STACKS))
def check_numpy_and_torch_stacks_agree(bench: Bench) -> None:
    """A stack may be a numpy array or a torch tensor."""
    for given in _stacks(bench):
        array = _result(bench, given, given.X.numpy())
        same(bench.run(given), array, f"{bench.name}: the same stack of numpy and of torch")


@check(door(*_STACKS))
def check_strided_stacks(bench: Bench) -> None:
    """A stack need not be contiguous."""
    for given in _stacks(bench):
        padded = np.repeat(given.X.numpy(), 2, axis=0)[::2]
        fortran = np.asfortranarray(given.X.numpy())
        turned = given.X.transpose(-1, -2).contiguous().transpose(-1, -2)
        for X in (padded, fortran, turned):
            same(bench.run(given), _result(bench, given, X), f"{bench.name}: a strided stack")


@check(door(*_STACKS))
def check_read_only_stacks(bench: Bench) -> None:
    """A stack may be read-only, as a memory map of joblib's is."""
    for given in _stacks(bench):
        X = given.X.numpy().copy()
        X.flags.writeable = False
        same(bench.run(given), _result(bench, given, X), f"{bench.name}: a read-only stack")


@check(door(*_STACKS))
def check_float64_stacks(bench: Bench) -> None:
    """float64 gives what float32 gives."""
    for given in _stacks(bench):
        double = _result(bench, given, given.X.double())
        same(bench.run(given), double, f"{bench.name}: float32 and float64", 1e-3)


@check(door(*_STACKS))
def check_half_precision_is_promoted(bench: Bench) -> None:
    """bfloat16 and float16 are promoted before anything is computed."""
    for given in _stacks(bench):
        for dtype in (torch.bfloat16, torch.float16):
            half = given.X.to(dtype)
            wide = _result(bench, given, half.float())
            what = f"{bench.name}: a stack of {dtype} and the same numbers as float32"
            same(_result(bench, given, half), wide, what, 1e-3)


@check(door(*_STACKS))
def check_numbers_are_at_least_float32(bench: Bench) -> None:
    """What comes out is float32 or float64, also where bfloat16 goes in."""
    for given in _stacks(bench):
        result = _result(bench, given, given.X.bfloat16())
        if isinstance(result, torch.Tensor):
            dtypes = {"a tensor": str(result.dtype).removeprefix("torch.")}
        else:
            dtypes = {name: str(values.dtype) for name, values in numbers(result).items()}
        for name, dtype in dtypes.items():
            require(
                dtype in ("float32", "float64"),
                f"{bench.name}: gives {name} of {dtype}; accumulate in float32 or wider",
            )


@check(door(*_STACKS))
def check_tensors_that_require_gradients(bench: Bench) -> None:
    """Parameters of a model may be given as they are; no graph is recorded."""
    for given in _stacks(bench):
        X = given.X.clone().requires_grad_()
        result = _result(bench, given, X)
        same(bench.run(given), result, f"{bench.name}: a stack that requires gradients")
        require(
            not (isinstance(result, torch.Tensor) and result.requires_grad),
            f"{bench.name}: records a graph of its computation",
        )


@check(door("table"), door(*_STACKS))
def check_table_and_stack_agree(bench: Bench) -> None:
    """The heads table gives what the stack of its weights gives, where both are defined."""
    name = "roles" if "roles" in bench.doors else "stack"
    given, table = bench.given(name), bench.given("table")
    first, second = bench.fitted(table), bench.fitted(given)
    by_table = bench.apply(first, table.X)
    by_stack = bench.apply(second, given.X)
    what = f"{bench.name}: the heads table and the stack of its weights"
    left, right = _comparable(first, by_table), _comparable(second, by_stack)
    shared = [column for column in left.columns if column in set(right.columns)]
    if shared:
        left, right = left[shared], right[shared]
    require(left.shape == right.shape, f"{what}: shapes differ, {left.shape} and {right.shape}")
    a, b = left.to_numpy(dtype=np.float64), right.to_numpy(dtype=np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    require(bool(both.any()), f"{what}: no number is defined in both")
    same(np.where(both, a, 0.0), np.where(both, b, 0.0), what, 1e-3)


def _comparable(fitted: Any, result: Any) -> pd.DataFrame:
    """A result as a table; of several parts, as of subspaces, side by side."""
    parts = {} if isinstance(result, pd.DataFrame) else numbers(result)
    if not parts or set(parts) == {"values"}:
        return frame(fitted, result)
    flat = [part.reshape(len(part), -1) for part in parts.values()]
    return pd.DataFrame(np.concatenate(flat, axis=1))


@check(door("table"), door("subspaces"))
def check_table_and_subspaces_agree(bench: Bench) -> None:
    """Subspaces give what the heads table that they were taken from gives."""
    table, given = bench.given("table"), bench.given("subspaces")
    what = f"{bench.name}: the heads table and its subspaces"
    same(bench.run(table), bench.run(given), what)


@check(door("similarity"))
def check_similarity_and_its_features_agree(bench: Bench) -> None:
    """A data frame of a similarity's features gives what the similarity gives."""
    given = bench.given("similarity")
    features = _result(bench, given, given.X.to_features())
    same(bench.run(given), features, f"{bench.name}: a similarity and its features")


@check(door("table"))
def check_grouped_queries(bench: Bench) -> None:
    """Heads that share keys and values give what heads with copies of them give."""
    toy = random_toy()
    grouped, copied = bench.given("table", toy), bench.given("table", toy.ungrouped())
    what = f"{bench.name}: shared keys and values, and copies of them for every head"
    same(bench.run(grouped), bench.run(copied), what)


@check(door("table"))
def check_other_columns_are_ignored(bench: Bench) -> None:
    """Columns may stand in any order, with others beside them."""
    given = bench.given("table")
    X = given.X[given.X.columns[::-1]].assign(note="mine", number=1.5)
    what = f"{bench.name}: a heads table with columns of the user's own"
    same(bench.run(given), _result(bench, given, X), what)


@check(door(*_STACKS))
def check_complex_stacks_are_refused(bench: Bench) -> None:
    """Complex numbers are no weights."""
    for given in _stacks(bench):
        with refused(bench, "a complex stack", "complex"):
            _result(bench, given, given.X.numpy() + 1j)
