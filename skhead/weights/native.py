"""Models under TransformerLens' names as modules that run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skhead.exceptions import CheckpointError, ConfigMismatchError, UnsupportedLayoutError
from skhead.weights.files import CONFIG_NAME, Checkpoint
from skhead.weights.lens_tokens import NATIVE
from skhead.weights.readers import TensorReader, torch_dtype

__all__ = ["native_bridge"]

#: Entries of a configuration that the tensors do not tell, and that are taken from it.
_TAKEN = (
    "act_fn",
    "attention_dir",
    "attn_scale",
    "attn_scores_soft_cap",
    "eps",
    "final_rms",
    "output_logits_soft_cap",
    "rope_scaling",
    "rotary_base",
    "rotary_dim",
    "use_attn_scale",
)
#: Entries that the tensors tell too, and that must agree with them.
_COMPARED = (
    "attn_only",
    "d_head",
    "d_mlp",
    "d_model",
    "d_vocab",
    "gated_mlp",
    "n_ctx",
    "n_heads",
    "n_key_value_heads",
    "n_layers",
    "normalization_type",
    "positional_embedding_type",
)
#: Entries that would change the computation in a way that the native model does not have.
_REFUSED = (
    "num_experts",
    "parallel_attn_mlp",
    "post_embedding_ln",
    "rmsnorm_uses_offset",
    "scale_attn_by_inverse_layer_idx",
    "use_local_attn",
    "use_normalization_before_and_after",
    "use_qk_norm",
    "window_size",
)
#: Most positions, for masks of a gigabyte in each layer.
_MOST_POSITIONS = 2**15
#: Attention masks and tables of angles, which a state dict may hold and the model makes itself.
_BUFFERS = ("attn.mask", "attn.IGNORE", "attn.rotary_sin", "attn.rotary_cos")
_MATRIX_AXES = 2
_WITHOUT_GAINS = ("LNPRE", "RMSPRE")

Convert = Callable[[torch.Tensor], torch.Tensor]


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """What is no matrix stays as it is, and is refused by its shape."""
    return matrix.mT if matrix.ndim == _MATRIX_AXES else matrix


def _read_by_heads(stack: torch.Tensor) -> torch.Tensor:
    """``(heads, d_model, d_head)`` as the weight of a linear layer."""
    return stack.mT.flatten(0, 1)


def _written_by_heads(stack: torch.Tensor) -> torch.Tensor:
    """``(heads, d_head, d_model)`` as the weight of a linear layer."""
    return stack.flatten(0, 1).mT


#: Parameter of the native model -> names under which it may be stored, and what turns it round.
_MODEL: dict[str, tuple[tuple[str, ...], Convert]] = {
    "tok_embed.weight": (("embed.W_E",), _as_it_is),
    "pos.weight": (("pos_embed.W_pos",), _as_it_is),
    "ln_out.weight": (("ln_final.w",), _as_it_is),
    "ln_out.bias": (("ln_final.b",), _as_it_is),
    "head.weight": (("unembed.W_U",), _transposed),
    "head.bias": (("unembed.b_U",), _as_it_is),
}
_BLOCK: dict[str, tuple[tuple[str, ...], Convert]] = {
    "ln1.weight": (("ln1.w",), _as_it_is),
    "ln1.bias": (("ln1.b",), _as_it_is),
    "ln2.weight": (("ln2.w",), _as_it_is),
    "ln2.bias": (("ln2.b",), _as_it_is),
    "attn.q.weight": (("attn.W_Q",), _read_by_heads),
    "attn.k.weight": (("attn._W_K", "attn.W_K"), _read_by_heads),
    "attn.v.weight": (("attn._W_V", "attn.W_V"), _read_by_heads),
    "attn.o.weight": (("attn.W_O",), _written_by_heads),
    "attn.q.bias": (("attn.b_Q",), torch.flatten),
    "attn.k.bias": (("attn._b_K", "attn.b_K"), torch.flatten),
    "attn.v.bias": (("attn._b_V", "attn.b_V"), torch.flatten),
    "attn.o.bias": (("attn.b_O",), _as_it_is),
    "mlp.fc_in.weight": (("mlp.W_in",), _transposed),
    "mlp.fc_in.bias": (("mlp.b_in",), _as_it_is),
    "mlp.fc_out.weight": (("mlp.W_out",), _transposed),
    "mlp.fc_out.bias": (("mlp.b_out",), _as_it_is),
    "mlp.gate.weight": (("mlp.W_gate",), _transposed),
    "mlp.gate.bias": (("mlp.b_gate",), _as_it_is),
    "mlp.in.weight": (("mlp.W_in",), _transposed),
    "mlp.in.bias": (("mlp.b_in",), _as_it_is),
    "mlp.out.weight": (("mlp.W_out",), _transposed),
    "mlp.out.bias": (("mlp.b_out",), _as_it_is),
    "mlp.ln.weight": (("mlp.ln.w",), _as_it_is),
    "mlp.ln.bias": (("mlp.ln.b",), _as_it_is),
}


def native_bridge(checkpoint: Checkpoint) -> Any:
    """A bridge around a model whose tensors have TransformerLens' names.

    Without ``config.json`` the tensors' shapes describe it: causal attention scaled by the square
    root of ``d_head``, learned positions, LayerNorm where ``ln1`` has a bias, RMSNorm where it has
    a gain alone, no norm where there is no ``ln1``, and an epsilon of 1e-5. A kind of bias that is
    stored nowhere is zero.

    Parameters
    ----------
    checkpoint : Checkpoint

    Returns
    -------
    transformer_lens.model_bridge.TransformerBridge

    Raises
    ------
    CheckpointError
        If a tensor is missing, not finite, or has no place in the model.
    ConfigMismatchError
        If ``config.json`` and the tensors disagree.
    UnsupportedLayoutError
        If neither says how the model computes, or the native model cannot compute it.
    """
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge  # noqa: F401  must come first
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.model_bridge.sources.native import NativeModel

    settings = _settings(checkpoint)
    config = TransformerBridgeConfig(**settings)
    with torch.random.fork_rng(devices=[]):
        model = NativeModel(config)
    _fill(model, checkpoint.reader)
    return build_bridge_from_module(
        model.eval(), NATIVE, tl_config=config, model_name=checkpoint.address
    )


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of the bridge's configuration, from the tensors and ``config.json``."""
    reader, config = checkpoint.reader, checkpoint.config
    told = _told_by_tensors(checkpoint)
    if config is None:
        told["eps"] = 1e-5
    else:
        _check_config(config, told, reader)
        told |= {key: config[key] for key in _TAKEN if config.get(key) is not None}
        if str(config.get("normalization_type")).upper() in _WITHOUT_GAINS:
            told["normalization_type"] = config["normalization_type"]
    if "n_ctx" not in told:
        _take_rotary(told, config, reader)
    if told["n_ctx"] > _MOST_POSITIONS:
        raise UnsupportedLayoutError(
            f"{reader.label}: the native model of TransformerLens lays out a mask of n_ctx x n_ctx "
            f"in every layer, and n_ctx is {told['n_ctx']}; here it may be {_MOST_POSITIONS} at "
            "most."
        )
    if not told["attn_only"] and "act_fn" not in told:
        raise UnsupportedLayoutError(
            f"{reader.label}: the model has MLPs, and nothing says which activation function they "
            f'use. Put a {CONFIG_NAME} beside the weights that states "act_fn" and "architecture": '
            f'"{NATIVE}".'
        )
    return told


