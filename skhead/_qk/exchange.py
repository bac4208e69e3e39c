"""A running model in which two keys of a head trade places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skhead._heads import Head
from skhead._prompts import token_groups
from skhead._qk.collecting import Places, head_label
from skhead._qk.hooks import Scores, run_watched, tolerance
from skhead._qk.interventions import Choices, swap_in_subspace
from skhead.exceptions import UnsupportedLayoutError
from skhead.qk_pairs import QKPairs
from skhead.qk_prompts import QKPrompts
from skhead.weights.running import evaluating

__all__ = ["MODEL_MEASURES", "Exchange"]

#: What is measured of every prompt.
MODEL_MEASURES = (
    "attention_original", "attention_target", "attention_original_before",
    "attention_target_before", "shift", "flip_rate", "output_kl", "top1_changed",
)  # fmt: skip


class Exchange:
    """A model in which two keys of every prompt trade places for one head.

    Parameters
    ----------
    bridge : TransformerBridge
    head : (layer, head)
    prompts : QKPrompts
    pairs : QKPairs
        What the head makes of the prompts.
    choices : Choices
        Two keys of every prompt.
    caller : str
        The function to name in errors.
    """

    def __init__(
        self,
        bridge: Any,
        head: Head,
        prompts: QKPrompts,
        pairs: QKPairs,
        choices: Choices,
        caller: str,
    ) -> None:
        self._bridge = bridge
        self._head = head
        self._prompts = prompts
        self._pairs = pairs
        self._caller = caller
        self._rows = np.stack([choices.originals, choices.targets], axis=1)
        self._positions = np.concatenate(prompts.key_positions)[self._rows]

    def measure(self, bases: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
        """What exchanging keys in subspaces does, as means over the prompts.

        Parameters
        ----------
        bases : sequence of ndarray of shape (d_head, rank)

        Returns
        -------
        ndarray of shape (n_bases, n_measures)
            In the order of `MODEL_MEASURES`.

        Raises
        ------
        UnsupportedLayoutError
            If the model changes when its own scores are written.
        """
        written = [torch.from_numpy(self._swapped_scores(basis)) for basis in bases]
        unchanged = torch.from_numpy(self._swapped_scores(np.zeros((self._pairs.d_head, 0))))
        sums = np.zeros((len(bases), len(MODEL_MEASURES)))
        prompts, device = self._prompts, self._bridge.cfg.device
        with evaluating(self._bridge):
            groups = token_groups(self._bridge, prompts.tokens, self._caller)
            for batch, (tokens, numbers) in enumerate(groups):
                places = Places.of(prompts, numbers, device)
                both = torch.from_numpy(self._positions[numbers]).to(device)
                before = self._run(tokens, places, both, None)
                if batch == 0:
                    self._check_unchanged(
                        before, self._run(tokens, places, both, unchanged[numbers])
                    )
                for i, scores in enumerate(written):
                    after = self._run(tokens, places, both, scores[numbers])
                    sums[i] += _compared(before, after, both)
        return sums / len(prompts)

    def _swapped_scores(self, basis: NDArray[np.floating]) -> NDArray[np.float64]:
        """Attention scores of both keys of every prompt, ``(n_prompts, 2)``."""
        keys = self._pairs.keys.astype(np.float64)[self._rows]
        swapped = np.stack(swap_in_subspace(keys[:, 0], keys[:, 1], basis), axis=1)
        return self._pairs.scale * np.einsum("nd,nkd->nk", self._pairs.queries, swapped)

    def _run(
        self,
        tokens: torch.Tensor,
        places: Places,
        both: torch.Tensor,
        written: torch.Tensor | None,
    ) -> _Outcome:
        layer, head = self._head
        each = torch.arange(len(tokens), device=tokens.device)
        kept: list[torch.Tensor] = []

        def visit(seen: Scores) -> torch.Tensor:
            scores = seen.scores
            if written is not None:
                scores = scores.clone()
                at = (each[:, None], head, places.queries[:, None], both)
                scores[at] = written.to(scores)
            kept.append(scores[each, head, places.queries].double())
            return scores

        logits = run_watched(self._bridge, tokens, {layer: visit}, self._caller, logits=True)
        assert logits is not None
        among = torch.zeros_like(kept[0], dtype=torch.bool)
        among[places.owners, places.keys] = True
        return _Outcome(kept[0], kept[0].masked_fill(~among, -torch.inf).argmax(-1), logits)

    def _check_unchanged(self, before: _Outcome, after: _Outcome) -> None:
        """Refuse a model that answers otherwise when its own scores are written."""
        largest = float(before.logits.abs().max())
        moved = float((after.logits - before.logits).abs().max())
        if not moved <= tolerance(before.logits.dtype) * largest:
            raise UnsupportedLayoutError(
                f"{self._caller}: logits of the model ({self._bridge.cfg.architecture}) move by "
                f"{moved:.2g} when the attention scores of {head_label(self._head)} are written as "
                "they are: it does not compute the same twice"
            )


@dataclass(frozen=True)
class _Outcome:
    """One run of a batch.

    Attributes
    ----------
    scores : Tensor of shape (n, length), float64
        Of the query.
    largest : Tensor of shape (n,), int64
        Position of the key with the largest of them.
    logits : Tensor of shape (n, n_vocab)
        At the last position.
    """

    scores: torch.Tensor
    largest: torch.Tensor
    logits: torch.Tensor


def _compared(before: _Outcome, after: _Outcome, both: torch.Tensor) -> NDArray[np.float64]:
    """Sums over the prompts of a batch of what changed, in the order of `MODEL_MEASURES`."""
    attention = [run.scores.softmax(-1).gather(1, both) for run in (after, before)]
    share = [torch.sigmoid(run.scores.gather(1, both).diff(dim=1)[:, 0]) for run in (after, before)]
    flipped = (before.largest == both[:, 0]) & (after.largest == both[:, 1])
    clean, edited = (run.logits.double().log_softmax(-1) for run in (before, after))
    divergence = (clean.exp() * (clean - edited)).sum(-1)
    changed = before.logits.argmax(-1) != after.logits.argmax(-1)
    measures = [
        *attention[0].T, *attention[1].T, share[0] - share[1], flipped, divergence, changed
    ]  # fmt: skip
    return np.array([float(values.double().sum()) for values in measures])
