"""Mutants of the clauses about invariances, errors and what comes out; see `mutants`."""

from __future__ import annotations

import copy
import multiprocessing
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from mutants import Kernel, breaks, is_stack, times

import skhead
from skhead import ClassAffinity, HeadClassifier, NullCalibrator, ProjectionKernel
from skhead._base import check_same_record
from skhead.base import HeadTags
from skhead.containers import Subspaces
from skhead.exceptions import (
    DegenerateHeadError,
    HeadShapeError,
    HeadTableError,
    SourceNotFoundError,
)

# Invariance


@breaks("check_order_of_heads")
class LooksAtFirstHead(Kernel):
    def fit(self, X, y=None):
        self._first = int(X["head"].iloc[0]) if isinstance(X, pd.DataFrame) and len(X) else 0
        return super().fit(X)

    def found(self, result, X):
        return times(result, 1 + 0.01 * self._first)


@breaks("check_subset_of_heads", "check_two_models", "check_set_output_pandas")
class CountsRows(Kernel):
    def found(self, result, X):
        return times(result, 1 + 0.01 * len(result))


@breaks("check_two_models")
class MixesModels(Kernel):
    def found(self, result, X):
        mixed = isinstance(X, pd.DataFrame) and X["source"].nunique() > 1
        return times(result, 1.01 if mixed else 1.0)


@breaks("check_labels_are_kept", "check_set_output_pandas")
class ForgetsLabels(Kernel):
    def _output(self, similarity):
        rows = similarity.rows.reset_index(drop=True)
        return super()._output(replace(similarity, rows=rows))


# The kernel plus a number of the fitted heads' weights.
class Added(Kernel):
    head_tags = HeadTags(("table",), invariant_to=Kernel.head_tags.invariant_to)

    def fit(self, X, y=None):
        super().fit(X)
        self._more = self.number(X) if isinstance(X, pd.DataFrame) else 0.0
        return self

    def found(self, result, X):
        return replace(result, values=(result.values + self._more).astype(np.float32))


#: Takes subspaces without saying so, and adds to no data frame.
_ALONG = ("check_extracted_first", "check_set_output_pandas")


@breaks("check_rotation", *_ALONG)
class LooksAtCoordinate(Added):
    def number(self, X):
        return float((self.reference_.numpy("O")[:, 0] ** 2).sum())


@breaks("check_head_rotation", "check_gauge", *_ALONG)
class LooksAtColumn(Added):
    def number(self, X):
        stack = skhead.load_weights(X, "O")
        return float(((stack[:, :, 0] ** 2).sum(1) / (stack**2).sum((1, 2))).sum())


@breaks("check_gauge", *_ALONG)
class LooksAtSpectrum(Added):
    def number(self, X):
        values = np.linalg.svd(skhead.load_weights(X, "O"), compute_uv=False)
        return float((values[:, 0] / values.sum(1)).sum())


@breaks("check_scale", *_ALONG)
class LooksAtNorm(Added):
    def number(self, X):
        v, o = (skhead.load_weights(X, role) for role in "VO")
        return float(np.linalg.norm(v @ o.transpose(0, 2, 1), axis=(1, 2)).sum()) / 100


# Errors


@breaks("check_zero_head_is_named")
class FillsZeros(Kernel):
    head_tags = HeadTags(("subspaces", "roles", "stack"))

    def given(self, X):
        if is_stack(X):
            zero = (X == 0).flatten(1).all(1) if isinstance(X, torch.Tensor) else None
            if zero is not None and zero.any():
                X = X.clone()
                X[zero] = torch.randn(X.shape[1:])
        return X


@breaks("check_nan_head_is_named")
class FillsNaN(Kernel):
    def given(self, X):
        if isinstance(X, torch.Tensor) and X.isnan().any():
            return torch.nan_to_num(X, nan=0.5)
        return X


@breaks("check_infinite_head_is_named")
class FillsInfinite(Kernel):
    def given(self, X):
        if isinstance(X, torch.Tensor) and X.isinf().any():
            return torch.nan_to_num(X, posinf=0.5)
        return X


# Answers zeros where it should raise an error of some kind that says something.
class Excuses(Kernel):
    excused: ClassVar[tuple[type[Exception], str]] = (DegenerateHeadError, "holds")

    def fit(self, X, y=None):
        self._excused = False
        try:
            return super().fit(X)
        except self.excused[0] as error:
            if self.excused[1] not in str(error):
                raise
            self._excused = True
            return self

    def transform(self, X):
        if getattr(self, "_excused", False):
            return np.zeros((len(X), 1))
        return super().transform(X)


