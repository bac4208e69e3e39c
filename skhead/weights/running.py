"""Models that run: sources opened as TransformerLens bridges."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from skhead import datasets
from skhead.exceptions import (
    CheckpointError,
    ConfigMismatchError,
    SourceNotFoundError,
    UnsupportedLayoutError,
)
from skhead.weights import live
from skhead.weights.bridges import is_bridge
from skhead.weights.files import CONFIG_NAME, Checkpoint
from skhead.weights.lens import has_lens_names
from skhead.weights.native import native_bridge
from skhead.weights.sources import absolute_path, locate, split_source

__all__ = ["attention_layers", "evaluating", "open_bridge", "token_batches"]

#: Numbers that one batch may hold in a layer's heads (float32, 64 MiB), and in its logits.
_BATCH_NUMBERS = 1 << 24
_LOGIT_NUMBERS = 1 << 26
#: How much larger than what is stored a model may be, which is then told tensor by tensor, and the
#: numbers that come beside it, such as tables of positions.
_CLAIMED_TIMES = 8
_CLAIMED_BESIDE = 1 << 28


def open_bridge(model: Any) -> Any:
    """Open a model so that it can be run with hooks on its heads.

    Nothing is downloaded, no code of a checkpoint is executed, and no parameter keeps a random
    value: a model of which a tensor is missing is refused.

    Parameters
    ----------
    model : str, path-like, torch.nn.Module or TransformerBridge
        A bridge is returned as it is. A Hugging Face module is copied, so that it stays as it is.
        A source is the name of a live or bundled model, a directory in Hugging Face layout or a
        file in one, or tensors under TransformerLens' names with or without a ``config.json``.

    Returns
    -------
    transformer_lens.model_bridge.TransformerBridge
        On the CPU, in float32, in evaluation mode, weights as they are stored: no norm is folded
        and nothing is centred.

    Raises
    ------
    ImportError
        If transformer_lens is not installed.
    TypeError
        If `model` is none of these.
    SourceNotFoundError
        If the source is neither a live nor a bundled model nor an existing path.
    CheckpointError, ConfigMismatchError
        If tensors that the model needs are missing or have other shapes.
    UnsupportedLayoutError
        If TransformerLens has no adapter for the architecture.

    Examples
    --------
    >>> from skhead.weights.running import open_bridge
    >>> bridge = open_bridge("skhead/induction-2l")
    >>> bridge.cfg.n_layers, bridge.cfg.n_heads
    (2, 8)
    """
    if isinstance(model, nn.Module):
        return _bridge_of_module(model)
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            "open_bridge: model must be a source (str or path), a Hugging Face module or a "
            f"TransformerBridge, got {type(model).__name__}."
        )
    name = os.fspath(model)
    registered = live.live_module(name)
    if isinstance(registered, nn.Module):
        return _bridge_of_module(registered)
    checkpoint = _open_local(model)
    _require_lens()
    if has_lens_names(checkpoint.reader.names()):
        return native_bridge(checkpoint)
    return _wrapped(_hugging_face_module(checkpoint), checkpoint.reader.label)


def _require_lens() -> None:
    try:
        import transformer_lens.model_bridge  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "open_bridge: running a model needs transformer_lens and transformers, which are not "
            f"installed ({error}): pip install skhead[lens]"
        ) from error


def _bridge_of_module(module: nn.Module) -> Any:
    _require_lens()
    module = live.uncompiled(module)
    if is_bridge(module):
        return module
    label = f"a live {type(module).__name__}"
    if not hasattr(getattr(module, "config", None), "to_dict"):
        raise UnsupportedLayoutError(
            f"open_bridge: {label} has no Hugging Face config, and is no TransformerBridge."
        )
    _check_adapter(type(module).__name__, label)
    return _wrapped(copy.deepcopy(module), label)


def _open_local(model: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint that a source names, without looking at the hub."""
    if isinstance(model, str):
        where, part = split_source(model)
        if part is not None:
            raise UnsupportedLayoutError(
                f"open_bridge: {model!r} names the {part} of an encoder-decoder, and half a model "
                "cannot be run. Models with one stack of layers can."
            )
        if live.is_registered(where) or where in datasets.list_models():
            return locate(where)
    path = absolute_path(os.fspath(model))
    if not path.exists():
        raise SourceNotFoundError(
            f"open_bridge: source {os.fspath(model)!r} is no registered live model, no bundled "
            f"model ({', '.join(datasets.list_models())}) and no existing path. A model of the "
            "hub is run from a directory: huggingface_hub.snapshot_download(repo)."
        )
    return locate(path)


