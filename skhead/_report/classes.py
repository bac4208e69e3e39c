"""Which class a head may have: by the bundled zoo, and by labelled heads of the same model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold

from skhead._report.labels import HeadClasses
from skhead._report.scores import HeadScores
from skhead.circuits import CircuitScorer
from skhead.classification import HeadClassifier
from skhead.containers import Similarity, Subspaces
from skhead.datasets import load_head_zoo
from skhead.kernels import ProjectionKernel
from skhead.metrics import class_average_precisions

__all__ = ["EVIDENCE", "Guess", "guess_from_labels", "guess_from_zoo", "likeliest"]

#: Scores that mean the same in every model and tell the two classes that the zoo can teach.
EVIDENCE = ("previous_token", "ov_copying", "induction_strength")
_LEARNED = ("Induction", "Previous Token")
_NONE = "None"
#: Fewest heads in and outside a class that is learned within a model: one for each part.
_PARTS = 3
_PAIRS = ("QQ", "KK", "VV", "OO")


@dataclass(frozen=True)
class Guess:
    """Probabilities of classes, or why there are none.

    Attributes
    ----------
    probabilities : DataFrame or None
        One row per head, one column per class, without the unclassed.
    refusal : str or None
        Why there are none.
    learned : dict of str to int
        Heads of each class that were learned from.
    models : int
        Models that were learned from; 1 for the model itself.
    precisions : DataFrame or None
        Within the model, `class_average_precisions` of the probabilities.
    """

    probabilities: pd.DataFrame | None
    refusal: str | None
    learned: Mapping[str, int]
    models: int
    precisions: pd.DataFrame | None = None


def likeliest(guess: Guess) -> pd.DataFrame:
    """The likeliest class of every head and its probability, in columns ``class, probability``."""
    assert guess.probabilities is not None
    return pd.DataFrame(
        {
            "class": guess.probabilities.idxmax(axis=1),
            "probability": guess.probabilities.max(axis=1),
        }
    )


def guess_from_zoo(scores: HeadScores, source: str, processing: Mapping[str, Any]) -> Guess:
    """Ask a classifier of the bundled zoo, whose heads were labelled by running them.

    Parameters
    ----------
    scores : HeadScores
        Of the model's heads.
    source : str
        The model's; one of the zoo itself is not learned from.
    processing : mapping
        ``fold_norm, center, device`` with which the scores were made, and those of the zoo are.

    Returns
    -------
    Guess
    """
    missing = [name for name in EVIDENCE if name in scores.missing]
    if missing:
        return Guess(None, f"it takes {missing[0]}, and {scores.missing[missing[0]]}", {}, 0)
    zoo = load_head_zoo()
    others = (zoo.heads["source"] != source).to_numpy()
    target = zoo.target.where(zoo.target.isin(_LEARNED), _NONE)[others].to_numpy()
    known = _scores_of_zoo(**processing)[others]
    model = HeadClassifier().fit(known, target)
    found = model.predict_proba(scores.table[list(EVIDENCE)].to_numpy(dtype=np.float64))
    table = pd.DataFrame(found, index=scores.table.index, columns=model.classes_)
    return Guess(
        table.drop(columns=_NONE),
        None,
        {name: int((target == name).sum()) for name in _LEARNED},
        int(zoo.heads["source"][others].nunique()),
    )


@cache
def _scores_of_zoo(fold_norm: bool, center: bool, device: str | None) -> NDArray[np.float64]:
    """The evidence on every head of the zoo, computed once for all reports of a process."""
    scorer = CircuitScorer(EVIDENCE, fold_norm=fold_norm, center=center, device=device)
    with warnings.catch_warnings():
        # What processing means for a model of the zoo is no news about the model of the report.
        warnings.simplefilter("ignore", UserWarning)
        scores = scorer.fit_transform(load_head_zoo().heads)
    found = scores.to_numpy(dtype=np.float64, copy=True)
    found.setflags(write=False)
    return found


def guess_from_labels(subspaces: Subspaces, classes: HeadClasses) -> Guess:
    """Probability of every class by models that have not seen the head.

    The heads are parted in three; each part is judged by the projection kernels with the others,
    between matrices of one role.

    Parameters
    ----------
    subspaces : Subspaces
    classes : HeadClasses
        Of the same heads.

    Returns
    -------
    Guess
    """
    counts = classes.values[classes.values != _NONE].value_counts()
    enough = (counts >= _PARTS) & (len(classes.values) - counts >= _PARTS)
    learned = {str(name): int(counts[name]) for name in sorted(counts[enough].index)}
    if not learned:
        why = (
            f"no class of {classes.name} has the {_PARTS} heads, with as many heads outside it, "
            "that it takes to learn from some and to judge others"
        )
        return Guess(None, why, {}, 1)
    y = classes.values.where(classes.values.isin(learned), _NONE).to_numpy()
    kernel = ProjectionKernel(pairs=_PAIRS, layer_order="all").fit_transform(subspaces)
    table = pd.DataFrame(0.0, index=classes.values.index, columns=list(learned))
    parts = StratifiedKFold(_PARTS, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        # The unclassed may be fewer than the parts: nothing is learned about them.
        warnings.filterwarnings("ignore", "The least populated class in y")
        folds = list(parts.split(y, y))
    for known, asked in folds:
        model = HeadClassifier().fit(_cut(kernel, known, known), y[known])
        found = model.predict_proba(_cut(kernel, asked, known))
        places = [list(model.classes_).index(name) for name in learned]
        table.iloc[asked] = found[:, places]
    precisions = class_average_precisions(y, table.to_numpy(), list(learned))
    return Guess(table, None, learned, 1, precisions)


def _cut(kernel: Similarity, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Similarity:
    """Similarity of some heads to some others; without its null law, which classes do not use."""
    unknown = np.full((1, 1, 1), np.nan)
    return replace(
        kernel,
        values=kernel.values[np.ix_(rows, columns)],
        rows=kernel.rows.iloc[rows],
        columns=kernel.columns.iloc[columns],
        row_ranks=kernel.row_ranks[rows],
        column_ranks=kernel.column_ranks[columns],
        null_mean=unknown,
        null_sd=unknown,
        row_subspaces=None,
        column_subspaces=None,
    )
