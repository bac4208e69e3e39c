"""What heads read of single tokens: embeddings, as they are or behind the first block's MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from skhead.exceptions import (
    CheckpointError,
    ConfigMismatchError,
    DegenerateHeadError,
    UnsupportedLayoutError,
)
from skhead.weights import live
from skhead.weights.bridges import is_bridge
from skhead.weights.files import Checkpoint
from skhead.weights.lens import has_lens_names
from skhead.weights.lens_tokens import native_norm_kind
from skhead.weights.mlp_layouts import MLPS, NO_MLPS, adapt_mlp
from skhead.weights.planning import find_prefix, resolve
from skhead.weights.readers import TensorReader, torch_dtype
from skhead.weights.sources import reopen, split_address
from skhead.weights.token_layouts import Norm, NormKind
from skhead.weights.tokens import read_token_space

__all__ = ["SOURCE_EMBEDDINGS", "FirstBlock", "read_first_block", "read_source_embedding"]

SOURCE_EMBEDDINGS = ("raw", "mlp0", "resid_post_mlp0")

#: Hidden activations that are held at once.
_NUMBERS = 1 << 24
_LENS_MLP = "blocks.0.mlp."
_LENS_NORM = "blocks.0.ln2."

Activation = Callable[[torch.Tensor], torch.Tensor]


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_python": functional.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "silu": functional.silu,
    "swish": functional.silu,
    "solu": lambda x: x * torch.softmax(x, dim=-1),
}


@dataclass(frozen=True)
class _Normalise:
    """A norm with its parameters."""

    kind: str
    gain: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "layernorm":
            return functional.layer_norm(x, x.shape[-1:], self.gain, self.bias, self.eps)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        if self.gain is None:
            return x
        return x * (1.0 + self.gain if self.kind == "rmsnorm+1" else self.gain)


@dataclass(frozen=True)
class FirstBlock:
    """The norm and the MLP of a model's first block, as a function of vectors on the stream.

    Attributes
    ----------
    before, after : callable or None
        Norms in front of the MLP and behind it.
    up, down : Tensor of shape (d_mlp, d_model), (d_model, d_mlp)
    gate : Tensor of shape (d_mlp, d_model) or None
    biases : mapping of str to Tensor
        Of "up", "down" and "gate", as far as there are any.
    activation : callable
    entry : callable or None
        Norm between the embedding and the first block (Bloom).
    """

    before: Activation | None
    after: Activation | None
    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor | None
    biases: Mapping[str, torch.Tensor]
    activation: Activation
    entry: Activation | None = None

    def write(self, stream: torch.Tensor) -> torch.Tensor:
        """Return what the MLP adds to the stream, without the stream.

        Parameters
        ----------
        stream : Tensor of shape (n, d_model)
        """
        rows = max(1, _NUMBERS // len(self.up))
        return torch.cat([self._write(part) for part in stream.split(rows)])

    def _write(self, stream: torch.Tensor) -> torch.Tensor:
        x = stream if self.before is None else self.before(stream)
        hidden = functional.linear(x, self.up, self.biases.get("up"))
        if self.gate is None:
            hidden = self.activation(hidden)
        else:
            gate = functional.linear(x, self.gate, self.biases.get("gate"))
            hidden = self.activation(gate) * hidden
        written = functional.linear(hidden, self.down, self.biases.get("down"))
        return written if self.after is None else self.after(written)


def read_source_embedding(
    source: str,
    kind: str = "raw",
    tokens: Sequence[int] | torch.Tensor | None = None,
    device: torch.device | str | None = None,
    *,
    fold_norm: bool = False,
    center: bool = False,
) -> torch.Tensor:
    """Read what tokens put on the residual stream in front of a model's heads.

    Parameters
    ----------
    source : str
        Address of a model, as in the ``source`` column of a heads table.
    kind : {"raw", "mlp0", "resid_post_mlp0"}, default="raw"
        The token embedding E; ``MLP(norm(E))`` of the first block, without E itself and without
        attention; or the sum of both. Positions do not enter.
    tokens : sequence of int, default=None
        Token ids; all of them by default.
    device : torch.device or str, default=None
        Where the result is; the CPU by default.
    fold_norm : bool, default=False
        As for `read_token_space`, for the kind "raw"; in the others all norms act in full anyway.
    center : bool, default=False
        Subtract from each row its mean over the residual coordinates.

    Returns
    -------
    Tensor of shape (n_tokens, d_model)
        float32.

    Raises
    ------
    UnsupportedLayoutError
        If the model has no embedding, or for the other kinds no MLP in its first block, or one
        that is not known.
    CheckpointError
        If a tensor of the first block is missing.
    ValueError
        If `kind` is unknown or a token is outside the vocabulary.

    References
    ----------
    .. [1] A. Elhelo and M. Geva, "Inferring Functionality of Attention Heads from their
       Parameters", ACL (2025).

    Examples
    --------
    >>> from skhead.weights.first_block import read_source_embedding
    >>> read_source_embedding("skhead/induction-2l", tokens=[3, 4]).shape
    torch.Size([2, 128])
    """
    if kind not in SOURCE_EMBEDDINGS:
        raise ValueError(
            f"read_source_embedding: kind must be one of {', '.join(map(repr, SOURCE_EMBEDDINGS))};"
            f" got {kind!r}"
        )
    raw = kind == "raw"
    block = None if raw else read_first_block(source, device)
    options = {"fold_norm": fold_norm, "center": center} if raw else {}
    space = read_token_space(source, tables=("embedding",), device=device, **options)
    if space.embedding is None:
        raise UnsupportedLayoutError(f"read_source_embedding: {space.missing['embedding']}")
    stream = space.embedding if tokens is None else space.embedding[_ids(tokens, space.embedding)]
    if block is None:
        return stream
    if block.entry is not None:
        stream = block.entry(stream)
    vectors = block.write(stream)
    if kind == "resid_post_mlp0":
        vectors += stream
    return vectors.sub_(vectors.mean(1, keepdim=True)) if center else vectors


def _ids(tokens: Sequence[int] | torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    ids = torch.as_tensor(tokens, device=embedding.device)
    if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ValueError(
            f"read_source_embedding: tokens must be a list of token ids; got shape "
            f"{tuple(ids.shape)} of {ids.dtype}"
        )
    outside = ids[(ids < 0) | (ids >= len(embedding))]
    if len(outside):
        raise ValueError(
            f"read_source_embedding: tokens holds {int(outside[0])}, but the token ids are 0 to "
            f"{len(embedding) - 1}"
        )
    return ids.long()


def read_first_block(source: str, device: torch.device | str | None = None) -> FirstBlock:
    """Read the norm and the MLP of a model's first block.

    Parameters
    ----------
    source : str
        Address of a model, as in the ``source`` column of a heads table.
    device : torch.device or str, default=None
        Where the tensors are; the CPU by default.

    Returns
    -------
    FirstBlock
        float32, biases included.

    Raises
    ------
    UnsupportedLayoutError
        If the first block has no MLP, or one that is not known.
    CheckpointError, ConfigMismatchError
        If a tensor is missing or has another shape.

    Examples
    --------
    >>> from skhead.weights.first_block import read_first_block
    >>> read_first_block("skhead/induction-2l")
    Traceback (most recent call last):
    ...
    skhead.exceptions.UnsupportedLayoutError: ...
    """
    address, part = split_address(source)
    if is_bridge(live.live_module(address)):
        raise UnsupportedLayoutError(
            f"live model {address!r}: the MLP of a TransformerLens bridge is not read. Register "
            "the Hugging Face model instead, or use source_embedding='raw'."
        )
    checkpoint = reopen(address)
    plan = checkpoint.plan(part)
    if plan.norm.unfoldable is not None:
        raise UnsupportedLayoutError(
            f"{source} ({plan.family}) {NO_MLPS['bert']}. Use source_embedding='raw'."
        )
    reader = _BlockReader(checkpoint.reader, plan.d_model, device)
    if has_lens_names(checkpoint.reader.names()):
        return _lens_block(reader, checkpoint)
    return _family_block(reader, checkpoint, part)


@dataclass(frozen=True)
class _BlockReader:
    """Reads tensors of the first block as float32 copies."""

    reader: TensorReader
    d_model: int
    device: torch.device | str | None

    def tensor(self, name: str, what: str, n_dims: int) -> torch.Tensor:
        """A tensor that must be there."""
        if name not in self.reader.names():
            raise CheckpointError(
                f"{self.reader.label}: there is no tensor {name!r}, {what} of the first block. Use "
                "source_embedding='raw', or a checkpoint that holds it."
            )
        info = self.reader.info(name)
        torch_dtype(info, repr(name))
        if len(info.shape) != n_dims:
            raise ConfigMismatchError(
                f"{info.file}: tensor {name!r} has shape {info.shape}; {what} has {n_dims} "
                f"dimension{'s' * (n_dims > 1)}."
            )
        found = self.reader.tensor(name).to(device=self.device, dtype=torch.float32)
        if not bool(torch.isfinite(found).all()):
            raise DegenerateHeadError(f"{info.file}: tensor {name!r} holds NaN or infinite values.")
        return found

    def matrix(self, name: str, what: str, storage: str, writes: bool = False) -> torch.Tensor:
        """A matrix as (out, in), of which one side is d_model."""
        found = self.tensor(name, what, 2)
        found = found.T if storage == "conv1d" else found
        if found.shape[0 if writes else 1] != self.d_model:
            raise ConfigMismatchError(
                f"{self.reader.info(name).file}: tensor {name!r} has shape "
                f"{self.reader.info(name).shape}; no side of it fits d_model={self.d_model}."
            )
        return found

    def vector(self, name: str, what: str, length: int) -> torch.Tensor:
        """A gain or bias of known length, as one of another would be repeated or not fit."""
        found = self.tensor(name, what, 1)
        if len(found) != length:
            raise ConfigMismatchError(
                f"{self.reader.info(name).file}: tensor {name!r} has shape {tuple(found.shape)}; "
                f"{what} of this model has ({length},)."
            )
        return found

    def norm(self, norm: Norm, bias: str, eps: float) -> _Normalise:
        """A norm, with a bias if it is a LayerNorm."""
        gain = self.vector(norm.gain, "the norm's gain", self.d_model)
        layernorm = norm.kind == "layernorm"
        shift = self.vector(bias, "the norm's bias", self.d_model) if layernorm else None
        return _Normalise(norm.kind, gain, shift, eps)


def _family_block(reader: _BlockReader, checkpoint: Checkpoint, part: str | None) -> FirstBlock:
    """The first block of an architecture of the family table."""
    stored, label = checkpoint.reader, checkpoint.reader.label
    family, config, chosen = resolve(checkpoint.config or {}, stored, part)
    if family.name not in MLPS:
        why = NO_MLPS.get(family.name, "has an MLP that skhead does not know")
        raise UnsupportedLayoutError(
            f"{label}: a {family.name} model {why}. Use source_embedding='raw'."
        )
    mlp = adapt_mlp(family.name, MLPS[family.name], config)
    prefix = find_prefix(family, chosen, stored)
    eps = _number(_first(config, mlp.eps, mlp.default_eps), label)
    weights, biases = {}, {}
    for role in ("up", "down", "gate"):
        name = getattr(mlp, role)
        if name is None:
            continue
        what = f"the MLP's {role} matrix"
        weights[role] = reader.matrix(prefix + name, what, mlp.storage, role == "down")
        bias = _bias(prefix + name)
        if mlp.biased or bias in stored.names():
            biases[role] = reader.vector(bias, f"the bias of {what}", len(weights[role]))
    if mlp.fused:
        weights["gate"], weights["up"] = weights["up"].chunk(2)
    _check_hidden(weights, label)
    entry = chosen.tokens.embedding_norm
    norms = {
        role: None
        if norm is None
        else reader.norm(Norm(norm.kind, prefix + norm.gain), _bias(prefix + norm.gain), eps)
        for role, norm in (("before", mlp.norm), ("after", mlp.after), ("entry", entry))
    }
    return FirstBlock(
        norms["before"],
        norms["after"],
        weights["up"],
        weights["down"],
        weights.get("gate"),
        biases,
        _activation(_first(config, mlp.activation, mlp.default_activation), label),
        norms["entry"],
    )


def _lens_block(reader: _BlockReader, checkpoint: Checkpoint) -> FirstBlock:
    """The first block of tensors under TransformerLens' names."""
    stored, config = checkpoint.reader, checkpoint.config or {}
    names, label = stored.names(), stored.label
    if not any(name.startswith(_LENS_MLP) for name in names):
        raise UnsupportedLayoutError(
            f"{label}: the first block has no MLP (no tensor '{_LENS_MLP}W_in'), so that tokens "
            "reach later heads as they are embedded. Use source_embedding='raw'."
        )
    if not config.get("act_fn"):
        raise UnsupportedLayoutError(
            f"{label}: nothing says which activation the MLP of the first block has. Add a "
            "config.json with act_fn beside the tensors, or use source_embedding='raw'."
        )
    eps = _number(config.get("eps", 1e-5), label)
    gain = f"{_LENS_NORM}w"
    before = None
    if gain in names:
        bias = f"{_LENS_NORM}b"
        offset = native_norm_kind(config) == "rmsnorm+1"
        plain: NormKind = "rmsnorm+1" if offset else "rmsnorm"
        before = reader.norm(Norm("layernorm" if bias in names else plain, gain), bias, eps)
    elif native_norm_kind(config) != "none":
        before = _Normalise(native_norm_kind(config), None, None, eps)
    weights, biases = {}, {}
    for role, key in (("up", "in"), ("down", "out"), ("gate", "gate")):
        name, bias = f"{_LENS_MLP}W_{key}", f"{_LENS_MLP}b_{key}"
        if role == "gate" and name not in names:
            continue
        weights[role] = reader.matrix(name, f"the MLP's {role} matrix", "conv1d", key == "out")
        if bias in names:
            biases[role] = reader.vector(bias, f"the MLP's {role} bias", len(weights[role]))
    _check_hidden(weights, label)
    return FirstBlock(
        before,
        None,
        weights["up"],
        weights["down"],
        weights.get("gate"),
        biases,
        _activation(config["act_fn"], label),
    )


def _check_hidden(weights: Mapping[str, torch.Tensor], label: str) -> None:
    """Refuse matrices that do not agree about the width of the hidden layer."""
    widths = {role: matrix.shape[role == "down"] for role, matrix in weights.items()}
    if len(set(widths.values())) > 1:
        words = ", ".join(f"{role} {width}" for role, width in widths.items())
        raise ConfigMismatchError(
            f"{label}: matrices of the first block's MLP have hidden layers of different widths "
            f"({words})."
        )


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _first(config: Mapping[str, Any], keys: Sequence[str], default: Any) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), default)


def _number(value: Any, label: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
        raise ConfigMismatchError(
            f"{label}: the configuration's epsilon of the norms is {value!r}, not a number of at "
            "least 0."
        )
    return float(value)


def _activation(name: Any, label: str) -> Activation:
    found = _ACTIVATIONS.get(str(name).lower())
    if found is None:
        raise UnsupportedLayoutError(
            f"{label}: the activation {name!r} of the first block's MLP is not known; skhead has "
            f"{', '.join(_ACTIVATIONS)}. Use source_embedding='raw'."
        )
    return found
