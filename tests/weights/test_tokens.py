"""Tokens and positions of every family against the streams and logits of the models themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from architectures import ZOO, Spec, fresh_model
from safetensors.torch import load_file, save_file

import skhead
from skhead.exceptions import UnsupportedLayoutError
from skhead.linalg.rotary import rotate
from skhead.weights.families import FAMILIES
from skhead.weights.tokens import TABLES, TokenSpace, read_token_space

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

N_TOKENS, LENGTH, PADDING = 11, 5, 1
EMBEDDING_NORMS = ("word_embeddings_layernorm", "embeddings.LayerNorm", "layernorm_embedding")
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FINAL_NORMS = {
    "gpt2": "transformer.ln_f", "gpt_neo": "transformer.ln_f", "gptj": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm", "opt": "model.decoder.final_layer_norm",
    "opt-350m-like": "model.decoder.layers.2.final_layer_norm",
    "bloom": "transformer.ln_f", "bloom-residual-after-norm": "transformer.ln_f",
    "falcon-multi-query": "transformer.ln_f", "falcon-grouped": "transformer.ln_f",
    "falcon-grouped-one-norm": "transformer.ln_f", "falcon-per-head": "transformer.ln_f",
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3",
         "olmo2"), "model.norm"
    ),
    "gemma3": "model.language_model.norm", "phi": "model.final_layernorm",
    "t5-decoder": "decoder.final_layer_norm", "t5-cross": "decoder.final_layer_norm",
    "bart-decoder": "model.decoder.layers.2.final_layer_norm",
    "bart-cross": "model.decoder.layers.2.final_layer_norm",
}  # fmt: skip
LAYER_NORMED = ("opt-350m-like", "bloom-residual-after-norm", "bart-decoder", "bart-cross")
FOLDABLE = [name for name in FINAL_NORMS if name not in LAYER_NORMED]
LEARNED = [
    name for name, spec in ZOO.items()
    if name.startswith(("gpt2", "gpt_neo", "opt", "bert", "distilbert", "albert"))
    or "oberta" in name or name == "camembert"
    or (name.startswith("bart") and spec.part != "cross")
]  # fmt: skip
LEARNED.remove("gpt_neox")
ROTARY = {
    "gptj": (4, "adjacent"), "gpt_neox": (2, "half"), "phi": (4, "half"),
    **dict.fromkeys(
        ("falcon-multi-query", "falcon-grouped", "falcon-grouped-one-norm", "llama-base", "qwen2",
         "phi3", "olmo2"), (6, "half")
    ),
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"),
        (8, "half")
    ),
}  # fmt: skip
OTHER_POSITIONS = {
    "alibi": ("bloom", "bloom-residual-after-norm", "falcon-per-head"),
    "relative": ("t5-encoder", "t5-decoder", "t5-encoder-only", "mt5-encoder"),
    "none": ("t5-cross",),
}


def _address(path: object, spec: Spec) -> str:
    return str(path) + (f"#{spec.part}" if spec.part else "")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def make(name: str) -> tuple[Any, str]:
        model = fresh_model(ZOO[name])
        path = tmp_path_factory.mktemp(name)
        model.save_pretrained(path)
        return model, _address(path, ZOO[name])

    return make


def _streams(spec: Spec, ids: torch.Tensor) -> torch.Tensor:
    """What tokens put on the stream, up to one vector for all, no norm behind the embedding."""
    model = fresh_model(spec)
    for path, _ in list(model.named_modules()):
        if path.endswith(EMBEDDING_NORMS):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, torch.nn.Identity())
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder and spec.model != "T5EncoderModel":
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    if "decoder_input_ids" not in inputs:
        return output.hidden_states[0]
    stack = "encoder" if spec.part == "encoder" else "decoder"
    return getattr(output, f"{stack}_hidden_states")[0]


def _differences(rows: torch.Tensor) -> torch.Tensor:
    return rows[1:] - rows[0]


@pytest.mark.parametrize("name", ZOO)
def test_embedding_is_what_tokens_put_on_the_stream(name: str, saved: Any) -> None:
    space = read_token_space(saved(name)[1])
    ids = torch.tensor([token for token in range(N_TOKENS) if token != PADDING])
    stream = _streams(ZOO[name], ids[:, None])[:, 0]
    assert space.embedding.shape == (N_TOKENS, 24) and space.embedding.dtype == torch.float32
    torch.testing.assert_close(_differences(space.embedding[ids]), _differences(stream))


@pytest.mark.parametrize("name", LEARNED)
def test_positions_are_what_places_put_on_the_stream(name: str, saved: Any) -> None:
    space = read_token_space(saved(name)[1])
    stream = _streams(ZOO[name], torch.full((1, LENGTH), 3))[0]
    assert space.position_kind == "learned" and space.rotary is None
    torch.testing.assert_close(_differences(space.positions[:LENGTH]), _differences(stream))
    stated = {"roberta": 6, "xlm-roberta": 6, "camembert": 6, "distilbert": 512}
    assert len(space.positions) == stated.get(name, 8)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in OTHER_POSITIONS.items() for name in names]
)
def test_other_kinds_of_positions(kind: str, name: str, saved: Any) -> None:
    space = read_token_space(saved(name)[1])
    assert (space.position_kind, space.positions, space.rotary) == (kind, None, None)
    assert "positions" not in space.missing
    with pytest.raises(UnsupportedLayoutError, match=f"no rotary positions to read.*are {kind}"):
        space.rotary_at(0)


def test_every_architecture_has_its_positions_tested() -> None:
    listed = {*LEARNED, *ROTARY, *(n for names in OTHER_POSITIONS.values() for n in names)}
    assert listed == set(ZOO) - {"bart-cross"}
    assert all(part.tokens.embedding for family in FAMILIES for part in family.parts)


def test_cross_attention_has_two_tables_of_positions(saved: Any) -> None:
    space = read_token_space(saved("bart-cross")[1])
    assert space.positions is None
    assert "each has a table of its own" in space.missing["positions"]


def _logits(model: Any, norm: str, x: torch.Tensor) -> torch.Tensor:
    """The model's logits where `x` is handed to its unembedding, less those of zero."""
    if hasattr(model.config, "final_logit_softcapping"):
        model.config.final_logit_softcapping = None
    states = torch.cat([x, torch.zeros_like(x[:1])]).unsqueeze(1)
    model.get_submodule(norm).register_forward_hook(lambda *_: states)
    ids = torch.full((len(states), 1), 3)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        logits = model(**inputs).logits[:, 0]
    return logits[:-1] - logits[-1]


