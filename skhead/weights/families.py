"""The architectures that skhead reads. To add one, add an entry here and a model to its tests."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from skhead.exceptions import ConfigMismatchError
from skhead.weights.layouts import (
    ROLES,
    Config,
    Family,
    Norm,
    Packing,
    Part,
    Projection,
    Storage,
)
from skhead.weights.token_families import (
    ALBERT_TOKENS,
    BERT_TOKENS,
    BLOOM_TOKENS,
    DISTILBERT_TOKENS,
    FALCON_TOKENS,
    GEMMA3_TOKENS,
    GEMMA_TOKENS,
    GPT_TOKENS,
    GPTJ_TOKENS,
    LLAMA_TOKENS,
    MIXTRAL_TOKENS,
    NEOX_TOKENS,
    OPT_TOKENS,
    PHI3_TOKENS,
    PHI_TOKENS,
    QUERY_KEY_NORM_TOKENS,
    ROBERTA_TOKENS,
    bart_tokens,
    t5_tokens,
)
from skhead.weights.token_layouts import Positions, Tokens

__all__ = ["FAMILIES"]

_MOST_USES_OF_SHARED_LAYERS = 10_000


def _separate(template: str, *names: str) -> tuple[Projection, ...]:
    """One linear tensor for each of Q, K, V and O, whose names take the place of the ``*``."""
    pairs = zip(ROLES, names, strict=True)
    return tuple(Projection(template.replace("*", name), role) for role, name in pairs)


def _fused(
    qkv: str, o: str, storage: Storage = "linear", grouped: bool = False
) -> tuple[Projection, ...]:
    """Q, K and V in one tensor, O in another."""
    packing: Packing = "grouped" if grouped else "concatenated"
    return (Projection(qkv, "QKV", storage, packing), Projection(o, "O", storage))


_LLAMA_PROJECTIONS = _separate(
    "layers.{i}.self_attn.*.weight", "q_proj", "k_proj", "v_proj", "o_proj"
)
_LLAMA_PART = Part(
    _LLAMA_PROJECTIONS,
    norm=Norm("rmsnorm", "layers.{i}.input_layernorm.weight"),
    tokens=LLAMA_TOKENS,
)
_GEMMA_NORM = Norm("rmsnorm+1", "layers.{i}.input_layernorm.weight")
_GEMMA_WRITER_NORM = Norm("rmsnorm+1", "layers.{i}.post_attention_layernorm.weight")


def _llama_like(name: str, *model_types: str, **changes: object) -> Family:
    family = Family(
        name,
        model_types or (name,),
        prefixes=("model.", ""),
        parts=(_LLAMA_PART,),
        d_model=("hidden_size",),
        kv_heads=("num_key_value_heads",),
        d_head=("head_dim",),
    )
    return replace(family, **changes)  # type: ignore[arg-type]


def _tokens_of(part: Part, **changes: Any) -> Tokens:
    return replace(part.tokens, **changes)


def _adapt_opt(config: Config, part: Part) -> Part:
    width = config.get("word_embed_proj_dim")
    if width is not None and width != config.get("hidden_size"):
        projections = {"into": "project_in.weight", "out_of": "project_out.weight"}
        part = replace(part, tokens=_tokens_of(part, **projections))
    before = config.get("do_layer_norm_before", True)
    if not before or config.get("_remove_final_layer_norm", False):
        part = replace(part, tokens=_tokens_of(part, final_norm=None))
    return part if before else replace(part, norm=None, stream_norm="layernorm")


def _adapt_bloom(config: Config, part: Part) -> Part:
    if not config.get("apply_residual_connection_post_layernorm", False):
        return part
    return replace(part, norm=None, stream_norm="layernorm")


def _adapt_falcon(config: Config, part: Part) -> Part:
    grouped = bool(config.get("new_decoder_architecture", False))
    norms = config.get("num_ln_in_parallel_attn")
    two_norms = norms == 2 or (norms is None and grouped)
    if config.get("alibi", False):
        part = replace(part, tokens=_tokens_of(part, positions=Positions("alibi")))
    if two_norms and config.get("parallel_attn", True):
        return replace(part, norm=Norm("layernorm", "h.{i}.ln_attn.weight"))
    return part


def _adapt_phi(config: Config, part: Part) -> Part:
    normed = bool(config.get("qk_layernorm", False))
    return replace(part, tokens=_tokens_of(part, query_key_norm=normed))


def _adapt_t5(config: Config, part: Part) -> Part:
    """Logits are scaled down unless the checkpoint says that its embedding is not tied."""
    untied = config.get("tie_word_embeddings", True) is False
    scaled = bool(config.get("scale_decoder_outputs", not untied))
    if part.name == "encoder" or config.get("model_type") != "t5":
        return part
    return replace(part, tokens=_tokens_of(part, logits_scaled=scaled))


def _adapt_bart(config: Config, part: Part) -> Part:
    return replace(part, tokens=_tokens_of(part, scaled=bool(config.get("scale_embedding", False))))


def _choose_falcon_kv(config: Config) -> int | tuple[str, ...]:
    if config.get("new_decoder_architecture", False):
        return ("num_kv_heads",)
    return 1 if config.get("multi_query", True) else ()


def _albert_places(config: Config, n_layers: int, label: str) -> Iterator[dict[str, int]]:
    counts = {key: config.get(key, 1) for key in ("num_hidden_groups", "inner_group_num")}
    for key, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigMismatchError(
                f"{label}: the configuration's {key}={reprlib.repr(value)} is not a positive "
                "integer."
            )
    groups, inner = counts.values()
    if groups > n_layers:
        raise ConfigMismatchError(
            f"{label}: the configuration's num_hidden_groups={reprlib.repr(groups)} is more than "
            f"its {n_layers} layers."
        )
    if n_layers * inner > _MOST_USES_OF_SHARED_LAYERS:
        raise ConfigMismatchError(
            f"{label}: the configuration's num_hidden_layers={n_layers} times "
            f"inner_group_num={reprlib.repr(inner)} is more than the "
            f"{_MOST_USES_OF_SHARED_LAYERS} uses of shared layers that skhead reads, and the "
            "tensors cannot tell whether it is true. Correct config.json."
        )
    return (
        {"g": int(layer / (n_layers / groups)), "i": step}
        for layer in range(n_layers)
        for step in range(inner)
    )


_GPT_LAYERS = ("n_layer", "num_hidden_layers")
_GPT_HEADS = ("n_head", "num_attention_heads")


def _bert_part(tokens: Tokens) -> Part:
    return Part(
        _separate(
            "encoder.layer.{i}.attention.*.weight",
            "self.query",
            "self.key",
            "self.value",
            "output.dense",
        ),
        stream_norm="layernorm",
        tokens=tokens,
    )


_T5_NAMES = ("q", "k", "v", "o")
_BART_NAMES = ("q_proj", "k_proj", "v_proj", "out_proj")


def _t5_part(name: str, stack: str, sublayer: int, attention: str, layers: str) -> Part:
    block = f"{stack}.block.{{i}}.layer.{sublayer}."
    return Part(
        _separate(f"{block}{attention}.*.weight", *_T5_NAMES),
        n_layers=(layers,),
        n_heads=("num_heads",),
        norm=Norm("rmsnorm", f"{block}layer_norm.weight"),
        memory_norm=Norm("rmsnorm", "encoder.final_layer_norm.weight") if name == "cross" else None,
        name=name,
        tokens=t5_tokens(stack, name),
    )


def _bart_part(name: str, stack: str, attention: str) -> Part:
    return Part(
        _separate(f"{stack}.layers.{{i}}.{attention}.*.weight", *_BART_NAMES),
        n_layers=(f"{stack}_layers",),
        n_heads=(f"{stack}_attention_heads",),
        stream_norm="layernorm",
        name=name,
        tokens=bart_tokens(stack, name),
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        "gpt2",
        ("gpt2",),
        prefixes=("", "transformer."),
        parts=(
            Part(
                _fused("h.{i}.attn.c_attn.weight", "h.{i}.attn.c_proj.weight", "conv1d"),
                n_layers=_GPT_LAYERS,
                n_heads=_GPT_HEADS,
                norm=Norm("layernorm", "h.{i}.ln_1.weight"),
                tokens=GPT_TOKENS,
            ),
        ),
        d_model=("n_embd", "hidden_size"),
    ),
    Family(
        "gpt_neo",
        ("gpt_neo",),
        prefixes=("transformer.", ""),
        parts=(
            Part(
                _separate("h.{i}.attn.attention.*.weight", *_BART_NAMES),
                n_layers=("num_layers", "num_hidden_layers"),
                n_heads=("num_heads", "num_attention_heads"),
                norm=Norm("layernorm", "h.{i}.ln_1.weight"),
                tokens=GPT_TOKENS,
            ),
        ),
        d_model=("hidden_size",),
    ),
    Family(
        "gptj",
        ("gptj",),
        prefixes=("transformer.", ""),
        parts=(
            Part(
                _separate("h.{i}.attn.*.weight", *_BART_NAMES),
                n_layers=_GPT_LAYERS,
                n_heads=_GPT_HEADS,
                norm=Norm("layernorm", "h.{i}.ln_1.weight"),
                tokens=GPTJ_TOKENS,
            ),
        ),
        d_model=("n_embd", "hidden_size"),
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        prefixes=("gpt_neox.", ""),
        parts=(
            Part(
                _fused(
                    "layers.{i}.attention.query_key_value.weight",
                    "layers.{i}.attention.dense.weight",
                    grouped=True,
                ),
                norm=Norm("layernorm", "layers.{i}.input_layernorm.weight"),
                tokens=NEOX_TOKENS,
            ),
        ),
        d_model=("hidden_size",),
    ),
    Family(
        "opt",
        ("opt",),
        prefixes=("model.decoder.", "decoder.", ""),
        parts=(
            Part(
                _separate("layers.{i}.self_attn.*.weight", *_BART_NAMES),
                norm=Norm("layernorm", "layers.{i}.self_attn_layer_norm.weight"),
                tokens=OPT_TOKENS,
            ),
        ),
        d_model=("hidden_size",),
        adapt=_adapt_opt,
    ),
    Family(
        "bloom",
        ("bloom",),
        prefixes=("", "transformer."),
        parts=(
            Part(
                _fused(
                    "h.{i}.self_attention.query_key_value.weight",
                    "h.{i}.self_attention.dense.weight",
                    grouped=True,
                ),
                n_layers=_GPT_LAYERS,
                n_heads=_GPT_HEADS,
                norm=Norm("layernorm", "h.{i}.input_layernorm.weight"),
                tokens=BLOOM_TOKENS,
            ),
        ),
        d_model=("hidden_size", "n_embed"),
        adapt=_adapt_bloom,
    ),
    Family(
        "falcon",
        ("falcon",),
        prefixes=("transformer.", ""),
        parts=(
            Part(
                _fused(
                    "h.{i}.self_attention.query_key_value.weight",
                    "h.{i}.self_attention.dense.weight",
                    grouped=True,
                ),
                n_layers=_GPT_LAYERS,
                n_heads=_GPT_HEADS,
                norm=Norm("layernorm", "h.{i}.input_layernorm.weight"),
                tokens=FALCON_TOKENS,
            ),
        ),
        d_model=("hidden_size",),
        adapt=_adapt_falcon,
        choose_kv=_choose_falcon_kv,
    ),
    _llama_like("llama"),
    _llama_like("mistral"),
    _llama_like(
        "mixtral",
        parts=(replace(_LLAMA_PART, tokens=MIXTRAL_TOKENS),),
    ),
    _llama_like("qwen2"),
    _llama_like(
        "qwen3",
        parts=(replace(_LLAMA_PART, tokens=QUERY_KEY_NORM_TOKENS),),
        defaults={"head_dim": 128},
    ),
    _llama_like(
        "gemma",
        parts=(replace(_LLAMA_PART, norm=_GEMMA_NORM, tokens=GEMMA_TOKENS),),
        defaults={"head_dim": 256},
    ),
    _llama_like(
        "gemma2",
        parts=(
            replace(
                _LLAMA_PART,
                norm=_GEMMA_NORM,
                writer_norm=_GEMMA_WRITER_NORM,
                tokens=GEMMA_TOKENS,
            ),
        ),
        defaults={"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    ),
    _llama_like(
        "gemma3",
        "gemma3",
        "gemma3_text",
        prefixes=("language_model.model.", "model.language_model.", "model.", ""),
        parts=(
            replace(
                _LLAMA_PART,
                norm=_GEMMA_NORM,
                writer_norm=_GEMMA_WRITER_NORM,
                tokens=GEMMA3_TOKENS,
            ),
        ),
        defaults={"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
        nested="text_config",
    ),
    _llama_like(
        "phi",
        parts=(
            replace(
                _LLAMA_PART,
                projections=_separate(
                    "layers.{i}.self_attn.*.weight", "q_proj", "k_proj", "v_proj", "dense"
                ),
                norm=Norm("layernorm", "layers.{i}.input_layernorm.weight"),
                tokens=PHI_TOKENS,
            ),
        ),
        adapt=_adapt_phi,
    ),
    _llama_like(
        "phi3",
        parts=(
            replace(
                _LLAMA_PART,
                projections=_fused(
                    "layers.{i}.self_attn.qkv_proj.weight", "layers.{i}.self_attn.o_proj.weight"
                ),
                tokens=PHI3_TOKENS,
            ),
        ),
    ),
    _llama_like(
        "olmo2",
        parts=(
            replace(
                _LLAMA_PART,
                norm=None,
                writer_norm=Norm("rmsnorm", "layers.{i}.post_attention_layernorm.weight"),
                tokens=QUERY_KEY_NORM_TOKENS,
            ),
        ),
    ),
    Family(
        "bert",
        ("bert",),
        prefixes=("bert.", ""),
        parts=(_bert_part(BERT_TOKENS),),
        d_model=("hidden_size",),
    ),
    Family(
        "roberta",
        ("roberta", "xlm-roberta", "camembert"),
        prefixes=("roberta.", ""),
        parts=(_bert_part(ROBERTA_TOKENS),),
        d_model=("hidden_size",),
    ),
    Family(
        "distilbert",
        ("distilbert",),
        prefixes=("distilbert.", ""),
        parts=(
            Part(
                _separate(
                    "transformer.layer.{i}.attention.*.weight", "q_lin", "k_lin", "v_lin", "out_lin"
                ),
                n_layers=("n_layers", "num_hidden_layers"),
                n_heads=("n_heads", "num_attention_heads"),
                stream_norm="layernorm",
                tokens=DISTILBERT_TOKENS,
            ),
        ),
        d_model=("dim", "hidden_size"),
    ),
    Family(
        "albert",
        ("albert",),
        prefixes=("albert.", ""),
        parts=(
            Part(
                _separate(
                    "encoder.albert_layer_groups.{g}.albert_layers.{i}.attention.*.weight",
                    "query",
                    "key",
                    "value",
                    "dense",
                ),
                stream_norm="layernorm",
                tokens=ALBERT_TOKENS,
            ),
        ),
        d_model=("hidden_size",),
        places=_albert_places,
    ),
    Family(
        "t5",
        ("t5", "mt5"),
        prefixes=("", "transformer."),
        parts=(
            _t5_part("encoder", "encoder", 0, "SelfAttention", "num_layers"),
            _t5_part("decoder", "decoder", 0, "SelfAttention", "num_decoder_layers"),
            _t5_part("cross", "decoder", 1, "EncDecAttention", "num_decoder_layers"),
        ),
        d_model=("d_model", "hidden_size"),
        d_head=("d_kv",),
        defaults={"num_decoder_layers": "num_layers", "d_kv": 64},
        adapt=_adapt_t5,
    ),
    Family(
        "bart",
        ("bart",),
        prefixes=("model.", ""),
        parts=(
            _bart_part("encoder", "encoder", "self_attn"),
            _bart_part("decoder", "decoder", "self_attn"),
            _bart_part("cross", "decoder", "encoder_attn"),
        ),
        d_model=("d_model", "hidden_size"),
        adapt=_adapt_bart,
    ),
)
