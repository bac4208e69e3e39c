"""skhead beside what else computes the same numbers, on one model, in one interleaved run.

    python benchmarks/peer.py                       # GPT-2 small
    python benchmarks/peer.py --shape llama-3-8b --layers 8 --tasks pk --json results.json

The contestants are TransformerLens and, for the projection kernel, two loops over the pairs of
heads: the one that takes principal angles of every pair, and the one that keeps the bases. A loop
runs a random sample of its pairs, and its time is extrapolated. Every measurement is a process of
its own, so that its peak memory is its own; contestants take turns. All read one checkpoint;
loading the model is left out of the others' time and included in skhead's, which reads the weights
as it goes. GPT-2 small has its real attention weights where they are found (``SKHEAD_MODELS`` or
``../shared/models``); other shapes are random. What would need more memory than the machine has is
not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import (
    command_line,
    machine_bytes,
    machine_facts,
    peak_bytes,
    plain_gemm_rate,
    recorded_products,
    write_results,
)
from peer_contestants import CONTESTANTS, LOOPS, clocks, prepared
from peer_models import KINDS, SHAPES, TASKS, Shape, bytes_needed, shape_named, write_checkpoint

#: Asked for, as ratios of processor time to the peer's, by shape, layers and task.
WANTED = {
    ("gpt2-small", 12, "pk"): 7.0,
    ("gpt2-small", 12, "cs"): 55.0,
    ("gpt2-xl", 48, "pk"): 13.0,
    ("llama-3-8b", 8, "pk"): 7.0,
    ("llama-3-8b", 32, "pk"): 12.0,
}
Result = dict[str, Any]


def measure(contestant: str, task: str, directory: str, threads: int, out: str) -> Result:
    """Run one task in this process and tell what it took; the scores go into a file."""
    import torch

    torch.set_num_threads(threads)
    run = prepared(contestant, task, directory)
    torch.randn(512, 512) @ torch.randn(512, 512)
    before, start = peak_bytes(), clocks()
    with recorded_products() as products:
        found = run()
    wall, cpu = (after - then for after, then in zip(clocks(), start, strict=True))
    peak = peak_bytes()
    np.savez(out, **found.scores)
    result: Result = {"peak": peak, "added": peak - before}
    if found.sampled:
        done, asked = found.sampled
        extra = asked / done - 1
        wall, cpu = wall + extra * found.loop[0], cpu + extra * found.loop[1]
        result["sampled"] = [done, asked]
    if products.flops:
        result["products"] = {"flops": products.flops, "cpu": products.cpu}
    return {"wall": wall, "cpu": cpu, **result, "gemm_rate": plain_gemm_rate()}


def measured(contestant: str, task: str, directory: str, threads: int, out: Path) -> Result:
    """One measurement in a fresh process; says so if that process fails."""
    worker = ["--worker", contestant, task, directory, str(threads), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *worker],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"failed": last}
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(runs: Sequence[Result], *keys: str) -> float:
    values = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value[key]
        values.append(value)
    return float(np.median(values))


def largest_difference(a: Path, b: Path) -> float:
    """Largest absolute difference over the pairs that both have (zero means undefined there)."""
    with np.load(a) as mine, np.load(b) as theirs:
        differences = []
        for kind in KINDS:
            both = ~np.isnan(mine[kind]) & ~np.isnan(theirs[kind])
            differences.append(np.abs(mine[kind][both] - theirs[kind][both]).max(initial=0.0))
    return float(max(differences))


def summary(contestant: str, runs: Sequence[Result], direct_flops: float) -> Result:
    """Medians of the rounds, and rates in units of a plain product's in the same processes."""
    failed = [run["failed"] for run in runs if "failed" in run]
    if failed:
        return {"contestant": contestant, "failed": failed[0]}
    rate = median(runs, "gemm_rate")
    found: Result = {"contestant": contestant, "rounds": len(runs), "gemm_rate": rate}
    found |= {key: median(runs, key) for key in ("wall", "cpu", "peak", "added")}
    found["direct_share"] = direct_flops / found["cpu"] / rate
    if "sampled" in runs[0]:
        found["sampled"] = runs[0]["sampled"]
    if "products" in runs[0]:
        flops = median(runs, "products", "flops")
        found["flops"] = flops
        found["gemm_share"] = flops / found["cpu"] / rate
        found["product_gemm_share"] = flops / median(runs, "products", "cpu") / rate
    return found


