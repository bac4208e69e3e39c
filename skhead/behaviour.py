"""What heads attend to when the model runs: scores of behaviour, and labels by thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead import datasets
from skhead._checks import check_count
from skhead._heads import running_labels
from skhead.weights.running import (
    attention_layers,
    evaluating,
    open_bridge,
    token_batches,
)

__all__ = ["BEHAVIOURS", "label_heads"]

#: Score of behaviour -> class of the heads in which it reaches its threshold.
BEHAVIOURS = {
    "previous_token": "Previous Token",
    "duplicate_token": "Duplicate Token",
    "induction": "Induction",
    "first_token": "First Token",
    "current_token": "Current Token",
}
_THRESHOLD = 0.5
_UNLABELLED = "None"
_CALLER = "label_heads"
#: Longest block of random tokens that is chosen without being asked for.
_LENGTH = 50
#: First query position that is scored, where current, previous and first token are distinct.
_FIRST_QUERY = 2
_CAUSAL_TOLERANCE = 1e-6
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def label_heads(
    model: Any,
    tokens: Any = None,
    *,
    n_sequences: int = 64,
    length: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    bos_token: int | str | None = "auto",
    vocabulary: Any = "auto",
    random_state: int | np.random.Generator | None = 0,
) -> pd.DataFrame:
    """Score every head by what it attends to, and label those that do one thing above all.

    The model runs on repeated random tokens, that is one block of random tokens twice, and on
    `tokens` if they are given. A score is the mean share of attention, from 0 to 1, that a head
    pays to a target, over the query positions from the third on that have the target. With
    ``t`` the tokens, a query at ``i`` has

    - ``previous_token``: position ``i - 1``;
    - ``duplicate_token``: every ``j < i`` with ``t[j] == t[i]``;
    - ``induction``: every ``j < i`` with ``t[j - 1] == t[i]``, what came after the token earlier;
    - ``first_token``: position 0, on which heads rest that have nothing to do;
    - ``current_token``: position ``i`` itself.

    Parameters
    ----------
    model : str, path-like, torch.nn.Module or TransformerBridge
        What `skhead.weights.running.open_bridge` opens: a source that holds a complete model, a
        Hugging Face module, or a bridge.
    tokens : array of shape (n, length), or list of sequences of token ids, default=None
        Text to run on besides; of any lengths of at least 3, beginning-of-sequence token included
        where the model is used to one.
    n_sequences : int, default=64
        Sequences of repeated random tokens; 0 runs on `tokens` alone.
    length : int or None, default=None
        Tokens of a random block, at least 2; None takes 50, or as many as fit into the context
        twice.
    thresholds : mapping of str to float or None, default=None
        Least score for a label, by name of the score; 0.5 for each that is not given, which asks
        for half of the head's attention. ``float("inf")`` leaves a class out.
    bos_token : int, "auto" or None, default="auto"
        Token in front of the random block; None for none. "auto" takes the one of the model's
        configuration or card, and none where these name none.
    vocabulary : sequence of int or "auto", default="auto"
        Tokens to draw from; without replacement where there are at least `length`. "auto" takes
        all but those that the model's configuration or card marks as special.
    random_state : int, Generator or None, default=0
        Seed of the random tokens.

    Returns
    -------
    DataFrame
        One row per head, index as that of `load_heads`. One column per score; where the model ran
        on both kinds of sequences, ``"repeated:induction"``, ``"text:induction"`` and so on. Column
        ``label`` holds the class with the highest score among those that reach their threshold,
        ``"None"`` where none does; it goes by the repeated random tokens where there are any, on
        which position, identity and succession of tokens are not confounded by language.
        ``attrs`` holds ``"chance"`` (score by column of a head that attends to all tokens that it
        sees alike), ``"thresholds"`` and ``"observations"`` (queries that have the target). A
        score that no query could give is NaN.

    Raises
    ------
    TypeError
        If `tokens` are not integers, or `thresholds` are no mapping.
    ValueError
        If a parameter is out of range, or a sequence does not fit the model.
    CheckpointError, UnsupportedLayoutError, SourceNotFoundError
        If the model cannot be run; a checkpoint that lacks tensors is never filled up.

    Notes
    -----
    A score is a share of attention, which a head may also get by spreading attention over many
    tokens where the target is most of them; compare it with chance. On repeated random tokens
    induction and duplicate token have one target per query of the second block.

    References
    ----------
    .. [1] C. Olsson et al., "In-context Learning and Induction Heads", Transformer Circuits
       Thread, 2022.

    Examples
    --------
    >>> import skhead
    >>> table = skhead.label_heads("skhead/induction-2l", n_sequences=16)
    >>> table.loc[table["label"] != "None", "label"].to_dict()
    {'L0H0': 'Previous Token', 'L1H1': 'Induction'}
    >>> bool(table.loc["L1H1", "induction"] > 10 * table.attrs["chance"]["induction"])
    True
    """
    limits = _checked_thresholds(thresholds)
    bridge = open_bridge(model)
    generator = np.random.default_rng(random_state)
    corpora: dict[str, list[torch.Tensor]] = {}
    if check_count("n_sequences", n_sequences, _CALLER, smallest=0):
        special = _special_tokens(model, bridge)
        bos = special.bos if bos_token == "auto" else bos_token
        automatic = isinstance(vocabulary, str) and vocabulary == "auto"
        words = special.ordinary if automatic else np.asarray(vocabulary)
        drawn = _repeated_tokens(bridge, n_sequences, length, bos, words, generator)
        corpora["repeated"] = _batches(bridge, drawn)
    if tokens is not None:
        corpora["text"] = _batches(bridge, tokens)
    if not corpora:
        raise ValueError(
            f"{_CALLER}: n_sequences=0 and no tokens leave nothing to run on; give one of them"
        )
    with evaluating(bridge):
        measured = {name: _measure(bridge, batches) for name, batches in corpora.items()}
    heads = next(iter(measured.values())).scores()[1]
    labels = pd.Index(running_labels(model, heads, _CALLER), dtype=object)
    return _table(labels, measured, limits)


def _checked_thresholds(thresholds: Mapping[str, float] | None) -> dict[str, float]:
    limits = dict.fromkeys(BEHAVIOURS, _THRESHOLD)
    if thresholds is not None and not isinstance(thresholds, Mapping):
        raise TypeError(
            f"{_CALLER}: thresholds must map names of scores to numbers, got "
            f"{type(thresholds).__name__}"
        )
    given: Mapping[str, Any] = thresholds or {}
    for name, value in given.items():
        if name not in limits:
            raise ValueError(
                f"{_CALLER}: thresholds name the unknown score {name!r}; the scores are "
                f"{', '.join(BEHAVIOURS)}"
            )
        if not isinstance(value, Real) or not float(value) > 0:
            raise ValueError(
                f"{_CALLER}: threshold of {name} must be a positive number, got {value!r}"
            )
        limits[name] = float(value)
    return limits


def _batches(bridge: Any, tokens: Any) -> list[torch.Tensor]:
    return token_batches(bridge, tokens, _CALLER, least=_FIRST_QUERY + 1)


@dataclass(frozen=True)
class _Special:
    """The beginning-of-sequence token of a model, if any, and the tokens that mean a word."""

    bos: int | None
    ordinary: NDArray[np.int64]


def _special_tokens(model: Any, bridge: Any) -> _Special:
    n_vocab = int(bridge.cfg.d_vocab)
    marked: dict[str, list[int]] = {}
    if isinstance(model, str) and model in datasets.list_models():
        named = datasets.load_model_card(model).get("tokens", {})
        marked = {name: [int(ids)] for ids, name in named.items() if ids.isdecimal()}
        bos = marked.get("bos")
    else:
        config = getattr(bridge.original_model, "config", None)
        for name in _SPECIAL:
            value = getattr(config, name, None)
            marked[name] = [value] if isinstance(value, int) else list(value or ())
        bos = marked["bos_token_id"]
    special = sorted({token for ids in marked.values() for token in ids if token < n_vocab})
    ordinary = np.setdiff1d(np.arange(n_vocab), special)
    return _Special(bos[0] if bos and bos[0] < n_vocab else None, ordinary)


def _repeated_tokens(
    bridge: Any,
    n_sequences: int,
    length: int | None,
    bos: Any,
    words: NDArray[np.int64],
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """Sequences of one random block twice, behind the beginning-of-sequence token if any."""
    n_front = 0 if bos is None else 1
    room = (int(bridge.cfg.n_ctx) - n_front) // 2
    block = (
        min(_LENGTH, room) if length is None else check_count("length", length, _CALLER, smallest=2)
    )
    if not 2 <= block <= room:
        raise ValueError(
            f"{_CALLER}: a random block of length {block} does not fit twice into the model's "
            f"context of {bridge.cfg.n_ctx} tokens; at most {room} do, and at least 2 are needed"
        )
    if words.ndim != 1 or words.size < 2 or words.dtype.kind not in "iu":
        raise ValueError(
            f"{_CALLER}: vocabulary must hold at least two token ids, got shape {words.shape} of "
            f"{words.dtype}"
        )
    words = np.unique(words)
    n_vocab = int(bridge.cfg.d_vocab)
    if words[0] < 0 or words[-1] >= n_vocab:
        odd = words[0] if words[0] < 0 else words[-1]
        raise ValueError(
            f"{_CALLER}: vocabulary holds token {odd}; the model's tokens are 0 to {n_vocab - 1}"
        )
    drawn = np.stack(
        [generator.choice(words, block, replace=words.size < block) for _ in range(n_sequences)]
    )
    first = check_count("bos_token", bos, _CALLER, smallest=0) if n_front else 0
    front = np.full((len(drawn), n_front), first)
    return np.concatenate([front, drawn, drawn], axis=1)


@dataclass
class _Measured:
    """Sums over queries, by score: attention of every layer's heads, uniform attention, counts."""

    attention: dict[int, torch.Tensor]
    uniform: torch.Tensor
    queries: torch.Tensor

    def scores(self) -> tuple[NDArray[np.float64], list[tuple[int, int]]]:
        """Scores ``(n_heads, n_scores)``, and the layer and head of every row."""
        layers = sorted(self.attention)
        heads = [(layer, head) for layer in layers for head in range(len(self.attention[layer]))]
        means = torch.cat([self.attention[layer] for layer in layers]) / self.queries
        return means.numpy(), heads

    @property
    def chance(self) -> NDArray[np.float64]:
        return (self.uniform / self.queries).numpy()


