"""Models opened as bridges compute what their tensors say."""

from __future__ import annotations

import json
import math
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import skhead
from skhead.exceptions import (
    CheckpointError,
    ConfigMismatchError,
    SourceNotFoundError,
    UnsupportedLayoutError,
)
from skhead.weights.running import open_bridge, token_batches

pytest.importorskip("transformer_lens")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
D_MODEL, D_HEAD, N_HEADS, N_CTX, N_VOCAB = 20, 6, 4, 12, 17
EPS = 1e-5
ZOO = [name for name in skhead.datasets.list_models() if name.startswith("skhead/zoo/")]
ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


def tiny_tensors(
    *, n_layers=2, n_kv=None, norm="LN", rotary=False, mlp=None, biases=True, seed=0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.4

    tensors = {"embed.W_E": draw(N_VOCAB, D_MODEL), "unembed.W_U": draw(D_MODEL, N_VOCAB)}
    if biases:
        tensors["unembed.b_U"] = draw(N_VOCAB)
    if not rotary:
        tensors["pos_embed.W_pos"] = draw(N_CTX, D_MODEL)
    norms = ["ln_final"]
    kv, prefix = (N_HEADS, "") if n_kv is None else (n_kv, "_")
    for layer in range(n_layers):
        block = f"blocks.{layer}"
        norms += [f"{block}.ln1"] + ([f"{block}.ln2"] if mlp else [])
        for name, heads in (("W_Q", N_HEADS), (f"{prefix}W_K", kv), (f"{prefix}W_V", kv)):
            tensors[f"{block}.attn.{name}"] = draw(heads, D_MODEL, D_HEAD)
            if biases:
                tensors[f"{block}.attn.{name.replace('W', 'b')}"] = draw(heads, D_HEAD)
        tensors[f"{block}.attn.W_O"] = draw(N_HEADS, D_HEAD, D_MODEL)
        if biases:
            tensors[f"{block}.attn.b_O"] = draw(D_MODEL)
        if mlp:
            tensors[f"{block}.mlp.W_in"] = draw(D_MODEL, 30)
            tensors[f"{block}.mlp.W_out"] = draw(30, D_MODEL)
            if mlp == "gated":
                tensors[f"{block}.mlp.W_gate"] = draw(D_MODEL, 30)
            if biases:
                tensors[f"{block}.mlp.b_in"], tensors[f"{block}.mlp.b_out"] = (
                    draw(30),
                    draw(D_MODEL),
                )
    for name in norms if norm else ():
        tensors[f"{name}.w"] = 1 + draw(D_MODEL)
        if norm == "LN":
            tensors[f"{name}.b"] = draw(D_MODEL)
    return tensors


def rotate(x: torch.Tensor, n_dims: int, base: float) -> torch.Tensor:
    """Turn pairs of neighbouring coordinates as complex numbers; x is (batch, pos, head, d)."""
    angles = torch.outer(torch.arange(x.shape[1]), base ** (-torch.arange(0, n_dims, 2) / n_dims))
    turned = torch.view_as_complex(x[..., :n_dims].unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([torch.view_as_real(turned).flatten(-2), x[..., n_dims:]], dim=-1)


def reference_logits(tensors, tokens, *, rotary=None, act="relu") -> torch.Tensor:
    """The forward pass, written from the definitions in float64."""
    weights = {name.replace("._", "."): tensor.double() for name, tensor in tensors.items()}

    def get(name, default=0.0):
        return weights.get(name, default)

    def normed(x, name):
        if f"{name}.w" not in weights:
            return x
        if f"{name}.b" in weights:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        return x * weights[f"{name}.w"] + get(f"{name}.b")

    n_tokens = tokens.shape[1]
    x = weights["embed.W_E"][tokens]
    if "pos_embed.W_pos" in weights:
        x = x + weights["pos_embed.W_pos"][:n_tokens]
    later = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    layer = 0
    while f"blocks.{layer}.attn.W_Q" in weights:
        block = f"blocks.{layer}"
        y = normed(x, f"{block}.ln1")
        q, k, v = (
            torch.einsum("bpm,hmd->bphd", y, weights[f"{block}.attn.W_{role}"])
            + get(f"{block}.attn.b_{role}")
            for role in "QKV"
        )
        if rotary:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        group = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        pattern = scores.masked_fill(later, -torch.inf).softmax(-1)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        x = x + torch.einsum("bqhd,hdm->bqm", z, weights[f"{block}.attn.W_O"])
        x = x + get(f"{block}.attn.b_O")
        if f"{block}.mlp.W_in" in weights:
            y = normed(x, f"{block}.ln2")
            inner = y @ weights[f"{block}.mlp.W_in"] + get(f"{block}.mlp.b_in")
            if f"{block}.mlp.W_gate" in weights:
                inner = ACTIVATIONS[act](y @ weights[f"{block}.mlp.W_gate"]) * inner
            else:
                inner = ACTIVATIONS[act](inner)
            x = x + inner @ weights[f"{block}.mlp.W_out"] + get(f"{block}.mlp.b_out")
        layer += 1
    return normed(x, "ln_final") @ weights["unembed.W_U"] + get("unembed.b_U")


def config_of(**stated):
    return {
        "architecture": "TransformerLensNative",
        "n_layers": 2,
        "n_heads": N_HEADS,
        "n_key_value_heads": N_HEADS,
        "d_model": D_MODEL,
        "d_head": D_HEAD,
        "n_ctx": N_CTX,
        "d_vocab": N_VOCAB,
        "d_mlp": None,
        "attn_only": True,
        "eps": EPS,
    } | stated


def written(path, tensors, config=None):
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "m.safetensors"
    )
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return str(path)


def logits_of(source, tokens):
    bridge = open_bridge(source)
    assert not bridge.training
    with torch.no_grad():
        return bridge(tokens, return_type="logits").double()


@pytest.fixture
def tokens():
    return torch.randint(0, N_VOCAB, (3, N_CTX), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    "shape", [{}, {"norm": "RMS"}, {"norm": None}, {"biases": False}, {"n_kv": 2}, {"n_layers": 3}]
)
def test_tensors_alone_describe_an_attention_only_model(tmp_path, tokens, shape):
    tensors = tiny_tensors(**shape)
    expected = reference_logits(tensors, tokens)
    torch.testing.assert_close(
        logits_of(written(tmp_path, tensors), tokens), expected, atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "shape, stated, act",
    [
        ({"mlp": "plain"}, {"act_fn": "gelu_new"}, "gelu_new"),
        ({"mlp": "plain", "norm": "RMS", "biases": False}, {"act_fn": "relu"}, "relu"),
        ({"mlp": "gated", "norm": "RMS", "rotary": True, "n_kv": 2}, {"act_fn": "silu"}, "silu"),
        ({"rotary": True, "norm": None}, {}, "relu"),
    ],
)
def test_config_and_tensors_describe_the_rest(tmp_path, tokens, shape, stated, act):
    tensors = tiny_tensors(**shape)
    config = config_of(
        attn_only="mlp" not in shape,
        gated_mlp=shape.get("mlp") == "gated",
        d_mlp=30 if "mlp" in shape else None,
        normalization_type=shape.get("norm", "LN"),
        n_key_value_heads=shape.get("n_kv", N_HEADS),
        **stated,
    )
    rotary = None
    if shape.get("rotary"):
        rotary = (4, 100.0)
        config |= {"positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_base": 100.0}
    expected = reference_logits(tensors, tokens, rotary=rotary, act=act)
    source = written(tmp_path, tensors, config)
    torch.testing.assert_close(logits_of(source, tokens), expected, atol=2e-4, rtol=1e-4)


def test_k_and_v_once_per_key_value_head_under_either_name(tmp_path, tokens):
    tensors = tiny_tensors(n_kv=2)
    plain = {name.replace("._", "."): tensor for name, tensor in tensors.items()}
    expected = logits_of(written(tmp_path, tensors), tokens)
    torch.testing.assert_close(logits_of(written(tmp_path, plain), tokens), expected)


def test_bundled_model_computes_its_own_forward_pass(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import induction_2l_model as model

    sequences = model.sample_batch(8, np.random.default_rng(0)).tokens
    path = skhead.datasets.bundled_path("skhead/induction-2l") / "model.safetensors"
    expected, _ = model.forward(load_file(path), sequences)
    found = logits_of("skhead/induction-2l", sequences)
    torch.testing.assert_close(found, expected.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_models_of_the_zoo(name):
    path = skhead.datasets.bundled_path(name)
    config = json.loads((path / "config.json").read_text())
    rotary = None
    if config["positional_embedding_type"] == "rotary":
        rotary = (config["rotary_dim"], config["rotary_base"])
    sequences = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(
        load_file(path / "model.safetensors"), sequences, rotary=rotary, act=config["act_fn"]
    )
    torch.testing.assert_close(logits_of(name, sequences), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["loose", "perfect"])
def test_models_of_one_head_per_layer(models_dir, name):
    path = models_dir / "induction-1head" / f"{name}.safetensors"
    sequences = torch.randint(0, 26, (5, 8), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(load_file(path), sequences)
    torch.testing.assert_close(logits_of(path, sequences), expected, atol=1e-3, rtol=1e-4)


def test_hugging_face_directory_and_file(models_dir):
    path = models_dir / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
    sequences = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(sequences).logits.double()
    for source in (path, path / "model.safetensors"):
        torch.testing.assert_close(logits_of(source, sequences), expected, atol=1e-4, rtol=1e-4)


def small_gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=20, bos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def test_a_module_is_copied_and_stays_as_it_was():
    module = small_gpt2().train()
    names = [name for name, _ in module.named_modules()]
    sequences = torch.arange(10)[None]
    bridge = open_bridge(module)
    with torch.no_grad():
        expected = bridge(sequences, return_type="logits")
        bridge.blocks[0].attn.o.weight.zero_()
    assert module.training
    assert [name for name, _ in module.named_modules()] == names
    with torch.no_grad():
        found = module.eval()(sequences).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert open_bridge(bridge) is bridge


def test_live_names(tokens):
    tensors, module = tiny_tensors(), small_gpt2().eval()
    for content in (tensors, module):
        name = skhead.register_model(content, f"live-{uuid.uuid4().hex[:8]}")
        try:
            found = logits_of(name, tokens)
        finally:
            skhead.unregister_model(name)
        if content is module:
            with torch.no_grad():
                expected = module(tokens).logits.double()
        else:
            expected = reference_logits(tensors, tokens)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_opening_does_not_disturb_the_random_state():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    open_bridge("skhead/induction-2l")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    "lost, message",
    [
        ("embed.W_E", "without an embedding of the tokens: there is no tensor 'embed.W_E'"),
        ("unembed.W_U", "without an unembedding"),
        ("ln_final.w", "there is no tensor 'ln_final.w'"),
        ("blocks.1.ln1.b", r"no tensor 'blocks.1.ln1.b', and other layers have one \(blocks.0"),
        ("blocks.1.attn.b_K", "no tensor 'blocks.1.attn.b_K', and other layers have one"),
        ("blocks.1.attn.W_V", "L1 W_V is missing"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, lost, message):
    tensors = tiny_tensors()
    del tensors[lost]
    with pytest.raises(CheckpointError, match=message):
        open_bridge(written(tmp_path, tensors))


def test_tensors_that_do_not_belong_are_named(tmp_path):
    tensors = tiny_tensors() | {"blocks.0.attn.q_norm.w": torch.ones(D_HEAD)}
    with pytest.raises(CheckpointError, match=r"no place in the model.*blocks\.0\.attn\.q_norm\.w"):
        open_bridge(written(tmp_path, tensors))


def test_values_and_shapes_are_checked(tmp_path):
    tensors = tiny_tensors()
    tensors["embed.W_E"][2, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"'embed\.W_E' holds NaN"):
        open_bridge(written(tmp_path, tensors))
    for name in ("embed.W_E", "unembed.W_U", "pos_embed.W_pos"):
        for shape in ((), (3,), (3, 3)):
            tensors = tiny_tensors() | {name: torch.ones(shape)}
            with pytest.raises(ConfigMismatchError, match=rf"'{name}' has shape .*d_model="):
                open_bridge(written(tmp_path, tensors))
    tensors = tiny_tensors(mlp="plain") | {"blocks.0.mlp.W_in": torch.ones(1, 10_000)}
    with pytest.raises(ConfigMismatchError, match=r"'blocks\.0\.mlp\.W_in' has shape \(1, 10000\)"):
        open_bridge(written(tmp_path, tensors))
    tensors = tiny_tensors() | {"ln_final.w": torch.ones(5)}
    with pytest.raises(ConfigMismatchError, match=r"'ln_final\.w' has shape \(5,\)"):
        open_bridge(written(tmp_path, tensors))
    tensors = tiny_tensors(mlp="plain") | {"blocks.1.mlp.W_in": torch.ones(3)}
    with pytest.raises(ConfigMismatchError, match=r"'blocks\.1\.mlp\.W_in' has shape \(3,\)"):
        open_bridge(written(tmp_path, tensors, config_of(act_fn="relu", attn_only=False)))


@pytest.mark.parametrize(
    "config, error, message",
    [
        (config_of(n_heads=2), ConfigMismatchError, "n_heads=2, and the tensors say 4"),
        (config_of(normalization_type="RMS"), ConfigMismatchError, "normalization_type='RMS'"),
        (config_of(n_key_value_heads=2), ConfigMismatchError, "n_key_value_heads=2"),
        ({"model_type": "gpt2"}, UnsupportedLayoutError, "may describe another model"),
        (config_of(parallel_attn_mlp=True), UnsupportedLayoutError, "parallel_attn_mlp=True"),
    ],
)
def test_a_config_that_contradicts_the_tensors(tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        open_bridge(written(tmp_path, tiny_tensors(), config))


def test_what_nothing_says_is_not_guessed(tmp_path):
    with pytest.raises(UnsupportedLayoutError, match="which activation function"):
        open_bridge(written(tmp_path, tiny_tensors(mlp="plain")))
    with pytest.raises(UnsupportedLayoutError, match="how the model knows positions"):
        open_bridge(written(tmp_path, tiny_tensors(rotary=True)))


def test_a_mask_of_all_positions_may_be_too_large(tmp_path):
    config = {"architecture": "TransformerLensNative", "positional_embedding_type": "rotary"}
    path = written(tmp_path, tiny_tensors(rotary=True), config | {"n_ctx": 10**12})
    with pytest.raises(UnsupportedLayoutError, match="n_ctx is 1000000000000; .* 32768 at most"):
        open_bridge(path)


def test_no_parameter_of_a_hugging_face_model_stays_random(models_dir, gpt2_path):
    with pytest.raises(CheckpointError, match=r"not stored, and random.*transformer\.wte\.weight"):
        open_bridge(gpt2_path)
    with pytest.raises(UnsupportedLayoutError, match="no adapter for AlbertForMaskedLM"):
        open_bridge(models_dir / "rxnmapper-albert")


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"vocab_size": 31}, ConfigMismatchError, r"wte\.weight' has shape \(30, 16\).*\(31, 16\)"),
        ({"n_layer": 1}, ConfigMismatchError, r"tensors of layers have no place.*h\.1\.attn"),
        ({"n_layer": 3}, CheckpointError, r"random numbers would take their place.*h\.2\.attn"),
        ({"vocab_size": 10**12}, ConfigMismatchError, r"GPT2LMHeadModel of 16\d+ numbers, and \d+"),
        ({"n_positions": 10**9}, ConfigMismatchError, r"GPT2LMHeadModel of \d+ numbers, and \d+"),
        ({"n_layer": 10**9}, ConfigMismatchError, "1000000000 layers, and there are 28 tensors"),
        ({"architectures": None}, UnsupportedLayoutError, "does not name the class of the model"),
        ({"architectures": 5}, UnsupportedLayoutError, "does not name the class of the model"),
        ({"architectures": [["A"]]}, UnsupportedLayoutError, "does not name the class of the"),
        ({"model_type": ["gpt2"]}, UnsupportedLayoutError, r"model_type \['gpt2'\] is none that"),
        ({"architectures": ["MyGPT"]}, UnsupportedLayoutError, "no adapter for MyGPT"),
        ({"model_type": "mine"}, UnsupportedLayoutError, "model_type 'mine' is none that"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors(tmp_path, changed, error, message):
    small_gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(error, match=message):
        open_bridge(tmp_path)


def test_shards_in_half_precision_run_in_float32(tmp_path):
    module = small_gpt2().bfloat16().eval()
    module.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    sequences = torch.arange(12)[None]
    with torch.no_grad():
        expected = module.float()(sequences).logits.double()
    torch.testing.assert_close(logits_of(tmp_path, sequences), expected, atol=1e-5, rtol=1e-5)


def test_a_parameter_that_is_not_a_number_is_named(tmp_path):
    module = small_gpt2()
    with torch.no_grad():
        module.transformer.h[1].mlp.c_fc.bias[3] = torch.nan
    module.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'transformer\.h\.1\.mlp\.c_fc\.bias' .* holds NaN"):
        open_bridge(tmp_path)


def test_what_is_no_model():
    with pytest.raises(SourceNotFoundError, match="no registered live model, no bundled model"):
        open_bridge("nobody/nothing")
    with pytest.raises(TypeError, match="model must be a source"):
        open_bridge(3)
    with pytest.raises(UnsupportedLayoutError, match="a live Linear has no Hugging Face config"):
        open_bridge(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedLayoutError, match="names the decoder"):
        open_bridge("somewhere#decoder")


def test_without_the_libraries_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    with pytest.raises(ImportError, match=r"pip install skhead\[lens\]"):
        open_bridge("skhead/induction-2l")


def test_batches_hold_every_sequence_once():
    bridge = open_bridge("skhead/induction-2l")
    sequences = [list(range(length)) for length in (5, 9, 5, 5, 9, 3)]
    batches = token_batches(bridge, sequences, "me", numbers=2 * 8 * 9 * (9 + 64))
    assert all(len(batch) <= 2 or batch.shape[1] < 9 for batch in batches)
    found = sorted(row for batch in batches for row in batch.tolist())
    assert found == sorted(sequences)


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        ([], ValueError, "me: tokens is empty"),
        ("some text", TypeError, "sequences of them; got str"),
        ([[1.0, 2.0, 3.0]], TypeError, "must be one-dimensional integers"),
        ([[1, 2]], ValueError, "sequence 0 has 2 tokens; at least 3"),
        ([[1, 2, 3], [5] * 65], ValueError, "sequence 1 has 65 tokens, and the model's context"),
        ([[1, 2, 68]], ValueError, "holds token 68; the model's tokens are 0 to 67"),
        ([[1, -2, 8]], ValueError, "holds token -2"),
    ],
)
def test_tokens_that_do_not_fit(tokens, error, message):
    with pytest.raises(error, match=message):
        token_batches(open_bridge("skhead/induction-2l"), tokens, "me")
