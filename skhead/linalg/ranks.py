"""Ranks of target tokens among the logits of heads, without sorting and without whole rows.

A rank is a count: how many tokens of the vocabulary have a larger logit than the target, and how
many a smaller one. Counts of both kinds for any number of targets come out of one pass over blocks
of logits, and with them the hits at every k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, starmap

import torch
from torch.nn.functional import pad

from skhead.linalg.precision import fast_float32_matmul, tall_product

__all__ = ["PairRanks", "PairTables", "count_above", "rank_pairs"]

#: Tokens of a block of logits.
_BLOCK = 960
#: Groups of tokens in a block, of which the extreme logits are kept.
_GROUPS = 32
_ROWS = 800
#: Rows whose logits are held whole.
_WHOLE_ROWS = 32
#: Least rounding error of float32 logits that is reckoned with, over the norms of their factors.
_LEAST_ERROR = 2.0**-24
#: Largest rounding error that is reckoned with, over the largest one of the targets.
_MARGIN = 8.0
#: Relative difference below which float64 logits are one number.
_EQUAL = 1e-12
_TINY = 1e-300
#: Numbers in one block of gathered vectors.
_GATHERED = 1 << 22
#: Undecided tokens that wait for one decision.
_CLOSE = 1 << 16
#: Pairs whose float32 logits are computed by the same product as all others, to see its error.
_PROBED = 256
#: Of the largest logits, and of the smallest.
_SIGNS = (1.0, -1.0)


def count_above(
    logits: torch.Tensor, targets: torch.Tensor, tolerance: float | torch.Tensor = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count the tokens above, below and tied with one target in every row of logits.

    Parameters
    ----------
    logits : Tensor of shape (n_rows, n_vocab)
    targets : Tensor of shape (n_rows,), int64
    tolerance : float or Tensor of shape (n_rows,), default=0.0
        Largest difference that counts as a tie.

    Returns
    -------
    above, below, ties : Tensor of shape (n_rows,), int64
        Together ``n_vocab - 1``: the target itself is none of them. The target is among the k
        largest if ``above < k``, and among the k smallest if ``below < k``; ties speak for it.
    """
    own = logits.gather(1, targets[:, None])
    slack = torch.as_tensor(tolerance, dtype=logits.dtype, device=logits.device).reshape(-1, 1)
    above = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    below = torch.zeros_like(above)
    for block in logits.split(_BLOCK, dim=1):
        above += (block > own + slack).sum(1)
        below += (block < own - slack).sum(1)
    return above, below, logits.shape[1] - 1 - above - below


@dataclass(frozen=True)
class PairTables:
    """Tables of (source row, target token) pairs, arranged for one pass over all of them.

    Attributes
    ----------
    rows, targets : Tensor of shape (n_pairs,), int64
        All tables one after the other.
    starts : tuple of int
        Where each table begins, and the end of the last.
    ks : tuple of tuple of int
        For each table, in rising order.
    order : Tensor of shape (n_rows,), int64
        Source rows by falling number of pairs.
    slots : tuple of Tensor
        The s-th one names a pair of each of the first rows in `order`, as many as have more than s.
    """

    rows: torch.Tensor
    targets: torch.Tensor
    starts: tuple[int, ...]
    ks: tuple[tuple[int, ...], ...]
    order: torch.Tensor
    slots: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls,
        tables: Sequence[tuple[torch.Tensor, torch.Tensor]],
        ks: Sequence[Sequence[int]],
        n_rows: int,
    ) -> PairTables:
        """Arrange tables.

        Parameters
        ----------
        tables : sequence of (rows, targets)
            int64, both of shape (n_pairs_of_table,).
        ks : sequence of sequence of int
            For each table, at least 1.
        n_rows : int
            Number of source rows.
        """
        rows = torch.cat([rows for rows, _ in tables])
        targets = torch.cat([targets for _, targets in tables])
        counts = torch.bincount(rows, minlength=n_rows)
        order = counts.argsort(descending=True, stable=True)
        by_row = rows.argsort(stable=True)
        first = counts.cumsum(0) - counts
        slots = []
        for slot in range(int(counts.max())):
            having = order[counts[order] > slot]
            slots.append(by_row[first[having] + slot])
        starts = [0]
        for table_rows, _ in tables:
            starts.append(starts[-1] + len(table_rows))
        rising = tuple(tuple(sorted(set(map(int, of_table)))) for of_table in ks)
        return cls(rows, targets, tuple(starts), rising, order, tuple(slots))

    def to(self, device: torch.device | str) -> PairTables:
        """Return the same tables on a device."""
        moved = (self.rows.to(device), self.targets.to(device))
        slots = tuple(slot.to(device) for slot in self.slots)
        return PairTables(*moved, self.starts, self.ks, self.order.to(device), slots)


