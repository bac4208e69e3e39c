"""Scores of behaviour against naive loops, uniform attention and models whose heads are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from toys import random_weights, registered

import skhead
from skhead.behaviour import BEHAVIOURS, label_heads
from skhead.datasets import load_head_classes, load_head_zoo
from skhead.exceptions import CheckpointError, UnsupportedLayoutError
from skhead.weights import running

pytest.importorskip("transformer_lens")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = "skhead/induction-2l"
TEXT = [[64, 5, 9, 5, 9, 9, 2, 5, 1], [3, 3, 7, 3], [8, 1, 8, 2, 8, 1, 8, 2, 6, 8, 1, 6]]


def whole_model(attention, n_vocab=30, n_ctx=24, seed=1):
    """Attention weights with embeddings around them, as a model that runs."""
    generator = torch.Generator().manual_seed(seed)
    d_model = attention["blocks.0.attn.W_Q"].shape[1]
    return attention | {
        "embed.W_E": torch.randn(n_vocab, d_model, generator=generator),
        "pos_embed.W_pos": torch.randn(n_ctx, d_model, generator=generator),
        "unembed.W_U": torch.randn(d_model, n_vocab, generator=generator),
    }


def patterns_of(bridge, sequence):
    """Attention ``(layer, head, query, key)`` of one sequence."""
    _, cache = bridge.run_with_cache(torch.tensor([sequence]))
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]
    return torch.stack([cache[name][0] for name in names]).detach().numpy()


def naive_targets(tokens, i):
    return {
        "previous_token": [i - 1],
        "duplicate_token": [j for j in range(i) if tokens[j] == tokens[i]],
        "induction": [j for j in range(1, i) if tokens[j - 1] == tokens[i]],
        "first_token": [0],
        "current_token": [i],
    }


def test_scores_are_mean_attention_to_the_targets():
    bridge = running.open_bridge(BUNDLED)
    values = {name: [] for name in BEHAVIOURS}
    uniform = {name: [] for name in BEHAVIOURS}
    for tokens in TEXT:
        pattern = patterns_of(bridge, tokens)
        for i in range(2, len(tokens)):
            for name, keys in naive_targets(tokens, i).items():
                if keys:
                    values[name].append(pattern[:, :, i, keys].sum(-1).ravel())
                    uniform[name].append(len(keys) / (i + 1))
    table = label_heads(BUNDLED, TEXT, n_sequences=0)
    for name in BEHAVIOURS:
        np.testing.assert_allclose(table[name], np.mean(values[name], axis=0), atol=1e-5)
        assert table.attrs["chance"][name] == pytest.approx(np.mean(uniform[name]))
        assert table.attrs["observations"][name] == len(values[name])


def test_heads_that_attend_to_all_alike_score_chance():
    weights = random_weights(n_layers=2, n_heads=3)
    for layer in range(2):
        weights[f"blocks.{layer}.attn.W_Q"] *= 0
    with registered(whole_model(weights)) as heads:
        table = label_heads(heads["source"].iloc[0], TEXT[1:], n_sequences=5)
    assert table.index.equals(heads.index)
    scores = table.drop(columns="label")
    assert scores.columns.tolist()[0] == "repeated:previous_token" and scores.shape == (6, 10)
    chance = np.tile(pd.Series(table.attrs["chance"])[scores.columns], (6, 1))
    np.testing.assert_allclose(scores, chance, atol=1e-6)
    assert set(table["label"]) == {"None"}


def test_labels_of_the_bundled_model_are_those_of_its_card():
    heads = skhead.load_heads(BUNDLED)
    table = label_heads(BUNDLED)
    expected = load_head_classes("induction-2l", heads)
    assert table["label"].tolist() == expected.tolist()
    assert table.index.equals(heads.index)
    assert pd.concat([heads, table], axis=1).shape == (16, 13)


def test_scores_on_the_sequences_of_the_card(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import induction_2l_card

    sequences = torch.cat([batch.tokens for batch in induction_2l_card.held_out_batches(512)])
    table = label_heads(BUNDLED, sequences, n_sequences=0)
    card = skhead.datasets.load_model_card(BUNDLED)
    for ours, theirs in (
        ("previous_token", "previous_token"),
        ("first_token", "first_token"),
        ("current_token", "self"),
    ):
        measured = [head["attention"][theirs] for head in card["heads"]]
        np.testing.assert_allclose(table[ours], measured, atol=0.005)
        assert table.attrs["chance"][ours] == pytest.approx(
            card["uniform_attention"][theirs], abs=1e-4
        )


def test_labels_of_the_zoo_are_those_of_its_card():
    zoo = load_head_zoo()
    for source, heads in zoo.heads.groupby("source", sort=False):
        rows = (zoo.heads["source"] == source).to_numpy()
        table = label_heads(source, n_sequences=256)
        assert table.index.tolist() == heads.index.tolist()
        scores = zoo.scores[rows][list(BEHAVIOURS)].to_numpy()
        np.testing.assert_allclose(table[list(BEHAVIOURS)], scores, atol=0.03)
        clear = (np.abs(scores - 0.5) > 0.03).all(axis=1)
        assert (table["label"][clear] == zoo.target[rows][clear]).all()


@pytest.mark.parametrize("name", ["loose", "perfect"])
def test_models_of_one_head_per_layer(models_dir, name):
    table = label_heads(models_dir / "induction-1head" / f"{name}.safetensors")
    assert table["label"].to_dict() == {"L0H0": "Previous Token", "L1H0": "Induction"}
    assert table.loc["L1H0", "induction"] > 5 * table.attrs["chance"]["induction"]


def test_previous_token_heads_of_a_language_model(models_dir):
    source = str(models_dir / "stories260k")
    pieces = json.loads((models_dir / "stories260k" / "tokens.json").read_text())
    words = [piece["id"] for piece in pieces if piece["id"] > 258]  # before: single bytes
    table = label_heads(source, vocabulary=words)
    leading = table["previous_token"].sort_values(ascending=False)
    assert leading.index[:5].tolist() == ["L3H6", "L1H3", "L1H6", "L1H5", "L2H0"]
    assert table.index[table["label"] == "Previous Token"].tolist() == ["L1H3", "L1H6", "L3H6"]
    assert table["induction"].max() < 0.1


@pytest.mark.parametrize("name", ["previous_token", "duplicate_token", "induction"])
def test_relation_to_the_detector_of_transformer_lens(name):
    from transformer_lens.head_detector import detect_head

    bridge = running.open_bridge(BUNDLED)
    tokens = [64, *range(10, 30), *range(10, 30)]
    model = SimpleNamespace(
        cfg=bridge.cfg,
        to_tokens=lambda _: torch.tensor([tokens]),
        run_with_cache=bridge.run_with_cache,
    )
    share = detect_head(model, "sequence", f"{name}_head").detach().numpy().ravel()
    table = label_heads(bridge, [tokens], n_sequences=0)
    paid = share * len(tokens)  # all the attention that there is, times the share on targets
    if name == "previous_token":
        paid = paid - patterns_of(bridge, tokens)[:, :, 1, 0].ravel()
    observations = table.attrs["observations"][name]
    np.testing.assert_allclose(table[name] * observations, paid, atol=1e-4)


def small_gpt2(**settings):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=12, n_positions=20, **settings
    )
    return transformers.GPT2LMHeadModel(config)


def watched(bridge, monkeypatch):
    """Everything that the bridge is run on."""
    seen = []
    run = bridge.run_with_hooks

    def record(tokens, **settings):
        seen.append(tokens)
        return run(tokens, **settings)

    monkeypatch.setattr(bridge, "run_with_hooks", record)
    return seen


def test_random_blocks_come_twice_behind_the_first_token(monkeypatch):
    bridge = running.open_bridge(small_gpt2(bos_token_id=3, eos_token_id=[4, 5]))
    seen = watched(bridge, monkeypatch)
    table = label_heads(bridge, n_sequences=6, length=8)
    tokens = torch.cat(seen)
    assert tokens.shape == (6, 17) and (tokens[:, 0] == 3).all()
    assert torch.equal(tokens[:, 1:9], tokens[:, 9:])
    drawn = tokens[:, 1:9].sort(dim=1).values
    assert (drawn.diff(dim=1) > 0).all()  # without replacement
    assert not set(drawn.flatten().tolist()) & {3, 4, 5}
    assert table.index.tolist() == ["L0H0", "L0H1", "L1H0", "L1H1"]
    seen.clear()
    label_heads(bridge, n_sequences=3, bos_token=None, vocabulary=[7, 9], length=10)
    assert seen[0].shape == (3, 20) and set(seen[0].flatten().tolist()) == {7, 9}


def test_the_seed_decides_and_batches_do_not(monkeypatch):
    bridge = running.open_bridge(BUNDLED)
    table = label_heads(bridge, TEXT, n_sequences=7)
    pd.testing.assert_frame_equal(label_heads(bridge, TEXT, n_sequences=7), table)
    other = label_heads(bridge, TEXT, n_sequences=7, random_state=1)
    assert not np.allclose(other["repeated:induction"], table["repeated:induction"], atol=1e-4)
    monkeypatch.setattr(running, "_LOGIT_NUMBERS", 1)
    seen = watched(bridge, monkeypatch)
    alone = label_heads(bridge, TEXT, n_sequences=7)
    assert len(seen) == 10 and {len(batch) for batch in seen} == {1}
    np.testing.assert_allclose(alone.iloc[:, :-1], table.iloc[:, :-1], atol=1e-5)
    np.testing.assert_allclose(
        table["text:induction"], label_heads(bridge, TEXT, n_sequences=0)["induction"]
    )


def test_thresholds_decide_the_label():
    strict = label_heads(BUNDLED, thresholds={"previous_token": 0.8})
    assert set(strict.loc[strict["label"] != "None"].index) == {"L1H1"}
    none = label_heads(BUNDLED, thresholds={"induction": math.inf})
    assert none.loc["L1H1", "label"] == "None"
    low = label_heads(BUNDLED, thresholds={"first_token": 0.1, "induction": math.inf})
    assert low.loc["L1H1", "label"] == "First Token"
    both = label_heads(BUNDLED, thresholds={"first_token": 0.1})
    assert both.loc["L1H1", "label"] == "Induction"  # the higher of two that reach theirs
    assert both.attrs["thresholds"] == dict.fromkeys(BEHAVIOURS, 0.5) | {"first_token": 0.1}


def test_heads_that_see_later_tokens_too():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=8,
        vocab_size=20,
        max_position_embeddings=16,
    )
    module = transformers.BertForMaskedLM(config)
    with torch.no_grad():
        module.bert.encoder.layer[0].attention.self.query.weight.zero_()
        module.bert.encoder.layer[0].attention.self.query.bias.zero_()
    table = label_heads(module, [[3, 5, 3, 5, 7]], n_sequences=0)
    for name in BEHAVIOURS:
        np.testing.assert_allclose(table[name], table.attrs["chance"][name], atol=1e-6)
    assert table.attrs["chance"]["previous_token"] == pytest.approx(1 / 5)


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40
    )
    config.decoder_start_token_id = 0
    with pytest.raises(UnsupportedLayoutError, match="no single list of blocks"):
        label_heads(transformers.T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 32}, "length 32 does not fit twice .* context of 64 tokens; at most 31"),
        ({"length": 1}, "length must be an integer of at least 2; got 1"),
        ({"n_sequences": -1}, "n_sequences must be an integer of at least 0; got -1"),
        ({"n_sequences": 0}, "leave nothing to run on"),
        ({"vocabulary": [3]}, "vocabulary must hold at least two token ids"),
        ({"vocabulary": "all"}, "vocabulary must hold at least two token ids"),
        ({"vocabulary": [3, 99]}, "vocabulary holds token 99; the model's tokens are 0 to 67"),
        ({"vocabulary": [3, -1]}, "vocabulary holds token -1"),
        ({"bos_token": "<s>"}, "bos_token must be an integer of at least 0; got '<s>'"),
        ({"bos_token": 68}, "holds token 68"),
        ({"thresholds": {"copying": 0.1}}, "the unknown score 'copying'; the scores are"),
        ({"thresholds": {"induction": 0}}, "of induction must be a positive number, got 0"),
        ({"thresholds": {"induction": "0.5"}}, "of induction must be a positive number, got '0.5'"),
        ({"tokens": [[1, 2]]}, "label_heads: sequence 0 has 2 tokens; at least 3"),
    ],
)
def test_parameters_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        label_heads(BUNDLED, **settings)


def test_thresholds_without_names():
    with pytest.raises(TypeError, match="thresholds must map names of scores to numbers, got list"):
        label_heads(BUNDLED, thresholds=[0.5])


def test_attention_that_is_not_a_number_is_named():
    weights = random_weights(n_layers=2, n_heads=3)
    weights["blocks.1.attn.W_Q"][2] *= 1e38
    with (
        registered(whole_model(weights)) as heads,
        pytest.raises(ValueError, match="attention of L1H2 is NaN"),
    ):
        label_heads(heads["source"].iloc[0])


def test_a_model_that_lacks_tensors_is_refused(gpt2_path):
    with pytest.raises(CheckpointError, match=r"tensors of GPT2LMHeadModel are not stored"):
        label_heads(gpt2_path)
