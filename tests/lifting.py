"""Estimators of 3-D heads as estimators of 2-D samples, so that scikit-learn's checks apply.

scikit-learn's checks feed 2-D matrices, and run nothing on an estimator that declines them. A row
of such a matrix becomes a head of rank one; the containers that come out are flattened to 2-D.
"""

from __future__ import annotations

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from skhead import (
    CircuitScorer,
    ClassAffinity,
    CompositionScore,
    ContrastiveQKDecomposer,
    NullCalibrator,
    ProjectionKernel,
    QKPairs,
    SalientOperations,
    SubspaceExtractor,
    SubspaceReadout,
)
from skhead.similarities import (
    GrassmannDistance,
    LinearCKA,
    ProcrustesSimilarity,
    SimpleComposition,
)
from skhead.spectra import SpectrumSimilarity


class _Lifted(BaseEstimator):
    """Mixin that lifts rows to rank-one heads on the way in."""

    def _lift(self, X, reset):
        X = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32])
        return X[:, :, None]

    def fit(self, X, y=None):
        return super().fit(self._lift(X, True), y)

    def transform(self, X):
        self.n_features_in_  # noqa: B018  an unfitted estimator must say so before it looks at X
        return self._flatten(super().transform(self._lift(X, False)))

    def fit_transform(self, X, y=None):
        return self._flatten(super().fit_transform(self._lift(X, True), y))

    def _flatten(self, container):
        return np.asarray(container)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.three_d_array = False
        return tags


class LiftedSubspaceExtractor(_Lifted, SubspaceExtractor, auto_wrap_output_keys=None):
    def _flatten(self, container):
        return container.numpy("X").reshape(len(container), -1)


class LiftedProjectionKernel(_Lifted, ProjectionKernel):
    def get_feature_names_out(self, input_features=None):
        return super().get_feature_names_out(input_features)


class LiftedGrassmannDistance(_Lifted, GrassmannDistance):
    def get_feature_names_out(self, input_features=None):
        return super().get_feature_names_out(input_features)


class LiftedLinearCKA(_Lifted, LinearCKA):
    def get_feature_names_out(self, input_features=None):
        return super().get_feature_names_out(input_features)


class LiftedProcrustesSimilarity(_Lifted, ProcrustesSimilarity):
    def get_feature_names_out(self, input_features=None):
        return super().get_feature_names_out(input_features)


class LiftedSimpleComposition(_Lifted, SimpleComposition):
    def get_feature_names_out(self, input_features=None):
        return super().get_feature_names_out(input_features)


class LiftedSpectrumSimilarity(_Lifted, SpectrumSimilarity):
    def get_feature_names_out(self, input_features=None):
        return super().get_feature_names_out(input_features)


class LiftedCircuitScorer(_Lifted, CircuitScorer):
    def __init__(self, scores="all", errors="warn"):
        super().__init__(scores=scores, errors=errors)

    def _lift(self, X, reset):
        return np.stack([super()._lift(X, reset)] * 4, axis=1)

    def get_feature_names_out(self, input_features=None):
        return super().get_feature_names_out(input_features)


class LiftedCompositionScore(_Lifted, CompositionScore):
    def __init__(self, pairs=("OQ", "OK", "OV"), layer_order="all", baseline=None):
        super().__init__(pairs=pairs, layer_order=layer_order, baseline=baseline)

    def _lift(self, X, reset):
        lifted = super()._lift(X, reset)
        return np.stack([lifted] * 4, axis=1)


class LiftedSubspaceReadout(_Lifted, SubspaceReadout):
    """Read out against the coordinate vectors in place of tokens."""

    def fit(self, X, y=None):
        lifted = self._lift(X, True)
        return SubspaceReadout.fit(self, lifted, vectors=np.eye(lifted.shape[1]))

    def fit_transform(self, X, y=None):
        return self.fit(X, y).transform(X)

    def get_feature_names_out(self, input_features=None):
        return super().get_feature_names_out(input_features)


class LiftedSalientOperations(_Lifted, SalientOperations):
    """Saliencies of the coordinate vectors in place of tokens."""

    def _lift(self, X, reset):
        return np.stack([super()._lift(X, reset)] * 4, axis=1)

    def fit(self, X, y=None):
        lifted = self._lift(X, True)
        return SalientOperations.fit(self, lifted, embedding=np.eye(lifted.shape[2]))

    def fit_transform(self, X, y=None):
        return self.fit(X, y).transform(X)

    def get_feature_names_out(self, input_features=None):
        return super().get_feature_names_out(input_features)


class WideNullCalibrator(NullCalibrator):
    """The calibrator of plain arrays, of ranks so large that any positive number is a kernel."""

    def __init__(self, output="ratio", d_model=10**7, rank=10**5):
        super().__init__(output=output, d_model=d_model, rank=rank)


class LiftedContrastiveQKDecomposer(ContrastiveQKDecomposer):
    """Every row is a query and its own key; pairs agree that have the label of the first row."""

    def fit(self, X, y):
        rows, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        super().fit(self._pairs(rows, y))
        validate_data(self, X, skip_check_array=True)
        return self

    def partial_fit(self, X, y):
        if isinstance(X, QKPairs):
            return super().partial_fit(X)
        rows, y = validate_data(self, X, y, reset=not hasattr(self, "_sums"))
        super().partial_fit(self._pairs(rows, y))
        validate_data(self, X, skip_check_array=True)
        return self

    def transform(self, X):
        self.n_features_in_  # noqa: B018  an unfitted estimator must say so before it looks at X
        return super().transform(validate_data(self, X, reset=False))

    def score(self, X, y):
        return super().score(self._pairs(validate_data(self, X, reset=False), y))

    def _pairs(self, X, y):
        agree = np.ravel(y) == np.ravel(y)[0]
        return QKPairs(X, X, np.arange(len(X)), np.ones(len(X)), agree)


class LiftedClassAffinity(ClassAffinity):
    """Affinities of rows, compared as the lines that they span with a constant beside them."""

    def fit(self, X, y):
        return super().fit(self._compare(X, y), y)

    def fit_transform(self, X, y=None):
        return super().fit_transform(self._compare(X, y), y)

    def transform(self, X):
        self.n_features_in_  # noqa: B018  an unfitted estimator must say so before it looks at X
        X = validate_data(self, X, reset=False)
        return super().transform(self._kernel.transform(self._lines(X)))

    def _compare(self, X, y):
        X = validate_data(self, X) if y is None else validate_data(self, X, y)[0]
        self._kernel = ProjectionKernel().fit(self._lines(X))
        return self._kernel.transform(self._lines(X))

    def _lines(self, X):
        return np.column_stack([X, np.ones(len(X))])[:, :, None].astype(float)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags
