"""Train and measure the bundled heads for payload retrieval.

    python scripts/train_payload_heads.py                    # train all, then write the card
    python scripts/train_payload_heads.py --only d8-r3-r5    # train these heads again
    python scripts/train_payload_heads.py --evaluate-only    # measure the shipped weights again

Training takes some minutes per head on one free core. Measures are made with the weights as they
are stored, on sequences of seeds that training never uses.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch.nn import functional as F
from train_induction_2l import one_order

from skhead.datasets import (
    PayloadEmbeddings,
    PayloadHead,
    PayloadRetrieval,
    make_contrast_pairs,
    make_payload_retrieval,
)
from skhead.datasets._payload import FACTORS
from skhead.datasets._payload_heads import WEIGHTS, read_payload_head
from skhead.datasets._payload_latents import EMBEDDINGS
from skhead.superposition import analyse_superposition

HEADS_DIR = Path(__file__).resolve().parents[1] / "skhead" / "datasets" / "models" / "payload"
MEASURE_SEED = 20260203
MEASURED = 40_960
ENERGY = 0.99


@dataclass(frozen=True)
class HeadConfig:
    """A head to train: its width, and the latents of its task."""

    d_head: int
    r1: int
    r2: int
    latent: str = "sign"

    @property
    def name(self) -> str:
        """Name of the head and of its file."""
        law = "" if self.latent == "sign" else f"-{self.latent}"
        return f"d{self.d_head}-r{self.r1}-r{self.r2}{law}"


HEADS = (
    HeadConfig(16, 3, 5),
    HeadConfig(16, 7, 7),
    HeadConfig(8, 3, 5),
    HeadConfig(8, 5, 5),
    HeadConfig(8, 2, 3),
    HeadConfig(16, 3, 5, "gaussian"),
)


@dataclass(frozen=True)
class Training:
    """Everything besides the head that decides the trained weights."""

    seed: int = 11
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    steps: int = 20_000
    steps_per_report: int = 2000


Parameters = dict[str, torch.Tensor]


@one_order()
def train(config: HeadConfig, training: Training) -> PayloadHead:
    """Train with a learning rate that falls to zero along half a cosine."""
    rng = np.random.default_rng(training.seed)
    drawn = PayloadEmbeddings.draw(config.r1, config.r2, random_state=rng)
    embeddings = PayloadEmbeddings(
        **{name: getattr(drawn, name).astype(np.float32) for name in EMBEDDINGS}
    )
    parameters = initial_parameters(config, embeddings, training.seed)
    optimizer = torch.optim.AdamW(
        parameters.values(), training.learning_rate, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    for step in range(1, training.steps + 1):
        loss, accuracy = loss_and_accuracy(
            parameters, sample(config, embeddings, training.batch_size, rng)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % training.steps_per_report == 0:
            shown = f"loss {loss:.4f}  accuracy {accuracy:.4f}"
            print(f"{config.name} step {step:6d}  {shown}", file=sys.stderr, flush=True)
    return PayloadHead(**_arrays(parameters), embeddings=embeddings, name=config.name)


def sample(
    config: HeadConfig,
    embeddings: PayloadEmbeddings,
    n_sequences: int,
    random_state: int | np.random.Generator,
) -> PayloadRetrieval:
    """Sequences of a head's task."""
    return make_payload_retrieval(
        n_sequences, embeddings=embeddings, latent=config.latent, random_state=random_state
    )


