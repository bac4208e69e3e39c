"""What a model loses of an operation when heads that carry it out write nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from skhead._checks import check_count
from skhead._heads import Head, layer_sizes, named_heads
from skhead._prompts import Batch, Prompter, batches, labelled_pairs
from skhead.exceptions import UnsupportedLayoutError
from skhead.weights.running import evaluating, open_bridge

__all__ = ["ablate", "rank_heads"]

_CALLER = "ablate"
#: Heads that the published runs take at most: fewer heads in the model than this -> so many.
_LIMITS = {300: 30, 500: 50, 1000: 100, 1500: 150}
_MOST = 250


def rank_heads(scores: pd.Series, *, n: int | None = None) -> list[str]:
    """Heads that carry out an operation, the best first.

    Parameters
    ----------
    scores : Series
        Score of every head of a model, by label, in the order of the heads table.
    n : int or None, default=None
        Heads at most; None takes what the published runs took: 30 in a model of fewer than 300
        heads, 50 below 500, 100 below 1000, 150 below 1500, else 250.

    Returns
    -------
    list of str
        Labels of heads with a score above 0, by falling score; of tied heads the last one of the
        model comes first, as in the published lists.

    Raises
    ------
    ValueError
        If a score is not finite, or `n` is below 1.

    Examples
    --------
    >>> import pandas as pd
    >>> import skhead
    >>> skhead.rank_heads(pd.Series({"L0H0": 0.5, "L0H1": 0.0, "L1H0": 0.7, "L1H1": 0.5}))
    ['L1H0', 'L1H1', 'L0H0']
    """
    values = scores.to_numpy(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"rank_heads: the score of {scores.index[~np.isfinite(values)][0]} is not finite"
        )
    if n is None:
        n = next((most for below, most in _LIMITS.items() if len(values) < below), _MOST)
    check_count("n", n, "rank_heads")
    order = np.argsort(values, kind="stable")[::-1][:n]
    return [str(scores.index[place]) for place in order if values[place] > 0]


def ablate(
    model: Any,
    heads: Any,
    operation: Any,
    templates: Any,
    tokenizer: Any = None,
    *,
    counts: Sequence[int] | None = None,
    controls: Mapping[str, tuple[Any, Any]] | None = None,
    n_random: int = 5,
    leading_space: bool = True,
    bos_token: int | str | None = "auto",
    random_state: int | np.random.Generator | None = 0,
) -> pd.DataFrame:
    """Accuracy on an operation as more and more heads write nothing at the last position.

    Heads are taken out in their order, each together with those before it. The output of a head is
    set to zero at the last position of the prompt and nowhere else, so that what it does for
    earlier positions stays. A prompt is right if its target has the highest logit of all.

    Parameters
    ----------
    model : str, path-like, torch.nn.Module or TransformerBridge
        What `skhead.weights.running.open_bridge` opens.
    heads : sequence of str or (layer, head)
        The heads to take out, in this order: labels ("L4H7"), as `rank_heads` gives them, or
        numbers.
    operation : sequence of (source, target), or mapping of str to such
        As for `dynamic_scores`; of a mapping, one operation.
    templates : str, or sequence of str or (before, after)
        Prompts in which the target is the next token, such as ``"The capital of <X> is"``. Several
        are measured together.
    tokenizer : tokenizer object, path, callable or None, default=None
        As for `dynamic_scores`.
    counts : sequence of int or None, default=None
        How many heads are out when accuracy is measured; None takes every number from 1 to all. The
        whole model, 0, is always measured.
    controls : mapping of str to (operation, templates) or None, default=None
        Other operations, measured without the same heads. Those are telling that the model does
        about as well as the operation, with other heads.
    n_random : int, default=5
        Orders of random other heads to compare with; 0 for none. As many are taken out as of
        `heads`, as long as the model has that many others.
    leading_space : bool, default=True
        As for `dynamic_scores`.
    bos_token : int, "auto" or None, default="auto"
        As for `dynamic_scores`.
    random_state : int, Generator or None, default=0
        Seed of the random heads.

    Returns
    -------
    DataFrame
        Columns ``kind`` ("operation", "random" or "control"), ``operation`` (what is measured),
        ``draw`` (number of the random order, else 0), ``n_removed``, ``accuracy`` in [0, 1] and
        ``n_prompts``.

    Raises
    ------
    HeadTableError
        If a head is not one of the model's, or is named twice.
    TypeError, ValueError
        If prompts cannot be written or do not fit the model, or a parameter is out of range.
    CheckpointError, SourceNotFoundError
        If the model cannot be opened.
    UnsupportedLayoutError
        If the bridge does not let the outputs of its heads be replaced.

    See Also
    --------
    dynamic_scores : What each head does by itself.

    References
    ----------
    .. [1] A. Elhelo and M. Geva, "Inferring Functionality of Attention Heads from their
       Parameters", ACL 2025.

    Examples
    --------
    Token ``b`` followed ``a`` before, and the induction head completes it:

    >>> import skhead
    >>> pairs = [([a, a + 1, 60, 61, a], a + 1) for a in range(40)]
    >>> table = skhead.ablate("skhead/induction-2l", ["L1H1"], pairs, [([64], [])], n_random=3)
    >>> after = table[table["n_removed"] == 1].groupby("kind")["accuracy"].mean()
    >>> bool(after["operation"] < 0.2), bool(after["random"] > 0.8)
    (True, True)
    """
    prompter = Prompter(tokenizer, leading_space, bos_token, _CALLER)
    named = labelled_pairs(operation, _CALLER)
    if len(named) != 1:
        raise ValueError(
            f"{_CALLER}: operation holds {', '.join(named)}; give one, and others as controls"
        )
    (name, pairs) = next(iter(named.items()))
    measured = {("operation", name): (pairs, templates)}
    measured |= {("control", other): task for other, task in (controls or {}).items()}
    prompts = {
        (kind, what): prompter.write(own, [asked] if isinstance(asked, str) else asked, what)
        for (kind, what), (own, asked) in measured.items()
    }
    bridge = open_bridge(model)
    sizes = layer_sizes(bridge, _CALLER)
    order = named_heads(heads, sizes, _CALLER)
    numbers = _numbers(counts, len(order))
    check_count("n_random", n_random, _CALLER, smallest=0)
    random_orders = _random_orders(order, sizes, n_random, np.random.default_rng(random_state))
    rows: list[dict[str, Any]] = []
    with evaluating(bridge):
        for (kind, what), written in prompts.items():
            task = _Task(bridge, sizes, list(batches(bridge, written, _CALLER, least=2)))
            rows += _curve(task, kind, what, 0, order, [0, *numbers])
            if kind == "operation":
                for draw, others in enumerate(random_orders):
                    taken = [number for number in numbers if number <= len(others)]
                    rows += _curve(task, "random", what, draw, others, taken)
    return pd.DataFrame(rows)


def _numbers(counts: Sequence[int] | None, n_heads: int) -> list[int]:
    if counts is None:
        return list(range(1, n_heads + 1))
    for count in counts:
        if check_count("counts", count, _CALLER, smallest=0) > n_heads:
            raise ValueError(
                f"{_CALLER}: counts must be from 0 to the {n_heads} heads given, got {count}"
            )
    return sorted({int(count) for count in counts} - {0})


def _random_orders(
    order: list[Head], sizes: Mapping[int, int], n_random: int, generator: np.random.Generator
) -> list[list[Head]]:
    """Random orders of the heads that are not in `order`."""
    others = [(layer, head) for layer, size in sizes.items() for head in range(size)]
    others = [head for head in others if head not in set(order)]
    return [
        [others[place] for place in generator.permutation(len(others))[: len(order)]]
        for _ in range(n_random)
    ]


def _curve(
    task: _Task, kind: str, what: str, draw: int, order: list[Head], numbers: list[int]
) -> Iterator[dict[str, Any]]:
    """Accuracy by number of heads that are taken out."""
    for number in numbers:
        yield {
            "kind": kind,
            "operation": what,
            "draw": draw,
            "n_removed": number,
            "accuracy": task.accuracy(order[:number]),
            "n_prompts": task.n_prompts,
        }


class _Task:
    """Prompts of one operation, and the model that answers them."""

    def __init__(self, bridge: Any, sizes: Mapping[int, int], prompts: list[Batch]) -> None:
        self._bridge = bridge
        self._prompts = prompts
        self.n_prompts = sum(len(batch.tokens) for batch in prompts)
        self._check_replaceable(sizes)

    def accuracy(self, removed: Sequence[Head]) -> float:
        """Share of prompts whose target has the highest logit when heads write nothing."""
        by_layer: dict[int, list[int]] = {}
        for layer, head in removed:
            by_layer.setdefault(layer, []).append(head)
        right = 0
        for batch in self._prompts:
            logits = self._last_logits(batch.tokens, by_layer)
            if not torch.isfinite(logits).all():
                raise ValueError(
                    f"{_CALLER}: logits are NaN or infinite when {len(removed)} heads write nothing"
                )
            right += int((logits.argmax(-1) == batch.targets).sum())
        return right / self.n_prompts

    def _last_logits(
        self, tokens: torch.Tensor, by_layer: Mapping[int, Sequence[int]]
    ) -> torch.Tensor:
        hooks = [
            (f"blocks.{layer}.attn.hook_z", _silencing(list(heads)))
            for layer, heads in by_layer.items()
        ]
        logits: torch.Tensor = self._bridge.run_with_hooks(
            tokens, return_type="logits", fwd_hooks=hooks
        )
        return logits[:, -1]

    def _check_replaceable(self, sizes: Mapping[int, int]) -> None:
        """Refuse a bridge whose hooks show what heads write but do not change it.

        If no head writes at the last position, it knows nothing of the token before.
        """
        everything = {layer: list(range(size)) for layer, size in sizes.items()}
        tokens = self._prompts[0].tokens[:1]
        other = tokens.clone()
        other[:, -2] = (other[:, -2] + 1) % self._bridge.cfg.d_vocab
        first, second = (self._last_logits(given, everything) for given in (tokens, other))
        if not torch.allclose(first, second, rtol=1e-5, atol=1e-5, equal_nan=True):
            raise UnsupportedLayoutError(
                f"{_CALLER}: the last position of the model ({self._bridge.cfg.architecture}) "
                "still reads the token before when all its heads write nothing: its bridge does "
                "not let their outputs be replaced, or it mixes positions outside of its heads"
            )


def _silencing(heads: list[int]) -> Any:
    """A hook that sets the output of heads to zero at the last position."""

    def silence(value: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        changed = value.clone()
        changed[:, -1, heads] = 0
        return changed

    return silence