def _told_by_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    reader = checkpoint.reader
    names = reader.names()
    plan = checkpoint.plan(None)
    heads = {(layer.n_heads, layer.n_kv_heads) for layer in plan.layers}
    if len(heads) > 1 or len(plan.layers) != plan.n_layers:
        raise UnsupportedLayoutError(
            f"{reader.label}: the native model of TransformerLens has the same heads in every "
            f"layer; here {len(plan.layers)} of {plan.n_layers} blocks have heads, and the "
            f"(query, key-value) heads of a layer are {sorted(heads)}."
        )
    n_heads, n_kv_heads = heads.pop()
    told: dict[str, Any] = {
        "architecture": NATIVE,
        "n_layers": plan.n_layers,
        "n_heads": n_heads,
        "n_key_value_heads": n_kv_heads,
        "d_model": plan.d_model,
        "d_head": plan.d_head,
        "d_vocab": _free_size(reader, "embed.W_E", 0, plan.d_model, "an embedding of the tokens"),
        "d_vocab_out": _free_size(reader, "unembed.W_U", 1, plan.d_model, "an unembedding"),
        "normalization_type": None,
        "attn_only": "blocks.0.mlp.W_in" not in names,
        "gated_mlp": "blocks.0.mlp.W_gate" in names,
        "init_weights": False,
    }
    if "blocks.0.ln1.w" in names:
        told["normalization_type"] = "LN" if "blocks.0.ln1.b" in names else "RMS"
    if "pos_embed.W_pos" in names:
        told["n_ctx"] = _free_size(reader, "pos_embed.W_pos", 0, plan.d_model, "positions")
        told["positional_embedding_type"] = "standard"
    if not told["attn_only"]:
        told["d_mlp"] = _free_size(reader, "blocks.0.mlp.W_in", 1, plan.d_model, "its MLP")
    return told


def _free_size(reader: TensorReader, name: str, axis: int, d_model: int, what: str) -> int:
    """The size along `axis` of a matrix whose other side is the residual stream.

    It decides how large the model is made, so that the whole shape is checked first.
    """
    if name not in reader.names():
        raise CheckpointError(
            f"{reader.label}: the model cannot be run without {what}: there is no tensor {name!r}."
        )
    shape = reader.info(name).shape
    if len(shape) != _MATRIX_AXES or shape[1 - axis] != d_model:
        wanted = f"({d_model}, ...)" if axis else f"(..., {d_model})"
        raise ConfigMismatchError(
            f"{reader.label}: tensor {name!r} has shape {shape}; beside heads of d_model={d_model} "
            f"it must have {wanted}."
        )
    return shape[axis]


