"""Norm folding and centring of head matrices. Both are off unless asked for."""

from __future__ import annotations

import torch

from skhead._callers import warn_user
from skhead.exceptions import CheckpointError, DegenerateHeadError, UnsupportedLayoutError
from skhead.weights.layouts import LayerPlan, ModelPlan
from skhead.weights.readers import TensorReader, torch_dtype
from skhead.weights.transfers import Transfers, deliver

__all__ = [
    "centre",
    "check_foldable",
    "fold",
    "warn_if_centring_changes_reading",
    "warn_if_gains_are_unknown",
]


def check_foldable(plan: ModelPlan, label: str) -> None:
    """Refuse to fold norms that do not stand between the residual stream and the heads.

    Raises
    ------
    UnsupportedLayoutError
    """
    if plan.norm.unfoldable is not None:
        raise UnsupportedLayoutError(
            f"fold_norm=True: {label} ({plan.family}) {plan.norm.unfoldable}. Use fold_norm=False."
        )


def warn_if_gains_are_unknown(plan: ModelPlan, label: str) -> None:
    """Warn where nothing is folded because no gain is stored, and the model may well have some."""
    if plan.norm.known:
        return
    warn_user(
        f"fold_norm=True: {label} ({plan.family}) holds no norm gains (blocks.0.ln1.w and the "
        "like), so nothing was folded. That is right if the model has no norms, or if its gains "
        "were folded before it was saved; else add the gains to the file.",
    )


def warn_if_centring_changes_reading(plan: ModelPlan, label: str) -> None:
    """Warn where the model does not itself remove the mean that centring removes."""
    kind, placement = plan.norm.kind, plan.norm.placement
    if kind == "layernorm" and placement in ("pre", "pre+post"):
        return
    if kind == "layernorm":
        why = "has no LayerNorm directly in front of its heads"
    elif kind == "none":
        why = "has no norm that is known"
    else:
        why = f"normalises by {kind}, which keeps the mean"
    warn_user(
        f"center=True: {label} ({plan.family}) {why}, so centring changes what its heads read.",
    )


def fold(
    stack: torch.Tensor,
    role: str,
    layer: LayerPlan,
    plan: ModelPlan,
    reader: TensorReader,
    transfers: Transfers | None = None,
) -> None:
    """Multiply the norm's gain into head matrices, in place.

    Readers (Q, K, V) take the gain of the norm in front of them, writers (O) that of the norm
    between them and the stream, where the architecture has one. Norms on queries and keys inside
    the head (Qwen 3, Gemma 3, OLMo 2) do not act on the residual stream and are left alone.

    Parameters
    ----------
    stack : torch.Tensor of shape (n, d_model, d_head)
        float32.
    role : {"Q", "K", "V", "O"}
    layer : LayerPlan
    plan : ModelPlan
    reader : TensorReader
    transfers : Transfers, optional
        How the gain comes to the device of `stack`.

    Raises
    ------
    CheckpointError
        If the gain is missing or not of length d_model.
    DegenerateHeadError
        If the gain holds NaN or infinite values.
    """
    name = layer.gains[role]
    if name is None:
        return
    if name not in reader.names():
        raise CheckpointError(
            f"fold_norm=True: {reader.label} has no tensor {name!r}, the gain of the norm beside "
            f"L{layer.layer} W_{role}. Use fold_norm=False, or a checkpoint that holds the norms."
        )
    info = reader.info(name)
    torch_dtype(info, repr(name))
    if info.shape != (plan.d_model,):
        raise CheckpointError(
            f"{info.file}: tensor {name!r} has shape {info.shape}; a gain of this model has "
            f"({plan.d_model},)."
        )
    stored = reader.tensor(name)
    if not bool(torch.isfinite(stored).all()):
        raise DegenerateHeadError(f"{info.file}: tensor {name!r} holds NaN or infinite values.")
    gain = torch.empty(stored.shape, dtype=torch.float32, device=stack.device)
    deliver(stored, gain, transfers)
    stack.mul_((1.0 + gain if plan.norm.kind == "rmsnorm+1" else gain).unsqueeze(-1))


def centre(stack: torch.Tensor) -> None:
    """Subtract from every head matrix its mean over the residual coordinates, in place.

    Parameters
    ----------
    stack : torch.Tensor of shape (n, d_model, d_head)
    """
    stack.sub_(stack.mean(dim=1, keepdim=True))
