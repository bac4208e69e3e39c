"""Tokenizers of every make give the same ids and texts."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from skhead._tokenizers import as_encoder, as_vocabulary, tokenizer_size, vocabulary_texts
from skhead.exceptions import SourceNotFoundError, UnsupportedLayoutError

TEXTS = [" Paris", "hello world", " naïve café 1999", "\n\tx  y", "日本"]


@pytest.fixture
def word_level(tmp_path):
    """A small tokenizer in the file format of the library, which adds a special token by itself."""
    library = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "[CLS]": 1, "▁the": 2, "▁cat": 3, "x": 4}
    tokenizer = library.Tokenizer(library.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace()
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tokenizer, tmp_path


def test_files_and_library_objects_agree(gpt2_path):
    transformers = pytest.importorskip("transformers")
    opened = transformers.GPT2TokenizerFast.from_pretrained(gpt2_path)
    makes = [
        gpt2_path,
        opened,
        opened.backend_tokenizer,
        lambda text: np.array(opened.encode(text)),
    ]
    expected = [opened.encode(text) for text in TEXTS]
    for make in makes:
        encode = as_encoder(make)
        assert [encode(text) for text in TEXTS] == expected
        assert all(type(token) is int for token in encode(" Paris"))
    assert [tokenizer_size(make) for make in makes] == [50257, 50257, 50257, None]
    for make in makes[:3]:
        text = as_vocabulary(make)
        assert [text(token) for token in (6342, 220, 50256, 50257)] == [
            " Paris",
            " ",
            "<|endoftext|>",
            "<id 50257>",
        ]
        assert vocabulary_texts(make)[6342] == " Paris"


def test_special_tokens_are_not_added_and_spaces_are_kept(word_level):
    tokenizer, directory = word_level
    assert tokenizer.encode("the cat").ids == [1, 2, 3]
    for make in (tokenizer, directory, directory / "tokenizer.json"):
        assert as_encoder(make)("the cat") == [2, 3]
        assert as_vocabulary(make)(3) == " cat"
        assert vocabulary_texts(make) == ["[UNK]", "[CLS]", " the", " cat", "x"]


def test_texts_given_as_such_are_left_alone():
    texts = ["a", "b"]
    assert as_vocabulary(texts) is texts
    assert as_vocabulary(None) is None
    assert as_vocabulary(str) is str
    assert vocabulary_texts({1: "b", 0: "a"}) == vocabulary_texts(texts) == texts


def test_what_is_no_tokenizer_is_refused(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="me: tokenizer must be a Hugging Face.*got int"):
        as_encoder(3, "me")
    with pytest.raises(SourceNotFoundError, match="me: .* holds neither tokenizer.json nor"):
        as_encoder(tmp_path, "me")
    with pytest.raises(TypeError, match="me: the tokenizer must give a flat list.*'x'.*None"):
        as_encoder({"x": None}.get, "me")("x")
    with pytest.raises(TypeError, match=r"me: the tokenizer must give a flat list.*\[\[1\]\]"):
        as_encoder({"x": [[1]]}.get, "me")("x")

    class Other:
        def encode(self, text):
            return [1]

    with pytest.raises(TypeError, match="encode of Other does not take add_special_tokens"):
        as_encoder(Other(), "me")
    with pytest.raises(TypeError, match="me: the vocabulary must be listed.*got type"):
        vocabulary_texts(str, "me")


def test_files_of_another_kind_of_bpe_are_refused(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "vocab.json").write_text(json.dumps({"a</w>": 0, "b": 1}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(UnsupportedLayoutError, match="lacks 255 of the 256 single bytes"):
        as_encoder(tmp_path)


def test_without_the_library_the_way_out_is_named(gpt2_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"skhead\[lens\].*or pass a function"):
        as_encoder(gpt2_path)
