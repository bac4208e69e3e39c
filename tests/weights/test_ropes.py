"""Frequencies of rotary positions against transformers' own, from old and new configurations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from skhead.exceptions import ConfigMismatchError, UnsupportedLayoutError
from skhead.weights.families import FAMILIES
from skhead.weights.ropes import read_rotaries

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

SIZES = {
    "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 7, "vocab_size": 11,
    "pad_token_id": 0, "max_position_embeddings": 4096, "intermediate_size": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
D_HEAD = 64


def _positions(model_type: str) -> Any:
    family = next(family for family in FAMILIES if model_type in family.model_types)
    return family.parts[0].tokens.positions


def _read(config: dict[str, Any], d_head: int = D_HEAD) -> Any:
    positions = _positions(config["model_type"])
    return read_rotaries(config, positions, d_head, 7, "model")


def _true(config: dict[str, Any], layer_type: str | None = None) -> tuple[torch.Tensor, float]:
    """What transformers makes of the same configuration."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(config["model_type"], **values)
    made.standardize_rope_params()
    entries = made.rope_parameters if layer_type is None else made.rope_parameters[layer_type]
    if entries["rope_type"] == "default":
        module = transformers.AutoModel.from_config(made).rotary_emb
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        return getattr(module, name), 1.0
    return rope_utils.ROPE_INIT_FUNCTIONS[entries["rope_type"]](made, "cpu", layer_type=layer_type)


def _check(rotary: Any, config: dict[str, Any], layer_type: str | None = None) -> None:
    frequencies, scaling = _true(config, layer_type)
    torch.testing.assert_close(rotary.frequencies, frequencies.double(), rtol=2e-6, atol=1e-12)
    assert rotary.scaling == pytest.approx(scaling, rel=1e-12)
    assert rotary.n_dims == 2 * len(frequencies)


SCALINGS = {
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "llama3-of-the-whole-context": {
        "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-with-ramp": {
        "factor": 16.0, "beta_fast": 20, "beta_slow": 3, "truncate": False,
        "original_max_position_embeddings": 1024,
    },
    "yarn-with-magnitudes": {
        "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 256,
    },
    "yarn-with-attention-factor": {
        "factor": 4.0, "attention_factor": 1.25, "original_max_position_embeddings": 512,
    },
    "yarn-without-ramp": {
        "factor": 4.0, "beta_fast": 2, "beta_slow": 2, "truncate": False,
        "original_max_position_embeddings": 512,
    },
    "longrope": {
        "factor": 8.0, "original_max_position_embeddings": 512,
        "short_factor": [1 + i / 10 for i in range(32)],
        "long_factor": [2 + i for i in range(32)],
    },
    "longrope-with-attention-factor": {
        "factor": 8.0, "attention_factor": 1.5, "original_max_position_embeddings": 512,
        "short_factor": [1.5] * 32, "long_factor": [2.5] * 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", SCALINGS)
def test_scalings(name: str, key: str) -> None:
    kind = name.partition("-")[0]
    word = "rope_type" if key == "rope_parameters" else "type"
    config = {"model_type": "llama", **SIZES, "rope_theta": 50_000.0}
    config[key] = {word: kind, **SCALINGS[name]}
    if name == "llama3-of-the-whole-context":
        plain = _read({**config, key: None})[0]
        assert not torch.allclose(_read(config)[0].frequencies, plain.frequencies, rtol=1e-3)
    _check(_read(config)[0], config)


def test_a_context_stated_around_the_scaling_goes_before() -> None:
    config = {
        "model_type": "phi3", **SIZES, "num_key_value_heads": 4,
        "original_max_position_embeddings": 1024,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.1] * 32, "long_factor": [4.0] * 32,
        },
    }  # fmt: skip
    rotary = _read(config)[0]
    assert rotary.scaling == pytest.approx(
        (1 + torch.log(torch.tensor(4.0)).item() / 6.9314718056) ** 0.5
    )
    _check(rotary, config)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_old_names_of_longrope_in_phi3(name: str) -> None:
    config = {"model_type": "phi3", **SIZES, "original_max_position_embeddings": 1024}
    scaling = {"short_factor": [1.1] * 32, "long_factor": [4.0] * 32}
    _check(
        _read({**config, "rope_scaling": {"type": name, **scaling}})[0],
        {**config, "rope_scaling": {"type": "longrope", **scaling}},
    )


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("llama", {"rope_theta": 500_000.0}),
        ("mixtral", {"num_local_experts": 2}),
        ("qwen2", {"rope_theta": 1e6}),
        ("gpt_neox", {}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5_000}),
        ("phi", {}),
        ("phi", {"partial_rotary_factor": 0.4, "rope_theta": 300.0}),
        ("phi3", {"partial_rotary_factor": 0.75}),
        ("falcon", {"rope_theta": 700.0}),
        ("olmo2", {"rope_parameters": {"rope_theta": 123.0}}),
    ],
)
def test_old_and_new_keys(model_type: str, settings: dict[str, Any]) -> None:
    sizes = SIZES if model_type != "falcon" else {
        "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 11,
    }  # fmt: skip
    config = {"model_type": model_type, **sizes, "num_hidden_layers": 1, **settings}
    _check(_read(config)[0], config)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rope_theta": 2e6, "rope_local_base_freq": 300.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6},
    ],
)
def test_layers_of_gemma3(settings: dict[str, Any], listed: bool) -> None:
    config = {"model_type": "gemma3_text", **SIZES, "head_dim": D_HEAD, **settings}
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    if listed:
        kinds = kinds[::-1]
        config["layer_types"] = kinds
    rotaries = _read(config)
    assert len(rotaries) == 7
    for rotary, kind in zip(rotaries, kinds, strict=True):
        _check(rotary, config, kind)


