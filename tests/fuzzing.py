"""What reads foreign files, as functions of bytes that must either refuse them or tell the truth.

Each target takes bytes and a directory to write in. It returns whether the bytes were accepted;
any error but skhead's own passes, and so does an assertion where what was accepted is not so.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import skhead
from skhead import datasets
from skhead._stored.writing import Writer
from skhead._tokenizers import as_encoder, tokenizer_size, vocabulary_texts
from skhead.exceptions import SkheadError
from skhead.weights import archive, basis_store
from skhead.weights.files import open_path, read_index
from skhead.weights.readers import SafetensorsReader

Target = Callable[[bytes, Path], bool]

_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8}
_DATA = bytes(range(256)) * 64


def packed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def unpacked(raw: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length], raw[8 + length :]


def read_headers(given: bytes, directory: Path) -> bool:
    """A safetensors file as it is, or its header alone in front of data of the right length."""
    raw = given
    if given.startswith(b"{"):
        raw = packed(given, _DATA[: _claimed(given)])
    path = directory / "model.safetensors"
    path.write_bytes(raw)
    try:
        reader = SafetensorsReader("fuzzed", lambda _: path, path.name)
    except SkheadError:
        return False
    header, data = unpacked(raw)
    entries = json.loads(header)
    covered = 0
    for name in reader.names():
        info = reader.info(name)
        begin, end = entries[name]["data_offsets"]
        covered += end - begin
        if info.dtype in _SIZES:
            assert end - begin == _SIZES[info.dtype] * math.prod(info.shape)
        try:
            tensor = reader.tensor(name)
        except SkheadError:
            continue
        assert tuple(tensor.shape) == info.shape
        assert _bytes_of(tensor) == data[begin:end]
    assert covered == len(data)
    reader.release()
    return True


def _claimed(header: bytes) -> int:
    """Bytes of data that a header asks for, as far as it can be read."""
    try:
        table = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in table.items() if name[:2] != "__"]
        return min(max((end for end in ends if type(end) is int), default=0), len(_DATA))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def read_indices(given: bytes, directory: Path) -> bool:
    """The index of shards, beside one shard."""
    path = directory / "model.safetensors.index.json"
    shard = directory / "model-1.safetensors"
    if not shard.is_file():
        shard.write_bytes(safetensors.torch.save(_llama()))
    path.write_bytes(given)
    try:
        shards = read_index(path)
        for name in shards.values():
            assert not Path(name).is_absolute()
            assert os.path.normpath(name).split("/")[0] != ".."
        reader = open_path(path).reader
        for name in list(reader.names())[:40]:
            reader.tensor(name)
    except SkheadError:
        return False
    return True


@cache
def _llama() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        root = f"model.layers.{layer}."
        for name, shape in (("q", (8, 6)), ("k", (4, 6)), ("v", (4, 6)), ("o", (6, 8))):
            tensors[f"{root}self_attn.{name}_proj.weight"] = torch.randn(shape, generator=generator)
        tensors[f"{root}input_layernorm.weight"] = torch.ones(6)
    return tensors


@cache
def _gpt2() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        root = f"h.{layer}."
        for name, shape in (("attn.c_attn", (6, 18)), ("attn.c_proj", (6, 6))):
            tensors[f"{root}{name}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"{root}ln_1.weight"] = torch.ones(6)
    return tensors


LLAMA = {
    "model_type": "llama", "hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 2,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 6, "n_layer": 2, "n_head": 3}


def read_configs(given: bytes, directory: Path) -> bool:
    """The configuration of a model; its first byte says of which."""
    kind = given[:1]
    tensors = {b"l": _llama, b"g": _gpt2}.get(kind)
    folder = directory / {b"l": "llama", b"g": "gpt2"}.get(kind, "bundled")
    if not folder.is_dir():
        folder.mkdir()
        bundled = Path(datasets.bundled_path(datasets.list_models()[1]))
        source = bundled / "model.safetensors"
        raw = source.read_bytes() if tensors is None else safetensors.torch.save(tensors())
        (folder / "model.safetensors").write_bytes(raw)
    (folder / "config.json").write_bytes(given[1:])
    try:
        plan = open_path(folder).plan(None)
        assert plan.layers
        if zlib.crc32(given) % 8 == 0:
            _check_heads(folder)
    except SkheadError:
        return False
    return True


def _check_heads(folder: Path) -> None:
    heads = skhead.load_heads(folder)
    stack = skhead.load_weights(heads, role="O")
    assert stack.shape[:2] == (len(heads), int(heads["d_model"].iloc[0]))
    assert np.isfinite(stack).all()


def read_tokenizers(given: bytes, directory: Path) -> bool:
    """tokenizer.json, or vocab.json and merges.txt parted by a zero byte."""
    front, mark, back = given.partition(b"\0")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (directory / name).unlink(missing_ok=True)
    (directory / ("vocab.json" if mark else "tokenizer.json")).write_bytes(front)
    if mark:
        (directory / "merges.txt").write_bytes(back)
    try:
        encoded = as_encoder(directory)("a b")
        size = tokenizer_size(directory)
        texts = vocabulary_texts(directory)
    except SkheadError:
        return False
    assert all(isinstance(token, int) and token >= 0 for token in encoded)
    assert size is not None and all(isinstance(text, str) for text in texts)
    return True


def read_bases(given: bytes, directory: Path) -> bool:
    """A file of the cache as it is, or its header alone with the right checksum put in."""
    store = basis_store.BasisStore(directory, "Fuzz")
    path = directory / "Q0000-fuzz.safetensors"
    raw = _signed(given) if given.startswith(b"{") else given
    path.write_bytes(raw)
    file = store.find(path)
    if file is None:
        return False
    header, data = unpacked(raw)
    entries = {name: e for name, e in json.loads(header).items() if name != "__metadata__"}
    assert file.numbers == tuple(int(name) for name in entries)
    for place, entry in enumerate(entries.values()):
        d_model, rank = entry["shape"]
        begin, end = entry["data_offsets"]
        assert file.ranks[place] == rank
        members = np.array([[0, place]])
        stack = basis_store.BasisStack((file,), members, d_model, rank, torch.device("cpu"))
        if end - begin < 2**20:
            assert _bytes_of(stack[:]) == data[begin:end]
    return True


def _signed(header: bytes) -> bytes:
    data = _DATA[: _claimed(header)]
    try:
        table = json.loads(header)
        metadata = table["__metadata__"]
        digest = basis_store._new_digest(metadata["bases"])
        digest.update(data)
        entries = {
            name: {key: entry[key] for key in ("dtype", "shape", "data_offsets")}
            for name, entry in table.items()
            if name != "__metadata__"
        }
        metadata["checksum"] = basis_store._finished(digest, entries)
        header = json.dumps(table).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return packed(header, data)


def read_estimators(given: bytes, directory: Path) -> bool:
    """A file of `skhead.save`, or a document alone, written with the arrays of one of the seeds."""
    path = directory / "estimator.safetensors"
    if given[:1].isdigit() and given[1:2] in (b"{", b"[", b'"'):
        number = int(given[:1]) % len(_estimators())
        text = given[1:].decode(errors="replace")
        facts = {"format": "skhead-estimator-1", "skhead_version": skhead.__version__}
        archive.write_archive(path, text, _estimators()[number][1], facts)
    else:
        path.write_bytes(given)
    try:
        found = skhead.load(path)
    except SkheadError:
        return False
    assert type(found).__module__.startswith(("skhead.", "sklearn."))
    return True


@cache
def _estimators() -> tuple[tuple[str, dict[str, torch.Tensor]], ...]:
    """Documents of small estimators, and their arrays."""
    heads = skhead.load_heads("skhead/induction-2l").iloc[:3]
    subspaces = skhead.SubspaceExtractor(roles="OV", rank=1).fit_transform(heads)
    matrix = np.random.default_rng(0).normal(size=(6, 4))
    found = []
    for estimator in (
        skhead.SubspaceExtractor(rank=2),
        skhead.LinearCKA().fit(heads),
        skhead.ProjectionKernel(pairs=("OV",)).fit(subspaces),
        skhead.HeadClassifier().fit(matrix, ["a", "b"] * 3),
    ):
        writer = Writer("fuzz")
        found.append((json.dumps(writer.write(estimator, "seed")), writer.tensors))
    return tuple(found)


TARGETS: dict[str, Target] = {
    "headers": read_headers,
    "indices": read_indices,
    "configs": read_configs,
    "tokenizers": read_tokenizers,
    "bases": read_bases,
    "estimators": read_estimators,
}


# Seeds, all of them from what is bundled or made on the spot


def _bundled_files() -> Iterator[Path]:
    for source in datasets.list_models():
        yield Path(datasets.bundled_path(source))


def _small(raw: bytes) -> bytes:
    """Header of a file alone, with the first tensors of it only."""
    table = json.loads(unpacked(raw)[0])
    table.pop("__metadata__", None)
    kept: dict[str, Any] = {}
    position = 0
    for name in list(table)[:4]:
        kept[name] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [position, position + 24]}
        position += 24
    return json.dumps({"__metadata__": {"format": "pt"}, **kept}).encode()


def _basis_file(directory: Path) -> bytes:
    store = basis_store.BasisStore(directory, "Fuzz")
    description = {"role": "Q", "layer": 0, "n_heads": 2}
    path = store.path(description)
    with store.writing(path, description) as writer:
        for number, rank in enumerate((2, 3)):
            writer.add(number, torch.arange(4.0 * rank).reshape(4, rank))
    raw = path.read_bytes()
    path.unlink()
    return raw


def _estimator_files(directory: Path) -> Iterator[bytes]:
    path = directory / "seed.safetensors"
    skhead.save(skhead.SubspaceExtractor(rank=2), path)
    yield path.read_bytes()
    for number, (document, _) in enumerate(_estimators()):
        yield str(number).encode() + document.encode()


def seeds(target: str, directory: Path) -> list[bytes]:
    """Inputs that the target accepts, to begin from."""
    if target == "headers":
        raw = safetensors.torch.save({"a": torch.ones(2, 3), "b": torch.zeros(1).half()})
        headers = [_small((path / "model.safetensors").read_bytes()) for path in _bundled_files()]
        return [raw, *dict.fromkeys(headers)]
    if target == "indices":
        table = dict.fromkeys(_llama(), "model-1.safetensors")
        return [json.dumps({"metadata": {}, "weight_map": table}).encode()]
    if target == "configs":
        files = [path / "config.json" for path in _bundled_files()]
        native = [b"b" + file.read_bytes() for file in files if file.is_file()]
        return [b"l" + json.dumps(LLAMA).encode(), b"g" + json.dumps(GPT2).encode(), *native]
    if target == "tokenizers":
        return _tokenizer_files()
    if target == "bases":
        raw = _basis_file(directory)
        return [raw, unpacked(raw)[0].rstrip()]
    return list(_estimator_files(directory))


def _tokenizer_files() -> list[bytes]:
    import tokenizers

    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {text: i for i, text in enumerate(sorted(alphabet))} | {"ab": 256}
    small = {"a": 0, "b": 1, "ab": 2, " ": 3}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(small, [("a", "b")]))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    files = [json.dumps(vocabulary).encode() + b"\0#version: 0.2\na b\n"]
    return [found.to_str().encode(), words.to_str().encode(), *files]


# Mutations that keep the structure, of which a fuzzer of bytes finds few

_WORDS = (
    0, 1, -1, 2, 3, 6, 7, 255, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**400, 0.5,
    1e308, True, False, None, "", "..", "../x", "/etc/passwd", "a/../../b", "\ud800", "\0", "F32",
    "I64", "F8_E4M3", "gpt2", "llama", "nan", "cpu", [], {}, [[]], {"": {}}, [0, 0], [2**62, 4, 0],
)  # fmt: skip


#: First bytes that say what the JSON behind them belongs to.
_FRONTS = (b"l", b"g", b"b", b"0", b"1", b"2", b"3")


def mutated(given: bytes, rng: random.Random) -> bytes:
    """One change of a JSON value, or of bytes where there is none."""
    front = given[:1] if given[:1] in _FRONTS and given[1:2] in (b"{", b"[") else b""
    try:
        value = json.loads(given[len(front) :])
    except (ValueError, RecursionError):
        return _mutated_bytes(given, rng)
    if rng.random() < 0.2:
        return _mutated_bytes(given, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _mutated_value(value, rng)
    return front + json.dumps(value).encode()


def _mutated_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        chance = rng.random()
        if chance < 0.1:
            del value[key]
        elif chance < 0.2 and isinstance(value, dict):
            value[rng.choice([*map(str, _WORDS), *keys])] = deepcopy(value[rng.choice(keys)])
        elif chance < 0.3 and isinstance(value, list):
            value.insert(rng.randrange(len(value) + 1), deepcopy(value[key]))
        elif chance < 0.4:
            other = rng.choice(keys)
            value[key], value[other] = value[other], value[key]
        else:
            value[key] = _mutated_value(value[key], rng)
        return value
    if type(value) is int and rng.random() < 0.6:
        return value + rng.choice((-8, -4, -2, -1, 1, 2, 4, 8, value, -2 * value))
    if isinstance(value, str) and value and rng.random() < 0.4:
        return _mutated_bytes(value.encode(errors="replace"), rng).decode(errors="replace")
    return deepcopy(rng.choice(_WORDS))


def _mutated_bytes(given: bytes, rng: random.Random) -> bytes:
    changed = bytearray(given or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, chance = rng.randrange(len(changed) or 1), rng.random()
        if chance < 0.5 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif chance < 0.7:
            del changed[place : place + rng.choice((1, 2, 8, 64))]
        elif chance < 0.9:
            changed[place:place] = rng.randbytes(rng.choice((1, 2, 8)))
        else:
            changed[place:place] = changed[place : place + rng.choice((4, 32))]
    return bytes(changed)


def run(target: str, given: bytes, directory: Path) -> bool:
    """One input, with warnings kept quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TARGETS[target](given, directory)
