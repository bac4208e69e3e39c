"""Where an architecture keeps its tokens and positions: the vocabulary of the family table.

As :class:`~skhead.weights.layouts.Part` says where attention is, :class:`Tokens` says what stands
at the two ends of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "NO_POSITIONS",
    "UNKNOWN_POSITIONS",
    "FinalNormKind",
    "Norm",
    "NormKind",
    "Pairing",
    "PositionKind",
    "Positions",
    "Rope",
    "Tokens",
]

NormKind = Literal["layernorm", "rmsnorm", "rmsnorm+1", "none"]
FinalNormKind = Literal["layernorm", "rmsnorm", "rmsnorm+1", "none", "unknown"]
PositionKind = Literal["learned", "rotary", "alibi", "relative", "none", "unknown"]
Pairing = Literal["half", "adjacent"]


@dataclass(frozen=True)
class Norm:
    """A normalisation: its kind and the name of its gain vector."""

    kind: NormKind
    gain: str


@dataclass(frozen=True)
class Rope:
    """How a configuration states rotary positions.

    Attributes
    ----------
    pairing : {"half", "adjacent"}
        Coordinate i turns with i + n_dims / 2, or 2 i with 2 i + 1.
    base : tuple of str
        Configuration keys, synonyms of each other, of the base of the frequencies.
    default_base : float
    share : tuple of str
        Keys of the share of a head's coordinates that is turned.
    default_share : float
    n_dims : str or None
        Key of the number of turned coordinates, where that is stated instead of a share.
    default_n_dims : int or None
        None: all coordinates of a head.
    default_context : int or None
        Context of pretraining, where the configuration does not state it.
    scalings : tuple of str
        Kinds of scaling that the architecture applies as skhead does.
    renamed : mapping of str to str
        Old names of kinds of scaling.
    legacy_scaling : bool
        ``rope_scaling`` of a configuration without ``rope_parameters`` applies.
    entry : str or None
        Key of its entry in ``rope_parameters`` where layers differ.
    """

    pairing: Pairing = "half"
    base: tuple[str, ...] = ("rope_theta",)
    default_base: float = 10_000.0
    share: tuple[str, ...] = ("partial_rotary_factor",)
    default_share: float = 1.0
    n_dims: str | None = None
    default_n_dims: int | None = None
    default_context: int | None = None
    scalings: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
    renamed: Mapping[str, str] | None = None
    legacy_scaling: bool = True
    entry: str | None = None


@dataclass(frozen=True)
class Positions:
    """How a model knows positions.

    Attributes
    ----------
    kind : {"learned", "rotary", "alibi", "relative", "none", "unknown"}
    table : str or None
        Tensor of learned positions, after the family's prefix.
    skip : int
        Rows in front of that tensor that stand for no position.
    skip_through : tuple of (str, int) or None
        Configuration key, and its default, of the last such row, in place of `skip`.
    ropes : tuple of Rope
        One, or one for each kind of layer.
    pattern : (str, int) or None
        Where there are several ropes: the configuration key, and its default, of the number n such
        that the first rope belongs to every n-th layer and the second to the others. A list
        ``layer_types`` of the ropes' entries goes before.
    projected : bool
        The table has the embedding's own width, and is mapped to d_model like it.
    absent : str or None
        Why no table is read although positions are learned, as a sentence.
    """

    kind: PositionKind
    table: str | None = None
    skip: int = 0
    skip_through: tuple[str, int] | None = None
    ropes: tuple[Rope, ...] = ()
    pattern: tuple[str, int] | None = None
    projected: bool = False
    absent: str | None = None


NO_POSITIONS = Positions("none")
UNKNOWN_POSITIONS = Positions("unknown")


@dataclass(frozen=True)
class Tokens:
    """What stands at the ends of the residual stream of one stack of layers.

    Attributes
    ----------
    embedding : tuple of str
        Names, after the family's prefix, of the token embedding; the first one present counts.
    positions : Positions
    final_norm : Norm or None
        Between the stream and the unembedding; its gain after the family's prefix.
    final_kind : str or None
        Kind of the final norm where it has no gain, or where nothing is known of it.
    unembedding : tuple of str
        Whole names of the unembedding.
    columns : bool
        The unembedding is stored as ``(d_model, n_vocab)``, and only shared memory ties it.
    tied : bool
        Whether the unembedding is the embedding where the configuration does not say.
    no_unembedding : str or None
        Why no inner product with the stream gives a logit, as a sentence.
    scaled : bool
        The embedding is multiplied by the square root of d_model.
    logits_scaled : bool
        The stream is divided by the square root of d_model before the unembedding.
    embedding_norm : Norm or None
        Applied to the sum of token and position before the first layer reads it.
    into, out_of : str or None
        Linear maps from the embedding's own width to d_model, and back before the unembedding.
    query_key_norm : bool
        A norm acts on queries and keys inside the head.
    """

    embedding: tuple[str, ...]
    positions: Positions
    final_norm: Norm | None = None
    final_kind: FinalNormKind | None = None
    unembedding: tuple[str, ...] = ("lm_head.weight",)
    columns: bool = False
    tied: bool = False
    no_unembedding: str | None = None
    scaled: bool = False
    logits_scaled: bool = False
    embedding_norm: Norm | None = None
    into: str | None = None
    out_of: str | None = None
    query_key_norm: bool = False
