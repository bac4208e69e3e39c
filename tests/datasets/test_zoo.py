"""The models of the zoo do what their card says, and their script makes what is shipped."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import skhead
from skhead.datasets import bundled_path, list_models, load_head_zoo, load_model_card

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PREFIX = "skhead/zoo/"
SOURCES = [name for name in list_models() if name.startswith(PREFIX)]
FEWER = 512
ASK, YES, NO = 65, 66, 67


@pytest.fixture(scope="module")
def zoo_scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield SimpleNamespace(
            model=importlib.import_module("zoo_model"),
            card=importlib.import_module("zoo_card"),
            train=importlib.import_module("train_zoo"),
        )


@pytest.fixture(scope="module")
def sequences(zoo_scripts):
    """Fewer held-out sequences than the card was measured on."""
    return zoo_scripts.card.held_out(FEWER, 64)


@pytest.fixture(scope="module")
def zoo():
    return load_head_zoo()


@pytest.fixture(scope="module")
def described(zoo_scripts):
    """The models of the script, by bundled name."""
    return {f"{PREFIX}{model.name}": model for model in zoo_scripts.model.ZOO}


def weights(source):
    stored = load_file(bundled_path(source) / "model.safetensors")
    return {name: tensor.float() for name, tensor in stored.items()}


def test_shipped_files_are_those_of_the_script(zoo_scripts, described):
    assert len(SOURCES) >= 8
    assert sorted(described) == SOURCES
    directory = bundled_path(SOURCES[0]).parent
    assert {path.name for path in directory.iterdir()} == {
        "README.md",
        "card.json",
        *(model.name for model in described.values()),
    }
    assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) < 6_000_000
    for source, model in described.items():
        files = {path.name: path for path in bundled_path(source).iterdir()}
        assert set(files) == {"config.json", "model.safetensors"}
        assert json.loads(files["config.json"].read_text()) == model.config


@pytest.mark.parametrize("source", SOURCES)
def test_file_is_float16_in_transformer_lens_names(zoo_scripts, described, source):
    with safe_open(bundled_path(source) / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"F16"}
    expected = zoo_scripts.model.initial_parameters(described[source])
    assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    count = sum(tensor.numel() for tensor in expected.values())
    assert load_model_card(source)["architecture"]["parameters"] == count


def test_models_differ_in_every_part_the_zoo_is_for(described):
    models = list(described.values())
    assert len({model.seed for model in models}) == len(models)
    assert {model.n_layers for model in models} == {2, 3}
    assert {model.rms for model in models} == {False, True}
    assert {model.d_mlp is None for model in models} == {False, True}
    families = Counter(model.family for model in models)
    assert set(families) == {"learned-attn", "learned-mlp", "rope-attn"}
    assert families["rope-attn"] >= 4


@pytest.mark.parametrize("source", SOURCES)
def test_model_does_what_its_card_says(zoo_scripts, described, sequences, source):
    model, card = described[source], load_model_card(source)
    here = zoo_scripts.card.measure_model(model, weights(source), card["steps"], sequences)
    for task, figures in card["performance"].items():
        assert here["performance"][task]["accuracy"] == pytest.approx(
            figures["accuracy"], abs=0.06
        ), task
    for head, shipped in zip(here["heads"], card["heads"], strict=True):
        assert head["attention"] == pytest.approx(shipped["attention"], abs=0.04), head["head"]
        assert zoo_scripts.card.label(shipped["attention"]) == shipped["label"]


@pytest.mark.parametrize("source", SOURCES)
def test_model_has_learnt_and_has_both_halves_of_induction(source):
    card = load_model_card(source)
    performance = card["performance"]
    assert performance["copy"]["accuracy"] > 0.98
    assert performance["repeated"]["accuracy"] > 0.98
    learnt = [performance[task]["accuracy"] > 0.9 for task in ("question", "look_up")]
    assert any(learnt)
    labels = {head["label"] for head in card["heads"]}
    assert {"Previous Token", "Induction"} <= labels


def test_zoo_is_aligned_to_its_heads_table(zoo):
    heads = zoo.heads
    assert list(heads["source"].unique()) == SOURCES
    for part in (zoo.target, zoo.groups, zoo.scores):
        assert part.index.equals(heads.index)
    card = zoo.card
    for row, (_, head) in enumerate(heads.iterrows()):
        name = head["source"].removeprefix(PREFIX)
        entry = card["models"][name]
        (own,) = [
            h for h in entry["heads"] if (h["layer"], h["index"]) == (head["layer"], head["head"])
        ]
        assert zoo.target.iloc[row] == own["label"]
        assert zoo.scores.iloc[row].to_dict() == own["attention"]
        assert name.startswith(zoo.groups.iloc[row])
    assert set(zoo.target) - {"None"} == set(zoo.target_names)
    assert zoo.DESCR.startswith("# skhead/zoo")


def test_zoo_as_features_and_classes(zoo):
    heads, target = load_head_zoo(return_X_y=True)
    pd.testing.assert_frame_equal(heads, zoo.heads)
    pd.testing.assert_series_equal(target, zoo.target)


def test_heads_of_all_models_are_one_sample(zoo):
    assert zoo.heads["d_model"].nunique() == zoo.heads["d_head"].nunique() == 1
    stack = skhead.load_weights(zoo.heads, role="O")
    assert tuple(stack.shape) == (len(zoo.heads), 64, 16)
    assert torch.isfinite(torch.as_tensor(stack)).all()


def test_card_of_a_model_holds_what_all_have_in_common(zoo):
    card = load_model_card(SOURCES[0])
    assert card["name"] == SOURCES[0]
    assert card["tokens"]["64"] == "bos"
    assert card["heads"] == zoo.card["models"][SOURCES[0].removeprefix(PREFIX)]["heads"]
    assert "models" not in card


def test_import_of_datasets_leaves_torch_alone():
    code = "import sys, skhead.datasets; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_is_written_from_the_card(zoo_scripts, zoo):
    assert zoo_scripts.card.readme(zoo.card) == zoo.DESCR
    assert "Licence of the weights: MIT" in " ".join(zoo.DESCR.split())


def test_sequences_hold_what_the_masks_say(zoo_scripts):
    model = zoo_scripts.model
    batch = model.sample_sequences(400, np.random.default_rng(3))
    tokens = batch.tokens.numpy()
    assert (tokens[:, 0] == model.BOS).all()
    counts = {task: int(mask.sum()) for task, mask in batch.tasks.items()}
    assert min(counts.values()) > 400
    assert torch.stack(list(batch.tasks.values())).sum(0).max() == 1
    for task, mask in batch.tasks.items():
        for row, at in zip(*np.nonzero(mask.numpy()), strict=True):
            before, word, answer = tokens[row, :at].tolist(), *tokens[row, at : at + 2].tolist()
            if task == "question":
                assert before[-1] == ASK
                assert answer == (YES if word in before else NO)
            elif task == "look_up":
                assert before[-1] == model.BEFORE
                assert answer == tokens[row, before.index(word) - 1]
            else:
                assert answer in {tokens[row, i + 1] for i, t in enumerate(before) if t == word}


@pytest.mark.parametrize("source", SOURCES)
def test_fast_and_full_forward_pass_agree(zoo_scripts, described, sequences, source):
    script, model, parameters = zoo_scripts.model, described[source], weights(source)
    tokens = sequences.tasks.tokens[::32]
    silent = torch.ones(model.n_layers, 1, script.N_HEADS)
    silent[0, 0, 1] = 0
    expected = script.logits(model, parameters, tokens, silent)
    actual, patterns = script.forward(model, parameters, tokens, silent)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(patterns.sum(-1), torch.ones_like(patterns[..., 0]))
    without = {name: tensor.clone() for name, tensor in parameters.items()}
    without["blocks.0.attn.W_O"][1] = 0
    plain = script.logits(model, without, tokens)
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)


def test_first_steps_of_training_repeat_exactly(zoo_scripts, described):
    short = zoo_scripts.train.Training(batch_size=8, most_steps=4, decay_steps=2)
    model = described[SOURCES[-1]]
    first, steps = zoo_scripts.train.train(model, short)
    second, _ = zoo_scripts.train.train(model, short)
    fresh = zoo_scripts.model.initial_parameters(model)
    assert steps == 4
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed.W_E"], fresh["embed.W_E"])


def test_rotation_depends_on_distance_alone(zoo_scripts, described):
    model = next(model for model in described.values() if model.rotary_base is not None)
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned_q = zoo_scripts.model.rotated(q.expand(20, -1), model)
    turned_k = zoo_scripts.model.rotated(k.expand(20, -1), model)
    scores = turned_q @ turned_k.T
    for offset in range(1, 8):
        diagonal = scores.diagonal(-offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert scores[5, 5] != pytest.approx(scores[6, 5])


@pytest.mark.slow
def test_evaluate_only_reproduces_the_card(tmp_path, zoo_scripts, zoo):
    directory = bundled_path(SOURCES[0]).parent
    name = SOURCES[0].removeprefix(PREFIX)
    for path in [*directory.glob("*.*"), *(directory / name).iterdir()]:
        copy = tmp_path / path.relative_to(directory)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    zoo_scripts.train.main(["--evaluate-only", "--only", name, "--output", str(tmp_path)])
    again = json.loads((tmp_path / "card.json").read_text())["models"][name]
    shipped = zoo.card["models"][name]
    assert [head["label"] for head in again["heads"]] == [h["label"] for h in shipped["heads"]]
    for task, figures in shipped["performance"].items():
        assert again["performance"][task] == pytest.approx(figures, abs=0.01)