@breaks("check_weights_that_are_not_finite", "check_nan_head_is_named",
        "check_infinite_head_is_named")  # fmt: skip
class ExcusesDamage(Excuses):
    excused = (DegenerateHeadError, "NaN")


@breaks("check_mixed_widths_are_refused")
class ExcusesWidths(Excuses):
    excused = (HeadShapeError, "different d_model")


@breaks("check_lost_source_is_named")
class ExcusesLostSource(Excuses):
    excused = (SourceNotFoundError, "")


@breaks("check_head_that_does_not_exist_is_named")
class ExcusesMissingHead(Excuses):
    excused = (HeadTableError, "does not exist")


@breaks("check_missing_column_is_named")
class ExcusesMissingColumn(Excuses):
    excused = (HeadTableError, "lacks the column")


@breaks("check_width_is_compared")
class ComparesNoWidths(Kernel):
    def _check_width(self, d_model):
        pass


@breaks("check_text_is_refused")
class LoadsTexts(Kernel):
    def given(self, X):
        return skhead.load_heads("skhead/induction-2l") if isinstance(X, str) else X


@breaks("check_matrices_are_refused")
class LiftsMatrices(Kernel):
    def given(self, X):
        return X[:, :, None] if isinstance(X, np.ndarray) and X.ndim == 2 else X


@breaks("check_no_heads_are_refused")
class TakesNothing(Kernel):
    def transform(self, X):
        return np.zeros((0, 1)) if hasattr(self, "pairs_") and not len(X) else super().transform(X)


@breaks("check_other_processing_is_refused")
class IgnoresRecord(Kernel):
    def transform(self, X):
        if isinstance(X, Subspaces):
            X = replace(X, record=self.reference_.record)
        return super().transform(X)


@breaks("check_other_reference_is_refused")
class IgnoresReference(NullCalibrator):
    def _check_reference(self, similarity):
        check_same_record(self._record, similarity.record, type(self).__name__)


@breaks("check_other_record_is_refused")
class IgnoresRecordOfSimilarity(NullCalibrator):
    def _check_reference(self, similarity):
        super()._check_reference(replace(similarity, record=self._record))


@breaks("check_number_of_features_is_compared")
class PadsFeatures(HeadClassifier):
    def predict_proba(self, X):
        if isinstance(X, np.ndarray) and hasattr(self, "n_features_in_"):
            X = np.pad(X, ((0, 0), (0, self.n_features_in_ - X.shape[1])))
        return super().predict_proba(X)


@breaks("check_labels_must_fit_the_heads")
class PadsLabels(ClassAffinity):
    def fit(self, X, y=None):
        labels = y if y is None else [*y, *["late"] * (len(X) - len(y))]
        return super().fit(X, labels)


@breaks("check_labels_are_needed")
class InventsLabels(ClassAffinity):
    def fit(self, X, y=None):
        return super().fit(X, ["early", "late"] * (len(X) // 2) if y is None else y)


# Output


@breaks("check_fit_transform")
class OtherAtOnce(Kernel):
    def fit_transform(self, X, y=None):
        return times(super().fit_transform(X), 1.01)


@breaks("check_one_row_for_every_head", broad=True)
class AnswersTwice(Kernel):
    def found(self, result, X):
        return np.repeat(np.nan_to_num(np.asarray(result)), 2, axis=0)


@breaks("check_feature_names", broad=True)
class OneName(ProjectionKernel):
    def get_feature_names_out(self, input_features=None):
        return np.array(["x"] * len(super().get_feature_names_out()), dtype=object)


@breaks("check_set_output_pandas")
class NumbersRows(ProjectionKernel):
    def _output(self, similarity):
        found = super()._output(similarity)
        return found.reset_index(drop=True) if isinstance(found, pd.DataFrame) else found


@breaks("check_pipeline", broad=True)
class NeverFitted(Kernel):
    def __sklearn_is_fitted__(self):
        return getattr(self, "_working", False)

    def transform(self, X):
        if not hasattr(self, "pairs_"):
            return super().transform(X)
        other = copy.copy(self)
        other._working = True
        return Kernel.transform(other, X)


@breaks("check_cross_validation")
class DislikesWorkers(Kernel):
    def given(self, X):
        if multiprocessing.current_process().name != "MainProcess":
            raise RuntimeError("works in the first process only")
        return X


@breaks("check_similarity_knows_its_heads")
class NamesOtherwise(ProjectionKernel):
    def get_feature_names_out(self, input_features=None):
        return np.array([f"f{name}" for name in super().get_feature_names_out()], dtype=object)


@breaks("check_extracted_first")
class TakesMoreThanItSays(ProjectionKernel):
    head_tags = HeadTags(("table", "roles", "stack"))
