"""What class of head is this, judged by its similarity to heads whose class is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logit, softmax
from sklearn.base import ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted, validate_data

from skhead._affinity import ClassAffinity
from skhead._base import check_option
from skhead._classes import LEAST, open_targets
from skhead._estimators import SkheadEstimator
from skhead._progress import reports_fit
from skhead._tags import HeadEstimatorTags, HeadTags, declare
from skhead.containers import Similarity, similarity_in
from skhead.exceptions import HeadShapeError
from skhead.stats.platt import fit_sigmoids

__all__ = ["HeadClassifier"]

FEATURES = ("own", "all")
#: Parts of the training heads whose scores come from a model that has not seen them.
_CROSS_FIT = 5


class HeadClassifier(ClassifierMixin, SkheadEstimator):
    """Classes of heads, from their similarity to heads of known class or from any features.

    From a `Similarity`, each head is described by its affinity to the training heads of each class
    (see `ClassAffinity`), and one linear model a class weighs the pair kinds. Its weights are not
    negative: being like the members of a class can only speak for it, which is what a class of two
    to eight heads leaves to be learned. From a 2-D matrix, one linear model a class takes the
    columns as they are.

    Parameters
    ----------
    aggregate : {"mean", "max", "topk"}, default="mean"
        As for `ClassAffinity`.
    k : int, default=3
        For "topk".
    contrast : bool, default=True
        As for `ClassAffinity`.
    features : {"own", "all"}, default="own"
        From a similarity: whether the model of a class sees the affinities to this class, or those
        to all classes.
    estimator : classifier or None, default=None
        Cloned for each class, to tell its heads from all others. None is a ridge classifier on
        standardised features with balanced classes and non-negative weights, and for a 2-D matrix
        a logistic regression with balanced classes.
    alpha : float, default=100.0
        Regularisation of the ridge classifier.
    none_label : str, default="None"
        The label of heads without a class.
    rare : {"raise", "none"}, default="raise"
        As for `ClassAffinity`.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        All classes, with that of the unclassed heads if there is one.
    affinity_ : DataFrame of shape (n_heads, n_classes * n_pairs)
        Affinities of the training heads, each left out of its own class; columns (class, pair).
        None after fitting on a 2-D matrix.
    coef_ : DataFrame of shape (n_classes, n_pairs)
        Log-odds of each class for one unit of affinity by each pair kind. None where the
        estimator is given, the features are all, or X was a 2-D matrix.
    intercept_ : Series of shape (n_classes,)
        Log-odds of each class at affinity 0. None where `coef_` is.
    models_ : dict
        The fitted model of each class.

    See Also
    --------
    ClassAffinity : The affinities as features among others, in a FeatureUnion.
    skhead.metrics.macro_average_precision : Scorer for classes of a few heads.

    Notes
    -----
    Probabilities are calibrated by logistic curves through scores that come from models which had
    not seen the head (see `skhead.stats.fit_sigmoids`), which gives log-odds ``l_c`` of each class
    against all other heads, and ``p_c = 1 / (1 + exp(-l_c))``. Where unclassed heads exist, at most
    one class applies: ``P(c) = exp(l_c) / (1 + sum exp(l))``, as of independent verdicts of which
    no two can be true, which is close to ``p_c`` for classes that are rare. Where they do not,
    ``P(c) = p_c / sum p``. `decision_function` gives the log-odds ``l_c``, 0 for the unclassed.

    Classes of a few heads among many seldom are the most probable ones: rank heads rather than
    count what `predict` names. Take out-of-fold probabilities from
    `skhead.metrics.cross_val_classes`, as scikit-learn's ``cross_val_predict`` puts numbers in the
    place of labels and so hides which heads are unclassed. Probabilities hold for heads like the
    training heads, not for those of another kind of model.

    Examples
    --------
    >>> import skhead
    >>> from sklearn.pipeline import make_pipeline
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> steps = make_pipeline(
    ...     skhead.SubspaceExtractor(),
    ...     skhead.ProjectionKernel(pairs=("QQ", "KK", "VV", "OO"), layer_order="all"),
    ...     skhead.NullCalibrator(),
    ...     skhead.HeadClassifier(),
    ... )
    >>> layer = heads["layer"].map({0: "early", 1: "late"})
    >>> steps.fit(heads, layer).predict_proba(heads).shape
    (16, 2)
    """

    def __init__(
        self,
        aggregate: str = "mean",
        k: int = 3,
        contrast: bool = True,
        features: str = "own",
        estimator: Any = None,
        alpha: float = 100.0,
        none_label: str = "None",
        rare: str = "raise",
    ) -> None:
        self.aggregate = aggregate
        self.k = k
        self.contrast = contrast
        self.features = features
        self.estimator = estimator
        self.alpha = alpha
        self.none_label = none_label
        self.rare = rare

    @reports_fit
    def fit(self, X: Any, y: Any) -> HeadClassifier:
        """Learn the classes.

        Parameters
        ----------
        X : Similarity, or array-like of shape (n_heads, n_features)
            The training heads compared with each other, or features of them.
        y : array-like of shape (n_heads,) or (n_heads, n_classes)
            Class of each head, or a multilabel indicator, whose columns are classes.

        Returns
        -------
        self

        Raises
        ------
        HeadShapeError
            If X is a similarity with other heads than its own.
        ValueError
            If features are missing, labels do not fit the heads, or a class is too small.
        """
        name = type(self).__name__
        check_option("features", self.features, FEATURES, name)
        similarity = similarity_in(X)
        if similarity is not None:
            affinity = self._class_affinity()
            targets = affinity._fit(similarity, y, name)
            self._affinity: ClassAffinity | None = affinity
            self.affinity_: pd.DataFrame | None = affinity.affinity_
            table = affinity.affinity_.to_numpy()
            self.n_features_in_ = similarity.shape[1]
        else:
            self._affinity, self.affinity_ = None, None
            # The checked y is an array, without the classes that name the columns of a DataFrame.
            table, _ = validate_data(self, X, y, multi_output=True)
            labels = [f"row {i}" for i in range(len(table))]
            targets = open_targets(y, len(table), self.none_label, self.rare, labels, name)
        self._targets = targets
        self.classes_ = targets.classes
        self._fit_models(table)
        self._read_weights()
        return self

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Log-odds of each class, by which heads are ranked.

        Parameters
        ----------
        X : Similarity, or array-like of shape (n_heads, n_features)
            As for `fit`; similarities are those to the training heads.

        Returns
        -------
        ndarray of shape (n_heads, n_classes), or (n_heads,) for two classes
            Of two classes, the log-odds of the second less those of the first.
        """
        logits = self._logits(X)
        if self._targets.multilabel or len(self.classes_) > 2:
            return logits
        return np.asarray(logits[:, 1] - logits[:, 0])

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Calibrated probability of each class.

        Parameters
        ----------
        X : Similarity, or array-like of shape (n_heads, n_features)
            As for `decision_function`.

        Returns
        -------
        ndarray of shape (n_heads, n_classes)
            Rows sum to 1; with a multilabel indicator each column is a probability by itself.
        """
        logits = self._logits(X)
        if self._targets.multilabel:
            return np.asarray(expit(logits), dtype=np.float64)
        weights = log_expit(logits) if self._targets.none is None else logits
        return np.asarray(softmax(weights, axis=1), dtype=np.float64)

    def predict(self, X: Any) -> NDArray[Any]:
        """Most probable class, or with a multilabel indicator each class more probable than not.

        Parameters
        ----------
        X : Similarity, or array-like of shape (n_heads, n_features)
            As for `decision_function`.

        Returns
        -------
        ndarray of shape (n_heads,), or (n_heads, n_classes) of 0 and 1
        """
        logits = self._logits(X)
        if self._targets.multilabel:
            return np.asarray(logits > 0, dtype=np.int64)
        return np.asarray(self.classes_[logits.argmax(axis=1)])

    def explain(self, head: str | int, X: Similarity | None = None) -> pd.DataFrame:
        """Which training heads, by which pair kind, speak for and against each class of a head.

        Parameters
        ----------
        head : str or int
            Label or position of the head.
        X : Similarity or None, default=None
            Where the head is a row; None is the training heads.

        Returns
        -------
        DataFrame
            One row for every class, training head and pair kind that counts, the strongest
            first: ``class``, ``reference`` (the training head), ``pair``, ``member`` (whether it
            belongs to the class), ``similarity``, and ``contribution``, its part of the log-odds
            of the class. These add up, with `intercept_`, to `decision_function`, except for
            affinities that are undefined for the head. Where `coef_` is None, ``affinity`` takes
            the place of the contribution: its part of the affinity to the class.

        Raises
        ------
        ValueError
            If the classifier was fitted on a 2-D matrix, or has no such head.

        Examples
        --------
        >>> import skhead
        >>> heads = skhead.load_heads("skhead/induction-2l")
        >>> kernel = skhead.ProjectionKernel(["KK", "OO"], layer_order="all")
        >>> classifier = skhead.HeadClassifier()
        >>> classifier = classifier.fit(kernel.fit_transform(heads), heads["layer"].astype(str))
        >>> classifier.explain("L0H3").columns.tolist()
        ['class', 'reference', 'pair', 'member', 'similarity', 'contribution']
        """
        check_is_fitted(self)
        if self._affinity is None:
            raise ValueError(
                f"{type(self).__name__}: was fitted on a 2-D matrix, whose columns are no training "
                "heads; fit it on a Similarity to explain a head"
            )
        if X is None:
            X = self._affinity._training
        else:
            X = self._affinity._compared(X, type(self).__name__)
        row = _position_of(head, X.row_labels, type(self).__name__)
        parts = []
        for name in self._affinity.classes_:
            weights = None if self.coef_ is None else self.coef_.loc[name].to_numpy()
            part = self._affinity._explain(X, row, name, weights)
            part.insert(0, "class", name)
            parts.append(part)
        found = pd.concat(parts, ignore_index=True)
        order = found[found.columns[-1]].abs().sort_values(ascending=False, kind="stable").index
        return found.loc[order].reset_index(drop=True)

    def __sklearn_tags__(self) -> HeadEstimatorTags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return declare(tags, HeadTags(("similarity", "matrix")))

    def _class_affinity(self) -> ClassAffinity:
        return ClassAffinity(
            aggregate=self.aggregate,
            k=self.k,
            contrast=self.contrast,
            none_label=self.none_label,
            rare=self.rare,
        )

    def _model(self) -> Any:
        if self.estimator is not None:
            return clone(self.estimator)
        if self._affinity is None:
            model = LogisticRegression(class_weight="balanced", max_iter=1000)
        else:
            model = RidgeClassifier(self.alpha, positive=True, class_weight="balanced")
        return make_pipeline(StandardScaler(), model)

    def _columns(self, position: int) -> slice:
        """Which columns of the table the model of a class sees."""
        if self._affinity is None or self.features == "all":
            return slice(None)
        n_pairs = len(self._affinity.pairs_)
        return slice(position * n_pairs, (position + 1) * n_pairs)

    def _fit_models(self, table: NDArray[np.float64]) -> None:
        wanted = self._targets.members[:, self._targets.named]
        names = self.classes_[self._targets.named]
        unseen = np.empty(wanted.shape)
        self.models_ = {}
        for position, name in enumerate(names):
            columns = table[:, self._columns(position)]
            self._cross_fit(columns, wanted[:, position], name, unseen[:, position])
            self.models_[name] = self._model().fit(columns, wanted[:, position])
        slopes, intercepts = fit_sigmoids(unseen, wanted)
        self._curves = dict(zip(names, zip(slopes, intercepts, strict=True), strict=True))

    def _cross_fit(
        self,
        table: NDArray[np.float64],
        wanted: NDArray[np.bool_],
        name: Any,
        out: NDArray[np.float64],
    ) -> None:
        """Fill `out` with scores of heads that the scoring model has not seen."""
        n_folds = min(_CROSS_FIT, int(wanted.sum()), int((~wanted).sum()))
        if n_folds < LEAST:
            raise ValueError(
                f"{type(self).__name__}: {int(wanted.sum())} of {len(wanted)} heads are of class "
                f"{str(name)!r}; to tell it from the others, {LEAST} must be of it at least, and "
                f"{LEAST} must not"
            )
        for seen, left_out in StratifiedKFold(n_folds).split(table, wanted):
            model = self._model().fit(table[seen], wanted[seen])
            out[left_out] = _scores(model, table[left_out])

    def _read_weights(self) -> None:
        """Weights of the default models in log-odds per unit of affinity."""
        self.coef_, self.intercept_ = None, None
        if self._affinity is None or self.estimator is not None or self.features == "all":
            return
        rows, intercepts = {}, {}
        for name, model in self.models_.items():
            scaler, linear = model[0], model[1]
            slope, intercept = self._curves[name]
            weights = slope * linear.coef_.ravel() / scaler.scale_
            rows[name] = weights
            offset = slope * float(linear.intercept_.item()) + intercept
            intercepts[name] = offset - float(weights @ scaler.mean_)
        self.coef_ = pd.DataFrame.from_dict(rows, orient="index", columns=self._affinity.pairs_)
        self.intercept_ = pd.Series(intercepts)

    def _logits(self, X: Any) -> NDArray[np.float64]:
        check_is_fitted(self)
        if self._affinity is not None:
            similarity = self._affinity._compared(X, type(self).__name__)
            table = self._affinity._affinities(similarity)
        elif similarity_in(X) is not None:
            raise HeadShapeError(
                f"{type(self).__name__}: was fitted on a 2-D matrix, and this is a Similarity; "
                "use the same steps for both"
            )
        else:
            table = validate_data(self, X, reset=False)
        logits = np.zeros((len(table), len(self.classes_)))
        for position, c in enumerate(self._targets.named):
            name = self.classes_[c]
            slope, intercept = self._curves[name]
            scores = _scores(self.models_[name], table[:, self._columns(position)])
            logits[:, c] = slope * scores + intercept
        return logits


def _scores(model: Any, table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of the class, however the model gives them."""
    if hasattr(model, "decision_function"):
        return np.asarray(model.decision_function(table), dtype=np.float64)
    tiny = np.finfo(np.float64).eps
    return np.asarray(logit(np.clip(model.predict_proba(table)[:, 1], tiny, 1 - tiny)))


def _position_of(head: str | int, labels: Sequence[str], caller: str) -> int:
    if isinstance(head, str):
        if head in labels:
            return labels.index(head)
    elif isinstance(head, int | np.integer) and -len(labels) <= head < len(labels):
        return int(head)
    raise ValueError(
        f"{caller}: there is no head {head!r} among {len(labels)} heads "
        f"({labels[0]} to {labels[-1]}); give a label or a position"
    )
