"""Where an architecture keeps the norm and the MLP of its first block.

Beside :mod:`skhead.weights.families`, which says where attention is: one :class:`Mlp` for each
family whose first block turns a token into ``MLP(norm(token))``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from skhead.weights.token_layouts import Norm

__all__ = ["MLPS", "NO_MLPS", "Mlp", "adapt_mlp"]

Storage = Literal["linear", "conv1d"]


@dataclass(frozen=True)
class Mlp:
    """The norm in front of the first MLP and its matrices, by names after the family's prefix.

    Attributes
    ----------
    norm : Norm or None
        In front of the MLP. A LayerNorm's bias has the name of the gain with ``bias`` at its end.
    up, down : str
        Matrices into the hidden layer and out of it; biases are named likewise.
    gate : str or None
        Matrix whose activated output is multiplied with that of `up`.
    fused : bool
        `up` holds gate and up, one above the other.
    biased : bool
        Both matrices have biases. If False, those count that are stored.
    storage : {"linear", "conv1d"}
        Stored as (out, in) or as (in, out).
    after : Norm or None
        Applied to what the MLP wrote, before it is added to the stream.
    activation : tuple of str
        Configuration keys of the activation function; the first one present counts.
    default_activation : str
    eps : tuple of str
        Configuration keys of the norms' epsilon.
    default_eps : float
    """

    norm: Norm | None
    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    biased: bool = False
    storage: Storage = "linear"
    after: Norm | None = None
    activation: tuple[str, ...] = ("hidden_act",)
    default_activation: str = "silu"
    eps: tuple[str, ...] = ("rms_norm_eps",)
    default_eps: float = 1e-6


_LAST_EPS: dict[str, Any] = {"eps": ("layer_norm_epsilon",), "default_eps": 1e-5}
_GPT: dict[str, Any] = {
    "biased": True,
    "activation": ("activation_function",),
    "default_activation": "gelu_new",
    **_LAST_EPS,
}


def _neox_like(layer: str, norm: str, **changes: Any) -> Mlp:
    return Mlp(
        Norm("layernorm", f"{layer}.{norm}.weight"),
        f"{layer}.mlp.dense_h_to_4h.weight",
        f"{layer}.mlp.dense_4h_to_h.weight",
        **changes,
    )


_LLAMA = Mlp(
    Norm("rmsnorm", "layers.0.post_attention_layernorm.weight"),
    "layers.0.mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight",
    gate="layers.0.mlp.gate_proj.weight",
)
_GEMMA = replace(
    _LLAMA,
    norm=Norm("rmsnorm+1", "layers.0.post_attention_layernorm.weight"),
    activation=("hidden_activation", "hidden_act"),
    default_activation="gelu_pytorch_tanh",
)
_GEMMA2 = replace(
    _GEMMA,
    norm=Norm("rmsnorm+1", "layers.0.pre_feedforward_layernorm.weight"),
    after=Norm("rmsnorm+1", "layers.0.post_feedforward_layernorm.weight"),
)

MLPS: Mapping[str, Mlp] = {
    "gpt2": Mlp(
        Norm("layernorm", "h.0.ln_2.weight"),
        "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
        storage="conv1d",
        **_GPT,
    ),
    "gpt_neo": Mlp(
        Norm("layernorm", "h.0.ln_2.weight"),
        "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
        **_GPT,
    ),
    "gptj": Mlp(
        Norm("layernorm", "h.0.ln_1.weight"),
        "h.0.mlp.fc_in.weight",
        "h.0.mlp.fc_out.weight",
        **_GPT,
    ),
    "gpt_neox": _neox_like(
        "layers.0",
        "post_attention_layernorm",
        biased=True,
        default_activation="gelu",
        eps=("layer_norm_eps",),
        default_eps=1e-5,
    ),
    "opt": Mlp(
        Norm("layernorm", "layers.0.final_layer_norm.weight"),
        "layers.0.fc1.weight",
        "layers.0.fc2.weight",
        biased=True,
        activation=("activation_function",),
        default_activation="relu",
        eps=(),
        default_eps=1e-5,
    ),
    "bloom": _neox_like(
        "h.0",
        "post_attention_layernorm",
        biased=True,
        activation=(),
        default_activation="gelu_pytorch_tanh",
        **_LAST_EPS,
    ),
    "falcon": _neox_like(
        "h.0",
        "input_layernorm",
        activation=("activation",),
        default_activation="gelu",
        **_LAST_EPS,
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "phi": Mlp(
        Norm("layernorm", "layers.0.input_layernorm.weight"),
        "layers.0.mlp.fc1.weight",
        "layers.0.mlp.fc2.weight",
        biased=True,
        default_activation="gelu_new",
        eps=("layer_norm_eps",),
        default_eps=1e-5,
    ),
    "phi3": replace(
        _LLAMA, up="layers.0.mlp.gate_up_proj.weight", gate=None, fused=True, default_eps=1e-5
    ),
    "olmo2": replace(
        _LLAMA,
        norm=None,
        after=Norm("rmsnorm", "layers.0.post_feedforward_layernorm.weight"),
        default_eps=1e-5,
    ),
}

#: Why the other families have no such map from tokens, as the end of a sentence about the model.
NO_MLPS: Mapping[str, str] = {
    "mixtral": "routes each token to experts, and has no single MLP in its first block",
    "t5": "is an encoder-decoder, whose first MLP is not known to skhead",
    **dict.fromkeys(
        ("bert", "roberta", "distilbert", "albert", "bart"),
        "normalises the residual stream itself, so that no norm and MLP of the first block act on "
        "a token by themselves",
    ),
}


def adapt_mlp(family: str, mlp: Mlp, config: Mapping[str, Any]) -> Mlp:
    """Return the MLP as the switches of a configuration make it.

    Parameters
    ----------
    family : str
    mlp : Mlp
    config : mapping
    """
    if family == "opt" and not config.get("enable_bias", True):
        return replace(mlp, biased=False)
    if family != "falcon":
        return mlp
    if not config.get("parallel_attn", True):
        return replace(mlp, norm=Norm("layernorm", "h.0.post_attention_layernorm.weight"))
    grouped = bool(config.get("new_decoder_architecture", False))
    norms = config.get("num_ln_in_parallel_attn")
    if norms == 2 or (norms is None and grouped):
        return replace(mlp, norm=Norm("layernorm", "h.0.ln_mlp.weight"))
    return mlp
