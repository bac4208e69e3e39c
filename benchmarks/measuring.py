"""What all benchmarks measure with: processor time, memory, the rate of plain products."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]


class Benchmark:
    """A suite whose ``track_`` methods return ratios, so that machines can be compared.

    `tiny` holds sizes at which everything runs in a moment, for the tests.
    """

    unit = "ratio"
    timeout = 1800
    tiny: ClassVar[dict[str, Any]] = {}


def cpu_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Least processor time of several calls, after one to warm up."""
    work()
    return min(_timed(work) for _ in range(repeats))


def cpu_ratio(work: Callable[[], Any], unit: Callable[[], Any], repeats: int = 3) -> float:
    """Least processor time of one over that of the other; they take turns."""
    work()
    unit()
    taken = [(_timed(work), _timed(unit)) for _ in range(repeats)]
    return min(a for a, _ in taken) / min(b for _, b in taken)


def _timed(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def plain_gemm_rate(size: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """Flops per processor second of a square product under the setting that the kernels use."""
    from skhead.linalg.precision import fast_float32_matmul

    a, b = torch.randn(2, size, size, dtype=dtype)
    with fast_float32_matmul(a.device):
        return 2 * size**3 / cpu_seconds(lambda: a @ b, 3)


def random_stack(n_heads: int, d_model: int, d_head: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_heads, d_model, d_head, generator=generator)


@dataclass
class Products:
    """What the all-pairs products of some calls took."""

    flops: float = 0.0
    cpu: float = 0.0


@contextmanager
def recorded_products() -> Iterator[Products]:
    """Count the planned flops and the processor seconds of estimators' products while inside."""
    from skhead import _pairwise
    from skhead.linalg import kernels

    found = Products()
    plan, run = kernels.plan_overlaps, kernels.overlap_blocks

    def planned(*args: Any, **options: Any) -> Any:
        made = plan(*args, **options)
        found.flops += made.flops
        return made

    def timed(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        with mock.patch.object(kernels, "plan_overlaps", planned):
            done = run(*args, **options)
        found.cpu += time.process_time() - start
        return done

    with mock.patch.object(_pairwise, "overlap_blocks", timed):
        yield found


def resident_bytes(key: str) -> int:
    """Resident memory of this process as Linux states it: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not state {key}")


def peak_bytes() -> int:
    """Largest resident size of this process so far.

    Linux hands a parent's peak on in `getrusage`, so its own account is read where it exists.
    """
    if Path("/proc/self/status").is_file():
        return resident_bytes("VmHWM")
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def peak_growth(work: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes by which memory grows at most during a call, and what the call returns."""
    if not Path("/proc/self/clear_refs").exists():
        raise NotImplementedError("peak memory of a call is known on Linux only")
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = work()
    return resident_bytes("VmHWM") - before, result


def machine_bytes() -> int:
    """Memory that processes may use here: that of the machine or of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(given)) if given.isdigit() else total


def machine_facts(threads: int | None = None) -> dict[str, Any]:
    """Where and with what something was measured."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":")[1].strip() for line in facts.splitlines() if "model name" in line]
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(machine_bytes() / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or "unknown",
    }


def command_line() -> str:
    """The command that started this process, with no path of this machine in it but for files."""
    words, words_left = [], iter(sys.argv[1:])
    for word in words_left:
        if word == "--json":
            next(words_left)
        else:
            words.append(word)
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def write_results(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
