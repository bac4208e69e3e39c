"""Checks of what comes out: names, data frames, pipelines and cross-validation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import is_classifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline

from skhead.containers import Similarity, Subspaces
from skhead.extraction import SubspaceExtractor
from skhead.kernels import ProjectionKernel
from skhead.testing._bench import SAME_ROLE, Bench, NotApplicableError, frame, numbers, same
from skhead.testing._checks import check, door, method, require
from skhead.weights import load_heads

#: A bundled model, which every process can read.
_BUNDLED = "skhead/induction-2l"


def _does_not_learn_from_labels(bench: Bench) -> str | None:
    if bench.supervised:
        return "learns from labels, so that training heads may be treated unlike others"
    return None


@check(method("transform"), _does_not_learn_from_labels)
def check_fit_transform(bench: Bench) -> None:
    """fit_transform gives what fit and transform give one after the other."""
    given = bench.given()
    both = bench.new().fit_transform(given.X, given.y, **given.fit_arguments)
    same(bench.run(given), both, f"{bench.name}: fit_transform and fit().transform()")


@check(method("transform"))
def check_one_row_for_every_head(bench: Bench) -> None:
    """What comes out has one row for every head that goes in, in order."""
    given = bench.given()
    result = bench.run(given)
    wanted = len(given.X) if given.door == "pairs" else len(given.heads)
    for name, values in numbers(result).items():
        if not (given.door == "pairs" and name == "keys"):
            require(
                len(values) == wanted,
                f"{bench.name}: gives {len(values)} rows of {name} for {wanted} heads",
            )


@check(method("get_feature_names_out"))
def check_feature_names(bench: Bench) -> None:
    """get_feature_names_out gives one text for every column, and no text twice."""
    given = bench.given()
    fitted = bench.fitted(given)
    names = list(fitted.get_feature_names_out())
    width = np.asarray(bench.apply(fitted, given.X)).shape[1]
    require(
        len(names) == width, f"{bench.name}: names {len(names)} features and gives {width} columns"
    )
    require(
        all(isinstance(name, str) for name in names),
        f"{bench.name}: get_feature_names_out must give texts",
    )
    twice = [name for name in set(names) if names.count(name) > 1]
    require(not twice, f"{bench.name}: several features are called {twice[:3]}")


@check(method("get_feature_names_out"), method("set_output"))
def check_set_output_pandas(bench: Bench) -> None:
    """set_output(transform="pandas") gives data frames with names and the labels of the heads."""
    given = bench.given()
    plain = bench.fitted(given)
    fitted = bench.fitted(given, bench.new().set_output(transform="pandas"))
    found = fitted.transform(given.X)
    require(
        isinstance(found, pd.DataFrame),
        f"{bench.name}: gives {type(found).__name__} after set_output(transform='pandas')",
    )
    names = list(fitted.get_feature_names_out())
    require(list(found.columns) == names, f"{bench.name}: columns are not get_feature_names_out")
    if given.door != "pairs":
        require(
            list(found.index) == list(given.heads.index),
            f"{bench.name}: rows of the data frame are called {list(found.index)[:3]} instead of "
            f"{list(given.heads.index)[:3]}",
        )
    values = np.asarray(plain.transform(given.X), dtype=np.float64)
    same(values, found.to_numpy(dtype=np.float64), f"{bench.name}: the numbers in a data frame")


@check()
def check_pipeline(bench: Bench) -> None:
    """A step of a pipeline works as it does by itself, and is reached by set_params."""
    given = bench.given()
    if given.fit_arguments:
        raise NotApplicableError("takes a stack with arguments of fit")
    alone = bench.run(given)
    steps = Pipeline([("before", "passthrough"), ("head", bench.new())])
    steps.fit(given.X, given.y)
    same(alone, bench.apply(steps, given.X), f"{bench.name}: as a step of a pipeline")
    reached = {name for name in steps.get_params() if name.startswith("head__")}
    missing = [name for name in bench.parameters if f"head__{name}" not in reached]
    require(not missing, f"{bench.name}: a pipeline does not reach its parameters {missing}")


@check(door("table", "similarity"))
def check_cross_validation(bench: Bench) -> None:
    """Cross-validation of a pipeline gives the same scores with one process and with two."""
    heads = load_heads(_BUNDLED)
    labels = heads["layer"].map({0: "early", 1: "late"})
    steps = _classifying(bench, heads, labels)
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    one, two = (
        cross_val_score(steps, heads, labels, cv=folds, n_jobs=n_jobs, error_score="raise")
        for n_jobs in (1, 2)
    )
    require(
        bool(np.allclose(one, two)),
        f"{bench.name}: scores {one} with one process and {two} with two",
    )


def _classifying(bench: Bench, heads: pd.DataFrame, labels: pd.Series) -> Pipeline:
    """A pipeline from a heads table to classes in which the estimator is a step."""
    steps: list[tuple[str, Any]] = []
    if "table" not in bench.doors:
        steps += [("kernel", ProjectionKernel(pairs=SAME_ROLE, layer_order="all"))]
    steps += [("head", bench.new())]
    if is_classifier(bench.estimator):
        return Pipeline(steps)
    made = Pipeline(steps).fit(heads, labels).transform(heads)
    if isinstance(made, Subspaces):
        steps += [("kernel", ProjectionKernel(pairs=SAME_ROLE, layer_order="all"))]
    numbers_of_heads = ("impute", SimpleImputer(keep_empty_features=True))
    return Pipeline([*steps, numbers_of_heads, ("classes", LogisticRegression(max_iter=200))])


def _gives_similarity(bench: Bench) -> str | None:
    if "pairs" in bench.parameters:
        return None
    return "has no parameter 'pairs', by which kernels of heads are known"


@check(method("transform"), _gives_similarity)
def check_similarity_knows_its_heads(bench: Bench) -> None:
    """A similarity names row heads, column heads, pair kinds and their features alike."""
    given = bench.given()
    fitted = bench.fitted(given)
    result = bench.apply(fitted, given.X)
    require(
        isinstance(result, Similarity),
        f"{bench.name}: has pair kinds, and gives {type(result).__name__} instead of a Similarity",
    )
    shape = (len(result.rows), len(result.columns), len(result.pairs))
    require(
        result.values.shape == shape,
        f"{bench.name}: values of shape {result.values.shape} for {shape} heads and pair kinds",
    )
    require(
        list(frame(fitted, result).columns) == list(fitted.get_feature_names_out()),
        f"{bench.name}: the similarity calls its features otherwise than get_feature_names_out",
    )


@check(door("table"))
def check_extracted_first(bench: Bench) -> None:
    """Behind SubspaceExtractor in a pipeline it works, or says that it needs weights."""
    heads = bench.table()
    labels = heads["layer"].map({0: "early", 1: "late"}) if bench.supervised else None
    steps = Pipeline([("extract", SubspaceExtractor()), ("head", bench.new())])
    if "subspaces" in bench.doors:
        steps.fit(heads, labels)
        bench.apply(steps, heads)
        return
    try:
        steps.fit(heads, labels)
        bench.apply(steps, heads)
    except (ValueError, TypeError) as error:
        require(
            bench.name in str(error),
            f"{bench.name}: refuses Subspaces without naming itself: {error}",
        )
    else:
        raise AssertionError(f"{bench.name}: takes Subspaces without declaring that door")
