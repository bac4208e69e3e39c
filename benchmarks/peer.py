"""skhead and TransformerLens side by side, on one model, in one interleaved run.

    python benchmarks/peer.py                      # GPT-2 small
    python benchmarks/peer.py --shape gpt2-medium --peer-tasks pk

Every measurement is a process of its own, so that its peak memory is its own; contestants take
turns. Both read one checkpoint; loading the model is left out of the peer's time and included in
skhead's, which reads the weights as it goes. GPT-2 small uses the real attention weights where they
are found (``SKHEAD_MODELS`` or ``../shared/models``); other shapes are random.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {
    "gpt2-small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
KINDS = ("OQ", "OK", "OV")
TASKS = {"pk": "projection kernel OQ+OK+OV with bases", "cs": "composition scores Q+K+V"}
#: Asked of the GPT-2 small run, as ratios of processor time.
WANTED = {"pk": 7.0, "cs": 55.0}


def write_checkpoint(shape: str, directory: Path) -> str:
    """Save a GPT-2 of the shape with small embeddings and MLPs, and say where its weights are
    from."""
    import torch
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=128, n_positions=64, n_inner=64, **SHAPES[shape])
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    root = Path(os.environ.get("SKHEAD_MODELS", Path(__file__).parents[2] / "shared" / "models"))
    real = root / "gpt2-small-attention" / "model.safetensors"
    origin = "random weights"
    if shape == "gpt2-small" and real.is_file():
        stored = {k: v.float() for k, v in load_file(real).items() if ".attn." in k}
        missing = model.transformer.load_state_dict(stored, strict=False).unexpected_keys
        if missing:
            raise RuntimeError(f"unexpected tensors in {real}: {missing}")
        origin = "real attention weights"
    model.save_pretrained(directory)
    return origin


def skhead_task(task: str, directory: str) -> Callable[[], dict[str, np.ndarray]]:
    """The library's call, as a user writes it."""
    import skhead
    import skhead.kernels

    def run() -> dict[str, np.ndarray]:
        heads = skhead.load_heads(directory)
        if task == "cs":
            similarity = skhead.CompositionScore(pairs=KINDS).fit_transform(heads)
        else:
            similarity = skhead.ProjectionKernel(pairs=KINDS).fit_transform(heads)
        return {kind: similarity.values[:, :, p] for p, kind in enumerate(KINDS)}

    return run


def peer_task(task: str, directory: str) -> Callable[[], dict[str, np.ndarray]]:
    """The peer's three calls on a bridge that is already built."""
    import torch
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.tools.analysis.projection_kernel import attention_head_subspace_affinity
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(directory)
    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)

    def run() -> dict[str, np.ndarray]:
        found = {}
        with torch.no_grad():
            for kind in KINDS:
                if task == "cs":
                    scores = bridge.all_composition_scores(kind[1]).scores
                else:
                    scores = attention_head_subspace_affinity(bridge, target_role=kind[1]).scores
                n_heads = scores.shape[0] * scores.shape[1]
                found[kind] = scores.reshape(n_heads, n_heads).numpy()
        return found

    return run


def measure(contestant: str, task: str, directory: str, threads: int, out: str) -> None:
    """Run one task in this process and print what it took as JSON."""
    import torch

    torch.set_num_threads(threads)
    run = {"skhead": skhead_task, "peer": peer_task}[contestant](task, directory)
    torch.randn(512, 512) @ torch.randn(512, 512)
    before = peak_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    peak = peak_bytes()
    np.savez(out, **found)
    print(json.dumps({**took, "peak": peak, "added": peak - before}))


def peak_bytes() -> int:
    """Largest resident size of this process so far.

    Linux hands a parent's peak on in `getrusage`, so its own account is read where it exists.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(contestant: str, task: str, directory: str, threads: int, out: Path) -> dict[str, Any]:
    """One measurement in a fresh process; says so if that process fails."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        contestant,
        task,
        directory,
        str(threads),
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"failed": last}
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(runs: list[dict[str, Any]], key: str) -> float:
    return float(np.median([run[key] for run in runs]))


def largest_difference(a: Path, b: Path) -> float:
    """Largest absolute difference over the pairs that both define (zero means undefined there)."""
    with np.load(a) as mine, np.load(b) as theirs:
        differences = []
        for kind in KINDS:
            defined = ~np.isnan(mine[kind])
            differences.append(np.abs(mine[kind][defined] - theirs[kind][defined]).max())
    return float(max(differences))


def compare(args: argparse.Namespace) -> int:
    """Measure all tasks in turn and print the table; non-zero if skhead itself failed."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        origin = write_checkpoint(args.shape, directory)
        print(f"{args.shape}, {origin}, {args.threads} thread(s), median of {args.rounds} rounds\n")
        header = f"{'':44}{'wall s':>9}{'CPU s':>9}{'peak GB':>9}{'added GB':>10}"
        failed = 0
        for task in args.tasks:
            runs: dict[str, list[dict[str, Any]]] = {"skhead": [], "peer": []}
            contestants = ["skhead"] + (["peer"] if task in args.peer_tasks else [])
            for _ in range(args.rounds):
                for name in contestants:
                    out = Path(folder) / f"{name}.npz"
                    runs[name].append(measured(name, task, str(directory), args.threads, out))
            print(f"{TASKS[task]}\n{header}")
            failed += report(task, runs, Path(folder), args.shape)
    return failed


def report(task: str, runs: dict[str, list[dict[str, Any]]], folder: Path, shape: str) -> int:
    """Print the lines of one task."""
    for name, label in (("peer", "TransformerLens"), ("skhead", "skhead")):
        errors = [run["failed"] for run in runs[name] if "failed" in run]
        if errors:
            print(f"  {label:42}failed: {errors[0][:120]}")
        elif runs[name]:
            wall, cpu = (median(runs[name], key) for key in ("wall", "cpu"))
            peak, added = (median(runs[name], key) / 1e9 for key in ("peak", "added"))
            print(f"  {label:42}{wall:9.2f}{cpu:9.2f}{peak:9.2f}{added:10.2f}")
    complete = all(runs.values()) and not any("failed" in run for r in runs.values() for run in r)
    if complete:
        ratios = {k: median(runs["peer"], k) / median(runs["skhead"], k) for k in ("wall", "cpu")}
        memory = median(runs["skhead"], "peak") / median(runs["peer"], "peak")
        wanted = f", asked {WANTED[task]:g}x" if shape == "gpt2-small" else ""
        print(
            f"  faster by {ratios['cpu']:.1f}x in CPU time{wanted}, {ratios['wall']:.1f}x in wall "
            f"time; peak memory {memory:.2f} of the peer's"
        )
        difference = largest_difference(folder / "skhead.npz", folder / "peer.npz")
        print(f"  largest difference {difference:.1e}\n")
    return int(any("failed" in run for run in runs["skhead"]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--peer-tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        contestant, task, directory, threads, out = args.worker
        measure(contestant, task, directory, int(threads), out)
        return 0
    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
