"""Affinities to classes: leave-one-out by definition, and no advantage for members."""

from __future__ import annotations

import numpy as np
import pytest

from skhead.exceptions import HeadShapeError
from skhead.stats import class_affinity
from skhead.stats.affinity import affinity_weights

N = 12


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(N, N, 3))
    members = np.zeros((N, 2), dtype=bool)
    members[:4, 0] = True
    members[4:7, 1] = True
    return values, members, np.eye(N, dtype=bool)


def reference(values, members, own, aggregate, k, contrast):
    """The definition, one number at a time."""
    found = np.full((len(values), members.shape[1], values.shape[2]), np.nan)

    def top(numbers):
        if aggregate == "mean":
            return np.mean(numbers)
        return np.mean(np.sort(numbers)[::-1][: 1 if aggregate == "max" else k])

    for i in range(len(values)):
        for c in range(members.shape[1]):
            for p in range(values.shape[2]):
                usable = ~own[i] & ~np.isnan(values[i, :, p])
                inside = values[i, members[:, c] & usable, p]
                if not len(inside):
                    continue
                if (own[i] & members[:, c]).any() or len(inside) == 1:
                    affinity = top(inside)
                else:
                    affinity = np.mean(
                        [top(np.delete(inside, left_out)) for left_out in range(len(inside))]
                    )
                outside = values[i, ~members[:, c] & usable, p]
                found[i, c, p] = affinity - (np.mean(outside) if contrast else 0.0)
    return found


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize(("aggregate", "k"), [("mean", 3), ("max", 3), ("topk", 2), ("topk", 9)])
def test_equals_its_definition(problem, aggregate, k, contrast):
    values, members, own = problem
    values[2, 5, 1] = values[7, :4, 0] = values[8, 1:4, 2] = np.nan
    expected = reference(values, members, own, aggregate, k, contrast)
    found = class_affinity(values, members, own, aggregate, k, contrast)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.isnan(found[7, 0, 0])


@pytest.mark.parametrize("aggregate", ["mean", "max", "topk"])
def test_never_looks_at_a_head_itself(problem, aggregate):
    values, members, own = problem
    before = class_affinity(values, members, own, aggregate, k=2)
    values[own] = 1e6
    np.testing.assert_array_equal(class_affinity(values, members, own, aggregate, k=2), before)


@pytest.mark.parametrize("aggregate", ["mean", "max", "topk"])
def test_members_and_others_are_measured_alike(aggregate):
    """Where similarities are noise, members of a class must not be told by their affinity."""
    rng = np.random.default_rng(1)
    members = np.arange(40)[:, None] < 4
    draws = [
        class_affinity(rng.normal(size=(40, 40, 1)), members, np.eye(40) > 0, aggregate, k=2)
        for _ in range(400)
    ]
    found = np.asarray(draws)[:, :, 0, 0]
    inside, outside = found[:, :4].ravel(), found[:, 4:].ravel()
    sd = np.sqrt(inside.var() / inside.size + outside.var() / (outside.size / 36))
    assert abs(inside.mean() - outside.mean()) < 4 * sd
    assert inside.mean() == pytest.approx(
        {"mean": 0, "max": 0.85, "topk": 0.42}[aggregate], abs=0.1
    )


def test_permuting_references_changes_nothing(problem):
    values, members, own = problem
    order = np.random.default_rng(2).permutation(N)
    found = class_affinity(values[:, order], members[order], own[:, order], "topk", 2)
    np.testing.assert_allclose(found, class_affinity(values, members, own, "topk", 2))


def test_a_constant_level_is_no_affinity(problem):
    values, members, own = problem
    found = class_affinity(values + np.arange(N)[:, None, None], members, own)
    np.testing.assert_allclose(found, class_affinity(values, members, own), atol=1e-12)


@pytest.mark.parametrize("aggregate", ["mean", "max", "topk"])
def test_weights_give_the_affinity(problem, aggregate):
    values, members, own = problem
    weights = affinity_weights(values, members[:, 1], own, aggregate, 2, True)
    assert (weights[own] == 0).all()
    np.testing.assert_allclose(
        (weights * values).sum(axis=1), class_affinity(values, members, own, aggregate, 2)[:, 1]
    )


def test_refuses_what_does_not_fit(problem):
    values, members, own = problem
    with pytest.raises(HeadShapeError, match=r"\(12, 12, 3\) and \(11, 2\)"):
        class_affinity(values, members[1:])
    with pytest.raises(HeadShapeError, match=r"own must have shape \(12, 12\), got \(11, 12\)"):
        class_affinity(values, members, own[1:])
    with pytest.raises(ValueError, match="aggregate must be one of mean, max, topk, got 'sum'"):
        class_affinity(values, members, own, "sum")
    for k in (0, 1.5, None, np.nan):
        with pytest.raises(ValueError, match=f"k must be a positive integer, got {k}"):
            class_affinity(values, members, own, "topk", k)
