"""A model is streamed layer by layer: what the process takes against the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

if not Path("/proc/self/status").exists():
    pytest.skip("peak memory is read from /proc", allow_module_level=True)

N_LAYERS, N_HEADS, D_MODEL, D_HEAD, N_VOCAB = 24, 8, 512, 64, 4000

WORKER = """
import json, sys, threading, time
from pathlib import Path
import skhead
from skhead import _inputs
from skhead.linalg import factored, paths
from skhead.circuits import CircuitScorer

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def watch():
    global peak
    while not done:
        peak = max(peak, status("RssAnon:"))
        time.sleep(0.002)

model, groups, budget = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
CircuitScorer().fit_transform(skhead.load_heads("skhead/induction-2l"))
heads = skhead.load_heads(model)
before, peak, done = status("RssAnon:"), 0, False
thread = threading.Thread(target=watch, daemon=True)
thread.start()
if groups[0] in ("virtual_heads", "induction_pairs"):
    _inputs._HELD = int(budget) * 2**20
    factored._SCRATCH = paths._SCRATCH = 2**22
    options = {"beam": 10} if groups[0] == "virtual_heads" else {}
    getattr(skhead, groups[0])(heads, top=10, **options)
else:
    CircuitScorer(groups, max_memory=budget, errors="ignore").fit_transform(heads)
done = True
thread.join()
print(json.dumps(peak - before))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights of 101 MB for the heads and 16 MB for the tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_Q": (D_MODEL, D_HEAD), "W_K": (D_MODEL, D_HEAD), "W_V": (D_MODEL, D_HEAD)}
    tensors = {
        f"blocks.{layer}.attn.{role}": torch.randn(N_HEADS, *shape, generator=generator)
        for layer in range(N_LAYERS)
        for role, shape in {**shapes, "W_O": (D_HEAD, D_MODEL)}.items()
    }
    tensors["pos_embed.W_pos"] = torch.randn(64, D_MODEL, generator=generator)
    tensors["embed.W_E"] = torch.randn(N_VOCAB, D_MODEL, generator=generator)
    tensors["unembed.W_U"] = torch.randn(D_MODEL, N_VOCAB, generator=generator)
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["maps,tokens", "composition", "induction_matching"])
def test_a_model_is_streamed(model, groups):
    """Tokens (twice while they are read), three maps of the stream, the budget and 32 MiB."""
    command = [sys.executable, "-c", WORKER, str(model), groups, "24MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, maps = 2 * 4 * N_VOCAB * D_MODEL, 3 * 8 * D_MODEL**2
    of_heads = json.loads(done.stdout) - maps - (0 if groups == "composition" else 2 * tokens)
    of_model = 4 * 4 * N_LAYERS * N_HEADS * D_MODEL * D_HEAD
    assert of_heads < 24 * 2**20 + 32 * 2**20 < 0.7 * of_model


@pytest.mark.slow
@pytest.mark.parametrize(("function", "held"), [("virtual_heads", 1 / 4), ("induction_pairs", 0)])
def test_pairs_of_heads_are_streamed(function, held, model):
    """Tokens, three maps of the stream, a share of the heads' matrices, and some layers."""
    command = [sys.executable, "-c", WORKER, str(model), function, "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens, maps = 2 * 4 * N_VOCAB * D_MODEL, 3 * 8 * D_MODEL**2
    of_heads = json.loads(done.stdout) - maps - 2 * tokens
    of_model = 4 * 4 * N_LAYERS * N_HEADS * D_MODEL * D_HEAD
    assert of_heads < held * of_model + 32 * 2**20 < 0.7 * of_model
