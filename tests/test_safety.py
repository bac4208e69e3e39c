"""No code out of files, no state that threads share unguarded, no memory that grows."""

from __future__ import annotations

import ast
import gc
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fitted import BUNDLED, MAKERS, assert_same, heads
from sklearn.pipeline import make_pipeline
from toys import random_weights

import skhead
from skhead.stats import haar_logsf, haar_tails
from skhead.weights import basis_store, live

PACKAGE = Path(skhead.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text("utf-8")) for path in FILES}

#: Libraries whose loading executes what a file says.
PICKLING = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "yaml"}
LOADS = {"load", "loads", "Unpickler", "read_pickle", "safe_load", "unsafe_load"}


def unsafe_calls(tree):
    """Calls that read a file in a way that may execute it, and calls of eval and its like."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {key.arg: ast.unparse(key.value) for key in node.keywords}
        root, _, last = name.rpartition(".")
        if (
            name in ("eval", "exec", "compile", "__import__")
            or (name == "torch.load" and options.get("weights_only") != "True")
            or (root in ("np", "numpy") and options.get("allow_pickle", "False") != "False")
            or last == "read_pickle"
            or (root.split(".")[0] in PICKLING and last in LOADS)
            or options.get("trust_remote_code", "False") != "False"
        ):
            yield name


def imported_from_pickling(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLING:
            yield from (alias.name for alias in node.names if alias.name in LOADS)


#: Pickles what it has just made itself, to see whether an estimator survives it.
PICKLES_ITS_OWN = "testing/_state.py"


@pytest.mark.parametrize("name", [name for name in TREES if name != PICKLES_ITS_OWN])
def test_nothing_is_unpickled_or_evaluated(name):
    assert not list(unsafe_calls(TREES[name]))
    assert not list(imported_from_pickling(TREES[name]))


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.load(file)",
        "pickle.loads(raw)", "pickle.Unpickler(file).load()", "joblib.load(path)",
        "np.load(path, allow_pickle=True)", "pd.read_pickle(path)", "eval(text)", "exec(text)",
        "Model.from_pretrained(path, trust_remote_code=True)", "yaml.load(file)",
    ],
)  # fmt: skip
def test_unsafe_calls_are_seen(code):
    assert list(unsafe_calls(ast.parse(code)))


def test_names_from_pickling_libraries_are_seen():
    assert list(imported_from_pickling(ast.parse("from pickle import loads as read")))


# State of modules

MUTATING = {
    "add", "append", "clear", "discard", "extend", "insert", "move_to_end", "pop", "popitem",
    "remove", "setdefault", "update",
}  # fmt: skip
CACHES = ("lru_cache", "cache", "cached")
#: Caches of pure functions whose values nobody can change; functools keeps them under a lock.
PURE = {
    ("_report/classes.py", "_scores_of_zoo"),
    ("linalg/precision.py", "_probe"),
    ("stats/haar_tails.py", "_sampled_law"),
}


#: Filled by a decorator while modules are imported, and only read afterwards.
FILLED_AT_IMPORT = {("testing/_checks.py", "CHECKS")}


def module_names(tree):
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def mutations(tree):
    """Places in functions where something that a module holds is changed, by its name."""
    names = set(module_names(tree))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any("lock" in ast.unparse(item.context_expr).lower() for item in node.items)
        for inner in ast.walk(node)
    }
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            if id(node) in guarded:
                continue
            if isinstance(node, ast.Global):
                yield from node.names
            stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
            if isinstance(node, ast.Subscript | ast.Attribute) and stored:
                yield from names & {ast.unparse(node.value)}
            method = node.func if isinstance(node, ast.Call) else None
            if isinstance(method, ast.Attribute) and method.attr in MUTATING:
                yield from names & {ast.unparse(method.value)}


def cached_functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(item).partition("(")[0] for item in node.decorator_list]
            if any(item.rpartition(".")[2] in CACHES for item in decorators):
                yield node.name


@pytest.mark.parametrize("name", TREES)
def test_no_module_holds_state_that_is_changed_without_a_lock(name):
    assert {(name, held) for held in mutations(TREES[name])} <= FILLED_AT_IMPORT
    assert {(name, function) for function in cached_functions(TREES[name])} <= PURE


@pytest.mark.parametrize(
    "code",
    [
        "A = {}\ndef f(k):\n    A[k] = 1", "A = []\ndef f(k):\n    A.append(k)",
        "A: dict = {}\ndef f(k):\n    del A[k]", "A = 0\ndef f():\n    global A\n    A = 1",
        "A = {}\nf = lambda k: A.setdefault(k, 1)",
    ],
)  # fmt: skip
def test_changed_state_is_seen(code):
    assert list(mutations(ast.parse(code))) == ["A"]


def test_what_is_cached_cannot_be_changed():
    haar_logsf([1.0, 2.0], 4, 4, 16)
    law = haar_tails._sampled_law(haar_tails.reduce_law(4, 4, 16), 1000, 0)
    for array in (law.grid, law.levels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0


# Threads

THREADS = 8
#: What concurrent products of float32 may differ by: while one thread is in oneDNN's fast mode,
#: products of the others take the same path, whose sums have another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def together(work):
    """Run the same thing in eight threads that begin at once; return what each of them found."""
    start = threading.Barrier(THREADS)

    def begin(_):
        start.wait(timeout=60)
        return work()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def assert_close(found, expected):
    if isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, skhead.Similarity):
        np.testing.assert_allclose(found.values, expected.values, **ROUNDING)
    elif isinstance(expected, np.ndarray) and expected.dtype.kind == "f":
        np.testing.assert_allclose(found, expected, **ROUNDING)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert_same(found, expected)


IN_THREADS = (
    "ProjectionKernel", "CompositionScore", "NullCalibrator anisotropic",
    "HeadClassifier of a matrix", "ContrastiveQKDecomposer",
    pytest.param("OperationMapper", marks=pytest.mark.slow),
    pytest.param("Pipeline", marks=pytest.mark.slow),
)  # fmt: skip


@pytest.mark.parametrize("name", IN_THREADS)
def test_threads_that_fit_the_same_find_the_same(name):
    def work():
        estimator, ask = MAKERS[name]()
        return ask(estimator)

    expected = work()
    for found in together(work):
        assert_close(found, expected)


@pytest.mark.parametrize("name", ["NullCalibrator anisotropic", "HeadClassifier"])
def test_threads_share_one_fitted_estimator(name, tmp_path):
    estimator, ask = MAKERS[name]()
    path = tmp_path / "file"
    skhead.save(estimator, path)
    expected = ask(estimator)
    fresh = skhead.load(path)
    for found in together(lambda: ask(fresh)):
        assert_close(found, expected)
    for found in together(lambda: ask(skhead.load(path))):
        assert_close(found, expected)


def test_threads_save_to_one_file(tmp_path):
    kernel = skhead.ProjectionKernel().fit(heads())
    path = tmp_path / "file"
    together(lambda: skhead.save(kernel, path))
    assert list(tmp_path.iterdir()) == [path]
    assert_same(skhead.load(path)._reference, kernel._reference)


def test_threads_fill_one_cache(tmp_path):
    expected = skhead.SubspaceExtractor().fit_transform(heads()).numpy("Q")
    extractor = skhead.SubspaceExtractor(cache=tmp_path)
    for found in together(lambda: extractor.fit_transform(heads()).numpy("Q")):
        np.testing.assert_allclose(found, expected, **ROUNDING)
    assert not list(tmp_path.glob("*.tmp"))


def test_what_is_known_of_files_is_bounded(tmp_path):
    known = basis_store._Verified(most=3)
    skhead.SubspaceExtractor(cache=tmp_path).fit_transform(heads())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    for path in files * 2:
        with path.open("rb", buffering=0) as file:
            layout = known.layout(str(path), file)
            assert known.layout(str(path), file) is layout
        assert len(known._layouts) <= 3


def test_threads_register_and_forget_models():
    weights = random_weights(n_layers=1)

    def work():
        name = f"thread-{threading.get_ident()}"
        for _ in range(20):
            skhead.register_model(weights, name)
            assert len(skhead.load_heads(name)) == 4
            skhead.unregister_model(name)
            assert not live.is_registered(name)
        return live.open_live(name)

    assert together(work) == [None] * THREADS


def test_one_of_several_threads_forgets_a_model():
    skhead.register_model(random_weights(n_layers=1), "wanted")

    def work():
        try:
            skhead.unregister_model("wanted")
        except ValueError as error:
            return str(error)
        return "forgotten"

    found = together(work)
    assert found.count("forgotten") == 1
    assert sum("no live model is named 'wanted'" in text for text in found) == THREADS - 1


# Determinism

PROGRAM = """
import hashlib, json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from fitted import MAKERS
torch.set_num_threads(int(sys.argv[2]))

