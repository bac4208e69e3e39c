"""Operations as word pairs: what they hold, where they come from, what a tokenizer leaves."""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from skhead.datasets._operations import (
    copying_operation,
    filter_operations,
    list_operations,
    load_operations,
)
from skhead.exceptions import SourceNotFoundError

PUBLISHED = json.loads(
    (Path(__file__).parents[1] / "data" / "maps_published.json").read_text(encoding="utf-8")
)
STORED = files("skhead.datasets").joinpath("operations")
LETTERS = ("word_first_letter", "word_last_letter", "word_to_capitalized")
#: Pairs, pairs that the GPT-2 tokenizer leaves, and distinct targets among these.
GPT2_COUNTS = {
    "adj_antonym": (214, 210, 209),
    "adj_comparative": (120, 64, 64),
    "adj_superlative": (120, 42, 42),
    "country_to_capital": (160, 38, 38),
    "country_to_nationality": (116, 63, 63),
    "country_to_official_language": (117, 64, 31),
    "english_to_french": (107, 20, 20),
    "english_to_german": (102, 23, 23),
    "english_to_spanish": (104, 8, 8),
    "item_to_following": (74, 74, 74),
    "name_copying": (155, 154, 154),
    "noun_plural": (167, 161, 161),
    "noun_to_pronoun": (89, 84, 4),
    "object_superclass": (186, 150, 20),
    "verb_past_tense": (180, 178, 178),
    "verb_present_participle": (138, 138, 138),
    "word_first_letter": (518, 518, 24),
    "word_last_letter": (518, 518, 19),
    "word_to_capitalized": (518, 471, 471),
    "word_to_homophone": (98, 84, 83),
    "year_to_following": (700, 133, 133),
}


def ids_of(known):
    """A tokenizer that knows some texts, and takes any other apart into letters."""
    numbers = {text: [i] for i, text in enumerate(known)}
    return lambda text: numbers.get(text, [1000 + ord(letter) for letter in text])


@pytest.mark.parametrize("name", list_operations())
def test_pairs_are_clean_and_every_source_has_one_answer(name):
    pairs = load_operations(names=name)[name]
    assert 70 <= len(pairs) <= 700
    assert all(word == word.strip() and word for pair in pairs for word in pair)
    assert len({source for source, _ in pairs}) == len(pairs)
    if name not in ("name_copying", "country_to_capital", *LETTERS):
        translation = name.startswith("english_to")
        assert translation or all(source != target for source, target in pairs)


def test_stored_files_are_the_listed_operations_and_are_documented():
    stored = {path.name[:-4] for path in STORED.iterdir() if path.name.endswith(".csv")}
    assert stored < set(list_operations())
    readme = STORED.joinpath("README.md").read_text(encoding="utf-8")
    assert set(list_operations()) <= set(re.findall(r"`(\w+)`", readme))
    assert "CC0" in readme


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("adj_antonym", "hot", "cold"),
        ("adj_comparative", "good", "better"),
        ("adj_superlative", "big", "biggest"),
        ("country_to_capital", "Australia", "Canberra"),
        ("country_to_nationality", "Netherlands", "Dutch"),
        ("country_to_official_language", "Brazil", "Portuguese"),
        ("english_to_french", "dog", "chien"),
        ("english_to_german", "dog", "Hund"),
        ("english_to_spanish", "dog", "perro"),
        ("item_to_following", "Monday", "Tuesday"),
        ("noun_plural", "child", "children"),
        ("noun_to_pronoun", "queen", "she"),
        ("object_superclass", "violin", "instrument"),
        ("verb_past_tense", "go", "went"),
        ("verb_present_participle", "run", "running"),
        ("word_first_letter", "dog", "d"),
        ("word_last_letter", "dog", "g"),
        ("word_to_capitalized", "dog", "Dog"),
        ("word_to_homophone", "sea", "see"),
        ("year_to_following", "1999", "2000"),
    ],
)
def test_facts(name, source, target):
    assert dict(load_operations(names=name)[name])[source] == target


