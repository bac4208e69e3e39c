"""Null laws of a similarity: what each expects of every pair, and how surprising a score is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._base import extract_subspaces, free_dimension, open_door, rank_scale
from skhead._callers import warn_user
from skhead._devices import with_less_memory
from skhead.containers import RoleBases, Similarity, Subspaces
from skhead.exceptions import HeadShapeError
from skhead.stats.anisotropic import (
    AnisotropicMoments,
    MeanProjector,
    anisotropic_moments,
    mean_projector,
    projector_traces,
    shrink_projector,
)
from skhead.stats.empirical import EmpiricalNull, fit_empirical_null
from skhead.stats.haar import HaarMoments, haar_moments
from skhead.stats.haar_tails import haar_log_pvalue
from skhead.stats.leave_out import leave_one_out_means
from skhead.stats.log_tails import normal_log_p, pearson3_log_tail
from skhead.stats.macg import projector_from_covariance
from skhead.stats.polish import MedianPolish, median_polish
from skhead.stats.signflip import pooled_eigenbasis, signflip_moments

__all__ = [
    "AnisotropicNull",
    "CovarianceNull",
    "EmpiricalLaw",
    "GaussianNull",
    "HaarNull",
    "Judgement",
    "NullLaw",
    "SignflipNull",
    "plain_scores",
]

FloatArray = NDArray[np.float64]
_KEYS = ["source", "layer", "head"]
#: Variance of a kernel below which rounding is all that varies.
_LEAST_VARIANCE = 1e-8
#: Largest median that polishing leaves in a symmetric table, so little that a pair and its mirror
#: image have one p-value.
_MIRRORED_TOLERANCE = 1e-13
#: Bytes that the projectors of a sign-flip null may take at a time.
_SCRATCH = 2**30


@dataclass(frozen=True)
class Judgement:
    """What a null says of the scores of one pair kind.

    Attributes
    ----------
    mean : ndarray, broadcastable to the scores
        Expected score.
    z : ndarray of the shape of the scores
        Deviation in units of the null's standard deviation.
    log_p : ndarray of the shape of the scores
        Natural logarithm of the p-value.
    """

    mean: FloatArray
    z: FloatArray
    log_p: FloatArray


class NullLaw(ABC):
    """A null law: learns from training heads, then judges the pairs of others with them.

    Attributes
    ----------
    caller : str
        Name of the estimator, for messages.
    """

    caller: str

    @abstractmethod
    def fit(self, similarity: Similarity) -> None:
        """Learn what the law needs of the training heads."""

    @abstractmethod
    def judge(self, similarity: Similarity, p: int, scores: FloatArray, side: str) -> Judgement:
        """Hold the scores of pair kind `p` against the law.

        Parameters
        ----------
        similarity : Similarity
            Its columns are those that were fitted.
        p : int
            Position of the pair kind.
        scores : ndarray of shape (n_rows, n_columns)
            Projection kernels, whatever the unit of the similarity.
        side : {"two", "upper", "lower"}
        """


def plain_scores(similarity: Similarity, p: int) -> FloatArray:
    """Scores of one pair kind: projection kernels without their normalisation, others as they are.

    Parameters
    ----------
    similarity : Similarity
    p : int
        Position of the pair kind.
    """
    scores = similarity.values[:, :, p].astype(np.float64)
    kind, _, normalize = similarity.unit.partition("/")
    if kind != "pk" or not normalize:
        return scores
    r, s = similarity.row_ranks[:, None, p], similarity.column_ranks[None, :, p]
    return np.asarray(scores * rank_scale(r, s, normalize))


class HaarNull(NullLaw):
    """Independent uniformly random subspaces of the measured ranks.

    Parameters
    ----------
    random_state : int
        Seed of the draws that stand in for a closed form at ranks 2 and 3.
    """

    def __init__(self, random_state: int) -> None:
        self.random_state = random_state

    def fit(self, similarity: Similarity) -> None:
        """Learn nothing: the law follows from ranks and dimension."""

    def judge(self, similarity: Similarity, p: int, scores: FloatArray, side: str) -> Judgement:
        r, s, d = _sizes(similarity, p)
        moments = haar_moments(r, s, d)
        log_p = haar_log_pvalue(scores, r, s, d, side=side, random_state=self.random_state)
        return Judgement(moments.mean, _standardised(scores, moments), log_p)


class GaussianNull(NullLaw):
    """A normal law with the moments of random subspaces, as published; its tails are too thin."""

    def fit(self, similarity: Similarity) -> None:
        """Learn nothing: the law follows from ranks and dimension."""

    def judge(self, similarity: Similarity, p: int, scores: FloatArray, side: str) -> Judgement:
        moments = haar_moments(*_sizes(similarity, p))
        z = _standardised(scores, moments)
        return Judgement(moments.mean, z, normal_log_p(z, side))


class AnisotropicNull(NullLaw):
    """Independent subspaces that prefer the directions which the training heads prefer.

    The mean projectors of the training heads of both roles fix an angular central Gaussian law
    each; mean and variance of their overlap follow in closed form, and the skewness is that of
    random subspaces in the effective dimension. A training head is judged by means that leave it
    out.

    Parameters
    ----------
    by_layer : bool
        One mean for every role and layer instead of one for every role.
    shrinkage : float
        How far the means are drawn towards isotropy.
    """

    def __init__(self, by_layer: bool, shrinkage: float) -> None:
        self.by_layer = by_layer
        self.shrinkage = shrinkage

    def fit(self, similarity: Similarity) -> None:
        rows, columns = _subspaces(similarity, self.caller)
        fitted = partial(_FittedSide, by_layer=self.by_layer, caller=self.caller)
        self._rows = fitted(rows, [pair[0] for pair in similarity.pairs])
        if similarity.rows.equals(similarity.columns):
            self._columns = self._rows
            self._rows.add(columns, [pair[1] for pair in similarity.pairs])
        else:
            roles = [pair[1] for pair in similarity.pairs]
            self._columns = fitted(columns, roles)
        self._moments: dict[tuple[Any, ...], AnisotropicMoments] = {}

    def moments(self, pair: str, row_group: int = 0, column_group: int = 0) -> AnisotropicMoments:
        """Moments between the fitted means of two groups (layers, or 0)."""
        key = (pair, row_group, column_group)
        if key not in self._moments:
            means = (self._rows.mean(pair[0], row_group), self._columns.mean(pair[1], column_group))
            drawn = (shrink_projector(mean.matrix, self.shrinkage) for mean in means)
            self._moments[key] = anisotropic_moments(*drawn)
        if not self._moments[key].variance > _LEAST_VARIANCE:
            raise HeadShapeError(
                f"{self.caller}: under null='anisotropic' the kernel of {pair} pairs cannot vary, "
                "because these heads fill the directions that they prefer; truncate them with "
                "SubspaceExtractor(rank=...), or use another null"
            )
        return self._moments[key]

    def judge(self, similarity: Similarity, p: int, scores: FloatArray, side: str) -> Judgement:
        pair = similarity.pairs[p]
        rows, columns = _subspaces(similarity, self.caller)
        mean, z, log_p = np.full((3, *scores.shape), np.nan)
        row_groups, column_groups = (_groups(x.heads, self.by_layer) for x in (rows, columns))
        blocks = {
            (g, h): np.ix_(np.flatnonzero(row_groups == g), np.flatnonzero(column_groups == h))
            for g in np.unique(row_groups)
            for h in np.unique(column_groups)
        }
        blocks = {key: at for key, at in blocks.items() if not np.isnan(scores[at]).all()}
        row_traces = {
            h: _traces(rows.role(pair[0]), self._columns.mean(pair[1], h).matrix)
            for h in {h for _, h in blocks}
        }
        column_traces = {
            g: _traces(columns.role(pair[1]), self._rows.mean(pair[0], g).matrix)
            for g in {g for g, _ in blocks}
        }
        for (g, h), block in blocks.items():
            with _naming_pair(self.caller, "anisotropic", pair):
                mean[block] = leave_one_out_means(
                    self._rows.mean(pair[0], g),
                    self._columns.mean(pair[1], h),
                    scores[block],
                    row_traces[h][row_groups == g],
                    column_traces[g][column_groups == h],
                    self._rows.members(rows.heads, pair[0], g)[row_groups == g],
                    self._columns.members(columns.heads, pair[1], h)[column_groups == h],
                    self.shrinkage,
                )
            moments = self.moments(pair, int(g), int(h))
            z[block] = (scores[block] - mean[block]) / np.sqrt(moments.variance)
            skewness = _skewness(similarity, p, moments.effective_dimension)
            log_p[block] = _skewed_log_p(z[block], skewness, side)
        return Judgement(mean, z, log_p)


class CovarianceNull(NullLaw):
    """Independent subspaces spanned by Gaussian vectors of a given covariance.

    Parameters
    ----------
    covariance : ndarray of shape (d_model, d_model)
        Of activations, embeddings or whatever the heads are thought to draw their directions from.
    """

    def __init__(self, covariance: NDArray[np.floating]) -> None:
        self.covariance = covariance

    def fit(self, similarity: Similarity) -> None:
        if self.covariance.shape != (similarity.d_model,) * 2:
            raise HeadShapeError(
                f"{self.caller}: covariance has shape {self.covariance.shape}, and these heads "
                f"live in {similarity.d_model} dimensions"
            )
        self._moments: dict[tuple[int, int], AnisotropicMoments] = {}

    def moments(self, r: int, s: int) -> AnisotropicMoments:
        """Moments of subspaces of two ranks."""
        if (r, s) not in self._moments:
            means = (projector_from_covariance(self.covariance, rank) for rank in (r, s))
            self._moments[r, s] = anisotropic_moments(*means)
        return self._moments[r, s]

    def judge(self, similarity: Similarity, p: int, scores: FloatArray, side: str) -> Judgement:
        mean, z, log_p = np.full((3, *scores.shape), np.nan)
        rows, columns = similarity.row_ranks[:, p], similarity.column_ranks[:, p]
        for r in np.unique(rows):
            for s in np.unique(columns):
                block = np.ix_(np.flatnonzero(rows == r), np.flatnonzero(columns == s))
                moments = self.moments(int(r), int(s))
                if not moments.variance > _LEAST_VARIANCE:
                    raise HeadShapeError(
                        f"{self.caller}: under this covariance the kernel of "
                        f"{similarity.pairs[p]} pairs of ranks {r} and {s} cannot vary, because "
                        "the heads fill its directions; truncate them with "
                        "SubspaceExtractor(rank=...), or use another null"
                    )
                mean[block] = moments.mean
                z[block] = (scores[block] - moments.mean) / np.sqrt(moments.variance)
                skewness = _skewness(similarity, p, moments.effective_dimension)
                log_p[block] = _skewed_log_p(z[block], skewness, side)
        return Judgement(mean, z, log_p)


class SignflipNull(NullLaw):
    """The training heads' preferred axes, with the signs of one head's coordinates flipped at
    random.

    Every head keeps the energy that it has on each axis; only how it combines the axes is random.
    """

    def fit(self, similarity: Similarity) -> None:
        rows, columns = _subspaces(similarity, self.caller)
        self._axes = {}
        for pair in similarity.pairs:
            sides = (rows.role(pair[0]), columns.role(pair[1]))
            means = [
                mean_projector(s.tensor, np.bincount(s.index, minlength=len(s.vectors))).matrix
                for s in sides
            ]
            self._axes[pair] = pooled_eigenbasis(*means)

    def judge(self, similarity: Similarity, p: int, scores: FloatArray, side: str) -> Judgement:
        pair = similarity.pairs[p]
        rows, columns = _subspaces(similarity, self.caller)
        row, column = rows.role(pair[0]), columns.role(pair[1])
        moments = with_less_memory(
            partial(signflip_moments, row.tensor, column.tensor, self._axes[pair]),
            _SCRATCH,
            self.caller,
        )
        at = np.ix_(row.index, column.index)
        if not (moments.variance[at][~np.isnan(scores)] > _LEAST_VARIANCE).all():
            raise HeadShapeError(
                f"{self.caller}: under null='signflip' the kernel of a {pair} pair cannot vary, "
                "because its heads coincide with the axes; truncate the heads with "
                "SubspaceExtractor(rank=...), or use another null"
            )
        z = (scores - moments.mean[at]) / np.sqrt(moments.variance[at])
        return Judgement(moments.mean[at], z, normal_log_p(z, side))


class EmpiricalLaw(NullLaw):
    """The bulk of the other pairs, once every head's own level is taken out.

    Row and column medians of the log similarity are polished away; what is left is measured
    against the robust spread of the training pairs.

    Parameters
    ----------
    tails : {"normal", "t"}
        Law of the bulk; only what outlasts t tails stands on firm ground.
    """

    def __init__(self, tails: str) -> None:
        self.tails = tails

    def fit(self, similarity: Similarity) -> None:
        self.polish: dict[str, MedianPolish] = {}
        self.bulk: dict[str, EmpiricalNull] = {}
        same_heads = similarity.rows.equals(similarity.columns)
        for p, pair in enumerate(similarity.pairs):
            logs = self._log(similarity, p, plain_scores(similarity, p))
            mirrored = same_heads and np.array_equal(logs, logs.T, equal_nan=True)
            polished = partial(median_polish, tol=_MIRRORED_TOLERANCE, symmetric=True)
            with _naming_pair(self.caller, "empirical", pair):
                found = polished(logs) if mirrored else median_polish(logs)
                if not found.converged:
                    warn_user(
                        f"{self.caller}: medians of the {pair} pairs still moved after "
                        f"{found.n_iter} sweeps; p-values of null='empirical' may depend on the "
                        "order of heads"
                    )
                unlisted = np.isnan(similarity.listed(pair))
                self.bulk[pair] = fit_empirical_null(np.where(unlisted, np.nan, found.residuals))
            self.polish[pair] = found

    def judge(self, similarity: Similarity, p: int, scores: FloatArray, side: str) -> Judgement:
        pair = similarity.pairs[p]
        logs = self._log(similarity, p, scores)
        residuals = self.polish[pair].residuals_of(logs)
        bulk = self.bulk[pair]
        z = bulk.z(residuals, self.tails)
        mean = np.exp(logs - residuals + bulk.center)
        return Judgement(mean, z, bulk.log_p(residuals, side, self.tails))

    def _log(self, similarity: Similarity, p: int, scores: NDArray[np.floating]) -> FloatArray:
        wrong = np.argwhere(scores <= 0)
        if len(wrong):
            i, j = wrong[0]
            raise HeadShapeError(
                f"{self.caller}: null='empirical' takes logarithms, and {similarity.pairs[p]} of "
                f"{similarity.row_labels[i]} and {similarity.column_labels[j]} is "
                f"{scores[i, j]:.6g}; use another null, or leave the head out"
            )
        return np.log(np.asarray(scores, dtype=np.float64))


@contextmanager
def _naming_pair(caller: str, null: str, pair: str) -> Iterator[None]:
    """Say which estimator, null and pair kind an error of the statistics is about."""
    try:
        yield
    except HeadShapeError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{caller}: null={null!r} cannot be fitted to the {pair} pairs ({error}); give "
            "it more heads, or use null='haar'"
        ) from error


class _FittedSide:
    """Mean projectors of the training heads on one side of the pairs, by role and group."""

    def __init__(self, subspaces: Subspaces, roles: list[str], by_layer: bool, caller: str) -> None:
        self._caller = caller
        self._keys = _keys(subspaces.heads)
        self._groups = _groups(subspaces.heads, by_layer)
        self._index: dict[str, NDArray[np.int64]] = {}
        self._means: dict[tuple[str, int], MeanProjector] = {}
        self.add(subspaces, roles)

    def add(self, subspaces: Subspaces, roles: list[str]) -> None:
        """Learn the means of more roles of the same heads."""
        for role in roles:
            basis = subspaces.role(role)
            self._index[role] = basis.index
            for group in np.unique(self._groups):
                if (role, int(group)) not in self._means:
                    used = basis.index[self._groups == group]
                    weights = np.bincount(used, minlength=len(basis.vectors))
                    self._means[role, int(group)] = mean_projector(basis.tensor, weights)

    def mean(self, role: str, group: int) -> MeanProjector:
        """Mean projector of a role and group."""
        if (role, int(group)) not in self._means:
            raise HeadShapeError(
                f"{self._caller}: no training head lies in layer {group}, so that groups='layer' "
                "has no null for it; use groups=None or train on heads of every layer"
            )
        return self._means[role, int(group)]

    def members(self, heads: pd.DataFrame, role: str, group: int) -> NDArray[np.int64]:
        """Basis that every head has in a mean, -1 for heads that took no part in it."""
        first = ~self._keys.duplicated() & (self._groups == group)
        found = self._keys[first].get_indexer(_keys(heads))
        return np.where(found >= 0, self._index[role][first][found], -1)


def _skewness(similarity: Similarity, p: int, dimension: float) -> float:
    """Skewness of the kernel of random subspaces of the heads' mean ranks."""
    r, s = similarity.row_ranks[:, p].mean(), similarity.column_ranks[:, p].mean()
    moments = haar_moments(r, s, max(dimension, r, s, 3.0))
    variance = float(moments.variance)
    return float(moments.third_central) / variance**1.5 if variance > 0 else 0.0


