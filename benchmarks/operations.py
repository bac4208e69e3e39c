"""Seconds and memory of OperationMapper beside the algorithm that it replaces.

``python benchmarks/operations.py`` scores a random model of the shape of GPT-2 small (12 layers of
12 heads, d_model 768, 50,257 tokens) at 18 operations of the sizes of MAPS' own, both signs, and
times a dense implementation of the published algorithm on some of its heads in the same run: for
every head the whole map W_V W_O, and for every operation the logits of all its sources over the
vocabulary, which ``topk`` sorts twice. ``--layers 2`` takes fewer layers. ``--shape 7B`` writes a
checkpoint of that shape in bfloat16 to a temporary directory (``--layers 32``: 4.9 GB) and
streams it from there; it reports the peak memory of the whole process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from measuring import ROOT, Benchmark, peak_bytes

import skhead
from skhead.operations import OperationMapper
from skhead.weights.first_block import read_source_embedding
from skhead.weights.tokens import read_token_space

#: Pairs that the tokenizer of GPT-2 leaves of the published operations.
SIZES = {
    "general_copying": 436, "name_copying": 132, "word_first_letter": 238,
    "word_last_letter": 238, "year_to_following": 133, "country_to_capital": 43,
    "country_to_language": 48, "object_superclass": 65, "product_by_company": 40,
    "work_location": 45, "adj_antonym": 92, "adj_comparative": 48, "adj_superlative": 41,
    "verb_past_tense": 112, "entity_to_pronoun": 253, "word_to_synonym": 154,
    "word_to_homophone": 91, "word_to_compound": 36,
}  # fmt: skip
#: Distinct sources of all of them together.
N_SOURCES = 1597
#: Name: layers, d_model, tokens.
SHAPES = {"124M": (12, 768, 50_257), "7B": (32, 4096, 32_000)}


def operations(n_vocab: int) -> dict[str, np.ndarray]:
    """Random pairs of the published sizes, with as many distinct sources."""
    rng = np.random.default_rng(0)
    words = rng.permutation(n_vocab)[:N_SOURCES]
    pairs, used = {}, 0
    for name, size in SIZES.items():
        sources = words[np.arange(used, used + size) % len(words)]
        targets = sources if "copying" in name else rng.integers(0, n_vocab, size)
        pairs[name] = np.stack([sources, targets], axis=1)
        used += size
    return pairs


def write_model(folder: Path, shape: str, n_layers: int, dtype: torch.dtype) -> None:
    """Random weights of a Llama model: all attention, the first MLP and both ends."""
    sys.path.append(str(ROOT / "scripts"))
    from make_shaped_checkpoint import SHAPES as FULL
    from make_shaped_checkpoint import write_checkpoint

    write_checkpoint(folder, FULL[shape], n_layers, dtype, ends=True)


def dense_algorithm(heads: pd.DataFrame, pairs: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds of processor for some heads, and their scores of promotion and suppression."""
    source = heads["source"].iloc[0]
    unembedding = read_token_space(source, tables=("unembedding",)).unembedding
    embeddings = {kind: read_source_embedding(source, kind) for kind in ("raw", "mlp0")}
    read, write = (torch.from_numpy(skhead.load_weights(heads, role)) for role in "VO")
    scores = np.zeros((len(heads), 2 * len(pairs)))
    started = time.process_time()
    for head in range(len(heads)):
        embedding = embeddings["mlp0" if heads["layer"].iloc[head] else "raw"]
        whole = read[head] @ write[head].T
        for column, (name, ids) in enumerate(pairs.items()):
            k = 1 if "copying" in name else 10
            sources, targets = torch.from_numpy(ids).T
            logits = embedding[sources] @ whole @ unembedding.T
            for i, signed in enumerate((logits, -logits)):
                hits = signed.topk(k, dim=1).indices == targets[:, None]
                scores[head, 2 * column + i] = hits.any(1).float().mean()
    return time.process_time() - started, scores


class Operations(Benchmark):
    """Two layers of the shape of GPT-2 small, at operations of the published sizes."""

    sizes = 12, 12, 768, 64, 3072, 50_257
    n_dense = 2
    tiny: ClassVar = {"sizes": (2, 2, 16, 4, 32, 300)}

    def setup(self) -> None:
        sys.path.append(str(ROOT / "scripts"))
        from make_shaped_checkpoint import Shape, write_checkpoint

        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        write_checkpoint(folder, Shape(2, *self.sizes), 2, torch.float32, ends=True)
        self.heads = skhead.load_heads(folder)
        self.pairs = operations(self.sizes[-1])

    def teardown(self) -> None:
        self._folder.cleanup()

    def track_speedup_over_dense_algorithm(self) -> float:
        """Processor time per head, reading and null included, of the algorithm it replaces."""
        dense, _ = dense_algorithm(self.heads.iloc[-self.n_dense :], self.pairs)
        started = time.process_time()
        OperationMapper(self.pairs).fit(self.heads)
        own = (time.process_time() - started) / len(self.heads)
        return dense / self.n_dense / own


def compare(heads: pd.DataFrame, pairs: dict[str, np.ndarray], n_dense: int) -> None:
    """Print seconds per head of both, reading and null included, and whether they agree."""
    last = heads.iloc[-n_dense:]
    half = n_dense // 2
    halves = [dense_algorithm(last.iloc[:half], pairs)]
    wall, processor = time.perf_counter(), time.process_time()
    mapper = OperationMapper(pairs).fit(heads)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    halves.append(dense_algorithm(last.iloc[half:], pairs))
    dense = sum(seconds for seconds, _ in halves) / n_dense
    own = processor / len(heads)
    expected = np.concatenate([scores for _, scores in halves])
    largest = np.abs(mapper.scores_.iloc[-n_dense:].to_numpy() - expected).max()
    print(f"dense algorithm   {dense:7.3f} s of processor per head ({n_dense} heads)")
    print(
        f"OperationMapper   {own:7.3f} s of processor per head ({len(heads)} heads in {wall:.1f} s)"
    )
    print(f"ratio             {dense / own:7.1f}; largest difference of scores {largest:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--layers", type=int, help="layers of the model; all of the shape's")
    parser.add_argument("--dense-heads", type=int, default=4, help="heads for the dense algorithm")
    parser.add_argument("--directory", type=Path, help="where the checkpoint is written")
    arguments = parser.parse_args()
    n_layers = arguments.layers or SHAPES[arguments.shape][0]
    small = arguments.shape == "124M"
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        dtype = torch.float32 if small else torch.bfloat16
        written = (Path(folder), arguments.shape, n_layers, dtype)
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=written)
        writer.start()
        writer.join()
        heads = skhead.load_heads(folder)
        _, d_model, n_vocab = SHAPES[arguments.shape]
        pairs = operations(n_vocab)
        before = peak_bytes() + 2 * 4 * n_vocab * d_model
        started = time.perf_counter()
        OperationMapper(pairs).fit(heads.iloc[-2:] if small else heads)
        print(
            f"{arguments.shape}: {time.perf_counter() - started:.1f} s, peak memory of the process "
            f"{peak_bytes() / 2**30:.2f} GiB, {(peak_bytes() - before) / 2**30:.2f} GiB more than "
            "libraries and both tables of tokens in float32",
            flush=True,
        )
        if small:
            compare(heads, pairs, arguments.dense_heads)


if __name__ == "__main__":
    main()