def initial_parameters(config: HeadConfig, embeddings: PayloadEmbeddings, seed: int) -> Parameters:
    """Even weights between plus and minus ``1 / sqrt(number of inputs)``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict.fromkeys(WEIGHTS[:3], (embeddings.d_model, config.d_head))
    shapes["W_out"] = (config.d_head, embeddings.n_payloads)
    return {
        name: ((2 * torch.rand(shape, generator=generator) - 1) * shape[0] ** -0.5).requires_grad_()
        for name, shape in shapes.items()
    }


def loss_and_accuracy(parameters: Parameters, task: PayloadRetrieval) -> tuple[torch.Tensor, float]:
    """Cross-entropy of the payload, and the share of right answers."""
    context, query = torch.from_numpy(task.context), torch.from_numpy(task.query)
    queries, keys = query @ parameters["W_Q"], context @ parameters["W_K"]
    scores = torch.einsum("nd,ncd->nc", queries, keys) * queries.shape[-1] ** -0.5
    attended = torch.einsum("nc,ncd->nd", scores.softmax(-1), context @ parameters["W_V"])
    logits = attended @ parameters["W_out"]
    target = torch.from_numpy(task.target)
    accuracy = (logits.argmax(-1) == target).float().mean().item()
    return F.cross_entropy(logits, target), accuracy


def _arrays(parameters: Parameters) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in parameters.items()}


def measure(config: HeadConfig, head: PayloadHead) -> dict[str, Any]:
    """Entry of a head on the card."""
    task = sample(config, head.embeddings, MEASURED, MEASURE_SEED)
    found = head.attention(task)[np.arange(len(task)), task.i_star]
    spectra = [spectrum(config, head, factor) for factor in FACTORS]
    ranks = [energy_rank(values) for _, values in spectra]
    interaction = analyse_superposition(head)
    return {
        **asdict(config),
        "accuracy": round(head.accuracy(task), 4),
        "attention": round(float(found.mean()), 4),
        "ranks": ranks,
        "spectra": [[_digits(value / values[0]) for value in values] for _, values in spectra],
        "diagonal_share": round(interaction.diagonal_share, 3),
        "cross_block_ratio": round(interaction.cross_block_ratio, 3),
        "swaps": swaps(
            head, task, [basis[:, :r] for (basis, _), r in zip(spectra, ranks, strict=True)]
        ),
    }


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def spectrum(config: HeadConfig, head: PayloadHead, factor: str) -> tuple[np.ndarray, np.ndarray]:
    """Key directions and singular values of a factor's difference of second moments."""
    pairs = make_contrast_pairs(factor, head=head, latent=config.latent, random_state=MEASURE_SEED)
    keys = pairs.keys.astype(np.float64).reshape(len(pairs), 2, -1)
    difference = pairs.queries.T.astype(np.float64) @ (keys[:, 0] - keys[:, 1]) / len(pairs)
    _, values, key_side = np.linalg.svd(difference)
    return key_side.T, values


def energy_rank(values: np.ndarray) -> int:
    """Least number of singular values that hold 99 % of the energy."""
    energy = np.cumsum(values**2) / np.sum(values**2)
    return int(np.searchsorted(energy, ENERGY) + 1)


def swaps(
    head: PayloadHead, task: PayloadRetrieval, bases: list[np.ndarray]
) -> dict[str, dict[str, float]]:
    """Attention once the key that is looked for and another exchange coordinates in a subspace.

    The other stands at a position, drawn evenly, that matches the query on neither factor.
    """
    rows = np.arange(len(task))
    differ = np.ones(task.payloads.shape, dtype=bool)
    for latents in (task.z1, task.z2):
        differ &= (latents != latents[rows, task.i_star][:, None]).any(axis=-1)
    drawn = np.random.default_rng(MEASURE_SEED).random(differ.shape)
    other = np.where(differ, drawn, -1.0).argmax(axis=1)
    usable = differ.any(axis=1)
    keys = head.keys(task.context).astype(np.float64)
    queries = head.queries(task.query).astype(np.float64)
    joint = np.linalg.qr(np.hstack(bases))[0]
    none = np.zeros((head.d_head, 0))
    measured = {}
    for name, basis in {"none": none, "z1": bases[0], "z2": bases[1], "both": joint}.items():
        swapped = keys.copy()
        change = (keys[rows, other] - keys[rows, task.i_star]) @ basis @ basis.T
        swapped[rows, task.i_star] += change
        swapped[rows, other] -= change
        scores = head.scale * np.einsum("nd,ncd->nc", queries, swapped)
        attention = softmax(scores, axis=-1)
        measures = {
            "found": attention[rows, task.i_star],
            "other": attention[rows, other],
            "flipped": attention.argmax(axis=1) == other,
        }
        measured[name] = {key: round(float(v[usable].mean()), 3) for key, v in measures.items()}
    return measured


def readme(card: dict[str, Any]) -> str:
    """Text for people, with the figures of the card."""
    return README.format(
        **card["training"],
        n_measured=card["measured_sequences"],
        seed_measured=card["measured_seed"],
        accuracies="\n".join(_accuracy_row(*item) for item in card["heads"].items()),
        swaps="\n".join(_swap_row(*item) for item in card["heads"].items()),
    )


