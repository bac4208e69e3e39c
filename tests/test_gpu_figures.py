"""The script that measures a GPU, on the CPU and where there is nothing to measure."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "gpu_figures.py"))


def test_small_figures_of_the_cpu(tmp_path, capsys):
    before = torch.backends.cuda.matmul.allow_tf32
    target = tmp_path / "figures.json"
    options = ["--device", "cpu", "--small", "--repeats", "1", "--json", str(target)]
    assert SCRIPT["main"](options) == 0
    figures = json.loads(target.read_text())
    printed = capsys.readouterr().out
    assert "they say nothing about a GPU" in printed
    assert "products.bf16.kernel_tflops" in printed
    assert set(figures["products"]) == {"fp32", "TF32", "bf16"}
    for found in figures["products"].values():
        assert all(value > 0 for value in found.values())
        share = found["kernel_tflops"] / found["gemm_tflops"]
        assert found["share_of_gemm"] == pytest.approx(share)
    assert figures["products"]["fp32"]["largest_error"] < 1e-4
    assert figures["products"]["bf16"]["largest_error"] > 1e-4
    assert all(value > 0 for value in [*figures["bases"].values(), *figures["transfers"].values()])
    assert figures["memory"]["scratch_bytes"] is None
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_the_estimate_scales_with_what_was_measured():
    figures = {
        "sizes": {"d_model": 4096, "d_head": 128},
        "products": {"fp32": {"kernel_tflops": 10.0}, "bf16": {"kernel_tflops": 100.0}},
        "bases": {"plain_per_second": 1000.0},
        "transfers": {"file_gb_per_second": 5.0},
    }
    found = SCRIPT["estimate"](figures)
    assert found["kernel_tflop"] == pytest.approx(2.3e3, rel=0.05)
    assert found["kernel_seconds"]["fp32"] == pytest.approx(found["kernel_tflop"] / 10)
    assert found["kernel_seconds"]["bf16"] == pytest.approx(found["kernel_tflop"] / 100)
    # 11,520 heads of twice the measured width, 24 GB in bfloat16.
    assert found["bases_seconds"] == pytest.approx(11_520 * 2 / 1000)
    assert found["reading_seconds"] == pytest.approx(24.16 / 5, rel=0.01)


def test_a_machine_without_a_gpu_is_told_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert SCRIPT["main"]([]) == 0
    assert "no CUDA device here, so that nothing is measured" in capsys.readouterr().out
