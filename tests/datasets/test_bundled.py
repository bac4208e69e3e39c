"""The bundled model does what its card says, and its script makes what is shipped."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import skhead
from skhead.datasets import bundled_path, list_models, load_model_card
from skhead.exceptions import SourceNotFoundError

NAME = "skhead/induction-2l"
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_names_and_files():
    assert list_models() == sorted(list_models())
    assert [name for name in list_models() if not name.startswith("skhead/zoo/")] == [NAME]
    assert {path.name for path in bundled_path(NAME).iterdir()} == {
        "README.md",
        "card.json",
        "model.safetensors",
    }
    assert sum(path.stat().st_size for path in bundled_path(NAME).iterdir()) < 2_000_000


@pytest.mark.parametrize("function", [bundled_path, load_model_card])
def test_unknown_name_lists_the_known(function):
    with pytest.raises(SourceNotFoundError, match=r"'skhead/nothing'; .*skhead/induction-2l"):
        function("skhead/nothing")


def test_every_listed_model_is_a_source_with_a_card():
    for name in list_models():
        heads, card = skhead.load_heads(name), load_model_card(name)
        assert card["name"] == name
        assert set(heads["source"]) == {name}
        places = [(head["layer"], head["index"]) for head in card["heads"]]
        assert list(zip(heads["layer"], heads["head"], strict=True)) == places


def test_import_leaves_torch_alone():
    code = "import sys, skhead.datasets; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_file_is_float32_in_transformer_lens_names(scripts):
    with safe_open(bundled_path(NAME) / "model.safetensors", "pt") as file:
        assert file.metadata() == scripts.train.METADATA
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"F32"}
    assert shapes == {
        name: tuple(tensor.shape) for name, tensor in scripts.model.initial_parameters(0).items()
    }
    assert shapes["blocks.1.attn.W_Q"] == (8, 128, 16)
    assert shapes["blocks.1.attn.W_O"] == (8, 16, 128)
    count = sum(math.prod(shape) for shape in shapes.values())
    assert load_model_card(NAME)["architecture"]["parameters"] == count


def test_tasks_are_solved_as_the_card_says(scripts, parameters, held_out):
    card = load_model_card(NAME)["performance"]
    measured = scripts.card.task_performance(parameters, held_out)
    for task in ("induction", "question"):
        assert measured[task]["accuracy"] > 0.95
        assert measured[task]["accuracy"] == pytest.approx(card[task]["accuracy"], abs=0.005)
        assert measured[task]["loss"] == pytest.approx(card[task]["loss"], abs=0.01)
        assert card[task]["loss"] < 0.1 * card[task]["chance_loss"]


def test_heads_attend_as_the_card_says(scripts, parameters, held_out):
    measured = scripts.card.mean_attention(parameters, held_out)
    for head in load_model_card(NAME)["heads"]:
        for name, value in head["attention"].items():
            here = measured[name][head["layer"], head["index"]].item()
            assert here == pytest.approx(value, abs=0.02), (head["head"], name)
        assert scripts.card.label(head["attention"]) == head["label"]


def test_the_two_halves_of_the_induction_circuit_are_needed(scripts, parameters, held_out):
    labels = {head["label"]: head for head in load_model_card(NAME)["heads"]}
    assert labels["Previous Token"]["layer"] == 0
    assert labels["Induction"]["layer"] == 1
    for label in ("Previous Token", "Induction"):
        head = labels[label]
        others = scripts.model.all_heads()
        others[head["layer"]].remove(head["index"])
        without = scripts.card.task_performance(parameters, held_out[:1], others)
        assert without["induction"]["accuracy"] < 0.1
        assert without["induction"]["accuracy"] == pytest.approx(
            head["accuracy_without"]["induction"], abs=0.02
        )


def test_readme_is_written_from_the_card(scripts):
    text = (bundled_path(NAME) / "README.md").read_text()
    assert text == scripts.card.readme(load_model_card(NAME))
    assert "| L0H0 |" in text


def test_sequences_hold_what_the_masks_say(scripts):
    model = scripts.model
    batch = model.sample_batch(200, np.random.default_rng(3))
    tokens, earlier = batch.tokens.numpy(), batch.earlier.numpy()
    for row in range(len(tokens)):
        seen: dict[int, int] = {}
        for at, token in enumerate(tokens[row]):
            if token < model.N_WORDS:
                assert earlier[row, at] == seen.get(token, -1)
                seen.setdefault(token, at)
        for at in np.flatnonzero(batch.copied[row]):
            assert tokens[row, at + 1] == tokens[row, earlier[row, at] + 1]
        for at in np.flatnonzero(batch.asked[row]):
            assert tokens[row, at - 1] == model.ASK
            answer = model.YES if earlier[row, at] >= 0 else model.NO
            assert tokens[row, at + 1] == answer
    assert (tokens[:, 0] == model.BOS).all()
    assert batch.copied.sum(1).min() >= model.MIN_SEGMENT - 1


def test_first_steps_of_training_repeat_exactly(scripts):
    short = scripts.train.Training(
        learn_steps=2,
        steps_per_removal=1,
        settle_steps=1,
        regrow_steps=2,
        kept_heads=7,
        batch_size=8,
    )
    first, second = scripts.train.train(short), scripts.train.train(short)
    other = scripts.train.train(scripts.train.Training(**{**vars(short), "seed": 7}))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.W_Q"], other["blocks.0.attn.W_Q"])


def test_switched_off_heads_change_nothing(scripts, parameters, held_out):
    tokens = held_out[0].tokens[:4]
    without = {name: tensor.clone() for name, tensor in parameters.items()}
    without["blocks.0.attn.W_O"][3] = 0
    active = [[0, 1, 2, 4, 5, 6, 7], list(range(8))]
    expected, _ = scripts.model.forward(without, tokens)
    actual, _ = scripts.model.forward(parameters, tokens, active)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_evaluate_only_reproduces_the_card(tmp_path):
    for path in bundled_path(NAME).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    script = SCRIPTS / "train_induction_2l.py"
    command = [sys.executable, str(script), "--evaluate-only", "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    again, card = json.loads((tmp_path / "card.json").read_text()), load_model_card(NAME)
    assert again["performance"]["induction"] == pytest.approx(
        card["performance"]["induction"], abs=1e-3
    )
    assert [head["label"] for head in again["heads"]] == [head["label"] for head in card["heads"]]


def native_parameters(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The shipped parameters under the names and shapes of TransformerLens' native modules."""
    native = {
        "tok_embed.weight": parameters["embed.W_E"],
        "pos.weight": parameters["pos_embed.W_pos"],
        "ln_out.weight": parameters["ln_final.w"],
        "ln_out.bias": parameters["ln_final.b"],
        "head.weight": parameters["unembed.W_U"].T,
        "head.bias": parameters["unembed.b_U"],
    }
    for layer in range(2):
        block, native_block = f"blocks.{layer}", f"layers.{layer}"
        native[f"{native_block}.ln1.weight"] = parameters[f"{block}.ln1.w"]
        native[f"{native_block}.ln1.bias"] = parameters[f"{block}.ln1.b"]
        for role in "QKV":
            linear = f"{native_block}.attn.{role.lower()}"
            weight = parameters[f"{block}.attn.W_{role}"]
            native[f"{linear}.weight"] = weight.transpose(1, 2).flatten(0, 1)
            native[f"{linear}.bias"] = parameters[f"{block}.attn.b_{role}"].flatten()
        native[f"{native_block}.attn.o.weight"] = parameters[f"{block}.attn.W_O"].flatten(0, 1).T
        native[f"{native_block}.attn.o.bias"] = parameters[f"{block}.attn.b_O"]
    return native


