"""Train and measure the bundled zoo: tiny models for work across models.

    python scripts/train_zoo.py                      # train all, then write weights and card
    python scripts/train_zoo.py --only rope-attn-1   # train these models again
    python scripts/train_zoo.py --evaluate-only      # measure the shipped weights again

Training takes two to three minutes per model on one free core. The measures are made on sequences
of a seed that training never sees, with the weights as they are stored, and go into ``card.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from train_induction_2l import one_order
from zoo_card import held_out, make_card, measure_model, readme, task_accuracy
from zoo_model import (
    N_HEADS,
    TASKS,
    ZOO,
    Parameters,
    Sequences,
    ZooModel,
    initial_parameters,
    logits,
    sample_sequences,
)

ZOO_DIR = Path(__file__).resolve().parents[1] / "skhead" / "datasets" / "models" / "zoo"


@dataclass(frozen=True)
class Training:
    """Everything besides the model that decides the trained weights."""

    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    most_steps: int = 2400
    decay_steps: int = 400
    solved_accuracy: float = 0.95
    memory: float = 0.97
    head_dropout: float = 0.05
    unpredictable_weight: float = 0.05


@one_order()
def train(model: ZooModel, training: Training, log_every: int = 0) -> tuple[Parameters, int]:
    """Train until all tasks are solved, or time is up, while the learning rate falls at the end.

    Returns the weights and the steps taken. In every sequence each head is
    silent with probability ``head_dropout``, so that no task hangs on one head. The same weights
    come out of every run on one machine.
    """
    parameters = initial_parameters(model)
    for tensor in parameters.values():
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(
        parameters.values(), training.learning_rate, (0.9, 0.98), weight_decay=training.weight_decay
    )
    rng = np.random.default_rng(model.seed)
    generator = torch.Generator().manual_seed(model.seed)
    accuracy = dict.fromkeys(TASKS, 0.0)
    step, end = 0, training.most_steps
    while step < end:
        if end == training.most_steps and min(accuracy.values()) >= training.solved_accuracy:
            end = min(end, step + training.decay_steps)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _rate(step, end, training)
        batch = sample_sequences(training.batch_size, rng, pairs=model.rotary_base is not None)
        shape = (model.n_layers, training.batch_size, N_HEADS)
        writing = (torch.rand(shape, generator=generator) >= training.head_dropout).float()
        predicted = logits(model, parameters, batch.tokens, writing)
        loss = training_loss(predicted, batch, training.unpredictable_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        for task, value in task_accuracy(predicted.detach(), batch).items():
            accuracy[task] += (1 - training.memory) * (value - accuracy[task])
        step += 1
        if log_every and step % log_every == 0:
            shown = "  ".join(f"{task} {value:.3f}" for task, value in accuracy.items())
            print(f"{model.name} step {step:5d}  {shown}", file=sys.stderr, flush=True)
    return {name: tensor.detach() for name, tensor in parameters.items()}, step


def _rate(step: int, end: int, training: Training) -> float:
    left = min(1.0, (end - step) / training.decay_steps)
    return min((step + 1) / training.warmup_steps, 0.5 * (1 - math.cos(math.pi * left)))


def training_loss(predicted: torch.Tensor, batch: Sequences, unpredictable: float) -> torch.Tensor:
    """Weighted mean cross-entropy; next tokens that nothing foretells count little."""
    loss = F.cross_entropy(
        predicted[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
    )
    weight = torch.where(batch.foretold[:, :-1].flatten(), 1.0, unpredictable)
    return (loss * weight).sum() / weight.sum()


@one_order()
def main(arguments: list[str] | None = None) -> None:
    """Train models, or read the shipped weights, then measure them and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ZOO_DIR, help="directory of the zoo")
    parser.add_argument("--only", nargs="+", choices=[model.name for model in ZOO], metavar="NAME")
    parser.add_argument(
        "--evaluate-only", action="store_true", help="measure the weights in the output directory"
    )
    options = parser.parse_args(arguments)
    card_file = options.output / "card.json"
    card = json.loads(card_file.read_text()) if card_file.exists() else {"models": {}}
    training, entries, sequences = Training(), card["models"], held_out()
    for model in ZOO:
        if options.only is not None and model.name not in options.only:
            continue
        directory = options.output / model.name
        if options.evaluate_only:
            steps = entries[model.name]["steps"]
        else:
            parameters, steps = train(model, training, log_every=100)
            _write_model(directory, model, parameters)
        stored = {k: v.float() for k, v in load_file(directory / "model.safetensors").items()}
        entries[model.name] = measure_model(model, stored, steps, sequences)
        _write_card(options.output, training, entries)


def _write_model(directory: Path, model: ZooModel, parameters: Parameters) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.half() for name, tensor in parameters.items()}
    metadata = {
        "description": f"skhead/zoo/{model.name}; made by scripts/train_zoo.py; MIT licence"
    }
    save_file(stored, directory / "model.safetensors", metadata=metadata)
    (directory / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")


def _write_card(output: Path, training: Training, entries: dict[str, Any]) -> None:
    """Write the card with the models in the order of ``ZOO``."""
    ordered = {model.name: entries[model.name] for model in ZOO if model.name in entries}
    card = make_card(asdict(training), ordered)
    (output / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (output / "README.md").write_text(readme(card))


if __name__ == "__main__":
    main()
