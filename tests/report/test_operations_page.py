from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from pages import Tables, summary_of, words_of
from safetensors.numpy import load_file, save_file

import skhead
from skhead._report import operation_section
from skhead._report.operations import LARGEST_Q, LEAST_LIFT
from skhead.datasets import bundled_path, list_operations
from skhead.exceptions import SourceNotFoundError, UnsupportedLayoutError
from skhead.operations import OperationMapper
from skhead.report import write_report

MODEL = "skhead/induction-2l"
#: The model copies tokens 2 to 65; the second operation asks for the token after.
OPERATIONS = {
    "token_copying": [(token, token) for token in range(2, 66)],
    "next_token": [(token, 2 + (token - 1) % 64) for token in range(2, 66)],
    "tiny": [(2, 3), (4, 5)],
}
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}
FAST = {"composition": False, "cards": False}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(MODEL, tmp_path_factory.mktemp("report"), operations=OPERATIONS)


@pytest.fixture(scope="module")
def mapper():
    used = {name: pairs for name, pairs in OPERATIONS.items() if name != "tiny"}
    return OperationMapper(used, source_embedding="raw").fit(skhead.load_heads(MODEL))


@pytest.fixture
def texted(tmp_path):
    """The bundled model with texts for its tokens: words, and some countries and capitals."""
    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copy(bundled_path(MODEL) / "model.safetensors", directory)
    size = len(load_file(directory / "model.safetensors")["embed.W_E"])
    texts = [f" {word}" for pair in CAPITALS.items() for word in pair]
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts += [" w" + letters[i % 26] + letters[i // 26] for i in range(size - len(texts))]
    (directory / "tokens.json").write_text(json.dumps(texts))
    return directory


def section_of(page):
    """Markup of the section on operations."""
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<section id="operations".*?</section>', text, flags=re.S)
    return found.group(0) if found else ""


def test_scores_are_those_of_the_mapper_in_every_file(page, mapper):
    heads = pd.read_csv(page.with_name("heads.csv"), index_col="label")
    for kind, table in (("score", mapper.scores_), ("lift", mapper.lift_), ("q", mapper.q_)):
        assert set(table) == {"token_copying", "-token_copying", "next_token", "-next_token"}
        for column in table:
            shown = heads[f"operation_{kind}_{column}"]
            atol = 0 if kind == "q" else 5.1e-7
            np.testing.assert_allclose(shown, table[column], rtol=1e-9 * (kind == "q"), atol=atol)
    for name, sides in summary_of(page)["operations"]["operations"].items():
        for key, sign in (("carried_out", ""), ("suppressed", "-")):
            lift = mapper.lift_[sign + name]
            order = lift[lift > 0].sort_values(ascending=False, kind="stable").index[:8]
            assert [row["head"] for row in sides[key]["top"]] == order.tolist()
            for row in sides[key]["top"]:
                ranks = mapper.rank_of_target_[sign + name][lift.index.get_loc(row["head"])]
                assert row["median_rank"] == np.median(ranks)
                assert row["auc"] == mapper.auc_.at[row["head"], sign + name]
            null = mapper.null_expectation_[sign + name]
            assert sides[key]["mean_null"] == pytest.approx(null.mean())


def test_score_of_the_copying_head_equals_the_dense_circuit(page):
    tensors = load_file(bundled_path(MODEL) / "model.safetensors")
    value, output = (tensors[f"blocks.1.attn.W_{role}"][1].astype(float) for role in "VO")
    logits = tensors["embed.W_E"][2:66].astype(float) @ value @ output @ tensors["unembed.W_U"]
    first = logits.argmax(axis=1) == np.arange(2, 66)
    best = summary_of(page)["operations"]["operations"]["token_copying"]["carried_out"]["top"][0]
    assert best["head"] == "L1H1"
    assert best["score"] == first.mean() > 0.9


def test_cards_and_words_say_what_reaches_both_limits(page, mapper):
    text = page.read_text(encoding="utf-8")
    cards = dict(
        re.findall(r'<details class="card" id="([^"]*)">(.*?)</details>', text, flags=re.S)
    )
    told = summary_of(page)["operations"]["operations"]
    for sign, key, verb in (("", "carried_out", "carries out"), ("-", "suppressed", "suppresses")):
        for name in ("token_copying", "next_token"):
            reached = (mapper.lift_ >= LEAST_LIFT) & (mapper.q_ <= LARGEST_Q)
            expected = set(mapper.lift_.index[reached[sign + name]])
            assert set(told[name][key]["heads"]) == expected
            assert {head for head, card in cards.items() if f"{verb} {name}" in card} == expected
    assert told["token_copying"]["carried_out"]["heads"] == ["L1H1"]
    assert told["token_copying"]["suppressed"]["heads"]
    words = words_of(page)
    assert "Heads carry out token_copying (1, most of all L1H1)." in words
    assert f"(at least {LEAST_LIFT})" in cards["L1H1"]
    assert f"(at most {LARGEST_Q})" in cards["L1H1"]


def test_tables_list_every_operation_and_why_one_is_left_out(page):
    tables = Tables(page).tables
    rows = {row[0]: row[1:] for row in tables["operation-table"][1:]}
    assert list(rows) == list(OPERATIONS)
    assert rows["token_copying"][:6] == ["64", "64", "0", "0", "64", "1"]
    assert rows["token_copying"][7] == "L1H1"
    assert rows["token_copying"][-1] == ""
    assert rows["tiny"][:2] == ["2", "2"]
    assert rows["tiny"][-1] == "fewer than 30"
    best = tables["operation-0-carried_out"][1]
    assert best[0] == "L1H1"
    assert float(best[3]) == pytest.approx(float(best[1]) - float(best[2]))
    assert "operation-2-carried_out" not in tables


def test_page_has_four_maps_of_each_operation_and_nothing_undefined(page):
    section = section_of(page)
    assert section.count("<figure") == section.count('data-values="') == 8
    assert section.count("<details") == 2
    assert "nan" not in re.sub(r"<[^>]*>", " ", section).lower()
    assert "http" not in section
    assert page.stat().st_size < 3_000_000


def test_missing_block_is_told_without_directories(page):
    told = summary_of(page)["operations"]
    (remark,) = told["remarks"]
    assert remark.startswith("All heads are taken to read embeddings: model.safetensors: the first")
    assert told["settings"]["source_embedding"] == "raw"
    assert "read as its embedding, into" in words_of(page)


def test_off_by_default(tmp_path):
    page = write_report(MODEL, tmp_path, **FAST)
    assert summary_of(page)["operations"] is None
    assert section_of(page) == ""
    assert "operation_" not in page.with_name("heads.csv").read_text()


def test_large_models_have_maps_without_readouts(tmp_path, monkeypatch):
    monkeypatch.setattr(operation_section, "_MOST_READ_OUT", 31)
    section = section_of(write_report(MODEL, tmp_path, operations=OPERATIONS, **FAST))
    assert section.count("<figure") == 8
    assert "data-values" not in section


def test_everything_with_the_texts_beside_the_model(texted, tmp_path):
    page = write_report(texted, tmp_path / "out", operations="all", **FAST)
    told = summary_of(page)["operations"]
    assert set(told["counts"]) == {*list_operations(), "token_copying"}
    assert told["counts"]["country_to_capital"]["n_kept"] == len(CAPITALS)
    assert list(told["operations"]) == ["token_copying"]
    assert any("exact match with the texts in tokens.json" in text for text in told["remarks"])
    rows = [row[0] for row in Tables(page).tables["operation-table"][1:]]
    without = words_of(page).split("No pair of single tokens is left of: ")[1].split(".")[0]
    assert "country_to_capital" in rows
    assert sorted([*rows, *without.split(", ")]) == sorted(told["counts"])


def test_names_paths_and_tokenizers_give_the_same(texted, tmp_path):
    texts = json.loads((texted / "tokens.json").read_text())
    records = tmp_path / "tokens.json"
    records.write_text(json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)]))
    (texted / "tokens.json").unlink()
    table = tmp_path / "own.csv"
    words = [text.strip() for text in texts if text.startswith(" w")]
    rows = pd.DataFrame({"operation": "token_copying", "source": words, "target": words})
    rows.to_csv(table, index=False)

    def scores(operations, tokenizer):
        page = write_report(
            texted, tmp_path / "out", operations=operations, tokenizer=tokenizer, **FAST
        )
        return summary_of(page)["operations"]["operations"]

    ids = {text: [i] for i, text in enumerate(texts)}
    by_name = scores("token_copying", records)
    assert by_name == scores(["token_copying"], records)
    assert by_name == scores(table, lambda text: ids.get(text, []))
    assert by_name == scores({"token_copying": [(w, w) for w in words]}, str(tmp_path))


