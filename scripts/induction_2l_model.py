"""The bundled model ``skhead/induction-2l``: its sequences, its parameters, its forward pass.

Parameters are kept in a plain mapping with TransformerLens names and shapes, and the forward
pass below is the whole model: attention only, pre-norm, learned positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

N_LAYERS, N_HEADS, D_MODEL, D_HEAD = 2, 8, 128, 16
N_CTX, N_WORDS = 64, 64
BOS, ASK, YES, NO = N_WORDS, N_WORDS + 1, N_WORDS + 2, N_WORDS + 3
D_VOCAB = N_WORDS + 4
MIN_SEGMENT, MAX_SEGMENT = 4, 20
CELL = 4
LN_EPS = 1e-5
HEAD_TENSORS = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O")

Parameters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Sequences ``(batch, n_ctx)`` with the positions that the measures need.

    ``copied`` is true where the next token is inside the second occurrence of a segment, beyond
    its first token; ``asked`` where the next token is the answer to a question. ``earlier`` is
    the position of the earlier occurrence of the current word, -1 where it has none.
    """

    tokens: torch.Tensor
    copied: torch.Tensor
    asked: torch.Tensor
    earlier: torch.Tensor


def sample_batch(size: int, rng: np.random.Generator) -> Batch:
    """Draw sequences: distinct words, one segment repeated, questions anywhere else.

    After the beginning-of-sequence token every word is distinct, except that a segment of 4 to
    20 words occurs twice, anywhere, and that cells of four positions outside both occurrences
    hold, each with probability one half, the triple ``ask word yes`` or ``ask word no``.
    """
    words = rng.permuted(np.tile(np.arange(N_WORDS), (size, 1)), axis=1)
    length = rng.integers(MIN_SEGMENT, MAX_SEGMENT + 1, size)
    slack = N_CTX - 1 - 2 * length
    cuts = np.sort(np.floor(rng.random((size, 2)) * (slack[:, None] + 1)).astype(int), axis=1)
    start = 1 + cuts[:, 0]
    again = start + length + cuts[:, 1] - cuts[:, 0]

    position = np.arange(N_CTX)[None]
    in_first = (position >= start[:, None]) & (position < (start + length)[:, None])
    in_second = (position >= again[:, None]) & (position < (again + length)[:, None])
    origin = np.where(in_second, position - (again - start)[:, None], position)
    tokens = np.take_along_axis(words, origin, axis=1)
    tokens[:, 0] = BOS
    earlier = np.where(in_second, origin, -1)
    copied = in_second.copy()
    copied[:, :-1] &= in_second[:, 1:]
    copied[:, -1] = False
    asked = np.zeros_like(copied)
    _ask_questions(tokens, asked, earlier, in_first, in_second, rng)
    return Batch(*(torch.from_numpy(a) for a in (tokens, copied, asked, earlier)))


def _ask_questions(
    tokens: np.ndarray,
    asked: np.ndarray,
    earlier: np.ndarray,
    in_first: np.ndarray,
    in_second: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Write questions and their answers into ``tokens``; half of them about an earlier word.

    A word of the segment is asked about only after its second occurrence, so that a word of the
    segment has one successor at the time when the segment is continued.
    """
    size = len(tokens)
    for cell in range(CELL, N_CTX - CELL + 1, CELL):
        at = cell + rng.integers(0, 2)
        free = ~(in_first[:, at : at + 3] | in_second[:, at : at + 3]).any(axis=1)
        chosen = free & (rng.random(size) < 0.5)
        candidates = (tokens[:, :at] < N_WORDS) & (earlier[:, :at] < 0)
        finished = in_second[:, :at].any(axis=1)
        candidates &= finished[:, None] | ~in_first[:, :at]
        repeats = chosen & (rng.random(size) < 0.5) & candidates.any(axis=1)
        source = np.argmax(rng.random(candidates.shape) * candidates, axis=1)
        word = np.where(
            repeats, np.take_along_axis(tokens, source[:, None], 1)[:, 0], tokens[:, at + 1]
        )
        tokens[chosen, at] = ASK
        tokens[chosen, at + 1] = word[chosen]
        tokens[chosen, at + 2] = np.where(repeats, YES, NO)[chosen]
        asked[chosen, at + 1] = True
        earlier[repeats, at + 1] = source[repeats]


def initial_parameters(seed: int) -> Parameters:
    """Random weights, TransformerLens names: ``W_Q`` is ``(n_heads, d_model, d_head)``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    std = 1 / math.sqrt(D_MODEL)
    parameters = {
        "embed.W_E": normal(D_VOCAB, D_MODEL, std=std),
        "pos_embed.W_pos": normal(N_CTX, D_MODEL, std=std),
        "ln_final.w": torch.ones(D_MODEL),
        "ln_final.b": torch.zeros(D_MODEL),
        "unembed.W_U": normal(D_MODEL, D_VOCAB, std=std),
        "unembed.b_U": torch.zeros(D_VOCAB),
    }
    for layer in range(N_LAYERS):
        block = f"blocks.{layer}"
        parameters[f"{block}.ln1.w"] = torch.ones(D_MODEL)
        parameters[f"{block}.ln1.b"] = torch.zeros(D_MODEL)
        for role in "QKV":
            parameters[f"{block}.attn.W_{role}"] = normal(N_HEADS, D_MODEL, D_HEAD, std=std)
            parameters[f"{block}.attn.b_{role}"] = torch.zeros(N_HEADS, D_HEAD)
        parameters[f"{block}.attn.W_O"] = normal(N_HEADS, D_HEAD, D_MODEL, std=std)
        parameters[f"{block}.attn.b_O"] = torch.zeros(D_MODEL)
    return parameters


def all_heads() -> list[list[int]]:
    """Indices of the heads of every layer."""
    return [list(range(N_HEADS)) for _ in range(N_LAYERS)]


def forward(
    parameters: Parameters,
    tokens: torch.Tensor,
    active: list[list[int]] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits ``(batch, n_ctx, d_vocab)`` and per layer ``(batch, head, query, key)`` attention.

    ``active`` lists the heads of each layer that write, all by default; the attention holds these
    alone.
    """
    active = all_heads() if active is None else active
    n_ctx = tokens.shape[1]
    future = torch.ones(n_ctx, n_ctx, dtype=torch.bool).triu(1)
    residual = parameters["embed.W_E"][tokens] + parameters["pos_embed.W_pos"][:n_ctx]
    patterns = []
    for layer in range(N_LAYERS):
        heads = torch.tensor(active[layer], dtype=torch.long)
        weights = {name: parameters[f"blocks.{layer}.attn.{name}"][heads] for name in HEAD_TENSORS}
        x = _normalised(residual, parameters, f"blocks.{layer}.ln1")
        q, k, v = (
            torch.einsum("bsd,hdk->bhsk", x, weights[f"W_{role}"]) + weights[f"b_{role}"][:, None]
            for role in "QKV"
        )
        scores = (q / math.sqrt(D_HEAD)) @ k.transpose(-1, -2)
        pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
        written = torch.einsum("bhsk,hkd->bsd", pattern @ v, weights["W_O"])
        residual = residual + written + parameters[f"blocks.{layer}.attn.b_O"]
        patterns.append(pattern)
    x = _normalised(residual, parameters, "ln_final")
    return x @ parameters["unembed.W_U"] + parameters["unembed.b_U"], patterns


def _normalised(x: torch.Tensor, parameters: Parameters, name: str) -> torch.Tensor:
    return F.layer_norm(x, (D_MODEL,), parameters[f"{name}.w"], parameters[f"{name}.b"], LN_EPS)
