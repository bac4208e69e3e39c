"""Scores of heads that come from other heads of the same model: composition and induction."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._circuits.scores import GROUPS
from skhead._circuits.surroundings import ModelReader
from skhead.linalg.circuits import composed_cosines, paired_matching
from skhead.linalg.factored import map_factors
from skhead.linalg.kernels import overlap_blocks

__all__ = ["PairScorer"]

#: Partners of each head, on either side, whose composed circuits are decomposed.
_CANDIDATES = 8
#: Bytes of float64 matrices of pairs that are decomposed at once.
_BLOCK = 2**27
#: Part of the budget for the matrices of one group of layers. Three groups are in memory at once,
#: the last of them while the next is read, and the factors of two; products have half the budget.
_SHARE = 10

Arrays = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class _Layers:
    """Some layers of a model in memory, and where their heads stand among all of the model's."""

    places: slice
    queries: torch.Tensor
    roles: Mapping[str, torch.Tensor]


class PairScorer:
    """Composition and induction scores of every head of one model.

    Parameters
    ----------
    reader : ModelReader
    heads : DataFrame
        All heads of the model, layers in order.
    max_memory : int
        Bytes beyond the embedding.
    """

    def __init__(self, reader: ModelReader, heads: pd.DataFrame, max_memory: int) -> None:
        self.reader = reader
        self.heads = heads
        self.max_memory = max_memory
        self.layers = heads["layer"].to_numpy()
        self.groups = self._groups()
        self._only: _Layers | None = None

    def scores(
        self,
        names: Collection[str],
        gram: torch.Tensor | None,
        evidence: Arrays,
    ) -> Arrays:
        """The scores of the groups "composition" and "induction" that are asked.

        Parameters
        ----------
        names : collection of str
        gram : Tensor of shape (d_model, d_model) or None
            ``E^T E``, for induction.
        evidence : dict of str to ndarray of shape (n_heads,)
            ``previous_token`` and ``ov_copying`` of all heads, if ``induction_strength`` is asked.

        Returns
        -------
        dict of str to ndarray of shape (n_heads,)
        """
        kinds = [k for k in "qkv" if any(n.startswith(f"{k}_composition") for n in names)]
        matching = gram is not None and any(name in GROUPS["induction"] for name in names)
        n_heads = len(self.heads)
        ratios = {kind: np.full((n_heads, n_heads), np.nan, dtype=np.float32) for kind in kinds}
        cosines = np.full((n_heads, n_heads), -np.inf, dtype=np.float32)
        for earlier, later in self._group_pairs():
            block = np.ix_(_range(earlier.places), _range(later.places))
            for kind, part in _composition(earlier, later, kinds, self.max_memory // 2).items():
                ratios[kind][block] = part
            if matching and gram is not None:
                cosines[block] = _cosines(earlier, later, gram).cpu().numpy()
        defined = self.layers[:, None] < self.layers[None, :]
        found: Arrays = {}
        for kind in kinds:
            found |= _composition_summaries(kind, ratios[kind], defined)
        if matching and gram is not None:
            pairs = _candidates(np.where(defined, cosines, -np.inf))
            ratios_of_pairs = self._matching(pairs, gram)
            found |= _induction_summaries(ratios_of_pairs, pairs, evidence, n_heads)
        return {name: found[name] for name in names if name in found}

    def _groups(self) -> list[slice]:
        """Runs of whole layers that the budget holds; at least one layer each."""
        d_model, d_head = (int(self.heads[name].iloc[0]) for name in ("d_model", "d_head"))
        limit = self.max_memory // (_SHARE * 4 * 4 * d_model * d_head)
        starts = np.flatnonzero(np.r_[True, self.layers[1:] != self.layers[:-1]])
        ends = np.r_[starts[1:], len(self.layers)]
        groups: list[slice] = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if groups and end - groups[-1].start <= limit:
                groups[-1] = slice(groups[-1].start, end)
            else:
                groups.append(slice(start, end))
        return groups

    def _group_pairs(self) -> Iterator[tuple[_Layers, _Layers]]:
        for i, places in enumerate(self.groups):
            earlier = self._read(places)
            yield earlier, earlier
            for others in self.groups[i + 1 :]:
                yield earlier, self._read(others)

    def _read(self, places: slice) -> _Layers:
        """A group of layers; it is held if it is the only one."""
        if self._only is not None:
            return self._only
        rows = self.heads.iloc[places]
        stacks = self.reader.read(rows)
        layers = _Layers(places, self.reader.queries(rows, stacks), stacks.roles)
        if len(self.groups) == 1:
            self._only = layers
        return layers

    def _matching(self, pairs: _Pairs, gram: torch.Tensor) -> NDArray[np.float64]:
        """Eigenvalue ratios of the composed circuits of pairs."""
        ratios = np.full(len(pairs.earlier), np.nan)
        for earlier, later in self._group_pairs():
            inside = np.flatnonzero(
                _within(pairs.earlier, earlier.places) & _within(pairs.later, later.places)
            )
            for target in np.unique(pairs.later[inside]):
                chosen = inside[pairs.later[inside] == target]
                at = int(target) - later.places.start
                queries = gram @ later.queries[at].double()
                sources = pairs.earlier[chosen] - earlier.places.start
                ratios[chosen] = _ratios_of(queries, later.roles["K"][at], earlier, sources)
        return ratios


@dataclass(frozen=True)
class _Pairs:
    """Places of the earlier and of the later head of some pairs."""

    earlier: NDArray[np.int64]
    later: NDArray[np.int64]


def _range(places: slice) -> NDArray[np.int64]:
    return np.arange(places.start, places.stop)


def _within(places: NDArray[np.int64], group: slice) -> NDArray[np.bool_]:
    return (places >= group.start) & (places < group.stop)


def _composition(
    earlier: _Layers, later: _Layers, kinds: Collection[str], max_memory: int
) -> Arrays:
    """Composition scores of all pairs of two groups over their baseline ``d_model^-1/2``.

    Nothing composes with a head whose map is zero.
    """
    if not kinds:
        return {}
    k, v, o = (later.roles[role] for role in "KVO")
    sides = {"q": (later.queries, k), "k": (k, later.queries), "v": (v, o)}
    writer, writer_norms = map_factors(earlier.roles["O"], earlier.roles["V"])
    readers = [map_factors(*sides[kind]) for kind in kinds]
    blocks = [(0, i) for i in range(len(readers))]
    overlaps = overlap_blocks([writer], [factor for factor, _ in readers], blocks,
                              max_memory=max_memory)  # fmt: skip
    found: Arrays = {}
    for i, kind in enumerate(kinds):
        norms = torch.outer(writer_norms, readers[i][1])
        scores = overlaps[0, i].double().clamp_min(0).sqrt() / norms
        scores = torch.where(norms > 0, scores * writer.shape[1] ** 0.5, 0.0)
        found[kind] = scores.cpu().numpy()
    return found


def _composition_summaries(
    kind: str, ratios: NDArray[np.float32], defined: NDArray[np.bool_]
) -> Arrays:
    """Mean and maximum over earlier heads (in) and later ones (out); 0 where there are none."""
    strengths = np.where(defined, ratios, 0.0)
    found: Arrays = {}
    for side, axis in (("in", 0), ("out", 1)):
        counts = np.maximum(defined.sum(axis), 1)
        found[f"{kind}_composition_{side}_mean"] = strengths.sum(axis, dtype=np.float64) / counts
        found[f"{kind}_composition_{side}_max"] = strengths.max(axis).astype(np.float64)
    return found


def _cosines(earlier: _Layers, later: _Layers, gram: torch.Tensor) -> torch.Tensor:
    v, o = earlier.roles["V"], earlier.roles["O"]
    return composed_cosines(later.queries, later.roles["K"], v, o, gram).nan_to_num(-torch.inf)


def _candidates(cosines: NDArray[np.float32]) -> _Pairs:
    """The pairs of largest cosine, some for every later head and some for every earlier one."""
    chosen = np.zeros(cosines.shape, dtype=bool)
    for axis in (0, 1):
        order = np.argsort(-cosines, axis=axis, kind="stable")
        best = np.take(order, np.arange(min(_CANDIDATES, len(cosines))), axis=axis)
        np.put_along_axis(chosen, best, True, axis=axis)
    return _Pairs(*np.nonzero(chosen & (cosines > -np.inf)))


def _ratios_of(
    queries: torch.Tensor, w_k: torch.Tensor, earlier: _Layers, sources: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Ratios of one later head with several earlier ones."""
    w_v, w_o = earlier.roles["V"], earlier.roles["O"]
    step = max(_BLOCK // (2 * 8 * w_v[0].numel()), 1)
    parts = []
    for start in range(0, len(sources), step):
        rows = torch.as_tensor(sources[start : start + step], device=w_v.device)
        n = len(rows)
        found = paired_matching(
            queries.expand(n, -1, -1), w_k.expand(n, -1, -1), w_v[rows], w_o[rows]
        )
        parts.append(found.cpu().numpy())
    return np.concatenate(parts)


def _induction_summaries(
    ratios: NDArray[np.float64],
    pairs: _Pairs,
    evidence: Arrays,
    n_heads: int,
) -> Arrays:
    """The largest ratio over partners on either side; 0 for a head that has none."""
    found = {
        "induction_matching": _largest(ratios, pairs.later, n_heads),
        "induction_feeding": _largest(ratios, pairs.earlier, n_heads),
    }
    if evidence:
        previous, copying = evidence["previous_token"], evidence["ov_copying"]
        weakest = np.minimum(np.minimum(ratios, previous[pairs.earlier]), copying[pairs.later])
        found["induction_strength"] = _largest(weakest, pairs.later, n_heads)
    return found


def _largest(
    values: NDArray[np.float64], heads: NDArray[np.int64], n_heads: int
) -> NDArray[np.float64]:
    largest = np.full(n_heads, -np.inf)
    np.fmax.at(largest, heads, values)
    return np.where(np.isneginf(largest), 0.0, largest)
