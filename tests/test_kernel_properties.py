"""What holds of every kernel, on heads of any shape: against naive references in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from skhead import (
    CompositionScore,
    GrassmannDistance,
    LinearCKA,
    ProcrustesSimilarity,
    ProjectionKernel,
    SimpleComposition,
    SpectrumSimilarity,
)
from skhead.exceptions import MemoryBudgetError

#: Largest error of a kernel of float32 heads, in units of its largest value.
ERROR = 5e-5


def basis(x):
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-5 * s[0]]


def overlap(x, y):
    return np.square(basis(x).T @ basis(y)).sum()


def smaller(x, y):
    return min(basis(x).shape[1], basis(y).shape[1])


def of_rank(x, y):
    return overlap(x, y) / smaller(x, y)


def of_cosine(x, y):
    return overlap(x, y) / np.sqrt(basis(x).shape[1] * basis(y).shape[1])


def by_angles(x, y, measure):
    return measure(scipy.linalg.subspace_angles(basis(x), basis(y)))


def procrustes(x, y):
    return np.linalg.norm(x.T @ y, "nuc") / (np.linalg.norm(x) * np.linalg.norm(y))


def cka(x, y):
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return np.square(x.T @ y).sum() / scale


def simple(x, y):
    return np.linalg.norm(x.T @ y) / (np.linalg.norm(x) * np.linalg.norm(y))


def spectrum(x, y):
    a, b = (np.linalg.svd(z, compute_uv=False) for z in (x, y))
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


ANGLES = {
    "chordal": lambda t: np.sqrt(np.sin(t) @ np.sin(t)),
    "geodesic": lambda t: np.sqrt(t @ t),
    "procrustes": lambda t: 2 * np.sqrt(np.square(np.sin(t / 2)).sum()),
    "binet-cauchy": lambda t: np.sqrt(max(1 - np.square(np.cos(t)).prod(), 0.0)),
    "max-angle": np.max,
}
KERNELS = {
    "pk": (ProjectionKernel(), overlap),
    "pk/rank": (ProjectionKernel(normalize="rank"), of_rank),
    "pk/cosine": (ProjectionKernel(normalize="cosine"), of_cosine),
    "procrustes": (ProcrustesSimilarity(), procrustes),
    "cka": (LinearCKA(), cka),
    "simple": (SimpleComposition(), simple),
    "spectrum": (SpectrumSimilarity(), spectrum),
    **{
        f"distance/{metric}": (
            GrassmannDistance(metric=metric),
            partial(by_angles, measure=measure),
        )
        for metric, measure in ANGLES.items()
    },
}
#: Kernels of subspaces, which no change of basis of a head space moves.
OF_SUBSPACES = [name for name in KERNELS if name.startswith(("pk", "distance"))]
every_kernel = pytest.mark.parametrize("name", KERNELS)


@st.composite
def heads(draw, roles=None):
    """Matrices of a few heads, of unequal gains, some of them of lower rank than wide."""
    n_heads, width = draw(st.integers(2, 5)), draw(st.integers(1, 5))
    d_model = draw(st.integers(width + 1, 24))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = (n_heads, d_model, width) if roles is None else (n_heads, roles, d_model, width)
    stack = generator.normal(size=shape) * np.linspace(0.3, 2.0, width)
    if draw(st.booleans()) and width > 1:
        stack[0, ..., -1] = stack[0, ..., 0]
    return stack.astype(np.float32)


def values(name, stack, **parameters):
    kernel = KERNELS[name][0] if isinstance(name, str) else name
    found = kernel.set_params(**parameters).fit_transform(stack).values
    return found[..., 0].astype(np.float64) if isinstance(name, str) else found.astype(np.float64)


def gap(first, second):
    """Largest difference, both being undefined in the same places."""
    assert np.array_equal(np.isnan(first), np.isnan(second))
    return np.nanmax(np.abs(first - second))


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def tolerance(name, found):
    """Small angles are square roots of what rounding leaves."""
    loose = 20 if name.startswith("distance") else 1
    return loose * ERROR * max(1.0, np.nanmax(np.abs(found)))


@every_kernel
@given(stack=heads())
def test_kernel_agrees_with_a_naive_reference(name, stack):
    found = values(name, stack)
    wide = stack.astype(np.float64)
    measure = KERNELS[name][1]
    expected = np.array([[measure(x, y) for y in wide] for x in wide])
    np.fill_diagonal(expected, np.nan)
    assert gap(found, expected) < tolerance(name, found)


@every_kernel
@given(stack=heads(), seed=st.integers(0, 99))
def test_kernel_is_symmetric_and_follows_the_order_of_heads(name, stack, seed):
    found = values(name, stack)
    order = np.random.default_rng(seed).permutation(len(stack))
    assert gap(found, found.T) < tolerance(name, found)
    permuted = values(name, stack[order])
    assert gap(found[np.ix_(order, order)], permuted) < tolerance(name, found)


@every_kernel
@given(stack=heads(), seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 0.1, 1e5]))
def test_kernel_does_not_depend_on_rotations_or_scale(name, stack, seed, scale):
    found = values(name, stack)
    rotated = orthogonal(stack.shape[1], seed) @ stack
    assert gap(found, values(name, rotated.astype(np.float32))) < tolerance(name, found)
    turned = stack @ orthogonal(stack.shape[2], seed)
    assert gap(found, values(name, turned.astype(np.float32))) < tolerance(name, found)
    scaled = stack * np.float32(scale)
    assert gap(found, values(name, scaled)) < tolerance(name, found)


@pytest.mark.parametrize("name", OF_SUBSPACES)
@given(stack=heads(), seed=st.integers(0, 99))
def test_subspaces_do_not_depend_on_the_basis_of_the_head_space(name, stack, seed):
    width = stack.shape[2]
    change = orthogonal(width, seed) * np.linspace(0.5, 2.0, width)
    found = values(name, stack)
    assert gap(found, values(name, (stack @ change).astype(np.float32))) < tolerance(name, found)


@every_kernel
@given(stack=heads())
def test_kernel_keeps_its_bounds(name, stack):
    found = values(name, stack)
    d_model = stack.shape[1]
    least, most = np.zeros_like(found), np.ones_like(found)
    ranks = np.array([basis(x.astype(np.float64)).shape[1] for x in stack])
    fewer = np.minimum.outer(ranks, ranks)
    if name == "pk":
        least, most = np.maximum(np.add.outer(ranks, ranks) - d_model, 0), fewer
    elif name.startswith("distance"):
        most = {
            "chordal": np.sqrt(fewer),
            "geodesic": np.pi / 2 * np.sqrt(fewer),
            "procrustes": np.sqrt(2 * fewer),
            "binet-cauchy": np.ones_like(found),
            "max-angle": np.full_like(found, np.pi / 2),
        }[name.partition("/")[2]]
    defined = ~np.isnan(found)
    slack = tolerance(name, found)
    assert (found >= least - slack)[defined].all()
    assert (found <= most + slack)[defined].all()


@pytest.mark.parametrize("name", ["pk", "procrustes", "cka", "simple", "distance/geodesic"])
@given(stack=heads())
def test_memory_budget_changes_no_value(name, stack):
    """From the smallest budget, a power of two, that is enough for a piece of the work."""
    small = None
    for power in range(8, 24):
        try:
            small = values(name, stack, max_memory=2**power)
            break
        except MemoryBudgetError:
            continue
        finally:
            KERNELS[name][0].set_params(max_memory="1GiB")
    large = values(name, stack)
    assert gap(small, large) < tolerance(name, large)


@given(stack=heads(roles=4), seed=st.integers(0, 99))
def test_composition_agrees_with_dense_maps_and_keeps_its_invariances(stack, seed):
    q, k, v, o = stack.astype(np.float64).transpose(1, 0, 2, 3)
    ov, qk = v @ o.transpose(0, 2, 1), q @ k.transpose(0, 2, 1)
    readers = (qk, qk.transpose(0, 2, 1), ov)
    found = values(CompositionScore(), stack)
    assert np.nanmin(found) >= 0 and np.nanmax(found) <= 1 + ERROR
    for p, reader in enumerate(readers):
        # rows of a map are what it reads, so that one head's output meets the next one's input
        through = np.linalg.norm(ov[:, None] @ reader[None], axis=(2, 3))
        sizes = np.outer(np.linalg.norm(ov, axis=(1, 2)), np.linalg.norm(reader, axis=(1, 2)))
        expected = np.where(np.isnan(found[:, :, p]), np.nan, through / sizes)
        assert gap(found[:, :, p], expected) < 10 * ERROR
    turned = orthogonal(stack.shape[2], seed) @ stack
    assert gap(found, values(CompositionScore(), turned.astype(np.float32))) < 10 * ERROR
    width = stack.shape[3]
    change = orthogonal(width, seed) * np.linspace(0.5, 2.0, width)
    gauged = np.stack(
        [q @ change, k @ np.linalg.inv(change).T, v @ change, o @ np.linalg.inv(change).T], axis=1
    )
    assert gap(found, values(CompositionScore(), gauged.astype(np.float32))) < 10 * ERROR
    order = np.random.default_rng(seed).permutation(len(stack))
    permuted = values(CompositionScore(), stack[order])
    assert gap(found[np.ix_(order, order)], permuted) < 10 * ERROR