@pytest.mark.parametrize("name", FINAL_NORMS)
def test_unembedding_reads_the_logits(name: str, saved: Any) -> None:
    space = read_token_space(saved(name)[1])
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(5))
    assert space.unembedding.shape == (N_TOKENS, 24)
    logits = _logits(fresh_model(ZOO[name]), FINAL_NORMS[name], x)
    torch.testing.assert_close(x @ space.unembedding.T, logits, atol=1e-5, rtol=1e-5)
    assert space.tied == bool(saved(name)[0].config.tie_word_embeddings)


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_the_final_norm(name: str, saved: Any) -> None:
    model, source = saved(name)
    norm = model.get_submodule(FINAL_NORMS[name])
    raw, folded = read_token_space(source), read_token_space(source, fold_norm=True)
    x = 1000 * torch.randn(7, 24, generator=torch.Generator().manual_seed(6))
    bias = getattr(norm, "bias", torch.zeros(24))
    unit = x - x.mean(-1, keepdim=True) if raw.final_norm == "layernorm" else x
    unit = unit / unit.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        logits = (norm(x) - bias) @ raw.unembedding.T
    torch.testing.assert_close(unit @ folded.unembedding.T, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(raw.final_gain, norm.weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(folded.final_gain, raw.final_gain, rtol=0, atol=0)
    gain = 1.0
    if name == "bloom":
        gain = model.transformer.word_embeddings_layernorm.weight.detach()
    torch.testing.assert_close(folded.embedding, raw.embedding * gain)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in FINAL_NORMS])
def test_streams_without_an_unembedding(name: str, saved: Any) -> None:
    space = read_token_space(saved(name)[1])
    assert space.unembedding is None and not space.tied
    reason = {"llama-base": "no tensor 'lm_head.weight' in "}.get(
        name, "read by the decoder" if ZOO[name].part else "a dense layer, an activation and a norm"
    )
    assert reason in space.missing["unembedding"]


@pytest.mark.parametrize("name", [name for name in ZOO if name not in FOLDABLE])
def test_nothing_is_folded_where_the_stream_is_normalised(name: str, saved: Any) -> None:
    if name.startswith(("llama", "t5", "mt5")):
        read_token_space(saved(name)[1], fold_norm=True)
        return
    with pytest.raises(UnsupportedLayoutError, match="normalises the residual stream itself"):
        read_token_space(saved(name)[1], fold_norm=True)


@pytest.mark.parametrize("name", ["gpt2", "gemma", "albert", "opt-350m-like"])
def test_centring(name: str, saved: Any) -> None:
    raw, centred = (read_token_space(saved(name)[1], center=on) for on in (False, True))
    for table in TABLES:
        rows = getattr(raw, table)
        if rows is None:
            assert getattr(centred, table) is None
            continue
        expected = rows - rows.mean(1, keepdim=True)
        torch.testing.assert_close(getattr(centred, table), expected)