@dataclass(frozen=True)
class PairRanks:
    """Where the targets of one table stand among the logits of their sources.

    Attributes
    ----------
    above, below, ties : Tensor of shape (n_pairs,), int64
        Tokens with a larger, a smaller and the same logit; the target itself is none of them.
    row_hits : Tensor of shape (2, n_k, n_pairs), int64
        How many of the table's targets are among the k largest (0) or smallest (1) logits of the
        i-th source.
    column_hits : Tensor of shape (2, n_k, n_pairs), int64
        For how many of the table's sources the i-th target is.
    """

    above: torch.Tensor
    below: torch.Tensor
    ties: torch.Tensor
    row_hits: torch.Tensor
    column_hits: torch.Tensor


def rank_pairs(
    read: torch.Tensor,
    write: torch.Tensor,
    unembedding: torch.Tensor,
    tables: PairTables,
    block: int = _BLOCK,
    largest_norm: float | None = None,
) -> list[PairRanks]:
    """Rank target tokens among the logits ``read write^T unembedding^T`` of one head.

    Parameters
    ----------
    read : Tensor of shape (n_rows, d_head), float64
        What the head reads of every source: ``E W_V``.
    write : Tensor of shape (d_model, d_head)
        W_O transposed.
    unembedding : Tensor of shape (n_vocab, d_model), float32
    tables : PairTables
    block : int, default=960
        Tokens whose logits are held at once; the result does not depend on it.
    largest_norm : float, optional
        Largest norm of a row of `unembedding`, if it is known.

    Returns
    -------
    list of PairRanks
        One for each table.

    Notes
    -----
    Logits are computed in float32, and those within rounding of the target's again in float64, with
    a margin of eight over the rounding errors of all targets' logits:
    `above`, `below` and `ties` are those of float64 arithmetic. Logits that differ by less than
    1e-12 of the norms of their factors are tied. A target is among the k largest if fewer than k
    tokens are strictly above it, so that ties speak for the target.
    """
    if largest_norm is None:
        largest_norm = float(torch.linalg.vector_norm(unembedding, dim=1).max())
    with fast_float32_matmul(unembedding.device):
        logits = _HeadLogits.of(read, write, unembedding, block, largest_norm)
        own = logits.exact_logits(tables.rows, tables.targets)
        logits = logits.with_error(tables, own)
        counts, extremes = logits.count(tables, own)
        found = []
        for (start, end), ks in zip(pairwise(tables.starts), tables.ks, strict=True):
            part = slice(start, end)
            above, below = counts[:, part]
            hits = logits.table_hits(
                tables.rows[part], tables.targets[part], ks, counts[:, part], extremes
            )
            found.append(PairRanks(above, below, len(unembedding) - 1 - above - below, *hits))
    return found