def _measure(bridge: Any, batches: Sequence[torch.Tensor]) -> _Measured:
    """Stream sequences through the model, keeping sums over queries and no pattern."""
    layers = attention_layers(bridge, _CALLER)
    names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in layers}
    n_scores = len(BEHAVIOURS)
    measured = _Measured({}, torch.zeros(n_scores).double(), torch.zeros(n_scores).double())
    for tokens in batches:
        targets = _targets(tokens)
        wanted = targets.flatten(2).mT.float()
        sees_later: dict[int, bool] = {}
        hooks = [
            (name, _collector(layer, wanted, measured, sees_later)) for layer, name in names.items()
        ]
        bridge.run_with_hooks(tokens.to(bridge.cfg.device), return_type=None, fwd_hooks=hooks)
        silent = [layer for layer in layers if layer not in sees_later]
        if silent:
            raise ValueError(
                f"{_CALLER}: the bridge shows no attention pattern of layer {silent[0]} "
                f"({bridge.cfg.architecture}); open the model with attn_implementation='eager'"
            )
        n_tokens = tokens.shape[1]
        seen = torch.arange(1, n_tokens + 1).double()
        if any(sees_later.values()):
            seen = torch.full((n_tokens,), float(n_tokens), dtype=torch.float64)
        measured.uniform += (targets.sum(-1).double() / seen).sum((0, 2))
        measured.queries += targets.any(-1).sum((0, 2))
    return measured


