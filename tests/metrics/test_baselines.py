"""Baselines and the permutation test find what is there, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from toys import random_weights, registered, toy_heads

from skhead.exceptions import DegenerateHeadError, HeadShapeError
from skhead.metrics import baseline_scores, layer_permutation_score

FOLDS = StratifiedKFold(3, shuffle=True, random_state=0)


def test_layers_and_norms_are_found_where_they_tell_the_class():
    tensors = random_weights(n_layers=5, n_heads=6)
    tensors["blocks.0.attn.W_K"][:2] *= 3
    tensors["blocks.3.attn.W_K"][:2] *= 3
    tensors["blocks.4.attn.W_K"][:2] *= 3
    with registered(tensors) as heads:
        middle = np.where(heads["layer"] == 2, "middle", "None")
        large = np.where((heads["head"] < 2) & ~heads["layer"].isin([1, 2]), "large", "None")
        by_layer = baseline_scores(heads, middle, cv=FOLDS)["mean"]
        by_norm = baseline_scores(heads, large, cv=FOLDS)["mean"]
    assert by_layer["layer"] == 1.0
    assert by_layer["norm"] < 0.8
    assert by_norm["norm"] == 1.0
    assert by_norm["layer"] < 0.8
    assert by_layer.index.tolist() == ["chance", "layer", "norm"]
    assert 0.2 < by_layer["chance"] < 0.55


def test_folds_may_be_listed_or_generated():
    with toy_heads() as heads:
        y = (heads["head"] % 2).to_numpy()
        for score in (
            lambda cv: baseline_scores(heads, y, cv=cv, scoring="accuracy").to_numpy(),
            lambda cv: layer_permutation_score(
                make_pipeline(FunctionTransformer(columns), LogisticRegression()),
                heads, y, cv=cv, scoring="accuracy", n_permutations=3,
            ).null_scores,
        ):  # fmt: skip
            listed = list(FOLDS.split(heads, y))
            np.testing.assert_array_equal(score(iter(listed)), score(listed))


def test_a_stack_has_no_layers():
    stack = torch.randn(20, 4, 12, 3, generator=torch.Generator().manual_seed(0))
    found = baseline_scores(stack, np.arange(20) % 2, cv=2, scoring="accuracy")
    assert found.index.tolist() == ["chance", "norm"]


def test_a_zero_matrix_has_no_norm():
    tensors = random_weights(n_layers=2)
    tensors["blocks.1.attn.W_V"][2] = 0
    with registered(tensors) as heads, pytest.raises(DegenerateHeadError, match="L1H2 W_V is zero"):
        baseline_scores(heads, heads["head"] % 2, cv=2)


def columns(heads):
    return heads[["layer", "head"]].to_numpy(dtype=float)


def test_layers_alone_are_not_significant_and_heads_are():
    """Exchanged within layers, labels keep what the layer tells."""
    model = make_pipeline(FunctionTransformer(columns), LogisticRegression(C=100))
    with toy_heads(n_layers=4, n_heads=8) as heads:
        deep = np.where((heads["layer"] >= 2) & (heads.index != "L3H7"), "deep", "None")
        first = np.where(heads["head"] < 3, "first", "None")
        options = {"cv": FOLDS, "n_permutations": 49, "random_state": 0}
        by_layer = layer_permutation_score(model, heads, deep, **options)
        by_head = layer_permutation_score(model, heads, first, **options, n_jobs=2)
    assert by_layer.score > 0.9
    assert by_layer.p_value > 0.05
    assert by_head.score > 0.95
    assert by_head.p_value == pytest.approx(1 / 50)
    assert len(by_head.null_scores) == 49
    assert by_head.null_scores.max() < by_head.score


def test_permutations_are_reproducible_and_checked():
    with toy_heads() as heads:
        y = heads["head"].to_numpy() % 2
        options = {"cv": 2, "scoring": "accuracy", "n_permutations": 5}
        model = DummyClassifier(strategy="stratified", random_state=0)
        first, second = (layer_permutation_score(model, heads, y, **options) for _ in range(2))
        np.testing.assert_array_equal(first.null_scores, second.null_scores)
        with pytest.raises(
            HeadShapeError, match=r"12 heads need as many labels, got shape \(11,\)"
        ):
            layer_permutation_score(model, heads, y[1:], cv=2)
        with pytest.raises(ValueError, match="every layer has heads of one class only"):
            layer_permutation_score(model, heads, heads["layer"], cv=2)
        with pytest.raises(
            ValueError, match="n_permutations must be an integer of at least 1; got 0"
        ):
            layer_permutation_score(model, heads, y, cv=2, n_permutations=0)


def test_a_score_that_is_undefined_has_no_p_value():
    """No comparison with nan is true, so that any number of permutations would be significant."""

    def undefined_without_both(estimator, X, y):
        return 0.5 if len(set(y)) == 2 else float("nan")

    with toy_heads() as heads:
        y = np.where(heads.index == "L1H2", "one", "None")
        folds = [(np.arange(12), heads["layer"].to_numpy() == layer) for layer in range(3)]
        with pytest.raises(
            ValueError, match=r"layer_permutation_score: the score of fold 0 is nan"
        ):
            layer_permutation_score(
                DummyClassifier(), heads, y, cv=folds, scoring=undefined_without_both
            )