@dataclass(frozen=True)
class _Extremes:
    """The extreme logits of groups of tokens, by source row in the order of the tables.

    Attributes
    ----------
    places : Tensor of shape (n_rows,), int64
        Where a source row is.
    groups : tuple of Tensor of shape (n_rows, n_groups)
        The largest, and the smallest logits.
    coarse : tuple of Tensor of shape (n_rows, 32)
        The same of groups of groups.
    """

    places: torch.Tensor
    groups: tuple[torch.Tensor, torch.Tensor]
    coarse: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def empty(cls, order: torch.Tensor, n_groups: int, like: torch.Tensor) -> _Extremes:
        """Room for the extremes of rows in this order."""
        size, coarse = (len(order), n_groups), (len(order), _GROUPS)
        return cls(
            order.argsort(),
            (like.new_empty(size), like.new_empty(size)),
            (like.new_full(coarse, -torch.inf), like.new_full(coarse, torch.inf)),
        )

    def add(self, logits: torch.Tensor, top: int, block: int, n_valid: int) -> None:
        """Take in one block of logits of the rows from `top` on, and void its padding."""
        rows = slice(top, top + len(logits))
        groups = slice(block * _GROUPS, (block + 1) * _GROUPS)
        largest, smallest = (side[rows, groups] for side in self.groups)
        by_group, padding = logits.view(len(logits), -1, _GROUPS), logits[:, n_valid:]
        padding.fill_(-torch.inf)
        torch.amax(by_group, 1, out=largest)
        padding.fill_(torch.inf)
        torch.amin(by_group, 1, out=smallest)
        most, least = (side[rows] for side in self.coarse)
        torch.maximum(most, largest, out=most)
        torch.minimum(least, smallest, out=least)
        padding.fill_(torch.nan)

    def of(self, rows: torch.Tensor, side: int) -> torch.Tensor:
        """Extremes of the groups of some source rows, negative for the smallest ones."""
        return _SIGNS[side] * self.groups[side][self.places[rows]]

    def bounds(self, rows: torch.Tensor, k: int) -> torch.Tensor:
        """Lower bounds of the k-th extremes of some source rows, negative for the smallest."""
        if k > _GROUPS:
            return self.coarse[0].new_full((2, len(rows)), -torch.inf)
        largest, smallest = (side[self.places[rows]] for side in self.coarse)
        return torch.stack([largest, -smallest]).topk(k, dim=2).values[:, :, -1]


