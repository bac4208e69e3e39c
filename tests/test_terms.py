"""Terms of the loss against paths that are multiplied out, and against the model's own loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from toys import random_weights, registered

import skhead
from skhead.exceptions import UnsupportedLayoutError
from skhead.terms import term_importance
from skhead.weights import running

pytest.importorskip("transformer_lens")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = "skhead/induction-2l"
N_LAYERS, N_HEADS, D_MODEL, D_HEAD, N_VOCAB = 2, 3, 24, 5, 11


def toy_model(n_layers=N_LAYERS):
    """A small attention-only model without norms, biases included."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.5

    tensors = {
        name: tensor * 0.4
        for name, tensor in random_weights(n_layers, N_HEADS, D_MODEL, D_HEAD).items()
    }
    tensors |= {"embed.W_E": draw(N_VOCAB, D_MODEL), "pos_embed.W_pos": draw(9, D_MODEL)}
    tensors |= {"unembed.W_U": draw(D_MODEL, N_VOCAB), "unembed.b_U": draw(N_VOCAB)}
    for layer in range(n_layers):
        for role in "QKV":
            tensors[f"blocks.{layer}.attn.b_{role}"] = draw(N_HEADS, D_HEAD)
        tensors[f"blocks.{layer}.attn.b_O"] = draw(D_MODEL)
    return tensors


class Dense:
    """The same model as a sum over paths, in float64."""

    def __init__(self, tensors, tokens):
        self.weights = {name: tensor.double() for name, tensor in tensors.items()}
        self.tokens = tokens
        self.start = self.weights["embed.W_E"][tokens]
        self.start = self.start + self.weights["pos_embed.W_pos"][: tokens.shape[1]]
        stream, self.patterns = self.start, []
        for layer in range(N_LAYERS):
            self.patterns.append(self.pattern(layer, stream))
            stream = stream + sum(self.head(layer, h, stream) for h in range(N_HEADS))
            stream = stream + self.bias(layer)
        self.end = stream

    def get(self, layer, name):
        return self.weights[f"blocks.{layer}.attn.{name}"]

    def bias(self, layer):
        return self.get(layer, "b_O")

    def pattern(self, layer, stream):
        q, k = (
            torch.einsum("bpm,hmd->bhpd", stream, self.get(layer, f"W_{role}"))
            + self.get(layer, f"b_{role}")[:, None]
            for role in "QK"
        )
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return (q @ k.mT / math.sqrt(D_HEAD)).masked_fill(later, -torch.inf).softmax(-1)

    def head(self, layer, h, stream):
        values = stream @ self.get(layer, "W_V")[h] + self.get(layer, "b_V")[h]
        return self.patterns[layer][:, h] @ values @ self.get(layer, "W_O")[h]

    def virtual(self, first, second):
        """What head `second` of layer 1 moves of what head `first` of layer 0 wrote."""
        moved = self.patterns[1][:, second] @ self.head(0, first, self.start)
        return moved @ self.get(1, "W_V")[second] @ self.get(1, "W_O")[second]

    def loss(self, stream):
        logits = stream @ self.weights["unembed.W_U"] + self.weights["unembed.b_U"]
        flat = logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(flat, self.tokens[:, 1:].flatten()).item()


def test_terms_are_those_of_paths_multiplied_out():
    tensors = toy_model()
    tokens = torch.randint(0, N_VOCAB, (6, 9), generator=torch.Generator().manual_seed(5))
    dense = Dense(tensors, tokens)
    direct = dense.start + dense.bias(0) + dense.bias(1)
    single = {(0, h): dense.head(0, h, dense.start) for h in range(N_HEADS)}
    single |= {(1, h): dense.head(1, h, dense.start + dense.bias(0)) for h in range(N_HEADS)}
    first = direct + sum(single.values())
    second = first + sum(dense.virtual(h, k) for h in range(N_HEADS) for k in range(N_HEADS))
    torch.testing.assert_close(second, dense.end)
    with registered(tensors) as heads:
        terms = term_importance(heads["source"].iloc[0], tokens.tolist())
    expected = [dense.loss(stream) for stream in (direct, first, second)]
    np.testing.assert_allclose(terms.order_losses, expected, atol=1e-5)
    assert terms.loss == pytest.approx(dense.loss(dense.end), abs=1e-5)
    for (layer, h), written in single.items():
        effect = dense.loss(first) - dense.loss(first - written)
        assert terms.heads[f"L{layer}H{h}"] == pytest.approx(effect, abs=1e-5)
    assert terms.direct_path == pytest.approx(expected[0] - math.log(N_VOCAB), abs=1e-5)
    assert terms.individual_heads == pytest.approx(expected[1] - expected[0], abs=1e-5)
    assert terms.virtual_heads == pytest.approx(expected[2] - expected[1], abs=1e-5)
    assert terms.n_predictions == 48