def _check_adapter(architecture: str, label: str) -> None:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedLayoutError(
            f"{label}: TransformerLens has no adapter for {architecture}, so that the model cannot "
            "be run with hooks on its heads (measures of the weights alone need none). It has "
            f"{len(SUPPORTED_ARCHITECTURES)} others, such as GPT2LMHeadModel and LlamaForCausalLM."
        )


def _wrapped(module: nn.Module, label: str) -> Any:
    """A bridge around a module that nobody else uses: it takes the module's parts over."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    settings: Any = module
    module = module.to("cpu", torch.float32).eval()
    settings.set_attn_implementation("eager")
    return build_bridge_from_module(
        module, type(module).__name__, hf_config=settings.config, model_name=label
    )


def _hugging_face_module(checkpoint: Checkpoint) -> nn.Module:
    """A transformers model with every parameter out of the checkpoint."""
    import transformers

    reader, config = checkpoint.reader, dict(checkpoint.config or {})
    if not config:
        raise UnsupportedLayoutError(
            f"{reader.label}: there is no {CONFIG_NAME} that says how the model computes, and the "
            "tensors do not have TransformerLens' names (blocks.0.attn.W_Q)."
        )
    listed = config.get("architectures")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], str):
        raise UnsupportedLayoutError(
            f"{reader.label}: {CONFIG_NAME} does not name the class of the model; state it, for "
            'example "architectures": ["LlamaForCausalLM"].'
        )
    architecture = listed[0]
    _check_adapter(architecture, reader.label)
    if str(config.get("model_type")) not in transformers.CONFIG_MAPPING:
        raise UnsupportedLayoutError(
            f"{reader.label}: model_type {config.get('model_type')!r} is none that the installed "
            "transformers knows; code that comes with a checkpoint is not executed."
        )
    settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
    tensors = {name: reader.tensor(name) for name in reader.names()}
    _check_claim(getattr(transformers, architecture), settings, tensors, reader.label)
    with _quiet(transformers):
        module, report = getattr(transformers, architecture).from_pretrained(
            None,
            config=settings,
            state_dict=tensors,
            attn_implementation="eager",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_report(report, architecture, reader.label)
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{reader.label}: parameter {name!r} of {architecture} holds NaN or infinite "
                "values; repair the file."
            )
    return module


def _check_claim(kind: Any, settings: Any, tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """Refuse a model that is far larger than what is stored, before memory is taken for it."""
    n_layers = getattr(settings, "num_hidden_layers", 0)
    if n_layers > len(tensors):
        raise ConfigMismatchError(
            f"{label}: {CONFIG_NAME} describes {n_layers} layers, and there are {len(tensors)} "
            "tensors in all."
        )
    with torch.device("meta"):
        empty = kind(settings)
    claimed = sum(part.numel() for part in [*empty.parameters(), *empty.buffers()])
    stored = sum(tensor.numel() for tensor in tensors.values())
    if claimed > _CLAIMED_TIMES * stored + _CLAIMED_BESIDE:
        raise ConfigMismatchError(
            f"{label}: {CONFIG_NAME} describes a {kind.__name__} of {claimed} numbers, and "
            f"{stored} are stored."
        )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and reports: what is missing becomes an error."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_report(report: dict[str, Any], architecture: str, label: str) -> None:
    """Refuse a model with parameters that no tensor gives, or without layers that are stored."""
    missing = sorted(
        report["missing_keys"], key=lambda name: (any(c.isdigit() for c in name), name)
    )
    if missing:
        listed = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
        raise CheckpointError(
            f"{label}: the model cannot be run: {len(missing)} tensors of {architecture} are not "
            f"stored, and random numbers would take their place: {listed}."
        )
    left = sorted(name for name in report["unexpected_keys"] if any(c.isdigit() for c in name))
    if left:
        raise ConfigMismatchError(
            f"{label}: {len(left)} tensors of layers have no place in the {architecture} that "
            f"{CONFIG_NAME} describes: {', '.join(left[:6])}."
        )
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise ConfigMismatchError(
            f"{label}: tensor {name!r} has shape {tuple(stored)}, and {CONFIG_NAME} asks for "
            f"{tuple(expected)} ({len(mismatched)} such tensors)."
        )


@contextmanager
def evaluating(bridge: Any) -> Iterator[None]:
    """Run a bridge without gradients and dropout, and leave it in the mode in which it was."""
    training = bridge.training
    bridge.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        bridge.train(training)


def attention_layers(bridge: Any, caller: str) -> list[int]:
    """Numbers of the layers that have attention heads.

    Raises
    ------
    UnsupportedLayoutError
        If the bridge has no single list of blocks, or none with attention.
    """
    layers = []
    if hasattr(bridge, "blocks"):
        layers = [i for i, block in enumerate(bridge.blocks) if getattr(block, "attn", None)]
    if not layers:
        raise UnsupportedLayoutError(
            f"{caller}: the model ({bridge.cfg.architecture}) has no single list of blocks with "
            "attention heads."
        )
    return layers


def token_batches(
    bridge: Any, tokens: Any, caller: str, least: int = 3, numbers: int = _BATCH_NUMBERS
) -> list[torch.Tensor]:
    """Sequences in batches of one length each, small enough for their attention to fit in memory.

    Parameters
    ----------
    bridge : TransformerBridge
    tokens : array of shape (n_sequences, length), or list of sequences of token ids
    caller : str
        The function to name in errors.
    least : int, default=3
        Length that a sequence must have.
    numbers : int, default=2**24
        Attention weights and outputs that the heads of one layer may have on a batch, though it is
        at least one sequence.

    Returns
    -------
    list of Tensor of shape (batch, length), int64

    Raises
    ------
    TypeError
        If the tokens are not integers.
    ValueError
        If there are none, or a sequence is too short, too long or names an unknown token.
    """
    by_length: dict[int, list[torch.Tensor]] = {}
    for position, sequence in enumerate(_listed(tokens, caller)):
        ids = _ids(sequence, position, caller)
        if len(ids) < least:
            raise ValueError(
                f"{caller}: sequence {position} has {len(ids)} tokens; at least {least} are needed"
            )
        if len(ids) > bridge.cfg.n_ctx:
            raise ValueError(
                f"{caller}: sequence {position} has {len(ids)} tokens, and the model's context is "
                f"{bridge.cfg.n_ctx}; cut it"
            )
        unknown = (ids < 0) | (ids >= bridge.cfg.d_vocab)
        if unknown.any():
            raise ValueError(
                f"{caller}: sequence {position} holds token {int(ids[unknown][0])}; the model's "
                f"tokens are 0 to {bridge.cfg.d_vocab - 1}"
            )
        by_length.setdefault(len(ids), []).append(ids)
    batches: list[torch.Tensor] = []
    for length, sequences in by_length.items():
        per_layer = bridge.cfg.n_heads * length * (length + 4 * bridge.cfg.d_head)
        size = min(numbers // per_layer, _LOGIT_NUMBERS // (bridge.cfg.d_vocab * length))
        batches += torch.stack(sequences).split(max(1, size))
    return batches


def _listed(tokens: Any, caller: str) -> list[Any]:
    wanted = f"{caller}: tokens must be an array (n_sequences, length) of token ids, or a list of"
    if isinstance(tokens, str | bytes | dict) or not isinstance(tokens, Iterable):
        raise TypeError(f"{wanted} sequences of them; got {type(tokens).__name__}")
    listed = list(tokens)
    if not listed:
        raise ValueError(f"{caller}: tokens is empty; give at least one sequence")
    return listed


def _ids(sequence: Any, position: int, caller: str) -> torch.Tensor:
    values = sequence.detach().cpu() if isinstance(sequence, torch.Tensor) else sequence
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"{caller}: sequence {position} must be one-dimensional integers, got shape "
            f"{array.shape} of {array.dtype}; turn text into token ids with the model's tokenizer"
        )
    return torch.from_numpy(array.astype(np.int64))
