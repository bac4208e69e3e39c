"""Second moments of queries with keys that agree and with keys that differ, and their contrast."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from skhead.linalg.precision import fast_float32_matmul, wide

__all__ = [
    "ContrastMoments",
    "ContrastSpectrum",
    "PermutedMoments",
    "contrast_spectrum",
    "energy_rank",
    "inverse_root",
    "oblique_logits",
    "sequential_logits",
    "union_basis",
]

#: Numbers that are gathered and multiplied at once.
_BLOCK = 1 << 18
#: Numbers in one block of products of queries with keys.
_OUTER = 1 << 22
#: What `ContrastMoments` sums.
_SUMS = ("cross", "queries", "keys", "weights", "query_squares", "key_squares")
#: Relative size below which an eigenvalue of a second moment counts as zero.
_TINY = 1e-10


@dataclass
class ContrastMoments:
    """Sums over pairs of a query and a key: row 0 of those that agree, row 1 of those that differ.

    Sums are float64 (float32 on MPS). Products of a block have the precision of the data, or
    float64 where they are to be whitened: dividing by small second moments enlarges rounding.

    Parameters
    ----------
    d_head : int
    center, whiten : bool
        Whether to sum queries and keys themselves, and their own second moments, as well.
    device : torch.device

    Attributes
    ----------
    cross : Tensor of shape (2, d_head, d_head)
        Sum of ``weight * outer(query, key)``.
    queries, keys : Tensor of shape (2, d_head)
        Weighted sums; zero where they are not asked for.
    weights : Tensor of shape (2,)
        Sums of weights.
    query_squares, key_squares : Tensor of shape (2, d_head, d_head) or None
        Weighted second moments.
    """

    d_head: int
    center: bool
    whiten: bool
    device: torch.device
    cross: torch.Tensor = field(init=False)
    queries: torch.Tensor = field(init=False)
    keys: torch.Tensor = field(init=False)
    weights: torch.Tensor = field(init=False)
    query_squares: torch.Tensor | None = field(init=False, default=None)
    key_squares: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        zeros = wide(torch.zeros(2, self.d_head, self.d_head, device=self.device))
        self.cross = zeros
        self.queries, self.keys = zeros[:, 0].clone(), zeros[:, 0].clone()
        self.weights = zeros[:, 0, 0].clone()
        if self.whiten:
            self.query_squares, self.key_squares = zeros.clone(), zeros.clone()

    def add(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        index: torch.Tensor,
        kinds: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add pairs.

        Parameters
        ----------
        queries : Tensor of shape (n_queries, d_head)
        keys : Tensor of shape (n_keys, d_head)
        index : Tensor of shape (n_keys,), int64
            The query of each key.
        kinds : Tensor of shape (n_keys,), int8
            1 for a key that agrees with its query, 0 for one that differs, -1 for one that does
            not count.
        weights : Tensor of shape (n_keys,) or None
            1 by default.

        Notes
        -----
        ``2 n_keys d_head**2`` flops, three times as many where squares are summed. Keys are read
        once, in blocks.
        """
        if not len(keys):
            return
        size = min(len(keys), max(1, _BLOCK // self.d_head))
        gathered = [values.new_empty(size, self.d_head) for values in (queries, keys)]
        with fast_float32_matmul(keys.device):
            for start in range(0, len(keys), size):
                part = slice(start, start + size)
                for place, kind in enumerate((1, 0)):
                    rows = (kinds[part] == kind).nonzero()[:, 0]
                    weight = None if weights is None else weights[part].index_select(0, rows)
                    owners = index[part].index_select(0, rows)
                    query, key = (buffer[: len(rows)] for buffer in gathered)
                    torch.index_select(queries, 0, owners, out=query)
                    torch.index_select(keys[part], 0, rows, out=key)
                    self._add(place, query, key, weight)

    def _add(
        self, place: int, query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor | None
    ) -> None:
        """Add a block of pairs of one kind."""
        if self.whiten:
            query, key = wide(query), wide(key)
        own, weighted = query, key
        if weight is not None:
            weight = weight.to(key.dtype)[:, None]
            own, weighted = query * weight, key * weight
        self.weights[place] += len(key) if weight is None else wide(weight).sum()
        self.cross[place] += wide(query.T @ weighted)
        if self.center:
            self.queries[place] += wide(own.sum(0))
            self.keys[place] += wide(weighted.sum(0))
        if self.query_squares is not None and self.key_squares is not None:
            self.query_squares[place] += wide(query.T @ own)
            self.key_squares[place] += wide(key.T @ weighted)

    def means(self, totals: torch.Tensor | None = None) -> torch.Tensor:
        """Mean outer product of query and key, ``(2, d_head, d_head)``, of either kind.

        Where moments are centred, the product of the mean query and the mean key is taken off.

        Parameters
        ----------
        totals : Tensor of shape (2,) or None
            What the sums are divided by; the sums of weights by default.
        """
        return _means(self.cross, self.queries, self.keys, self.weights, self.center, totals)

    def merge(self, other: ContrastMoments) -> None:
        """Add the sums over other pairs."""
        for name in _SUMS:
            own = getattr(self, name)
            if own is not None:
                own += getattr(other, name)

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Second moments of queries and of keys of all pairs, ``(d_head, d_head)`` each.

        Which kind a pair is of does not enter, so that permuted labels do not change them.
        """
        if self.query_squares is None or self.key_squares is None:
            raise ValueError("ContrastMoments: squares were not summed; pass whiten=True")
        found = []
        for squares, sums in ((self.query_squares, self.queries), (self.key_squares, self.keys)):
            mean = squares.sum(0) / self.weights.sum()
            if self.center:
                centre = sums.sum(0) / self.weights.sum()
                mean = mean - centre[:, None] * centre[None, :]
            found.append(mean)
        return found[0], found[1]


@dataclass
class PermutedMoments:
    """The sums of `ContrastMoments` for many other assignments of kinds to pairs at once.

    Parameters
    ----------
    n_permutations, d_head : int
    device : torch.device

    Attributes
    ----------
    cross : Tensor of shape (n_permutations, 2, d_head, d_head)
    queries, keys : Tensor of shape (n_permutations, 2, d_head)
    weights : Tensor of shape (n_permutations, 2)
    """

    n_permutations: int
    d_head: int
    device: torch.device
    cross: torch.Tensor = field(init=False)
    queries: torch.Tensor = field(init=False)
    keys: torch.Tensor = field(init=False)
    weights: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        size = (self.n_permutations, 2, self.d_head)
        self.cross = wide(torch.zeros(*size, self.d_head, device=self.device))
        self.queries, self.keys = (wide(torch.zeros(size, device=self.device)) for _ in range(2))
        self.weights = self.queries[..., 0].clone()

    def add(
        self, permutations: slice, queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Add pairs, row i of queries with row i of keys, to some of the permutations.

        Parameters
        ----------
        permutations : slice
        queries, keys : Tensor of shape (n, d_head)
        weights : Tensor of shape (n_chosen, 2, n)
            Weight of each pair as one that agrees and as one that differs; zero where it is none.

        Notes
        -----
        ``4 n_chosen n d_head**2`` flops.
        """
        flat = weights.flatten(0, 1).to(keys.dtype)
        shape = weights.shape[:2]
        self.weights[permutations] += wide(weights).sum(2)
        with fast_float32_matmul(keys.device):
            self.queries[permutations] += wide(flat @ queries).unflatten(0, shape)
            self.keys[permutations] += wide(flat @ keys).unflatten(0, shape)
            size = max(1, _OUTER // self.d_head**2)
            for start in range(0, len(queries), size):
                part = slice(start, start + size)
                outer = (queries[part, :, None] * keys[part, None, :]).flatten(1)
                product = wide(flat[:, part] @ outer)
                self.cross[permutations] += product.view(*shape, self.d_head, self.d_head)

    def merge(self, other: PermutedMoments) -> None:
        """Add the sums over other pairs."""
        for name in _SUMS[:4]:
            own = getattr(self, name)
            own += getattr(other, name)

    def contrasts(self, center: bool, totals: torch.Tensor | None = None) -> torch.Tensor:
        """Contrasts ``(n_permutations, d_head, d_head)``.

        Parameters
        ----------
        center : bool
        totals : Tensor of shape (2,) or None
            What the sums are divided by; the sums of weights by default.
        """
        means = _means(self.cross, self.queries, self.keys, self.weights, center, totals)
        return means[:, 0] - means[:, 1]


def _means(
    cross: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    center: bool,
    totals: torch.Tensor | None,
) -> torch.Tensor:
    """Mean outer products from sums ``(..., 2, d_head, d_head)``."""
    totals = weights if totals is None else totals
    found = cross / totals[..., None, None]
    if center:
        sizes = (weights * totals)[..., None, None]
        found = found - queries[..., None] * keys[..., None, :] / sizes
    return found


@dataclass(frozen=True)
class ContrastSpectrum:
    """Singular vectors of a contrast, in the order of falling singular values.

    Attributes
    ----------
    query_vectors, key_vectors : Tensor of shape (d_head, n)
        In the space of queries and of keys. Orthonormal unless the contrast was whitened.
    singular_values : Tensor of shape (n,)
    """

    query_vectors: torch.Tensor
    key_vectors: torch.Tensor
    singular_values: torch.Tensor

    def bases(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Orthonormal bases ``(d_head, rank)`` of what the first vectors span, in their order."""
        found = []
        for vectors in (self.query_vectors, self.key_vectors):
            basis, corner = torch.linalg.qr(vectors[:, :rank])
            signs = torch.where(corner.diagonal() < 0, -1.0, 1.0).to(basis.dtype)
            found.append(basis * signs)
        return found[0], found[1]


def contrast_spectrum(
    contrast: torch.Tensor,
    query_squares: torch.Tensor | None = None,
    key_squares: torch.Tensor | None = None,
) -> ContrastSpectrum:
    """Singular value decomposition of a contrast of second moments.

    Parameters
    ----------
    contrast : Tensor of shape (d_head, d_head)
        Queries along the rows.
    query_squares, key_squares : Tensor of shape (d_head, d_head) or None
        Second moments. With them ``query_squares^-1/2 contrast key_squares^-1/2`` is decomposed,
        whose singular values do not change when queries are mapped by an invertible G and keys by
        its inverse transpose; vectors are mapped back, so that they change with G as queries and
        keys do. Directions in which queries or keys do not vary are left out.

    Returns
    -------
    ContrastSpectrum
        The largest entry of every query vector is positive.
    """
    left = right = None
    if query_squares is not None and key_squares is not None:
        left, left_inverse = inverse_root(query_squares)
        right, right_inverse = inverse_root(key_squares)
        contrast = left_inverse @ contrast @ right_inverse
    u, s, vh = torch.linalg.svd(contrast)
    v = vh.mT
    if left is not None and right is not None:
        u, v = left @ u, right @ v
    places = u.abs().argmax(0, keepdim=True)
    signs = torch.where(u.gather(0, places) < 0, -1.0, 1.0).to(u.dtype)
    return ContrastSpectrum(u * signs, v * signs, s)


def inverse_root(squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of a positive semidefinite matrix, and the pseudo-inverse of the root.

    Parameters
    ----------
    squares : Tensor of shape (d_head, d_head)
    """
    values, vectors = torch.linalg.eigh(squares)
    kept = values > _TINY * values.abs().max()
    roots = torch.where(kept, values.clamp_min(0), 0.0).sqrt()
    inverses = torch.where(kept, 1 / torch.where(kept, roots, 1.0), 0.0)
    root: torch.Tensor = vectors * roots @ vectors.mT
    inverse: torch.Tensor = vectors * inverses @ vectors.mT
    return root, inverse


def energy_rank(singular_values: torch.Tensor, energy: float) -> int:
    """Least number of singular values whose squares make up a share of all squares.

    Parameters
    ----------
    singular_values : Tensor of shape (n,)
        Falling.
    energy : float
        Share, in (0, 1].
    """
    squares = singular_values.square()
    reached = squares.cumsum(0) / squares.sum()
    short = int((reached < energy * (1 - 1e-12)).sum())
    return min(short + 1, len(squares))


def union_basis(bases: list[torch.Tensor], tolerance: float) -> torch.Tensor:
    """Orthonormal basis of what several bases span together.

    Parameters
    ----------
    bases : list of Tensor of shape (d_head, rank)
        Orthonormal columns.
    tolerance : float
        Singular values of the bases side by side that are below this share of the largest one are
        taken for zero.

    Returns
    -------
    Tensor of shape (d_head, rank)
    """
    if len(bases) == 1:
        return bases[0]
    vectors, values, _ = torch.linalg.svd(torch.cat(bases, dim=1), full_matrices=False)
    found: torch.Tensor = vectors[:, values > tolerance * values[:1]]
    return found


def oblique_logits(
    queries: torch.Tensor, keys: torch.Tensor, query_basis: torch.Tensor, key_basis: torch.Tensor
) -> torch.Tensor:
    """Part of ``q @ k`` that a feature carries: q is split along its subspaces of both sides.

    With U the query basis and V the key basis it is ``k @ U (V^T U)^-1 V^T q``. The projector is
    oblique: it reaches the query subspace along directions that the key subspace does not see. It
    depends on what the bases span alone, and is invariant when queries are mapped by an invertible
    G and keys by its inverse transpose.

    Parameters
    ----------
    queries, keys : Tensor of shape (n, d_head)
    query_basis, key_basis : Tensor of shape (d_head, rank)

    Returns
    -------
    Tensor of shape (n,)
    """
    inverse = torch.linalg.pinv(key_basis.mT @ query_basis)
    seen: torch.Tensor = (queries @ key_basis) @ inverse.mT
    return (seen * (keys @ query_basis)).sum(1)


def sequential_logits(
    queries: torch.Tensor, keys: torch.Tensor, query_bases: list[torch.Tensor]
) -> torch.Tensor:
    """Parts of ``q @ k`` by projecting q on one query subspace after the other.

    Parameters
    ----------
    queries, keys : Tensor of shape (n, d_head)
    query_bases : list of Tensor of shape (d_head, rank)
        What one of them takes is not there for those behind it.

    Returns
    -------
    Tensor of shape (n, n_features)
    """
    rest, parts = queries, []
    for basis in query_bases:
        taken = rest @ basis @ basis.mT
        parts.append((taken * keys).sum(1))
        rest = rest - taken
    return torch.stack(parts, dim=1)
