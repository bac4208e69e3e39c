"""Tokens and positions of files: TransformerLens' names, ties, what is missing, and bad input."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from skhead.exceptions import (
    CheckpointError,
    ConfigMismatchError,
    DegenerateHeadError,
    SourceNotFoundError,
    UnsupportedLayoutError,
)
from skhead.linalg.rotary import rotate
from skhead.weights.readers import SafetensorsReader
from skhead.weights.tokens import read_token_space

D_MODEL, D_HEAD, N_TOKENS = 24, 8, 11
NATIVE = {
    "architecture": "TransformerLensNative", "n_layers": 2, "n_heads": 4, "n_key_value_heads": 2,
    "d_model": D_MODEL, "d_head": D_HEAD, "n_ctx": 16, "d_vocab": N_TOKENS, "d_mlp": None,
    "act_fn": "gelu", "gated_mlp": False, "attn_only": True, "normalization_type": "RMS",
    "eps": 1e-5, "positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_base": 500.0,
}  # fmt: skip


def _table(rows: int, seed: int = 7, width: int = D_MODEL) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ends() -> dict[str, torch.Tensor]:
    """Both ends of a stream under TransformerLens' names."""
    return {
        "embed.W_E": _table(N_TOKENS, 1),
        "unembed.W_U": _table(N_TOKENS, 2).T.contiguous(),
        "pos_embed.W_pos": _table(16, 3),
        "ln_final.w": _table(1, 4)[0],
        "ln_final.b": _table(1, 5)[0],
    }


def test_names_of_transformer_lens(lens_tensors, ends, write_model):
    space = read_token_space(str(write_model({**lens_tensors, **ends}, None)))
    assert torch.equal(space.embedding, ends["embed.W_E"])
    assert torch.equal(space.unembedding, ends["unembed.W_U"].T)
    assert space.unembedding.is_contiguous()
    assert torch.equal(space.positions, ends["pos_embed.W_pos"])
    assert torch.equal(space.final_gain, ends["ln_final.w"])
    assert (space.position_kind, space.final_norm) == ("learned", "layernorm")
    assert (space.tied, space.query_key_norm, space.missing) == (False, False, {})
    assert (space.embedding_norm, space.rotary, space.layer_rotaries) == ("none", None, ())


def test_folding_and_centring_under_lens_names(lens_tensors, ends, write_model):
    path = str(write_model({**lens_tensors, **ends}, None))
    space = read_token_space(path, fold_norm=True, center=True)
    folded = ends["unembed.W_U"].T * ends["ln_final.w"]
    torch.testing.assert_close(space.unembedding, folded - folded.mean(1, keepdim=True))
    raw = ends["embed.W_E"]
    torch.testing.assert_close(space.embedding, raw - raw.mean(1, keepdim=True))
    assert torch.equal(load_file(Path(path) / "model.safetensors")["embed.W_E"], raw)


def test_names_that_tell_the_norms(lens_tensors, ends, write_model):
    del ends["ln_final.b"]
    extra = {"blocks.0.attn.q_norm.w": torch.ones(D_HEAD)}
    space = read_token_space(str(write_model({**lens_tensors, **ends, **extra}, None)))
    assert (space.final_norm, space.query_key_norm) == ("rmsnorm", True)


def test_attention_alone(lens_tensors, write_model):
    path = str(write_model(lens_tensors, None))
    space = read_token_space(path)
    assert space.embedding is None and space.unembedding is None and space.positions is None
    assert (space.position_kind, space.final_norm) == ("unknown", "unknown")
    file = f"in {path}/model.safetensors"
    assert space.missing == {
        "embedding": f"there is no tensor 'embed.W_E' {file}",
        "unembedding": f"there is no tensor 'unembed.W_U' {file}",
        "positions": "neither a tensor nor a configuration says how "
        f"{path}/model.safetensors knows positions",
        "final_gain": f"there is no tensor 'ln_final.w' {file}: it has no final norm, or its gain "
        "was folded before it was saved",
    }
    read_token_space(path, fold_norm=True)