def test_estimator_brings_settings_of_its_own(tmp_path):
    own = OperationMapper(OPERATIONS, source_embedding="raw", min_pairs=2, k=3)
    page = write_report(MODEL, tmp_path, operations=own, **FAST)
    told = summary_of(page)["operations"]
    assert list(told["operations"]) == list(OPERATIONS)
    assert told["settings"]["k"] == [3]
    assert told["remarks"] == []
    assert not hasattr(own, "scores_")


@pytest.mark.parametrize(
    "operations,error,message",
    [
        ("no_such", ValueError, "'no_such' is neither a path nor one of all, adj_antonym"),
        ("", ValueError, "operations: is empty"),
        (3, TypeError, "must be 'all', names, a path, a mapping .* got int"),
        ({"a": [(2, 3)]}, ValueError, "no operation keeps 30 pairs"),
        (
            OperationMapper(OPERATIONS, source_embedding="raw", k=[1, 2]),
            ValueError,
            "one k and one copying_k; got \\(1, 2\\)",
        ),
    ],
)
def test_bad_operations_are_refused(texted, tmp_path, operations, error, message):
    with pytest.raises(error, match=message):
        write_report(texted, tmp_path / "out", operations=operations, **FAST)
    assert not (tmp_path / "out").exists()


def test_words_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(SourceNotFoundError, match=r"none of tokenizer\.json.*beside skhead/ind"):
        write_report(MODEL, tmp_path, operations="all")
    with pytest.raises(SourceNotFoundError, match="no-such-place holds neither"):
        write_report(MODEL, tmp_path, operations="all", tokenizer="no-such-place")


