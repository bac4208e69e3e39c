"""Measure what a GPU makes of the kernels: throughput, bases, transfers, memory, a 70B estimate.

``python scripts/gpu_figures.py --json figures.json`` prints a table and writes the same as JSON.
Where there is no CUDA device it says so and measures nothing; ``--device cpu --small`` shows that
the script works, with figures of the CPU that say nothing about a GPU. Times are medians, after
one call that is not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from skhead.linalg.bases import orthonormal_bases
from skhead.linalg.kernels import overlap_blocks, plan_overlaps
from skhead.linalg.precision import matmul_precision
from skhead.weights.transfers import deliver, transfers_to

#: Kinds of products: the kernel's precision, and the dtype of the plain product.
PRECISIONS = {
    "fp32": ("highest", torch.float32),
    "TF32": ("high", torch.float32),
    "bf16": ("medium", torch.bfloat16),
}
#: Llama 3 70B: rows of role O against columns of Q, K and V.
LARGE = {"d_model": 8192, "d_head": 128, "O": 5120, "Q": 5120, "KV": 640}


@dataclass(frozen=True)
class Sizes:
    """What is measured with.

    Attributes
    ----------
    gemm : int
        Side of the matrices of the plain product.
    heads, d_model, d_head : int
        Of the stack that is compared with itself, and of which bases are found.
    file_bytes : int
        Of the tensor that is brought to the device.
    max_memory : int
        Scratch of the kernel.
    """

    gemm: int
    heads: int
    d_model: int
    d_head: int
    file_bytes: int
    max_memory: int


SIZES = {
    "full": Sizes(8192, 2048, 4096, 128, 2**31, 2**33),
    "small": Sizes(256, 32, 256, 32, 2**22, 2**26),
}


class Measurer:
    """Times work on a device.

    Parameters
    ----------
    device : torch.device
    sizes : Sizes
    repeats : int
    """

    def __init__(self, device: torch.device, sizes: Sizes, repeats: int) -> None:
        self.device, self.sizes, self.repeats = device, sizes, repeats
        self._generator = torch.Generator(device).manual_seed(0)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median time of a call, until the device has done all of it."""
        work()
        times = []
        for _ in range(self.repeats):
            self._synchronize()
            start = time.perf_counter()
            work()
            self._synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers on the device."""
        return torch.randn(shape, generator=self._generator, device=self.device)

    def products(self) -> dict[str, dict[str, float]]:
        """The kernel and a plain product in every precision, in TFLOP/s, and the kernel's error."""
        size = self.sizes
        stack = self.random(size.heads, size.d_model, size.d_head)
        stack = orthonormal_bases(stack, overwrite=True).vectors
        few = stack[: min(64, len(stack))]
        exact = self._exact(few)
        a, b = self.random(2, size.gemm, size.gemm)
        found = {}
        flops = plan_overlaps([stack], None, [(0, 0)], size.max_memory).flops
        for name, (precision, dtype) in PRECISIONS.items():
            x, y = a.to(dtype), b.to(dtype)
            with matmul_precision(self.device, precision):
                plain = self.seconds(partial(torch.mm, x, y))
            kernel = self.seconds(partial(self._overlaps, stack, precision))
            error = (self._overlaps(few, precision).double() - exact).abs().max()
            found[name] = {
                "gemm_tflops": 2 * size.gemm**3 / plain / 1e12,
                "kernel_tflops": flops / kernel / 1e12,
                "kernel_seconds": kernel,
                "share_of_gemm": (flops / kernel) / (2 * size.gemm**3 / plain),
                "largest_error": float(error),
            }
        return found

    def _overlaps(self, stack: torch.Tensor, precision: str) -> torch.Tensor:
        options = {"max_memory": self.sizes.max_memory, "precision": precision}
        return overlap_blocks([stack], None, [(0, 0)], **options)[0, 0]

    @staticmethod
    def _exact(stack: torch.Tensor) -> torch.Tensor:
        flat = stack.double().permute(1, 0, 2).flatten(1)
        cross = (flat.T @ flat).view(len(stack), stack.shape[2], len(stack), stack.shape[2])
        return cross.square().sum((1, 3))

    def bases(self) -> dict[str, float]:
        """Bases a second: of plain heads, ill-conditioned ones, and truncated ones."""
        size = self.sizes
        count = min(size.heads, 512)
        stack = self.random(count, size.d_model, size.d_head)
        ill = stack * torch.logspace(0, -5, size.d_head, device=self.device)
        return {
            "plain_per_second": count / self.seconds(lambda: orthonormal_bases(stack)),
            "ill_per_second": count / self.seconds(lambda: orthonormal_bases(ill)),
            "truncated_per_second": count
            / self.seconds(lambda: orthonormal_bases(stack, rank=size.d_head // 2)),
        }

    def transfers(self) -> dict[str, float]:
        """GB/s of bfloat16 numbers to the device as float32: copied, transferred, and from a file.

        The file was just written, so that the system holds it in memory.
        """
        rows = self.sizes.file_bytes // 2 // 4096
        source = torch.ones(rows, 4096, dtype=torch.bfloat16)
        out = torch.empty(source.shape, device=self.device)
        way = transfers_to(self.device)
        size = source.nbytes / 1e9
        found = {
            "copied_gb_per_second": size / self.seconds(lambda: out.copy_(source)),
            "transferred_gb_per_second": size / self.seconds(lambda: deliver(source, out, way)),
        }
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "weights.safetensors"
            save_file({"weights": source}, path)

            def read() -> None:
                with safe_open(path, framework="pt") as file:
                    deliver(file.get_tensor("weights"), out, way)

            found["file_gb_per_second"] = size / self.seconds(read)
        return found

    def peak_memory(self) -> dict[str, int | None]:
        """Bytes that the kernel takes on the device beside its factors; None off CUDA."""
        size = self.sizes
        stack = self.random(size.heads, size.d_model, size.d_head)
        if self.device.type != "cuda":
            return {"scratch_bytes": None, "budget_bytes": size.max_memory}
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._overlaps(stack)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        return {"scratch_bytes": peak, "budget_bytes": size.max_memory}


def estimate(figures: dict[str, Any]) -> dict[str, Any]:
    """Seconds that a 70B model's attention would take at the measured rates; not a measurement."""
    shape = LARGE["d_model"], LARGE["d_head"]
    rows, *columns = (
        torch.empty(LARGE[role], *shape, device="meta") for role in ("O", "Q", "KV", "KV")
    )
    blocks = [(0, 0), (0, 1), (0, 2)]
    flops = plan_overlaps([rows], columns, blocks, 2**36).flops
    n_heads = LARGE["O"] + LARGE["Q"] + 2 * LARGE["KV"]
    # A head of the measured width stands for one of this width by the size of its products.
    sizes = figures["sizes"]
    work = (shape[0] * shape[1] ** 2) / (sizes["d_model"] * sizes["d_head"] ** 2)
    n_bytes = 2 * n_heads * shape[0] * shape[1]
    return {
        "kernel_tflop": flops / 1e12,
        "kernel_seconds": {
            name: flops / 1e12 / found["kernel_tflops"]
            for name, found in figures["products"].items()
        },
        "bases_seconds": work * n_heads / figures["bases"]["plain_per_second"],
        "reading_seconds": n_bytes / 1e9 / figures["transfers"]["file_gb_per_second"],
        "bases_bytes": 4 * n_heads * shape[0] * shape[1],
    }


def measure(device: torch.device, small: bool, repeats: int) -> dict[str, Any]:
    """All figures of a device."""
    sizes = SIZES["small" if small else "full"]
    measurer = Measurer(device, sizes, repeats)
    figures: dict[str, Any] = {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sizes": vars(sizes),
        "products": measurer.products(),
        "bases": measurer.bases(),
        "transfers": measurer.transfers(),
        "memory": measurer.peak_memory(),
    }
    return figures | {"estimate_70b": estimate(figures)}


def table(figures: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Figures as lines of a name and a number."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from table(value, f"{prefix}{name}.")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            yield f"{prefix + name:44} {shown}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="the first CUDA device by default")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args(arguments)
    if options.device is None and not torch.cuda.is_available():
        print(
            "There is no CUDA device here, so that nothing is measured. Run this on a machine with "
            "one, or try the script out with --device cpu --small."
        )
        return 0
    device = torch.device(options.device or "cuda:0")
    figures = measure(device, options.small, options.repeats)
    if device.type != "cuda":
        print("These are figures of a CPU; they say nothing about a GPU.")
    print(*table(figures), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