def test_folding_nothing_warns(lens_tensors, ends, write_model):
    del ends["ln_final.w"]
    path = str(write_model({**lens_tensors, **ends}, None))
    with pytest.warns(UserWarning, match="nothing was folded into the unembedding, because there"):
        space = read_token_space(path, fold_norm=True)
    assert torch.equal(space.unembedding, ends["unembed.W_U"].T)


@pytest.mark.parametrize("rotary_dim", [4, None])
def test_native_configuration(rotary_dim, lens_tensors, ends, write_model):
    del ends["pos_embed.W_pos"], ends["ln_final.b"]
    config = {**NATIVE, "rotary_dim": rotary_dim}
    space = read_token_space(str(write_model({**lens_tensors, **ends}, config)))
    assert (space.position_kind, space.positions, space.final_norm) == ("rotary", None, "rmsnorm")
    n_dims = rotary_dim or D_HEAD
    assert (space.rotary.n_dims, space.rotary.pairing) == (n_dims, "adjacent")
    powers = torch.arange(n_dims // 2, dtype=torch.float64) * 2 / n_dims
    torch.testing.assert_close(space.rotary.frequencies, 500.0**-powers)
    assert space.rotary_at(1) is space.rotary


def test_native_configuration_of_learned_positions_without_norm(lens_tensors, ends, write_model):
    del ends["ln_final.w"], ends["ln_final.b"]
    config = {**NATIVE, "positional_embedding_type": "standard", "normalization_type": None}
    space = read_token_space(str(write_model({**lens_tensors, **ends}, config)), fold_norm=True)
    assert (space.position_kind, space.final_norm, space.missing) == ("learned", "none", {})
    assert torch.equal(space.unembedding, ends["unembed.W_U"].T)


def test_native_configuration_that_is_not_known(lens_tensors, ends, write_model):
    config = {**NATIVE, "positional_embedding_type": "alibi"}
    with pytest.raises(UnsupportedLayoutError, match="positional_embedding_type='alibi'"):
        read_token_space(str(write_model({**lens_tensors, **ends}, config)))
    config = {**NATIVE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    space = read_token_space(str(write_model({**lens_tensors, **ends}, config)))
    assert space.position_kind == "rotary" and space.rotary is None
    with pytest.raises(UnsupportedLayoutError, match="rotary positions to read: .*kind 'linear'"):
        space.rotary_at(0)


def test_configuration_of_another_library_does_not_describe_lens_names(
    lens_tensors, ends, write_model, llama_config
):
    del ends["pos_embed.W_pos"]
    space = read_token_space(str(write_model({**lens_tensors, **ends}, llama_config)))
    assert space.position_kind == "unknown" and not space.tied


@pytest.mark.parametrize("positions", ["standard", "rotary"])
@pytest.mark.parametrize("normalisation", ["LN", "LNPre", "RMS", None])
def test_native_bridge(positions, normalisation, live):
    lens = pytest.importorskip("transformer_lens.model_bridge")
    settings = {**NATIVE, "n_key_value_heads": None, "normalization_type": normalisation}
    settings |= {"positional_embedding_type": positions, "d_mlp": 8}
    settings = {key: value for key, value in settings.items() if value is not None}
    bridge = lens.TransformerBridge.boot_native({**settings, "normalization_type": normalisation})
    space = read_token_space(live(bridge))
    kinds = {"LN": "layernorm", "LNPre": "layernorm", "RMS": "rmsnorm", None: "none"}
    assert space.final_norm == kinds[normalisation]
    model = bridge.original_model
    assert torch.equal(space.embedding, model.get_parameter(_parameter(model, "tok_embed")))
    assert torch.equal(space.unembedding, model.get_parameter(_parameter(model, "head")))
    assert "embedding" not in space.missing and "unembedding" not in space.missing
    if positions == "standard":
        assert torch.equal(space.positions, model.get_parameter(_parameter(model, "pos")))
        return
    states = torch.randn(1, 1, 16, D_HEAD, generator=torch.Generator().manual_seed(0))
    turned, _ = model.rotary.apply_rope(states, states)
    for place in (0, 1, 15):
        own = rotate(
            states[0, 0, place], place, space.rotary.frequencies, space.rotary.n_dims,
            space.rotary.pairing,
        )  # fmt: skip
        torch.testing.assert_close(own, turned[0, 0, place], atol=1e-6, rtol=1e-6)


def _parameter(model: Any, component: str) -> str:
    return next(
        name for name, _ in model.named_parameters()
        if name.startswith(f"{component}.") and name.endswith("weight")
    )  # fmt: skip


def test_bundled_model():
    space = read_token_space("skhead/induction-2l")
    assert space.embedding.shape == space.unembedding.shape == (68, 128)
    assert space.positions.shape == (64, 128)
    assert (space.final_norm, space.tied, space.missing) == ("layernorm", False, {})


def test_gpt2_without_its_embedding(gpt2_path):
    space = read_token_space(gpt2_path)
    assert space.embedding is None and space.unembedding is None
    assert space.missing["embedding"] == (
        f"there is no tensor 'wte.weight' in {gpt2_path}/model.safetensors"
    )
    assert space.missing["unembedding"] == (
        f"there is no tensor 'lm_head.weight' in {gpt2_path}/model.safetensors, nor 'wte.weight', "
        "to which it is tied"
    )
    assert space.positions.shape == (1024, 768)
    assert space.final_gain.shape == (768,)


def test_stories(models_dir):
    space = read_token_space(str(models_dir / "stories260k"))
    assert space.tied and space.unembedding is space.embedding
    assert (space.position_kind, space.rotary.n_dims, space.rotary.pairing) == ("rotary", 8, "half")
    torch.testing.assert_close(
        space.rotary.frequencies, torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)
    )


def test_rxnmapper(models_dir):
    path = models_dir / "rxnmapper-albert"
    space = read_token_space(str(path))
    stored = load_file(path / "model.safetensors")
    projection = stored["albert.encoder.embedding_hidden_mapping_in.weight"]
    words = stored["albert.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(space.embedding, words @ projection.T)
    places = stored["albert.embeddings.position_embeddings.weight"]
    torch.testing.assert_close(space.positions, places @ projection.T)
    assert space.unembedding is None
    assert (
        "a dense layer, an activation and a norm (predictions.dense)"
        in (space.missing["unembedding"])
    )


@pytest.mark.parametrize("folder", ["loose", "perfect"])
def test_toy_without_a_norm(models_dir, folder):
    space = read_token_space(str(models_dir / "induction-1head" / f"{folder}.safetensors"))
    assert space.embedding.shape == space.unembedding.shape == (26, 64)
    assert space.positions.shape == (8, 64)
    assert set(space.missing) == {"final_gain"}


@pytest.fixture
def llama(llama_tensors, llama_config, write_model):
    """Write the small Llama with changed tensors and configuration; return its address."""

    def write(changes: dict[str, Any] | None = None, **config: Any) -> str:
        tensors = {**llama_tensors, "model.norm.weight": _table(1, 8)[0], **(changes or {})}
        kept = {name: value for name, value in tensors.items() if value is not None}
        return str(write_model(kept, {**llama_config, **config}))

    return write


HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def test_ties_of_the_configuration(llama, llama_tensors):
    table = llama_tensors[EMBEDDING]
    assert (
        read_token_space(llama()).missing["unembedding"].startswith(f"there is no tensor '{HEAD}'")
    )
    tied = read_token_space(llama(tie_word_embeddings=True))
    assert tied.tied and tied.unembedding is tied.embedding and not tied.missing
    assert torch.equal(tied.unembedding, table)
    both = read_token_space(llama({HEAD: table.clone()}, tie_word_embeddings=True))
    assert both.tied and both.unembedding is both.embedding
    other = _table(N_TOKENS, 9)
    differ = read_token_space(llama({HEAD: other}, tie_word_embeddings=True))
    assert not differ.tied
    assert torch.equal(differ.unembedding, other) and torch.equal(differ.embedding, table)
    swapped = read_token_space(llama({HEAD: other, EMBEDDING: None}, tie_word_embeddings=True))
    assert swapped.tied and torch.equal(swapped.embedding, other) and not swapped.missing
    free = read_token_space(llama({HEAD: table.clone()}))
    assert not free.tied and free.unembedding is not free.embedding


def test_tied_ends_part_where_a_gain_is_folded(llama, llama_tensors):
    space = read_token_space(llama(tie_word_embeddings=True), fold_norm=True)
    assert space.tied
    assert torch.equal(space.embedding, llama_tensors[EMBEDDING])
    torch.testing.assert_close(space.unembedding, llama_tensors[EMBEDDING] * space.final_gain)
    centred = read_token_space(llama(tie_word_embeddings=True), center=True)
    assert centred.unembedding is centred.embedding
    assert float(centred.embedding.mean(1).abs().max()) < 1e-6


def test_other_numbers_of_tokens_are_kept_and_said(llama):
    path = llama({HEAD: _table(13)})
    with pytest.warns(
        UserWarning, match=r"'lm_head.weight' has 13 tokens, and the embedding .* 11"
    ):
        space = read_token_space(path)
    assert (len(space.embedding), len(space.unembedding)) == (11, 13)


@pytest.mark.parametrize("table", ["embedding", "unembedding", "positions", None])
def test_one_table_alone(table, ends, lens_tensors, write_model):
    path = str(write_model({**lens_tensors, **ends}, None))
    tables = () if table is None else (table,)
    space, whole = read_token_space(path, tables=tables), read_token_space(path)
    for name in ("embedding", "unembedding", "positions"):
        if name == table:
            assert torch.equal(getattr(space, name), getattr(whole, name))
        else:
            assert getattr(space, name) is None
    assert space.missing == {}
    assert (space.final_gain is None) == (table != "unembedding")
    for field in fields(space):
        if field.name not in ("embedding", "unembedding", "positions", "final_gain"):
            assert getattr(space, field.name) == getattr(whole, field.name)
    assert set(asdict(space)) == {field.name for field in fields(space)}


def test_unembedding_alone_of_tied_ends(llama, llama_tensors):
    space = read_token_space(llama(tie_word_embeddings=True), tables=["unembedding"])
    assert space.embedding is None and torch.equal(space.unembedding, llama_tensors[EMBEDDING])


def test_low_precision_is_promoted(llama, llama_tensors):
    half = llama_tensors[EMBEDDING].bfloat16()
    space = read_token_space(llama({EMBEDDING: half}))
    assert space.embedding.dtype == torch.float32
    assert torch.equal(space.embedding, half.float())


def test_live_weights_are_not_changed(live, lens_tensors, ends):
    before = {name: value.clone() for name, value in ends.items()}
    source = live({**lens_tensors, **ends})
    space = read_token_space(source, fold_norm=True, center=True)
    for name, value in before.items():
        assert torch.equal(ends[name], value), name
    ends["embed.W_E"].fill_(3.0)
    assert not torch.equal(space.embedding, ends["embed.W_E"])
    assert (read_token_space(source).embedding == 3).all()


def test_live_ends_that_share_memory_are_tied(live, lens_tensors, ends):
    ends["unembed.W_U"] = ends["embed.W_E"].T
    space = read_token_space(live({**lens_tensors, **ends}))
    assert space.tied and space.unembedding is space.embedding
    ends["unembed.W_U"] = ends["embed.W_E"][:-1].T
    with pytest.warns(UserWarning, match="both are kept as they are"):
        space = read_token_space(live({**lens_tensors, **ends}))
    assert not space.tied
    assert len(space.unembedding) == len(space.embedding) - 1
    ends["unembed.W_U"] = ends["embed.W_E"].T.clone()
    assert not read_token_space(live({**lens_tensors, **ends})).tied


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({EMBEDDING: _table(11, width=20)}, ConfigMismatchError,
         r"has shape \(11, 20\); beside heads of d_model=24 it must have \(rows, 24\)"),
        ({EMBEDDING: torch.zeros(24)}, ConfigMismatchError, r"has shape \(24,\); beside"),
        ({EMBEDDING: torch.tensor(1.0)}, ConfigMismatchError, r"has shape \(\); beside"),
        ({HEAD: torch.tensor(1.0)}, ConfigMismatchError, r"lm_head.weight' has shape \(\); beside"),
        ({HEAD: _table(11, width=25)}, ConfigMismatchError, r"lm_head.weight' has shape \(11, 25"),
        ({"model.norm.weight": torch.ones(7)}, ConfigMismatchError,
         r"norm.weight' has shape \(7,\); a gain of this model has \(24,\)"),
        ({EMBEDDING: torch.full((11, 24), torch.nan)}, DegenerateHeadError,
         "embed_tokens.weight' holds 264 NaN or infinite values"),
        ({HEAD: torch.full((11, 24), torch.inf)}, DegenerateHeadError, "lm_head.weight' holds 264"),
        ({EMBEDDING: torch.zeros(11, 24, dtype=torch.int8)}, UnsupportedLayoutError,
         "embed_tokens.weight' is stored as I8. Quantised"),
    ],
)  # fmt: skip
def test_bad_tensors(changes, error, message, llama):
    with pytest.raises(error, match=rf"model\.safetensors: tensor '.*{message}"):
        read_token_space(llama(changes))


