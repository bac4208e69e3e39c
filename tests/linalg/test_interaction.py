"""Interaction matrices of latents and their two summaries."""

from __future__ import annotations

import pytest
import torch

from skhead.linalg.interaction import cross_block_ratio, diagonal_share, interaction_matrix


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_an_entry_is_the_dot_product_of_one_query_latent_and_one_key_latent():
    w_q, w_k, asked, found = draw(12, 4), draw(12, 4, seed=1), draw(12, 3), draw(12, 5, seed=2)
    interaction = interaction_matrix(w_q, w_k, asked, found)
    assert interaction.shape == (3, 5)
    assert interaction[1, 4] == pytest.approx(float((asked[:, 1] @ w_q) @ (found[:, 4] @ w_k)))


def test_stacks_of_heads_keep_their_order_and_the_result_is_double():
    w_q, w_k, embedding = draw(6, 12, 4).float(), draw(6, 12, 4, seed=1).float(), draw(12, 3)
    stacked = interaction_matrix(w_q, w_k, embedding.float(), embedding.float())
    assert stacked.dtype == torch.float64
    one = interaction_matrix(w_q[3], w_k[3], embedding.float(), embedding.float())
    torch.testing.assert_close(stacked[3], one)
    assert diagonal_share(stacked).shape == cross_block_ratio(stacked, (1, 2)).shape == (6,)


def test_no_change_of_basis_within_the_head_matters():
    w_q, w_k, asked, found = draw(12, 4), draw(12, 4, seed=1), draw(12, 5), draw(12, 5, seed=2)
    change = draw(4, 4, seed=3)
    changed = interaction_matrix(w_q @ change, w_k @ torch.linalg.inv(change).mT, asked, found)
    torch.testing.assert_close(changed, interaction_matrix(w_q, w_k, asked, found))


def test_rank_is_at_most_that_of_the_head():
    interaction = interaction_matrix(draw(12, 4), draw(12, 4, seed=1), draw(12, 9), draw(12, 9))
    assert torch.linalg.matrix_rank(interaction) == 4


def test_summaries_of_known_matrices_do_not_depend_on_scale():
    assert float(diagonal_share(7 * torch.eye(5))) == 1
    assert float(cross_block_ratio(7 * torch.eye(5), (2, 3))) == 0
    block = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3))
    assert float(diagonal_share(-block)) == pytest.approx(5 / 13)
    assert float(cross_block_ratio(block, (2, 3))) == 0
    assert float(cross_block_ratio(1 - block, (2, 3))) == float("inf")
    assert float(cross_block_ratio(3 * torch.ones(5, 5), (2, 3))) == pytest.approx((12 / 13) ** 0.5)


def test_energies_within_and_between_add_up():
    interaction = draw(4, 8, 8)
    ratio = cross_block_ratio(interaction, (3, 4, 1)).square()
    within = interaction.square().sum((-2, -1)) / (1 + ratio)
    blocks = [slice(0, 3), slice(3, 7), slice(7, 8)]
    expected = sum(interaction[:, at, at].square().sum((-2, -1)) for at in blocks)
    torch.testing.assert_close(within, expected)


@pytest.mark.parametrize(("shape", "sizes"), [((4, 4), (2, 3)), ((4, 5), (2, 3))])
def test_blocks_must_make_up_the_matrix(shape, sizes):
    with pytest.raises(ValueError, match=r"blocks of \(2, 3\) latents .*number of latents of each"):
        cross_block_ratio(torch.ones(shape), sizes)
