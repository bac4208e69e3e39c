"""Small models made on the spot, under TransformerLens names."""

from __future__ import annotations

import uuid
from contextlib import contextmanager

import torch

import skhead


def random_weights(n_layers=3, n_heads=4, d_model=24, d_head=5, n_kv_heads=None, seed=0):
    """Random attention weights as a mapping of tensors."""
    generator = torch.Generator().manual_seed(seed)
    kv = n_heads if n_kv_heads is None else n_kv_heads
    grouped = "_" if kv != n_heads else ""
    tensors = {}
    for layer in range(n_layers):
        for name, count, shape in (
            ("W_Q", n_heads, (d_model, d_head)),
            (f"{grouped}W_K", kv, (d_model, d_head)),
            (f"{grouped}W_V", kv, (d_model, d_head)),
            ("W_O", n_heads, (d_head, d_model)),
        ):
            tensors[f"blocks.{layer}.attn.{name}"] = torch.randn(count, *shape, generator=generator)
    return tensors


@contextmanager
def toy_heads(**shape):
    """The heads table of a random model that lives for the length of the context."""
    with registered(random_weights(**shape)) as heads:
        yield heads


@contextmanager
def registered(tensors):
    name = skhead.register_model(tensors, f"toy-{uuid.uuid4().hex[:8]}")
    try:
        yield skhead.load_heads(name)
    finally:
        skhead.unregister_model(name)
