"""Queries and keys of heads when a model runs, and what it does when they are changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skhead._checks import check_count
from skhead._heads import layer_sizes, named_heads
from skhead._qk.collecting import collect_pairs
from skhead._qk.doors import generator
from skhead._qk.exchange import MODEL_MEASURES, Exchange
from skhead._qk.interventions import ALL, NONE, Choices, check_conditions, random_conditions
from skhead.exceptions import HeadShapeError
from skhead.qk_pairs import QKPairs
from skhead.qk_prompts import QKPrompts
from skhead.weights.running import open_bridge

__all__ = ["collect_qk", "intervene_on_model"]


def collect_qk(model: Any, prompts: QKPrompts, heads: Any) -> dict[str, QKPairs]:
    """Queries and keys of heads, as they enter the dot product when a model reads prompts.

    They are taken behind everything that the model does to them: rotary positions, norms of
    queries and keys, scales. Keys that several heads share are given to each of them. All heads are
    read in one pass, of which only the wanted positions are kept.

    Parameters
    ----------
    model : str, path-like, torch.nn.Module or TransformerBridge
        What `skhead.weights.running.open_bridge` opens: a source that holds a complete model, a
        Hugging Face module, or a bridge.
    prompts : QKPrompts
        Token ids with the positions of queries and keys, and their labels.
    heads : sequence of str or (layer, head)
        Labels ("L4H7") or numbers.

    Returns
    -------
    dict of str to QKPairs
        By label, in the order of `heads`; queries in the order of the prompts. ``scale`` is what
        the model multiplies products with, and ``logits()`` are its attention scores.

    Raises
    ------
    HeadTableError
        If a head is not one of the model's, or is named twice.
    TypeError, ValueError
        If prompts are of another kind or do not fit the model, or a query does not see a key of
        its prompt, as where attention is local.
    CheckpointError, SourceNotFoundError
        If the model cannot be opened.
    UnsupportedLayoutError
        If attention scores are not products of queries and keys times a number, as with ALiBi,
        relative positions or capped scores, or the model does not show them.

    See Also
    --------
    intervene_on_model : What the model does when keys are exchanged in a subspace.

    Examples
    --------
    The induction head of the bundled model looks for the token behind the same token as now:

    >>> import skhead
    >>> prompts = skhead.QKPrompts(
    ...     tokens=[[64, a, a + 1, 60, a] for a in range(20)],
    ...     query_positions=[4] * 20,
    ...     key_positions=[[1, 2, 3]] * 20,
    ...     query_labels=range(20),
    ...     key_labels=[[-1, a, 60] for a in range(20)],
    ... )
    >>> pairs = skhead.collect_qk("skhead/induction-2l", prompts, ["L1H1"])["L1H1"]
    >>> pairs
    QKPairs(L1H1: 20 queries, 60 keys, d_head 16, feature: 20 positive, 40 negative)
    >>> bool((pairs.logits().reshape(20, 3).argmax(axis=1) == 1).mean() > 0.9)
    True
    """
    caller = "collect_qk"
    prompts = _checked_prompts(prompts, caller)
    bridge = open_bridge(model)
    order = named_heads(heads, layer_sizes(bridge, caller), caller)
    return {pairs.head: pairs for pairs in collect_pairs(bridge, prompts, order, caller)}


def intervene_on_model(
    model: Any,
    prompts: QKPrompts,
    decomposer: Any,
    *,
    head: Any = None,
    original: Any = "attended",
    target: Any = None,
    conditions: Sequence[str] | None = None,
    n_random: int = 10,
    random_state: Any = None,
) -> pd.DataFrame:
    """What a model does when two keys of a head are exchanged in the subspace of a feature.

    Of every prompt, the coordinates of the key that the query attends to and those of another key
    are exchanged within the subspace. The two attention scores that follow are written into the
    head at the position of the query, and the model goes on with them. If the head finds keys by
    the feature, its attention moves from the one to the other.

    Parameters
    ----------
    model : str, path-like, torch.nn.Module or TransformerBridge
        As for `collect_qk`.
    prompts : QKPrompts
        Best others than those that the decomposer was fitted on.
    decomposer : ContrastiveQKDecomposer
        Fitted.
    head : str or (layer, head) or None, default=None
        The head to intervene on; by default the one that the decomposer was fitted on.
    original : "attended", "agreeing", int, or sequence of int, default="attended"
        The key that counts as attended: the one with the most attention among the keys of its
        prompt; the one with the most among those that agree with the query on every feature; or its
        place among the keys of each prompt.
    target : int, sequence of int, or None, default=None
        Place of the key that it is exchanged with; by default drawn among those that agree with the
        query on no feature.
    conditions : sequence of str or None, default=None
        What to exchange: names of features, ``"all"`` of them together, or ``"none"``. By default
        all of these.
    n_random : int, default=10
        Random subspaces to compare with, of each rank that the conditions have; 0 for none.
    random_state : int, RandomState instance, Generator or None, default=None
        Seed of drawn targets and random subspaces.

    Returns
    -------
    DataFrame
        Index ``condition``: those asked for, and ``"random (rank r)"`` for each rank, averaged over
        its draws. Columns ``rank``, ``rank_share`` (of d_head), ``attention_original`` and
        ``attention_target`` (means, with the exchange), ``attention_original_before`` and
        ``attention_target_before``, ``shift`` (mean change of the target's share of the attention
        on both), ``flip_rate`` (share of prompts where of all keys the original had the most
        attention, and the target has it now), ``output_kl`` (mean divergence of the next token's
        distribution at the last position from that without exchange, in nats), ``top1_changed``
        (share of prompts with another most probable next token), ``n_prompts`` and ``n_draws``.

    Raises
    ------
    HeadTableError
        If the model has no such head.
    HeadShapeError
        If the subspaces do not have the width of the head.
    TypeError, ValueError
        If no head is named, there is no such condition, a place is none of the prompt's keys, or a
        prompt has no key that could be the target.
    UnsupportedLayoutError
        As for `collect_qk`; and if the model changes when its own scores are written.

    See Also
    --------
    collect_qk : Queries and keys of the head.

    Notes
    -----
    A random subspace of rank r turns the fraction r / d_head of the key around: where
    ``rank_share`` is not small, only a condition that does more than its random row says anything.

    References
    ----------
    .. [1] A. Lee, Y. Belinkov, F. Viégas and M. Wattenberg, "Decomposing Query-Key Feature
       Interactions Using Contrastive Covariances", arXiv:2602.04752 (2026).

    Examples
    --------
    Four of the directions in which the induction head finds the token behind the same token as now:

    >>> import numpy as np
    >>> import skhead
    >>> words = np.random.default_rng(0).permuted(np.tile(np.arange(64), (400, 1)), axis=1)
    >>> asked = words[np.arange(400), np.arange(400) % 3 * 2]
    >>> prompts = skhead.QKPrompts(
    ...     tokens=[[64, *row[:6], last] for row, last in zip(words, asked)],
    ...     query_positions=[7] * 400,
    ...     key_positions=[[2, 4, 6]] * 400,
    ...     query_labels=asked,
    ...     key_labels=words[:, [0, 2, 4]],
    ...     features=["token before"],
    ... )
    >>> pairs = skhead.collect_qk("skhead/induction-2l", prompts[:300], ["L1H1"])["L1H1"]
    >>> decomposer = skhead.ContrastiveQKDecomposer(rank=4).fit(pairs)
    >>> table = skhead.intervene_on_model(
    ...     "skhead/induction-2l", prompts[300:], decomposer, n_random=3, random_state=0
    ... )
    >>> table.index.tolist()
    ['none', 'token before', 'random (rank 4)']
    >>> bool(table.loc["token before", "shift"] > 1.5 * table.loc["random (rank 4)", "shift"])
    True
    """
    caller = "intervene_on_model"
    prompts = _checked_prompts(prompts, caller)
    label = _head_of(decomposer, head, caller)
    check_count("n_random", n_random, caller, smallest=0)
    rng = generator(random_state)
    bridge = open_bridge(model)
    place = named_heads([label], layer_sizes(bridge, caller), caller)[0]
    pairs = collect_pairs(bridge, prompts, [place], caller)[0]
    draws = {name: [basis] for name, basis in _bases(decomposer, conditions, pairs, caller).items()}
    choices = _choices(pairs, original, target, rng, caller)
    bases = [basis for drawn in draws.values() for basis in drawn]
    draws |= random_conditions(bases, pairs.d_head, n_random, rng)
    every = [basis for drawn in draws.values() for basis in drawn]
    measured = iter(Exchange(bridge, place, prompts, pairs, choices, caller).measure(every))
    rows = []
    for name, drawn in draws.items():
        means = np.mean([next(measured) for _ in drawn], axis=0)
        rank = drawn[0].shape[1]
        rows.append(
            {"condition": name, "rank": rank, "rank_share": rank / pairs.d_head}
            | dict(zip(MODEL_MEASURES, map(float, means), strict=True))
            | {"n_prompts": len(prompts), "n_draws": len(drawn)}
        )
    return pd.DataFrame(rows).set_index("condition")


def _checked_prompts(prompts: Any, caller: str) -> QKPrompts:
    if not isinstance(prompts, QKPrompts):
        raise TypeError(f"{caller}: prompts must be QKPrompts, got {type(prompts).__name__}")
    return prompts


def _head_of(decomposer: Any, head: Any, caller: str) -> Any:
    if not hasattr(decomposer, "feature_names_"):
        raise TypeError(
            f"{caller}: decomposer must be a fitted ContrastiveQKDecomposer, got "
            f"{type(decomposer).__name__}"
        )
    label = decomposer.head_ if head is None else head
    if not label:
        raise ValueError(
            f"{caller}: the decomposer was fitted on pairs without the label of a head; name it, "
            "such as head='L4H7'"
        )
    return label


def _bases(
    decomposer: Any, conditions: Sequence[str] | None, pairs: QKPairs, caller: str
) -> dict[str, NDArray[np.floating]]:
    """Subspace of each condition."""
    features = list(decomposer.feature_names_)
    check_conditions(features, caller)
    known = [NONE, *features, ALL]
    if conditions is None:
        conditions = known if len(features) > 1 else known[:-1]
    unknown = [name for name in conditions if name not in known]
    if isinstance(conditions, str) or unknown or not len(conditions):
        raise ValueError(
            f"{caller}: conditions must be a list of some of {', '.join(known)}; got {conditions!r}"
        )
    bases: dict[str, NDArray[np.floating]] = {}
    for name in conditions:
        named = () if name == ALL else (name,)
        empty = np.zeros((pairs.d_head, 0))
        bases[name] = empty if name == NONE else np.asarray(decomposer.key_subspace(*named))
        if len(bases[name]) != pairs.d_head:
            raise HeadShapeError(
                f"{caller}: the subspace of {name} has d_head {len(bases[name])}, and the keys of "
                f"{pairs.head} have {pairs.d_head}; was the decomposer fitted on another model?"
            )
    return bases


def _choices(
    pairs: QKPairs, original: Any, target: Any, rng: np.random.Generator, caller: str
) -> Choices:
    """The two keys of every prompt, as rows of the keys."""
    choices = Choices.of(pairs, original, target, rng, caller)
    without = np.setdiff1d(np.arange(len(pairs)), choices.queries)
    if without.size:
        raise ValueError(
            f"{caller}: {without.size} prompts lack a key to take for the original, or another "
            f"one that differs from the query on every feature, such as prompt {without[0]}; leave "
            "them out, or name the keys of each by original= and target="
        )
    return choices
