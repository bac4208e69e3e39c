"""Models in memory: mappings, bridges, compiled modules."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import skhead
from skhead.exceptions import UnsupportedLayoutError
from skhead.weights import describe_sources


def _equal(heads, others):
    for role in "QKVO":
        np.testing.assert_array_equal(
            skhead.load_weights(heads, role), skhead.load_weights(others, role)
        )


def test_live_mapping(live, lens_tensors, write_model):
    heads = skhead.load_heads(live(lens_tensors))
    assert set(heads["source"]) == {"live-model"}
    _equal(heads, skhead.load_heads(write_model(lens_tensors, None)))


def test_live_weights_are_read_when_needed(live, lens_tensors):
    heads = skhead.load_heads(live(lens_tensors))
    lens_tensors["blocks.0.attn.W_Q"].fill_(7.0)
    assert (skhead.load_weights(heads.loc[["L0H0"]], "Q") == 7).all()


def test_registering_a_name_again_replaces(live, lens_tensors):
    heads = skhead.load_heads(live(lens_tensors))
    live({name: torch.zeros_like(value) for name, value in lens_tensors.items()})
    assert not skhead.load_weights(heads).any()


def test_live_weights_are_not_changed_by_processing(live, lens_tensors):
    before = {name: value.clone() for name, value in lens_tensors.items()}
    lens_tensors |= {f"blocks.{i}.ln1.w": torch.rand(24) for i in range(2)}
    heads = skhead.load_heads(live(lens_tensors))
    with pytest.warns(UserWarning, match="centring changes what its heads read"):
        skhead.load_weights(heads, "Q", fold_norm=True, center=True)
    stack = skhead.load_weights(heads, "O")
    stack[:] = 0
    for name, value in before.items():
        assert torch.equal(lens_tensors[name], value), name


def test_live_name_in_another_process(live, lens_tensors, tmp_path):
    heads = skhead.load_heads(live(lens_tensors, "only-here"))
    (tmp_path / "table.pkl").write_bytes(pickle.dumps(heads))
    (tmp_path / "only-here").mkdir()
    code = (
        "import pickle, skhead\n"
        "heads = pickle.load(open('table.pkl', 'rb'))\n"
        "try:\n    skhead.load_weights(heads)\n"
        "except skhead.exceptions.SourceNotFoundError as error:\n    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "no live model of that name is registered in this process" in run.stdout
    assert "n_jobs=1" in run.stdout


@pytest.mark.parametrize("name", ["", " x", "x#decoder", 3, "skhead/induction-2l"])
def test_names_that_are_refused(name, lens_tensors):
    with pytest.raises(
        ValueError, match="register_model: (name|'skhead/induction-2l' is the name)"
    ):
        skhead.register_model(lens_tensors, name)


def test_a_model_given_as_its_name_is_not_printed():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="got Linear; give the model first, then its name$"):
        skhead.register_model("small", model)


@pytest.mark.parametrize(
    "module, message",
    [
        (torch.nn.Linear(3, 3), "a Linear has no Hugging Face config"),
        ("gpt2", "a str is neither a torch module nor a mapping"),
        ({"a": torch.zeros(3)}, r"does not have TransformerLens names .*Seen: 'a'"),
        ({"blocks.0.attn.W_Q": [1.0]}, r"'blocks\.0\.attn\.W_Q' is a list, not a tensor"),
    ],
)
def test_modules_that_are_refused(module, message):
    with pytest.raises(UnsupportedLayoutError, match=message):
        skhead.register_model(module, "refused")
    with pytest.raises(ValueError, match="no live model is named 'refused'"):
        skhead.unregister_model("refused")


def test_compiled_modules(live, lens_tensors, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=11)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    saved = skhead.load_heads(tmp_path)
    _equal(skhead.load_heads(live(torch.compile(model), "compiled")), saved)
    model.transformer.h[1] = torch.compile(model.transformer.h[1])
    assert any("h.1._orig_mod." in name for name in model.state_dict())
    _equal(skhead.load_heads(live(model, "compiled in part")), saved)


def test_mapping_of_a_compiled_module(live, lens_tensors):
    prefixed = {f"_orig_mod.{name}": value for name, value in lens_tensors.items()}
    heads = skhead.load_heads(live(prefixed, "prefixed"))
    _equal(heads, skhead.load_heads(live(lens_tensors)))
    prefixed["_orig_mod.blocks.0.attn.W_Q"].fill_(7.0)
    assert (skhead.load_weights(heads.loc[["L0H0"]], "Q") == 7).all()
    with pytest.raises(UnsupportedLayoutError, match=r"two tensors have the name 'blocks\.0\.attn"):
        skhead.register_model({**prefixed, **lens_tensors}, "doubled")


def test_compiled_bridge(live):
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge.boot_native(
        {
            "d_model": 24, "d_head": 6, "n_heads": 4, "n_layers": 1, "n_ctx": 8, "d_vocab": 11,
            "act_fn": "gelu", "normalization_type": "LN",
        }
    )  # fmt: skip
    compiled = skhead.load_heads(live(torch.compile(bridge), "compiled bridge"))
    _equal(compiled, skhead.load_heads(live(bridge)))
    assert describe_sources(compiled)[0].norm == "layernorm"


@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_sparse_live_tensor(layout, live, lens_tensors):
    name = "blocks.1.attn.W_Q"
    lens_tensors[name] = lens_tensors[name].to_sparse()
    if layout == "dense":
        lens_tensors[name] = lens_tensors[name].to_dense()
        assert len(skhead.load_heads(live(lens_tensors))) == 8
        return
    with pytest.raises(
        UnsupportedLayoutError, match=r"'live-model': tensor .*layout torch\.sparse_"
    ):
        skhead.load_heads(live(lens_tensors))


def test_weights_on_the_meta_device(live, lens_tensors):
    lens_tensors["blocks.0.attn.W_Q"] = lens_tensors["blocks.0.attn.W_Q"].to("meta")
    with pytest.raises(UnsupportedLayoutError, match=r"W_Q' is on the meta device"):
        skhead.load_heads(live(lens_tensors))


@pytest.mark.parametrize("normalisation", ["LN", "LNPre", "RMS", None])
def test_native_bridge(normalisation, live):
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge.boot_native(
        {
            "d_model": 24, "d_head": 6, "n_heads": 4, "n_layers": 2, "n_ctx": 8, "d_vocab": 11,
            "act_fn": "gelu", "normalization_type": normalisation,
        }
    )  # fmt: skip
    for block in bridge.blocks:
        if normalisation in ("LN", "RMS"):
            torch.nn.init.uniform_(block.ln1.weight)
    heads = skhead.load_heads(live(bridge))
    assert (len(heads), heads["d_head"].iloc[0], heads["n_layers"].iloc[0]) == (8, 6, 2)
    kinds = {"LN": "layernorm", "LNPre": "layernorm", "RMS": "rmsnorm", None: "none"}
    assert describe_sources(heads)[0].norm == kinds[normalisation]
    for layer, block in enumerate(bridge.blocks):
        rows = heads[heads["layer"] == layer]
        for role in "QKVO":
            true = getattr(block.attn, f"W_{role}").detach().numpy()
            true = true.transpose(0, 2, 1) if role == "O" else true
            np.testing.assert_array_equal(skhead.load_weights(rows, role), true)
            gain = np.ones(24, np.float32)
            if role != "O" and normalisation in ("LN", "RMS"):
                gain = block.ln1.weight.detach().numpy()
            np.testing.assert_allclose(
                skhead.load_weights(rows, role, fold_norm=True), true * gain[:, None], rtol=1e-6
            )


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt-post"])
def test_bridge_of_a_hugging_face_model(family, live, tmp_path):
    transformers = pytest.importorskip("transformers")
    builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 11}
    config = {
        "gpt2": lambda: transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=11),
        "gemma2": lambda: transformers.Gemma2Config(
            **sizes, num_key_value_heads=2, head_dim=8, intermediate_size=32
        ),
        "opt-post": lambda: transformers.OPTConfig(
            **sizes, ffn_dim=32, word_embed_proj_dim=24, do_layer_norm_before=False
        ),
    }[family]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            torch.nn.init.uniform_(parameter)
    model.save_pretrained(tmp_path)
    saved = skhead.load_heads(tmp_path)
    bridge = builder.build_bridge_from_module(model, type(model).__name__, hf_config=config)
    heads = skhead.load_heads(live(bridge))
    assert heads.drop(columns="source").equals(saved.drop(columns="source"))
    _equal(heads, saved)
    if family == "opt-post":
        with pytest.raises(UnsupportedLayoutError, match="normalises the residual stream itself"):
            skhead.load_weights(heads, fold_norm=True)
        return
    for role in "QKVO":
        np.testing.assert_allclose(
            skhead.load_weights(heads, role, fold_norm=True),
            skhead.load_weights(saved, role, fold_norm=True), rtol=1e-6,
        )  # fmt: skip


def test_encoder_decoder_bridge():
    transformers = pytest.importorskip("transformers")
    builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    config = transformers.T5Config(
        d_model=24, num_layers=2, num_heads=4, d_kv=8, d_ff=32, vocab_size=11
    )
    model = transformers.T5ForConditionalGeneration(config)
    bridge = builder.build_bridge_from_module(model, "T5ForConditionalGeneration", hf_config=config)
    with pytest.raises(UnsupportedLayoutError, match=r"no single list of blocks.*part="):
        skhead.register_model(bridge, "encoder-decoder")