def _accuracy_row(name: str, entry: dict[str, Any]) -> str:
    true = (entry["r1"], entry["r2"])
    gaps = [
        f"{values[r - 1] / values[r]:.0f}" if r < len(values) else "none"
        for values, r in zip(entry["spectra"], true, strict=True)
    ]
    cells = (
        name,
        f"{100 * entry['accuracy']:.1f}",
        f"{entry['attention']:.3f}",
        ", ".join(map(str, entry["ranks"])),
        ", ".join(gaps),
        f"{entry['diagonal_share']:.3f}",
        f"{entry['cross_block_ratio']:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _swap_row(name: str, entry: dict[str, Any]) -> str:
    cells = [
        f"{swap['found']:.3f} / {swap['other']:.3f} / {swap['flipped']:.2f}"
        for swap in entry["swaps"].values()
    ]
    return f"| {name} | {' | '.join(cells)} |"


README = """# Heads for payload retrieval

Attention heads that come with skhead, trained on the sequences of
`skhead.datasets.make_payload_retrieval`. `scripts/train_payload_heads.py` trains them and writes
this file from `card.json`. Licence of the weights: MIT.

A name gives the dimensions of the head and the latents of both factors. Latents are signs, or
normal where the name says so. Each file holds the float32 arrays W_Q, W_K, W_V, W_out and the
embeddings A1, A2, B1, B2 and payload: d_model 32, 10 payloads, 16 tokens of context, noise 0.01.

## Training

One head without biases, norms, positions or residual; cross-entropy of the payload; AdamW with
weight decay {weight_decay} and a learning rate that falls from {learning_rate} to zero along half a
cosine in {steps} steps of {batch_size} new sequences; seed {seed}. With a tenth of that rate, kept
until the loss rested, d16-r3-r5 solved the task as well and mixed its factors more (cross-block
ratio 0.21).

## Measures

On {n_measured} sequences of seed {seed_measured}, which training never uses: accuracy in percent
(tokens may share all latents, which bounds it), and mean attention to the token that is looked for.
Then, from 40960 pairs of `make_contrast_pairs`, singular values of the difference of second moments
of queries and keys: the rank that holds 99 % of the energy, and the ratio of the last singular
value that should be there to the next. At last the interaction matrix of latents: the diagonal's
share of its energy, and the norm between factors over that within.

| head | accuracy | attention | rank z1, z2 | gap z1, z2 | diagonal | cross-block |
| --- | --- | --- | --- | --- | --- | --- |
{accuracies}

## Swaps

The token that is looked for and another, which matches the query on neither factor, exchange the
coordinates of their keys in the recovered subspace. Attention to the first, attention to the
second, and how often the second then gets the most.

| head | none | z1 | z2 | both |
| --- | --- | --- | --- | --- |
{swaps}
"""


@one_order()
def main(arguments: list[str] | None = None) -> None:
    """Train heads, or read the shipped ones, then measure them and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HEADS_DIR, help="directory of the heads")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in HEADS], metavar="NAME")
    parser.add_argument(
        "--evaluate-only", action="store_true", help="measure the heads in the output directory"
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    card_file = options.output / "card.json"
    entries = json.loads(card_file.read_text())["heads"] if card_file.exists() else {}
    training = Training()
    for config in HEADS:
        if options.only is not None and config.name not in options.only:
            continue
        file = options.output / f"{config.name}.npz"
        if not options.evaluate_only:
            _write_head(file, train(config, training))
        entries[config.name] = measure(config, read_payload_head(file))
        _write_card(options.output, training, entries)


def _write_head(file: Path, head: PayloadHead) -> None:
    arrays = {name: getattr(head, name) for name in WEIGHTS}
    arrays |= {name: getattr(head.embeddings, name) for name in EMBEDDINGS}
    np.savez(file, **arrays)


def _write_card(output: Path, training: Training, entries: dict[str, Any]) -> None:
    """Write the card with the heads in the order of ``HEADS``."""
    card = {
        "training": asdict(training),
        "measured_seed": MEASURE_SEED,
        "measured_sequences": MEASURED,
        "heads": {c.name: entries[c.name] for c in HEADS if c.name in entries},
    }
    (output / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (output / "README.md").write_text(readme(card))


if __name__ == "__main__":
    main()
