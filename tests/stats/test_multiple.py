"""False discovery rates from log p-values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from skhead.stats import adjust_log_p


@pytest.mark.parametrize("method", ["bh", "by"])
def test_equals_scipy_on_ordinary_p(method):
    p = np.random.default_rng(0).uniform(size=(30, 20)) ** 3
    expected = false_discovery_control(p.ravel(), method=method).reshape(p.shape)
    np.testing.assert_allclose(np.exp(adjust_log_p(np.log(p), method)), expected, rtol=1e-12)


@given(st.lists(st.floats(-1e5, 0), min_size=1, max_size=30), st.sampled_from(["bh", "by"]))
def test_monotone_above_p_and_at_most_one(log_p, method):
    log_p = np.array(log_p)
    log_q = adjust_log_p(log_p, method)
    order = np.argsort(log_p)
    assert (np.diff(log_q[order]) >= 0).all()
    assert (log_q >= log_p - 1e-9).all()
    assert (log_q <= 0).all()


def test_depth_keeps_its_order():
    log_q = adjust_log_p([-1e5, -2e5, -np.inf, -1.0])
    np.testing.assert_allclose(log_q[:2], [-1e5 + np.log(4 / 3), -2e5 + np.log(4 / 2)], rtol=1e-15)
    assert log_q[2] == -np.inf


def test_missing_tests_do_not_count():
    full = np.log([0.01, 0.2, 0.03])
    log_q = adjust_log_p(np.array([full[0], np.nan, full[1], full[2], np.nan]))
    np.testing.assert_array_equal(log_q[[0, 2, 3]], adjust_log_p(full))
    assert np.isnan(log_q[[1, 4]]).all()
    assert adjust_log_p([np.nan]).shape == (1,)
    assert adjust_log_p([]).shape == (0,)


@pytest.mark.parametrize(
    "log_p, method, message",
    [
        ([-1.0], "holm", "method must be 'bh' or 'by', got 'holm'"),
        ([0.2], "bh", "at most 0, got 0.2"),
        ([-3.0, 0.2, np.nan], "bh", "at most 0, got 0.2"),
    ],
)
def test_bad_arguments_are_refused(log_p, method, message):
    with pytest.raises(ValueError, match=message):
        adjust_log_p(log_p, method)
