"""Small models of every architecture, made by transformers' own classes with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

__all__ = ["ZOO", "Spec", "fresh_model"]


@dataclass(frozen=True)
class Spec:
    """A small model of one family, and where its modules are."""

    model: str
    config: str
    sizes: dict[str, Any]
    attention: str
    out: str
    norm: str = ""
    post_norm: str = ""
    norm_kind: str = "layernorm"
    heads: int = 4
    kv_heads: int = 4
    d_head: int = 6
    n_layers: int = 3
    part: str | None = None
    bridge: str = "blocks.{i}.attn"
    groups: tuple[int, ...] = ()


GPT = {"n_embd": 24, "n_layer": 3, "n_head": 4, "vocab_size": 11, "n_positions": 8}
PLAIN = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 11,
    "max_position_embeddings": 8,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "pad_token_id": 0}
WIDE = {**GROUPED, "head_dim": 8}
OPT = {**PLAIN, "ffn_dim": 32, "word_embed_proj_dim": 24}
FALCON = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 11}
T5 = {
    "d_model": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "d_kv": 8,
    "d_ff": 32,
    "vocab_size": 11,
}
BART = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 11,
    "max_position_embeddings": 8,
}
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _decoder(model: str, config: str, sizes: dict[str, Any], **changes: Any) -> Spec:
    root = changes.pop("root", "model.layers.{i}.")
    defaults = {
        "attention": f"{root}self_attn",
        "out": f"{root}self_attn.o_proj",
        "norm": f"{root}input_layernorm",
        "norm_kind": "rmsnorm",
        "kv_heads": 2,
        "d_head": sizes.get("head_dim", 6),
    }
    return Spec(model, config, sizes, **{**defaults, **changes})


def _falcon(kv_heads: int, norm: str = "input_layernorm", **switches: Any) -> Spec:
    layer = "transformer.h.{i}."
    return Spec(
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, **switches},
        f"{layer}self_attention",
        f"{layer}self_attention.dense",
        f"{layer}{norm}",
        kv_heads=kv_heads,
        bridge="" if switches.get("new_decoder_architecture") else "blocks.{i}.attn",
    )


def _bert(model: str, config: str, prefix: str) -> Spec:
    layer = f"{prefix}encoder.layer.{{i}}.attention."
    bridge = "blocks.{i}.attn" if model in ("BertForMaskedLM", "RobertaForMaskedLM") else ""
    return Spec(model, config, PLAIN, f"{layer}self", f"{layer}output.dense", bridge=bridge)


def _t5(part: str, stack: str, sublayer: int, name: str, **changes: Any) -> Spec:
    layer = f"{stack}.block.{{i}}.layer.{sublayer}."
    defaults: dict[str, Any] = {
        "model": "T5ForConditionalGeneration",
        "config": "T5Config",
        "d_head": 8,
        "n_layers": 2 if stack == "encoder" else 3,
        "bridge": {
            "encoder": "encoder_blocks.{i}.attn",
            "decoder": "decoder_blocks.{i}.self_attn",
        }.get(part, "decoder_blocks.{i}.cross_attn"),
    }
    return Spec(
        sizes=T5,
        attention=f"{layer}{name}",
        out=f"{layer}{name}.o",
        norm=f"{layer}layer_norm",
        norm_kind="rmsnorm",
        part=part,
        **{**defaults, **changes},
    )


def _bart(part: str, stack: str, name: str, model: str = "BartForConditionalGeneration") -> Spec:
    heads = 4 if stack == "encoder" else 6
    layer = f"model.{stack}.layers.{{i}}.{name}"
    return Spec(
        model,
        "BartConfig",
        BART,
        layer,
        f"{layer}.out_proj",
        heads=heads,
        kv_heads=heads,
        d_head=24 // heads,
        n_layers=2 if stack == "encoder" else 3,
        part=part,
        bridge="",
    )


ALBERT_LAYER = "albert.encoder.albert_layer_groups.{g}.albert_layers.0.attention"
GEMMA3_ROOT = "model.language_model.layers.{i}."
ZOO: dict[str, Spec] = {
    "gpt2": Spec(
        "GPT2LMHeadModel", "GPT2Config", GPT,
        "transformer.h.{i}.attn", "transformer.h.{i}.attn.c_proj", "transformer.h.{i}.ln_1",
    ),
    "gpt_neo": Spec(
        "GPTNeoForCausalLM", "GPTNeoConfig",
        {
            "hidden_size": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 11,
            "max_position_embeddings": 8, "attention_types": [[["global", "local"], 1]],
        },
        "transformer.h.{i}.attn.attention", "transformer.h.{i}.attn.attention.out_proj",
        "transformer.h.{i}.ln_1", n_layers=2,
    ),
    "gptj": Spec(
        "GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4},
        "transformer.h.{i}.attn", "transformer.h.{i}.attn.out_proj", "transformer.h.{i}.ln_1",
    ),
    "gpt_neox": Spec(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN,
        "gpt_neox.layers.{i}.attention", "gpt_neox.layers.{i}.attention.dense",
        "gpt_neox.layers.{i}.input_layernorm",
    ),
    "opt": Spec(
        "OPTForCausalLM", "OPTConfig", OPT,
        "model.decoder.layers.{i}.self_attn", "model.decoder.layers.{i}.self_attn.out_proj",
        "model.decoder.layers.{i}.self_attn_layer_norm",
    ),
    "opt-350m-like": Spec(
        "OPTForCausalLM", "OPTConfig",
        {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "model.decoder.layers.{i}.self_attn", "model.decoder.layers.{i}.self_attn.out_proj",
    ),
    "bloom": Spec(
        "BloomForCausalLM", "BloomConfig",
        {"hidden_size": 24, "n_layer": 3, "n_head": 4, "vocab_size": 11},
        "transformer.h.{i}.self_attention", "transformer.h.{i}.self_attention.dense",
        "transformer.h.{i}.input_layernorm",
    ),
    "bloom-residual-after-norm": Spec(
        "BloomForCausalLM", "BloomConfig",
        {
            "hidden_size": 24, "n_layer": 3, "n_head": 4, "vocab_size": 11,
            "apply_residual_connection_post_layernorm": True,
        },
        "transformer.h.{i}.self_attention", "transformer.h.{i}.self_attention.dense",
    ),
    "falcon-multi-query": _falcon(1, multi_query=True),
    "falcon-grouped": _falcon(2, "ln_attn", new_decoder_architecture=True, num_kv_heads=2),
    "falcon-grouped-one-norm": _falcon(
        2, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon-per-head": _falcon(
        4, multi_query=False, alibi=True, parallel_attn=False, bias=True
    ),
    "llama": _decoder("LlamaForCausalLM", "LlamaConfig", WIDE),
    "llama-base": _decoder("LlamaModel", "LlamaConfig", GROUPED, root="layers.{i}.", bridge=""),
    "mistral": _decoder("MistralForCausalLM", "MistralConfig", WIDE),
    "mixtral": _decoder("MixtralForCausalLM", "MixtralConfig", {**WIDE, "num_local_experts": 2}),
    "qwen2": _decoder("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": _decoder("Qwen3ForCausalLM", "Qwen3Config", WIDE),
    "gemma": _decoder("GemmaForCausalLM", "GemmaConfig", WIDE, norm_kind="rmsnorm+1"),
    "gemma2": _decoder(
        "Gemma2ForCausalLM", "Gemma2Config", WIDE, norm_kind="rmsnorm+1",
        post_norm="model.layers.{i}.post_attention_layernorm",
    ),
    "gemma3_text": _decoder(
        "Gemma3ForCausalLM", "Gemma3TextConfig", WIDE, norm_kind="rmsnorm+1",
        post_norm="model.layers.{i}.post_attention_layernorm",
    ),
    "gemma3": _decoder(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": WIDE, "vision_config": TINY_VISION}, norm_kind="rmsnorm+1",
        root=GEMMA3_ROOT, post_norm=f"{GEMMA3_ROOT}post_attention_layernorm", d_head=8,
    ),
    "phi": _decoder(
        "PhiForCausalLM", "PhiConfig", {**GROUPED, "partial_rotary_factor": 0.67},
        norm_kind="layernorm", out="model.layers.{i}.self_attn.dense",
    ),
    "phi3": _decoder("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "olmo2": _decoder(
        "Olmo2ForCausalLM", "Olmo2Config", GROUPED, norm="",
        post_norm="model.layers.{i}.post_attention_layernorm",
    ),
    "bert": _bert("BertForMaskedLM", "BertConfig", "bert."),
    "bert-base": _bert("BertModel", "BertConfig", ""),
    "roberta": _bert("RobertaForMaskedLM", "RobertaConfig", "roberta."),
    "xlm-roberta": _bert("XLMRobertaForMaskedLM", "XLMRobertaConfig", "roberta."),
    "camembert": _bert("CamembertForMaskedLM", "CamembertConfig", "roberta."),
    "distilbert": Spec(
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 32, "vocab_size": 11},
        "distilbert.transformer.layer.{i}.attention",
        "distilbert.transformer.layer.{i}.attention.out_lin", bridge="",
    ),
    "albert": Spec(
        "AlbertForMaskedLM", "AlbertConfig",
        {**PLAIN, "num_hidden_layers": 5, "num_hidden_groups": 2, "embedding_size": 16},
        ALBERT_LAYER, f"{ALBERT_LAYER}.dense", n_layers=5, groups=(0, 0, 0, 1, 1), bridge="",
    ),
    "t5-encoder": _t5("encoder", "encoder", 0, "SelfAttention"),
    "t5-decoder": _t5("decoder", "decoder", 0, "SelfAttention"),
    "t5-cross": _t5("cross", "decoder", 1, "EncDecAttention"),
    "t5-encoder-only": _t5(
        "encoder", "encoder", 0, "SelfAttention", model="T5EncoderModel", bridge=""
    ),
    "mt5-encoder": _t5(
        "encoder", "encoder", 0, "SelfAttention",
        model="MT5ForConditionalGeneration", config="MT5Config", bridge="",
    ),
    "bart-encoder": _bart("encoder", "encoder", "self_attn"),
    "bart-decoder": _bart("decoder", "decoder", "self_attn"),
    "bart-cross": _bart("cross", "decoder", "encoder_attn"),
}  # fmt: skip


def fresh_model(spec: Spec) -> Any:
    """Return the model with random weights, the same ones at every call."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, spec.config)(**spec.sizes)
    model = getattr(transformers, spec.model)(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model
