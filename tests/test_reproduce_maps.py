"""The script that reproduces published figures, run from end to end on a small trained model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import skhead
from skhead._agreement import compare_scores
from skhead.dynamics import dynamic_scores
from skhead.operations import OperationMapper

pytest.importorskip("transformer_lens")
tokenizers = pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "reproduce_maps.py"))
TEMPLATES = ["Once upon a time there was a <X>", "They saw the <X>"]


@pytest.fixture(scope="module")
def stories(models_dir):
    return models_dir / "stories260k"


@pytest.fixture(scope="module")
def words(stories):
    entries = json.loads((stories / "tokens.json").read_text(encoding="utf-8"))
    texts = [e["text"] for e in entries]
    return [t[1:] for t in texts if t[:1] == " " and t[1:].isalpha() and t[2:]], set(texts)


@pytest.fixture(scope="module")
def operations(words, tmp_path_factory):
    """A CSV file of operations that 512 tokens can express."""
    listed, texts = words
    pairs = [("word_copying", word, word) for word in listed]
    pairs += [("word_first_letter", word, word[0]) for word in listed if f" {word[0]}" in texts]
    pairs += [("country_to_capital", "France", "Paris")]
    path = tmp_path_factory.mktemp("operations") / "operations.csv"
    pd.DataFrame(pairs, columns=["operation", "source", "target"]).to_csv(path, index=False)
    return path


def test_the_whole_run(stories, stories_tokenizer, operations, words, tmp_path, capsys):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"word_copying": "She said the <X>"}), encoding="utf-8")
    out = tmp_path / "table.csv"
    arguments = [
        str(stories),
        "--tokenizer",
        str(stories_tokenizer),
        "--operations",
        str(operations),
    ]
    arguments += ["--out", str(out), "--bos", "1", "--prompts", str(prompts), "--limit", "3"]
    for template in TEMPLATES:
        arguments += ["--template", template]
    assert SCRIPT["main"](arguments) == 0
    table = pd.read_csv(out, index_col="operation")
    assert table.index.tolist() == ["word_copying", "word_first_letter"]
    assert table["n_pairs"].tolist() == [61, 58]
    printed = capsys.readouterr().out
    assert "word_first_letter" in printed and "heads removed" in printed
    mapper = OperationMapper(
        {"word_first_letter": [(w, w[0]) for w in words[0] if f" {w[0]}" in words[1]]},
        stories_tokenizer,
    )
    static = mapper.fit_transform(skhead.load_heads(stories))
    pairs = mapper.token_ids_["word_first_letter"]
    encode = tokenizers.Tokenizer.from_file(str(stories_tokenizer / "tokenizer.json")).encode
    starts = [([1, *encode(template.removesuffix(" <X>")).ids], []) for template in TEMPLATES]
    found = compare_scores(static, dynamic_scores(stories, {"word_first_letter": pairs}, starts))
    row = table.loc["word_first_letter"]
    for sign in ("", "-"):
        own = found.loc[f"{sign}word_first_letter"]
        for context in ("without", "with"):
            assert row[f"{sign}r_{context}"] == pytest.approx(own.loc[context, "pearson"])
        assert row[f"{sign}max"] == static[f"{sign}word_first_letter"].max()
    assert row["n_heads"] == (static["word_first_letter"] > 0).sum()
    assert row["first_heads"].split()[0] in static.index
    curves = pd.read_csv(out.with_suffix(".ablation.csv"))
    assert set(curves["kind"]) == {"operation", "random"}
    assert curves["n_removed"].max() == 3 and (curves["n_prompts"] == 61).all()


def test_operations_of_the_package_that_a_small_vocabulary_holds(
    stories, stories_tokenizer, tmp_path
):
    out = tmp_path / "table.csv"
    arguments = [
        str(stories),
        "--tokenizer",
        str(stories_tokenizer),
        "--out",
        str(out),
        "--bos",
        "1",
    ]
    assert SCRIPT["main"]([*arguments, "--min-pairs", "2", "--template", TEMPLATES[0]]) == 0
    table = pd.read_csv(out, index_col="operation")
    assert len(table) >= 3 and (table["n_pairs"] >= 2).all()
    assert set(table.index) <= set(skhead.datasets._operations.list_operations())
    with pytest.raises(SystemExit, match="no operation keeps 400 pairs of single tokens"):
        SCRIPT["main"]([*arguments, "--min-pairs", "400"])


def test_published_figures_stand_beside():
    figures = {"n_pairs": 43, "max": 0.9, "r_without": 0.9, "r_with": 0.8, "n_heads": 148}
    figures |= {"-max": 0.7, "-r_without": 0.9, "-r_with": 0.8, "first_heads": "L0H0"}
    index = ["country_to_capital_wikidata", "adj_antonym", "year_to_nothing"]
    table = pd.DataFrame([figures] * 3, index=pd.Index(index, name="operation"))
    found = SCRIPT["beside_published"](table, "gpt2-xl")
    published = found.xs("published", axis=1, level=1).loc[index[0]]
    assert published[["n_pairs", "max", "r_without", "r_with"]].tolist() == [43, 0.98, 0.98, 0.88]
    assert published[["-max", "-r_without", "-r_with"]].tolist() == [0.72, 0.94, 0.8]
    assert published["first_heads"].startswith("L38H12 L24H4")
    assert pd.isna(found.loc["adj_antonym", ("n_heads", "published")])
    assert found.xs("published", axis=1, level=1).loc["year_to_nothing"].isna().all()
    assert found["max", "here"].tolist() == [0.9] * 3
    with pytest.raises(SystemExit, match="no figures were published for 'gpt2-tiny', but for gpt2"):
        SCRIPT["beside_published"](table, "gpt2-tiny")


def test_ablation_is_reported_where_nothing_is_left():
    kinds = ["operation"] * 4 + ["random"] * 4
    removed, draws = [0, 1, 2, 3, 1, 2, 1, 2], [0] * 6 + [1] * 2
    accuracy = [0.8, 0.3, 0.0, 0.1, 0.8, 0.7, 0.8, 0.5]
    curves = pd.DataFrame(
        {"kind": kinds, "operation": "x", "draw": draws, "n_removed": removed, "accuracy": accuracy}
    )
    row = SCRIPT["ablation_summary"](curves).loc["x"]
    assert row.tolist() == pytest.approx([2, 0.8, 0.0, 0.6])
    left = curves.assign(accuracy=curves["accuracy"] + 0.1)
    row = SCRIPT["ablation_summary"](left).loc["x"]
    assert row["heads removed"] == 3 and row["after"] == pytest.approx(0.2)
    assert np.isnan(row["random"])
