"""Write docs/benchmarks.rst from the results that are stored in benchmarks/results.

``make bench-page`` measures everything and runs this; run it alone after storing one result anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measuring import ROOT
from peer_contestants import CONTESTANTS
from peer_models import SHAPES, TASKS

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.rst"
Result = dict[str, Any]

INTRODUCTION = """\
.. Written by benchmarks/make_page.py from benchmarks/results; do not edit.

Benchmarks
==========

What skhead takes beside other ways to the same numbers, how its cost grows with the depth of a
model, and how its hot paths compare with a plain matrix product. Every figure is read from
``benchmarks/results``; ``make bench-page`` measures them anew and writes this page.

Seconds of two runs are comparable only if they are of one table: there, contestants took turns on
one machine. Ratios travel better.
"""
PEERS = """\
All three pair kinds of one model. Each measurement is a process of its own; its peak memory
includes libraries and weights. Loading the model is left out of the others' time and included in
skhead's. *Ratio* is a contestant's CPU time over skhead's, and *difference* the largest between its
scores and skhead's. *Rate* is the flops that cross-Grams of all pairs of heads take, over CPU time,
in units of a plain product of two 2048 x 2048 matrices in float32 in the same process: a method
that needs fewer flops can exceed 1. The loops compute pairs in layer order only. Where they ran on
a sample of them, their times are extrapolated.
"""
SCALING = """\
Random models of layers like GPT-2 small's, bases and projection kernel in layer order, median CPU
seconds of interleaved rounds. The exponents are those of straight lines through the logarithms of
seconds and of counted flops; a head's bases count as the flops of a plain product that takes as
long.
"""
HOT_PATHS = """\
Ratios of CPU time, or of bytes where memory is named, from ``benchmarks/hot_paths.py``; what each
is held against is said in its docstring. asv runs the same suites (``asv run -E existing``).
"""


#: Tasks in the titles of runs of one task.
SHORT = {"pk": "projection kernel", "cs": "composition"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A list-table in reStructuredText."""
    yield ".. list-table::"
    yield "   :header-rows: 1"
    yield ""
    for row in (head, *rows):
        for column, cell in enumerate(row):
            mark = "   * -" if column == 0 else "     -"
            yield f"{mark} {cell}".rstrip()
    yield ""


def title(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def where(result: Result) -> list[str]:
    """Command and machine of a run."""
    m = result["machine"]
    machine = (
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']:.0f} GB, load {m['load']:.1f} before"
    )
    software = f"torch {m['torch']}, Python {m['python']}"
    run = f"``{result['command']}`` on {machine}; threads: {m['threads']}, {software}"
    return [f"{run}; {m['date']}, commit {m['commit']}.", ""]


def peer_row(result: Result) -> list[str]:
    label = CONTESTANTS[result["contestant"]]
    if "cpu" not in result:
        why = f"not run: {result['not_run']}" if "not_run" in result else "failed"
        return [label, why, *[""] * 6]
    if "sampled" in result:
        done, asked = result["sampled"]
        label += f" (extrapolated from {done:,} of {asked:,} pairs)"
    ratio = f"{result['ratio']['cpu']:.1f}" if "ratio" in result else "1"
    return [
        label,
        *(f"{result[key]:.2f}" for key in ("cpu", "wall")),
        f"{result['peak'] / 1e9:.2f}",
        f"{result['added'] / 1e9:.2f}",
        ratio,
        f"{result['direct_share']:.2f}",
        f"{result['difference']:.1e}" if "difference" in result else "",
    ]


def peer_section(result: Result) -> Iterator[str]:
    threads = result["machine"]["threads"]
    name = f"{result['shape']}, {result['layers']} layers, "
    name += f"{threads} thread{'s' if threads > 1 else ''}"
    if len(result["tasks"]) == 1:
        name += f": {SHORT[next(iter(result['tasks']))]}"
    yield from title(name, "~")
    yield from where(result)
    weights = result["weights"]
    yield f"{weights[0].upper()}{weights[1:]}."
    yield ""
    head = ["", "CPU s", "wall s", "peak GB", "added GB", "ratio", "rate", "difference"]
    for task, results in result["tasks"].items():
        yield f"{TASKS[task][0].upper()}{TASKS[task][1:]}:"
        yield ""
        yield from table(head, [peer_row(row) for row in results])
        own = next((row for row in results if "gemm_share" in row), None)
        if own:
            yield (
                f"skhead's plan takes {own['flops'] / 1e9:,.0f} GFLOP. It runs at "
                f"{own['gemm_share']:.2f} of the plain product's rate in the whole time and at "
                f"{own['product_gemm_share']:.2f} in that of its products."
            )
            yield ""


def scaling_section(result: Result) -> Iterator[str]:
    yield from where(result)
    parts = list(result["fits"])
    head = ["layers", "heads", *(f"{part} s" for part in parts), "GFLOP", "scratch MB"]
    yield from table(
        head,
        [
            [
                str(row["layers"]),
                str(row["heads"]),
                *(f"{row['cpu'][part]:.2f}" for part in parts),
                f"{row['flops']['whole'] / 1e9:,.0f}",
                f"{row['scratch'] / 1e6:.0f}",
            ]
            for row in result["rows"]
        ],
    )
    yield from table(
        ["", "exponent of seconds", "exponent of flops", "within 10 %"],
        [
            [
                part,
                f"{fit['measured']:.2f}",
                f"{fit['model']:.2f}",
                "yes" if fit["within"] else "no",
            ]
            for part, fit in result["fits"].items()
        ],
    )
    yield f'Scratch allowed: ``max_memory="{result["max_memory"]}"``.'
    yield ""


def hot_paths_section(result: Result) -> Iterator[str]:
    yield from where(result)
    yield from table(
        ["suite", "ratio of", "value"],
        [
            [suite, name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else value]
            for suite, ratios in result["ratios"].items()
            for name, value in ratios.items()
        ],
    )


SECTIONS = {
    "peer": ("Beside other ways", PEERS, peer_section),
    "scaling": ("Growth with depth", SCALING, scaling_section),
    "hot_paths": ("Hot paths", HOT_PATHS, hot_paths_section),
}


def in_order(result: Result) -> tuple[int, int, int]:
    """Shapes as they are listed, then by layers and threads."""
    place = list(SHAPES).index(result["shape"]) if "shape" in result else 0
    return place, result.get("layers", 0), result["machine"]["threads"]


def page(results: Sequence[Result]) -> str:
    """The text of the page."""
    lines = INTRODUCTION.splitlines()
    for benchmark, (name, words, section) in SECTIONS.items():
        found = sorted((r for r in results if r["benchmark"] == benchmark), key=in_order)
        if found:
            lines += ["", *title(name, "-"), *words.splitlines(), ""]
        for result in found:
            lines += section(result)
    return "\n".join(lines).rstrip("\n") + "\n"


def stored(folder: Path = RESULTS) -> list[Result]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main() -> None:
    PAGE.write_text(page(stored()), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