def test_pattern_of_gemma3() -> None:
    config = {"model_type": "gemma3_text", **SIZES, "sliding_window_pattern": 3}
    far = [rotary.frequencies[1] == pytest.approx(1e6 ** (-1 / 32)) for rotary in _read(config)]
    assert far == [False, False, True, False, False, True, False]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rope_parameters": {"rope_type": "spiral"}}, UnsupportedLayoutError, "kind 'spiral' are"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}},
            UnsupportedLayoutError,
            r"differ from layer to layer \(full_attention\)",
        ),
        ({"rope_parameters": [1]}, ConfigMismatchError, r"rope_parameters=\[1\] is not a mapping"),
        ({"rope_theta": "10k"}, ConfigMismatchError, "rope_theta='10k' is not a positive number"),
        ({"rope_theta": True}, ConfigMismatchError, "rope_theta=True is not a positive number"),
        ({"rope_theta": float("inf")}, ConfigMismatchError, "rope_theta=inf is not a positive"),
        (
            {"rope_scaling": {"type": "linear"}},
            ConfigMismatchError,
            "rotary positions lack the number factor",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 31, "factor": 2.0}},
            ConfigMismatchError,
            r"short_factor=\[1.0.*\] is not a list of 32 positive numbers",
        ),
        (
            {"rope_scaling": {"type": "yarn"}, "max_position_embeddings": None},
            ConfigMismatchError,
            "lacks max_position_embeddings, which its rotary positions need",
        ),
        (
            {"partial_rotary_factor": 1.5},
            ConfigMismatchError,
            "turns 96 of the 64 coordinates of a head",
        ),
        ({"partial_rotary_factor": 0.01}, ConfigMismatchError, "turns 0 of the 64 coordinates"),
        (
            {"rope_scaling": {"rope_type": ["linear"]}},
            ConfigMismatchError,
            r"rope_type=\['linear'\] is not a text",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0},
            ConfigMismatchError,
            "kind 'yarn' give no frequencies .float division by zero.",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1e-320}},
            ConfigMismatchError,
            "kind 'yarn' give no frequencies",
        ),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4096 / (2 * math.pi),
                    "high_freq_factor": 4096 / (2 * math.pi),
                }
            },
            ConfigMismatchError,
            "kind 'llama3' give no frequencies .a frequency is NaN",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"model: .*{message}"):
        _read({"model_type": "llama", **SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sliding_window_pattern": 0}, ConfigMismatchError, "sliding_window_pattern=0 is not a"),
        (
            {"layer_types": ["full_attention"]},
            ConfigMismatchError,
            "layer_types=.* does not name the kind of each of the 7 layers",
        ),
        (
            {"layer_types": ["linear_attention"] * 7},
            UnsupportedLayoutError,
            "layers of the kind 'linear_attention' are not known",
        ),
        (
            {"rope_parameters": {"full_attention": 5, "sliding_attention": {"rope_theta": 3.0}}},
            ConfigMismatchError,
            "rope_parameters.full_attention=5 is not a mapping",
        ),
    ],
)
def test_errors_of_layers(changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        _read({"model_type": "gemma3_text", **SIZES, **changes})


def test_gptj_without_a_stated_number_of_turned_coordinates() -> None:
    rotary = _read({"model_type": "gptj"})[0]
    assert (rotary.n_dims, rotary.pairing) == (64, "adjacent")
    with pytest.raises(ConfigMismatchError, match="turns 64 of the 16 coordinates"):
        _read({"model_type": "gptj"}, d_head=16)
