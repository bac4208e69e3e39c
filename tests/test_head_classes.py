"""Head classes from weights: GPT-2 small within itself, and the zoo across models."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    LeaveOneGroupOut,
    StratifiedKFold,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline

import skhead
from skhead.metrics import (
    MacroAveragePrecision,
    baseline_scores,
    cross_val_classes,
    layer_permutation_score,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The least populated class"),
    pytest.mark.filterwarnings("ignore:.*fewer than 2 heads each"),
]
LEARNED = ("Induction", "Previous Token")


@pytest.fixture(scope="module")
def gpt2(gpt2_path):
    return skhead.load_heads(gpt2_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


def labels(name, heads):
    """Classes, backup name movers merged with name movers, and a scorer of the larger ones."""
    y = skhead.datasets.load_head_classes(name, heads)
    y = y.replace("Backup Name Mover", "Name Mover") if name == "wang2022" else y
    counts = y[y != "None"].value_counts()
    return y, MacroAveragePrecision(classes=tuple(counts.index[counts >= 3]))


def steps(cache):
    compare = make_pipeline(
        skhead.SubspaceExtractor(),
        skhead.ProjectionKernel(pairs=("QQ", "KK", "VV", "OO"), layer_order="all"),
    )
    return make_pipeline(
        skhead.WholeModelSimilarity(compare, memory=cache),
        skhead.NullCalibrator(),
        skhead.HeadClassifier(rare="none"),
    )


@pytest.mark.parametrize(("name", "figure"), [("wang2022", 0.760), ("yamagiwa2026", 0.746)])
def test_classes_of_gpt2_are_far_above_layers_norms_and_chance(gpt2, cache, name, figure):
    y, scorer = labels(name, gpt2)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    found = cross_val_score(
        steps(cache), gpt2, y, cv=folds, scoring=scorer, error_score="raise"
    ).mean()
    assert found == pytest.approx(figure, abs=0.02)
    below = baseline_scores(gpt2, y, cv=folds, scoring=scorer)["mean"]
    assert found > below.max() + 0.25


@pytest.mark.slow
@pytest.mark.parametrize(("name", "figure"), [("wang2022", 0.731), ("yamagiwa2026", 0.743)])
def test_figures_of_the_guide(gpt2, cache, name, figure):
    y, scorer = labels(name, gpt2)
    found = [
        cross_val_score(
            steps(cache), gpt2, y, scoring=scorer, error_score="raise",
            cv=StratifiedKFold(3, shuffle=True, random_state=seed),
        ).mean()
        for seed in range(5)
    ]  # fmt: skip
    assert np.mean(found) == pytest.approx(figure, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("wang2022", 0.60), ("yamagiwa2026", 0.65)])
def test_nested_search(gpt2, cache, name, least):
    """Nothing is chosen on the outer folds."""
    y, scorer = labels(name, gpt2)
    grid = {
        "wholemodelsimilarity__estimator__subspaceextractor__fold_norm": [False, True],
        "nullcalibrator__null": ["haar", "empirical"],
        "headclassifier__aggregate": ["mean", "max"],
    }
    inner = StratifiedKFold(3, shuffle=True, random_state=1000)
    search = GridSearchCV(
        steps(cache), grid, scoring=scorer, cv=inner, n_jobs=2, error_score="raise"
    )
    outer = StratifiedKFold(3, shuffle=True, random_state=0)
    assert cross_val_score(search, gpt2, y, cv=outer, scoring=scorer).mean() > least


@pytest.mark.slow
def test_heads_of_one_layer_are_told_apart(gpt2, cache):
    y, scorer = labels("wang2022", gpt2)
    found = layer_permutation_score(
        steps(cache), gpt2, y, cv=StratifiedKFold(3, shuffle=True, random_state=0),
        scoring=scorer, n_permutations=19,
    )  # fmt: skip
    assert found.p_value == pytest.approx(1 / 20)
    assert found.null_scores.mean() < 0.5 * found.score


@pytest.fixture(scope="module")
def zoo():
    found = skhead.datasets.load_head_zoo()
    y = found.target.where(found.target.isin(LEARNED), "None")
    # The scores of a head depend on no other row, so that folds may share them.
    return found, skhead.CircuitScorer().fit_transform(found.heads), y


def test_models_that_were_not_seen(zoo):
    """Above what norms reach; and nothing of it from shuffled labels."""
    found, features, y = zoo
    scorer = MacroAveragePrecision(classes=LEARNED)
    options = {"cv": GroupKFold(4), "groups": found.heads["source"], "scoring": scorer}
    score = cross_val_score(skhead.HeadClassifier(), features, y, **options)
    assert score.mean() > 0.99
    below = baseline_scores(found.heads, y, **options)["mean"]
    assert below["norm"] < 0.98 and below["layer"] < 0.75 and below["chance"] < 0.46
    rng = np.random.default_rng(0)
    noise = [
        cross_val_score(
            skhead.HeadClassifier(), features, pd.Series(rng.permutation(y), y.index), **options
        ).mean()
        for _ in range(5)
    ]
    assert np.mean(noise) == pytest.approx(below["chance"], abs=0.08)


def test_a_kind_of_positions_that_was_not_seen(zoo):
    found, features, y = zoo
    position = found.groups.str.split("-").str[0]
    score = cross_val_score(
        skhead.HeadClassifier(), features, y, cv=LeaveOneGroupOut(), groups=position,
        scoring=MacroAveragePrecision(classes=LEARNED),
    )  # fmt: skip
    assert dict(zip(sorted(set(position)), score.round(2), strict=True)) == {
        "learned": pytest.approx(0.84, abs=0.03),
        "rope": pytest.approx(1.0, abs=0.01),
    }


def test_candidates_of_one_label_set_are_in_the_other(gpt2, cache):
    """Unclassed heads that are most like induction heads, by models that have not seen them."""
    y, _ = labels("wang2022", gpt2)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    found = cross_val_classes(steps(cache), gpt2, y, cv=folds)["Induction"]
    best = found[y == "None"].nlargest(2)
    assert best.index.tolist() == ["L5H1", "L7H10"]
    np.testing.assert_allclose(best, [0.89, 0.14], atol=0.03)
    other = skhead.datasets.load_head_classes("yamagiwa2026", gpt2)
    assert (other[best.index] == "Induction").all()


@pytest.mark.parametrize(("fold_norm", "called", "right"), [(False, 0, 0), (True, 6, 5)])
def test_a_language_model_after_the_zoo(zoo, models_dir, fold_norm, called, right):
    """What the guide says of stories260k: norms must be folded to find anything."""
    source = str(models_dir / "stories260k")
    found, _, y = zoo
    scorer = skhead.CircuitScorer(fold_norm=fold_norm)
    model = skhead.HeadClassifier().fit(scorer.fit_transform(found.heads), y)
    heads = skhead.load_heads(source)
    named = set(heads.index[model.predict(scorer.fit_transform(heads)) == "Previous Token"])
    behaviour = skhead.label_heads(source)["label"]
    shown = set(behaviour.index[behaviour == "Previous Token"])
    assert (len(shown), len(named), len(named & shown)) == (8, called, right)
