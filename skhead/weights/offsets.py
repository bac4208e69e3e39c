"""What queries and keys hold whatever the stream says: biases of the heads and of their norm."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from skhead.exceptions import ConfigMismatchError, DegenerateHeadError
from skhead.weights.layouts import LayerPlan, ModelPlan, Slot, cut_heads
from skhead.weights.readers import TensorReader, torch_dtype
from skhead.weights.sources import reopen, split_address

__all__ = ["read_offsets"]


def read_offsets(
    heads: pd.DataFrame, role: str, *, device: torch.device | str | None = None
) -> torch.Tensor:
    """Read the constant part of the queries, keys or values of heads.

    Behind a norm with gain g and bias b, a head's query is ``(x g + b) W_Q + b_Q``: with the gain
    folded into W_Q, ``b W_Q + b_Q`` is left over.

    Parameters
    ----------
    heads : pandas.DataFrame
        Heads table of one model.
    role : {"Q", "K", "V"}
    device : torch.device or str, optional
        Where the result is; the CPU by default.

    Returns
    -------
    torch.Tensor of shape (n_heads, d_head)
        float32; zero where the source holds neither bias.

    Raises
    ------
    ConfigMismatchError
        If a bias has another shape than its matrix.
    DegenerateHeadError
        If a bias holds NaN or infinite values.
    UnsupportedLayoutError
        If a bias is stored quantised.
    """
    address, part = split_address(str(heads["source"].iloc[0]))
    checkpoint = reopen(address)
    plan = checkpoint.plan(part)
    offsets = torch.zeros(len(heads), plan.d_head)
    layers = heads["layer"].to_numpy()
    numbers = heads["kv_head" if role in "KV" else "head"].to_numpy()
    for number in np.unique(layers):
        layer = plan.layer(int(number))
        if layer is not None:
            rows = np.flatnonzero(layers == number)
            found = _of_layer(layer, role, plan, checkpoint.reader)
            offsets[torch.as_tensor(rows)] = found[torch.as_tensor(numbers[rows])]
    return offsets if device is None else offsets.to(device)


def _of_layer(layer: LayerPlan, role: str, plan: ModelPlan, reader: TensorReader) -> torch.Tensor:
    """Offsets of the distinct heads of a layer, ``(n_distinct, d_head)``."""
    slot = layer.slots[role]
    offsets = torch.zeros(layer.count(role), plan.d_head)
    own = _bias_name(slot.tensor)
    if own in reader.names():
        bias = _finite(reader, own, _bias_shape(slot))
        offsets += cut_heads(_as_matrix(bias, slot), slot, role, layer, plan.d_head)[:, 0]
    gain = layer.gains[role]
    if gain is not None and _bias_name(gain) in reader.names():
        shift = _finite(reader, _bias_name(gain), (plan.d_model,))
        stored = reader.tensor(slot.tensor)
        offsets += shift @ cut_heads(stored, slot, role, layer, plan.d_head).float()
    return offsets


def _bias_name(name: str) -> str:
    """Name of the bias that stands beside a matrix or a gain."""
    parent, dot, last = name.rpartition(".")
    known = {"weight": "bias", "w": "b", "W_Q": "b_Q", "W_K": "b_K", "W_V": "b_V"}
    known |= {"_W_K": "_b_K", "_W_V": "_b_V"}
    return f"{parent}{dot}{known.get(last, last)}" if last in known else f"{name}.bias"


def _bias_shape(slot: Slot) -> tuple[int, ...]:
    if slot.projection.storage == "per_head":
        return (slot.shape[0], slot.shape[2])
    return (slot.shape[1 if slot.projection.storage == "conv1d" else 0],)


def _as_matrix(bias: torch.Tensor, slot: Slot) -> torch.Tensor:
    """A bias in the layout of a matrix that reads one coordinate."""
    if slot.projection.storage == "per_head":
        return bias[:, None, :]
    return bias[None, :] if slot.projection.storage == "conv1d" else bias[:, None]


def _finite(reader: TensorReader, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    info = reader.info(name)
    if info.shape != shape:
        raise ConfigMismatchError(
            f"{info.file}: tensor {name!r} has shape {info.shape}; a bias here has {shape}."
        )
    torch_dtype(info, repr(name))
    bias = reader.tensor(name).float()
    if not bool(torch.isfinite(bias).all()):
        raise DegenerateHeadError(f"{info.file}: tensor {name!r} holds NaN or infinite values.")
    return bias