def test_files_agree_with_each_other():
    operations = {name: dict(pairs) for name, pairs in load_operations().items()}
    comparative, superlative = operations["adj_comparative"], operations["adj_superlative"]
    assert comparative.keys() == superlative.keys()
    irregular = {word for word in comparative if comparative[word][:-2] != superlative[word][:-3]}
    assert irregular == {"good", "bad", "many"}
    past, participle = operations["verb_past_tense"], operations["verb_present_participle"]
    assert len(past.keys() & participle.keys()) > 120
    assert all(form.endswith("ing") for form in participle.values())
    languages, adjectives = (
        operations[f"country_to_{what}"] for what in ("official_language", "nationality")
    )
    assert sum(languages[country] == adjectives.get(country) for country in languages) > 30


def stem(word):
    """Of regular comparison: silent e, y after a consonant, one short vowel before a consonant."""
    if word.endswith("e"):
        return word[:-1]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "i"
    short = word[-2] in "aeiou" and word[-3] not in "aeiou" and word[-1] not in "aeiouwxy"
    return word + word[-1] if short and sum(letter in "aeiou" for letter in word) == 1 else word


def test_comparison_is_spelt_by_its_rules():
    operations = load_operations(names=["adj_comparative", "adj_superlative"])
    for name, ending in (("adj_comparative", "er"), ("adj_superlative", "est")):
        odd = {word for word, form in operations[name] if form != stem(word) + ending}
        assert odd <= {"good", "bad", "many", "little", "clever", "cruel", "narrow", "shallow"}


def test_years_and_letters_are_made_by_their_rules():
    operations = load_operations(names=["year_to_following", *LETTERS])
    assert all(int(b) == int(a) + 1 for a, b in operations["year_to_following"])
    assert all(word[0] == letter for word, letter in operations["word_first_letter"])
    assert all(word[-1] == letter for word, letter in operations["word_last_letter"])
    assert all(word.lower() == a for a, word in operations["word_to_capitalized"])


def test_gpt2_tokenizer_leaves_the_same_pairs_as_ever(gpt2_path):
    pytest.importorskip("tokenizers")
    counts = filter_operations(load_operations(), gpt2_path).counts
    found = counts[["n_pairs", "n_kept", "n_targets"]]
    assert dict(zip(found.index, found.itertuples(index=False, name=None), strict=True)) == (
        GPT2_COUNTS
    )
    too_few = {"english_to_french", "english_to_german", "english_to_spanish"}
    assert set(counts.index[~counts["used"]]) == too_few
    assert (counts["n_kept"] + counts["n_source_dropped"] <= counts["n_pairs"]).all()
    published = PUBLISHED["datasets"]["year_to_following"]
    assert GPT2_COUNTS["year_to_following"][:2] == (published["n_pairs"], published["gpt2"])


def test_token_ids_are_those_of_the_words_with_a_space(gpt2_path):
    tokenizers = pytest.importorskip("transformers")
    opened = tokenizers.GPT2TokenizerFast.from_pretrained(gpt2_path)
    found = filter_operations(load_operations(names=["adj_antonym", "noun_plural"]), opened)
    for name, pairs in found.operations.items():
        ids = found.token_ids[name]
        assert ids.dtype == np.int64 and ids.shape == (len(pairs), 2)
        words = [tuple(opened.decode([token]) for token in row) for row in ids.tolist()]
        assert words == [(f" {source}", f" {target}") for source, target in pairs]


def test_filter_counts_what_it_drops_and_why():
    tokenizer = ids_of([" a", " b", " c", "d"])
    pairs = [("a", "b"), ("a", "b"), ("b", "xx"), ("xx", "c"), ("xx", "yy"), ("c", "c"), ("d", "a")]
    found = filter_operations({"one": pairs, "few": pairs[:2]}, tokenizer, min_pairs=3)
    assert found.operations == {"one": [("a", "b"), ("a", "b"), ("c", "c")]}
    assert found.token_ids["one"].tolist() == [[0, 1], [0, 1], [2, 2]]
    assert found.counts.loc["one"].to_dict() == {
        "n_pairs": 7,
        "n_kept": 3,
        "n_source_dropped": 3,
        "n_target_dropped": 2,
        "n_targets": 2,
        "used": True,
    }
    assert not found.counts.loc["few", "used"] and found.counts.loc["few", "n_kept"] == 2


