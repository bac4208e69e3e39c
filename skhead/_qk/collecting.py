"""Queries and keys of heads, collected while a model reads prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skhead._heads import Head
from skhead._prompts import token_groups
from skhead._qk.hooks import Rows, Scores, Visit, run_watched
from skhead.qk_pairs import QKPairs
from skhead.qk_prompts import QKPrompts
from skhead.weights.running import evaluating

__all__ = ["Places", "collect_pairs", "head_label"]


def head_label(head: Head) -> str:
    """Label of a head, such as "L4H7"."""
    return f"L{head[0]}H{head[1]}"


@dataclass(frozen=True)
class Places:
    """Which prompts a batch holds, and where their queries and keys are.

    Attributes
    ----------
    prompts : list of int
        Numbers of the prompts.
    queries : Tensor of shape (n,), int64
        Positions of their queries.
    rows : ndarray of shape (n_keys,), int64
        Rows of their keys among those of all prompts.
    owners, keys : Tensor of shape (n_keys,), int64
        The prompt of each key, counted in the batch, and its position.
    """

    prompts: list[int]
    queries: torch.Tensor
    rows: NDArray[np.int64]
    owners: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def of(cls, prompts: QKPrompts, numbers: list[int], device: Any) -> Places:
        """Those of the prompts with these numbers."""
        counts = [len(listed) for listed in prompts.key_positions]
        starts = np.concatenate([[0], np.cumsum(counts)])
        positions = np.concatenate([prompts.key_positions[n] for n in numbers])
        owners = np.repeat(np.arange(len(numbers)), [counts[n] for n in numbers])
        return cls(
            numbers,
            torch.tensor([prompts.query_positions[n] for n in numbers], device=device),
            np.concatenate([np.arange(starts[n], starts[n + 1]) for n in numbers]),
            torch.from_numpy(owners).to(device),
            torch.from_numpy(positions).to(device),
        )


class _Collector:
    """Queries and keys of one head, filled batch by batch."""

    def __init__(self, head: Head, prompts: QKPrompts, model: str, caller: str) -> None:
        self.head = head
        self._prompts = prompts
        self._model = model
        self._caller = caller
        self._scale: float | None = None
        self._queries = np.zeros((0, 0), dtype=np.float32)
        self._keys = self._queries

    def take(self, seen: Scores, places: Places) -> None:
        """Take the rows of the prompts of a batch, if their scores come from them."""
        rows = seen.rows(self.head[1], places.queries)
        if self._scale is None:
            self._scale = seen.scale(self.head[1])
            d_head = rows.queries.shape[-1]
            self._queries = np.zeros((len(self._prompts), d_head), dtype=np.float32)
            self._keys = np.zeros((self._prompts.n_keys, d_head), dtype=np.float32)
        rows.check(self._scale, head_label(self.head), self._model, self._caller)
        self._check_visible(rows, places)
        self._queries[places.prompts] = rows.queries.float().cpu().numpy()
        self._keys[places.rows] = rows.keys[places.owners, places.keys].float().cpu().numpy()

    def pairs(self) -> QKPairs:
        """All of them, in the order of the prompts."""
        prompts = self._prompts
        counts = [len(listed) for listed in prompts.key_positions]
        names, groups = prompts.key_names, prompts.key_groups
        return QKPairs(
            self._queries,
            self._keys,
            np.repeat(np.arange(len(prompts)), counts),
            prompts.query_labels,
            np.concatenate(prompts.key_labels),
            key_groups=None if groups is None else np.concatenate(groups),
            features=tuple(prompts.features),
            head=head_label(self.head),
            scale=self._scale,
            key_names=None if names is None else np.array([*chain(*names)], dtype=object),
        )

    def _check_visible(self, rows: Rows, places: Places) -> None:
        hidden = ~rows.visible[places.owners, places.keys]
        if hidden.any():
            first = int(hidden.nonzero()[0])
            number = places.prompts[int(places.owners[first])]
            raise ValueError(
                f"{self._caller}: {head_label(self.head)} does not let the query of prompt "
                f"{number}, at {self._prompts.query_positions[number]}, see the key at "
                f"{int(places.keys[first])}: its attention is local; leave the key out"
            )


def collect_pairs(
    bridge: Any, prompts: QKPrompts, heads: Sequence[Head], caller: str
) -> list[QKPairs]:
    """Queries and keys of heads, from one pass over the prompts.

    Parameters
    ----------
    bridge : TransformerBridge
    prompts : QKPrompts
    heads : sequence of (layer, head)
    caller : str
        The function to name in errors.

    Returns
    -------
    list of QKPairs

    Raises
    ------
    ValueError
        If prompts do not fit the model, or a query does not see a key of its prompt.
    UnsupportedLayoutError
        If scores are anything but products of queries and keys times a number.
    """
    model = str(bridge.cfg.architecture)
    collectors = [_Collector(head, prompts, model, caller) for head in heads]
    by_layer: dict[int, list[_Collector]] = {}
    for collector in collectors:
        by_layer.setdefault(collector.head[0], []).append(collector)

    def visit(wanted: list[_Collector], places: Places) -> Visit:
        def take(seen: Scores) -> None:
            for collector in wanted:
                collector.take(seen, places)

        return take

    with evaluating(bridge):
        for tokens, numbers in token_groups(bridge, prompts.tokens, caller):
            places = Places.of(prompts, numbers, tokens.device)
            visits = {layer: visit(wanted, places) for layer, wanted in by_layer.items()}
            run_watched(bridge, tokens, visits, caller, logits=False)
    return [collector.pairs() for collector in collectors]
