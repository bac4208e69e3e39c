"""Estimators of which each breaks one clause of the contract, in a module that workers can import.

Every mutant is a working estimator of skhead's with one thing wrong.
"""

from __future__ import annotations

import copy
import itertools
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from skhead import (
    NullCalibrator,
    ProjectionKernel,
    SubspaceReadout,
)
from skhead.containers import Similarity, Subspaces

_COUNT = itertools.count()


@dataclass(frozen=True)
class Mutant:
    """A broken estimator, and what breaks along with the clause that it is about."""

    estimator: Any
    also: tuple[str, ...] | None


#: By check. `also` is None where so much breaks that no list says more.
MUTANTS: dict[str, Mutant] = {}


def breaks(check, *also, broad=False):
    """Register a class as the mutant of a check."""

    def register(cls):
        MUTANTS[check] = Mutant(cls(), None if broad else also)
        return cls

    return register


# Classes without a docstring show that of skhead's estimator, as the checks of docstrings ask.


class Kernel(ProjectionKernel):
    def given(self, X):
        return X

    def found(self, result, X):
        return result

    def fit(self, X, y=None):
        super().fit(self.given(X))
        return self

    def transform(self, X):
        return self.found(super().transform(self.given(X)), X)

    def fit_transform(self, X, y=None):
        return self.fit(X).transform(X)


@contextmanager
def set_for_now(estimator, **values):
    kept = {name: getattr(estimator, name) for name in values}
    vars(estimator).update(values)
    try:
        yield
    finally:
        vars(estimator).update(kept)


def times(result, factor):
    """A result with other numbers."""
    if isinstance(result, Similarity):
        return replace(result, values=(result.values * factor).astype(np.float32))
    return result * factor


def is_stack(X):
    return isinstance(X, np.ndarray | torch.Tensor)


# Parameters


@breaks("check_constructor_keeps_parameters")
class ConvertsInConstructor(ProjectionKernel):
    def __init__(
        self, pairs=("OQ", "OK", "OV"), layer_order="forward", normalize=None,
        max_memory="1GiB", device=None, n_jobs=None,
    ):  # fmt: skip
        super().__init__(pairs, layer_order, normalize, max_memory, device, n_jobs)
        self.layer_order = str(layer_order)

    def get_params(self, deep=True):
        return super().get_params(deep)


@breaks("check_signature_is_explicit")
class HidesParameter(ProjectionKernel):
    def get_params(self, deep=True):
        found = super().get_params(deep)
        found.pop("normalize")
        return found


@breaks("check_defaults_cannot_change")
class MutableDefault(ProjectionKernel):
    """Overlaps.

    Parameters
    ----------
    pairs : list of str, default=["OQ", "OK", "OV"]
    layer_order : str, default="forward"
    normalize : str, default=None
    max_memory : str, default="1GiB"
    device : str, default=None
    n_jobs : int, default=None
    """

    def __init__(
        self, pairs=["OQ", "OK", "OV"], layer_order="forward", normalize=None,  # noqa: B006
        max_memory="1GiB", device=None, n_jobs=None,
    ):  # fmt: skip
        super().__init__(pairs, layer_order, normalize, max_memory, device, n_jobs)


@breaks("check_set_params", broad=True)
class SetsNothing(ProjectionKernel):
    def set_params(self, **params):
        params.pop("normalize", None)
        return super().set_params(**params)


@breaks("check_set_params_refuses_unknown_names")
class IgnoresUnknownNames(ProjectionKernel):
    def set_params(self, **params):
        params.pop("no_such_parameter", None)
        return super().set_params(**params)


@breaks("check_clone")
class ClonesWhatItLearned(ProjectionKernel):
    def __sklearn_clone__(self):
        return copy.copy(self)


@breaks("check_fit_leaves_parameters", "check_clone")
class ChangesParameter(Kernel):
    def fit(self, X, y=None):
        self.pairs = list(self.pairs)
        return super().fit(X)


