"""What functions over whole heads share: opening their maps, tokens, and checks of parameters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skhead._base import HeadInput, check_processable, open_door
from skhead._callers import warn_user
from skhead._devices import default_device
from skhead.exceptions import (
    DegenerateHeadError,
    HeadShapeError,
    HeadTableError,
    UnsupportedLayoutError,
)
from skhead.linalg.stacks import expand
from skhead.linalg.vocabulary import row_products
from skhead.weights import head_labels
from skhead.weights.tokens import TABLES, TokenSpace, read_token_space

__all__ = [
    "LayerReader",
    "Processing",
    "SourceHeads",
    "check_ids",
    "copying_form",
    "given_vectors",
    "heads_at",
    "layer_rows",
    "models_with_tokens",
    "of_sources",
    "open_maps",
    "refuse_zero_maps",
    "token_columns",
    "token_ends",
    "token_matrix",
    "token_texts",
]


#: Bytes of one role's matrices that are held at once; at least one layer's.
_HELD = 2**28


@dataclass(frozen=True)
class Processing:
    """How weights are read, and where."""

    fold_norm: bool
    center: bool
    device: str | torch.device | None

    @property
    def options(self) -> dict[str, Any]:
        """The three as keyword arguments."""
        return {"fold_norm": self.fold_norm, "center": self.center, "device": self.device}

    @property
    def place(self) -> torch.device | str:
        """Where what is read of a model is put."""
        return default_device() if self.device is None else self.device

    def stack(self, source: HeadInput, role: str) -> torch.Tensor:
        """One matrix for every head, ``(n_heads, d_model, d_head)``."""
        read = source.read(role, **self.options)
        return expand(read.tensor, read.index)

    def tokens(self, source: str, tables: Collection[str] = TABLES) -> TokenSpace:
        """Embedding, unembedding and positions of a source, processed alike."""
        return read_token_space(source, tables=tables, **self.options | {"device": self.place})


def open_maps(heads: Any, process: Processing, caller: str) -> HeadInput:
    """Heads of which all four matrices are at hand, to be processed in a way that they can be."""
    source = open_door(heads, caller)
    if source.anonymous:
        raise HeadShapeError(
            f"{caller}: needs all four matrices of every head; pass a heads table or a stack of "
            "shape (n_heads, 4, d_model, d_head) for Q, K, V, O"
        )
    check_processable(source, caller, fold_norm=process.fold_norm, center=process.center)
    return source


@dataclass(frozen=True)
class SourceHeads:
    """The heads of one model.

    Attributes
    ----------
    name : str
        The source, or ``"array"`` for a stack.
    heads : HeadInput
    rows : ndarray of shape (n_heads,), int64
        Where they stand in the whole table.
    labels : ndarray of shape (n_heads,), object
        As they are called in the whole table.
    """

    name: str
    heads: HeadInput
    rows: NDArray[np.int64]
    labels: NDArray[np.object_]

    @property
    def table(self) -> pd.DataFrame:
        """The heads table."""
        return self.heads.heads

    @property
    def stored(self) -> bool:
        """Whether there is a model to read tokens from."""
        return self.heads.stacks is None


def of_sources(opened: HeadInput) -> list[SourceHeads]:
    """The heads of each model by themselves; those of a stack belong together."""
    labels = np.asarray(head_labels(opened.heads), dtype=object)
    if opened.stacks is not None:
        return [SourceHeads("array", opened, np.arange(len(labels), dtype=np.int64), labels)]
    sources = opened.heads["source"].to_numpy()
    found = []
    for name in dict.fromkeys(sources):
        rows = np.flatnonzero(sources == name)
        found.append(SourceHeads(str(name), heads_at(opened, rows), rows, labels[rows]))
    return found


def models_with_tokens(heads: Any, process: Processing, caller: str) -> list[SourceHeads]:
    """The heads of each model by themselves, where there are tokens to read.

    Raises
    ------
    HeadTableError
        If heads come as a stack.
    """
    models = of_sources(open_maps(heads, process, caller))
    if not models[0].stored:
        raise HeadTableError(
            f"{caller}: needs the tokens of a model, which a stack does not have; name its weights "
            "and embedding with register_model and pass that heads table"
        )
    return models


def heads_at(opened: HeadInput, rows: NDArray[np.int64]) -> HeadInput:
    """Some of the heads."""
    stacks = opened.stacks
    if stacks is not None:
        stacks = {role: stack[torch.as_tensor(rows)] for role, stack in stacks.items()}
    return HeadInput(opened.heads.iloc[rows], stacks, opened.eps)


def layer_rows(heads: pd.DataFrame) -> list[NDArray[np.int64]]:
    """Positions of the heads of every layer, by rising layer."""
    layers = heads["layer"].to_numpy()
    return [np.flatnonzero(layers == layer) for layer in np.unique(layers)]


class LayerReader:
    """Reads the matrices of a model some layers at a time, and each once if they are small.

    Parameters
    ----------
    model : SourceHeads
    process : Processing

    Attributes
    ----------
    layers : list of ndarray of int64
        Rows of the heads of every layer, by rising layer.
    groups : list of ndarray of int64
        The same in runs of layers that are read at once.
    """

    def __init__(self, model: SourceHeads, process: Processing) -> None:
        self._model, self._process = model, process
        self._whole: dict[str, torch.Tensor] = {}
        self.layers = layer_rows(model.table)
        limit = _HELD // (4 * model.heads.d_model * int(model.table["d_head"].iloc[0]))
        self.groups: list[NDArray[np.int64]] = []
        for rows in self.layers:
            if self.groups and len(self.groups[-1]) + len(rows) <= limit:
                self.groups[-1] = np.concatenate([self.groups[-1], rows])
            else:
                self.groups.append(rows)

    def read(self, role: str, rows: NDArray[np.int64]) -> torch.Tensor:
        """One matrix for each of some heads, ``(n_rows, d_model, d_head)``.

        Parameters
        ----------
        role : str
        rows : ndarray of int64
            At least one.
        """
        if len(self.groups) > 1:
            return self._process.stack(heads_at(self._model.heads, rows), role)
        if role not in self._whole:
            self._whole[role] = self._process.stack(self._model.heads, role)
        return expand(self._whole[role], rows)


def refuse_zero_maps(norms: torch.Tensor, heads: pd.DataFrame, name: str, caller: str) -> None:
    """Raise for the first head whose map is zero."""
    zero = (norms == 0).nonzero()
    if len(zero):
        label = head_labels(heads)[int(zero[0])]
        raise DegenerateHeadError(
            f"{caller}: the {name} map of {label} is zero, so that nothing composes with it; "
            "drop the head, for example heads.drop(index=...)"
        )


def token_matrix(space: TokenSpace, which: str, caller: str) -> torch.Tensor:
    """The embedding or unembedding, or an error that names the tensor that is not there."""
    matrix: torch.Tensor | None = getattr(space, which)
    if matrix is None:
        raise UnsupportedLayoutError(f"{caller}: {space.missing[which]}")
    return matrix


def given_vectors(vectors: Any, which: str, d_model: int, caller: str) -> torch.Tensor:
    """Token vectors of the caller's as float32 or wider, in memory of their own."""
    given = vectors if isinstance(vectors, torch.Tensor) else torch.as_tensor(np.asarray(vectors))
    if given.ndim != 2 or given.shape[1] != d_model or not len(given):
        raise HeadShapeError(
            f"{caller}: {which} must have shape (n_vocab, {d_model}), one row of d_model numbers "
            f"for each token; got {tuple(given.shape)}"
        )
    if given.is_complex() or not bool(torch.isfinite(given).all()):
        raise HeadShapeError(f"{caller}: {which} must be real and finite; repair or remove rows")
    return given.detach().to(torch.promote_types(given.dtype, torch.float32), copy=True)