def _collector(
    layer: int, wanted: torch.Tensor, measured: _Measured, sees_later: dict[int, bool]
) -> Callable[..., None]:
    """A hook that adds up what the heads of a layer pay to ``(batch, query * key, score)``."""
    n_batch, n_pairs, n_scores = wanted.shape

    def collect(pattern: torch.Tensor, hook: Any) -> None:
        shape = tuple(pattern.shape)
        if len(shape) != 4 or shape[0] != n_batch or shape[2] * shape[3] != n_pairs:
            raise ValueError(
                f"{_CALLER}: {hook.name} has shape {shape}; expected (batch, head, query, key) "
                f"with {n_batch} sequences and {n_pairs} pairs of query and key"
            )
        pattern = pattern.detach().cpu().float()
        paid = pattern.flatten(2) @ wanted
        bad = ~torch.isfinite(paid).all(2).all(0)
        if bad.any():
            raise ValueError(
                f"{_CALLER}: attention of L{layer}H{int(bad.nonzero()[0])} is NaN; the model's "
                "activations overflow"
            )
        total = measured.attention.setdefault(
            layer, torch.zeros(pattern.shape[1], n_scores, dtype=torch.float64)
        )
        total += paid.double().sum(0)
        sees_later[layer] = bool(pattern.triu(1).max() > _CAUSAL_TOLERANCE)

    return collect


