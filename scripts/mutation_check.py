"""Do the tests notice when the mathematics is wrong? ``make mutation MUTANTS=150 SEED=0``.

Draws small changes ("mutants") of the modules of ``skhead.linalg`` and ``skhead.stats``, makes one
at a time in a copy of the project, and runs the test files that import the changed module: the one
named after it first, then the fast ones. A mutant is killed when a test fails, or hangs; one that
survives is a gap in the tests, or changes nothing that a result shows.

Places are drawn evenly, then one of the changes that suit the place. Some kinds never change a
result and are not drawn:

- texts, annotations, ``__all__``, and what stands inside of a ``raise`` or a warning;
- decorators and their arguments: caches, and whether a dataclass is frozen or has slots;
- ``strict=True`` of ``zip``, which guards against mistakes of the package itself;
- constants that say how much is done at once: those of `SCRATCH`, where they are set.

Other survivors need a reader. Most that change no result are

- sizes of chunks, and the bytes that a step is expected to take;
- roads: which of two computations of the same value runs, and limits a little off;
- ``<`` for ``<=`` where both branches agree, or where equality has probability zero;
- starts, steps and ends of iterations that converge all the same;
- an axis counted from the other end, ``-1`` for ``1``;
- values that cancel later or are multiplied by zero, and bounds that never bind;
- one of two conditions of which each implies the other, and locks against a misuse.

Needs cosmic-ray, whose operators it applies.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

from mutation_operators import Mutant, change, mutants_of, mutated

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("linalg", "stats")
#: A run hangs after this many times what unchanged tests take, and so many seconds more.
SLOWDOWN, GRACE = 3.0, 15.0
#: Address space of one run, in bytes: no mutant takes the machine's memory.
MEMORY = 12 * 2**30
#: Exit status of a run that imported another copy of the package.
WRONG_COPY = 97
#: Exit status of pytest where all tests passed, or none runs by default.
PASSED = (0, 5)


@dataclass(frozen=True)
class Job:
    """Test files to run, perhaps with one file of the package changed.

    Attributes
    ----------
    tests : tuple of str
    limit : float
        Seconds after which the run counts as hanging.
    mutant : Mutant or None
    text : str
        Of the changed file.
    """

    tests: tuple[str, ...]
    limit: float = 600.0
    mutant: Mutant | None = None
    text: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes
    ----------
    job : Job
    verdict : {"killed", "timed out", "survived"}
    by : str
        The test that failed first.
    seconds : float
    """

    job: Job
    verdict: str
    by: str
    seconds: float


class Workspace:
    """A copy of the project in which one job runs at a time.

    Parameters
    ----------
    directory : Path
        Where to put it.
    """

    def __init__(self, directory: Path) -> None:
        self.root = directory
        self.log = directory.with_suffix(".log")
        listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, directory / name)
        # By hash: a changed source is never taken for one compiled in the same second.
        hashed = PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(directory / "skhead", quiet=2, invalidation_mode=hashed)
        self.job: Job | None = None

    def start(self, job: Job) -> int:
        """Run a job in a child that has the heavy libraries already; its process id."""
        if job.mutant:
            (self.root / job.mutant.file).write_text(job.text, encoding="utf-8")
        self.job, self.begun = job, time.monotonic()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setsid()
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                status = self._test(job.tests)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        return pid

    def _test(self, files: Sequence[str]) -> int:
        import pytest

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(self.root)
        os.environ["PYTHONPATH"] = str(self.root)
        sys.path.insert(0, str(self.root))
        sys.dont_write_bytecode = True
        import skhead

        if not Path(skhead.__file__).is_relative_to(self.root):
            return WRONG_COPY
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", f"--rootdir={self.root}"]
        return int(pytest.main([*options, *files]))

    def finish(self, status: int | None) -> Outcome:
        """Put the changed file back; the outcome of a job that ended, or of one that hangs."""
        job, self.job = self.job, None
        if job.mutant:
            shutil.copy2(ROOT / job.mutant.file, self.root / job.mutant.file)
        if status == WRONG_COPY:
            sys.exit("mutation_check: the tests import another copy of skhead than the changed one")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", self.log.read_text(errors="replace"), re.M)
        verdict = "survived" if status in PASSED else "killed" if status else "timed out"
        return Outcome(job, verdict, next(iter(failed), ""), time.monotonic() - self.begun)