def token_ends(space: TokenSpace, caller: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and unembedding of the same tokens.

    Raises
    ------
    UnsupportedLayoutError
        If one of them is not there, or they are not of the same tokens.
    """
    embedding, unembedding = (
        token_matrix(space, which, caller) for which in ("embedding", "unembedding")
    )
    if len(embedding) != len(unembedding):
        raise UnsupportedLayoutError(
            f"{caller}: {space.source} has {len(embedding)} tokens in its embedding and "
            f"{len(unembedding)} in its unembedding, so that no circuit leads from each token to "
            "itself"
        )
    return embedding, unembedding


def copying_form(
    model: SourceHeads, process: Processing, errors: str, caller: str
) -> torch.Tensor | None:
    """``U^T E`` of a model; None, with a warning or an error, where they lack tokens."""
    try:
        if not model.stored:
            raise UnsupportedLayoutError(
                f"{caller}: a stack has no tokens; name its weights and embedding with "
                "register_model and pass that heads table"
            )
        embedding, unembedding = token_ends(
            process.tokens(model.name, ("embedding", "unembedding")), caller
        )
    except UnsupportedLayoutError as error:
        if errors == "raise":
            raise
        warn_user(f"{error}. Copying scores are NaN.")
        return None
    return row_products(unembedding, embedding)


def check_ids(tokens: Any, n_vocab: int, name: str, caller: str) -> NDArray[np.int64]:
    """Token ids as an array; all where None is given."""
    if tokens is None:
        return np.arange(n_vocab, dtype=np.int64)
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(f"{caller}: {name} must be a list of token ids or None; got {tokens!r}")
    outside = ids[(ids < 0) | (ids >= n_vocab)]
    if outside.size:
        raise ValueError(
            f"{caller}: {name} holds {outside[0]}, but the token ids are 0 to {n_vocab - 1}"
        )
    return ids.astype(np.int64)


def token_columns(tokens: NDArray[np.int64], vocabulary: Any, caller: str) -> NDArray[np.object_]:
    """Names of columns that are tokens: ``"token7"``, followed by the text if there is one."""
    names = [f"token{token}" for token in tokens]
    if vocabulary is not None:
        texts = token_texts(tokens, vocabulary, caller)
        names = [f"{name} {text!r}" for name, text in zip(names, texts, strict=True)]
    return np.asarray(names, dtype=object)


def token_texts(tokens: NDArray[np.int64], vocabulary: Any, caller: str) -> list[str]:
    """Text of each token id by a callable, a sequence or a mapping."""
    try:
        if callable(vocabulary):
            return [str(vocabulary(int(token))) for token in tokens]
        return [str(vocabulary[int(token)]) for token in tokens]
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"{caller}: vocabulary must give the text of every token id, as a callable, a sequence "
            f"or a mapping; it failed with {type(error).__name__}: {error}"
        ) from error