def _skewed_log_p(z: FloatArray, skewness: float, side: str) -> FloatArray:
    """Natural log of the Pearson III p-value of a deviation."""
    mirrored = -1.0 if skewness < 0 else 1.0
    tails = {
        upper: pearson3_log_tail(mirrored * z, abs(skewness), upper == (mirrored > 0))
        for upper in (True, False)
    }
    if side == "two":
        return np.minimum(np.log(2) + np.minimum(tails[True], tails[False]), 0.0)
    return tails[side == "upper"]


def _standardised(scores: FloatArray, moments: HaarMoments) -> FloatArray:
    """Deviations in units of the sd; 0 where the ranks alone fix the score."""
    sd = np.broadcast_to(np.sqrt(moments.variance), scores.shape)
    return np.divide(scores - moments.mean, sd, out=scores * 0.0, where=sd > 0)


def _sizes(similarity: Similarity, p: int) -> tuple[Any, Any, int]:
    """Ranks of rows and columns, and the dimension in which they vary."""
    d = free_dimension(similarity.d_model, similarity.record)
    return similarity.row_ranks[:, None, p], similarity.column_ranks[None, :, p], d


def _subspaces(similarity: Similarity, caller: str) -> tuple[Subspaces, Subspaces]:
    """What was compared, read again where the similarity no longer carries it."""
    sides = []
    for heads, carried, place in (
        (similarity.rows, similarity.row_subspaces, 0),
        (similarity.columns, similarity.column_subspaces, 1),
    ):
        if carried is None and not (heads["layer"] >= 0).all():
            raise HeadShapeError(
                f"{caller}: this null needs the heads' subspaces, which only a Similarity "
                "from ProjectionKernel knows; use null='haar' for anything else"
            )
        if carried is None:
            roles = list(dict.fromkeys(pair[place] for pair in similarity.pairs))
            source = open_door(heads, caller)
            how = {name: similarity.record[name] for name in ("rank", "fold_norm", "center")}
            carried = extract_subspaces(source, roles, device=None, caller=caller, **how)
        sides.append(carried)
    return sides[0], sides[1]


def _keys(heads: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(heads[_KEYS])


def _groups(heads: pd.DataFrame, by_layer: bool) -> NDArray[np.int64]:
    return heads["layer"].to_numpy() if by_layer else np.zeros(len(heads), dtype=np.int64)


def _traces(basis: RoleBases, matrix: torch.Tensor) -> FloatArray:
    return projector_traces(basis.tensor, matrix)[basis.index]
