"""Ranks of target tokens among the logits of heads, without sorting and without whole rows.

A rank is a count: how many tokens of the vocabulary have a larger logit than the target, and how
many a smaller one. Counts of both kinds for any number of targets come out of one pass over blocks
of logits, and with them the hits at every k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

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
#: Blocks whose undecided tokens are kept for one decision.
_CLOSE = 16


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
    logits = _HeadLogits.of(read, write, unembedding, block, largest_norm)
    own = logits.exact_logits(tables.rows, tables.targets)
    logits = logits.with_error(tables, own)
    above, below, extremes = logits.count(tables, own)
    ties = len(unembedding) - 1 - above - below
    found = []
    for (start, end), ks in zip(pairwise(tables.starts), tables.ks, strict=True):
        part = slice(start, end)
        counts = (above[part], below[part])
        hits = [
            logits.table_hits(tables.rows[part], tables.targets[part], ks, sign, counts[i], extreme)
            for i, (sign, extreme) in enumerate(zip((1.0, -1.0), extremes, strict=True))
        ]
        row_hits, column_hits = (torch.stack(kind) for kind in zip(*hits, strict=True))
        found.append(PairRanks(above[part], below[part], ties[part], row_hits, column_hits))
    return found


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
        rounded = (self.read[tables.rows] * self.faces[tables.targets]).sum(1)
        errors = (rounded - own).abs() / self.scale[tables.rows].clamp_min(_TINY)
        return replace(self, error=max(_LEAST_ERROR, _MARGIN * float(errors.max())))

    def count(
        self, tables: PairTables, own: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Tokens above and below every target, and the extreme logits of groups of tokens.

        The extremes, ``(n_rows, n_groups)``, are the largest logits and the largest of their
        negatives.
        """
        slack = self.error * self.scale[tables.rows]
        high, low = (own + slack).float(), (own - slack).float()
        bands = (high, low)
        counts = torch.zeros(2, len(own), dtype=torch.int64, device=own.device)
        n_rows, n_vocab = len(self.read), len(self.unembedding)
        n_groups = len(self.faces) // self.width * _GROUPS
        largest = self.faces.new_empty(n_rows, n_groups)
        smallest = torch.empty_like(largest)
        size = (min(_ROWS, n_rows), self.width)
        space, scratch = self.faces.new_empty(size), self.faces.new_empty(size)
        for top in range(0, n_rows, _ROWS):
            rows = tables.order[top : top + _ROWS]
            read, logits = self.read[rows], space[: len(rows)]
            slots = [slot[top : top + len(rows)] for slot in tables.slots if len(slot) > top]
            close: list[tuple[torch.Tensor, torch.Tensor]] = []
            for start in range(0, n_vocab, self.width):
                torch.mm(read, self.faces[start : start + self.width].T, out=logits)
                groups = slice(start // self.width * _GROUPS, (start // self.width + 1) * _GROUPS)
                by_group = logits.view(len(rows), -1, _GROUPS)
                padding = logits[:, n_vocab - start :]
                padding.fill_(-torch.inf)
                largest[rows, groups] = by_group.amax(1)
                padding.fill_(torch.inf)
                smallest[rows, groups] = -by_group.amin(1)
                padding.fill_(torch.nan)
                for pairs in slots:
                    found = self._count_block(logits, scratch, pairs, start, bands, tables, counts)
                    if found is not None:
                        close.append(found)
                if len(close) > _CLOSE:
                    self._settle(close, own, tables, counts)
                    close = []
            self._settle(close, own, tables, counts)
        return counts[0], counts[1], (largest, smallest)

    def _count_block(
        self,
        logits: torch.Tensor,
        scratch: torch.Tensor,
        pairs: torch.Tensor,
        start: int,
        bands: tuple[torch.Tensor, torch.Tensor],
        tables: PairTables,
        counts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Count the tokens clearly above and below a target in the first rows of a block.

        Returns the (pair, token) pairs that float32 cannot decide, unless there are none.
        """
        block, scratch = logits[: len(pairs)], scratch[: len(pairs)]
        high, low = (band[pairs, None] for band in bands)
        over = scratch.copy_(block).gt_(high).sum(1).long()
        not_under = scratch.copy_(block).ge_(low).sum(1).long()
        counts[0, pairs] += over
        counts[1, pairs] += min(self.width, len(self.unembedding) - start) - not_under
        targets = tables.targets[pairs]
        inside = (targets >= start) & (targets < start + self.width)
        undecided = (not_under - over > inside).nonzero().squeeze(1)
        if not len(undecided):
            return None
        values = block[undecided]
        near = (values >= low[undecided]) & (values <= high[undecided])
        which, tokens = near.nonzero(as_tuple=True)
        return pairs[undecided[which]], tokens + start

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
            distinct, places = rows[part].unique(return_inverse=True)
            written = (self.exact[distinct] @ self.write.T)[places]
            values[part] = (written * self.unembedding[tokens[part]].double()).sum(1)
        return values

    def table_hits(
        self,
        rows: torch.Tensor,
        targets: torch.Tensor,
        ks: tuple[int, ...],
        sign: float,
        counts: torch.Tensor,
        extremes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which targets of a table are among the k extreme logits of which of its sources.

        Parameters
        ----------
        counts : Tensor of shape (n_pairs,), int64
            Tokens that go before each source's own target.
        extremes : Tensor of shape (n_rows, n_groups)
            Extreme logits of groups of tokens, times `sign`.

        Returns
        -------
        row_hits, column_hits : Tensor of shape (n_k, n_pairs), int64
        """
        n_pairs = len(rows)
        row_hits = torch.zeros(len(ks), n_pairs, dtype=torch.int64, device=rows.device)
        column_hits = torch.zeros_like(row_hits)
        faces = self.faces[targets].T
        size = max(1, _GATHERED // n_pairs)
        for start in range(0, n_pairs, size):
            part = slice(start, start + size)
            logits = sign * (self.read[rows[part]] @ faces)
            slack = (2 * self.error * self.scale[rows[part]]).float()
            bounds = self._bounds(rows[part], logits.amax(1) + slack, ks, sign, extremes)
            for i, k in enumerate(ks):
                gap = logits - bounds[:, i, None]
                hits = gap > slack[:, None]
                row, column = (gap.abs() <= slack[:, None]).nonzero(as_tuple=True)
                if len(row):
                    hits[row, column] = self._go_before(rows[part][row], targets[column], sign) < k
                places = torch.arange(len(hits), device=rows.device)
                hits[places, places + start] = counts[part] < k
                row_hits[i, part] = hits.sum(1)
                column_hits[i] += hits.sum(0)
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

    def _bounds(
        self,
        rows: torch.Tensor,
        reached: torch.Tensor,
        ks: tuple[int, ...],
        sign: float,
        extremes: torch.Tensor,
    ) -> torch.Tensor:
        """The k-th largest logits of rows, ``(n, n_k)``; infinite where `reached` is below them.

        The k groups of the largest extremes hold the k largest logits, and the smallest of these
        extremes is a lower bound of the k-th. Groups of groups give a lower one at less cost.
        """
        n_vocab = len(self.unembedding)
        bounds = torch.full((len(rows), len(ks)), torch.inf, device=rows.device)
        most = min(ks[-1], n_vocab)
        own, near = extremes[rows], torch.arange(len(rows), device=rows.device)
        if most <= _GROUPS:
            coarse = own.view(len(rows), -1, _GROUPS).amax(1)
            near = near[reached >= coarse.topk(most, dim=1).values[:, -1]]
        heads, groups = own[near].topk(min(most, own.shape[1]), dim=1)
        if most <= own.shape[1]:
            reaching = reached[near] >= heads[:, -1]
            near, groups = near[reaching], groups[reaching]
        per_group = self.width // _GROUPS
        inner = torch.arange(per_group, device=rows.device) * _GROUPS
        size = max(1, _GATHERED // (groups.shape[1] * per_group * self.faces.shape[1]))
        for part, found in zip(near.split(size), groups.split(size), strict=True):
            of_block = found // _GROUPS * self.width + found % _GROUPS
            tokens = (of_block[:, :, None] + inner).flatten(1)
            logits = sign * torch.einsum("nr,ntr->nt", self.read[rows[part]], self.faces[tokens])
            logits.masked_fill_(tokens >= n_vocab, -torch.inf)
            ranked = logits.topk(most, dim=1).values
            for i, k in enumerate(ks):
                bounds[part, i] = ranked[:, k - 1] if k < n_vocab else -torch.inf
        return bounds
