"""Scores of the heads of one model at operations, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from skhead._callers import warn_user
from skhead._inputs import Processing, SourceHeads, heads_at, layer_rows, token_matrix
from skhead._operations.pairs import check_targets
from skhead._progress import progress_bar
from skhead.exceptions import DegenerateHeadError, MemoryBudgetError, UnsupportedLayoutError
from skhead.linalg.factored import product_norms
from skhead.linalg.precision import tall_product
from skhead.linalg.ranks import PairRanks, PairTables, rank_pairs
from skhead.stats.matching import matching_log_tail
from skhead.weights.first_block import read_source_embedding

__all__ = ["OperationRanks", "Reading", "rank_operations"]

Pairs = Mapping[str, NDArray[np.int64]]

#: Bytes per source row and token of the vocabulary: two extreme logits of groups of 30 tokens.
_ROW_SHARE = 8 / 30
#: Blocks of logits and gathered vectors.
_BLOCKS = 96 << 20


@dataclass(frozen=True)
class Reading:
    """How a model is read, and what is asked of it.

    Attributes
    ----------
    process : Processing
    source_embedding : {"raw", "mlp0", "resid_post_mlp0"}
    missing_mlp : {"raise", "raw"}
    ks : mapping of str to tuple of int
        By operation, in rising order.
    n_valid_tokens : int or None
    tokenizer_size : int or None
    max_memory : int
    caller : str
    """

    process: Processing
    source_embedding: str
    missing_mlp: str
    ks: Mapping[str, tuple[int, ...]]
    n_valid_tokens: int | None
    tokenizer_size: int | None
    max_memory: int
    caller: str


@dataclass(frozen=True)
class OperationRanks:
    """How the heads of one model stand to one operation.

    Attributes
    ----------
    above, below, ties : ndarray of shape (n_heads, n_pairs), int64
        Tokens with a larger, a smaller and the same logit as the target.
    expectation : ndarray of shape (n_heads, 2, n_k)
        Mean score over all permutations of the targets: for promotion and suppression, every k.
    log_p : ndarray of shape (n_heads, 2, n_k)
        Natural logarithm of the bound of the permutation p-value.
    n_vocab : ndarray of shape (n_heads,), int64
        Tokens that compete.
    """

    above: NDArray[np.int64]
    below: NDArray[np.int64]
    ties: NDArray[np.int64]
    expectation: NDArray[np.float64]
    log_p: NDArray[np.float64]
    n_vocab: NDArray[np.int64]


def rank_operations(model: SourceHeads, pairs: Pairs, reading: Reading) -> list[OperationRanks]:
    """Rank the targets of every operation for every head of one model.

    Parameters
    ----------
    model : SourceHeads
        Heads of a table.
    pairs : mapping of str to ndarray of shape (n_pairs, 2)
    reading : Reading

    Returns
    -------
    list of OperationRanks
        In the order of `pairs`, heads in the order of `model`.

    Raises
    ------
    UnsupportedLayoutError
        If the model lacks an embedding, an unembedding or a first MLP that is asked for.
    DegenerateHeadError
        If the OV map of a head, or the embedding of a source token, is zero.
    MemoryBudgetError
        If one operation of one head needs more memory than is allowed.
    ValueError
        If a token is outside of the vocabulary.
    """
    unembedding = _competing(model, reading)
    competing = f"the competing tokens of {model.name}"
    check_targets(pairs, len(unembedding), competing, reading.caller)
    sources = np.unique(np.concatenate([ids[:, 0] for ids in pairs.values()]))
    vectors = _SourceVectors(model, sources, reading)
    d_head = int(model.table["d_head"].iloc[0])
    batches = [
        _Batch.of({name: pairs[name] for name in names}, sources, reading)
        for names in _batched(pairs, len(unembedding), d_head, reading)
    ]
    found = {
        name: _empty(len(model.rows), len(ids), len(reading.ks[name]), len(unembedding))
        for name, ids in pairs.items()
    }
    largest_norm = float(torch.linalg.vector_norm(unembedding, dim=1).max())
    for rows in progress_bar(layer_rows(model.table), reading.caller, unit="layer"):
        layer = int(model.table["layer"].iloc[rows[0]])
        heads = _LayerHeads.read(model, rows, reading)
        ranked = [
            _rank_head(heads, i, vectors.at(layer), unembedding, batches, largest_norm)
            for i in range(len(rows))
        ]
        for name, operation in found.items():
            _fill(operation, rows, [of_head[name] for of_head in ranked], reading.ks[name])
    return [found[name] for name in pairs]


def _empty(n_heads: int, n_pairs: int, n_k: int, n_vocab: int) -> OperationRanks:
    return OperationRanks(
        above=np.zeros((n_heads, n_pairs), dtype=np.int64),
        below=np.zeros((n_heads, n_pairs), dtype=np.int64),
        ties=np.zeros((n_heads, n_pairs), dtype=np.int64),
        expectation=np.zeros((n_heads, 2, n_k)),
        log_p=np.zeros((n_heads, 2, n_k)),
        n_vocab=np.full(n_heads, n_vocab, dtype=np.int64),
    )


def _fill(
    operation: OperationRanks,
    rows: NDArray[np.int64],
    ranked: list[PairRanks],
    ks: tuple[int, ...],
) -> None:
    """Write the ranks of some heads, with their null, into those of all heads."""
    for name in ("above", "below", "ties"):
        getattr(operation, name)[rows] = _stack(ranked, name)
    row_hits, column_hits = (_stack(ranked, f"{side}_hits") for side in ("row", "column"))
    n_heads, _, n_k, n_pairs = row_hits.shape
    counts = np.stack([operation.above[rows], operation.below[rows]], axis=1)
    hits = (counts[:, :, None, :] < np.asarray(ks)[:, None]).sum(3)
    operation.expectation[rows] = row_hits.sum(3) / n_pairs**2
    operation.log_p[rows] = matching_log_tail(
        hits.ravel(),
        row_hits.reshape(-1, n_pairs) / n_pairs,
        column_hits.reshape(-1, n_pairs) / n_pairs,
    ).reshape(n_heads, 2, n_k)


def _stack(ranked: list[PairRanks], name: str) -> NDArray[np.int64]:
    found: NDArray[np.int64] = torch.stack([getattr(head, name) for head in ranked]).cpu().numpy()
    return found


@dataclass(frozen=True)
class _LayerHeads:
    """What the heads of one layer read and write.

    Attributes
    ----------
    values : Tensor of shape (n_distinct, d_model, d_head)
    index : ndarray of shape (n_heads,)
        Which of `values` belongs to which head.
    writes : Tensor of shape (n_heads, d_model, d_head)
    """

    values: torch.Tensor
    index: NDArray[np.int64]
    writes: torch.Tensor

    @classmethod
    def read(cls, model: SourceHeads, rows: NDArray[np.int64], reading: Reading) -> _LayerHeads:
        """Read the heads of one layer, and refuse zero maps."""
        heads = heads_at(model.heads, rows)
        values = heads.read("V", **reading.process.options)
        found = cls(values.tensor, values.index, reading.process.stack(heads, "O"))
        for i, place in enumerate(found.index):
            if product_norms(found.values[place, None], found.writes[i, None]).item() == 0:
                raise DegenerateHeadError(
                    f"{reading.caller}: the OV map of {model.labels[rows[i]]} is zero, so that it "
                    "maps all tokens alike; drop the head, for example heads.drop(index=...)"
                )
        return found


def _rank_head(
    heads: _LayerHeads,
    i: int,
    vectors: torch.Tensor,
    unembedding: torch.Tensor,
    batches: list[_Batch],
    largest_norm: float,
) -> dict[str, PairRanks]:
    """Ranks of one head by operation."""
    value = heads.values[int(heads.index[i])].double()
    ranked: dict[str, PairRanks] = {}
    for batch in batches:
        read = tall_product(vectors[batch.sources], value)
        found = rank_pairs(
            read, heads.writes[i], unembedding, batch.tables, largest_norm=largest_norm
        )
        ranked.update(zip(batch.names, found, strict=True))
    return ranked


def _competing(model: SourceHeads, reading: Reading) -> torch.Tensor:
    """The unembedding of all tokens that compete."""
    space = reading.process.tokens(model.name, ("unembedding",))
    if "embedding" in space.missing:
        raise UnsupportedLayoutError(f"{reading.caller}: {space.missing['embedding']}")
    unembedding = token_matrix(space, "unembedding", reading.caller)
    n_valid = reading.n_valid_tokens
    if n_valid is not None and n_valid > len(unembedding):
        raise ValueError(
            f"{reading.caller}: n_valid_tokens is {n_valid}, but {model.name} has "
            f"{len(unembedding)} tokens"
        )
    size = reading.tokenizer_size
    if size is not None and len(unembedding) < size:
        raise ValueError(
            f"{reading.caller}: the tokenizer has {size} tokens, and the unembedding of "
            f"{model.name} has {len(unembedding)}; pass the tokenizer of this model"
        )
    if size is not None and len(unembedding) > size and n_valid is None:
        warn_user(
            f"{reading.caller}: the unembedding of {model.name} has {len(unembedding)} rows, and "
            f"the tokenizer {size} tokens; the others compete as well. Pass n_valid_tokens={size} "
            "to leave them out.",
        )
    return unembedding[:n_valid]


class _SourceVectors:
    """What the heads of each layer read of the source tokens."""

    def __init__(self, model: SourceHeads, sources: NDArray[np.int64], reading: Reading) -> None:
        self._reading, self._name = reading, model.name
        self._sources = torch.from_numpy(sources)
        first = model.table["layer"].to_numpy() == 0
        kind = reading.source_embedding
        self._vectors: dict[bool, torch.Tensor] = {}
        if kind == "raw" or first.any():
            self._vectors = dict.fromkeys((True, False), self._read("raw"))
        if kind != "raw" and not first.all():
            self._vectors[False] = self._behind_mlp(kind)

    def at(self, layer: int) -> torch.Tensor:
        """Vectors on the stream, ``(n_sources, d_model)``, float64."""
        return self._vectors[layer == 0]

    def _behind_mlp(self, kind: str) -> torch.Tensor:
        try:
            return self._read(kind)
        except UnsupportedLayoutError as error:
            if self._reading.missing_mlp == "raise":
                raise UnsupportedLayoutError(
                    f"{self._reading.caller}: source_embedding={kind!r}: {error} Or pass "
                    "missing_mlp='raw' for such models."
                ) from error
        return self._read("raw")

    def _read(self, kind: str) -> torch.Tensor:
        vectors = read_source_embedding(
            self._name, kind, self._sources, **self._reading.process.options
        ).double()
        zero = (vectors == 0).all(1).nonzero()
        if len(zero):
            raise DegenerateHeadError(
                f"{self._reading.caller}: the source embedding of token "
                f"{int(self._sources[zero[0, 0]])} in {self._name} is zero, so that no head maps "
                "it anywhere; remove its pairs from the operations"
            )
        return vectors


@dataclass(frozen=True)
class _Batch:
    """Operations that are ranked together.

    Attributes
    ----------
    names : tuple of str
    sources : Tensor of shape (n_sources,), int64
        Rows of the vectors of all source tokens.
    tables : PairTables
        Of the operations, on these sources.
    """

    names: tuple[str, ...]
    sources: torch.Tensor
    tables: PairTables

    @classmethod
    def of(cls, pairs: Pairs, sources: NDArray[np.int64], reading: Reading) -> _Batch:
        """Arrange some operations; `sources` are the source tokens of all, in rising order."""
        own = np.unique(np.concatenate([ids[:, 0] for ids in pairs.values()]))
        tables = [
            (torch.from_numpy(np.searchsorted(own, ids[:, 0])), torch.from_numpy(ids[:, 1].copy()))
            for ids in pairs.values()
        ]
        device = reading.process.place
        arranged = PairTables.of(tables, [reading.ks[name] for name in pairs], len(own))
        places = torch.from_numpy(np.searchsorted(sources, own))
        return cls(tuple(pairs), places.to(device), arranged.to(device))


def _batched(pairs: Pairs, n_vocab: int, d_head: int, reading: Reading) -> list[list[str]]:
    """Names of operations whose sources fit into the memory together."""
    fixed = _BLOCKS + 4 * n_vocab * d_head
    most = int((reading.max_memory - fixed) / (n_vocab * _ROW_SHARE))
    batches: list[list[str]] = []
    held: set[int] = set()
    for name, ids in pairs.items():
        own = set(ids[:, 0].tolist())
        if len(own) > most:
            needed = fixed + int(len(own) * n_vocab * _ROW_SHARE) + 1
            raise MemoryBudgetError(
                f"{reading.caller}: operation {name!r} of {len(own)} sources needs {needed:,} "
                f"bytes for one head with {n_vocab:,} tokens, and max_memory is "
                f"{reading.max_memory:,}; raise it, or split the operation"
            )
        if not batches or len(held | own) > most:
            batches.append([])
            held = set()
        batches[-1].append(name)
        held |= own
    return batches
