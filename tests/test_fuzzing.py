"""A short, fixed part of ``make fuzz``: seeds, what once broke a reader, and some mutations."""

from __future__ import annotations

import random

import fuzzing
import pytest

#: Changes of each seed; `make fuzz` runs as many as it is told, with coverage as its guide.
MUTATIONS = 40
#: Inputs that were let through, or made something else than an error of skhead.
NO_UNKNOWN = b'{"model": {"type": "WordLevel", "vocab": {"a b": 0}, "unk_token": "[UNK]"}}'
PANIC = b'{"model": {"vocab": {"a": 0, "b": 1, " ": 3}, "unk_token": null, "merges": [["a", "b"]]}}'
FOUND = {
    "headers": [b'{"I64": {"dtype": "F32", "shape": 3, "data_offsets": [2, 0.5]}}'],
    "tokenizers": [
        b"", b'".."', b"\xcb\xcb", b'{"a": \\', b'{"a": 0}\0a b', b"[]\0#version: 0.2\na b\n",
        NO_UNKNOWN,
        b'{"model": {"vocab": {}, "merges": []}}',
        PANIC,
        NO_UNKNOWN.replace(b"a b", b"a"),
    ],
}  # fmt: skip


def needed(target):
    if target == "tokenizers":
        pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")


@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_seeds_are_accepted(target, tmp_path):
    needed(target)
    given = fuzzing.seeds(target, tmp_path)
    assert given
    assert all(fuzzing.run(target, seed, tmp_path) for seed in given)


@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_mutations_are_refused_or_are_what_they_say(target, tmp_path):
    needed(target)
    rng = random.Random(target)
    refused = 0
    for seed in fuzzing.seeds(target, tmp_path):
        given = seed
        for number in range(MUTATIONS):
            given = fuzzing.mutated(seed if number % 4 == 0 else given, rng)
            refused += not fuzzing.run(target, given, tmp_path)
    assert refused > MUTATIONS / 4


@pytest.mark.parametrize("target", FOUND)
def test_what_was_found_is_refused(target, tmp_path):
    needed(target)
    assert not any(fuzzing.run(target, given, tmp_path) for given in FOUND[target])


def test_lies_are_noticed(tmp_path):
    """The targets themselves can fail: a reader that believes a header is caught."""
    raw = fuzzing.seeds("headers", tmp_path)[0]
    header, data = fuzzing.unpacked(raw)
    target = fuzzing.SafetensorsReader.tensor
    try:
        fuzzing.SafetensorsReader.tensor = lambda self, name: target(self, name) + 1
        with pytest.raises(AssertionError):
            fuzzing.read_headers(fuzzing.packed(header, data), tmp_path)
    finally:
        fuzzing.SafetensorsReader.tensor = target