def flat(value):
    return [x for part in value for x in flat(part)] if isinstance(value, list) else [value]

found = {}
for name in sys.argv[3].split(","):
    estimator, ask = MAKERS[name]()
    arrays = [np.asarray(part) for part in flat(ask(estimator))]
    raw = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays if a.dtype != object)
    found[name] = {
        "hash": hashlib.sha256(raw).hexdigest(),
        "values": [a.ravel()[:200].tolist() for a in arrays if a.dtype.kind == "f"],
    }
print(json.dumps(found))
"""
DETERMINED = "NullCalibrator anisotropic,HeadClassifier,ContrastiveQKDecomposer"


def numbers_of_a_process(threads):
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", PROGRAM, tests, str(threads), DETERMINED]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env=environment
    )
    return json.loads(done.stdout)


def test_fresh_processes_find_the_same_bits_and_threads_the_same_up_to_rounding():
    with ThreadPoolExecutor(3) as pool:
        first, again, two = pool.map(numbers_of_a_process, (1, 1, 2))
    assert first == again
    for name, expected in first.items():
        assert expected["values"]
        for found, wanted in zip(two[name]["values"], expected["values"], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


# Memory


def _fit_once(table):
    steps = make_pipeline(
        skhead.SubspaceExtractor(roles="OV"),
        skhead.ProjectionKernel(pairs=("OV",)),
        skhead.NullCalibrator(),
    )
    steps.fit_transform(table)


def grown(n_fits):
    """Bytes of Python objects, and of the process, that fits leave behind."""
    table = skhead.load_heads(BUNDLED)
    for _ in range(5):
        _fit_once(table)
    gc.collect()
    tracemalloc.start()
    resident, held = _resident(), tracemalloc.get_traced_memory()[0]
    for _ in range(n_fits):
        _fit_once(table)
    gc.collect()
    left = tracemalloc.get_traced_memory()[0] - held
    tracemalloc.stop()
    return left, _resident() - resident


def _resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the system does not tell the memory in use"
)
#: Bases of the two roles take a quarter of a megabyte: a few fits that stay in memory show.
LEAST_LEAK = 2 * 16 * 128 * 16 * 4


@needs_proc
def test_fits_leave_nothing_behind():
    left, resident = grown(10)
    assert left < LEAST_LEAK
    assert resident < 9 * LEAST_LEAK


@needs_proc
@pytest.mark.slow
def test_two_hundred_fits_leave_nothing_behind():
    left, resident = grown(200)
    assert left < LEAST_LEAK
    assert resident < 40 * LEAST_LEAK  # of the 200 that would stay if every fit did


def test_models_that_are_forgotten_are_freed():
    weights = random_weights()
    tensor = next(iter(weights.values()))
    before = sys.getrefcount(tensor)
    for _ in range(3):
        skhead.register_model(weights, "short")
        skhead.ProjectionKernel().fit(skhead.load_heads("short"))
        skhead.unregister_model("short")
    gc.collect()
    assert sys.getrefcount(tensor) == before