@dataclass(frozen=True)
class _Tally:
    """The pairs of a block of source rows, slot by slot, and what has been counted of them.

    Attributes
    ----------
    slots : tuple of slice
        Where the pairs of each slot are; they belong to as many first rows.
    pairs, rows, targets : Tensor of shape (n,), int64
        Rows within the block.
    high, low : Tensor of shape (n, 1)
        Logits above are clearly above the target's, and logits below clearly below.
    now : Tensor of shape (2, n)
        Tokens of the last block that are clearly above, and that are not clearly below.
    total : Tensor of shape (2, n), float64
        Those of all blocks.
    """

    slots: tuple[slice, ...]
    pairs: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    now: torch.Tensor
    total: torch.Tensor

    @classmethod
    def of(cls, tables: PairTables, top: int, high: torch.Tensor, low: torch.Tensor) -> _Tally:
        """Start to count for the rows from `top` on."""
        of_slots = [slot[top : top + _ROWS] for slot in tables.slots if len(slot) > top]
        ends = list(accumulate(map(len, of_slots), initial=0))
        pairs = torch.cat([*of_slots, tables.order[:0]])
        rows = torch.cat([torch.arange(len(slot)) for slot in of_slots] + [torch.arange(0)])
        now = high.new_zeros(2, len(pairs))
        return cls(
            tuple(starmap(slice, pairwise(ends))),
            pairs,
            rows.to(pairs.device),
            tables.targets[pairs],
            high[pairs, None],
            low[pairs, None],
            now,
            now.double(),
        )

    def add(
        self, logits: torch.Tensor, scratch: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count in a block of logits from token `start` on.

        Returns the (pair, token) pairs that float32 cannot decide.
        """
        over, not_under = self.now
        for slot in self.slots:
            n_rows = slot.stop - slot.start
            block, found = logits[:n_rows], scratch[:n_rows]
            torch.sum(torch.gt(block, self.high[slot], out=found), 1, out=over[slot])
            torch.sum(torch.ge(block, self.low[slot], out=found), 1, out=not_under[slot])
        self.total.add_(self.now)
        inside = (self.targets >= start) & (self.targets < start + logits.shape[1])
        undecided = (not_under - over > inside).nonzero().squeeze(1)
        values = logits[self.rows[undecided]]
        near = (values >= self.low[undecided]) & (values <= self.high[undecided])
        which, tokens = near.nonzero(as_tuple=True)
        return self.pairs[undecided[which]], tokens + start


@dataclass(frozen=True)
class _HeadLogits:
    """The logits of one head in factors."""

    exact: torch.Tensor
    read: torch.Tensor
    write: torch.Tensor
    unembedding: torch.Tensor
    faces: torch.Tensor
    scale: torch.Tensor
    width: int
    error: float = _LEAST_ERROR

    @classmethod
    def of(
        cls,
        read: torch.Tensor,
        write: torch.Tensor,
        unembedding: torch.Tensor,
        block: int,
        largest_norm: float,
    ) -> _HeadLogits:
        """Bring the head's output in front of the vocabulary: ``faces = unembedding write``."""
        n_vocab = len(unembedding)
        width = min(block, -(-n_vocab // _GROUPS) * _GROUPS) // _GROUPS * _GROUPS
        width = max(width, _GROUPS)
        padding = -n_vocab % width
        faces = unembedding.new_empty(n_vocab + padding, write.shape[1])
        torch.mm(unembedding, write.to(unembedding.dtype), out=faces[:n_vocab])
        faces[n_vocab:] = 0
        sizes = torch.linalg.vector_norm(read, dim=1) * torch.linalg.matrix_norm(write.double())
        scale = sizes * largest_norm
        return cls(read, read.float(), write.double(), unembedding, faces, scale, width)

    def with_error(self, tables: PairTables, own: torch.Tensor) -> _HeadLogits:
        """Return the same with the rounding error of float32 as the targets' logits show it."""
        read, faces = self.read[tables.rows], self.faces[tables.targets]
        rounded = (read * faces).sum(1)
        rounded_alike = (read[:_PROBED] @ faces[:_PROBED].T).diagonal()
        errors = torch.cat([rounded - own, rounded_alike - own[:_PROBED]]).abs()
        scale = torch.cat([self.scale[tables.rows], self.scale[tables.rows[:_PROBED]]])
        worst = float((errors / scale.clamp_min(_TINY)).max())
        return replace(self, error=max(_LEAST_ERROR, _MARGIN * worst))

    def count(self, tables: PairTables, own: torch.Tensor) -> tuple[torch.Tensor, _Extremes]:
        """Tokens above (0) and below (1) every target, and the extreme logits of the rows."""
        slack = self.error * self.scale[tables.rows]
        high, low = (own + slack).float(), (own - slack).float()
        counts = torch.zeros(2, len(own), dtype=torch.int64, device=own.device)
        n_rows, n_vocab = len(self.read), len(self.unembedding)
        extremes = _Extremes.empty(
            tables.order, len(self.faces) // self.width * _GROUPS, self.faces
        )
        size = (min(_ROWS, n_rows), self.width)
        space, scratch = self.faces.new_empty(size), self.faces.new_empty(size)
        for top in range(0, n_rows, _ROWS):
            read = self.read[tables.order[top : top + _ROWS]]
            logits = space[: len(read)]
            tally = _Tally.of(tables, top, high, low)
            close: list[tuple[torch.Tensor, torch.Tensor]] = []
            for block, start in enumerate(range(0, n_vocab, self.width)):
                torch.mm(read, self.faces[start : start + self.width].T, out=logits)
                extremes.add(logits, top, block, n_vocab - start)
                close.append(tally.add(logits, scratch, start))
                if sum(len(asked) for asked, _ in close) > _CLOSE:
                    self._settle(close, own, tables, counts)
                    close = []
            self._settle(close, own, tables, counts)
            over, not_under = tally.total.long()
            counts[0, tally.pairs] += over
            counts[1, tally.pairs] += n_vocab - not_under
        return counts, extremes

    def _settle(
        self,
        close: list[tuple[torch.Tensor, torch.Tensor]],
        own: torch.Tensor,
        tables: PairTables,
        counts: torch.Tensor,
    ) -> None:
        """Decide in float64 about tokens whose logits are within rounding of a target's."""
        if not close:
            return
        asked, tokens = (torch.cat(part) for part in zip(*close, strict=True))
        gap = self.exact_logits(tables.rows[asked], tokens) - own[asked]
        equal = _EQUAL * self.scale[tables.rows[asked]]
        counts[0].index_add_(0, asked, (gap > equal).long())
        counts[1].index_add_(0, asked, (gap < -equal).long())

    def exact_logits(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Float64 logits of single (source row, token) pairs."""
        values = self.exact.new_empty(len(rows))
        size = max(1, _GATHERED // self.unembedding.shape[1])
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            distinct, places = tokens[part].unique(return_inverse=True)
            faces = tall_product(self.unembedding[distinct].double(), self.write)
            values[part] = (self.exact[rows[part]] * faces[places]).sum(1)
        return values

    def table_hits(
        self,
        rows: torch.Tensor,
        targets: torch.Tensor,
        ks: tuple[int, ...],
        counts: torch.Tensor,
        extremes: _Extremes,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which targets of a table are among the k extreme logits of which of its sources.

        Parameters
        ----------
        counts : Tensor of shape (2, n_pairs), int64
            Tokens above and below each source's own target.

        Returns
        -------
        row_hits, column_hits : Tensor of shape (2, n_k, n_pairs), int64
        """
        n_pairs = len(rows)
        row_hits = torch.zeros(2, len(ks), n_pairs, dtype=torch.int64, device=rows.device)
        column_hits = torch.zeros_like(row_hits)
        faces = self.faces[targets].T
        slack = (2 * self.error * self.scale[rows, None]).float()
        most = min(ks[-1], len(self.unembedding))
        bounds = extremes.bounds(rows, most)
        for part in torch.arange(n_pairs, device=rows.device).split(max(1, _GATHERED // n_pairs)):
            logits = self.read[rows[part]] @ faces
            for side, sign in enumerate(_SIGNS):
                reached = (sign * logits).amax(1) + slack[part, 0]
                near = (reached >= bounds[side, part]).nonzero().squeeze(1)
                close, ranked = self._ranked(rows[part[near]], reached[near], most, side, extremes)
                near = near[close]
                pairs, signed = part[near], sign * logits[near]
                for i, k in enumerate(ks):
                    least, beyond = (ranked[:, min(k, most) - 1 + j, None] for j in range(2))
                    hits = signed > beyond + slack[pairs]
                    unsure = ~hits & (signed >= least - slack[pairs])
                    row, column = unsure.nonzero(as_tuple=True)
                    if len(row):
                        before = self._go_before(rows[pairs[row]], targets[column], sign)
                        hits[row, column] = before < k
                    hits[torch.arange(len(pairs), device=rows.device), pairs] = (
                        counts[side, pairs] < k
                    )
                    row_hits[side, i, pairs] = hits.sum(1)
                    column_hits[side, i] += hits.sum(0)
        return row_hits, column_hits

    def _go_before(self, rows: torch.Tensor, targets: torch.Tensor, sign: float) -> torch.Tensor:
        """How many tokens are above a target, or below it for a negative sign, in float64."""
        n_vocab = len(self.unembedding)
        pairs, places = (rows * n_vocab + targets).unique(return_inverse=True)
        found = torch.empty_like(pairs)
        for part in torch.arange(len(pairs), device=rows.device).split(_WHOLE_ROWS):
            row, target = pairs[part] // n_vocab, pairs[part] % n_vocab
            own, scale = self.exact_logits(row, target), self.scale[row]
            gap = sign * ((self.read[row] @ self.faces[:n_vocab].T).double() - own[:, None])
            slack = self.error * scale[:, None]
            found[part] = (gap > slack).sum(1)
            which, tokens = (gap.abs() <= slack).nonzero(as_tuple=True)
            exact = sign * (self.exact_logits(row[which], tokens) - own[which])
            found[part] += torch.bincount(which[exact > _EQUAL * scale[which]], minlength=len(row))
        return found[places]

    def _ranked(
        self,
        rows: torch.Tensor,
        reached: torch.Tensor,
        most: int,
        side: int,
        extremes: _Extremes,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``most + 1`` extreme logits of the rows that reach the last but one of them.

        As many groups of the largest extremes hold them, and the smallest of these extremes is a
        lower bound of the last. Returns which of the rows, and their logits by falling size,
        negative for the smallest ones, with minus infinity behind the last token.
        """
        n_vocab, own = len(self.unembedding), extremes.of(rows, side)
        heads, groups = own.topk(min(most + 1, own.shape[1]), dim=1)
        near = torch.arange(len(rows), device=rows.device)
        if most <= own.shape[1]:
            near = (reached >= heads[:, most - 1]).nonzero().squeeze(1)
        ranked = heads.new_empty(len(near), most + 1)
        per_group = self.width // _GROUPS
        inner = torch.arange(per_group, device=rows.device) * _GROUPS
        size = max(1, _GATHERED // (groups.shape[1] * per_group * self.faces.shape[1]))
        for part in torch.arange(len(near), device=rows.device).split(size):
            found = groups[near[part]]
            of_block = found // _GROUPS * self.width + found % _GROUPS
            tokens = (of_block[:, :, None] + inner).flatten(1)
            read = self.read[rows[near[part]]]
            logits = _SIGNS[side] * torch.einsum("nr,ntr->nt", read, self.faces[tokens])
            logits.masked_fill_(tokens >= n_vocab, -torch.inf)
            ranked[part] = pad(logits, (0, 1), value=-torch.inf).topk(most + 1, dim=1).values
        return near, ranked
