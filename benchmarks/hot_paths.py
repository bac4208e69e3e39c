"""The hot paths as ratios against a plain matrix product or the obvious algorithm, in one run.

``python benchmarks/hot_paths.py`` runs every suite in this directory, each in a process of its
own; ``python benchmarks/hot_paths.py Haar Bases`` those whose names contain a word. Each ratio is
one of processor times, or of bytes, so that the figures of different machines can be compared.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from measuring import Benchmark, command_line, machine_facts, write_results


def discover() -> Iterator[type[Benchmark]]:
    """Every suite of this directory, by file and name."""
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = importlib.import_module(path.stem)
        for name, value in sorted(vars(module).items()):
            own = isinstance(value, type) and value.__module__ == path.stem
            if own and issubclass(value, Benchmark) and tracked(value):
                yield getattr(module, name)


def tracked(suite: type[Benchmark]) -> list[str]:
    return sorted(name for name in dir(suite) if name.startswith("track_"))


def measure(suite: type[Benchmark]) -> dict[str, float | str]:
    """Every ratio of a suite by its name, or why it cannot be had here."""
    found: dict[str, float | str] = {}
    for name in tracked(suite):
        benchmark = suite()
        try:
            getattr(benchmark, "setup", lambda: None)()
            found[name.removeprefix("track_")] = float(getattr(benchmark, name)())
        except NotImplementedError as missing:
            found[name.removeprefix("track_")] = str(missing)
        finally:
            getattr(benchmark, "teardown", lambda: None)()
    return found


def main() -> None:
    """Run every tracked ratio and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="suites whose names contain one of these")
    parser.add_argument("--json", type=Path, help="also write the ratios and the machine here")
    arguments = parser.parse_args()
    wanted = [
        suite
        for suite in discover()
        if not arguments.words or any(word in suite.__name__ for word in arguments.words)
    ]
    spawn = multiprocessing.get_context("spawn")
    ratios = {}
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as own:
        for suite in wanted:
            ratios[suite.__name__] = own.submit(measure, suite).result()
            for name, value in ratios[suite.__name__].items():
                shown = f"{value:9.2f}" if isinstance(value, float) else f"  {value}"
                print(f"{suite.__name__ + '.' + name:50}{shown}", flush=True)
    if arguments.json:
        facts = {"benchmark": "hot_paths", "command": command_line(), "machine": machine_facts()}
        write_results(arguments.json, facts | {"ratios": ratios})


if __name__ == "__main__":
    main()