def outcomes(
    jobs: Iterable[Job], spaces: Sequence[Workspace], deadline: float = float("inf")
) -> Iterator[Outcome]:
    """Run jobs, one in each workspace at a time, and begin none after the deadline."""
    left, free, busy = iter(jobs), list(spaces), {}
    while True:
        while free and time.monotonic() < deadline:
            job = next(left, None)
            if job is None:
                break
            space = free.pop()
            busy[space.start(job)] = space
        if not busy:
            return
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in busy:
            space = busy.pop(pid)
            free.append(space)
            yield space.finish(os.waitstatus_to_exitcode(status))
            continue
        now = time.monotonic()
        for pid in [p for p, s in busy.items() if now - s.begun > s.job.limit]:
            space = busy.pop(pid)
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            free.append(space)
            yield space.finish(None)
        time.sleep(0.02)


def imported(source: str) -> Iterator[str]:
    """Modules and names that a file imports, with dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tests_by_module() -> dict[str, set[str]]:
    """Test files that import each module; a name that a room passes on counts for its module."""
    origin = {
        f"skhead.{room}.{alias.name}": node.module
        for room in ROOMS
        for node in ast.walk(ast.parse((ROOT / "skhead" / room / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    tests: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in imported(path.read_text(encoding="utf-8")):
            file = str(path.relative_to(ROOT))
            tests.setdefault(origin.get(name, name), set()).add(file)
    return tests


def module_of(file: str) -> str:
    """The module that a file of the package is."""
    return file.removesuffix(".py").replace("/", ".")


def sources() -> dict[str, str]:
    """Text of every module of the rooms, by path."""
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for room in ROOMS
        for path in sorted((ROOT / "skhead" / room).glob("*.py"))
        if path.name != "__init__.py"
    }


def drawn(texts: dict[str, str], most: int, seed: int) -> dict[Mutant, str]:
    """Mutants of `most` places in random order, each with the text of its file."""
    places: dict[tuple, list[Mutant]] = {}
    for file, text in texts.items():
        for mutant in mutants_of(file, text):
            places.setdefault((file, mutant.start, mutant.end), []).append(mutant)
    order, rng = sorted(places), random.Random(seed)
    rng.shuffle(order)
    chosen: dict[Mutant, str] = {}
    for place in order:
        mutant = rng.choice(places[place])
        if len(chosen) < most and (text := mutated(mutant, texts[mutant.file])):
            chosen[mutant] = text
    return chosen


def survivors(texts: dict[str, str], report: Path) -> dict[Mutant, str]:
    """The mutants of an earlier report that survived, each with the text of its file."""
    entries = json.loads(report.read_text(encoding="utf-8"))["mutants"]
    wanted = {
        (e["file"], e["operator"], e["occurrence"]) for e in entries if e["verdict"] == "survived"
    }
    return {
        mutant: mutated(mutant, texts[file])
        for file in sorted({file for file, _, _ in wanted} & set(texts))
        for mutant in mutants_of(file, texts[file])
        if (file, mutant.operator, mutant.occurrence) in wanted
    }


def jobs_of(
    mutants: dict[Mutant, str], tests: dict[str, set[str]], seconds: dict[str, float]
) -> Iterator[Job]:
    """A job for each mutant: the test named after its module, then the fastest first."""
    for mutant, text in mutants.items():
        module = module_of(mutant.file)
        named = f"test_{module.rpartition('.')[2]}"
        files = tests.get(module, set()) & set(seconds)
        if not files:
            sys.exit(f"mutation_check: no test file that passes imports {module}")
        files = sorted(files, key=lambda file: (Path(file).stem != named, seconds[file]))
        limit = SLOWDOWN * sum(map(seconds.get, files)) + GRACE
        yield Job(tuple(files), limit, mutant, text)


def unchanged(files: set[str], spaces: Sequence[Workspace]) -> dict[str, float]:
    """Seconds of each test file that passes without any change; others can tell nothing."""
    seconds = {}
    for outcome in outcomes((Job((file,)) for file in sorted(files)), spaces):
        (file,) = outcome.job.tests
        if outcome.verdict == "survived":
            seconds[file] = outcome.seconds
        else:
            print(
                f"left out, {outcome.verdict} without any change: {file} {outcome.by}", flush=True
            )
    return seconds


def warm_up() -> None:
    """Import what all tests need and none changes, before the first child is made."""
    import hypothesis
    import pandas
    import pytest
    import scipy.linalg
    import scipy.stats
    import sklearn.base
    import torch

    torch.set_num_threads(1)
    print("warm:", *(m.__name__ for m in (hypothesis, pandas, pytest, scipy, sklearn, torch)))


def record(outcome: Outcome, texts: dict[str, str]) -> dict[str, object]:
    """One outcome as an entry of the report."""
    mutant = outcome.job.mutant
    return {
        "file": mutant.file,
        "line": mutant.start[0],
        "operator": mutant.operator,
        "occurrence": mutant.occurrence,
        "change": change(mutant, texts[mutant.file], outcome.job.text),
        "verdict": outcome.verdict,
        "by": outcome.by,
        "seconds": round(outcome.seconds, 1),
    }


def show(entries: Sequence[dict], header: str) -> float:
    """Print survivors, shares by module and the whole share, which is returned."""
    print(f"\n{header}\n\nSurvivors:")
    for entry in sorted(entries, key=lambda e: (e["file"], e["line"])):
        if entry["verdict"] == "survived":
            print(f"{entry['file']}:{entry['line']}: {entry['change']}  [{entry['operator']}]")
    print("\nKilled, of drawn:")
    drawn_of = Counter(e["file"] for e in entries)
    killed_of = Counter(e["file"] for e in entries if e["verdict"] != "survived")
    for file, n in sorted(drawn_of.items()):
        print(f"{file:40s} {killed_of[file]:4d} / {n}")
    killed, n = killed_of.total(), len(entries)
    hung = sum(e["verdict"] == "timed out" for e in entries)
    print(f"\nkilled {killed} of {n} ({killed / n:.1%}), {hung} of them by their time")
    return killed / n


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=100, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin none later")
    parser.add_argument("--module", help="only files whose path holds this text")
    parser.add_argument("--retry", type=Path, help="run the survivors of this report again")
    parser.add_argument("--least", type=float, default=0.85, help="share to kill, else exit 1")
    parser.add_argument("--json", type=Path, help="where to write the report")
    return parser.parse_args()


def main() -> int:
    """Draw, run and report."""
    options = parse()
    deadline = time.monotonic() + 60 * options.minutes
    texts = {file: text for file, text in sources().items() if (options.module or "") in file}
    if options.retry:
        mutants = survivors(texts, options.retry)
    else:
        mutants = drawn(texts, options.mutants, options.seed)
    tests = tests_by_module()
    warm_up()
    entries = []
    with tempfile.TemporaryDirectory(prefix="skhead-mutation-") as directory:
        spaces = [Workspace(Path(directory) / f"copy-{i}") for i in range(options.processes)]
        modules = {module_of(mutant.file) for mutant in mutants}
        seconds = unchanged(set().union(*(tests.get(module, set()) for module in modules)), spaces)
        print(f"{len(seconds)} test files take {sum(seconds.values()):.0f} s without any change")
        for outcome in outcomes(jobs_of(mutants, tests, seconds), spaces, deadline):
            entries.append(record(outcome, texts))
            print("{verdict:9s} {file}:{line}: {change}  {by}  {seconds} s".format(**entries[-1]))
            sys.stdout.flush()
    if not entries:
        sys.exit("mutation_check: no mutant was run")
    share = show(entries, f"seed {options.seed}, {len(entries)} of {len(mutants)} mutants run")
    if options.json:
        report = {"seed": options.seed, "share": share, "mutants": entries}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(share < options.least)


if __name__ == "__main__":
    sys.exit(main())