def _targets(tokens: torch.Tensor) -> torch.Tensor:
    """Which keys are targets of a query, ``(batch, n_scores, query, key)``, in score order."""
    n_batch, n_tokens = tokens.shape
    square = torch.ones(n_tokens, n_tokens, dtype=torch.bool)
    earlier = square.tril(-1)
    equal = (tokens[:, :, None] == tokens[:, None, :]) & earlier
    followed = torch.zeros_like(equal)
    followed[:, :, 1:] = equal[:, :, :-1] & earlier[:, 1:]
    first = torch.zeros_like(square)
    first[:, 0] = True
    by_name = {
        "previous_token": square.tril(-1).triu(-1).expand(n_batch, -1, -1),
        "duplicate_token": equal,
        "induction": followed,
        "first_token": first.expand(n_batch, -1, -1),
        "current_token": torch.eye(n_tokens, dtype=torch.bool).expand(n_batch, -1, -1),
    }
    stacked = torch.stack([by_name[name] for name in BEHAVIOURS], dim=1)
    stacked[:, :, :_FIRST_QUERY] = False
    return stacked


def _table(
    index: pd.Index, measured: Mapping[str, _Measured], limits: Mapping[str, float]
) -> pd.DataFrame:
    columns: dict[str, NDArray[np.float64]] = {}
    chance: dict[str, float] = {}
    observations: dict[str, int] = {}
    for corpus, result in measured.items():
        scores, _ = result.scores()
        for place, name in enumerate(BEHAVIOURS):
            column = name if len(measured) == 1 else f"{corpus}:{name}"
            columns[column] = scores[:, place]
            chance[column] = float(result.chance[place])
            observations[column] = int(result.queries[place])
    table = pd.DataFrame(columns, index=index)
    deciding, _ = next(iter(measured.values())).scores()
    table["label"] = _classes(deciding, limits)
    table.attrs = {"chance": chance, "thresholds": dict(limits), "observations": observations}
    return table


def _classes(scores: NDArray[np.float64], limits: Mapping[str, float]) -> NDArray[np.object_]:
    least = np.array([limits[name] for name in BEHAVIOURS])
    reached = np.where(scores >= least, scores, -np.inf)
    names = np.array([*BEHAVIOURS.values()], dtype=object)
    return np.where(np.isfinite(reached).any(1), names[reached.argmax(1)], _UNLABELLED)
