"""The models of the bundled zoo: their shapes, their sequences, their forward pass.

Parameters are kept in a plain mapping with TransformerLens names and shapes. A
:class:`ZooModel` says which of the parts a model has: learned or rotary positions, LayerNorm or
RMSNorm, no MLP, a plain or a gated one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from induction_2l_model import BOS, N_CTX, N_WORDS, Parameters, sample_batch
from induction_2l_model import D_VOCAB as BEFORE
from torch.nn import functional as F

D_MODEL, D_HEAD, N_HEADS, D_MLP = 64, 16, 4, 128
D_VOCAB = BEFORE + 1
TASKS = ("copy", "question", "look_up")
MIN_LISTED, MAX_LISTED = 12, 28
MIN_PHRASES, MAX_PHRASES, PHRASE_WORDS = 2, 8, 32
EPS = 1e-5


@dataclass(frozen=True)
class ZooModel:
    """What one model is made of, and the seed of its weights and sequences."""

    name: str
    seed: int
    n_layers: int
    rotary_base: float | None = None
    rotary_dim: int = D_HEAD
    rms: bool = False
    d_mlp: int | None = None
    gated: bool = False

    @property
    def family(self) -> str:
        """Kind of positions and whether there are MLPs, as in ``"rope-mlp"``."""
        positions = "learned" if self.rotary_base is None else "rope"
        return f"{positions}-{'attn' if self.d_mlp is None else 'mlp'}"

    @property
    def config(self) -> dict[str, Any]:
        """The ``config.json``: fields of TransformerLens' configuration of native models."""
        return {
            "architecture": "TransformerLensNative",
            "n_layers": self.n_layers,
            "n_heads": N_HEADS,
            "n_key_value_heads": N_HEADS,
            "d_model": D_MODEL,
            "d_head": D_HEAD,
            "n_ctx": N_CTX,
            "d_vocab": D_VOCAB,
            "d_mlp": self.d_mlp,
            "act_fn": "silu" if self.gated else "gelu",
            "gated_mlp": self.gated,
            "attn_only": self.d_mlp is None,
            "normalization_type": "RMS" if self.rms else "LN",
            "eps": EPS,
            "positional_embedding_type": "standard" if self.rotary_base is None else "rotary",
            "rotary_dim": None if self.rotary_base is None else self.rotary_dim,
            "rotary_base": self.rotary_base,
        }


@dataclass(frozen=True)
class Sequences:
    """Sequences ``(n, n_ctx)`` and, per task, where the next token can be foretold."""

    tokens: torch.Tensor
    tasks: dict[str, torch.Tensor]

    @property
    def foretold(self) -> torch.Tensor:
        """True where some task foretells the next token."""
        return torch.stack(list(self.tasks.values())).any(0)


