"""Prompts for contrasts of queries and keys: positions are those of the words, labels are true."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import chain

import numpy as np
import pytest

from skhead._tokenizers import as_encoder
from skhead.datasets._binding_prompts import make_binding_prompts
from skhead.datasets._prompt_text import load_prompt_words
from skhead.datasets._qk_prompts import make_category_prompts

WORDS = {"colour": ["red", "blue", "green"], "number": ["two", "six", "twenty-one"]}
SMALL = {"categories": WORDS, "n_per_category": 2}
MAKERS = {"category": make_category_prompts, "binding": make_binding_prompts}
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def byte_encoder(text):
    return list(text.encode())


def piece_tokenizer():
    """Pieces of at most three letters, with a special token in front of what it encodes."""
    library = pytest.importorskip("tokenizers")
    texts = [f" {c}" for c in "abc"] + [chr(i) for i in range(32, 127)] + ["\n", "<s>"]
    stored = load_prompt_words()
    words = [*stored["objects"], *chain.from_iterable(stored["categories"].values())]
    texts += [word[i : i + 3] for word in words for i in range(0, len(word), 3)]
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    tokenizer = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token=" "))
    letters = library.pre_tokenizers.Split(library.Regex("<s>|[A-Za-z]{1,3}|."), "isolated")
    tokenizer.pre_tokenizer = letters
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer, vocabulary


def check_keys_end_their_names(prompts, encode, front=0):
    """What is encoded up to the end of a key is a text that ends with the key's name."""
    for tokens, text, positions, names in zip(
        prompts.tokens, prompts.texts, prompts.key_positions, prompts.key_names, strict=True
    ):
        assert list(tokens[front:]) == encode(text)
        ends = [i for i in range(len(text) + 1) if len(encode(text[:i])) > 0]
        for position, name in zip(positions, names, strict=True):
            head = list(tokens[front : position + 1])
            found = [i for i in ends if encode(text[:i]) == head]
            assert any(text[:i].endswith(name) for i in found)


@pytest.mark.parametrize("name", MAKERS)
def test_positions_are_those_of_the_words_for_bytes(name):
    prompts = MAKERS[name](byte_encoder, 6, random_state=0)
    check_keys_end_their_names(prompts, byte_encoder)
    for i, tokens in enumerate(prompts.tokens):
        assert prompts.query_positions[i] == len(tokens) - 1
        for position, word in zip(prompts.key_positions[i], prompts.key_names[i], strict=True):
            assert bytes(tokens[position + 1 - len(word) : position + 1]).decode() == word


