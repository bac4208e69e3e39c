"""What a checkpoint says about tokens and positions: both ends of the residual stream."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from skhead.exceptions import UnsupportedLayoutError
from skhead.weights import processing
from skhead.weights.layouts import ModelPlan
from skhead.weights.ropes import Rotary, read_rotaries
from skhead.weights.sources import reopen, split_address
from skhead.weights.token_layouts import FinalNormKind, NormKind, PositionKind
from skhead.weights.token_sources import TokenSources, find_tokens
from skhead.weights.token_tables import TableReader

__all__ = ["TABLES", "Rotary", "TokenSpace", "read_token_space"]

TABLES = ("embedding", "unembedding", "positions")


@dataclass(frozen=True)
class TokenSpace:
    """Both ends of a model's residual stream: what tokens put on it, and what reads logits off it.

    Attributes
    ----------
    source : str
        The address, as in the ``source`` column of a heads table.
    embedding : Tensor of shape (n_vocab, d_model) or None
        float32, what each token puts on the stream before any norm, up to a vector common to all.
        A scale is included (Gemma: the square root of d_model, which a model run in bfloat16
        rounds); embeddings of another width are mapped to d_model (ALBERT, OPT-350m).
    unembedding : Tensor of shape (n_vocab, d_model) or None
        float32, rows whose inner product with the normalised stream is the logit, biases and
        soft caps aside. If it is tied to the embedding, and no scale, gain or map tells them
        apart, both are one tensor.
    positions : Tensor of shape (n_ctx, d_model) or None
        float32, learned absolute positions; row i is position i.
    position_kind : {"learned", "rotary", "alibi", "relative", "none", "unknown"}
    rotary : Rotary or None
        Rotary positions, if they are the same in all layers; see :meth:`rotary_at`.
    query_key_norm : bool
        A norm acts on queries and keys inside the head, so that scores are not bilinear.
    final_gain : Tensor of shape (d_model,) or None
        As stored: ``"rmsnorm+1"`` multiplies by one plus it. Read along with the unembedding.
    final_norm : {"layernorm", "rmsnorm", "rmsnorm+1", "none", "unknown"}
        The norm in front of the unembedding.
    tied : bool
        The stored unembedding is the stored embedding.
    missing : mapping of str to str
        What is not there (``"embedding"``, ``"unembedding"``, ``"positions"``, ``"final_gain"``,
        ``"embedding_gain"``, ``"rotary"``), each with a sentence that says why.
    embedding_norm : {"layernorm", "rmsnorm", "rmsnorm+1", "none"}
        A norm between the sum of token and position and the first layer (Bloom, BERT). Its gain is
        in `embedding` and `positions` only if they were read with ``fold_norm=True``.
    layer_rotaries : tuple of Rotary
        One for each layer where layers differ (Gemma 3); else empty.
    """

    source: str
    embedding: torch.Tensor | None
    unembedding: torch.Tensor | None
    positions: torch.Tensor | None
    position_kind: PositionKind
    rotary: Rotary | None
    query_key_norm: bool
    final_gain: torch.Tensor | None
    final_norm: FinalNormKind
    tied: bool
    missing: Mapping[str, str]
    embedding_norm: NormKind = "none"
    layer_rotaries: tuple[Rotary, ...] = ()

    def rotary_at(self, layer: int) -> Rotary:
        """Return how queries and keys of a layer turn with their position.

        Parameters
        ----------
        layer : int

        Returns
        -------
        Rotary

        Raises
        ------
        UnsupportedLayoutError
            If the model has no rotary positions, or of a kind that is not known.
        """
        if self.layer_rotaries:
            return self.layer_rotaries[layer]
        if self.rotary is None:
            why = self.missing.get("rotary", f"its positions are {self.position_kind}")
            raise UnsupportedLayoutError(f"{self.source} has no rotary positions to read: {why}.")
        return self.rotary


def read_token_space(
    source: str,
    *,
    fold_norm: bool = False,
    center: bool = False,
    device: torch.device | str | None = None,
    tables: Collection[str] = TABLES,
) -> TokenSpace:
    """Read the embedding, the unembedding and the positions of a model.

    Parameters
    ----------
    source : str
        Address of a model, as in the ``source`` column of a heads table.
    fold_norm : bool, default=False
        Multiply the gain of the final norm into the unembedding, and that of a norm right behind
        the embedding (Bloom) into embedding and positions.
    center : bool, default=False
        Subtract from each row its mean over the residual coordinates, after folding.
    device : torch.device or str, optional
        Where the tensors are; the CPU by default.
    tables : collection of str, default=("embedding", "unembedding", "positions")
        Which tensors to read. With none of them, facts only are read.

    Returns
    -------
    TokenSpace
        What the checkpoint does not hold is None, and explained in ``missing``.

    Raises
    ------
    SourceNotFoundError
        If the source is gone.
    CheckpointError
        If ``fold_norm=True`` and the gain to fold is missing.
    ConfigMismatchError
        If a tensor has another width than the model.
    DegenerateHeadError
        If a tensor holds NaN or infinite values.
    UnsupportedLayoutError
        If ``fold_norm=True`` and the model normalises the stream itself, or a tensor is stored
        quantised.
    ValueError
        If `tables` names something else.

    Warns
    -----
    UserWarning
        If the unembedding has another number of tokens than the embedding; or ``fold_norm=True``
        and nothing is known of a final norm.

    Examples
    --------
    >>> from skhead.weights.tokens import read_token_space
    >>> space = read_token_space("skhead/induction-2l")
    >>> space.embedding.shape, space.position_kind, space.final_norm
    (torch.Size([68, 128]), 'learned', 'layernorm')
    """
    unknown = sorted(set(tables) - set(TABLES))
    if unknown:
        raise ValueError(
            f"read_token_space: tables holds {unknown[0]!r}; it may hold "
            f"{', '.join(map(repr, TABLES))}."
        )
    address, part = split_address(source)
    checkpoint = reopen(address)
    plan = checkpoint.plan(part)
    if fold_norm:
        processing.check_foldable(plan, source)
    found = find_tokens(checkpoint, part, compare=bool({"embedding", "unembedding"} & set(tables)))
    reader = TableReader(found, plan.d_model, fold_norm, center, device)
    final_gain = reader.final_gain() if "unembedding" in tables else None
    embedding, unembedding = reader.ends("embedding" in tables, "unembedding" in tables, final_gain)
    rotary, layer_rotaries = _rotaries(found, plan)
    tokens = found.tokens
    final_norm = "none" if tokens.final_norm is None else tokens.final_norm.kind
    return TokenSpace(
        source=source,
        embedding=embedding,
        unembedding=unembedding,
        positions=reader.positions() if "positions" in tables else None,
        position_kind=tokens.positions.kind,
        rotary=rotary,
        query_key_norm=tokens.query_key_norm,
        final_gain=final_gain,
        final_norm=tokens.final_kind or final_norm,
        tied=found.tied,
        missing=found.missing,
        embedding_norm="none" if tokens.embedding_norm is None else tokens.embedding_norm.kind,
        layer_rotaries=layer_rotaries,
    )


def _rotaries(found: TokenSources, plan: ModelPlan) -> tuple[Rotary | None, tuple[Rotary, ...]]:
    """Return the rotary positions of all layers, or of each; note why there are none to read."""
    positions = found.tokens.positions
    if positions.kind != "rotary":
        return None, ()
    try:
        rotaries = read_rotaries(
            found.config, positions, plan.d_head, plan.n_layers, found.reader.label
        )
    except UnsupportedLayoutError as error:
        found.missing["rotary"] = str(error)
        return None, ()
    return (rotaries[0], ()) if positions.pattern is None else (None, rotaries)