def test_without_a_leading_space_other_tokens_are_asked_for():
    tokenizer = ids_of([" a", " b", "a", "b"])
    found = [
        filter_operations({"x": [("a", "b")]}, tokenizer, leading_space=space, min_pairs=1)
        for space in (True, False)
    ]
    assert [f.token_ids["x"].tolist() for f in found] == [[[0, 1]], [[2, 3]]]


def test_thirty_pairs_are_enough_and_twenty_nine_are_not():
    tokenizer = ids_of([f" w{i}" for i in range(30)])
    pairs = [(f"w{i}", f"w{29 - i}") for i in range(30)]
    found = filter_operations({"enough": pairs, "short": pairs[1:]}, tokenizer)
    assert list(found.operations) == ["enough"]


def test_copying_takes_whole_words_in_the_order_of_ids(gpt2_path):
    pytest.importorskip("tokenizers")
    texts = [" of", " the", "ing", " House", " house", " ex1", " the", " dog"]
    assert copying_operation(texts, 2) == [("the", "the"), ("house", "house")]
    assert copying_operation(dict(enumerate(texts)), min_letters=4) == [("house", "house")]
    pairs = copying_operation(gpt2_path)
    found = filter_operations({"copying": pairs}, gpt2_path)
    assert found.counts.loc["copying", "n_kept"] == len(pairs) == 500
    ids = found.token_ids["copying"]
    assert (ids[:, 0] == ids[:, 1]).all() and (np.diff(ids[:, 0]) > 0).all()


def test_operations_of_stories260k(models_dir):
    """A vocabulary of 512 tokens holds few words, but copying, letters and series."""
    entries = json.loads((models_dir / "stories260k" / "tokens.json").read_text(encoding="utf-8"))
    texts = [entry.get("text", "") for entry in entries]
    numbers = {text: [token] for token, text in reversed(list(enumerate(texts)))}
    copying = copying_operation(texts)
    found = filter_operations(
        {"copying": copying, **load_operations()},
        lambda text: numbers.get(text, list(text.encode())),
        min_pairs=5,
    )
    assert {name: len(pairs) for name, pairs in found.operations.items()} == {
        "copying": 31,
        "item_to_following": 15,
        "word_first_letter": 8,
        "word_last_letter": 8,
    }
    for name, pairs in found.operations.items():
        words = [tuple(texts[token] for token in row) for row in found.token_ids[name]]
        assert words == [(f" {source}", f" {target}") for source, target in pairs]


def checkout(path, content):
    for name, rows in content.items():
        file = path / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


def test_a_checkout_is_read_from_its_root_or_its_datasets(tmp_path):
    root = checkout(
        tmp_path,
        {
            "datasets/capital/capital": [["Perú", "Lima"], ["Cuba", "Havana"]],
            "datasets/years/years": [["1", "2"]],
            "results/other": [["not", "read"]],
        },
    )
    expected = {"capital": [("Perú", "Lima"), ("Cuba", "Havana")], "years": [("1", "2")]}
    assert load_operations(root) == load_operations(str(root / "datasets")) == expected
    assert load_operations(root, names="years") == {"years": [("1", "2")]}
    assert load_operations(root / "datasets" / "years") == {"years": [("1", "2")]}


