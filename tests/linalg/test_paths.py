"""Paths of heads and what they do to each other, against products of whole matrices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import skhead.linalg.factored as factored
from skhead.linalg.paths import (
    StreamedMaps,
    best_paths,
    erasure_statistics,
    head_maps,
    induction_statistics,
    path_reads,
    stream_dimensions,
)

D_MODEL, D_HEAD = 24, 5


def stacks(n_heads, seed=0, count=2, d_model=D_MODEL, d_head=D_HEAD):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n_heads, d_model, d_head, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]


def streamed(w_v, w_o, size=4):
    """The maps with W_O some heads at a time, in no particular order."""
    order = np.random.default_rng(0).permutation(len(w_v))
    groups = np.array_split(order, -(-len(order) // size))
    return StreamedMaps.of(w_v, lambda rows: w_o[rows], groups)


def rotation(d_model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d_model, d_model, generator=generator, dtype=torch.float64))[
        0
    ]


def forward_order(n_layers, n_heads):
    layers = np.repeat(np.arange(n_layers), n_heads)
    return layers[:, None] < layers[None, :]


def dense_score(w_v, w_o, path):
    maps = [w_v[h] @ w_o[h].T for h in path]
    return float(torch.linalg.multi_dot(maps).norm() / np.prod([m.norm() for m in maps]))


@pytest.mark.parametrize("length", [2, 3])
def test_best_paths_equal_products_of_whole_maps(length):
    w_v, w_o = stacks(9)
    allowed = forward_order(3, 3)
    steps, scores = best_paths(streamed(w_v, w_o), allowed, length, beam=1000)
    expected = {
        path: dense_score(w_v, w_o, path)
        for path in itertools.permutations(range(9), length)
        if all(allowed[a, b] for a, b in itertools.pairwise(path))
    }
    assert {tuple(path) for path in steps.tolist()} == set(expected)
    np.testing.assert_allclose(scores, [expected[tuple(p)] for p in steps.tolist()], rtol=1e-10)
    assert (np.diff(scores) <= 0).all()


def test_a_narrow_beam_extends_the_best_prefixes():
    w_v, w_o = stacks(9)
    allowed = forward_order(3, 3)
    prefixes, _ = best_paths(streamed(w_v, w_o), allowed, 2, beam=4)
    steps, scores = best_paths(streamed(w_v, w_o), allowed, 3, beam=4)
    assert {tuple(path[:2]) for path in steps.tolist()} <= {tuple(p) for p in prefixes.tolist()}
    np.testing.assert_allclose(scores, [dense_score(w_v, w_o, p) for p in steps], rtol=1e-10)


def test_no_path_visits_a_head_twice():
    w_v, w_o = stacks(4)
    steps, _ = best_paths(streamed(w_v, w_o), np.ones((4, 4), dtype=bool), 3, beam=1000)
    assert len(steps) == 4 * 3 * 2
    assert all(len(set(path)) == 3 for path in steps.tolist())


def test_random_paths_score_as_stated():
    w_v, w_o = stacks(60, d_model=40)
    _, scores = best_paths(streamed(w_v, w_o), ~np.eye(60, dtype=bool), 2, beam=10**6)
    assert np.mean(scores**2) * 40 == pytest.approx(1, rel=0.01)
    _, scores = best_paths(streamed(w_v[:40], w_o[:40]), ~np.eye(40, dtype=bool), 3, beam=10**6)
    assert np.mean(scores**2) * 40**2 == pytest.approx(1, rel=0.05)


def test_path_reads_are_products_of_maps():
    w_v, w_o = stacks(4)
    steps = np.array([[0, 1, 3], [2, 0, 1]])
    reads = path_reads(streamed(w_v, w_o), steps)
    for path, read in zip(steps, reads, strict=True):
        maps = [w_v[h] @ w_o[h].T for h in path]
        torch.testing.assert_close(read @ w_o[path[-1]].T, torch.linalg.multi_dot(maps))


def test_head_maps_are_the_maps():
    w_v, w_o = stacks(5)
    w_o[2, :, 3:] = 0
    maps = head_maps(w_v, w_o)
    whole = maps.reads @ maps.cores @ maps.writes.mT
    torch.testing.assert_close(whole, w_v @ w_o.mT)
    assert maps.freedom.tolist() == [25, 25, 15, 25, 25]


def matching_circuit(w_v, w_o, w_q, w_k, gram):
    return w_k.T @ w_o @ w_v.T @ gram @ w_q


def test_induction_statistics_equal_dense_ones():
    w_v, w_o = stacks(3)
    w_q, w_k = stacks(4, seed=1)
    root = stacks(1, seed=2, count=1, d_head=D_MODEL)[0][0]
    gram = root @ root.T
    composition, deviations = induction_statistics(head_maps(w_v, w_o), w_q, w_k, gram)
    for i, j in itertools.product(range(3), range(4)):
        ov, qk = w_v[i] @ w_o[i].T, w_q[j] @ w_k[j].T
        expected = (ov @ qk.T).norm() / (ov.norm() * qk.norm())
        assert float(composition[i, j]) == pytest.approx(float(expected))
        trace = matching_circuit(w_v[i], w_o[i], w_q[j], w_k[j], gram).trace()
        read, write = (torch.linalg.qr(side[i])[0] for side in (w_v, w_o))
        sd = ov.norm() * (read.T @ gram @ qk @ write).norm() / D_HEAD
        assert float(deviations[i, j]) == pytest.approx(float(trace / sd))


def test_deviations_have_the_law_that_is_stated():
    w_v, w_o = stacks(1)
    w_q, w_k = stacks(1, seed=1)
    left, singular, right = torch.linalg.svd(w_v[0] @ w_o[0].T)
    generator = torch.Generator().manual_seed(3)
    n_draws = 4000
    turns = (
        torch.linalg.qr(
            torch.randn(2, n_draws, D_HEAD, D_HEAD, generator=generator, dtype=torch.float64)
        )[0]
        * torch.randn(2, n_draws, 1, D_HEAD, generator=generator).sign().double()
    )
    drawn_v = left[:, :D_HEAD] @ turns[0] * singular[:D_HEAD]
    drawn_o = right[:D_HEAD].T @ turns[1]
    gram = torch.eye(D_MODEL, dtype=torch.float64)
    _, deviations = induction_statistics(head_maps(drawn_v, drawn_o), w_q, w_k, gram)
    assert float(deviations.mean()) == pytest.approx(0, abs=4 / n_draws**0.5)
    assert float(deviations.std()) == pytest.approx(1, rel=0.05)
    assert float((deviations > 2.326).double().mean()) < 0.02


def test_deviations_reach_their_bound_for_a_planted_pair():
    basis = rotation(D_MODEL)[:, :D_HEAD][None]
    other = rotation(D_MODEL, seed=1)[:, :D_HEAD][None]
    gram = torch.eye(D_MODEL, dtype=torch.float64)
    _, deviations = induction_statistics(head_maps(basis, other), basis, other, gram)
    assert float(deviations) == pytest.approx(D_HEAD)
    _, deviations = induction_statistics(head_maps(basis, -other), basis, other, gram)
    assert float(deviations) == pytest.approx(-D_HEAD)


def test_no_statistic_depends_on_the_basis_within_heads_or_of_the_stream():
    w_v, w_o = stacks(3)
    w_q, w_k = stacks(3, seed=1)
    root = stacks(1, seed=2, count=1, d_head=D_MODEL)[0][0]
    gram = root @ root.T
    inner = stacks(3, seed=4, count=1, d_model=D_HEAD)[0]
    turn = rotation(D_MODEL, seed=5)
    mixed_v, mixed_o = turn @ w_v @ inner, turn @ w_o @ torch.linalg.inv(inner).mT
    before, after = head_maps(w_v, w_o), head_maps(mixed_v, mixed_o)
    for a, b in zip(
        induction_statistics(before, w_q, w_k, gram),
        induction_statistics(after, turn @ w_q, turn @ w_k, turn @ gram @ turn.T),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        erasure_statistics(before, before), erasure_statistics(after, after), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_erasures_equal_dense_ones():
    (v1, o1), (v2, o2) = stacks(3), stacks(4, seed=1)
    cosines, gains, deviations = erasure_statistics(head_maps(v1, o1), head_maps(v2, o2))
    for i, j in itertools.product(range(3), range(4)):
        first, second = v1[i] @ o1[i].T, v2[j] @ o2[j].T
        overlap = (first @ second * first).sum()
        expected = overlap / ((first @ second).norm() * first.norm())
        assert float(cosines[i, j]) == pytest.approx(float(expected))
        assert float(gains[i, j]) == pytest.approx(float(overlap / first.norm() ** 2))
        read, write = (torch.linalg.qr(side[j])[0] for side in (v2, o2))
        sd = second.norm() * (read.T @ first.T @ first @ write).norm() / D_HEAD
        assert float(deviations[i, j]) == pytest.approx(float(overlap / sd))


def test_a_head_that_erases_another_exactly():
    w_v, w_o = stacks(1)
    basis = torch.linalg.qr(w_o[0])[0][None]
    cosines, gains, deviations = erasure_statistics(head_maps(w_v, w_o), head_maps(basis, -basis))
    assert float(cosines) == pytest.approx(-1)
    assert float(gains) == pytest.approx(-1)
    assert -D_HEAD < float(deviations) < -2


def test_small_scratch_changes_nothing(monkeypatch):
    (w_v, w_o), (w_q, w_k) = stacks(7), stacks(7, seed=1)
    gram = torch.eye(D_MODEL, dtype=torch.float64)
    allowed = ~np.eye(7, dtype=bool)

    def everything():
        maps = head_maps(w_v, w_o)
        steps, scores = best_paths(streamed(w_v, w_o), allowed, 3, 50)
        found = [*induction_statistics(maps, w_q, w_k, gram), *erasure_statistics(maps, maps)]
        return [torch.from_numpy(steps), torch.from_numpy(scores), maps.cores, *found]

    expected = everything()
    monkeypatch.setattr(factored, "_SCRATCH", 1)
    for a, b in zip(expected, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_stream_dimensions_of_shared_and_separate_subspaces():
    basis = rotation(D_MODEL)
    separate = torch.stack([basis[:, :4], basis[:, 4:8]])
    union, effective = stream_dimensions(separate)
    assert union.shape == (D_MODEL, 8)
    assert effective == pytest.approx(8)
    union, effective = stream_dimensions(torch.stack([basis[:, :4], basis[:, :4]]))
    assert union.shape == (D_MODEL, 4)
    assert effective == pytest.approx(4)
    torch.testing.assert_close(union @ union.T, basis[:, :4] @ basis[:, :4].T)
    short = torch.stack([basis[:, :4], basis[:, 4:8]])
    short[1, :, 2:] = 0
    assert stream_dimensions(short)[0].shape == (D_MODEL, 6)


def test_many_subspaces_fill_the_stream():
    bases = torch.linalg.qr(stacks(40, count=1)[0])[0]
    union, effective = stream_dimensions(bases)
    assert union.shape == (D_MODEL, D_MODEL)
    projectors = (bases @ bases.mT).sum(0)
    expected = projectors.trace() ** 2 / projectors.square().sum()
    assert effective == pytest.approx(float(expected))