def _equal(one: TokenSpace, other: TokenSpace) -> None:
    for table in (*TABLES, "final_gain"):
        a, b = getattr(one, table), getattr(other, table)
        assert (a is None) == (b is None), table
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    for fact in ("position_kind", "query_key_norm", "final_norm", "tied", "embedding_norm"):
        assert getattr(one, fact) == getattr(other, fact), fact
    assert set(one.missing) == set(other.missing)
    rotaries = [[*s.layer_rotaries, *filter(None, [s.rotary])] for s in (one, other)]
    for a, b in zip(*rotaries, strict=True):
        assert torch.equal(a.frequencies, b.frequencies)
        assert (a.n_dims, a.pairing, a.scaling) == (b.n_dims, b.pairing, b.scaling)


@pytest.mark.parametrize("name", ZOO)
def test_live_model_equals_its_directory(name: str, saved: Any) -> None:
    model, source = saved(name)
    skhead.register_model(model, "live-zoo")
    try:
        _equal(read_token_space(_address("live-zoo", ZOO[name])), read_token_space(source))
    finally:
        skhead.unregister_model("live-zoo")


@pytest.mark.parametrize("name", [n for n, spec in ZOO.items() if spec.bridge and not spec.part])
def test_bridge_equals_the_directory(name: str, saved: Any) -> None:
    builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    spec, model = ZOO[name], fresh_model(ZOO[name])
    bridge = builder.build_bridge_from_module(model, spec.model, hf_config=model.config)
    skhead.register_model(bridge, "bridged-zoo")
    try:
        space = read_token_space("bridged-zoo")
    finally:
        skhead.unregister_model("bridged-zoo")
    if name == "opt-350m-like":
        assert space.embedding is None and space.unembedding is None
        assert "no tensor 'project_in.weight' in live model" in space.missing["embedding"]
        return
    _equal(space, read_token_space(saved(name)[1]))


def _rotary_spec(name: str) -> Spec:
    spec = ZOO[name]
    if name == "gemma3":
        text = {**spec.sizes["text_config"], "layer_types": MIXED}
        return replace(spec, sizes={**spec.sizes, "text_config": text})
    if name == "gemma3_text":
        return replace(spec, sizes={**spec.sizes, "layer_types": MIXED})
    return spec


