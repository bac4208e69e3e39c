"""Divergence without bins."""

from __future__ import annotations

import numpy as np
import pytest

from skhead.stats import haar_sample, nearest_neighbour_divergence


def normal(mean, sd, n, seed):
    return np.random.default_rng(seed).normal(mean, sd, n)


@pytest.mark.parametrize(
    "mean, sd, expected", [(0, 1, 0.0), (1, 1, 0.5), (0, 2, np.log(2) - 3 / 8), (2, 1.5, 1.0166)]
)
def test_normal_laws(mean, sd, expected):
    found = nearest_neighbour_divergence(normal(mean, sd, 30_000, 0), normal(0, 1, 30_000, 1))
    assert found == pytest.approx(expected, abs=0.04)


def test_more_data_come_closer():
    errors = [
        2
        - np.mean(
            [
                nearest_neighbour_divergence(normal(2, 1, n, seed), normal(0, 1, n, seed + 100))
                for seed in range(20)
            ]
        )
        for n in (50, 500, 5_000)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_scale_and_order_of_the_values_do_not_matter():
    values, reference = normal(1, 1, 500, 0), normal(0, 1, 400, 1)
    found = nearest_neighbour_divergence(values, reference)
    assert nearest_neighbour_divergence(-7 * values[::-1], -7 * reference) == pytest.approx(found)


def test_equals_the_sum_over_sorted_distances():
    values, reference, k = normal(0.5, 1, 40, 0), normal(0, 1, 30, 1), 3
    total = 0.0
    for x in reference:
        to_values = np.sort(np.abs(values - x))[k - 1]
        to_reference = np.sort(np.abs(reference - x))[k]
        total += np.log(to_values / to_reference)
    expected = total / 30 + np.log(40 / 29)
    assert nearest_neighbour_divergence(values, reference, k) == pytest.approx(expected)


def test_random_subspaces_carry_nothing():
    values, reference = (haar_sample(64, 64, 768, 9504, random_state=seed) for seed in (0, 1))
    assert abs(nearest_neighbour_divergence(values, reference)) < 0.03


def test_values_far_from_the_reference_give_a_finite_growing_answer():
    reference = normal(0, 1, 1000, 0)
    near, far = (nearest_neighbour_divergence(normal(x, 1, 1000, 1), reference) for x in (50, 500))
    assert 5 < near < far < 20
    assert far - near == pytest.approx(np.log(10), abs=0.1)


@pytest.mark.parametrize(
    "values, reference, message",
    [
        ([1.0, 2.0], np.arange(20.0), "values needs 5 points for n_neighbors=5, got 2"),
        (np.arange(20.0), [1.0, 2.0], "reference needs 6 points"),
        ([*range(9), np.nan], np.arange(20.0), "values holds a number that is not finite"),
        (np.zeros(9), np.arange(20.0), "5 values equal the reference point 0"),
        (np.arange(9.0) + 0.5, np.ones(20), "5 other reference points equal the reference point 1"),
    ],
)
def test_unusable_samples_are_refused(values, reference, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbour_divergence(values, reference)