def test_transformer_lens_gives_the_same_logits(scripts, parameters, held_out):
    pytest.importorskip("transformer_lens")
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    shape = load_model_card(NAME)["architecture"]
    sizes = {key: shape[key] for key in ("n_layers", "n_heads", "d_model", "d_head", "n_ctx")}
    bridge = TransformerBridge.boot_native(
        TransformerBridgeConfig(
            **sizes,
            d_vocab=shape["d_vocab"],
            attn_only=True,
            normalization_type="LN",
            eps=scripts.model.LN_EPS,
        )
    )
    targets = {
        name.replace("._original_component", ""): tensor
        for name, tensor in bridge.original_model.state_dict().items()
    }
    with torch.no_grad():
        for name, tensor in native_parameters(parameters).items():
            targets[name].copy_(tensor)
        bridge.eval()
        tokens = held_out[0].tokens[:8]
        expected, patterns = scripts.model.forward(parameters, tokens)
        logits, cache = bridge.run_with_cache(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for layer, pattern in enumerate(patterns):
        cached = cache[f"blocks.{layer}.attn.hook_pattern"]
        torch.testing.assert_close(cached, pattern, atol=1e-5, rtol=1e-4)
        for role in "QKVO":
            mine = parameters[f"blocks.{layer}.attn.W_{role}"]
            torch.testing.assert_close(getattr(bridge.blocks[layer].attn, f"W_{role}"), mine)