class _Recorder:
    """Queries and keys of a model as they meet in attention, and what its attention reads."""

    def __init__(self, model: Any, spec: Spec, patch: pytest.MonkeyPatch) -> None:
        self.model, self.spec = model, spec
        self.inputs: list[torch.Tensor] = []
        self.queries: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
        for layer in range(spec.n_layers):
            attention = model.get_submodule(spec.attention.format(i=layer))
            attention.register_forward_pre_hook(self._read, with_kwargs=True)
            for norm in ("q_norm", "k_norm"):
                if hasattr(attention, norm):
                    setattr(attention, norm, torch.nn.Identity())
        # Older GPT-J models attend by a method of their own, newer ones by the interface of all.
        own = [module for module in model.modules() if hasattr(module, "_attn")]
        for attention in own:
            self._wrap_gptj(attention)
        if spec.config == "FalconConfig":
            self._wrap_falcon(patch)
        elif not own:
            transformers.AttentionInterface.register("skhead_rotary", self._attend)
            for module in model.modules():
                if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
                    module.config._attn_implementation_internal = "skhead_rotary"

    def _read(self, _: Any, args: Any, kwargs: Any) -> None:
        self.inputs.append((args[0] if args else kwargs["hidden_states"])[0])

    def _keep(self, query: torch.Tensor, key: torch.Tensor) -> None:
        self.queries.append(query[0])
        self.keys.append(key[0])

    def _attend(
        self,
        _: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *__: Any,
        **___: Any,
    ) -> tuple[torch.Tensor, None]:
        self._keep(query, key)
        return torch.zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    def _wrap_gptj(self, attention: Any) -> None:
        attend = attention._attn

        def wrapped(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> Any:
            self._keep(query, key)
            return attend(query, key, *rest)

        attention._attn = wrapped

    def _wrap_falcon(self, patch: pytest.MonkeyPatch) -> None:
        module = transformers.models.falcon.modeling_falcon
        turn = module.apply_rotary_pos_emb

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            query, key = turn(*args, **kwargs)
            self._keep(query, key)
            return query, key

        patch.setattr(module, "apply_rotary_pos_emb", wrapped)

    def run(self) -> None:
        with torch.no_grad():
            self.model(input_ids=torch.tensor([[3, 5, 2, 7, 4]]))


def _check_rotation(spec: Spec, path: Any, patch: pytest.MonkeyPatch) -> TokenSpace:
    model = fresh_model(spec)
    model.save_pretrained(path)
    heads, space = skhead.load_heads(path), read_token_space(str(path))
    recorder = _Recorder(model, spec, patch)
    recorder.run()
    for layer in range(spec.n_layers):
        rows = heads[heads["layer"] == layer]
        rotary = space.rotary_at(layer)
        for role, states in (("Q", recorder.queries[layer]), ("K", recorder.keys[layer])):
            stack = torch.from_numpy(skhead.load_weights(rows, role))
            if states.shape[0] != len(rows):
                states = states.repeat_interleave(len(rows) // states.shape[0], dim=0)
            for place, x in enumerate(recorder.inputs[layer]):
                turned = rotate(stack, place, rotary.frequencies, rotary.n_dims, rotary.pairing)
                turned[..., : rotary.n_dims] *= rotary.scaling
                torch.testing.assert_close((x @ turned), states[:, place], atol=2e-5, rtol=2e-5)
    return space


@pytest.mark.parametrize("name", ROTARY)
def test_rotation_equals_the_models_own(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = _check_rotation(_rotary_spec(name), tmp_path, monkeypatch)
    assert (space.position_kind, space.positions) == ("rotary", None)
    rotary = space.rotary_at(1)
    assert (rotary.n_dims, rotary.pairing) == ROTARY[name]
    assert rotary.frequencies.dtype == torch.float64
    assert space.query_key_norm == (name in ("qwen3", "gemma3", "gemma3_text", "olmo2"))
    if name.startswith("gemma3"):
        assert space.rotary is None
        assert space.layer_rotaries[0].frequencies[1] == pytest.approx(10_000**-0.25)
        assert space.layer_rotaries[1].frequencies[1] == pytest.approx(1_000_000**-0.25)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "factor": 4.0,
            "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)  # fmt: skip
def test_rotation_with_scaling_equals_the_models_own(
    scaling: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ZOO["llama"]
    sizes = {
        **spec.sizes,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_theta": 500.0, **scaling},
    }
    space = _check_rotation(replace(spec, sizes=sizes), tmp_path, monkeypatch)
    assert (space.rotary.scaling > 1) == (scaling["rope_type"] in ("yarn", "longrope"))


def test_norm_on_queries_and_keys_of_phi(tmp_path: Any) -> None:
    for normed in (True, False):
        spec = replace(ZOO["phi"], sizes={**ZOO["phi"].sizes, "qk_layernorm": normed})
        fresh_model(spec).save_pretrained(tmp_path / str(normed))
        assert read_token_space(str(tmp_path / str(normed))).query_key_norm is normed


def test_scaled_embedding_of_bart(tmp_path: Any) -> None:
    spec = replace(
        ZOO["bart-decoder"], sizes={**ZOO["bart-decoder"].sizes, "scale_embedding": True}
    )
    fresh_model(spec).save_pretrained(tmp_path)
    space = read_token_space(_address(tmp_path, spec))
    stream = _streams(spec, torch.arange(2, N_TOKENS)[:, None])[:, 0]
    torch.testing.assert_close(_differences(space.embedding[2:]), _differences(stream))
    torch.testing.assert_close(space.embedding, space.unembedding * 24**0.5)


def test_logits_of_t5_that_are_not_scaled(tmp_path: Any) -> None:
    spec = replace(
        ZOO["t5-decoder"], sizes={**ZOO["t5-decoder"].sizes, "tie_word_embeddings": False}
    )
    model = fresh_model(spec)
    model.save_pretrained(tmp_path)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(7))
    logits = _logits(model, FINAL_NORMS["t5-decoder"], x)
    space = read_token_space(_address(tmp_path, spec))
    torch.testing.assert_close(x @ space.unembedding.T, logits, atol=1e-5, rtol=1e-5)


def test_old_configuration_of_untied_t5(tmp_path: Any) -> None:
    spec, path = ZOO["t5-decoder"], tmp_path / "model.safetensors"
    fresh_model(spec).save_pretrained(tmp_path)
    head = torch.randn(N_TOKENS, 24, generator=torch.Generator().manual_seed(8))
    save_file({**load_file(path), "lm_head.weight": head}, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(9))
    space = read_token_space(_address(tmp_path, spec))
    assert not space.tied and torch.equal(space.unembedding, head)
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    logits = _logits(loaded, FINAL_NORMS["t5-decoder"], x)
    torch.testing.assert_close(x @ space.unembedding.T, logits, atol=1e-5, rtol=1e-5)


def test_opt_without_its_final_norm(tmp_path: Any) -> None:
    sizes = {**ZOO["opt"].sizes, "_remove_final_layer_norm": True}
    spec = replace(ZOO["opt"], sizes=sizes)
    model = fresh_model(spec)
    assert model.model.decoder.final_layer_norm is None
    model.save_pretrained(tmp_path)
    space = read_token_space(str(tmp_path), fold_norm=True)
    assert (space.final_norm, space.final_gain, space.missing) == ("none", None, {})
    assert space.unembedding is space.embedding
