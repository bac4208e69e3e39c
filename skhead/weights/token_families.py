"""What stands at both ends of the stream of each architecture of the family table."""

from __future__ import annotations

from dataclasses import replace

from skhead.weights.token_layouts import NO_POSITIONS, Norm, Positions, Rope, Tokens

__all__ = [
    "ALBERT_TOKENS",
    "BERT_TOKENS",
    "BLOOM_TOKENS",
    "DISTILBERT_TOKENS",
    "FALCON_TOKENS",
    "GEMMA3_TOKENS",
    "GEMMA_TOKENS",
    "GPTJ_TOKENS",
    "GPT_TOKENS",
    "LLAMA_TOKENS",
    "MIXTRAL_TOKENS",
    "NEOX_TOKENS",
    "OPT_TOKENS",
    "PHI3_TOKENS",
    "PHI_TOKENS",
    "QUERY_KEY_NORM_TOKENS",
    "ROBERTA_TOKENS",
    "bart_tokens",
    "t5_tokens",
]

_ROTARY = Positions("rotary", ropes=(Rope(),))
_LAST_GPT_NORM = Norm("layernorm", "ln_f.weight")

GPT_TOKENS = Tokens(
    ("wte.weight",), Positions("learned", "wpe.weight"), final_norm=_LAST_GPT_NORM, tied=True
)
GPTJ_TOKENS = replace(
    GPT_TOKENS,
    positions=Positions(
        "rotary",
        ropes=(
            Rope(
                "adjacent", base=(), n_dims="rotary_dim", default_n_dims=64, scalings=("default",)
            ),
        ),
    ),
    tied=False,
)
NEOX_TOKENS = Tokens(
    ("embed_in.weight",),
    Positions(
        "rotary",
        ropes=(Rope(base=("rotary_emb_base",), share=("rotary_pct",), default_share=0.25),),
    ),
    final_norm=Norm("layernorm", "final_layer_norm.weight"),
    unembedding=("lm_head.weight", "embed_out.weight"),
)
OPT_TOKENS = Tokens(
    ("embed_tokens.weight",),
    Positions("learned", "embed_positions.weight", skip=2),
    final_norm=Norm("layernorm", "final_layer_norm.weight"),
    tied=True,
)
BLOOM_TOKENS = Tokens(
    ("word_embeddings.weight",),
    Positions("alibi"),
    final_norm=_LAST_GPT_NORM,
    tied=True,
    embedding_norm=Norm("layernorm", "word_embeddings_layernorm.weight"),
)
FALCON_TOKENS = Tokens(("word_embeddings.weight",), _ROTARY, final_norm=_LAST_GPT_NORM, tied=True)

LLAMA_TOKENS = Tokens(("embed_tokens.weight",), _ROTARY, final_norm=Norm("rmsnorm", "norm.weight"))
QUERY_KEY_NORM_TOKENS = replace(LLAMA_TOKENS, query_key_norm=True)
MIXTRAL_TOKENS = replace(
    LLAMA_TOKENS, positions=Positions("rotary", ropes=(Rope(default_base=1_000_000.0),))
)
PHI_TOKENS = replace(
    LLAMA_TOKENS,
    positions=Positions("rotary", ropes=(Rope(default_share=0.5),)),
    final_norm=Norm("layernorm", "final_layernorm.weight"),
)
PHI3_TOKENS = replace(
    LLAMA_TOKENS,
    positions=Positions(
        "rotary",
        ropes=(
            Rope(
                default_context=4096,
                scalings=("default", "longrope"),
                renamed={"su": "longrope", "yarn": "longrope"},
            ),
        ),
    ),
)
GEMMA_TOKENS = replace(
    LLAMA_TOKENS, final_norm=Norm("rmsnorm+1", "norm.weight"), tied=True, scaled=True
)
GEMMA3_TOKENS = replace(
    GEMMA_TOKENS,
    unembedding=("lm_head.weight", "language_model.lm_head.weight"),
    query_key_norm=True,
    positions=Positions(
        "rotary",
        ropes=(
            Rope(default_base=1_000_000.0, entry="full_attention"),
            Rope(base=("rope_local_base_freq",), entry="sliding_attention", legacy_scaling=False),
        ),
        pattern=("sliding_window_pattern", 6),
    ),
)


def _no_unembedding(head: str) -> str:
    return (
        f"the logits come after a dense layer, an activation and a norm ({head}), so that no inner "
        "product with the stream gives them"
    )


_BERT_POSITIONS = Positions("learned", "embeddings.position_embeddings.weight")
BERT_TOKENS = Tokens(
    ("embeddings.word_embeddings.weight",),
    _BERT_POSITIONS,
    embedding_norm=Norm("layernorm", "embeddings.LayerNorm.weight"),
    no_unembedding=_no_unembedding("cls.predictions.transform"),
)
ROBERTA_TOKENS = replace(
    BERT_TOKENS,
    positions=replace(_BERT_POSITIONS, skip_through=("pad_token_id", 1)),
    no_unembedding=_no_unembedding("lm_head"),
)
DISTILBERT_TOKENS = replace(BERT_TOKENS, no_unembedding=_no_unembedding("vocab_transform"))
ALBERT_TOKENS = replace(
    BERT_TOKENS,
    positions=replace(_BERT_POSITIONS, projected=True),
    no_unembedding=_no_unembedding("predictions.dense"),
    into="encoder.embedding_hidden_mapping_in.weight",
)

_TWO_STREAMS = (
    "queries of cross attention are at positions of the decoder, keys and values at positions of "
    "the encoder, and each has a table of its own"
)
_ENCODER_LOGITS = "an encoder's stream is read by the decoder, and not by an unembedding"


def t5_tokens(stack: str, part: str) -> Tokens:
    """Return what stands at the ends of a stack of T5, relative positions in self-attention."""
    return Tokens(
        ("shared.weight", f"{stack}.embed_tokens.weight"),
        NO_POSITIONS if part == "cross" else Positions("relative"),
        final_norm=Norm("rmsnorm", f"{stack}.final_layer_norm.weight"),
        tied=True,
        no_unembedding=_ENCODER_LOGITS if stack == "encoder" else None,
    )


def bart_tokens(stack: str, part: str) -> Tokens:
    """Return what stands at the ends of a stack of BART."""
    return Tokens(
        ("shared.weight", f"{stack}.embed_tokens.weight"),
        Positions(
            "learned",
            f"{stack}.embed_positions.weight",
            skip=2,
            absent=_TWO_STREAMS if part == "cross" else None,
        ),
        tied=True,
        embedding_norm=Norm("layernorm", f"{stack}.layernorm_embedding.weight"),
        no_unembedding=_ENCODER_LOGITS if stack == "encoder" else None,
    )
