"""How long jobs tell how far they are: bars in terminals, and scikit-learn's callbacks."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from joblib import Memory
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from test_common import public_estimators

import skhead
from skhead._callers import users_level
from skhead._progress import progress_bar, progress_fraction, progress_of_calls
from skhead.datasets import load_payload_head, make_payload_retrieval

callbacks = pytest.mark.skipif(
    not hasattr(LogisticRegression, "set_callbacks"), reason="scikit-learn before 1.9"
)
COPYING = {"copying": [(token, token) for token in range(2, 66)]}


class Log:
    """A callback that writes down what it is told."""

    max_propagation_depth = None

    def __init__(self, stop: bool = False) -> None:
        self.events: list[tuple[str, str, str]] = []
        self.told = Counter()
        self.expected: dict[str, int | None] = {}
        self.stop = stop

    def setup(self, estimator, context):
        self.events.append(("setup", context.estimator_name, ""))

    def teardown(self, estimator, context):
        self.events.append(("teardown", context.estimator_name, ""))

    def on_fit_task_begin(self, estimator, context, *, X=None, y=None):
        self.events.append(("begin", context.estimator_name, context.task_name))
        self.expected[context.task_name] = context.max_subtasks

    def on_fit_task_end(self, estimator, context):
        self.events.append(("end", context.estimator_name, context.task_name))
        self.told[context.task_name] += 1
        return self.stop

    def balanced(self) -> bool:
        begun, ended = (
            Counter(event[1:] for event in self.events if event[0] == kind)
            for kind in ("begin", "end")
        )
        return begun == ended


@pytest.fixture(scope="module")
def heads():
    return skhead.load_heads("skhead/induction-2l")


def contrast_pairs():
    head = load_payload_head("d16-r3-r5")
    return make_payload_retrieval(60, embeddings=head.embeddings, random_state=0).pairs(head)


def looping(heads):
    """Estimators with long jobs in their fit, what they are fitted on, and what is told."""
    decomposer = skhead.ContrastiveQKDecomposer(
        rank="null", n_permutations=99, alpha=0.05, random_state=0
    )
    mapper = skhead.OperationMapper(COPYING, source_embedding="raw")
    return {
        "SubspaceExtractor": (skhead.SubspaceExtractor(), heads, "role", 4),
        "ProjectionKernel": (skhead.ProjectionKernel(), heads, "percent", 100),
        "CompositionScore": (skhead.CompositionScore(), heads, "percent", 100),
        "CircuitScorer": (skhead.CircuitScorer(), heads, "batch", None),
        "OperationMapper": (mapper, heads, "layer", 2),
        "ContrastiveQKDecomposer": (decomposer, contrast_pairs(), "percent", 200),
    }


@callbacks
@pytest.mark.parametrize("name", looping(None))
def test_callbacks_hear_of_every_part_of_a_fit(name, heads):
    estimator, X, part, n_parts = looping(heads)[name]
    log = Log()
    silent = clone(estimator).fit_transform(X)
    found = estimator.set_callbacks(log).fit_transform(X)
    assert log.balanced()
    assert log.events[0] == ("setup", name, "") and log.events[-1] == ("teardown", name, "")
    assert log.told["fit"] == 1
    assert log.told[part] >= 1 if n_parts is None else log.told[part] == n_parts
    first, second = (x.numpy("Q") if hasattr(x, "numpy") else x for x in (silent, found))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert not [name for name in vars(estimator) if "callback_fit" in name]


@callbacks
def test_jobs_say_how_many_parts_they_have(heads):
    log = Log()
    skhead.SubspaceExtractor(roles="QK").set_callbacks(log).fit_transform(heads)
    assert log.expected == {"fit": None, "bases": 2, "role": 0}


@callbacks
def test_pipeline_hands_callbacks_to_every_step(heads):
    log = Log()
    steps = make_pipeline(
        skhead.SubspaceExtractor(),
        skhead.ProjectionKernel(),
        skhead.NullCalibrator(),
        skhead.HeadClassifier(),
    )
    with pytest.warns(UserWarning, match="undefined"):
        steps.set_callbacks(log).fit(heads, heads["head"] % 2)
    assert log.balanced()
    names = {"Pipeline", *(type(step).__name__ for _, step in steps.steps)}
    assert {event[1] for event in log.events} == names
    assert [event for event in log.events if event[0] in ("setup", "teardown")] == [
        ("setup", "Pipeline", ""),
        ("teardown", "Pipeline", ""),
    ]


@callbacks
def test_every_public_estimator_takes_callbacks():
    for cls in public_estimators():
        assert callable(cls.set_callbacks)
        assert cls.fit.__wrapped__


@callbacks
def test_a_wish_to_stop_leaves_nothing_out(heads):
    log = Log(stop=True)
    found = skhead.SubspaceExtractor().set_callbacks(log).fit_transform(heads)
    assert found.roles == ("Q", "K", "V", "O") and log.told["role"] == 4


@callbacks
def test_callbacks_are_taken_down_when_a_fit_fails(heads):
    log = Log()
    with pytest.raises(ValueError, match="roles"):
        skhead.SubspaceExtractor(roles="Z").set_callbacks(log).fit(heads)
    assert log.events[-1] == ("teardown", "SubspaceExtractor", "")
    again = Log()
    skhead.SubspaceExtractor().set_callbacks(again).fit_transform(heads)
    assert again.balanced()


@callbacks
@pytest.mark.slow
def test_callbacks_stay_behind_when_workers_compare(heads):
    log = Log()
    kernel = skhead.ProjectionKernel(pairs=["OK"], n_jobs=2).set_callbacks(log)
    alone = skhead.ProjectionKernel(pairs=["OK"]).fit_transform(heads)
    np.testing.assert_array_equal(kernel.fit_transform(heads).values, alone.values)
    assert log.balanced()


@callbacks
def test_callbacks_leave_cached_steps_alone(heads, tmp_path):
    memory = Memory(tmp_path, verbose=0)
    steps = make_pipeline(skhead.SubspaceExtractor(), skhead.ProjectionKernel(), memory=memory)
    for _ in range(2):
        clone(steps.set_callbacks(Log())).fit(heads)
    assert len(list(tmp_path.rglob("output.pkl"))) == 1


def test_transform_alone_reports_to_nobody(heads):
    kernel = skhead.ProjectionKernel().fit(heads)
    if hasattr(kernel, "set_callbacks"):
        log = Log()
        kernel.set_callbacks(log).transform(heads)
        assert not log.events


def test_warnings_point_at_the_users_line(heads):
    similarity = skhead.ProjectionKernel(pairs=["OK"]).fit_transform(heads)
    classifier = skhead.HeadClassifier()
    with pytest.warns(UserWarning, match="undefined") as plain:
        classifier.fit(similarity, heads["head"] % 2)
    assert {found.filename for found in plain} == {__file__}
    if hasattr(classifier, "set_callbacks"):
        with pytest.warns(UserWarning, match="undefined") as told:
            classifier.set_callbacks(Log()).fit(similarity, heads["head"] % 2)
        assert {found.filename for found in told} == {__file__}


def test_a_file_beside_the_package_is_the_users():
    """Its path begins like the package's, as that of a script skhead_demo.py does."""
    package = Path(skhead.__file__).parent
    script = compile("def where(warn): warn()", str(package.with_name("skhead_demo.py")), "exec")
    names: dict = {"__name__": "skhead_demo"}
    exec(script, names)
    inner = compile(
        "def warn():\n    warnings.warn('here', stacklevel=users_level())",
        str(package / "inner.py"),
        "exec",
    )
    own: dict = {"__name__": "skhead.inner", "warnings": warnings, "users_level": users_level}
    exec(inner, own)
    with pytest.warns(UserWarning, match="here") as found:
        names["where"](own["warn"])
    assert found[0].filename == str(package.with_name("skhead_demo.py"))


