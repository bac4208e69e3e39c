"""Paths through several heads, and what one head does to the output of another, as factors.

The OV maps of heads along a path multiply to ``W_V1 (W_O1 W_V2) ... W_On``: the map of a virtual
head. Everything here is computed from the ``d_head x d_head`` products in the middle. Stacks are in
residual coordinates, ``(n_heads, d_model, d_head)``, so `w_o` is W_O transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from skhead.linalg.bases import orthonormal_bases
from skhead.linalg.factored import cross_products, gram_roots, product_norms, runs
from skhead.linalg.topk import largest_entries

__all__ = [
    "HeadMaps",
    "StreamedMaps",
    "best_paths",
    "erasure_statistics",
    "head_maps",
    "induction_statistics",
    "path_reads",
    "stream_dimensions",
]

#: Share of the largest weight below which a direction is not told from rounding in float32.
_UNUSED = 1e-10


@dataclass(frozen=True)
class StreamedMaps:
    """OV maps whose W_V is in memory, and whose W_O is read some heads at a time.

    Attributes
    ----------
    w_v : Tensor of shape (n_heads, d_model, d_head)
    outputs : callable
        Takes one of `groups`, returns W_O transposed of its heads.
    groups : sequence of ndarray of int64
        Heads whose W_O is read at once; every head is in one of them.
    norms : Tensor of shape (n_heads,), float64
        Frobenius norms of the maps.
    roots : Tensor of shape (n_heads, d_head, d_head)
        From `skhead.linalg.factored.gram_roots`, of W_O.
    """

    w_v: torch.Tensor
    outputs: Callable[[NDArray[np.int64]], torch.Tensor]
    groups: Sequence[NDArray[np.int64]]
    norms: torch.Tensor
    roots: torch.Tensor

    @classmethod
    def of(
        cls,
        w_v: torch.Tensor,
        outputs: Callable[[NDArray[np.int64]], torch.Tensor],
        groups: Sequence[NDArray[np.int64]],
    ) -> StreamedMaps:
        """Read every W_O once for what is kept of it.

        Parameters
        ----------
        w_v, outputs, groups
            The attributes of these names.
        """
        n_heads, _, d_head = w_v.shape
        norms = w_v.new_empty(n_heads, dtype=torch.float64)
        roots = w_v.new_empty(n_heads, d_head, d_head)
        for rows in groups:
            at, w_o = torch.as_tensor(rows, device=w_v.device), outputs(rows)
            norms[at], roots[at] = product_norms(w_v[at], w_o), gram_roots(w_o)
        return cls(w_v, outputs, groups, norms, roots)

    def links(self, before: NDArray[np.int64], after: NDArray[np.int64]) -> torch.Tensor:
        """``W_O W_V`` of heads that follow each other, one for each place.

        Parameters
        ----------
        before, after : ndarray of shape (n_links,)

        Returns
        -------
        Tensor of shape (n_links, d_head, d_head), float64
        """
        d_head = self.w_v.shape[2]
        found = self.w_v.new_empty(len(before), d_head, d_head, dtype=torch.float64)
        for rows in self.groups:
            places = np.flatnonzero(np.isin(before, rows))
            if not places.size:
                continue
            w_o, place_of = self.outputs(rows), {int(row): i for i, row in enumerate(rows)}
            for part in runs(len(places), 3 * 8 * self.w_v[0].numel()):
                chosen = places[part]
                left = w_o[[place_of[int(head)] for head in before[chosen]]].double()
                at = torch.as_tensor(chosen, device=found.device)
                found[at] = left.mT @ self.w_v[after[chosen]].double()
        return found


def best_paths(
    maps: StreamedMaps, allowed: NDArray[np.bool_], length: int, beam: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The paths of heads whose OV maps compose most strongly.

    The score of a path is ``||W_OV1 ... W_OVn||_F / (||W_OV1||_F ... ||W_OVn||_F)``. All paths of
    length 2 are compared; each further step extends the `beam` best paths by every head.

    Parameters
    ----------
    maps : StreamedMaps
    allowed : ndarray of shape (n_heads, n_heads)
        Whether the column head may follow the row head directly.
    length : int
        Heads on a path, at least 2.
    beam : int
        Paths that are kept.

    Returns
    -------
    steps : ndarray of shape (n_paths, length), int64
        Heads along each path, by falling score; at most `beam` paths, none through a head twice.
    scores : ndarray of shape (n_paths,), float64
    """
    w_v = maps.w_v
    norms = maps.norms.to(w_v.dtype)[:, None, None]
    lefts, ends = gram_roots(w_v).mT / norms, maps.roots / norms
    steps = np.arange(len(w_v), dtype=np.int64)[:, None]
    scores = np.ones(len(w_v))
    for _ in range(length - 1):
        extended = np.full((len(steps), len(w_v)), np.nan)
        for group in maps.groups:
            if np.isin(steps[:, -1], group).any():
                _extend(extended, steps[:, -1], group, lefts, ends, maps, allowed)
        extended[np.arange(len(steps))[:, None], steps] = np.nan
        rows, columns = largest_entries(extended, beam)
        links = maps.links(steps[rows, -1], columns).to(w_v.dtype)
        lefts = lefts[rows] @ links / norms[columns]
        steps = np.concatenate([steps[rows], columns[:, None]], axis=1)
        scores = extended[rows, columns]
    return steps, scores