@pytest.mark.parametrize("shape", [(), (24,)])
def test_a_table_under_lens_names_that_is_no_matrix(shape, lens_tensors, ends, write_model):
    ends["unembed.W_U"] = torch.ones(shape)
    path = write_model({**lens_tensors, **ends}, None)
    with pytest.raises(ConfigMismatchError, match=r"unembed\.W_U' has shape .*\(24, tokens\)"):
        read_token_space(str(path))


def test_missing_gain(llama):
    path = llama({"model.norm.weight": None, HEAD: _table(11)})
    assert "no tensor 'model.norm.weight'" in read_token_space(path).missing["final_gain"]
    with pytest.raises(CheckpointError, match=r"fold_norm=True: there is no tensor 'model\.norm"):
        read_token_space(path, fold_norm=True)
    read_token_space(path, fold_norm=True, tables=["embedding"])


def test_wrong_arguments(llama):
    with pytest.raises(ValueError, match="tables holds 'bias'; it may hold 'embedding', 'unem"):
        read_token_space(llama(), tables=["bias"])
    with pytest.raises(SourceNotFoundError, match="reads from /no/such/place"):
        read_token_space("/no/such/place")


@pytest.mark.parametrize("padding", [None, -1, "1"])
def test_positions_after_padding(padding, write_model):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 11}
    model = transformers.RobertaModel(
        transformers.RobertaConfig(**sizes, intermediate_size=8, max_position_embeddings=6)
    )
    config = {**model.config.to_dict(), "pad_token_id": padding}
    path = write_model(dict(model.state_dict()), config)
    with pytest.raises(ConfigMismatchError, match="pad_token_id=.* is not a whole number"):
        read_token_space(str(path))
    (path / "config.json").write_text(json.dumps({**config, "pad_token_id": 5}))
    with pytest.raises(ConfigMismatchError, match="6 rows, of which the first 6 stand for no"):
        read_token_space(str(path))