def test_list_of_texts_must_name_every_token(texted, tmp_path):
    (texted / "tokens.json").write_text(json.dumps([{"id": 1, "text": "a"}]))
    with pytest.raises(ValueError, match=r"tokens\.json must be a list of the texts of all"):
        write_report(texted, tmp_path, operations="all")


def test_model_without_embedding_is_refused(tmp_path):
    tensors = load_file(bundled_path(MODEL) / "model.safetensors")
    path = tmp_path / "model.safetensors"
    save_file({name: t for name, t in tensors.items() if name != "unembed.W_U"}, path)
    with pytest.raises(UnsupportedLayoutError, match="unembed"):
        write_report(path, tmp_path / "out", operations=OPERATIONS)


@pytest.mark.slow
def test_page_of_gpt2_shape_with_many_operations_stays_small(tmp_path):
    rng = torch.Generator().manual_seed(0)
    shapes = {"Q": (12, 32, 4), "K": (12, 32, 4), "V": (12, 32, 4), "O": (12, 4, 32)}
    tensors = {
        f"blocks.{layer}.attn.W_{role}": torch.randn(shape, generator=rng).numpy()
        for layer in range(12)
        for role, shape in shapes.items()
    }
    tensors["embed.W_E"] = torch.randn(80, 32, generator=rng).numpy()
    tensors["unembed.W_U"] = torch.randn(32, 80, generator=rng).numpy()
    save_file(tensors, tmp_path / "model.safetensors")
    targets = torch.randint(80, (22, 40), generator=rng).tolist()
    pairs = {f"random_{i}": list(enumerate(row)) for i, row in enumerate(targets)}
    page = write_report(tmp_path / "model.safetensors", tmp_path / "out", operations=pairs)
    told = summary_of(page)["operations"]["operations"]
    assert len(told) == 22
    assert not any(side["heads"] for sides in told.values() for side in sides.values())
    assert "No head carries out or suppresses any of them." in words_of(page)
    assert page.stat().st_size < 3_000_000


def test_real_model_with_the_words_that_it_knows(models_dir, tmp_path):
    page = write_report(models_dir / "stories260k", tmp_path, operations="all")
    told = summary_of(page)["operations"]
    kept = {name: row["n_kept"] for name, row in told["counts"].items() if row["n_kept"]}
    assert kept["token_copying"] == 31
    assert list(told["operations"]) == ["token_copying"]
    assert told["settings"]["source_embedding"] == "mlp0"
    words = words_of(page)
    assert "what the first block's MLP makes of its embedding" in words
    assert " nan " not in words.lower()
