"""The script that decomposes heads of a model, run from end to end on small models."""

from __future__ import annotations

import json
import runpy
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import skhead
from skhead.datasets import load_prompt_words, make_category_prompts

pytest.importorskip("transformer_lens")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "decompose_heads.py"))
SHORT = "{items} {category}"
#: Not of the first layer, where neither letters nor the end of a prompt tell of objects.
HEADS = "L1H1,L1H3"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a small Llama with random weights, and a tokenizer of words and letters."""
    directory = tmp_path_factory.mktemp("llama")
    stored = load_prompt_words()
    words = [*stored["objects"], *chain.from_iterable(stored["categories"].values())]
    words += [*stored["categories"], "The", "is", "in", "Box", "Which", "box", "has", "the", "it"]
    texts = ["<s>", "?", *dict.fromkeys([*words, *"ABCDEFGHI.-:\n "])]
    vocabulary = {text: i for i, text in enumerate(texts)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    pattern = tokenizers.Regex(r"<s>|\w+|.|\n")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = transformers.LlamaConfig(
        vocab_size=len(texts), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(directory)
    return directory


def run(model, out, experiment, *more):
    arguments = [str(model), "--experiment", experiment, "--heads", HEADS, "--out", str(out)]
    assert SCRIPT["main"]([*arguments, *more]) == 0
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    features = pd.read_csv(out / "features.csv")
    return summary, features


def test_categories(model, tmp_path, capsys):
    sizes = ["--n-prompts", "20", "--n-held-out", "10", "--n-interventions", "4"]
    summary, features = run(model, tmp_path, "category", *sizes, "--template", SHORT)
    assert summary["run"]["n_prompts"] == 20 and summary["run"]["heads"] == HEADS.split(",")
    assert list(summary["heads"]) == HEADS.split(",")
    categories = list(load_prompt_words()["categories"])
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = make_category_prompts(tokenizer, 20, template=SHORT, random_state=0)
    for head, pairs in skhead.collect_qk(model, prompts, HEADS.split(",")).items():
        found = summary["heads"][head]
        fitted = skhead.ContrastiveQKDecomposer(per_class=True).fit(pairs)
        assert sorted(found["rank"]) == sorted(categories)
        assert found["rank"] == dict(zip(fitted.feature_names_, fitted.rank_.tolist(), strict=True))
        assert found["rank_of_union"] == len(fitted.union_key_components_)
        assert 0 <= found["auc"] <= 1 and found["d_head"] == 8
        own = features[features["head"] == head].set_index("feature")
        assert (own["n_pos"] == 20).all() and (own["n_neg"] == 80).all()
    swaps = pd.read_csv(tmp_path / "interventions.csv")
    assert set(swaps["condition"]) >= {"none", "all"} and (swaps["n_prompts"] == 4).all()
    none = swaps[swaps["condition"] == "none"]
    assert np.allclose(none["attention_original"], none["attention_original_before"])
    printed = capsys.readouterr().out
    assert "L1H3: rank of all features" in printed and "AUC on held-out prompts" in printed


@pytest.mark.parametrize("experiment", ["order", "lexical"])
def test_boxes(model, tmp_path, experiment):
    sizes = ["--n-prompts", "30", "--n-interventions", "3"]
    summary, features = run(model, tmp_path, experiment, *sizes)
    assert summary["run"]["n_held_out"] == 6
    assert (features["feature"] == experiment).all() and len(features) == 2
    assert (features["n_pos"] == 30).all()
    assert (features["n_neg"] == (30 * 8 if experiment == "order" else 30)).all()
    for found in summary["heads"].values():
        assert list(found["rank"]) == [experiment]
        assert found["rank_of_union"] <= found["rank"][experiment]
    swaps = pd.read_csv(tmp_path / "interventions.csv")
    assert (swaps["n_prompts"] == 3).all() and swaps["head"].nunique() == 2


def test_a_head_without_contrast_does_not_stop_the_others(model, tmp_path, capsys):
    sizes = ["--n-prompts", "30", "--n-interventions", "3", "--heads", "L0H0,L1H1"]
    summary, features = run(model, tmp_path, "lexical", *sizes)
    assert "makes no difference" in summary["heads"]["L0H0"]["error"]
    assert features["head"].tolist() == ["L1H1"]
    assert "L0H0: ContrastiveQKDecomposer: feature 'lexical'" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:ContrastiveQKDecomposer. pair_weighting='released'")
def test_settings_reach_the_prompts_and_the_decomposer(model, tmp_path):
    template = tmp_path / "template.txt"
    template.write_text(SHORT + "\n", encoding="utf-8")
    sizes = ["--n-prompts", "20", "--n-interventions", "0"]
    plain, _ = run(model, tmp_path / "plain", "category", *sizes, "--template", SHORT)
    again, _ = run(model, tmp_path / "again", "category", *sizes, "--template", str(template))
    assert plain["heads"] == again["heads"]
    assert not (tmp_path / "plain" / "interventions.csv").exists()
    for name, more in {
        "seed": ["--seed", "1"],
        "bos": ["--bos", "3"],
        "weighting": ["--pair-weighting", "released"],
        "template": [],
    }.items():
        changed = more if name == "template" else [*more, "--template", SHORT]
        other, _ = run(model, tmp_path / name, "category", *sizes, *changed)
        assert other["heads"] != plain["heads"], name


def test_chat_is_for_lists_and_needs_a_template(model, capsys):
    with pytest.raises(SystemExit):
        SCRIPT["main"]([str(model), "--experiment", "order", "--chat"])
    assert "--chat is for the experiment category" in capsys.readouterr().err
    with pytest.raises(TypeError, match="chat=True needs a Hugging Face tokenizer"):
        SCRIPT["main"]([str(model), "--experiment", "category", "--chat"])


def test_tokenizers_are_opened_with_their_special_tokens(model, tmp_path):
    opened = SCRIPT["open_tokenizer"](str(model))
    assert opened.encode("The").ids[0] == 0
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=opened, bos_token="<s>")
    made.save_pretrained(tmp_path)
    again = SCRIPT["open_tokenizer"](str(tmp_path))
    assert hasattr(again, "apply_chat_template")
    assert again.encode("The") == opened.encode("The").ids
    assert SCRIPT["open_tokenizer"](str(model.parent)) == str(model.parent)


def test_a_trained_model_and_a_tokenizer_of_512_tokens(models_dir, stories_tokenizer, tmp_path):
    more = ["--tokenizer", str(stories_tokenizer), "--bos", "1", "--n-prompts", "20"]
    more += ["--n-interventions", "2"]
    summary, _ = run(models_dir / "stories260k", tmp_path / "out", "order", *more)
    for found in summary["heads"].values():
        assert found["d_head"] == 8 and found["rank"]["order"] <= 8
        assert 0 < found["auc"] <= 1