def sample_sequences(size: int, rng: np.random.Generator, pairs: bool = True) -> Sequences:
    """Draw sequences behind a beginning-of-sequence token, equally many of each kind.

    - Texts of ``skhead/induction-2l``: a segment that comes twice (``copy``), and questions
      whether a word has occurred (``question``).
    - Phrases: a few phrases, among which no word comes twice, follow each other in any order,
      again and again; the rest of a phrase that has occurred is foretold (``copy``).
    - Pairs, if wanted: the same with phrases of two words, each said twice in a row (``copy``).
    - Look-ups: distinct words, then ``before word x`` again and again, where ``x`` is the token in
      front of the word among the first words (``look_up``); no two of these words are neighbours.
    """
    kinds = (_texts, _phrases, _pairs, _look_ups) if pairs else (_texts, _phrases, _look_ups)
    counts = np.diff(np.arange(len(kinds) + 1) * size // len(kinds))
    drawn = [draw(int(count), rng) for draw, count in zip(kinds, counts, strict=True)]
    tasks = {
        name: np.concatenate(
            [masks.get(name, np.zeros(tokens.shape, dtype=bool)) for tokens, masks in drawn]
        )
        for name in TASKS
    }
    return Sequences(
        torch.from_numpy(np.concatenate([tokens for tokens, _ in drawn])),
        {name: torch.from_numpy(mask) for name, mask in tasks.items()},
    )


_Kind = tuple[np.ndarray, dict[str, np.ndarray]]


def _texts(size: int, rng: np.random.Generator) -> _Kind:
    text = sample_batch(size, rng)
    return text.tokens.numpy(), {"copy": text.copied.numpy(), "question": text.asked.numpy()}


def _phrases(size: int, rng: np.random.Generator) -> _Kind:
    tokens = np.full((size, N_CTX), BOS)
    copied = np.zeros((size, N_CTX), dtype=bool)
    for row in range(size):
        count = rng.integers(MIN_PHRASES, MAX_PHRASES + 1)
        lengths = rng.integers(2, PHRASE_WORDS // count + 1, count)
        phrases = np.split(rng.permutation(N_WORDS), np.cumsum(lengths))[:count]
        order = rng.integers(0, count, N_CTX // 2)
        is_new = np.isin(np.arange(len(order)), np.unique(order, return_index=True)[1])
        text = np.concatenate([phrases[which] for which in order])
        known = [
            ~new & (np.arange(1, lengths[i] + 1) < lengths[i])
            for i, new in zip(order, is_new, strict=True)
        ]
        tokens[row, 1:] = text[: N_CTX - 1]
        copied[row, 1:] = np.concatenate(known)[: N_CTX - 1]
    copied[:, -1] = False
    return tokens, {"copy": copied}


def _pairs(size: int, rng: np.random.Generator) -> _Kind:
    tokens = np.full((size, N_CTX), BOS)
    copied = np.zeros((size, N_CTX), dtype=bool)
    for row in range(size):
        count = rng.integers(MIN_PHRASES, N_CTX // 4)
        order = np.repeat(rng.integers(0, count, N_CTX // 4), 2)[: (N_CTX - 1) // 2]
        pairs = rng.permutation(N_WORDS)[: 2 * count].reshape(count, 2)
        is_new = np.isin(np.arange(len(order)), np.unique(order, return_index=True)[1])
        tokens[row, 1:-1] = pairs[order].ravel()
        copied[row, 1:-1:2] = ~is_new
    tokens[:, -1] = rng.integers(0, N_WORDS, size)
    return tokens, {"copy": copied}


def _look_ups(size: int, rng: np.random.Generator) -> _Kind:
    words = rng.permuted(np.tile(np.arange(N_WORDS), (size, 1)), axis=1)
    tokens = np.concatenate([np.full((size, 1), BOS), words[:, : N_CTX - 1]], axis=1)
    looked_up = np.zeros((size, N_CTX), dtype=bool)
    for row in range(size):
        listed = rng.integers(MIN_LISTED, MAX_LISTED + 1)
        source = rng.permutation(np.arange(2 + rng.integers(0, 2), listed + 1, 2))
        at = np.arange(listed + 1, N_CTX - 2, 3)[: len(source)]
        source = source[: len(at)]
        tokens[row, at] = BEFORE
        tokens[row, at + 1] = tokens[row, source]
        tokens[row, at + 2] = tokens[row, source - 1]
        looked_up[row, at + 1] = True
    return tokens, {"look_up": looked_up}


def initial_parameters(model: ZooModel) -> Parameters:
    """Random weights: ``W_Q`` is ``(n_heads, d_model, d_head)``, ``W_in`` ``(d_model, d_mlp)``."""
    generator = torch.Generator().manual_seed(model.seed)

    def normal(*shape: int, fan_in: int = D_MODEL) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(fan_in)

    parameters = {"embed.W_E": normal(D_VOCAB, D_MODEL)}
    if model.rotary_base is None:
        parameters["pos_embed.W_pos"] = normal(N_CTX, D_MODEL)
    for layer in range(model.n_layers):
        block = f"blocks.{layer}"
        parameters |= _norm_parameters(f"{block}.ln1", model)
        for role in "QKV":
            parameters[f"{block}.attn.W_{role}"] = normal(N_HEADS, D_MODEL, D_HEAD)
            parameters[f"{block}.attn.b_{role}"] = torch.zeros(N_HEADS, D_HEAD)
        parameters[f"{block}.attn.W_O"] = normal(N_HEADS, D_HEAD, D_MODEL)
        parameters[f"{block}.attn.b_O"] = torch.zeros(D_MODEL)
        if model.d_mlp is None:
            continue
        parameters |= _norm_parameters(f"{block}.ln2", model)
        for name in ("W_in", "W_gate") if model.gated else ("W_in",):
            parameters[f"{block}.mlp.{name}"] = normal(D_MODEL, model.d_mlp)
        parameters[f"{block}.mlp.W_out"] = normal(model.d_mlp, D_MODEL, fan_in=model.d_mlp)
        if not model.gated:
            parameters[f"{block}.mlp.b_in"] = torch.zeros(model.d_mlp)
            parameters[f"{block}.mlp.b_out"] = torch.zeros(D_MODEL)
    parameters |= _norm_parameters("ln_final", model)
    parameters["unembed.W_U"] = normal(D_MODEL, D_VOCAB)
    parameters["unembed.b_U"] = torch.zeros(D_VOCAB)
    return parameters


def _norm_parameters(name: str, model: ZooModel) -> Parameters:
    gain = {f"{name}.w": torch.ones(D_MODEL)}
    return gain if model.rms else gain | {f"{name}.b": torch.zeros(D_MODEL)}


def forward(
    model: ZooModel,
    parameters: Parameters,
    tokens: torch.Tensor,
    writing: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(batch, n_ctx, d_vocab)`` and attention ``(layer, batch, head, query, key)``.

    ``writing``, of shape ``(layer, batch or 1, head)``, is 0 for a head that writes nothing in a
    sequence and 1 otherwise; all heads write by default.
    """
    patterns: list[torch.Tensor] = []
    return logits(model, parameters, tokens, writing, patterns), torch.stack(patterns)


def logits(
    model: ZooModel,
    parameters: Parameters,
    tokens: torch.Tensor,
    writing: torch.Tensor | None = None,
    patterns: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits alone, by a faster road unless there is a list to which attention is appended."""
    n_ctx = tokens.shape[1]
    residual = F.embedding(tokens, parameters["embed.W_E"])
    if model.rotary_base is None:
        residual = residual + parameters["pos_embed.W_pos"][:n_ctx]
    for layer in range(model.n_layers):
        block = f"blocks.{layer}"
        x = _normalised(residual, model, parameters, f"{block}.ln1")
        q, k, v = (_projected(x, role, parameters, block) for role in "QKV")
        if model.rotary_base is not None:
            q, k = rotated(q, model), rotated(k, model)
        if patterns is None:
            read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            future = torch.ones(n_ctx, n_ctx, dtype=torch.bool).triu(1)
            scores = (q / math.sqrt(D_HEAD)) @ k.transpose(-1, -2)
            patterns.append(scores.masked_fill(future, -torch.inf).softmax(-1))
            read = patterns[-1] @ v
        if writing is not None:
            read = read * writing[layer][..., None, None]
        written = read.transpose(1, 2).flatten(2) @ parameters[f"{block}.attn.W_O"].flatten(0, 1)
        residual = residual + written + parameters[f"{block}.attn.b_O"]
        if model.d_mlp is not None:
            x = _normalised(residual, model, parameters, f"{block}.ln2")
            residual = residual + _mlp(x, model, parameters, f"{block}.mlp")
    x = _normalised(residual, model, parameters, "ln_final")
    return x @ parameters["unembed.W_U"] + parameters["unembed.b_U"]


def _projected(x: torch.Tensor, role: str, parameters: Parameters, block: str) -> torch.Tensor:
    """Queries, keys or values ``(batch, n_heads, n_ctx, d_head)``."""
    weight, bias = (parameters[f"{block}.attn.{kind}_{role}"] for kind in "Wb")
    flat = x @ weight.transpose(0, 1).flatten(1) + bias.flatten()
    return flat.unflatten(-1, (N_HEADS, D_HEAD)).transpose(1, 2)


def rotated(x: torch.Tensor, model: ZooModel) -> torch.Tensor:
    """Turn coordinates 2i and 2i+1 of queries or keys by an angle that grows with position.

    Position p turns pair i by ``p * base ** (-2 i / rotary_dim)`` radians; the coordinates from
    ``rotary_dim`` on stay as they are.
    """
    turning, resting = x[..., : model.rotary_dim], x[..., model.rotary_dim :]
    frequency = model.rotary_base ** (-torch.arange(0, model.rotary_dim, 2) / model.rotary_dim)
    angle = torch.outer(torch.arange(x.shape[-2]), frequency)
    cos, sin = angle.cos(), angle.sin()
    even, odd = turning[..., 0::2], turning[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((turned, resting), dim=-1)


def _mlp(x: torch.Tensor, model: ZooModel, parameters: Parameters, name: str) -> torch.Tensor:
    inner = x @ parameters[f"{name}.W_in"]
    if model.gated:
        inner = F.silu(x @ parameters[f"{name}.W_gate"]) * inner
        return inner @ parameters[f"{name}.W_out"]
    inner = F.gelu(inner + parameters[f"{name}.b_in"])
    return inner @ parameters[f"{name}.W_out"] + parameters[f"{name}.b_out"]


def _normalised(
    x: torch.Tensor, model: ZooModel, parameters: Parameters, name: str
) -> torch.Tensor:
    gain = parameters[f"{name}.w"]
    if model.rms:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain
    return F.layer_norm(x, (D_MODEL,), gain, parameters[f"{name}.b"], EPS)


ZOO = (
    ZooModel("learned-attn-1", seed=1, n_layers=2),
    ZooModel("learned-attn-2", seed=2, n_layers=3, rms=True),
    ZooModel("learned-mlp-1", seed=3, n_layers=2, d_mlp=D_MLP),
    ZooModel("learned-mlp-2", seed=4, n_layers=3, d_mlp=D_MLP, rms=True, gated=True),
    ZooModel("rope-attn-1", seed=10, n_layers=2, rotary_base=10.0, rotary_dim=8, rms=True),
    ZooModel("rope-attn-2", seed=6, n_layers=2, rotary_base=10.0, rotary_dim=8),
    ZooModel("rope-attn-3", seed=11, n_layers=2, rotary_base=10.0, rotary_dim=8, rms=True),
    ZooModel("rope-attn-4", seed=14, n_layers=2, rotary_base=10.0, rotary_dim=8, rms=True),
)
