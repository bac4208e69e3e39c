"""Ranks by counting, against sorting in float64."""

from __future__ import annotations

import pytest
import torch

from skhead.linalg.ranks import PairTables, count_above, rank_pairs

KS = ((1, 3, 10), (10,), (2, 700))


def _problem(n_vocab, n_rows=50, d_model=24, d_head=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    read = torch.randn(n_rows, d_head, generator=generator, dtype=torch.float64)
    write = torch.randn(d_model, d_head, generator=generator)
    unembedding = torch.randn(n_vocab, d_model, generator=generator)
    unembedding[n_vocab // 2] = unembedding[1] = unembedding[0]
    tables = [
        (
            torch.randint(0, n_rows, (size,), generator=generator),
            torch.randint(0, n_vocab, (size,), generator=generator),
        )
        for size in (30, 60, 5)
    ]
    tables[1][1][:5] = 0
    return read, write, unembedding, tables


def _by_sorting(read, write, unembedding, rows, targets, ks):
    logits = read @ write.double().T @ unembedding.double().T
    own = logits[rows, targets][:, None]
    above, below = (logits[rows] > own + 1e-10).sum(1), (logits[rows] < own - 1e-10).sum(1)
    hits = torch.zeros(2, len(ks), len(rows), len(rows), dtype=torch.bool)
    for i, sign in enumerate((1, -1)):
        ordered = (sign * logits[rows]).sort(dim=1, descending=True).values
        for j, k in enumerate(ks):
            least = ordered[:, min(k, logits.shape[1]) - 1, None]
            hits[i, j] = sign * logits[rows][:, targets] >= least - 1e-10
    return above, below, hits


@pytest.mark.parametrize("n_vocab", [7, 40, 512, 5000])
@pytest.mark.parametrize("block", [32, 96, 960])
def test_counts_and_hits_equal_sorting_at_any_block(n_vocab, block):
    read, write, unembedding, tables = _problem(n_vocab)
    arranged = PairTables.of(tables, KS, len(read))
    found = rank_pairs(read, write, unembedding, arranged, block)
    for ranks, (rows, targets), ks in zip(found, tables, KS, strict=True):
        above, below, hits = _by_sorting(read, write, unembedding, rows, targets, ks)
        torch.testing.assert_close(ranks.above, above)
        torch.testing.assert_close(ranks.below, below)
        torch.testing.assert_close(ranks.ties, n_vocab - 1 - above - below)
        torch.testing.assert_close(ranks.row_hits, hits.sum(3))
        torch.testing.assert_close(ranks.column_hits, hits.sum(2))


def test_rows_of_several_blocks():
    """One table asks for every row, and some of them twice."""
    read, write, unembedding, _ = _problem(40, n_rows=1700)
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat([torch.randperm(1700, generator=generator), torch.arange(0, 1700, 9)])
    targets = torch.randint(0, 40, rows.shape, generator=generator)
    arranged = PairTables.of([(rows, targets)], [(3,)], len(read))
    (ranks,) = rank_pairs(read, write, unembedding, arranged)
    above, below, hits = _by_sorting(read, write, unembedding, rows, targets, (3,))
    torch.testing.assert_close(ranks.above, above)
    torch.testing.assert_close(ranks.below, below)
    torch.testing.assert_close(ranks.row_hits, hits.sum(3))
    torch.testing.assert_close(ranks.column_hits, hits.sum(2))


def test_twins_of_the_target_are_ties():
    read, write, unembedding, tables = _problem(512)
    ranks = rank_pairs(read, write, unembedding, PairTables.of(tables, KS, len(read)))[1]
    assert ranks.ties[:5].tolist() == [2] * 5
    assert ranks.ties[5:].max() <= 2


def test_float64_decides_what_float32_cannot():
    """Logits that differ by 1e-9 of their size are ranked, at any size of block."""
    generator = torch.Generator().manual_seed(0)
    read = torch.ones(1, 2, dtype=torch.float64)
    write = torch.eye(2)
    steps = torch.arange(64, dtype=torch.float64)[torch.randperm(64, generator=generator)]
    unembedding = torch.stack([torch.ones(64), (steps * 2e-9).float()], dim=1)
    table = (torch.zeros(64, dtype=torch.int64), torch.arange(64))
    arranged = PairTables.of([table], [(1,)], 1)
    for block in (32, 64):
        ranks = rank_pairs(read, write, unembedding, arranged, block)[0]
        torch.testing.assert_close(ranks.above.double(), 63 - steps)
        torch.testing.assert_close(ranks.below.double(), steps)
        assert not ranks.ties.any()


def test_large_common_parts_do_not_blur_ranks():
    """Factors far from zero, whose float32 logits are off by more than the gaps between them."""
    read, write, unembedding, tables = _problem(5000, d_model=300, d_head=40)
    read, write, unembedding = read + 10, write + 10, unembedding + 10
    arranged = PairTables.of(tables, KS, len(read))
    for ranks, (rows, targets) in zip(
        rank_pairs(read, write, unembedding, arranged), tables, strict=True
    ):
        logits = read[rows] @ write.double().T @ unembedding.double().T
        own = logits.gather(1, targets[:, None])
        torch.testing.assert_close(ranks.above, (logits > own + 1e-6).sum(1))
        torch.testing.assert_close(ranks.below, (logits < own - 1e-6).sum(1))
    float32 = read.float() @ write.T @ unembedding.T
    rows, targets = tables[0]
    blurred = (float32[rows] > float32[rows, targets][:, None]).sum(1)
    ranks = rank_pairs(read, write, unembedding, arranged)[0]
    assert (blurred != ranks.above).any()


def test_ranks_do_not_depend_on_how_the_map_is_factored():
    read, write, unembedding, tables = _problem(512)
    change = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    arranged = PairTables.of(tables, KS, len(read))
    plain = rank_pairs(read, write.double(), unembedding, arranged)
    turned = rank_pairs(
        read @ change, write.double() @ torch.linalg.inv(change).T, unembedding, arranged
    )
    for one, other in zip(plain, turned, strict=True):
        torch.testing.assert_close(one.above, other.above)
        torch.testing.assert_close(one.row_hits, other.row_hits)


def test_negated_heads_swap_both_signs():
    read, write, unembedding, tables = _problem(512)
    arranged = PairTables.of(tables, KS, len(read))
    plain = rank_pairs(read, write, unembedding, arranged)
    negated = rank_pairs(-read, write, unembedding, arranged)
    for one, other in zip(plain, negated, strict=True):
        torch.testing.assert_close(one.above, other.below)
        torch.testing.assert_close(one.row_hits, other.row_hits.flip(0))


def test_count_above_of_whole_rows():
    logits = torch.tensor([[1.0, 2.0, 2.0, 5.0], [0.0, 0.5, 0.9, -1.0]])
    above, below, ties = count_above(logits, torch.tensor([1, 0]))
    assert (above.tolist(), below.tolist(), ties.tolist()) == ([1, 2], [1, 1], [1, 0])
    above, below, ties = count_above(logits, torch.tensor([1, 0]), torch.tensor([0.0, 0.6]))
    assert (above.tolist(), below.tolist(), ties.tolist()) == ([1, 1], [1, 1], [1, 1])
    tall = torch.arange(3.0).expand(2000, 3)
    assert [x.unique().tolist() for x in count_above(tall, torch.ones(2000).long())] == [
        [1],
        [1],
        [0],
    ]
    wide = torch.randn(3, 6000, generator=torch.Generator().manual_seed(0))
    above = count_above(wide, torch.tensor([7, 8, 9]))[0]
    order = wide.argsort(dim=1, descending=True)
    assert [order[i, a].item() for i, a in enumerate(above)] == [7, 8, 9]


def test_targets_at_the_edge_of_the_k_largest_are_told_without_whole_rows(monkeypatch):
    """A target that is the k-th itself is decided by the gap to the next one."""
    read, write, unembedding, _ = _problem(5000)
    unembedding[2500] = unembedding[1] = unembedding[0] / 2
    order = (read @ write.double().T @ unembedding.double().T).argsort(dim=1, descending=True)
    rows = torch.arange(len(read))
    tables = [(rows, order[:, place]) for place in (9, 10, -10, -11)]
    arranged = PairTables.of(tables, [(10,)] * 4, len(read))
    monkeypatch.delattr("skhead.linalg.ranks._HeadLogits._go_before")
    found = rank_pairs(read, write, unembedding, arranged)
    for ranks, (_, targets) in zip(found, tables, strict=True):
        hits = _by_sorting(read, write, unembedding, rows, targets, (10,))[2]
        torch.testing.assert_close(ranks.row_hits, hits.sum(3))
        torch.testing.assert_close(ranks.column_hits, hits.sum(2))
    places = [ranks.above.unique().tolist() for ranks in found]
    assert places == [[9], [10], [4990], [4989]]


def test_heads_that_write_alike_towards_all_tokens_have_ties_only():
    read, write, unembedding, tables = _problem(3000)
    unembedding[:] = unembedding[0]
    arranged = PairTables.of(tables[:1], KS[:1], len(read))
    (ranks,) = rank_pairs(read, write, unembedding, arranged)
    assert (ranks.ties == 2999).all() and not ranks.above.any() and not ranks.below.any()
    assert (ranks.row_hits == 30).all() and (ranks.column_hits == 30).all()
