from __future__ import annotations

import json
import shutil

import pytest

import skhead
from skhead._report.scores import score_heads
from skhead._report.tokens import nearest_tokens, read_vocabulary
from skhead.datasets import bundled_path
from skhead.exceptions import UnsupportedLayoutError

MODEL = "skhead/induction-2l"


def test_bytes_come_back_from_the_letters_of_gpt2(tmp_path):
    # "Ġ" stands for a space and "Ċ" for a line feed; é is the two bytes 0xC3 0xA9, "Ã" and "©".
    words = {"Ġthe": 0, "Ã©": 1, "Ċ": 2, "<|end|>": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    texts = read_vocabulary(str(tmp_path), 4)
    assert texts == {0: " the", 1: "é", 2: "\n", 3: "<|end|>"}


def test_pieces_with_a_raised_bar_get_their_space(tmp_path):
    model = {"model": {"vocab": [["<unk>", 0.0], ["▁once", -1.0]]}}
    added = {"added_tokens": [{"id": 2, "content": "[SEP]"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model | added))
    assert read_vocabulary(str(tmp_path), 3) == {0: "<unk>", 1: " once", 2: "[SEP]"}


def test_files_lie_beside_a_model_of_one_file_too(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "model.safetensors").touch()
    assert read_vocabulary(str(tmp_path / "model.safetensors"), 2) == {0: "a", 1: "b"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{broken"),
        ("vocab.json", "[0]"),
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", '{"a": null}'),
        ("tokenizer.json", "[0]"),
        ("tokenizer.json", '{"model": {"vocab": [0]}}'),
        ("tokenizer.json", '{"added_tokens": [{}]}'),
    ],
)
def test_a_damaged_vocabulary_is_told_and_does_not_stop_the_report(name, content, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(bundled_path(MODEL), directory)
    (directory / name).write_text(content)
    with pytest.raises(UnsupportedLayoutError, match=f"{name} beside the model is damaged"):
        read_vocabulary(str(directory), 4)
    found = nearest_tokens(
        skhead.load_heads(directory), {"fold_norm": False, "center": False, "device": "cpu"}
    )
    assert found.refusal.startswith(f"{name} beside the model is damaged")


def test_lines_are_tokens(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n##ing\n")
    assert read_vocabulary(str(tmp_path), 2) == {0: "[PAD]", 1: "##ing"}


@pytest.mark.parametrize("n_tokens", [2, 3])
def test_a_vocabulary_of_another_model_is_not_taken(tmp_path, n_tokens):
    (tmp_path / "vocab.txt").write_text("a\nb\n" * 1 + "c\n" * (n_tokens - 2))
    assert read_vocabulary(str(tmp_path), 100) is None
    assert read_vocabulary("skhead/induction-2l", 68) is None


def test_large_vocabularies_are_left_to_the_estimators(monkeypatch):
    heads = skhead.load_heads("skhead/induction-2l")
    processing = {"fold_norm": False, "center": False, "device": None}
    monkeypatch.setattr("skhead._report.tokens.MOST_TOKENS", 67)
    found = nearest_tokens(heads, processing)
    assert found.lists == {}
    assert found.refusal == "its 68 tokens are more than the 67 that a page lists"
    monkeypatch.setattr("skhead._report.scores.MOST_TOKENS", 67)
    scored = score_heads(
        heads, across=False, composition=False, max_memory="1GiB", processing=processing
    )
    assert set(scored.missing) == {"ov_top1_self", "qk_top1_self"}
    assert "its 68 tokens are more than the 67" in scored.missing["ov_top1_self"]
    assert scored.table["ov_top1_self"].isna().all()
    assert scored.table.drop(columns=list(scored.missing)).notna().all(axis=None)
