"""Distances between subspaces from their principal angles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from skhead.linalg.alignments import decomposable
from skhead.linalg.precision import wide

__all__ = ["GRASSMANN_METRICS", "AngleDistance", "grassmann_distance", "largest_distance"]

#: Distances between subspaces that `grassmann_distance` knows.
GRASSMANN_METRICS = (
    "chordal",
    "geodesic",
    "procrustes",
    "binet-cauchy",
    "martin",
    "max-angle",
)

#: Angle below which its sine is measured, which keeps the digits that its cosine loses.
_SMALL_ANGLE = 0.045
#: Pairs of subspaces per float64 work block for angles from their sines.
_CLOSE_PAIRS = 8


def grassmann_distance(angles: torch.Tensor, counts: torch.Tensor, metric: str) -> torch.Tensor:
    """Distance between subspaces from their principal angles.

    Parameters
    ----------
    angles : Tensor of shape (n, k)
        In [0, pi/2], the smallest first.
    counts : Tensor of shape (n,)
        How many of the angles count; the others are ignored.
    metric : str
        One of `GRASSMANN_METRICS`.

    Returns
    -------
    Tensor of shape (n,)

    Raises
    ------
    ValueError
        If the metric is not known.
    """
    counted = torch.arange(angles.shape[1], device=angles.device) < counts[:, None]
    angles = torch.where(counted, angles, 0.0)
    if metric == "chordal":
        return angles.sin().square().sum(-1).sqrt()
    if metric == "geodesic":
        return angles.square().sum(-1).sqrt()
    if metric == "procrustes":
        return 2 * (angles / 2).sin().square().sum(-1).sqrt()
    if metric == "max-angle":
        return angles.amax(-1)
    log_kernel = torch.log1p(-angles.sin().square()).sum(-1)
    if metric == "binet-cauchy":
        return (-torch.expm1(log_kernel)).sqrt()
    if metric == "martin":
        return (-log_kernel).sqrt()
    raise ValueError(
        f"grassmann_distance: metric must be one of {', '.join(GRASSMANN_METRICS)}; got {metric!r}"
    )


def largest_distance(counts: torch.Tensor, metric: str) -> torch.Tensor:
    """Distance between orthogonal subspaces, the largest there is; infinite for "martin".

    Parameters
    ----------
    counts : Tensor of shape (...,)
        Number of principal angles.
    metric : str
        One of `GRASSMANN_METRICS`.

    Returns
    -------
    Tensor of shape (...,), float64
    """
    k = counts.double()
    largest = {
        "chordal": k.sqrt(),
        "geodesic": math.pi / 2 * k.sqrt(),
        "procrustes": (2 * k).sqrt(),
        "binet-cauchy": torch.ones_like(k),
        "martin": torch.full_like(k, math.inf),
        "max-angle": torch.full_like(k, math.pi / 2),
    }
    return largest[metric]


@dataclass(frozen=True)
class AngleDistance:
    """A distance of the Grassmannian as a measure for `cross_measures`.

    The angles are the ``min(r, s)`` principal angles, so that a subspace has distance zero from
    every subspace that contains it. They come from the cosines, and where these are nearly 1 from
    the sines, the singular values of what the larger subspace leaves of the smaller one.

    Attributes
    ----------
    metric : str
        One of `GRASSMANN_METRICS`.
    rows, columns : Tensor of shape (n_rows, d_model, r), (n_columns, d_model, s)
        Orthonormal columns; those past a rank are zero.
    row_ranks, column_ranks : Tensor of shape (n_rows,), (n_columns,), int64
    """

    metric: str
    rows: torch.Tensor
    columns: torch.Tensor
    row_ranks: torch.Tensor
    column_ranks: torch.Tensor

    @property
    def scratch_bytes(self) -> int:
        """Bytes that the angles from sines take beyond the cross products."""
        d_model = self.rows.shape[1]
        width = max(self.rows.shape[2], self.columns.shape[2])
        pairs = min(_CLOSE_PAIRS, self.row_ranks.numel() * self.column_ranks.numel())
        return 8 * pairs * (3 * d_model * width + 2 * width**2)

    def __call__(
        self, cross: torch.Tensor, row_positions: torch.Tensor, column_positions: torch.Tensor
    ) -> torch.Tensor:
        """Distances of the pairs whose cross products are given.

        Parameters
        ----------
        cross : Tensor of shape (n, r, s)
        row_positions, column_positions : Tensor of shape (n,), int64

        Returns
        -------
        Tensor of shape (n,), float64
        """
        cosines = torch.linalg.svdvals(decomposable(cross)).double().clamp_max(1.0)
        angles = cosines.arccos().cpu()
        ranks = self.row_ranks[row_positions], self.column_ranks[column_positions]
        close = (angles[:, 0] < _SMALL_ANGLE).nonzero()[:, 0]
        turned = ranks[0] > ranks[1]
        for swap in (False, True):
            for chosen in close[turned[close] == swap].split(_CLOSE_PAIRS):
                u = self.rows[row_positions[chosen].to(self.rows.device)]
                v = self.columns[column_positions[chosen].to(self.columns.device)]
                small, large = (v, u) if swap else (u, v)
                counts = ranks[int(swap)][chosen]
                exact = _angles_from_sines(small, large, counts)[:, : angles.shape[1]]
                known = angles[chosen]
                angles[chosen] = torch.where(known < _SMALL_ANGLE, exact, known)
        return grassmann_distance(angles, torch.minimum(*ranks), self.metric)


def _angles_from_sines(
    small: torch.Tensor, large: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Principal angles of each subspace with a larger one, the smallest first."""
    small, large = decomposable(wide(small)), decomposable(wide(large))
    rest = small - large @ (large.mT @ small)
    sines = torch.linalg.eigvalsh(rest.mT @ rest).clamp(0, 1).sqrt().double().cpu()
    width = sines.shape[1]
    place = torch.arange(width) + (width - counts[:, None])
    angles: torch.Tensor = sines.gather(1, place.clamp_max(width - 1)).arcsin()
    return angles