def test_a_table_is_read_in_its_order(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('source,target,operation\nb,c,x\na,b,x\n"p, q",r,y\n', encoding="utf-8")
    assert load_operations(path) == {"x": [("b", "c"), ("a", "b")], "y": [("p, q", "r")]}


def test_maps_checkout_leaves_the_published_counts(gpt2_path):
    pytest.importorskip("tokenizers")
    path = os.environ.get("SKHEAD_MAPS")
    if not path:
        pytest.skip("no MAPS checkout: set SKHEAD_MAPS to the path of one")
    counts = filter_operations(load_operations(path), gpt2_path).counts
    for name, known in PUBLISHED["datasets"].items():
        assert counts.loc[name, "n_pairs"] == known["n_pairs"], name
        assert counts.loc[name, "n_kept"] == known["gpt2"], name
    assert counts["used"].sum() == 18


def test_published_tables_agree_with_each_other():
    for name, row in PUBLISHED["models"]["gpt2-xl"].items():
        assert row["n_pairs"] == PUBLISHED["datasets"][name]["gpt2"]
        exact = PUBLISHED["r_without_context_six_decimals"]["gpt2-xl"][name]
        assert row["r_without_context"] == pytest.approx(exact, abs=0.0051)
    for model, means in PUBLISHED["means"].items():
        rows = PUBLISHED["models"][model].values()
        for part in ("r_without_context", "r_with_context"):
            promoted = np.mean([row[part] for row in rows])
            suppressed = np.mean([row["suppression"][part] for row in rows])
            assert promoted == pytest.approx(means[part], abs=0.003)
            assert suppressed == pytest.approx(means[f"suppression_{part}"], abs=0.003)
    counts = {model: len(rows) for model, rows in PUBLISHED["models"].items()}
    assert list(counts.values()) == [18, 15, 15, 19, 19]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({}, SourceNotFoundError, "holds no JSON file.*MAPS checkout"),
        ({"a": "[["}, ValueError, "a.json is no JSON"),
        ({"a": {"x": "y"}}, ValueError, "a.json must hold a list of"),
        ({"a": []}, ValueError, "a.json: holds no pairs"),
        ({"a": [["x", "y"], ["x"]]}, ValueError, r"a.json: row 1 must be a pair.*\['x'\]"),
        ({"a": [["x", 3]]}, ValueError, "a.json: row 0 must be a pair of words"),
        ({"a": [["x", " "]]}, ValueError, "a.json: row 0 must be a pair of words"),
        ({"b/a": [["x", "y"]], "c/a": [["x", "y"]]}, ValueError, "are of one name"),
    ],
)
def test_directories_that_cannot_be_read(tmp_path, content, error, message):
    with pytest.raises(error, match=message):
        load_operations(checkout(tmp_path, content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column operation, source, target"),
        ("operation,source\nx,y\n", "has no column target.*operation, source"),
        ("operation,source,target\n", "holds no rows"),
        ("operation,source,target\nx,y\n", r"mine.csv, x: row 0 must be a pair.*None"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_operations(path)


def test_unknown_names_and_paths():
    with pytest.raises(ValueError, match="no operation is named 'capitals'; .*country_to_capital"):
        load_operations(names=["country_to_capital", "capitals"])
    with pytest.raises(ValueError, match="names is empty"):
        load_operations(names=[])
    with pytest.raises(SourceNotFoundError, match="/nowhere does not exist"):
        load_operations("/nowhere")


@pytest.mark.parametrize(
    ("operations", "options", "message"),
    [
        ({}, {}, "at least one operation"),
        ([("a", "b")], {}, "must be a mapping"),
        ({"x": []}, {}, "operation 'x': holds no pairs"),
        ({"x": ["ab"]}, {}, "operation 'x': row 0 must be a pair of words, got 'ab'"),
        ({"x": [("a", "b")]}, {"min_pairs": 0}, "min_pairs must be an integer of at least 1"),
    ],
)
def test_filter_refuses(operations, options, message):
    with pytest.raises(ValueError, match=message):
        filter_operations(operations, len, **options)


def test_copying_refuses():
    with pytest.raises(ValueError, match="none of the 2 texts is a space and 3 or more small"):
        copying_operation(["the", " of"])
    with pytest.raises(ValueError, match="n_pairs must be an integer of at least 1; got 0"):
        copying_operation([" the"], 0)
    with pytest.raises(TypeError, match="copying_operation: the vocabulary must be listed"):
        copying_operation(len)
