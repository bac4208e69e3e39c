"""Circuit scores of the heads of one model or of one stack."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._base import HeadInput
from skhead._circuits.pairs import PairScorer
from skhead._circuits.scores import GROUPS, HeadStacks, Surroundings, score_heads
from skhead._circuits.surroundings import ModelReader, Reading
from skhead._progress import progress_bar
from skhead.exceptions import DegenerateHeadError
from skhead.linalg.factored import product_norms
from skhead.weights import head_labels, load_heads

__all__ = ["ScoredHeads", "missing_in_stack", "score_model", "score_stack"]

#: Heads whose maps are held against zero at once.
_CHUNK = 64
#: Part of the budget for the matrices that are read at once.
_SHARE = 2
#: What induction asks of single heads.
_EVIDENCE = {"previous_token", "ov_copying"}
_PAIRED = {*GROUPS["composition"], *GROUPS["induction"]}

Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class ScoredHeads:
    """Scores of some heads.

    Attributes
    ----------
    scores : dict of str to ndarray of shape (n_heads,)
    missing : mapping of str to str
        The other scores that were asked, each with what is missing.
    """

    scores: Scores
    missing: Mapping[str, str]


def missing_in_stack(names: Collection[str]) -> dict[str, str]:
    """By score, what a stack lacks, which has nothing but its maps.

    Parameters
    ----------
    names : collection of str
    """
    why = "a stack has no tokens, no positions and no layers"
    return {name: why for name in names if name not in GROUPS["maps"]}


def score_stack(given: HeadInput, names: Collection[str], device: Any, caller: str) -> ScoredHeads:
    """Score heads of a stack of all four roles, which have nothing but their maps.

    Parameters
    ----------
    given : HeadInput
    names : collection of str
    device : str, torch.device or None
    caller : str
        Estimator to name in errors.

    Raises
    ------
    DegenerateHeadError
        If the OV or QK map of a head is zero.
    """
    missing = missing_in_stack(names)
    present = [name for name in names if name not in missing]
    if not present:
        return ScoredHeads({}, missing)
    roles = {
        role: given.read(role, fold_norm=False, center=False, device=device).tensor
        for role in "QKVO"
    }
    eps = torch.full((len(given.heads),), given.eps, dtype=torch.float64)
    stacks = HeadStacks(roles, dict.fromkeys("QKVO", eps))
    scorer = _Scorer(caller, Surroundings())
    scorer.refuse_zero_maps(stacks, given.heads, np.ones(len(stacks), dtype=bool))
    return ScoredHeads(scorer.score(stacks, present), missing)


def score_model(
    heads: pd.DataFrame, names: Collection[str], reading: Reading, max_memory: int, caller: str
) -> ScoredHeads:
    """Score heads of one model, layer by layer.

    Parameters
    ----------
    heads : DataFrame
        Some rows of the heads table of one source.
    names : collection of str
    reading : Reading
    max_memory : int
        Bytes for scores that come from pairs of heads.
    caller : str
        Estimator to name in errors.

    Raises
    ------
    DegenerateHeadError
        If the OV or QK map of a head is zero.
    """
    reader = ModelReader(heads, reading)
    around = reader.surroundings(names)
    scorer = _Scorer(caller, around, reading.relative_position, max_memory)
    present = [name for name in names if name not in around.missing]
    single = [name for name in present if name not in _PAIRED]
    paired = [name for name in present if name in _PAIRED]
    found = scorer.score_layers(reader, heads, single) if single else {}
    if paired:
        everyone = load_heads(reader.source)
        evidence: Scores = {}
        if "induction_strength" in paired:
            if found.keys() >= _EVIDENCE and list(_places(heads)) == list(_places(everyone)):
                evidence = {name: found[name] for name in _EVIDENCE}
            else:
                asked = set(_places(heads))
                given = np.array([place in asked for place in _places(everyone)])
                evidence = scorer.score_layers(reader, everyone, _EVIDENCE, given)
        pairs = PairScorer(reader, everyone, max_memory)
        gram = None if around.matching is None else around.matching.core
        places = {place: i for i, place in enumerate(_places(everyone))}
        rows = [places[place] for place in _places(heads)]
        found |= {n: s[rows] for n, s in pairs.scores(paired, gram, evidence).items()}
    return ScoredHeads(found, around.missing)


@dataclass(frozen=True)
class _Scorer:
    """Scores of heads that do not depend on other heads."""

    caller: str
    around: Surroundings
    relative_position: int = 0
    max_memory: int = 0

    def score_layers(
        self,
        reader: ModelReader,
        heads: pd.DataFrame,
        names: Collection[str],
        given: NDArray[np.bool_] | None = None,
    ) -> Scores:
        """Scores layer by layer; only heads that were given, by default all, must not be zero."""
        given = np.ones(len(heads), dtype=bool) if given is None else given
        found = {name: np.empty(len(heads)) for name in names}
        batches = _batches(heads, self.max_memory // _SHARE)
        for rows in progress_bar(batches, self.caller, unit="batch"):
            of_batch, start = heads.iloc[rows], 0
            for stacks in reader.by_layer(of_batch, reader.read(of_batch)):
                places = rows[start : start + len(stacks)]
                of_layer = heads.iloc[places]
                self.refuse_zero_maps(stacks, of_layer, given[places])
                scores = self.score(stacks, names)
                for name in names:
                    found[name][places] = scores[name]
                start += len(stacks)
        return found

    def score(self, stacks: HeadStacks, names: Collection[str]) -> Scores:
        found = score_heads(stacks, names, self.around, self.relative_position)
        return {name: scores.cpu().numpy() for name, scores in found.items()}

    def refuse_zero_maps(
        self, stacks: HeadStacks, heads: pd.DataFrame, given: NDArray[np.bool_]
    ) -> None:
        q, k, v, o = (stacks.roles[role] for role in "QKVO")
        for name, left, right in (("OV", v, o), ("QK", q, k)):
            norms = torch.cat(
                [
                    product_norms(left[i : i + _CHUNK], right[i : i + _CHUNK])
                    for i in range(0, len(left), _CHUNK)
                ]
            )
            zero = np.flatnonzero((norms == 0).cpu().numpy() & given)
            if zero.size:
                raise DegenerateHeadError(
                    f"{self.caller}: the {name} map of {head_labels(heads)[zero[0]]} is "
                    "zero, so that it has no circuits to score; drop the head, for example "
                    "heads.drop(index=...)"
                )


def _batches(heads: pd.DataFrame, limit: int) -> list[NDArray[np.int64]]:
    """Rows that are read at once: whole layers in order, as many as fit the bytes allowed."""
    layers = heads["layer"].to_numpy()
    order = np.argsort(layers, kind="stable")
    d_model, d_head = (int(heads[name].iloc[0]) for name in ("d_model", "d_head"))
    n_heads = limit // (4 * 4 * d_model * d_head)
    batches: list[NDArray[np.int64]] = []
    for rows in np.split(order, np.flatnonzero(np.diff(layers[order])) + 1):
        if batches and len(batches[-1]) + len(rows) <= n_heads:
            batches[-1] = np.concatenate([batches[-1], rows])
        else:
            batches.append(rows)
    return batches


def _places(heads: pd.DataFrame) -> Iterator[tuple[int, int]]:
    """Layer and head of every row."""
    return zip(heads["layer"].tolist(), heads["head"].tolist(), strict=True)