@breaks("check_unknown_options_are_refused")
class TakesAnyOption(ProjectionKernel):
    _options: ClassVar = {"layer_order": ("forward", "all")}


@breaks("check_parameters_are_documented")
class Undocumented(ProjectionKernel):
    """Overlaps.

    Parameters
    ----------
    layer_order : {"forward", "all"}, default="forward"
    """


@breaks("check_documented_defaults")
class WrongDefault(ProjectionKernel):
    """Overlaps.

    Parameters
    ----------
    pairs : sequence of str, default=("OQ", "OK", "OV")
    layer_order : {"forward", "all"}, default="all"
    normalize, device : str, default=None
    max_memory : str, default="1GiB"
    n_jobs : int, default=None
    """


@breaks("check_bad_memory_budget_is_refused")
class IgnoresBudget(Kernel):
    def fit(self, X, y=None):
        with set_for_now(self, max_memory="1GiB"):
            return super().fit(X)

    def transform(self, X):
        with set_for_now(self, max_memory="1GiB"):
            return super().transform(X)


@breaks("check_unknown_role_is_refused", "check_unknown_options_are_refused")
class TakesAnyRole(SubspaceReadout):
    def fit(self, X, y=None, vectors=None):
        with set_for_now(self, role=self.role if self.role in "QKVO" else "O"):
            return super().fit(X, y, vectors)

    def transform(self, X):
        with set_for_now(self, role=self.role if self.role in "QKVO" else "O"):
            return super().transform(X)


@breaks("check_unknown_pairs_are_refused")
class DropsUnknownPairs(Kernel):
    def fit(self, X, y=None):
        with set_for_now(self, pairs=[p for p in self.pairs if p != "ZZ"] or ["OQ"]):
            return super().fit(X)


# State


@breaks("check_fit_returns_self", broad=True)
class ReturnsNothing(ProjectionKernel):
    def fit(self, X, y=None):
        super().fit(X)


@breaks("check_not_fitted_error")
class LooksAtNothing(Kernel):
    def transform(self, X):
        if not hasattr(self, "pairs_"):
            raise AttributeError("pairs_")
        return super().transform(X)


@breaks("check_fitted_attributes_end_with_underscore")
class BareName(Kernel):
    def fit(self, X, y=None):
        self.seen = len(X)
        return super().fit(X)


@breaks("check_repeats", broad=True)
class Restless(Kernel):
    def fit(self, X, y=None):
        self._factor = 1 + 0.01 * next(_COUNT)
        return super().fit(X)

    def found(self, result, X):
        return times(result, self._factor)


@breaks("check_transform_changes_nothing", broad=True)
class Counts(Kernel):
    def fit(self, X, y=None):
        self._asked = 0
        return super().fit(X)

    def found(self, result, X):
        self._asked += 1
        return times(result, 1 + 0.01 * self._asked)


@breaks("check_refit_forgets")
class NeverForgets(Kernel):
    def fit(self, X, y=None):
        return self if hasattr(self, "pairs_") else super().fit(X)


@breaks("check_random_state")
class IgnoresSeed(NullCalibrator):
    def transform(self, X):
        drawn = np.random.default_rng().uniform() if self.random_state == 7 else 0.0
        return times(super().transform(X), 1 + drawn)


@breaks("check_global_random_state_is_left_alone")
class DrawsGlobally(Kernel):
    def given(self, X):
        np.random.uniform()  # noqa: NPY002  that is what is wrong with it
        return X


@breaks("check_pickle", "check_cross_validation")
class ComesBackOtherwise(ProjectionKernel):
    def __setstate__(self, state):
        super().__setstate__({**state, "normalize": "rank"})


@breaks("check_threads")
class SharesItsDesk(Kernel):
    def transform(self, X):
        self._desk = X
        time.sleep(0.01)
        return super().transform(self._desk)


@breaks("check_input_is_not_changed", broad=True)
class WritesIntoTable(Kernel):
    def given(self, X):
        if isinstance(X, pd.DataFrame):
            X["seen"] = 1
        return X