def run_task(task: str, shape: Shape, folder: Path, args: argparse.Namespace) -> list[Result]:
    """Measure one task by all contestants in turn."""
    names = [name for name in CONTESTANTS if name in args.contestants]
    if task not in args.peer_tasks:
        names = [name for name in names if name == "skhead"]
    if task == "cs":
        names = [name for name in names if name not in LOOPS]
    refused = {}
    for name in names:
        need = bytes_needed(name, task, shape)
        if need > machine_bytes():
            refused[name] = f"needs {need / 1e9:.0f} GB"
    running = [name for name in names if name not in refused]
    runs: dict[str, list[Result]] = {name: [] for name in running}
    for number in range(args.rounds):
        for name in running if number % 2 == 0 else running[::-1]:
            out = folder / f"{task}-{name}.npz"
            runs[name].append(measured(name, task, str(folder / "model"), args.threads, out))
    results = [summary(name, runs[name], shape.direct_flops(task)) for name in running]
    results += [{"contestant": name, "not_run": why} for name, why in refused.items()]
    own = next((r for r in results if r["contestant"] == "skhead" and "cpu" in r), None)
    for result in results:
        if own and result is not own and "cpu" in result:
            files = [folder / f"{task}-{name}.npz" for name in ("skhead", result["contestant"])]
            result["ratio"] = {key: result[key] / own[key] for key in ("cpu", "wall", "peak")}
            result["difference"] = largest_difference(*files)
    return results


def line(result: Result) -> str:
    """A contestant's line of the table."""
    label = CONTESTANTS[result["contestant"]]
    if "cpu" not in result:
        why = f"not run: {result['not_run']}" if "not_run" in result else result["failed"]
        return f"  {label:40} {why[:120]}"
    sizes = f"{result['peak'] / 1e9:9.2f}{result['added'] / 1e9:10.2f}"
    text = f"  {label:40}{result['wall']:9.2f}{result['cpu']:9.2f}{sizes}"
    text += f"{result['direct_share']:9.2f}"
    if "ratio" in result:
        text += f"{result['ratio']['cpu']:9.1f}{result['difference']:11.1e}"
    if "sampled" in result:
        done, asked = result["sampled"]
        text += f"  extrapolated from {done:,} of {asked:,} pairs"
    return text


def show(task: str, results: Sequence[Result], wanted: float | None) -> None:
    """Print the table of one task."""
    print(f"{TASKS[task]}")
    columns = ("wall s", 9), ("CPU s", 9), ("peak GB", 9), ("added GB", 10), ("direct", 9)
    columns += ("ratio", 9), ("difference", 11)
    print(f"  {'':40}" + "".join(f"{name:>{width}}" for name, width in columns))
    for result in results:
        print(line(result))
    own = {result["contestant"]: result for result in results}.get("skhead", {})
    if "gemm_share" in own:
        print(
            f"  plan of {own['flops'] / 1e9:.1f} GFLOP: {own['gemm_share']:.2f} of the plain "
            f"product's rate in the whole time, {own['product_gemm_share']:.2f} in that of the "
            f"products; {own['direct_share']:.2f} in flops of all pairs' cross-Grams"
        )
    peer = next(
        (r["ratio"]["cpu"] for r in results if r["contestant"] == "peer" and "ratio" in r), 0
    )
    if wanted and peer:
        print(f"  faster than the peer by {peer:.1f}x in CPU time, asked {wanted:g}x")
    print(flush=True)


def compare(args: argparse.Namespace) -> int:
    """Measure all tasks, print the tables and store them; non-zero if skhead itself failed."""
    shape = shape_named(args.shape, args.layers)
    found: Result = {"benchmark": "peer", "command": command_line()}
    found |= {"machine": machine_facts(args.threads), "shape": args.shape, "layers": shape.layers}
    with tempfile.TemporaryDirectory(dir=args.directory) as temporary:
        folder = Path(temporary)
        real = args.shape == "gpt2-small" and args.layers is None
        found["weights"] = write_checkpoint(shape, folder / "model", real)
        what = f"{args.shape}, {shape.layers} layers, {found['weights']}"
        print(f"{what}, threads: {args.threads}, rounds: {args.rounds}\n", flush=True)
        found["tasks"] = {}
        for task in args.tasks:
            found["tasks"][task] = run_task(task, shape, folder, args)
            show(task, found["tasks"][task], WANTED.get((args.shape, shape.layers, task)))
            if args.json:
                write_results(args.json, found)
    results = [result for task in found["tasks"].values() for result in task]
    return int(any("failed" in r for r in results if r["contestant"] == "skhead"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--layers", type=int, help="layers of the model; all of the shape's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument(
        "--peer-tasks", nargs="*", choices=TASKS, default=list(TASKS),
        help="tasks that others than skhead run too",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the results and the machine here")
    parser.add_argument("--directory", type=Path, help="where the checkpoint is written")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        contestant, task, directory, threads, out = args.worker
        print(json.dumps(measure(contestant, task, directory, int(threads), out)))
        return 0
    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
