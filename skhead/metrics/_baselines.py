"""What a score of head classes has to be held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import check_cv, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skhead._base import ANONYMOUS, ROLES, HeadInput, open_door
from skhead._checks import check_count
from skhead._html import ShowsSummary, Summary
from skhead._progress import progress_bar
from skhead.exceptions import DegenerateHeadError, HeadShapeError
from skhead.linalg.factored import frobenius_norms
from skhead.metrics._precision import macro_average_precision
from skhead.stats import permute_heads
from skhead.weights import check_heads, head_labels

__all__ = ["LayerPermutation", "baseline_scores", "layer_permutation_score"]

#: Width, in layers, of the bumps that the layer baseline sees.
_LAYER_WIDTH = 1.5
_RANDOM_RANKINGS = 20


def baseline_scores(
    heads: Any,
    y: ArrayLike,
    *,
    cv: Any,
    scoring: Any = None,
    groups: ArrayLike | None = None,
    random_state: int = 0,
) -> pd.DataFrame:
    """What is reached without looking at subspaces: by chance, by the layer, by norms.

    Classes sit in certain layers, and their weights have certain sizes; a score says something of
    what heads do only as far as it is above these.

    Parameters
    ----------
    heads : DataFrame, or array or Tensor of shape (n_heads, 4, d_model, d_head)
        Heads table, or W_Q, W_K, W_V and W_O transposed, which have no layers.
    y : array-like of shape (n_heads,)
        Class of each head.
    cv : cross-validator, int or iterable
        The folds of the score that is to be judged.
    scoring : callable or str, default=None
        None is `macro_average_precision`.
    groups : array-like of shape (n_heads,) or None, default=None
        For the cross-validator.
    random_state : int, default=0
        Of the random rankings.

    Returns
    -------
    DataFrame
        Rows "chance" (the mean of 20 random rankings), "layer" (the relative depth, through
        bumps of 1.5 layers, so that a class may sit in the middle) and "norm" (logarithms of the
        Frobenius norms of the four matrices), the last two by a balanced logistic regression;
        columns ``mean`` and ``sd`` over the folds.

    Examples
    --------
    >>> import skhead
    >>> from skhead.metrics import baseline_scores
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> layer = heads["layer"].map({0: "early", 1: "late"})
    >>> baseline_scores(heads, layer, cv=4)["mean"].idxmax()
    'layer'
    """
    source = open_door(heads, "baseline_scores")
    norms = _log_norms(source)
    logistic = LogisticRegression(class_weight="balanced", max_iter=1000)
    linear = make_pipeline(StandardScaler(), logistic)
    folds = check_cv(cv, np.asarray(y), classifier=True)
    seeds = np.random.default_rng(random_state).integers(2**32, size=_RANDOM_RANKINGS)
    jobs = {"chance": [(_RandomRanking(int(seed)), norms) for seed in seeds]}
    if (source.heads["layer"] >= 0).all():
        jobs["layer"] = [(linear, _layer_bumps(source.heads))]
    jobs["norm"] = [(linear, norms)]
    scorer = macro_average_precision if scoring is None else scoring
    rows = {}
    for name, runs in jobs.items():
        found = [
            cross_val_score(
                model,
                table,
                np.asarray(y),
                groups=groups,
                cv=folds,
                scoring=scorer,
                error_score="raise",
            )
            for model, table in runs
        ]
        over_folds = np.mean(found, axis=0)
        rows[name] = {"mean": float(over_folds.mean()), "sd": float(over_folds.std())}
    return pd.DataFrame.from_dict(rows, orient="index")


def _log_norms(source: HeadInput) -> NDArray[np.float64]:
    """Logarithms of the Frobenius norms of the matrices of each head."""
    roles = (ANONYMOUS,) if source.anonymous else tuple(ROLES)
    norms = []
    for role in roles:
        read = source.read(role, fold_norm=False, center=False, device=None)
        norms.append(frobenius_norms(read.tensor).cpu().numpy()[read.index])
    found = np.stack(norms, axis=1)
    zero = np.argwhere(found == 0)
    if len(zero):
        row, column = zero[0]
        raise DegenerateHeadError(
            f"baseline_scores: {head_labels(source.heads)[row]} W_{roles[column]} is zero, and has "
            "no norm to compare; drop the head, for example heads.drop(index=...)"
        )
    return np.log(found)


def _layer_bumps(heads: pd.DataFrame) -> NDArray[np.float64]:
    """The place of each head's layer among the layers, as bumps in which a line sees the middle."""
    layer = heads["layer"].to_numpy(dtype=np.float64)
    n_layers = heads["n_layers"].to_numpy(dtype=np.float64)
    most = int(n_layers.max())
    centres = np.arange(most)
    place = layer / np.maximum(n_layers - 1, 1) * (most - 1)
    return np.exp(-0.5 * ((place[:, None] - centres[None, :]) / _LAYER_WIDTH) ** 2)