def test_counted_calls_tell_their_share(monkeypatch):
    shares = []
    monkeypatch.setattr("skhead._progress.progress_fraction", _recorder(shares))
    with progress_of_calls(lambda x: x + 1, 4, "adding") as add:
        assert [add(i) for i in range(4)] == [1, 2, 3, 4]
    assert shares == [0.25, 0.5, 0.75, 1.0]


def _recorder(shares):
    from contextlib import contextmanager

    @contextmanager
    def record(description):
        yield shares.append

    return record


def test_bars_are_quiet_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("time.time", _hours())
    assert list(progress_bar(range(3), "counting", unit="number")) == [0, 1, 2]
    with progress_fraction("counting") as advance:
        advance(1.0)
    assert capsys.readouterr() == ("", "")


def _hours():
    clock = iter(range(0, 10**9, 3600))
    return lambda: float(next(clock))


SLOW = """
import time
from skhead._progress import progress_bar
for i in progress_bar(range(3), "counting", unit="number"):
    time.sleep(1.2)
"""


@pytest.mark.slow
def test_bars_show_in_a_terminal_after_two_seconds():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.Popen([sys.executable, "-c", SLOW], stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 1024)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    assert done.wait() == 0
    assert b"counting" in shown and b"2/3" in shown and b"1/3" not in shown


WITHOUT = """
import builtins
real = builtins.__import__
def refuse(name, globals=None, *rest):
    if name == "sklearn.callback" and (globals or {}).get("__name__") == "skhead._progress":
        raise ImportError(name)
    return real(name, globals, *rest)
builtins.__import__ = refuse
import skhead
heads = skhead.load_heads("skhead/induction-2l")
steps = [skhead.SubspaceExtractor(), skhead.ProjectionKernel(), skhead.NullCalibrator()]
found = heads
for step in steps:
    assert not hasattr(step, "set_callbacks"), step
    found = step.fit_transform(found)
print(found)
"""


def test_estimators_work_where_scikit_learn_has_no_callbacks():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Similarity(16 x 16 heads, pairs OQ OK OV, unit z)"
