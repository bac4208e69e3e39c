"""Estimators in files without code: the same numbers come back, and nothing else gets in."""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from contrasts import feature_pairs
from fitted import BUNDLED, CLASSES, MAKERS, assert_same, heads, similarity
from safetensors.torch import save_file
from sklearn.base import BaseEstimator, clone
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import InconsistentVersionWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    LabelBinarizer,
    LabelEncoder,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import LinearSVC

import skhead
from skhead._stored import reading, writing
from skhead._stored.classes import CLASSES as STORED
from skhead._stored.classes import class_of
from skhead._stored.reading import Reader
from skhead._stored.writing import Writer
from skhead.exceptions import EstimatorFileError, SkheadError, UnstorableError
from skhead.weights import archive

_RNG = np.random.default_rng(0)
X, Y = _RNG.normal(size=(20, 4)), np.arange(20) % 2


def public_estimators():
    found = [getattr(skhead, name) for name in skhead.__all__]
    return {x.__name__ for x in found if isinstance(x, type) and issubclass(x, BaseEstimator)}


def test_every_public_estimator_is_here():
    assert public_estimators() <= {name.split()[0] for name in MAKERS}
    assert {f"skhead.{name}" for name in public_estimators()} <= STORED.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_are_equal_to_the_last_bit(name, tmp_path):
    estimator, ask = MAKERS[name]()
    expected = ask(estimator)
    path = tmp_path / "estimator.safetensors"
    skhead.save(estimator, path)
    again = skhead.load(path)
    assert type(again) is type(estimator)
    assert repr(again) == repr(estimator)
    assert_same(ask(again), expected)
    assert_same(again.__getstate__().keys(), estimator.__getstate__().keys())
    assert clone(again).get_params().keys() == estimator.get_params().keys()
    skhead.save(again, tmp_path / "twice.safetensors")
    assert_same(ask(skhead.load(tmp_path / "twice.safetensors")), expected)