def _check_config(config: Mapping[str, Any], told: dict[str, Any], reader: TensorReader) -> None:
    if config.get("architecture") != NATIVE:
        raise UnsupportedLayoutError(
            f"{reader.label}: the tensors have TransformerLens' names, and the {CONFIG_NAME} "
            f'beside them does not say "architecture": "{NATIVE}", so that it may describe '
            "another model. Correct it, or keep the weights where there is none."
        )
    for key in _REFUSED:
        if config.get(key):
            raise UnsupportedLayoutError(
                f"{reader.label}: {CONFIG_NAME} states {key}={config[key]!r}, which the native "
                "model of TransformerLens does not compute."
            )
    for key in _COMPARED:
        stated, value = config.get(key), told.get(key)
        if key == "normalization_type":
            agrees = key not in config or stated == value
            agrees |= value is None and str(stated).upper() in _WITHOUT_GAINS
        else:
            agrees = stated is None or value is None or stated == value
        if not agrees:
            raise ConfigMismatchError(
                f"{reader.label}: {CONFIG_NAME} states {key}={stated!r}, and the tensors say "
                f"{value!r}."
            )


def _take_rotary(
    told: dict[str, Any], config: Mapping[str, Any] | None, reader: TensorReader
) -> None:
    stated = config or {}
    kind, n_ctx = stated.get("positional_embedding_type"), stated.get("n_ctx")
    if kind != "rotary" or not isinstance(n_ctx, int) or n_ctx < 1:
        raise UnsupportedLayoutError(
            f"{reader.label}: nothing says how the model knows positions: there is no tensor "
            f"'pos_embed.W_pos', and no {CONFIG_NAME} beside the weights that states "
            f'"positional_embedding_type": "rotary" with "n_ctx" (got {kind!r} with {n_ctx!r}).'
        )
    told |= {"n_ctx": n_ctx, "positional_embedding_type": "rotary"}


@dataclass(frozen=True)
class _Place:
    """Where a parameter of the native model is stored."""

    candidates: tuple[str, ...]
    convert: Convert

    def stored(self, names: Collection[str]) -> str | None:
        return next((name for name in self.candidates if name in names), None)


def _place(parameter: str) -> _Place:
    if parameter in _MODEL:
        return _Place(*_MODEL[parameter])
    _, layer, rest = parameter.split(".", 2)
    candidates, convert = _BLOCK[rest]
    return _Place(tuple(f"blocks.{layer}.{name}" for name in candidates), convert)


@torch.no_grad()
def _fill(model: nn.Module, reader: TensorReader) -> None:
    """Copy every tensor to its parameter; nothing keeps its random value, and nothing is left."""
    names = reader.names()
    for path, bias in _absent_biases(model):
        if _place(path).stored(names):
            model.get_submodule(path.removesuffix(".bias")).bias = bias
    used = set()
    for path, parameter in model.named_parameters():
        place = _place(path)
        name = place.stored(names)
        if name is None:
            _check_bias_nowhere(place, reader)
            parameter.zero_()
            continue
        used.add(name)
        value = place.convert(_finite(reader, name))
        if value.shape != parameter.shape:
            raise ConfigMismatchError(
                f"{reader.label}: tensor {name!r} has shape {reader.info(name).shape}, which does "
                f"not fit the other tensors: the model needs {tuple(parameter.shape)} here, and "
                f"this gives {tuple(value.shape)}."
            )
        parameter.copy_(value)
    left = sorted(name for name in names if name not in used and not name.endswith(_BUFFERS))
    if left:
        raise CheckpointError(
            f"{reader.label}: {len(left)} tensors have no place in the model that the others "
            f"describe, which would run without them: {', '.join(left[:6])}."
        )


def _absent_biases(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Linear layers that the native model makes without a bias, with a bias for each."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and getattr(module, "bias", None) is None:
            yield f"{path}.bias", nn.Parameter(torch.zeros(module.out_features))


def _check_bias_nowhere(place: _Place, reader: TensorReader) -> None:
    """Allow a parameter to be missing if it is a bias that no layer has."""
    name = place.candidates[-1]
    kind = name.rpartition(".")[2]
    elsewhere = [other for other in reader.names() if other.endswith(f".{kind}")]
    if not kind.startswith("b_") or elsewhere:
        raise CheckpointError(
            f"{reader.label}: the model cannot be run: there is no tensor {name!r}"
            + (f", and other layers have one ({min(elsewhere)})." if elsewhere else ".")
        )


def _finite(reader: TensorReader, name: str) -> torch.Tensor:
    torch_dtype(reader.info(name), repr(name))
    tensor = reader.tensor(name).to("cpu", torch.float32)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{reader.label}: tensor {name!r} holds NaN or infinite values; repair the file."
        )
    return tensor