def _extend(
    extended: NDArray[np.float64],
    lasts: NDArray[np.int64],
    group: NDArray[np.int64],
    lefts: torch.Tensor,
    ends: torch.Tensor,
    maps: StreamedMaps,
    allowed: NDArray[np.bool_],
) -> None:
    """Fill in the scores of the paths that end in a group, extended by every head."""
    for last, w_o in zip(group, maps.outputs(group), strict=True):
        rows, following = np.flatnonzero(lasts == last), np.flatnonzero(allowed[last])
        if not rows.size:
            continue
        for part in runs(len(following), maps.w_v.element_size() * w_o.numel()):
            some = following[part]
            links = w_o.mT @ maps.w_v[some] @ ends[some]
            extended[np.ix_(rows, some)] = _extension_norms(lefts[rows], links)


def _extension_norms(lefts: torch.Tensor, links: torch.Tensor) -> NDArray[np.float64]:
    """``||left_i link_j||_F`` for all paths i and all heads j that may follow."""
    (n_paths, r, _), (n_links, _, s) = lefts.shape, links.shape
    flat = links.permute(1, 0, 2).reshape(r, n_links * s)
    parts = []
    for some in runs(n_paths, lefts.element_size() * r * n_links * s):
        product = (lefts[some].reshape(-1, r) @ flat).view(-1, r, n_links, s)
        parts.append(product.double().square().sum((1, 3)).sqrt())
    norms: NDArray[np.float64] = torch.cat(parts).cpu().numpy()
    return norms


def path_reads(maps: StreamedMaps, steps: NDArray[np.int64]) -> torch.Tensor:
    """What virtual heads read: ``W_V1 (W_O1 W_V2) ... (W_On-1 W_Vn)``; they write as the last does.

    Parameters
    ----------
    maps : StreamedMaps
    steps : ndarray of shape (n_paths, length)
        Heads along each path.

    Returns
    -------
    Tensor of shape (n_paths, d_model, d_head), float64
    """
    reads = maps.w_v[torch.as_tensor(steps[:, 0], device=maps.w_v.device)].double()
    for before, after in zip(steps.T[:-1], steps.T[1:], strict=True):
        reads = reads @ maps.links(before, after)
    return reads


@dataclass(frozen=True)
class HeadMaps:
    """OV maps as ``reads core writes^T`` between orthonormal bases.

    Attributes
    ----------
    reads, writes : Tensor of shape (n_heads, d_model, d_head)
        Orthonormal columns; those past the rank are zero.
    cores : Tensor of shape (n_heads, d_head, d_head), float64
    freedom : Tensor of shape (n_heads,), float64
        Product of the dimensions that are read and written.
    """

    reads: torch.Tensor
    cores: torch.Tensor
    writes: torch.Tensor
    freedom: torch.Tensor

    def take(self, rows: slice | NDArray[np.int64]) -> HeadMaps:
        """The maps of some of the heads."""
        at = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=self.reads.device)
        return HeadMaps(self.reads[at], self.cores[at], self.writes[at], self.freedom[at])


def head_maps(w_v: torch.Tensor, w_o: torch.Tensor) -> HeadMaps:
    """Bring the OV maps of heads into a form that no basis within the head changes.

    Parameters
    ----------
    w_v, w_o : Tensor of shape (n_heads, d_model, d_head)

    Returns
    -------
    HeadMaps
        Its bases have the dtype of `w_v`.
    """
    reads, writes = orthonormal_bases(w_v), orthonormal_bases(w_o)
    cores = [
        (reads.vectors[rows].double().mT @ w_v[rows].double())
        @ (w_o[rows].double().mT @ writes.vectors[rows].double())
        for rows in runs(len(w_v), 3 * 8 * w_v[0].numel())
    ]
    freedom = (reads.ranks * writes.ranks).double().to(w_v.device)
    return HeadMaps(reads.vectors, torch.cat(cores), writes.vectors, freedom)