@pytest.mark.parametrize(
    "estimator",
    [
        PCA(2), LinearDiscriminantAnalysis(), LogisticRegression(), Ridge(), RidgeClassifier(),
        LinearSVC(), MaxAbsScaler(), MinMaxScaler(), Normalizer(), RobustScaler(),
        StandardScaler(), make_pipeline(StandardScaler(), RidgeClassifier(positive=True)),
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_listed_estimators_of_scikit_learn(estimator, tmp_path):
    ways = ("transform", "predict", "decision_function", "predict_proba")
    estimator.fit(X, Y)
    skhead.save(estimator, tmp_path / "file")
    again = skhead.load(tmp_path / "file")
    used = [way for way in ways if hasattr(estimator, way)]
    assert used
    for way in used:
        assert_same(getattr(again, way)(X), getattr(estimator, way)(X))


@pytest.mark.parametrize("encoder", [LabelEncoder(), LabelBinarizer()], ids=repr)
def test_encoders_of_labels(encoder, tmp_path):
    skhead.save(encoder.fit(CLASSES), tmp_path / "file")
    assert_same(skhead.load(tmp_path / "file").transform(CLASSES), encoder.transform(CLASSES))


def test_every_listed_class_exists():
    assert all(class_of(name).__name__ == name.rpartition(".")[2] for name in STORED)


CONTAINERS = {
    "Subspaces": lambda: skhead.SubspaceExtractor().fit_transform(heads()),
    "Similarity": lambda: skhead.NullCalibrator().fit_transform(similarity()),
    "QKPairs": lambda: feature_pairs(n_queries=20),
    "VirtualHeads": lambda: skhead.virtual_heads(heads(), top=3),
    "SalientMappings": lambda: (
        skhead.SalientOperations(n_salient=2, source_embedding="raw").fit(heads()).mappings(heads())
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name, tmp_path):
    container = CONTAINERS[name]()
    skhead.save(container, tmp_path / "file")
    assert_same(skhead.load(tmp_path / "file"), container)


def test_fitting_goes_on_where_it_was(tmp_path):
    first, second = feature_pairs(seed=0), feature_pairs(seed=1)
    found = skhead.ContrastiveQKDecomposer(rank=2, random_state=0).partial_fit(first)
    skhead.save(found, tmp_path / "file")
    again = skhead.load(tmp_path / "file").partial_fit(second)
    assert_same(again.key_components_, found.partial_fit(second).key_components_)


def test_bases_of_a_cache_are_copied(tmp_path):
    extractor = skhead.SubspaceExtractor(cache=tmp_path / "cache")
    kernel = skhead.ProjectionKernel().fit(extractor.fit_transform(heads()))
    expected = kernel.transform(extractor.transform(heads()))
    skhead.save(kernel, tmp_path / "file")
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    again = skhead.load(tmp_path / "file")
    assert_same(again.transform(skhead.SubspaceExtractor().fit_transform(heads())), expected)


VALUES = [
    None, True, 3, 10**30, "text", 1.5, float("inf"), -0.0, [1, [2]], (1, "a"), {1, 2},
    {"a": 1, (0, None): [2.0]}, np.float32(0.1), np.str_("a"), np.bool_(True), np.int8(-3),
    np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(2.5),
    np.zeros((0, 3)), np.array(["a", "bcd"]), np.array([2**63], dtype=np.uint64),
    np.arange(4, dtype=">i4"),
    np.array([None, "a", 1.5], dtype=object), slice(1, None), Path("a/b"), torch.device("cpu"),
    torch.float64, pd.Index([1, 2], name="i"), pd.RangeIndex(3),
    pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["x", None]),
    pd.Series([1.0, 2.0], ["a", "b"], name="s"),
    pd.DataFrame({"x": [1, 2], "y": ["a", None], "z": [0.5, np.nan]}, index=["r", "s"]),
    pd.DataFrame(np.eye(2), columns=pd.MultiIndex.from_product([["a"], [1, 2]])),
    pd.DataFrame({"x": pd.Series([], dtype=float)}),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}-{value!s:.20}")
def test_values_of_attributes(value):
    writer = Writer("test")
    document = json.loads(json.dumps(writer.write(value, "x"), allow_nan=False))
    found = Reader(writer.tensors, "test").read(document)
    if isinstance(value, pd.Index):
        pd.testing.assert_index_equal(found, value, exact=True)
    elif isinstance(value, np.ndarray):
        np.testing.assert_array_equal(found, value)
        assert found.shape == value.shape and found.dtype.kind == value.dtype.kind
        assert found.flags.f_contiguous == value.flags.f_contiguous
    else:
        assert_same(found, value)


def test_random_states_go_on():
    for state in (np.random.default_rng(3), np.random.RandomState(3)):
        state.normal(size=5)
        writer = Writer("test")
        document = json.loads(json.dumps(writer.write(state, "x")))
        found = Reader(writer.tensors, "test").read(document)
        assert_same(found.normal(size=700), state.normal(size=700))


def test_tensors_keep_their_format():
    for value in (torch.arange(3.0).bfloat16(), torch.zeros(2, 0), torch.eye(2)[:, :1]):
        writer = Writer("test")
        found = Reader(writer.tensors, "test").read(writer.write(value, "x"))
        assert found.dtype == value.dtype
        assert torch.equal(found, value)


# What cannot be stored


class Stranger(StandardScaler):
    pass


class Disguised(StandardScaler):
    """Of the name and, as it says, the module of a class that is listed."""


Disguised.__name__ = Disguised.__qualname__ = "PCA"
Disguised.__module__ = "sklearn.decomposition"


def _operations_of(tokenizer):
    return skhead.OperationMapper({"a": [(1, 2)]}, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "estimator, message",
    [
        (
            lambda: _operations_of(str.split),
            r"OperationMapper\.tokenizer is a builtins\.method_des",
        ),
        (
            lambda: skhead.SubspaceReadout(vocabulary=CountVectorizer()),
            r"SubspaceReadout\.vocabulary is a sklearn\.feature_extraction\.text\.CountVectorizer",
        ),
        (
            lambda: skhead.HeadClassifier(KNeighborsClassifier()),
            r"HeadClassifier\.aggregate is a sklearn\.neighbors.*KNeighborsClassifier",
        ),
        (
            lambda: make_pipeline(FunctionTransformer(np.log1p), Ridge()),
            r"Pipeline\.steps\[0\]\[1\] is a sklearn.*FunctionTransformer",
        ),
        (lambda: skhead.QKTransformer(Stranger()), r"QKTransformer\.queries is a .*Stranger"),
        (lambda: skhead.QKTransformer(Disguised()), r"QKTransformer\.queries is a .*PCA"),
        (
            lambda: skhead.QKTransformer(np.zeros(2, dtype="M8[s]")),
            r"QKTransformer\.queries is a numpy\.ndarray of datetime64",
        ),
        (lambda: skhead.QKTransformer(np.array([1j])), r"is a numpy\.ndarray of complex128"),
    ],
    ids=range(8),
)
def test_what_cannot_be_stored_is_named(estimator, message, tmp_path):
    with pytest.raises(UnstorableError, match=message):
        skhead.save(estimator(), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_what_holds_itself_is_named(tmp_path):
    mapper = _operations_of(None)
    mapper.k = [1]
    mapper.k.append(mapper.k)
    with pytest.raises(UnstorableError, match=r"OperationMapper\.k\[1\] holds itself"):
        skhead.save(mapper, tmp_path / "file")


@pytest.mark.parametrize("value", [3, "text", {"a": 1}, np.zeros(3), Stranger()], ids=repr)
def test_only_estimators_and_containers(value, tmp_path):
    with pytest.raises(UnstorableError, match="is no estimator or container"):
        skhead.save(value, tmp_path / "file")


# Writing


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    skhead.save(skhead.SubspaceExtractor(rank=2), path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk is gone")))
    with pytest.raises(OSError, match="disk is gone"):
        skhead.save(skhead.SubspaceExtractor(rank=3), path)
    monkeypatch.undo()
    assert skhead.load(path).rank == 2
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_one_file_or_the_other(tmp_path):
    path = tmp_path / "file"
    small, large = skhead.SubspaceExtractor(rank=1), skhead.ProjectionKernel().fit(heads())
    skhead.save(small, path)
    done = threading.Event()

    def write():
        for _ in range(15):
            skhead.save(large, path)
            skhead.save(small, path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(type(skhead.load(path)).__name__)
    writer.join()
    assert seen <= {"SubspaceExtractor", "ProjectionKernel"}


def test_too_much_text(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_LONGEST", 100)
    with pytest.raises(UnstorableError, match="a file has room for 100"):
        skhead.save(skhead.SubspaceExtractor(), tmp_path / "file")


def test_too_much_padded_text(tmp_path, monkeypatch):
    """What all arrays of texts take together counts, here 2 of 12 bytes."""
    estimator = skhead.SubspaceExtractor(cache=[np.array(["abc"]), np.array(["abd"])])
    skhead.save(estimator, tmp_path / "file")
    monkeypatch.setattr(writing, "PADDED", 20)
    with pytest.raises(UnstorableError, match=r"cache\[1\] holds texts of 12 bytes.* room for 20"):
        skhead.save(estimator, tmp_path / "other")
    monkeypatch.setattr(reading, "PADDED", 20)
    with pytest.raises(EstimatorFileError, match=r"take more than 20 bytes"):
        skhead.load(tmp_path / "file")


# Reading


def test_columns_of_one_tensor_take_no_memory(tmp_path, monkeypatch):
    """A short document could else make a table of any number of copies."""
    column = ["numpy", {"array": "0", "turned": False}]
    labels = {"range": [0, 1000, 1], "name": None}

    def table(n_columns):
        names = {"range": [0, n_columns, 1], "name": None}
        frame = {"frame": [column] * n_columns, "columns": names, "rows": labels}
        return _held(frame | {"attrs": {"dict": []}})

    monkeypatch.setattr(reading, "PADDED", 0)
    tensors = {"0": torch.zeros(1000)}
    write_document(tmp_path / "file", table(1), tensors)
    assert skhead.load(tmp_path / "file").cache.shape == (1000, 1)
    write_document(tmp_path / "file", table(2), tensors)
    with pytest.raises(EstimatorFileError, match="tables take more memory"):
        skhead.load(tmp_path / "file")


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "kernel.safetensors"
    skhead.save(skhead.ProjectionKernel(pairs=("OV",)).fit(heads().iloc[:2]), path)
    return path


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, -1])
def test_truncated(keep, saved):
    raw = saved.read_bytes()
    saved.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(EstimatorFileError, match="truncated"):
        skhead.load(saved)


def test_altered_bytes_of_header_and_data_are_noticed(saved):
    raw = saved.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + length]
    places = [*range(0, 8 + len(text.rstrip()), 7), *range(8 + length, len(raw), 997), len(raw) - 1]
    for place in places:
        changed = bytearray(raw)
        changed[place] ^= 1
        saved.write_bytes(changed)
        with pytest.raises(EstimatorFileError):
            skhead.load(saved)


def test_bytes_behind_the_end(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(EstimatorFileError, match="bytes follow the last tensor"):
        skhead.load(saved)


def test_foreign_files(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"\x80\x04\x95" + 30 * b"x", b"PK\x03\x04" + 50 * b"\0", b"text\n" * 9):
        path.write_bytes(content)
        with pytest.raises(EstimatorFileError, match="no file of skhead.save"):
            skhead.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(EstimatorFileError, match=r"For the weights of a model use skhead\.load_he"):
        skhead.load(path)
    with pytest.raises(EstimatorFileError, match="is a directory"):
        skhead.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        skhead.load(tmp_path / "nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_what_is_no_file_is_not_read(tmp_path):
    """A pipe would wait for ever, and a device never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(EstimatorFileError, match=f"{name} is no ordinary file"):
            skhead.load(tmp_path / name)


def write_document(path, document, tensors=None, **facts):
    """A file with a right checksum, whatever it says."""
    known = {"format": "skhead-estimator-1", "skhead_version": skhead.__version__}
    archive.write_archive(path, json.dumps(document), tensors or {}, known | facts)


EXTRACTOR = {
    "object": "skhead.SubspaceExtractor",
    "state": {
        "roles": "QKVO", "rank": None, "fold_norm": False, "center": False, "device": None,
        "cache": None, "max_memory": "1GiB",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "facts", [{"format": "skhead-estimator-2"}, {"skhead_version": "99.0"}], ids=str
)
def test_files_of_later_versions(facts, tmp_path):
    write_document(tmp_path / "file", EXTRACTOR, **facts)
    with pytest.raises(EstimatorFileError, match=r"later versions\. Upgrade"):
        skhead.load(tmp_path / "file")


def test_files_of_earlier_versions_are_read_with_a_warning(tmp_path):
    write_document(tmp_path / "file", EXTRACTOR, skhead_version="0.0.1")
    with pytest.warns(UserWarning, match=r"written by skhead 0\.0\.1"):
        assert skhead.load(tmp_path / "file").roles == "QKVO"


def test_another_version_of_scikit_learn_warns(tmp_path):
    state = StandardScaler().__getstate__() | {"_sklearn_version": "1.0"}
    write_document(
        tmp_path / "file", {"object": "sklearn.preprocessing.StandardScaler", "state": state}
    )
    with pytest.warns(InconsistentVersionWarning, match=r"from version 1\.0"):
        skhead.load(tmp_path / "file")


@pytest.mark.parametrize(
    "facts",
    [
        {"format": "other-1"},
        {"skhead_version": "?"},
        {"format": "skhead-estimator-" + "9" * 5000},
        {"skhead_version": "9" * 5000},
    ],
    ids=["format", "version", "long format", "long version"],
)
def test_files_of_no_version(facts, tmp_path):
    write_document(tmp_path / "file", EXTRACTOR, **facts)
    with pytest.raises(EstimatorFileError, match="no file of skhead.save"):
        skhead.load(tmp_path / "file")


def _with(**changes):
    return EXTRACTOR | {"state": EXTRACTOR["state"] | changes}


def _held(value):
    return _with(cache=value)


HUGE = 2**62
HOSTILE = {
    "class that is not listed": {"object": "os.system", "state": {}},
    "module": {"object": "subprocess.Popen", "state": {"args": ["true"]}},
    "name of an attribute": {"object": "skhead.load_heads", "state": {}},
    "no name": {"object": 3, "state": {}},
    "list as a name": {"object": ["skhead.SubspaceExtractor"], "state": {}},
    "private class": {"object": "skhead.weights.files.Checkpoint", "state": {}},
    "missing parameter": {"object": "skhead.SubspaceExtractor", "state": {"roles": "Q"}},
    "a method replaced": _with(transform=3),
    "a dunder": _with(__class__="x"),
    "no identifier": _with(**{"a b": 1}),
    "state of another kind": {"object": "skhead.SubspaceExtractor", "state": [1]},
    "fields": {"object": "skhead.Subspaces", "state": {"heads": 1}},
    "no estimator": [1, 2],
    "number": 3,
    "unknown tag": {"pickle": "gASV"},
    "empty": {},
    "missing tensor": _held({"array": "0", "turned": False}),
    "tensor that is no name": _held({"tensor": [1]}),
    "huge shape": _held({"objects": [], "shape": [HUGE, 0, HUGE]}),
    "negative shape": _held({"objects": [], "shape": [-1]}),
    "shape that does not fit": _held({"texts": ["a"], "shape": [2], "width": 1}),
    "width of texts": _held({"texts": ["a"] * 9, "shape": [9], "width": 10**9}),
    "text longer than it claims": _held({"texts": ["abc"], "shape": [1], "width": 1}),
    "no texts": _held({"texts": [1], "shape": [1], "width": 1}),
    "generator": _held({"generator": {"dict": [["bit_generator", "SFC64"]]}}),
    "name of a function": _held({"generator": {"dict": [["bit_generator", "seed"]]}}),
    "range": {"frame": [], "columns": {"range": [0, HUGE, 1], "name": None}, "rows": 1},
    "zero step": _held({"range": [0, 1, 0], "name": None}),
    "table without labels": _held({"frame": [["str", ["a"]]], "columns": 1, "rows": 1, "attrs": 1}),
    "unhashable key": _held({"dict": [[[1], 2]]}),
    "no pairs": _held({"dict": [1]}),
    "unhashable member": _held({"set": [[1]]}),
    "device": _held({"device": "meta"}),
    "dtype": _held({"torch_dtype": "object"}),
    "scalar": _held({"scalar": ["object", 1]}),
    "scalar too large": _held({"scalar": ["int8", 1000]}),
    "float": _held({"float": "1e5"}),
    "tuple of a text": _held({"tuple": "abc"}),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_documents_that_save_did_not_write(case, tmp_path):
    write_document(tmp_path / "file", HOSTILE[case])
    with pytest.raises(EstimatorFileError):
        skhead.load(tmp_path / "file")


def test_state_of_a_twister_out_of_bounds(tmp_path):
    writer = Writer("test")
    document = writer.write(np.random.RandomState(0), "x")
    text = json.dumps(document).replace('["pos", 624]', f'["pos", {10**6}]')
    assert text != json.dumps(document)
    write_document(tmp_path / "file", _held(json.loads(text)), writer.tensors)
    with pytest.raises(EstimatorFileError, match="impossible"):
        skhead.load(tmp_path / "file")


def test_nested_without_end(tmp_path):
    known = {"format": "skhead-estimator-1", "skhead_version": skhead.__version__}
    archive.write_archive(tmp_path / "file", "[" * 10**6 + "]" * 10**6, {}, known)
    with pytest.raises(EstimatorFileError, match="RecursionError"):
        skhead.load(tmp_path / "file")


def test_nothing_is_imported_that_is_not_listed(tmp_path, monkeypatch):
    imported, real = [], importlib.import_module
    monkeypatch.setattr("importlib.import_module", lambda x: imported.append(x) or real(x))
    for case in HOSTILE.values():
        write_document(tmp_path / "file", case)
        with pytest.raises(EstimatorFileError):
            skhead.load(tmp_path / "file")
    listed = {module for module, _ in STORED.values()}
    own = {name for name in imported if name.partition(".")[0] in ("os", "skhead", "subprocess")}
    assert own
    assert own <= listed | set(skhead._EXPORTS.values())


def test_loading_opens_no_other_file(tmp_path):
    """Nor does it make one, whatever paths the parameters and the tables name."""
    other = tmp_path / "other"
    other.mkdir()
    estimator = make_pipeline(
        skhead.SubspaceExtractor(cache=other / "cache"), skhead.LinearCKA().fit(heads())
    )
    estimator[1].reference_heads_["source"] = str(other)
    skhead.save(estimator, tmp_path / "file")
    skhead.load(tmp_path / "file")  # whatever is imported late is imported here
    opened: list[str] = []
    watching = True

    def watch(event, arguments):
        if watching and event in ("open", "os.mkdir", "os.listdir", "os.scandir", "socket.connect"):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    skhead.load(tmp_path / "file")
    watching = False
    assert opened == [str(tmp_path / "file")]
    assert not list(other.iterdir())


def test_errors_are_errors_of_skhead():
    assert issubclass(EstimatorFileError, SkheadError) and issubclass(
        EstimatorFileError, ValueError
    )
    assert issubclass(UnstorableError, SkheadError) and issubclass(UnstorableError, TypeError)


# skops, for those who have it


#: What skops can store: it knows neither tensors nor the tables of pandas.
PLAIN = {
    "SubspaceExtractor", "HeadClassifier of a matrix", "CircuitScorer", "SubspaceReadout",
    "SalientOperations", "QKTransformer",
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_skops(name):
    skops = pytest.importorskip("skops.io", reason="skops is not installed")
    estimator, ask = MAKERS[name]()
    if name not in PLAIN:
        with pytest.raises((TypeError, RuntimeError)):
            skops.loads(*_dumped(skops, estimator))
        return
    raw, trusted = _dumped(skops, estimator)
    assert all(kind.startswith("skhead.") for kind in trusted)
    assert_same(ask(skops.loads(raw, trusted=trusted)), ask(estimator))


def _dumped(skops, estimator):
    raw = skops.dumps(estimator)
    return raw, skops.get_untrusted_types(data=raw)


def test_table_of_a_model_is_read_where_it_was(tmp_path):
    skhead.save(skhead.LinearCKA().fit(heads()), tmp_path / "file")
    assert skhead.load(tmp_path / "file").reference_heads_["source"].unique().tolist() == [BUNDLED]
