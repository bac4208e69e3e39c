"""Circuits through matrices of head size against dense circuits over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch

from skhead.linalg import factored
from skhead.linalg.circuits import (
    composed_cosines,
    composed_matching,
    eigenvalue_ratios,
    paired_matching,
    phase_summaries,
    small_circuits,
    symmetric_shares,
)
from skhead.linalg.factored import map_spectra, spectrum_summaries

N_VOCAB, D_MODEL = 40, 24


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense_ratio(circuit):
    eigenvalues = torch.linalg.eigvals(circuit)
    return float(eigenvalues.sum().real / eigenvalues.abs().sum())


def test_ratio_equals_that_of_the_vocabulary_sized_circuit():
    embedding, unembedding = draw(N_VOCAB, D_MODEL), draw(N_VOCAB, D_MODEL, seed=1)
    v, o = draw(6, D_MODEL, 5, seed=2), draw(6, D_MODEL, 5, seed=3)
    found = eigenvalue_ratios(small_circuits(v, o, unembedding.T @ embedding))
    dense = [dense_ratio(embedding @ a @ b.T @ unembedding.T) for a, b in zip(v, o, strict=True)]
    assert found.tolist() == pytest.approx(dense, abs=1e-5)
    matching = eigenvalue_ratios(small_circuits(v, o, embedding.T @ embedding))
    dense = [dense_ratio(embedding @ a @ b.T @ embedding.T) for a, b in zip(v, o, strict=True)]
    assert matching.tolist() == pytest.approx(dense, abs=1e-5)


def test_the_core_defaults_to_the_stream_itself():
    v, o = draw(3, D_MODEL, 5), draw(3, D_MODEL, 5, seed=1)
    dense = [dense_ratio(a @ b.T) for a, b in zip(v, o, strict=True)]
    assert eigenvalue_ratios(small_circuits(v, o)).tolist() == pytest.approx(dense, abs=1e-5)


@pytest.mark.parametrize(
    "summary", [eigenvalue_ratios, lambda small: torch.stack(phase_summaries(small), -1)]
)
def test_summaries_depend_neither_on_the_unit_nor_on_how_heads_are_stacked(summary):
    small = draw(2, 3, 4, 4)
    single = torch.stack([torch.stack([summary(head) for head in row]) for row in small])
    for unit in (1.0, 1e-9, 1e9):
        torch.testing.assert_close(summary(unit * small), single, rtol=1e-9, atol=1e-12)


def test_planted_heads_copy_and_anti_copy_and_random_ones_scatter_around_zero():
    embedding = draw(N_VOCAB, D_MODEL)
    basis = torch.linalg.qr(draw(D_MODEL, 5, seed=4))[0]
    planted = torch.stack([basis, basis])
    signs = torch.tensor([1.0, -1.0]).double()[:, None, None]
    found = eigenvalue_ratios(small_circuits(planted, planted * signs, embedding.T @ embedding))
    assert found[0] > 0.99
    assert found[1] < -0.99
    random = eigenvalue_ratios(
        small_circuits(draw(400, 64, 8), draw(400, 64, 8, seed=1), torch.eye(64).double())
    )
    assert abs(float(random.mean())) < 0.05
    assert float(random.std()) == pytest.approx(1.5 / 8, rel=0.1)


def test_a_circuit_without_eigenvalues_has_ratio_zero_and_neutral_phase():
    nilpotent = torch.zeros(2, 3, 3).double()
    nilpotent[1, 0, 1] = 5.0
    assert eigenvalue_ratios(nilpotent).tolist() == [0.0, 0.0]
    positive, phase = phase_summaries(nilpotent)
    assert positive.tolist() == [0.0, 0.0]
    assert phase.tolist() == [0.5, 0.5]


def test_phases_of_known_spectra():
    small = torch.stack([torch.eye(4), -torch.eye(4), torch.diag(torch.tensor([3.0, 1, -1, -1]))])
    positive, phase = phase_summaries(small)
    assert positive.tolist() == [1.0, 0.0, 0.5]
    assert phase.tolist() == pytest.approx([0.0, 1.0, 2 / 6])
    turning = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    assert phase_summaries(turning)[1].tolist() == pytest.approx([0.5])


def test_symmetric_share_equals_dense():
    q, k = draw(4, D_MODEL, 5), draw(4, D_MODEL, 5, seed=1)
    maps = q @ k.mT
    symmetric = (maps + maps.mT) / 2
    dense = symmetric.square().sum((1, 2)) / maps.square().sum((1, 2))
    assert symmetric_shares(q, k).tolist() == pytest.approx(dense.tolist())
    assert symmetric_shares(q, q).tolist() == pytest.approx([1.0] * 4)
    a, b = q[..., :2], q[..., 2:4]
    turned = symmetric_shares(torch.cat([a, b], -1), torch.cat([b, -a], -1))
    assert turned.tolist() == pytest.approx([0.0] * 4, abs=1e-12)


@pytest.mark.parametrize("ranks", [(4, 6), (6, 4), (5, 5)])
def test_composed_matching_equals_dense(ranks):
    r_1, r_2 = ranks
    embedding = draw(N_VOCAB, D_MODEL)
    q, k = draw(3, D_MODEL, r_2, seed=1), draw(3, D_MODEL, r_2, seed=2)
    v, o = draw(2, D_MODEL, r_1, seed=3), draw(2, D_MODEL, r_1, seed=4)
    found = composed_matching(q, k, v, o, embedding.T @ embedding)
    assert found.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            dense = embedding @ q[j] @ (v[i] @ o[i].T @ k[j]).T @ embedding.T
            assert float(found[i, j]) == pytest.approx(dense_ratio(dense), abs=1e-5)


def test_composed_matching_in_small_pieces_is_the_same(monkeypatch):
    q, k, v, o = (draw(5, D_MODEL, 4, seed=s) for s in range(4))
    gram = draw(D_MODEL, D_MODEL, seed=5)
    whole, cosines = (f(q, k, v, o, gram) for f in (composed_matching, composed_cosines))
    monkeypatch.setattr(factored, "_SCRATCH", 1)
    torch.testing.assert_close(composed_matching(q, k, v, o, gram), whole)
    torch.testing.assert_close(composed_cosines(q, k, v, o, gram), cosines)


def test_paired_matching_is_an_entry_of_all_pairs():
    q, k, v, o = (draw(4, D_MODEL, 5, seed=s) for s in range(4))
    gram = draw(N_VOCAB, D_MODEL, seed=5)
    gram = gram.T @ gram
    every = composed_matching(q, k, v, o, gram)
    earlier, later = torch.tensor([0, 2, 2]), torch.tensor([1, 1, 3])
    found = paired_matching((gram @ q)[later], k[later], v[earlier], o[earlier])
    torch.testing.assert_close(found, every[earlier, later])


def test_composed_cosines_equal_dense():
    q, k, v, o = (draw(3, D_MODEL, 5, seed=s) for s in range(4))
    gram = draw(D_MODEL, D_MODEL, seed=5)
    found = composed_cosines(q, k, v, o, gram)
    moved, matched = v @ o.mT, gram @ q @ k.mT
    for i in range(3):
        for j in range(3):
            dense = (moved[i] * matched[j]).sum() / (moved[i].norm() * matched[j].norm())
            assert float(found[i, j]) == pytest.approx(float(dense), abs=1e-12)


def test_an_induction_pair_has_matching_one_and_the_largest_cosine():
    """Head 1 moves tokens to other directions, where the keys of head 2 find them."""
    basis = torch.linalg.qr(draw(D_MODEL, 10))[0]
    tokens, moved = basis[:, :5], basis[:, 5:]
    embedding = draw(N_VOCAB, 5, seed=1) @ tokens.T
    v, o = draw(4, D_MODEL, 5, seed=2), draw(4, D_MODEL, 5, seed=3)
    v[1], o[1] = tokens, moved
    gram = embedding.T @ embedding
    found = composed_matching(tokens[None], moved[None], v, o, gram)[:, 0]
    assert float(found[1]) > 0.999
    assert found[[0, 2, 3]].abs().max() < 0.99
    assert int(composed_cosines(tokens[None], moved[None], v, o, gram)[:, 0].argmax()) == 1


def test_ratios_do_not_depend_on_the_basis_of_the_stream_or_of_the_heads():
    embedding = draw(N_VOCAB, D_MODEL)
    stacks = [draw(3, D_MODEL, 5, seed=s) for s in range(4)]
    turn = torch.linalg.qr(draw(D_MODEL, D_MODEL, seed=9))[0]
    inner = draw(5, 5, seed=8)
    q, k, v, o = (turn @ stack for stack in stacks)
    q, k = q @ inner, k @ torch.linalg.inv(inner).T
    turned = embedding @ turn.T
    torch.testing.assert_close(
        composed_matching(q, k, v, o, turned.T @ turned),
        composed_matching(*stacks, embedding.T @ embedding),
    )


def test_spectra_equal_a_dense_decomposition():
    left, right = draw(4, D_MODEL, 5), draw(4, D_MODEL, 5, seed=1)
    left[2, :, 3] = left[2, :, 1]
    dense = torch.linalg.svdvals(left @ right.mT)[:, :5]
    torch.testing.assert_close(map_spectra(left, right), dense, atol=1e-6, rtol=1e-8)


def test_summaries_of_known_spectra():
    summary = spectrum_summaries(torch.tensor([[1.0, 1, 1, 1], [3.0, 0, 0, 0], [2.0, 2, 0, 0]]))
    assert summary.effective_rank.tolist() == pytest.approx([4, 1, 2])
    assert summary.stable_rank.tolist() == pytest.approx([4, 1, 2])
    assert summary.entropy.tolist() == pytest.approx([1, 0, 0.5])
    assert spectrum_summaries(torch.tensor([[7.0]])).entropy.tolist() == [0.0]