class _RandomRanking(ClassifierMixin, BaseEstimator):
    """Scores drawn without a look at the heads."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, X: NDArray[np.float64], y: NDArray[Any]) -> _RandomRanking:
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        drawn = self._draw(X)
        return drawn if len(self.classes_) > 2 else drawn[:, 1] - drawn[:, 0]

    def predict(self, X: NDArray[np.float64]) -> NDArray[Any]:
        return np.asarray(self.classes_[self._draw(X).argmax(axis=1)])

    def _draw(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.random.default_rng(self.seed).random((len(X), len(self.classes_)))


@dataclass(frozen=True)
class LayerPermutation(ShowsSummary):
    """A cross-validated score, and what it is with labels exchanged within layers.

    Attributes
    ----------
    score : float
        With the labels as they are.
    null_scores : ndarray of shape (n_permutations,)
    p_value : float
        ``(1 + permutations that score as high) / (1 + n_permutations)``.

    Examples
    --------
    >>> import numpy as np
    >>> from skhead.metrics import LayerPermutation
    >>> LayerPermutation(0.8, np.array([0.1, 0.3, 0.2]), 0.25)
    LayerPermutation(score 0.8, p-value 0.25 of 3 permutations)
    """

    score: float
    null_scores: NDArray[np.float64]
    p_value: float

    def _summary(self) -> Summary:
        null = self.null_scores
        return Summary(
            {
                "score": f"{self.score:.4g}",
                "p-value": f"{self.p_value:.4g}, of {len(null):,} permutations within layers",
                "permuted labels": f"mean {null.mean():.4g}, largest {null.max():.4g}",
            }
        )

    def __repr__(self) -> str:
        return (
            f"LayerPermutation(score {self.score:.4g}, p-value {self.p_value:.4g} of "
            f"{len(self.null_scores)} permutations)"
        )


def layer_permutation_score(
    estimator: Any,
    heads: pd.DataFrame,
    y: ArrayLike,
    *,
    cv: Any,
    scoring: Any = None,
    groups: ArrayLike | None = None,
    n_permutations: int = 99,
    n_jobs: int | None = None,
    random_state: int = 0,
) -> LayerPermutation:
    """Test a cross-validated score against labels exchanged among the heads of each layer.

    The labels keep their layers, so that the score must come from what tells apart heads of one
    layer. The whole of the estimator is fitted anew for every permutation; give a pipeline a
    ``memory=``, and what does not depend on labels is computed once a fold.

    Parameters
    ----------
    estimator : estimator
        Takes the heads table, such as a pipeline that ends with `HeadClassifier`.
    heads : DataFrame
        Heads table.
    y : array-like of shape (n_heads,)
        Class of each head.
    cv : cross-validator, int or iterable
        An int is that many folds stratified by class. Splits that depend on labels are made
        anew for every permutation; those of an iterable stay as they are.
    scoring : callable or str, default=None
        None is `macro_average_precision`.
    groups : array-like of shape (n_heads,) or None, default=None
        For the cross-validator.
    n_permutations : int, default=99
        The smallest p-value possible is ``1 / (1 + n_permutations)``.
    n_jobs : int or None, default=None
        Permutations at once, as for joblib.
    random_state : int, default=0
        Of the permutations.

    Returns
    -------
    LayerPermutation

    Raises
    ------
    HeadShapeError
        If `y` does not fit the heads.
    ValueError
        If every layer has heads of one class only, `n_permutations` is not positive, or a score is
        not a number.

    Examples
    --------
    >>> import skhead
    >>> from sklearn.dummy import DummyClassifier
    >>> from skhead.metrics import layer_permutation_score
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> found = layer_permutation_score(
    ...     DummyClassifier(),
    ...     heads,
    ...     heads["head"] % 2,
    ...     cv=2,
    ...     scoring="accuracy",
    ...     n_permutations=9,
    ... )
    >>> found.p_value
    1.0
    """
    checked = check_heads(heads, "layer_permutation_score")
    labels = np.asarray(y)
    if labels.shape != (len(checked),):
        raise HeadShapeError(
            f"layer_permutation_score: {len(checked)} heads need as many labels, got shape "
            f"{labels.shape}"
        )
    n_permutations = check_count("n_permutations", n_permutations, "layer_permutation_score")
    layers = checked.groupby(["source", "layer"], sort=False).ngroup().to_numpy()
    if all(len(np.unique(labels[layers == layer])) == 1 for layer in np.unique(layers)):
        raise ValueError(
            "layer_permutation_score: every layer has heads of one class only, so that exchanging "
            "labels within layers changes nothing"
        )
    scorer = macro_average_precision if scoring is None else scoring
    folds = check_cv(cv, labels, classifier=True)
    orders = permute_heads(layers, n_permutations, np.random.default_rng(random_state))
    drawn = [labels, *(labels[order] for order in orders)]
    running = Parallel(n_jobs=n_jobs, return_as="generator")(
        delayed(_mean_score)(clone(estimator), heads, given, groups, folds, scorer)
        for given in drawn
    )
    scores = [next(running) for _ in progress_bar(drawn, "layer_permutation_score", unit="fit")]
    null = np.asarray(scores[1:])
    p_value = (1 + int((null >= scores[0]).sum())) / (1 + len(null))
    return LayerPermutation(float(scores[0]), null, float(p_value))


def _mean_score(
    estimator: Any, heads: pd.DataFrame, y: NDArray[Any], groups: Any, cv: Any, scoring: Any
) -> float:
    found = cross_val_score(
        estimator, heads, y, groups=groups, cv=cv, scoring=scoring, error_score="raise"
    )
    undefined = np.flatnonzero(np.isnan(found))
    if len(undefined):
        raise ValueError(
            f"layer_permutation_score: the score of fold {undefined[0]} is nan, which no permuted "
            "score can be held against; stratify the folds, use fewer, or choose another scoring"
        )
    return float(np.mean(found))