@pytest.mark.parametrize("name", MAKERS)
def test_positions_are_those_of_the_last_piece_of_words_in_pieces(name):
    tokenizer, vocabulary = piece_tokenizer()
    texts = {i: text for text, i in vocabulary.items()}
    prompts = MAKERS[name](tokenizer, 4, random_state=0)
    for i, tokens in enumerate(prompts.tokens):
        assert texts[tokens[0]] == "<s>"
        for position, word in zip(prompts.key_positions[i], prompts.key_names[i], strict=True):
            pieces = [texts[t] for t in tokens[position + 1 - -(-len(word) // 3) : position + 1]]
            assert "".join(pieces) == word


def test_byte_pairs_of_gpt2(gpt2_path):
    pytest.importorskip("tokenizers")
    encode = as_encoder(gpt2_path)
    prompts = make_category_prompts(gpt2_path, 3, random_state=0)
    check_keys_end_their_names(prompts, encode)
    lengths = {len(encode(" " + word)) for names in prompts.key_names for word in names}
    assert len(lengths) > 1
    boxes = make_binding_prompts(gpt2_path, 3, random_state=0)
    for tokens, positions, letters in zip(
        boxes.tokens, boxes.key_positions, boxes.key_names, strict=True
    ):
        assert [[tokens[at]] for at in positions] == [encode(" " + letter) for letter in letters]
        assert encode(" Box") == [tokens[-1]]


def test_a_list_holds_as_many_words_of_each_category():
    words = load_prompt_words()["categories"]
    prompts = make_category_prompts(byte_encoder, 25, random_state=1)
    assert prompts.features == ("category",)
    assert Counter(prompts.query_labels.tolist()) == dict.fromkeys(words, 5)
    for asked, labels, names, text in zip(
        prompts.query_labels, prompts.key_labels, prompts.key_names, prompts.texts, strict=True
    ):
        assert Counter(labels.tolist()) == dict.fromkeys(words, 5)
        assert len(set(names)) == 25
        assert all(word in words[label] for word, label in zip(names, labels, strict=True))
        assert re.findall(r"^- (.*)$", text, flags=re.MULTILINE) == list(names)
        assert f"the category {asked}?" in text
    orders = {tuple(labels.tolist()) for labels in prompts.key_labels}
    assert len(orders) == 25


@pytest.mark.parametrize("n_asked", [1, 3, 7])
def test_the_category_that_is_asked_for_may_have_another_number_of_words(n_asked):
    prompts = make_category_prompts(byte_encoder, 5, n_asked=n_asked, random_state=0)
    for asked, labels in zip(prompts.query_labels, prompts.key_labels, strict=True):
        counts = Counter(labels.tolist())
        assert counts.pop(asked) == n_asked
        assert list(counts.values()) == [5] * 4


def test_own_categories_and_template():
    prompts = make_category_prompts(
        byte_encoder, 5, **SMALL, template="{category}?\n{items}\n{category}:", random_state=0
    )
    assert sorted(Counter(prompts.query_labels.tolist()).values()) == [2, 3]
    check_keys_end_their_names(prompts, byte_encoder)
    for asked, text, names in zip(
        prompts.query_labels, prompts.texts, prompts.key_names, strict=True
    ):
        items = "\n".join(f"- {word}" for word in names)
        assert text == f"{asked}?\n{items}\n{asked}:"


def test_order_prompts_ask_for_one_object_at_any_place():
    prompts = make_binding_prompts(byte_encoder, 60, n_items=4, random_state=0)
    objects = load_prompt_words()["objects"]
    assert prompts.features == ("order",)
    assert set(prompts.query_labels.tolist()) == {0, 1, 2, 3}
    for place, labels, letters, text in zip(
        prompts.query_labels, prompts.key_labels, prompts.key_names, prompts.texts, strict=True
    ):
        stated = re.findall(r"The (\w+) is in Box (\w)\.", text)
        assert [box for _, box in stated] == list(letters)
        assert sorted(letters) == list("ABCD") and labels.tolist() == [0, 1, 2, 3]
        assert sorted(name for name, _ in stated) == sorted(objects[:4])
        assert stated[place][0] == objects[0]
        assert text.endswith(f"Which box has the {objects[0]} in it? Box")
    shown = Counter(letters[0] for letters in prompts.key_names)
    assert set(shown) == set("ABCD")


def test_an_unused_object_can_be_asked_for():
    prompts = make_binding_prompts(byte_encoder, 5, queried="umbrella", random_state=0)
    first, *others = load_prompt_words()["objects"][:9]
    for place, text in zip(prompts.query_labels, prompts.texts, strict=True):
        stated = re.findall(r"The (\w+) is in", text)
        assert stated[place] == "umbrella" and first not in stated
        assert sorted(stated) == sorted(["umbrella", *others])
    used = make_binding_prompts(byte_encoder, 5, queried=others[2], random_state=0)
    for place, text in zip(used.query_labels, used.texts, strict=True):
        stated = re.findall(r"The (\w+) is in", text)
        assert stated[place] == others[2] and sorted(stated) == sorted([first, *others])


def test_counterfactual_prompts_differ_in_the_object_alone():
    objects = load_prompt_words()["objects"]
    pair = make_binding_prompts(byte_encoder, 40, contrast="lexical", random_state=0)
    used, unused = pair
    assert len(used) == len(unused) == used.n_keys == unused.n_keys == 40
    assert used.features == unused.features == ("lexical",)
    assert used.key_names == unused.key_names
    for i, (text, other) in enumerate(zip(used.texts, unused.texts, strict=True)):
        name, replacement = used.query_labels[i], unused.query_labels[i]
        assert name in objects[:9] and replacement in objects[9:]
        assert text.count(f"The {name} is in Box {used.key_names[i][0]}.") == 1
        assert text.count(f" the {name} in it?") == 1
        words, others = text.split(), other.split()
        changed = [(a, b) for a, b in zip(words, others, strict=True) if a != b]
        assert changed == [(name, replacement)] * 2
    for prompts in pair:
        check_keys_end_their_names(prompts[:3], byte_encoder)
        assert [labels.tolist() for labels in prompts.key_labels] == [
            [label] for label in prompts.query_labels
        ]
    assert len(set(used.query_labels.tolist())) == 9
    assert len(set(unused.query_labels.tolist())) > 9
    fixed, _ = make_binding_prompts(
        byte_encoder, 3, contrast="lexical", queried="umbrella", random_state=0
    )
    assert fixed.query_labels.tolist() == ["umbrella"] * 3
    used, unused = make_binding_prompts(
        byte_encoder,
        3,
        contrast="lexical",
        n_items=2,
        objects=["cup", "lamp", "jar"],
        queried="jar",
        random_state=0,
    )
    assert used.query_labels.tolist() == ["jar"] * 3
    assert unused.query_labels.tolist() == ["cup"] * 3


def test_own_objects_labels_and_texts():
    prompts = make_binding_prompts(
        byte_encoder,
        8,
        n_items=2,
        objects=["tin can", "pot"],
        labels=["one", "two", "three"],
        statement="In bag {label} lies a {object};",
        template="Where is the {object}? {statements} The {object} is in bag",
        random_state=0,
    )
    check_keys_end_their_names(prompts, byte_encoder)
    assert set(sum(prompts.key_names, ())) == {"one", "two", "three"}
    for text, (a, b), place in zip(
        prompts.texts, prompts.key_names, prompts.query_labels, strict=True
    ):
        first, second = ("tin can", "pot")[:: -1 if place else 1]
        assert text == (
            f"Where is the tin can? In bag {a} lies a {first}; In bag {b} lies a {second}; "
            "The tin can is in bag"
        )


@pytest.mark.parametrize("name", MAKERS)
def test_the_seed_decides(name):
    make = MAKERS[name]
    first, again, other = (make(byte_encoder, 5, random_state=seed) for seed in (3, 3, 4))
    assert first.texts == again.texts and first.tokens == again.tokens
    assert first.texts != other.texts
    assert make(byte_encoder, 5, random_state=np.random.default_rng(3)).texts == first.texts


def test_tokens_in_front():
    tokenizer, vocabulary = piece_tokenizer()
    front = vocabulary["<s>"]
    plain = make_category_prompts(tokenizer, 2, bos_token=None, random_state=0)
    for given in ("auto", front):
        prompts = make_category_prompts(tokenizer, 2, bos_token=given, random_state=0)
        for i, tokens in enumerate(prompts.tokens):
            assert tokens == (front, *plain.tokens[i])
            assert [at - 1 for at in prompts.key_positions[i]] == list(plain.key_positions[i])
    encode = as_encoder(tokenizer)
    assert plain.tokens == make_category_prompts(encode, 2, random_state=0).tokens
    with pytest.raises(TypeError, match='bos_token must be a token id, "auto" or None, got True'):
        make_binding_prompts(tokenizer, 2, bos_token=True)


def chat_tokenizer(template):
    transformers = pytest.importorskip("transformers")
    tokenizer, vocabulary = piece_tokenizer()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    made.chat_template = template
    return made, vocabulary


def test_prompts_in_a_chat():
    tokenizer, vocabulary = chat_tokenizer(CHAT)
    encode = as_encoder(tokenizer)
    prompts = make_category_prompts(tokenizer, 3, **SMALL, chat=True, random_state=0)
    check_keys_end_their_names(prompts, encode)
    for text, tokens in zip(prompts.texts, prompts.tokens, strict=True):
        assert text.startswith("<s>user: Below") and text.endswith("</s>\n<s>assistant:")
        assert "Answer" not in text
        assert tokens[0] == vocabulary["<s>"] and tokens[1] != tokens[0]
        assert tokens[-1] == vocabulary[":"]
    front = make_category_prompts(
        tokenizer, 3, **SMALL, chat=True, bos_token=7, random_state=0
    ).tokens
    assert [tokens[1:] for tokens in front] == list(prompts.tokens)


def test_a_chat_needs_a_template_that_repeats_the_text():
    with pytest.raises(TypeError, match="chat=True needs a Hugging Face tokenizer.*function has"):
        make_category_prompts(byte_encoder, 2, chat=True)
    with pytest.raises(TypeError, match=r"\w+ has none; open it with transformers"):
        make_category_prompts(chat_tokenizer(None)[0], 2, chat=True)
    upper, _ = chat_tokenizer(CHAT.replace("| trim", "| upper"))
    with pytest.raises(ValueError, match="chat template .* does not repeat the text 'Below is"):
        make_category_prompts(upper, 2, chat=True)


def test_a_word_without_an_end_of_its_own_is_refused():
    def pairs(text):
        return [ord(text[i]) + 256 * len(text[i : i + 2]) for i in range(0, len(text), 2)]

    with pytest.raises(ValueError, match=r"category_prompts: no token .* ends where '\w+' ends in"):
        make_category_prompts(pairs, 2, random_state=0)
    with pytest.raises(ValueError, match=r"binding_prompts: no token .* ends where '[A-I]' ends"):
        make_binding_prompts(pairs, 2, random_state=0)

    def without_six(text):
        return byte_encoder(text.replace("six", ""))

    with pytest.raises(ValueError, match="ends where 'six' ends.*leave it out of the words"):
        make_category_prompts(without_six, 9, **SMALL, random_state=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_prompts": 0}, "n_prompts must be an integer of at least 1; got 0"),
        ({"n_per_category": 1.5}, "n_per_category must be an integer of at least 1; got 1.5"),
        ({"n_asked": 0}, "n_asked must be an integer of at least 1; got 0"),
        ({"n_asked": 4}, "category 'colour' must be 4 or more, got 3; give more"),
        ({"categories": {"colour": ["red"]}}, "categories must map two names or more"),
        ({"categories": ["red", "blue"]}, "categories must map two names or more"),
        (
            {"categories": {**WORDS, "fruit": ["red", "plum"]}},
            "'red' is in the categories 'colour' and 'fruit'",
        ),
        ({"categories": {**WORDS, "fruit": ["fig", "fig"]}}, "category 'fruit' holds 'fig' twice"),
        ({"categories": {**WORDS, "fruit": ["fig", " plum"]}}, "without spaces .* got ' plum'"),
        ({"categories": {**WORDS, "fruit": ["fig", 3]}}, "without spaces around them; got 3"),
        ({"template": "{category}"}, "template must be a text that holds {items} once"),
        ({"template": "{items} {items}"}, "holds {items} once; got '{items} {items}'"),
        ({"template": "{items}"}, "template must hold {category} as well; got '{items}'"),
    ],
)
def test_bad_categories_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"make_category_prompts: .*{message}"):
        make_category_prompts(byte_encoder, **{"n_prompts": 2, **SMALL, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"contrast": "both"}, 'contrast must be "order" or "lexical"; got \'both\''),
        ({"n_prompts": True}, "n_prompts must be an integer of at least 1; got True"),
        ({"n_items": 1}, "n_items must be an integer of at least 2; got 1"),
        ({"n_items": 27}, "labels must be 27 or more, got 26"),
        ({"objects": ["pot", "cup"]}, "objects must be 9 or more, got 2"),
        ({"objects": list("abcdefghi"), "contrast": "lexical"}, "objects must be 10 or more"),
        ({"labels": ["A", "A"]}, "labels holds 'A' twice"),
        ({"queried": "dragon"}, "queried must be one of the objects; got 'dragon'"),
        ({"statement": "{object}"}, "statement must be a text that holds {label} once"),
        ({"statement": "{label}"}, "statement must hold {object} as well; got '{label}'"),
        ({"template": "{object}"}, "template must be a text that holds {statements} once"),
        ({"template": "{statements}"}, "template must hold {object} as well"),
    ],
)
def test_bad_boxes_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"make_binding_prompts: {message}"):
        make_binding_prompts(byte_encoder, **{"n_prompts": 2, **changes})


def test_stored_words_are_clean_and_documented():
    words = load_prompt_words()
    listed = [*chain.from_iterable(words["categories"].values())]
    assert all(len(own) >= 30 for own in words["categories"].values())
    assert len(words["objects"]) >= 80
    for group in (listed, words["objects"]):
        assert len(set(group)) == len(group)
        assert all(re.fullmatch(r"[A-Za-z]+", word) for word in group)
    data = files("skhead.datasets").joinpath("data")
    readme = data.joinpath("README.md").read_text(encoding="utf-8")
    section = readme.partition("# Words for prompts")[2]
    counts = [len(own) for own in words["categories"].values()]
    assert f"{min(counts)} to {max(counts)} words each" in section
    assert f"{len(words['objects'])} household objects" in section and "CC0" in section
    assert json.loads(data.joinpath("prompt_words.json").read_text(encoding="utf-8")) == words