def induction_statistics(
    maps: HeadMaps, w_q: torch.Tensor, w_k: torch.Tensor, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K-composition of all pairs of heads, and how far their matching exceeds that of chance.

    The matching statistic is the trace of the circuit ``E W_Q2 (W_OV1 W_K2)^T E^T``. Chance is an
    OV map that reads and writes the same subspaces with the same singular values, rotated at random
    in between: ``reads R core R' writes^T`` with independent Haar rotations R and R'. The mean is
    then 0 and the standard deviation ``||core||_F ||reads^T E^T E W_Q2 W_K2^T writes||_F /
    sqrt(r_V r_O)``.

    Parameters
    ----------
    maps : HeadMaps
        Of the n_1 earlier heads.
    w_q, w_k : Tensor of shape (n_2, d_model, d_head)
        Of the later heads.
    gram : Tensor of shape (d_model, d_model)
        ``E^T E`` of the token embedding.

    Returns
    -------
    composition : Tensor of shape (n_1, n_2), float64
        ``||W_OV1 W_K2 W_Q2^T||_F / (||W_OV1||_F ||W_Q2 W_K2^T||_F)``.
    deviations : Tensor of shape (n_1, n_2), float64
        The trace in standard deviations, at most ``sqrt(r_V r_O)`` in size.
    """
    w_q, w_k = w_q.double(), w_k.double()
    queries, roots, sizes = gram.double() @ w_q, gram_roots(w_q), product_norms(w_q, w_k)
    width = maps.cores.shape[1]
    each = 4 * 8 * len(w_k) * width * max(width, w_k.shape[2])
    parts = []
    for rows in runs(len(maps.cores), each):
        some = maps.take(rows)
        written = cross_products(some.writes.double(), w_k)
        composed = torch.linalg.matrix_norm(some.cores[:, None] @ written @ roots)
        composed = composed / (torch.linalg.matrix_norm(some.cores)[:, None] * sizes)
        inner = cross_products(some.reads.double(), queries) @ written.mT
        parts.append(torch.stack([composed, _deviations(some, inner)]))
    composition, deviations = torch.cat(parts, dim=1)
    return composition, deviations


def erasure_statistics(
    earlier: HeadMaps, later: HeadMaps
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How much of what one head writes another removes by reading it.

    Parameters
    ----------
    earlier, later : HeadMaps
        Of n_1 and n_2 heads.

    Returns
    -------
    cosines : Tensor of shape (n_1, n_2), float64
        ``<W_OV1 W_OV2, W_OV1> / (||W_OV1 W_OV2||_F ||W_OV1||_F)``.
    gains : Tensor of shape (n_1, n_2), float64
        ``<W_OV1 W_OV2, W_OV1> / ||W_OV1||_F^2``: -1 where the output is removed whole, 1 where it
        is doubled.
    deviations : Tensor of shape (n_1, n_2), float64
        The gain in standard deviations of its law when the later map is rotated at random between
        what it reads and what it writes, as in `induction_statistics`.
    """
    written = earlier.writes.double() @ earlier.cores.mT
    sizes = torch.linalg.matrix_norm(earlier.cores)
    each = 4 * 8 * len(sizes) * written.shape[2] * max(written.shape[2], later.cores.shape[1])
    parts = []
    for rows in runs(len(later.cores), each):
        some = later.take(rows)
        read, returned = (
            cross_products(bases.double(), written) for bases in (some.reads, some.writes)
        )
        inner = read @ returned.mT
        overlap = (some.cores[:, None] * inner).sum((-2, -1))
        through = torch.linalg.matrix_norm(read.mT @ some.cores[:, None])
        found = (overlap / (through * sizes), overlap / sizes**2, _deviations(some, inner))
        parts.append(torch.stack(found))
    cosines, gains, deviations = torch.cat(parts, dim=1).mT
    return cosines, gains, deviations


def stream_dimensions(bases: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The space that several subspaces span together, and how evenly they fill it.

    Parameters
    ----------
    bases : Tensor of shape (n_heads, d_model, rank)
        Orthonormal columns; those past a head's rank are zero.

    Returns
    -------
    union : Tensor of shape (d_model, dimension), float64
        Orthonormal basis of the span. Directions with less than 1e-10 of the largest weight in the
        sum of projectors are not told from rounding, and not counted.
    effective : float
        Participation ratio of the sum of projectors: its squared trace over the trace of its
        square.
    """
    joined = bases.double().permute(1, 0, 2).flatten(1)
    joined = joined[:, joined.square().sum(0) > 0.5]
    wide = joined.shape[1] > joined.shape[0]
    values, vectors = torch.linalg.eigh(joined @ joined.mT if wide else joined.mT @ joined)
    effective = float(values.sum() ** 2 / values.square().sum())
    used = values > _UNUSED * values[-1]
    vectors = vectors[:, used]
    return vectors if wide else joined @ vectors / values[used].sqrt(), effective


def _deviations(maps: HeadMaps, inner: torch.Tensor) -> torch.Tensor:
    """``<core, inner>`` in units of its standard deviation under random rotations of the core."""
    overlap = (maps.cores[:, None] * inner).sum((-2, -1))
    sizes = torch.linalg.matrix_norm(maps.cores)[:, None] * torch.linalg.matrix_norm(inner)
    deviations: torch.Tensor = maps.freedom.sqrt()[:, None] * overlap / sizes
    return deviations
