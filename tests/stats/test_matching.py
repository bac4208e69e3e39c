"""The bound on hits of random matchings, against all permutations and simulated ones."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.special import gammaln

from skhead.stats.matching import matching_log_tail


def _bound(table, hits):
    return np.exp(matching_log_tail([hits], table.mean(1)[None], table.mean(0)[None])[0])


@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
def test_bound_is_never_below_the_law_of_all_permutations(density):
    rng = np.random.default_rng(int(10 * density))
    places = np.array(list(permutations(range(6))))
    for _ in range(60):
        table = rng.random((6, 6)) < density * rng.random((6, 1)) * 2
        found = table[np.arange(6), places].sum(1)
        for hits in range(1, 7):
            exact = (found >= hits).mean()
            assert _bound(table, hits) >= exact - 1e-12
            if exact == 1.0:
                assert _bound(table, hits) == pytest.approx(1.0)


def test_bound_is_close_for_rare_hits():
    rng = np.random.default_rng(0)
    table = rng.random((60, 60)) < 0.02
    drawn = np.array([table[np.arange(60), rng.permutation(60)].sum() for _ in range(40_000)])
    for hits in (3, 4, 5):
        simulated = (drawn >= hits).mean()
        assert simulated <= _bound(table, hits) <= 4 * simulated


def test_hits_that_all_sources_share_are_no_evidence():
    table = np.zeros((50, 50), dtype=bool)
    table[:, :40] = True
    assert _bound(table, 40) == pytest.approx(1.0)
    table[3, 45] = True
    assert _bound(table, 41) > 0.01
    assert _bound(table.T, 41) == _bound(table, 41)


def test_deep_tails_stay_finite_and_fall():
    n = 400
    shares = np.full((4, n), 1 / n)
    logs = matching_log_tail([10, 100, 300, 400], shares, shares)
    assert np.isfinite(logs).all()
    assert (np.diff(logs) < 0).all()
    assert logs[-1] == pytest.approx(-gammaln(n + 1), rel=1e-9)
    assert matching_log_tail([0, 1], shares[:2], shares[:2]) == pytest.approx([0, 0])


def test_shares_outside_of_range_and_shapes_raise():
    with pytest.raises(ValueError, match=r"shares must be in \[0, 1\]"):
        matching_log_tail([1], [[1.5]], [[1.0]])
    with pytest.raises(ValueError, match="as many rows of shares"):
        matching_log_tail([1, 2], [[0.5]], [[0.5]])
