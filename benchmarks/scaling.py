"""Cost and scratch memory against the number of layers, beside what the count of flops says.

``python benchmarks/scaling.py`` compares the heads of random models of 6 to 96 layers, each layer
of GPT-2 small's shape, through the estimators: `SubspaceExtractor`, then `ProjectionKernel`. Sizes
take turns, and the median of the rounds counts. Both exponents are those of a straight line through
the logarithms. Bases are decomposed in float64, far from the rate of a product, so the model counts
for a head's bases the flops that a plain product does in the time one basis takes at the smallest
size. Scratch is what the kernel takes beyond bases and result, in a fresh process per size.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from circuits import random_model
from measuring import (
    Products,
    command_line,
    machine_facts,
    peak_growth,
    plain_gemm_rate,
    recorded_products,
    write_results,
)

import skhead

KINDS = ("OQ", "OK", "OV")
LAYERS = (6, 12, 24, 48, 96)
#: Heads a layer, d_model and d_head, and as few tokens as possible.
SHAPE = (12, 768, 64, 2)
WITHIN = 0.1
PARTS = ("bases", "products", "whole")


def heads_of(layers: int, shape: Sequence[int]) -> Any:
    """Heads table of a random model in memory."""
    name = f"scaling-{layers}"
    skhead.register_model(random_model((layers, *shape)), name)
    return skhead.load_heads(name)


def cost(heads: Any, max_memory: int | str) -> tuple[dict[str, float], Products]:
    """Processor seconds of the bases, the products and both, and the plan."""
    start = time.process_time()
    subspaces = skhead.SubspaceExtractor().fit_transform(heads)
    between = time.process_time()
    with recorded_products() as products:
        skhead.ProjectionKernel(KINDS, max_memory=max_memory).fit_transform(subspaces)
    whole = time.process_time() - start
    return {"bases": between - start, "products": products.cpu, "whole": whole}, products


def scratch(layers: int, shape: Sequence[int], max_memory: int | str) -> int:
    """Bytes that the kernel takes beyond its bases and its result."""
    from skhead import _pairwise

    small, heads = heads_of(2, shape), heads_of(layers, shape)
    kernel = skhead.ProjectionKernel(KINDS, max_memory=max_memory)
    kernel.fit_transform(small)
    subspaces = skhead.SubspaceExtractor().fit_transform(heads)
    found: list[int] = []
    run = _pairwise.overlap_blocks

    def watched(*args: Any, **options: Any) -> Any:
        grown, result = peak_growth(lambda: run(*args, **options))
        found.append(grown - sum(block.nbytes for block in result.values()))
        return result

    _pairwise.overlap_blocks = watched
    try:
        kernel.fit_transform(subspaces)
    finally:
        _pairwise.overlap_blocks = run
    return max(found)


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(work, *args).result()


def exponent(layers: Sequence[int], values: Sequence[float]) -> float:
    """Slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(layers), np.log(values), 1)[0])


def measure(layers: Sequence[int], shape: Sequence[int], rounds: int, max_memory: str) -> Any:
    """Medians of the rounds for every size, and what the model counts."""
    tables = {n: heads_of(n, shape) for n in layers}
    cost(tables[layers[0]], max_memory)
    taken: dict[int, list[tuple[dict[str, float], Products]]] = {n: [] for n in layers}
    rates = []
    for number in range(rounds):
        rates.append(plain_gemm_rate())
        for n in layers if number % 2 == 0 else layers[::-1]:
            taken[n].append(cost(tables[n], max_memory))
    rows = []
    for n in layers:
        seconds = {p: float(np.median([t[p] for t, _ in taken[n]])) for p in PARTS}
        rows.append({"layers": n, "heads": len(tables[n]), "cpu": seconds})
        rows[-1]["flops"] = {"products": taken[n][0][1].flops}
    rate = float(np.median(rates))
    per_head = rate * rows[0]["cpu"]["bases"] / rows[0]["heads"]
    for row in rows:
        row["flops"]["bases"] = per_head * row["heads"]
        row["flops"]["whole"] = row["flops"]["bases"] + row["flops"]["products"]
    return rows, rate


def fits(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Measured and expected exponents of each part."""
    layers = [row["layers"] for row in rows]
    found = {}
    for part in PARTS:
        measured, expected = (
            exponent(layers, [row[kind][part] for row in rows]) for kind in ("cpu", "flops")
        )
        within = abs(measured / expected - 1) <= WITHIN
        found[part] = {"measured": measured, "model": expected, "within": within}
    return found


def show(found: dict[str, Any]) -> None:
    print(f"{'layers':>7}{'heads':>7}" + "".join(f"{p + ' s':>12}" for p in PARTS), end="")
    print(f"{'GFLOP':>10}{'scratch MB':>12}")
    for row in found["rows"]:
        print(f"{row['layers']:7}{row['heads']:7}", end="")
        print("".join(f"{row['cpu'][part]:12.2f}" for part in PARTS), end="")
        print(f"{row['flops']['whole'] / 1e9:10.1f}{row['scratch'] / 1e6:12.1f}")
    for part, fit in found["fits"].items():
        verdict = "within" if fit["within"] else "NOT within"
        print(
            f"{part:9} exponent {fit['measured']:.2f}, by the count of flops {fit['model']:.2f}: "
            f"{verdict} {WITHIN:.0%}"
        )
    largest = max(row["scratch"] for row in found["rows"]) / found["budget"]
    print(f"largest scratch: {largest:.2f} of max_memory={found['max_memory']}")


def main(argv: Sequence[str] | None = None) -> None:
    from skhead._base import parse_bytes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", type=int, default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-memory", default="256MiB")
    parser.add_argument("--json", type=Path, help="also write the results and the machine here")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {"benchmark": "scaling", "command": command_line()}
    found |= {"machine": machine_facts(), "max_memory": args.max_memory}
    found["budget"] = parse_bytes(args.max_memory, "scaling")
    found["rows"], found["gemm_rate"] = measure(args.layers, SHAPE, args.rounds, args.max_memory)
    for row in found["rows"]:
        row["scratch"] = alone(scratch, row["layers"], SHAPE, args.max_memory)
    found["fits"] = fits(found["rows"])
    show(found)
    if args.json:
        write_results(args.json, found)


if __name__ == "__main__":
    main()
