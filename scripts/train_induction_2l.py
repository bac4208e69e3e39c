"""Train and measure the bundled model ``skhead/induction-2l``.

    python scripts/train_induction_2l.py                   # train, then write weights and card
    python scripts/train_induction_2l.py --evaluate-only   # measure the shipped weights again

Training takes about four minutes on one core. The measures are made on sequences of a seed that
training never sees, and go with the weights as ``card.json`` and ``README.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from induction_2l_card import make_card, readme
from induction_2l_model import (
    HEAD_TENSORS,
    N_HEADS,
    N_LAYERS,
    Batch,
    Parameters,
    all_heads,
    forward,
    initial_parameters,
    sample_batch,
)
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

MODEL_DIR = Path(__file__).resolve().parents[1] / "skhead" / "datasets" / "models" / "induction-2l"
METADATA = {
    "description": "skhead/induction-2l: attention-only transformer, 2 layers of 8 heads, in"
    " TransformerLens names; made by scripts/train_induction_2l.py; MIT licence"
}


@dataclass(frozen=True)
class Training:
    """Everything that decides the trained weights; the phases are counted in steps."""

    seed: int = 1
    learn_steps: int = 700
    steps_per_removal: int = 40
    settle_steps: int = 300
    regrow_steps: int = 420
    kept_heads: int = 2
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.3
    warmup_steps: int = 100
    unpredictable_weight: float = 0.05

    @property
    def settle_at(self) -> int:
        """Step at which all superfluous heads are off and the learning rate begins to fall."""
        return self.learn_steps + N_LAYERS * (N_HEADS - self.kept_heads) * self.steps_per_removal

    @property
    def regrow_at(self) -> int:
        """Step at which the heads that were switched off start again."""
        return self.settle_at + self.settle_steps

    @property
    def steps(self) -> int:
        """Length of the whole training."""
        return self.regrow_at + self.regrow_steps


@contextmanager
def one_order() -> Iterator[None]:
    """Within the context every sum is taken in one order, so that results repeat to the bit."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


@one_order()
def train(training: Training, log_every: int = 0) -> Parameters:
    """Train in four phases; the same weights in every run on one machine.

    All heads learn; then the heads that matter least are switched off one at a time, until each
    layer has ``kept_heads`` left, so that no two heads do the same job; these settle; at last the
    others start again from random weights and learn whatever is left to learn.
    """
    parameters = initial_parameters(training.seed)
    for tensor in parameters.values():
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(
        parameters.values(), training.learning_rate, (0.9, 0.98), weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, training))
    rng = np.random.default_rng(training.seed)
    active = all_heads()
    for step in range(training.steps):
        pruning = training.learn_steps <= step < training.settle_at
        if pruning and (step - training.learn_steps) % training.steps_per_removal == 0:
            active = _without_least_needed(parameters, active, training, rng)
        if step == training.regrow_at:
            _start_again(parameters, active, training.seed + 1)
            active = all_heads()
        batch = sample_batch(training.batch_size, rng)
        loss = training_loss(parameters, batch, training.unpredictable_weight, active)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        schedule.step()
        if log_every and (step + 1) % log_every == 0:
            print(f"step {step + 1:5d}  loss {loss.item():.4f}", file=sys.stderr, flush=True)
    return {name: tensor.detach() for name, tensor in parameters.items()}


def _rate(step: int, training: Training) -> float:
    if step < training.settle_at:
        return min(1.0, (step + 1) / training.warmup_steps)
    done = (step - training.settle_at) / (training.steps - training.settle_at)
    return 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _without_least_needed(
    parameters: Parameters, active: list[list[int]], training: Training, rng: np.random.Generator
) -> list[list[int]]:
    """The active heads without the one whose removal raises the loss least."""
    batch = sample_batch(4 * training.batch_size, rng)
    choices = []
    for layer, heads in enumerate(active):
        for head in heads if len(heads) > training.kept_heads else []:
            rest = [[h for h in hs if (i, h) != (layer, head)] for i, hs in enumerate(active)]
            loss = training_loss(parameters, batch, training.unpredictable_weight, rest)
            choices.append((loss.item(), rest))
    return min(choices)[1]


@torch.no_grad()
def _start_again(parameters: Parameters, kept: list[list[int]], seed: int) -> None:
    """Give every head that is not kept new random weights."""
    fresh = initial_parameters(seed)
    for layer, heads in enumerate(kept):
        others = [h for h in range(N_HEADS) if h not in heads]
        for name in HEAD_TENSORS:
            full = f"blocks.{layer}.attn.{name}"
            parameters[full][others] = fresh[full][others]


def training_loss(
    parameters: Parameters, batch: Batch, unpredictable: float, active: list[list[int]]
) -> torch.Tensor:
    """Weighted mean cross-entropy; next tokens that nothing foretells count little."""
    logits, _ = forward(parameters, batch.tokens, active)
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
    )
    known = (batch.copied | batch.asked)[:, :-1].flatten()
    weight = torch.where(known, 1.0, unpredictable)
    return (loss * weight).sum() / weight.sum()


@one_order()
def main(arguments: list[str] | None = None) -> None:
    """Train, or read the shipped weights, then measure and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="directory of the model")
    parser.add_argument("--seed", type=int, default=Training.seed)
    parser.add_argument(
        "--evaluate-only", action="store_true", help="measure the weights in the output directory"
    )
    options = parser.parse_args(arguments)
    weights, card = options.output / "model.safetensors", options.output / "card.json"
    if options.evaluate_only:
        training = json.loads(card.read_text())["training"]
        parameters = load_file(weights)
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        training = asdict(Training(seed=options.seed))
        parameters = train(Training(seed=options.seed), log_every=100)
        save_file(parameters, weights, metadata=METADATA)
    measured = make_card(parameters, training)
    card.write_text(json.dumps(measured, indent=2) + "\n")
    (options.output / "README.md").write_text(readme(measured))


if __name__ == "__main__":
    main()
