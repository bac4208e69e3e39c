"""Skip-trigrams: which tokens a head attends to, and what it writes of them, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch

from skhead._base import ROLES
from skhead._callers import saying_once
from skhead._checks import check_count
from skhead._devices import check_device
from skhead._inputs import (
    Processing,
    SourceHeads,
    check_ids,
    heads_at,
    layer_rows,
    models_with_tokens,
    token_matrix,
    token_texts,
)
from skhead._progress import progress_bar

__all__ = ["skip_trigrams"]

_CALLER = "skip_trigrams"
#: Bytes of the block of tokens against tokens that is held at once.
_SCRATCH = 2**26


def skip_trigrams(
    heads: Any,
    *,
    n_sources: int = 10,
    k: int = 5,
    sources: Sequence[int] | None = None,
    vocabulary: Any = None,
    fold_norm: bool = False,
    center: bool = False,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """The strongest skip-trigrams "source ... destination -> out" of every head.

    A head moves a source token's content to a destination: the QK circuit ``E W_Q W_K^T E^T`` says
    which destination tokens attend to the source, the OV circuit ``E W_V W_O U`` which tokens the
    source promotes there. As one attention pattern serves all outputs, destinations and outputs of
    a source are ranked separately, and stand side by side in the table.

    Parameters
    ----------
    heads : DataFrame
        Heads table, of one or several models. Circuits start at the token embedding: they are the
        whole of an attention-only model's first layer, and the direct path to deeper heads.
    n_sources : int, default=10
        How many source tokens to list for each head, those of largest ``strength``.
    k : int, default=5
        How many destinations and outputs to list for each source.
    sources : sequence of int or None, default=None
        Source tokens to consider; all by default, which takes ``4 n_vocab^2 d_head`` flops a head.
        Name some when the vocabulary is large.
    vocabulary : callable, sequence, mapping or None, default=None
        Text of each token id, for the columns ``source_text``, ``destination_text`` and
        ``out_text``.
    fold_norm, center : bool, default=False
        As for `SubspaceExtractor`, applied to embedding and unembedding too.
    device : str, torch.device or None, default=None
        Where to compute.

    Returns
    -------
    DataFrame
        One row per head, source and rank:

        ``head``, ``source``, ``rank``
            Label of the head, token id, and place from 1.
        ``destination``, ``attention``
            The destination token of that rank and its attention logit: the entry of the QK circuit
            over ``sqrt(d_head)``, above its mean over all sources, which a softmax does not see.
        ``out``, ``logit``
            The output token of that rank and its logit above the mean over all outputs.
        ``strength``
            Of the source: its largest attention logit times its largest output logit; 0 where
            either is negative.

    Raises
    ------
    HeadTableError
        If `heads` is no heads table, so that there are no tokens to read.
    UnsupportedLayoutError
        If a model's file holds no embedding or unembedding.
    ValueError
        If a parameter is out of range.

    Notes
    -----
    The vocabulary is taken some source tokens at a time, so that no matrix of tokens against tokens
    is held beyond 64 MiB, and the heads layer by layer. Positions, biases and the norms' division
    are no part of the circuits.

    References
    ----------
    N. Elhage et al., "A mathematical framework for transformer circuits", Transformer Circuits
    Thread (2021): one-layer attention-only models as skip-trigrams.

    Examples
    --------
    >>> import skhead
    >>> from skhead.trigrams import skip_trigrams
    >>> heads = skhead.load_heads("skhead/induction-2l")
    >>> trigrams = skip_trigrams(heads.loc[["L1H1"]], sources=[7], k=2)
    >>> trigrams[["head", "source", "rank", "out"]].values.tolist()[0]
    ['L1H1', 7, 1, 7]
    """
    n_kept = check_count("n_sources", n_sources, _CALLER)
    n_listed = check_count("k", k, _CALLER)
    process = Processing(fold_norm, center, check_device(device, _CALLER, float64=True))
    tables = []
    with saying_once():
        for model in models_with_tokens(heads, process, _CALLER):
            tables += _tables_of_model(model, sources, n_kept, n_listed, process)
    table = pd.concat(tables, ignore_index=True)
    if vocabulary is not None:
        for name in ("source", "destination", "out"):
            texts = token_texts(table[name].to_numpy(), vocabulary, _CALLER)
            table.insert(table.columns.tolist().index(name) + 1, f"{name}_text", texts)
    return table


def _tables_of_model(
    model: SourceHeads,
    sources: Sequence[int] | None,
    n_kept: int,
    n_listed: int,
    process: Processing,
) -> list[pd.DataFrame]:
    space = process.tokens(model.name, ("embedding", "unembedding"))
    embedding, unembedding = (
        token_matrix(space, which, _CALLER) for which in ("embedding", "unembedding")
    )
    asked = torch.as_tensor(
        check_ids(sources, len(embedding), "sources", _CALLER), device=embedding.device
    )
    tables: dict[int, pd.DataFrame] = {}
    for rows in progress_bar(layer_rows(model.table), _CALLER, unit="layer"):
        stacks = [process.stack(heads_at(model.heads, rows), role) for role in ROLES]
        for row, w_q, w_k, w_v, w_o in zip(rows.tolist(), *stacks, strict=True):
            queries = embedding @ w_q / w_q.shape[1] ** 0.5
            keys, outputs = _centred(embedding @ w_k), _centred(unembedding @ w_o)
            sides = (keys, queries, embedding @ w_v, outputs)
            tables[row] = _table(_strongest(sides, asked, n_kept, n_listed), model.labels[row])
    return [tables[row] for row in range(len(tables))]


def _centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(0, dtype=torch.float64).to(rows.dtype)


@dataclass(frozen=True)
class _Trigrams:
    """Sources with their best destinations and outputs, ``(n_sources, k)`` each."""

    sources: torch.Tensor
    attention: torch.Tensor
    destinations: torch.Tensor
    logits: torch.Tensor
    outs: torch.Tensor

    @property
    def strength(self) -> torch.Tensor:
        """Best attention logit times best output logit of each source."""
        return self.attention[:, 0].clamp_min(0) * self.logits[:, 0].clamp_min(0)

    def best(self, n: int) -> _Trigrams:
        """The `n` strongest sources, falling; equal ones stay in order."""
        order = self.strength.argsort(descending=True, stable=True)[:n]
        return _Trigrams(*(getattr(self, field.name)[order] for field in fields(self)))


def _strongest(
    sides: Sequence[torch.Tensor], asked: torch.Tensor, n_kept: int, n_listed: int
) -> _Trigrams:
    """The strongest sources of one head, some tokens at a time.

    The sides are what tokens are as keys, as queries, as values and as outputs.
    """
    keys, queries, values, outputs = sides
    step = max(_SCRATCH // (keys.element_size() * max(len(queries), len(outputs))), 1)
    parts: list[_Trigrams] = []
    for some in asked.split(step):
        attention, destinations = _largest(keys[some] @ queries.T, n_listed)
        logits, outs = _largest(values[some] @ outputs.T, n_listed)
        found = _Trigrams(some, attention, destinations, logits, outs)
        parts.append(found.best(n_kept))
    names = [field.name for field in fields(_Trigrams)]
    joined = _Trigrams(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
    return joined.best(n_kept)


def _largest(block: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest entries of every row and their columns."""
    values, columns = block.topk(min(k, block.shape[1]), dim=1)
    return values, columns


def _table(found: _Trigrams, label: str) -> pd.DataFrame:
    n_listed = min(found.attention.shape[1], found.logits.shape[1])
    listed = {
        "destination": found.destinations,
        "attention": found.attention,
        "out": found.outs,
        "logit": found.logits,
    }
    numbers = {name: part[:, :n_listed].reshape(-1).cpu().numpy() for name, part in listed.items()}
    keys = {
        "head": label,
        "source": np.repeat(found.sources.cpu().numpy(), n_listed),
        "rank": np.tile(np.arange(1, n_listed + 1), len(found.sources)),
    }
    strength = np.repeat(found.strength.cpu().numpy(), n_listed)
    return pd.DataFrame(keys | numbers | {"strength": strength})
