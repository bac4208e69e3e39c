"""Heads of a model that runs: how many there are, and those that a caller names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from skhead.exceptions import HeadTableError
from skhead.weights import load_heads
from skhead.weights.running import attention_layers

__all__ = ["Head", "layer_sizes", "named_heads", "running_labels"]

_LABEL = re.compile(r"L(\d+)H(\d+)")

Head = tuple[int, int]


def layer_sizes(bridge: Any, caller: str) -> dict[int, int]:
    """Number of heads by layer, in the order of the heads table.

    Parameters
    ----------
    bridge : TransformerBridge
    caller : str
        The function to name in errors.

    Raises
    ------
    UnsupportedLayoutError
        If the bridge has no single list of blocks, or none with attention.
    """
    layers = attention_layers(bridge, caller)
    return {layer: int(bridge.blocks[layer].attn.W_O.shape[0]) for layer in layers}


def running_labels(model: Any, heads: Sequence[Head], caller: str) -> list[str]:
    """Labels of the heads that run, as `load_heads` gives them where the model is a source.

    Parameters
    ----------
    model : str, path-like, torch.nn.Module or TransformerBridge
    heads : sequence of (layer, head)
        Those that run, in order.
    caller : str
        The function to name in errors.

    Raises
    ------
    HeadTableError
        If the heads table of the source lists others.
    """
    if not isinstance(model, str | os.PathLike):
        return [f"L{layer}H{head}" for layer, head in heads]
    table = load_heads(model)
    listed = list(zip(table["layer"].tolist(), table["head"].tolist(), strict=True))
    if listed != list(heads):
        raise HeadTableError(
            f"{caller}: the model that runs has {len(heads)} heads, and the heads table of "
            f"{os.fspath(model)} lists {len(listed)} others"
        )
    return table.index.tolist()


def named_heads(heads: Any, sizes: Mapping[int, int], caller: str) -> list[Head]:
    """Layer and number of the heads that a caller lists.

    Parameters
    ----------
    heads : sequence of str or (layer, head)
        Labels ("L4H7") or numbers.
    sizes : mapping of int to int
        Number of heads by layer.
    caller : str
        The function to name in errors.

    Raises
    ------
    TypeError
        If `heads` is no list.
    HeadTableError
        If a head is not one of the model's, or is named twice.
    ValueError
        If there are none.
    """
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        raise TypeError(
            f"{caller}: heads must be a list of labels such as 'L4H7' (rank_heads makes one from "
            f"scores), got {heads!r}"
        )
    order: list[Head] = []
    for given in heads:
        if isinstance(given, str):
            parts = _LABEL.fullmatch(given)
            head = None if parts is None else (int(parts[1]), int(parts[2]))
        else:
            head = (int(given[0]), int(given[1]))
        if head is None or not 0 <= head[1] < sizes.get(head[0], 0):
            raise HeadTableError(
                f"{caller}: {given!r} is no head of the model; it has layers {min(sizes)} to "
                f"{max(sizes)} with heads 0 to {max(sizes.values()) - 1}, named as 'L4H7'"
            )
        if head in order:
            raise HeadTableError(f"{caller}: head {given!r} is named twice; name it once")
        order.append(head)
    if not order:
        raise ValueError(f"{caller}: heads is empty; name at least one, such as 'L4H7'")
    return order
