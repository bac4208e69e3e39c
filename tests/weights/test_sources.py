"""Where weights come from: directories, files, live models, bundled models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import skhead
from skhead.exceptions import (
    CheckpointError,
    ConfigMismatchError,
    HeadShapeError,
    HeadTableError,
    SourceNotFoundError,
    UnsupportedLayoutError,
)
from skhead.weights import describe_sources, read_role


def _equal(heads, others):
    for role in "QKVO":
        np.testing.assert_array_equal(
            skhead.load_weights(heads, role), skhead.load_weights(others, role)
        )


# Directories and files


def test_relative_path_and_path_object(write_model, llama_tensors, llama_config, monkeypatch):
    path = write_model(llama_tensors, llama_config)
    monkeypatch.chdir(path.parent)
    heads = skhead.load_heads("model")
    monkeypatch.chdir("/")
    assert set(heads["source"]) == {str(path)}
    assert skhead.load_heads(path).equals(heads)
    assert skhead.load_heads(f"{path}/../model/").equals(heads)
    assert skhead.load_weights(heads).shape == (12, 24, 8)


def test_home_of_nobody_is_a_name_like_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceNotFoundError, match=r"source '~no-such-user/model' does not exist"):
        skhead.load_heads("~no-such-user/model")


def test_sharded_equals_single(write_model, write_sharded, llama_tensors, llama_config):
    single = skhead.load_heads(write_model(llama_tensors, llama_config))
    sharded = write_sharded(llama_tensors, llama_config)
    _equal(skhead.load_heads(sharded), single)
    _equal(skhead.load_heads(sharded / "model.safetensors.index.json"), single)


def test_saved_by_transformers_in_shards(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, vocab_size=11,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    _equal(skhead.load_heads(tmp_path / "many"), skhead.load_heads(tmp_path / "one"))


def test_one_file_of_another_name(write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config, file="weights.safetensors")
    assert (
        len(skhead.load_heads(path)) == len(skhead.load_heads(path / "weights.safetensors")) == 12
    )


def test_path_that_ends_like_a_part(write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config, name="model#decoder")
    heads = skhead.load_heads(path)
    assert set(heads["source"]) == {str(path)}
    assert skhead.load_weights(heads).shape == (12, 24, 8)
    assert describe_sources(heads)[0].part is None


@pytest.fixture
def encoder_decoder(write_model):
    """Write a T5 whose decoder has one layer of four heads."""
    names = [f"decoder.block.0.layer.0.SelfAttention.{name}.weight" for name in "qkvo"]
    config = {"model_type": "t5", "d_model": 24, "num_layers": 1, "num_heads": 4, "d_kv": 6}
    return write_model({name: torch.randn(24, 24) for name in names}, config, name="model")


def test_part_and_path_of_one_address(encoder_decoder, write_model, lens_tensors, monkeypatch):
    heads = skhead.load_heads(encoder_decoder, part="decoder")
    other = write_model(lens_tensors, None, name="model#decoder")
    assert heads["source"].iloc[0] == str(other)
    message = rf"is ambiguous: {other} exists, and so does {encoder_decoder}, whose decoder"
    monkeypatch.chdir(other.parent)
    for ask in (
        lambda: skhead.load_heads(encoder_decoder, part="decoder"),
        lambda: skhead.load_heads(other),
        lambda: skhead.load_heads(str(other)),
        lambda: skhead.load_heads("model#decoder"),
        lambda: skhead.load_weights(heads),
    ):
        with pytest.raises(HeadTableError, match=message):
            ask()
    other.rename(other.with_name("renamed"))
    assert skhead.load_weights(heads).shape == (4, 24, 6)
    assert skhead.load_heads("model#decoder").equals(heads)


def test_path_like_the_part_of_a_live_model(encoder_decoder, live, write_model, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=24, num_layers=1, num_heads=4, d_kv=6, d_ff=32, vocab_size=11
    )
    live(transformers.T5ForConditionalGeneration(config), "model")
    monkeypatch.chdir(encoder_decoder.parent)
    encoder_decoder.rename(encoder_decoder.with_name("model#encoder"))
    heads = skhead.load_heads("model#encoder")
    assert set(heads["source"]) == {"model#encoder"}
    assert describe_sources(heads)[0].part == "encoder"
    assert skhead.load_weights(heads).shape == (4, 24, 6)


@pytest.mark.parametrize("new_format", [True, False])
def test_torch_file(new_format, tmp_path, write_model, llama_tensors, llama_config):
    (tmp_path / "config.json").write_text(json.dumps(llama_config))
    file = tmp_path / "pytorch_model.bin"
    torch.save(llama_tensors, file, _use_new_zipfile_serialization=new_format)
    saved = skhead.load_heads(write_model(llama_tensors, llama_config))
    _equal(skhead.load_heads(file), saved)


def test_load_heads_reads_no_weight(write_model, llama_tensors, llama_config, monkeypatch):
    poisoned = {name: torch.full_like(value, torch.nan) for name, value in llama_tensors.items()}
    path = write_model(poisoned, llama_config)

    def refuse(*_, **__):
        raise AssertionError("weight data was opened")

    monkeypatch.setattr("skhead.weights.readers.safe_open", refuse)
    heads = skhead.load_heads(path)
    assert describe_sources(heads)[0].dtype == "float32"
    assert len(heads) == 12
    with pytest.raises(AssertionError, match="weight data was opened"):
        skhead.load_weights(heads)


def test_only_the_layers_asked_for_are_read(
    write_sharded, llama_tensors, llama_config, monkeypatch
):
    from skhead.weights.readers import SafetensorsReader

    read = []
    true = SafetensorsReader.tensor
    monkeypatch.setattr(
        SafetensorsReader, "tensor", lambda self, name: (read.append(name), true(self, name))[1]
    )
    heads = skhead.load_heads(write_sharded(llama_tensors, llama_config))
    assert read == []
    skhead.load_weights(heads.loc[["L1H3", "L1H0", "L1H0"]], "K")
    assert read == ["model.layers.1.self_attn.k_proj.weight"]


# Keys that a configuration may leave out


def test_nested_config_that_states_only_what_is_not_the_default(write_model):
    """The inner configuration of published Gemma 3 checkpoints leaves the head counts out."""
    root = "language_model.model.layers.0.self_attn."
    shapes = {"q": (2048, 16), "k": (1024, 16), "v": (1024, 16), "o": (16, 2048)}
    tensors = {f"{root}{name}_proj.weight": torch.randn(shape) for name, shape in shapes.items()}
    inner = {"hidden_size": 16, "num_hidden_layers": 1, "model_type": "gemma3_text"}
    heads = skhead.load_heads(write_model(tensors, {"model_type": "gemma3", "text_config": inner}))
    assert len(heads) == 8
    assert heads["kv_head"].nunique() == 4
    assert set(heads["d_head"]) == {256}


def test_decoder_as_deep_as_the_encoder(write_model):
    names = [f"decoder.block.{i}.layer.0.SelfAttention.{name}" for i in range(2) for name in "qkvo"]
    tensors = {f"{name}.weight": torch.randn(24, 24) for name in names}
    config = {"model_type": "t5", "d_model": 24, "num_layers": 2, "num_heads": 4, "d_kv": 6}
    heads = skhead.load_heads(write_model(tensors, config), part="decoder")
    assert len(heads) == 8


def test_as_many_key_value_heads_as_heads(write_model, llama_tensors, llama_config):
    del llama_config["num_key_value_heads"]
    for layer in range(3):
        for name in "kv":
            key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            llama_tensors[key] = torch.randn(32, 24)
    heads = skhead.load_heads(write_model(llama_tensors, llama_config))
    assert heads["kv_head"].equals(heads["head"].rename("kv_head"))


# TransformerLens' names


def test_lens_names(write_model, lens_tensors):
    heads = skhead.load_heads(write_model(lens_tensors, None) / "model.safetensors")
    assert heads["kv_head"].tolist() == [0, 0, 1, 1] * 2
    for layer in range(2):
        rows = heads[heads["layer"] == layer]
        root = f"blocks.{layer}.attn."
        for role, name in zip("QKVO", ("W_Q", "_W_K", "_W_V", "W_O"), strict=True):
            true = lens_tensors[root + name].numpy()
            true = true.transpose(0, 2, 1) if role == "O" else true
            np.testing.assert_array_equal(read_role(rows, role).tensor.numpy(), true)
    info = describe_sources(heads)[0]
    assert (info.family, info.norm, info.norm_placement) == ("transformer_lens", "none", "none")


def test_lens_names_without_norm_fold_to_themselves(write_model, lens_tensors):
    heads = skhead.load_heads(write_model(lens_tensors, None))
    for role in "QKVO":
        with pytest.warns(UserWarning, match=r"fold_norm=True: .*/model .*holds no norm gains"):
            folded = skhead.load_weights(heads, role, fold_norm=True)
        np.testing.assert_array_equal(folded, skhead.load_weights(heads, role))


def test_unknown_norms_warn_once_per_source(live, write_model, lens_tensors):
    both = skhead.load_heads([write_model(lens_tensors, None), live(lens_tensors)])
    with pytest.warns(UserWarning, match="holds no norm gains") as caught:
        skhead.load_weights(both, fold_norm=True)
    assert ["live-model" in str(w.message) for w in caught] == [False, True]
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.filterwarnings("error")
def test_no_warning_where_the_norms_are_known(write_model, lens_tensors):
    gains = {f"blocks.{i}.ln1.w": torch.rand(24) for i in range(2)}
    for source in (write_model({**lens_tensors, **gains}, None), "skhead/induction-2l"):
        skhead.load_weights(skhead.load_heads(source), "O", fold_norm=True)
    skhead.load_weights(skhead.load_heads(write_model(lens_tensors, None, name="unfolded")))


@pytest.mark.parametrize(
    "extra, norm, placement",
    [
        (("ln1.w", "ln1.b"), "layernorm", "pre"),
        (("ln1.w",), "rmsnorm", "pre"),
        (("ln1.w", "ln1_post.w"), "rmsnorm", "pre+post"),
        (("ln1_post.w",), "rmsnorm", "post"),
    ],
)
def test_lens_norms(extra, norm, placement, write_model, lens_tensors):
    gains = {f"blocks.{i}.{name}": torch.rand(24) for i in range(2) for name in extra}
    heads = skhead.load_heads(write_model({**lens_tensors, **gains}, None))
    info = describe_sources(heads)[0]
    assert (info.norm, info.norm_placement) == (norm, placement)
    for roles, name in (("QKV", "ln1.w"), ("O", "ln1_post.w")):
        for role in roles:
            gain = np.stack(
                [gains.get(f"blocks.{i}.{name}", torch.ones(24)) for i in heads["layer"]]
            )
            np.testing.assert_allclose(
                skhead.load_weights(heads, role, fold_norm=True),
                skhead.load_weights(heads, role) * gain[:, :, None], rtol=1e-6,
            )  # fmt: skip


def test_lens_model_with_normalised_stream(write_model, lens_tensors):
    heads = skhead.load_heads(write_model({**lens_tensors, "embed.ln.w": torch.ones(24)}, None))
    with pytest.raises(UnsupportedLayoutError, match="normalises the residual stream itself"):
        skhead.load_weights(heads, fold_norm=True)


def test_lens_block_without_attention(write_model, lens_tensors):
    moved = {name.replace("blocks.1", "blocks.2"): value for name, value in lens_tensors.items()}
    moved["blocks.1.mlp.W_in"] = torch.zeros(24, 3)
    heads = skhead.load_heads(write_model(moved, None))
    assert sorted(set(heads["layer"])) == [0, 2]
    assert set(heads["n_layers"]) == {3}
    assert skhead.load_weights(heads.loc[["L2H1"]]).shape == (1, 24, 8)


def test_lens_layers_with_unequal_head_counts(write_model, lens_tensors):
    lens_tensors["blocks.1.attn.W_Q"] = torch.randn(2, 24, 8)
    lens_tensors["blocks.1.attn.W_O"] = torch.randn(2, 8, 24)
    heads = skhead.load_heads(write_model(lens_tensors, None))
    assert heads.index.tolist() == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0", "L1H1"]
    assert heads["kv_head"].tolist() == [0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"blocks.1.attn.W_O": None}, CheckpointError, r"L1 W_O is missing"),
        ({"blocks.1.attn._W_K": None}, CheckpointError, r"L1 W_K is missing"),
        ({"blocks.3.mlp.W_in": (24, 3)}, CheckpointError, r"block 2 is missing"),
        ({"blocks.1.attn.W_O": (4, 24, 8)}, ConfigMismatchError, r"must have \(4, 8, 24\)"),
        ({"blocks.1.attn._W_V": (1, 24, 8)}, ConfigMismatchError, r"must have \(2, 24, 8\)"),
        (
            {"blocks.1.attn.W_Q": (24, 32)},
            ConfigMismatchError,
            r"\(24, 32\); expected \(heads, d_m",
        ),
        (
            {"blocks.1.attn.W_Q": (3, 24, 8), "blocks.1.attn.W_O": (3, 8, 24)},
            ConfigMismatchError,
            r"L1 has 3 query heads .* which 2 key-value heads",
        ),
        (
            {
                "blocks.1.attn.W_Q": (4, 24, 6),
                "blocks.1.attn._W_K": (2, 24, 6),
                "blocks.1.attn._W_V": (2, 24, 6),
                "blocks.1.attn.W_O": (4, 6, 24),
            },
            HeadShapeError,
            r"'blocks\.1\.attn\.W_Q' has \(d_model, d_head\) \(24, 6\).*has \(24, 8\)",
        ),
    ],
)
def test_lens_tensors_that_disagree(change, error, message, write_model, lens_tensors):
    for name, shape in change.items():
        if shape is None:
            del lens_tensors[name]
        else:
            lens_tensors[name] = torch.zeros(shape)
    with pytest.raises(error, match=message):
        skhead.load_heads(write_model(lens_tensors, None))


# Bundled models


def test_bundled_model():
    heads = skhead.load_heads("skhead/induction-2l")
    assert set(heads["source"]) == {"skhead/induction-2l"}
    info = describe_sources(heads)[0]
    assert info.name == "induction-2l"
    assert skhead.load_weights(heads).shape == (len(heads), info.d_model, info.d_head)


# Real weights


def test_real_gpt2(gpt2_path):
    heads = skhead.load_heads(gpt2_path)
    assert heads.shape == (144, 7)
    stored = {}
    from safetensors import safe_open

    with safe_open(f"{gpt2_path}/model.safetensors", "pt") as file:
        for name in ("c_attn", "c_proj"):
            stored[name] = file.get_tensor(f"h.4.attn.{name}.weight").float().numpy()
    row = heads.loc[["L4H7"]]
    for i, role in enumerate("QKV"):
        columns = slice(768 * i + 448, 768 * i + 512)
        np.testing.assert_array_equal(
            skhead.load_weights(row, role)[0], stored["c_attn"][:, columns]
        )
    np.testing.assert_array_equal(skhead.load_weights(row, "O")[0], stored["c_proj"][448:512].T)
    assert read_role(row, "Q").eps.tolist() == [torch.finfo(torch.float16).eps]
    assert describe_sources(heads)[0].dtype == "float16"


def test_real_grouped_queries(models_dir):
    heads = skhead.load_heads(models_dir / "stories260k")
    assert (len(heads), heads["kv_head"].nunique()) == (40, 4)
    assert read_role(heads, "K").tensor.shape == (20, 64, 8)
    assert read_role(heads, "Q").tensor.shape == (40, 64, 8)


def test_real_shared_layers(models_dir):
    heads = skhead.load_heads(models_dir / "rxnmapper-albert")
    assert len(heads) == 96
    stack = read_role(heads, "O")
    assert stack.tensor.shape == (8, 256, 32)
    np.testing.assert_array_equal(stack.index, np.tile(np.arange(8), 12))
    assert describe_sources(heads)[0].shared_layers


@pytest.mark.parametrize("name", ["loose", "perfect"])
def test_real_lens_file(name, models_dir):
    path = models_dir / "induction-1head" / f"{name}.safetensors"
    heads = skhead.load_heads(path)
    assert heads.index.tolist() == ["L0H0", "L1H0"]
    assert describe_sources(heads)[0].name == name


def test_unused_file_beside_the_model_is_not_opened(write_model, llama_tensors, llama_config):
    path = write_model(llama_tensors, llama_config)
    save_file({"x": torch.zeros(1)}, path / "other.safetensors")
    assert len(skhead.load_heads(path)) == 12