def test_only_the_shards_that_are_needed_are_opened(write_sharded, llama_tensors, llama_config):
    tensors = {
        **llama_tensors,
        "model.norm.weight": torch.ones(D_MODEL),
        "other.layers.head.weight": torch.ones(2),
        "lm_head.layers.rest": torch.ones(2),
    }
    path = write_sharded(tensors, llama_config)
    (path / "model-rest.safetensors").unlink()
    facts = read_token_space(str(path), tables=())
    assert (facts.position_kind, facts.rotary.n_dims, facts.final_norm) == ("rotary", 8, "rmsnorm")
    with pytest.raises(CheckpointError, match=r"shard model-rest\.safetensors is missing"):
        read_token_space(str(path), tables=["embedding"])


def test_tied_ends_are_read_once(llama, llama_tensors, monkeypatch):
    path = llama(tie_word_embeddings=True)
    asked = []
    read = SafetensorsReader.tensor
    monkeypatch.setattr(
        SafetensorsReader, "tensor", lambda self, name: (asked.append(name), read(self, name))[1]
    )
    space = read_token_space(path)
    assert asked.count(EMBEDDING) == 1
    nbytes = llama_tensors[EMBEDDING].numel() * 4
    assert space.unembedding.untyped_storage().nbytes() == nbytes
    assert space.unembedding.data_ptr() == space.embedding.data_ptr()
