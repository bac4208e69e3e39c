"""Files of bases: written whole or not at all, and never read when they are not what they say."""

from __future__ import annotations

import errno
import json
import os
import pickle
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from skhead.exceptions import CacheError
from skhead.weights import basis_store
from skhead.weights.basis_store import BasisStack, BasisStore

D_MODEL = 20
RANKS = (4, 3, 0, 4, 1)


def described(layer=0, **more):
    return {"role": "O", "layer": layer, "n_heads": len(RANKS), **more}


def matrices(layer=0):
    generator = torch.Generator().manual_seed(layer)
    return [torch.randn(D_MODEL, rank, generator=generator) for rank in RANKS]


def write(store, description, heads):
    path = store.path(description)
    with store.writing(path, description) as writer:
        for number, matrix in enumerate(heads):
            writer.add(number, matrix)
    return path


@pytest.fixture
def store(tmp_path):
    return BasisStore(tmp_path / "cache", "Tester")


@pytest.fixture
def stack(store):
    """Bases of two files in an order of its own, as a stack in files and as one in memory."""
    files, whole = [], []
    for layer in range(2):
        files.append(store.find(write(store, described(layer), matrices(layer))))
        whole.append(matrices(layer))
    members = np.array([[1, 0], [0, 0], [0, 1], [1, 3], [1, 2], [0, 4]])
    dense = torch.zeros(len(members), D_MODEL, max(RANKS))
    for place, (file, head) in enumerate(members):
        dense[place, :, : RANKS[head]] = whole[file][head]
    return BasisStack(tuple(files), members, D_MODEL, max(RANKS), torch.device("cpu")), dense


def test_what_is_written_is_found(store):
    path = write(store, described(), matrices())
    found = store.find(path)
    assert found.numbers == tuple(range(len(RANKS))) and found.ranks == RANKS
    for number, matrix in enumerate(matrices()):
        assert torch.equal(load_file(path)[str(number)], matrix)
    assert [file.name for file in store.directory.iterdir()] == [path.name]


def test_every_part_of_the_description_names_another_file(store):
    told = [described(), described(1), described(rank=2), described(source="x")]
    assert len({store.path(description) for description in told}) == len(told)
    assert store.path(described()) == store.path(dict(reversed(described().items())))


@pytest.mark.parametrize("heads", [slice(None), slice(1, 4), slice(5, 6), slice(2, 2)])
@pytest.mark.parametrize("rows", [slice(None), slice(0, 7), slice(13, 20), slice(18, 99)])
def test_reading_is_slicing(stack, heads, rows):
    stored, dense = stack
    expected = dense[heads, rows]
    for out in (torch.full_like(expected, torch.nan), torch.empty(expected.shape).double()):
        stored.read(heads, rows, out)
        assert torch.equal(out.float(), expected)
    assert torch.equal(stored[heads], dense[heads])


def test_a_part_is_a_stack_that_reads_less(stack):
    stored, dense = stack
    part = stored.take(np.array([4, 1]))
    assert part.shape == (2, D_MODEL, max(RANKS)) and len(part) == 2
    assert torch.equal(part[:], dense[[4, 1]])
    assert stored.to(torch.float64)[:].dtype == torch.float64
    assert stored.to("cpu").device == torch.device("cpu")


def test_pickle_holds_addresses_of_what_is_used(stack):
    stored, dense = stack
    again = pickle.loads(pickle.dumps(stored))
    assert torch.equal(again[:], dense)
    assert joblib.hash(again) == joblib.hash(stored)
    part = pickle.loads(pickle.dumps(stored.take(np.array([0, 3]))))
    assert len(part.files) == 1 and torch.equal(part[:], dense[[0, 3]])


def damage_end(path):
    os.truncate(path, path.stat().st_size - 10)


def damage_start(path):
    os.truncate(path, 5)


def damage_number(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def damage_format(path):
    content = path.read_bytes()
    assert content.count(basis_store.FORMAT.encode()) == 1
    path.write_bytes(content.replace(basis_store.FORMAT.encode(), b"skhead-bases-0"))


def damage_order(path):
    """Two heads exchange their places, and every number stays what it is."""
    content = path.read_bytes()
    assert content.count(b'{"0":') + content.count(b', "0": {') == 1
    changed = content.replace(b', "0": {', b', "9": {', 1).replace(b', "1": {', b', "0": {', 1)
    path.write_bytes(changed.replace(b', "9": {', b', "1": {', 1))


def damage_all(path):
    path.write_bytes(b"")


DAMAGES = {
    "truncated": damage_end,
    "header cut": damage_start,
    "checksum": damage_number,
    "format": damage_format,
    "order": damage_order,
    "empty": damage_all,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_not_found_and_is_replaced(store, name):
    path = write(store, described(), matrices())
    DAMAGES[name](path)
    with pytest.warns(UserWarning, match="Tester: cached bases cannot be used and are computed"):
        assert store.find(path) is None
    write(store, described(), matrices())
    assert store.find(path).ranks == RANKS


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_is_damaged_while_in_use_is_refused(stack, name):
    stored, _ = stack
    DAMAGES[name](Path(stored.files[0].path))
    with pytest.raises(CacheError, match="changed while they were in use.*extract them again"):
        stored[:]


def test_other_bases_under_the_same_name_are_refused(stack):
    stored, _ = stack
    path = Path(stored.files[0].path)
    tensors = {name: 2 * tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": basis_store.FORMAT, "checksum": "no"})
    with pytest.raises(CacheError, match="checksum"):
        stored[:]
    path.unlink()
    with pytest.raises(CacheError, match="extract them again"):
        stored[:]


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "no space left"), (errno.EIO, "written")])
@pytest.mark.parametrize("call", ["fsync", "write"])
def test_an_error_while_writing_names_the_directory_and_leaves_nothing(
    store, monkeypatch, code, words, call
):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    if call == "fsync":
        monkeypatch.setattr(basis_store.os, "fsync", refuse)
    else:
        monkeypatch.setattr(basis_store.BasisWriter, "_write", refuse)
    with pytest.raises(CacheError, match=f"Tester: cache {store.directory} .*{words}.*cache="):
        write(store, described(), matrices())
    assert list(store.directory.iterdir()) == []


def test_an_error_of_the_caller_passes_and_leaves_nothing(store):
    def interrupted():
        yield matrices()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(store, described(), interrupted())
    assert list(store.directory.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    store = BasisStore(tmp_path / "file" / "cache", "Tester")
    with pytest.raises(CacheError, match="cannot be written.*may write"):
        write(store, described(), matrices())


def test_who_finishes_first_keeps_the_file(store):
    """The second of two processes must not pull the file away under a reader of the first."""
    description = described()
    path = store.path(description)
    with store.writing(path, description) as writer:
        write(store, description, matrices())
        first = path.stat()
        writer.add(0, matrices()[0])
    assert path.stat().st_ino == first.st_ino
    assert store.find(path).ranks == RANKS


def test_what_an_interrupted_run_left_is_removed_when_it_is_old(store):
    path = store.path(described())
    store.directory.mkdir()
    old, fresh = (path.with_name(f"{path.name}.{name}.tmp") for name in ("old", "fresh"))
    for file in (old, fresh):
        file.write_bytes(b"half")
    day = time.time() - 86400
    os.utime(old, (day, day))
    write(store, described(), matrices())
    assert not old.exists() and fresh.exists()


def test_a_long_description_fits_in_front_of_the_data(store):
    description = described(source="ü" * 5000)
    path = write(store, description, matrices())
    assert store.find(path).ranks == RANKS
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    assert json.loads(metadata["bases"]) == description