def test_terms_of_the_bundled_model_add_up_to_its_loss(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import induction_2l_model as model

    tokens = model.sample_batch(32, np.random.default_rng(8)).tokens
    path = skhead.datasets.bundled_path(BUNDLED) / "model.safetensors"
    logits, _ = model.forward(load_file(path), tokens)
    own = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    terms = term_importance(BUNDLED, tokens)
    frame = terms.to_frame()
    assert frame["effect"].sum() == pytest.approx(own, abs=1e-5)
    assert frame["loss"].iloc[-1] == pytest.approx(own, abs=1e-5)
    assert terms.loss == pytest.approx(own, abs=1e-5)
    assert frame.index.tolist() == [
        "uniform guess",
        "direct path",
        "individual heads",
        "virtual heads",
    ]
    assert terms.heads.idxmin() == "L1H1" and terms.heads["L1H1"] < -1
    assert terms.heads.index.equals(skhead.load_heads(BUNDLED).index)


def test_model_with_mlps_norms_and_rotary_positions(models_dir):
    path = models_dir / "stories260k"
    tokens = torch.randint(3, 512, (4, 30), generator=torch.Generator().manual_seed(9))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    with torch.no_grad():
        own = model(tokens, labels=tokens).loss.item()
    terms = term_importance(path, tokens, individual=False)
    assert terms.heads is None
    assert terms.order_losses.shape == (6,)
    assert terms.order_losses[-1] == pytest.approx(own, rel=1e-5)
    assert terms.order_losses[0] > own + 0.1
    assert terms.to_frame()["effect"].sum() == pytest.approx(own, rel=1e-5)
    assert terms.to_frame().index[-1] == "paths through 5 heads"


def test_heads_that_write_nothing_change_nothing():
    tensors = toy_model()
    for layer in range(N_LAYERS):
        tensors[f"blocks.{layer}.attn.W_O"] *= 0
    with registered(tensors) as heads:
        terms = term_importance(heads["source"].iloc[0], [[1, 2, 3, 4]])
    np.testing.assert_allclose(terms.order_losses, terms.loss, rtol=1e-6)
    assert (terms.heads == 0).all()


def test_one_layer_has_no_virtual_heads():
    with registered(toy_model(1)) as heads:
        terms = term_importance(heads["source"].iloc[0], [[1, 2, 3]])
    assert terms.virtual_heads == 0
    assert len(terms.to_frame()) == 3
    assert terms.order_losses[1] == pytest.approx(terms.loss)


def test_sequences_weigh_by_their_predictions(monkeypatch):
    sequences = [[64, 3, 5, 3, 5], [7, 8], [64, 1, 2, 1]]
    together = term_importance(BUNDLED, sequences, individual=False)
    alone = [term_importance(BUNDLED, [sequence], individual=False) for sequence in sequences]
    counts = [terms.n_predictions for terms in alone]
    assert counts == [4, 1, 3] and together.n_predictions == 8
    expected = np.average([terms.order_losses for terms in alone], axis=0, weights=counts)
    np.testing.assert_allclose(together.order_losses, expected, atol=1e-5)
    monkeypatch.setattr(running, "_LOGIT_NUMBERS", 1)
    repeated = term_importance(BUNDLED, [sequences[0]] * 3, individual=False)
    np.testing.assert_allclose(repeated.order_losses, alone[0].order_losses, atol=1e-5)


def test_models_that_see_later_tokens_are_refused():
    config = transformers.BertConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=8,
        vocab_size=20,
        max_position_embeddings=16,
    )
    with pytest.raises(UnsupportedLayoutError, match="attention to a later token; the loss of"):
        term_importance(transformers.BertForMaskedLM(config), [[1, 2, 3]])


def test_a_bridge_that_only_shows_its_hooks_is_refused(monkeypatch):
    bridge = running.open_bridge(BUNDLED)
    run = bridge.run_with_hooks

    def show_only(tokens, *, fwd_hooks, **settings):
        shown = [
            (name, lambda value, hook, act=act: act(value, hook=hook) and None)
            for name, act in fwd_hooks
            if act.__name__ != "_zeroing"
        ]
        return run(tokens, fwd_hooks=shown, **settings)

    monkeypatch.setattr(bridge, "run_with_hooks", show_only)
    with pytest.raises(UnsupportedLayoutError, match="does not let the outputs of its heads be"):
        term_importance(bridge, [[64, 1, 2, 1]])


def test_heads_that_write_more_than_attention_times_values_are_refused():
    bridge = running.open_bridge(BUNDLED)

    def add_one(value, hook):
        return value + 1

    bridge.blocks[1].attn.o.hook_in.add_hook(add_one)
    with pytest.raises(UnsupportedLayoutError, match="is not what the heads of layer 1 write"):
        term_importance(bridge, [[64, 1, 2, 1]])


@pytest.mark.parametrize("family", ["GPT2", "GPTJ", "OPT"])
def test_families_whose_patterns_hooks_cannot_change(family):
    sizes = {
        "GPT2": {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32},
        "GPTJ": {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "rotary_dim": 4},
        "OPT": {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 32,
            "max_position_embeddings": 32,
        },
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=40, **sizes[family])
    ending = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    module = getattr(transformers, f"{family}{ending}")(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)  # away from a loss that hardly depends on the heads
    tokens = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = module(tokens, labels=tokens).loss.item()
    found = term_importance(module, tokens)
    assert found.order_losses[-1] == pytest.approx(own, rel=1e-5)
    assert abs(found.individual_heads) > 1e-3


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        ([[1]], ValueError, "term_importance: sequence 0 has 1 tokens; at least 2"),
        ([[1, 68]], ValueError, "term_importance: sequence 0 holds token 68"),
        ("text", TypeError, "term_importance: tokens must be an array"),
    ],
)
def test_tokens_that_do_not_fit(tokens, error, message):
    with pytest.raises(error, match=message):
        term_importance(BUNDLED, tokens)


def test_a_loss_that_is_not_finite():
    tensors = toy_model()
    tensors["unembed.W_U"] = tensors["unembed.W_U"].sign() * 3e38
    with (
        registered(tensors) as heads,
        pytest.raises(ValueError, match="the loss of the model, or of a part of it, is"),
    ):
        term_importance(heads["source"].iloc[0], [[1, 2, 3]])