@breaks("check_keeps_no_view_of_input")
class KeepsView(Kernel):
    def fit(self, X, y=None):
        self._given = X
        return super().fit(X)

    def transform(self, X):
        if is_stack(getattr(self, "_given", None)):
            super().fit(self._given)
        return super().transform(X)


@breaks("check_n_jobs")
class OtherWithWorkers(Kernel):
    def found(self, result, X):
        return times(result, 1.01 if self.n_jobs == 2 else 1.0)


@breaks("check_max_memory")
class OtherInPieces(Kernel):
    def found(self, result, X):
        return times(result, 1.0 if self.max_memory == "1GiB" else 1.01)


@breaks("check_device")
class DeviceByNameOnly(Kernel):
    def given(self, X):
        if not isinstance(self.device, str | None):
            raise TypeError("device must be a text")
        return X


@breaks("check_html", "check_set_params_refuses_unknown_names")
class Nameless(ProjectionKernel):
    def __repr__(self, **how):
        return "an estimator"


# Doors


@breaks("check_numpy_and_torch_stacks_agree", broad=True)
class OtherForNumpy(Kernel):
    def given(self, X):
        return X + 0.1 if isinstance(X, np.ndarray) and X.ndim > 2 else X


@breaks("check_strided_stacks")
class IgnoresStrides(Kernel):
    def given(self, X):
        strided = isinstance(X, np.ndarray) and not X.flags.c_contiguous
        return X.T.reshape(X.shape) if strided and X.ndim > 2 else X


@breaks("check_read_only_stacks")
class WritesIntoStack(Kernel):
    def given(self, X):
        if isinstance(X, np.ndarray):
            X *= 1.0
        return X


@breaks("check_float64_stacks")
class OtherForDoubles(Kernel):
    def given(self, X):
        return X + 0.1 if is_stack(X) and X.dtype == torch.float64 else X


@breaks("check_half_precision_is_promoted")
class ComputesInHalf(Kernel):
    def given(self, X):
        half = is_stack(X) and X.dtype in (torch.bfloat16, torch.float16)
        return X * (1 / 3) + X.mean() + 0.1 if half else X


@breaks("check_numbers_are_at_least_float32")
class AnswersInHalf(Kernel):
    def found(self, result, X):
        half = is_stack(X) and X.dtype == torch.bfloat16
        return replace(result, values=result.values.astype(np.float16)) if half else result


@breaks("check_tensors_that_require_gradients")
class CannotDetach(Kernel):
    def given(self, X):
        if isinstance(X, torch.Tensor) and X.dtype == torch.float32:
            X.numpy()
        return X


@breaks("check_table_and_stack_agree")
class SwapsRoles(Kernel):
    def given(self, X):
        return X[:, [2, 0, 1, 3]] if is_stack(X) and X.ndim == 4 else X


@breaks("check_table_and_subspaces_agree")
class SwapsBases(Kernel):
    def given(self, X):
        if isinstance(X, Subspaces):
            bases = X.bases
            X = replace(X, bases={**bases, "Q": bases["K"], "K": bases["Q"]})
        return X


@breaks("check_similarity_and_its_features_agree")
class ForgetsOrigin(NullCalibrator):
    def transform(self, X):
        found = super().transform(X)
        return times(found, 1.01 if isinstance(X, pd.DataFrame) else 1.0)


@breaks("check_grouped_queries", broad=True)
class CountsGroups(Kernel):
    def found(self, result, X):
        grouped = isinstance(X, pd.DataFrame) and X["kv_head"].max() < 2
        return times(result, 1.01 if grouped and len(X) == 8 else 1.0)


@breaks("check_other_columns_are_ignored")
class CountsColumns(Kernel):
    def given(self, X):
        if isinstance(X, pd.DataFrame) and X.shape[1] > 7:
            raise ValueError("seven columns")
        return X


@breaks("check_complex_stacks_are_refused")
class DropsImaginaryPart(Kernel):
    def given(self, X):
        return X.real if isinstance(X, np.ndarray) and np.iscomplexobj(X) else X
