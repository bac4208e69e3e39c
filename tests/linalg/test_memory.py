"""The memory budget against what the process really takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

if not Path("/proc/self/clear_refs").exists():
    pytest.skip("peak memory is read from /proc", allow_module_level=True)

WORKER = """
import json, sys, torch
from pathlib import Path
from skhead.linalg.kernels import overlap_blocks

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

method, budget, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
stacks = [torch.randn(300, 1024, rank) for _ in range(2)]
overlap_blocks([s[:3] for s in stacks], None, [(0, 1)], method=method)
before = status("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")
found = overlap_blocks(stacks, None, [(0, 0), (0, 1)], method=method, max_memory=budget)
result = sum(values.numel() * 4 for values in found.values())
print(json.dumps(status("VmHWM:") - before - result))
"""


@pytest.mark.parametrize("method, rank", [("packed", 64), ("direct", 16)])
@pytest.mark.parametrize("budget", [2**25, 2**27])
def test_scratch_stays_within_the_budget(method, rank, budget):
    """Twelve MiB are left to the allocator and the matrix library."""
    command = [sys.executable, "-c", WORKER, method, str(budget), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) <= budget + 12 * 2**20
