"""Rotation of head matrices: what rotary positions do to queries and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skhead.linalg.rotary import PAIRINGS, rotate

D_MODEL, D_HEAD, N_DIMS = 12, 8, 6
FREQUENCIES = torch.tensor([1.0, 0.3, 0.02], dtype=torch.float64)


def _stack(seed, n=3, dtype=torch.float64):
    return torch.randn(
        n, D_MODEL, D_HEAD, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def _dense(offset, pairing):
    """The rotation as a matrix that acts on row vectors."""
    matrix = np.eye(D_HEAD)
    for i, frequency in enumerate(FREQUENCIES.numpy()):
        a, b = (i, i + N_DIMS // 2) if pairing == "half" else (2 * i, 2 * i + 1)
        angle = offset * frequency
        matrix[[a, a, b, b], [a, b, a, b]] = [
            np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle),
        ]  # fmt: skip
    return torch.from_numpy(matrix)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("offset", [0, 1, -3, 2.5, 1000])
def test_equals_the_dense_rotation(pairing, offset):
    stack = _stack(0)
    turned = rotate(stack, offset, FREQUENCIES, N_DIMS, pairing)
    torch.testing.assert_close(turned, stack @ _dense(offset, pairing))
    assert torch.equal(turned[..., N_DIMS:], stack[..., N_DIMS:])
    assert torch.equal(stack, _stack(0)), "the input was changed"


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_scores_depend_on_the_relative_position_alone(pairing):
    queries, keys = _stack(1), _stack(2)

    def scores(i, j):
        return rotate(queries, i, FREQUENCIES, N_DIMS, pairing) @ (
            rotate(keys, j, FREQUENCIES, N_DIMS, pairing).mT
        )

    torch.testing.assert_close(scores(9, 6), scores(3, 0))
    torch.testing.assert_close(
        scores(9, 6), rotate(queries, 3, FREQUENCIES, N_DIMS, pairing) @ keys.mT
    )
    assert not torch.allclose(scores(9, 6), scores(6, 9))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_is_orthogonal_and_adds_up(pairing):
    stack = _stack(3)
    turned = rotate(stack, 5, FREQUENCIES, N_DIMS, pairing)
    torch.testing.assert_close(turned @ turned.mT, stack @ stack.mT)
    torch.testing.assert_close(rotate(turned, -5, FREQUENCIES, N_DIMS, pairing), stack)
    torch.testing.assert_close(
        rotate(turned, 2, FREQUENCIES, N_DIMS, pairing),
        rotate(stack, 7, FREQUENCIES, N_DIMS, pairing),
    )


def test_pairings_differ_by_the_order_of_coordinates():
    stack = _stack(4)
    order = [0, 2, 4, 1, 3, 5, 6, 7]
    half = rotate(stack[..., order], 3, FREQUENCIES, N_DIMS, "half")
    adjacent = rotate(stack, 3, FREQUENCIES, N_DIMS, "adjacent")
    torch.testing.assert_close(half, adjacent[..., order])
    assert not torch.allclose(rotate(stack, 3, FREQUENCIES, N_DIMS, "half"), adjacent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_dtype_and_is_exact_far_away(dtype):
    stack = _stack(5, dtype=dtype)
    turned = rotate(stack, 1e5, FREQUENCIES, N_DIMS, "half")
    assert turned.dtype == dtype
    exact = rotate(stack.double(), 1e5, FREQUENCIES, N_DIMS, "half")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(turned.double(), exact, atol=4 * tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("n_dims", "frequencies", "pairing", "message"),
    [
        (6, FREQUENCIES, "full", "pairing must be 'half' or 'adjacent', got 'full'"),
        (5, FREQUENCIES, "half", "n_dims must be even and between 2 and d_head=8, got 5"),
        (10, FREQUENCIES, "half", "n_dims must be even and between 2 and d_head=8, got 10"),
        (0, FREQUENCIES[:0], "half", "n_dims must be even and between 2 and d_head=8, got 0"),
        (4, FREQUENCIES, "half", r"frequencies must be 2 finite numbers .* got shape \(3,\)"),
        (6, FREQUENCIES * torch.nan, "half", "frequencies must be 3 finite numbers"),
    ],
)
def test_errors(n_dims, frequencies, pairing, message):
    with pytest.raises(ValueError, match=f"rotate: {message}"):
        rotate(_stack(0), 1, frequencies, n_dims, pairing)
