"""What the bundled model does on held-out sequences: measures, labels and the card for people."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import numpy as np
import torch
from induction_2l_model import (
    D_HEAD,
    D_MODEL,
    D_VOCAB,
    MAX_SEGMENT,
    MIN_SEGMENT,
    N_CTX,
    N_HEADS,
    N_LAYERS,
    N_WORDS,
    YES,
    Batch,
    Parameters,
    all_heads,
    forward,
    sample_batch,
)
from torch.nn import functional as F

HELD_OUT_SEED, HELD_OUT_SEQUENCES = 20_260_110, 2048
CHUNK = 256
LABEL_THRESHOLD = 0.5
NEEDED_DROP = 0.1
MEASURES = {
    "previous_token": "from every token at position 2 or later, to the token just before it",
    "induction_target": "from a word inside the second occurrence of a segment, to the token"
    " that followed its first occurrence",
    "duplicate_token": "from a word that has occurred before, to its earlier occurrence",
    "self": "from every token at position 2 or later, to itself",
    "first_token": "from every token at position 2 or later, to the beginning-of-sequence token",
}
LABELS = {
    "previous_token": "Previous Token",
    "induction_target": "Induction",
    "duplicate_token": "Duplicate Token",
}


def held_out_batches(sequences: int = HELD_OUT_SEQUENCES) -> list[Batch]:
    """Sequences of a seed that training never uses, in chunks; fewer are a prefix of more."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    return [sample_batch(CHUNK, rng) for _ in range(math.ceil(sequences / CHUNK))]


@torch.no_grad()
def task_performance(
    parameters: Parameters, batches: list[Batch], active: list[list[int]] | None = None
) -> dict[str, dict[str, float]]:
    """Accuracy and mean cross-entropy (nats) on both tasks, with ``active`` heads writing."""
    losses: dict[str, list[torch.Tensor]] = {"induction": [], "question": []}
    hits: dict[str, list[torch.Tensor]] = {"induction": [], "question": []}
    for batch in batches:
        logits, _ = forward(parameters, batch.tokens, active)
        targets = batch.tokens[:, 1:]
        for task, mask in (("induction", batch.copied), ("question", batch.asked)):
            here = mask[:, :-1]
            predicted, wanted = logits[:, :-1][here], targets[here]
            losses[task].append(F.cross_entropy(predicted, wanted, reduction="none"))
            hits[task].append(predicted.argmax(-1) == wanted)
    return {
        task: {
            "accuracy": _mean(hits[task]),
            "loss": _mean(losses[task]),
            "predictions": sum(len(part) for part in hits[task]),
        }
        for task in losses
    }


@torch.no_grad()
def mean_attention(parameters: Parameters, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Mean attention of every head ``(n_layers, n_heads)`` for each of ``MEASURES``."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in MEASURES}
    for batch in batches:
        _, patterns = forward(parameters, batch.tokens)
        for name, values in _attention(torch.stack(patterns), batch).items():
            parts[name].append(values)
    return {name: torch.cat(values, dim=-1).double().mean(-1) for name, values in parts.items()}


def uniform_attention(batches: list[Batch]) -> dict[str, float]:
    """The same means for a head that attends to all tokens so far alike."""
    uniform = torch.ones(N_CTX, N_CTX).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in MEASURES}
    for batch in batches:
        pattern = uniform.expand(1, len(batch.tokens), 1, N_CTX, N_CTX)
        for name, values in _attention(pattern, batch).items():
            parts[name].append(values.flatten())
    return {name: _mean(values) for name, values in parts.items()}


def _attention(pattern: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    """Attention ``(layer, head, observations)`` out of ``(layer, batch, head, query, key)``."""
    by_head = pattern.transpose(1, 2)
    query = torch.arange(2, N_CTX)
    copied_row, copied_at = torch.where(batch.copied)
    repeat_row, repeat_at = torch.where(batch.earlier >= 0)
    target = batch.earlier[copied_row, copied_at] + 1
    earlier = batch.earlier[repeat_row, repeat_at]
    return {
        "previous_token": by_head[..., query, query - 1].flatten(2),
        "induction_target": by_head[:, :, copied_row, copied_at, target],
        "duplicate_token": by_head[:, :, repeat_row, repeat_at, earlier],
        "self": by_head[..., query, query].flatten(2),
        "first_token": by_head[..., query, 0].flatten(2),
    }


def label(attention: dict[str, float]) -> str:
    """Class of a head: the labelled measure that reaches the threshold, or ``"None"``."""
    best = max(LABELS, key=lambda name: attention[name])
    return LABELS[best] if attention[best] >= LABEL_THRESHOLD else "None"


def measure_heads(parameters: Parameters, batches: list[Batch]) -> list[dict[str, Any]]:
    """For every head: label, attention, and both accuracies when the head writes nothing."""
    attention = mean_attention(parameters, batches)
    heads = []
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            others = all_heads()
            others[layer].remove(head)
            without = task_performance(parameters, batches, others)
            scores = {
                name: round(values[layer, head].item(), 4) for name, values in attention.items()
            }
            heads.append(
                {
                    "head": f"L{layer}H{head}",
                    "layer": layer,
                    "index": head,
                    "label": label(scores),
                    "attention": scores,
                    "accuracy_without": {
                        task: round(figures["accuracy"], 4) for task, figures in without.items()
                    },
                }
            )
    return heads


def make_card(parameters: Parameters, training: dict[str, Any]) -> dict[str, Any]:
    """Every figure of the model, measured on the held-out sequences."""
    batches = held_out_batches()
    performance = task_performance(parameters, batches)
    answers = torch.cat([batch.tokens[:, 1:][batch.asked[:, :-1]] for batch in batches])
    yes = (answers == YES).double().mean().item()
    chance = {
        "induction": (1 / N_WORDS, math.log(N_WORDS)),
        "question": (max(yes, 1 - yes), -yes * math.log(yes) - (1 - yes) * math.log(1 - yes)),
    }
    for task, (accuracy, loss) in chance.items():
        performance[task] |= {"chance_accuracy": accuracy, "chance_loss": loss}
    return {
        "name": "skhead/induction-2l",
        "licence": "MIT",
        "architecture": {
            "kind": "attention-only transformer, pre-norm LayerNorm, learned positions",
            "n_layers": N_LAYERS,
            "n_heads": N_HEADS,
            "d_model": D_MODEL,
            "d_head": D_HEAD,
            "n_ctx": N_CTX,
            "d_vocab": D_VOCAB,
            "parameters": sum(tensor.numel() for tensor in parameters.values()),
        },
        "tokens": {f"0-{N_WORDS - 1}": "words", "64": "bos", "65": "ask", "66": "yes", "67": "no"},
        "training": training,
        "held_out": {"seed": HELD_OUT_SEED, "sequences": HELD_OUT_SEQUENCES},
        "performance": {
            task: {name: round(value, 5) for name, value in figures.items()}
            for task, figures in performance.items()
        },
        "measures": MEASURES,
        "labels": {"threshold": LABEL_THRESHOLD, "classes": LABELS},
        "uniform_attention": {k: round(v, 4) for k, v in uniform_attention(batches).items()},
        "heads": measure_heads(parameters, batches),
    }


def _fill(text: str, subsequent_indent: str = "") -> str:
    return textwrap.fill(text, 100, subsequent_indent=subsequent_indent, break_on_hyphens=False)


def _mean(parts: list[torch.Tensor]) -> float:
    return torch.cat(parts).double().mean().item()


def readme(card: dict[str, Any]) -> str:
    """The card for people, in Markdown."""
    blocks = [
        f"# {card['name']}",
        _fill(
            "A tiny attention-only transformer that comes with skhead, for examples, tests and"
            " teaching. `scripts/train_induction_2l.py` trains it and writes this file from"
            f" `card.json`. Licence: {card['licence']}."
        ),
        "## Model",
        _model_text(card["architecture"]),
        "## Task",
        _task_text(card["held_out"]),
        _performance_table(card["performance"]),
        "## Heads",
        "\n".join(
            _fill(f"- `{name}`: mean attention {text}.", subsequent_indent="  ")
            for name, text in card["measures"].items()
        ),
        _heads_table(card),
        _labels_text(card),
        "## Training",
        _training_text(card["training"]),
    ]
    return "\n\n".join(blocks) + "\n"


def _model_text(shape: dict[str, Any]) -> str:
    return _fill(
        f"{shape['n_layers']} layers of {shape['n_heads']} heads, d_model {shape['d_model']},"
        f" d_head {shape['d_head']}, context {shape['n_ctx']}, {shape['d_vocab']} tokens, LayerNorm"
        " in front of each layer and of the unembedding, learned positions, no MLP,"
        f" {shape['parameters']:,} parameters in float32. `model.safetensors` uses TransformerLens"
        " names: `blocks.0.attn.W_Q` is `(n_heads, d_model, d_head)`."
    )


def _task_text(held_out: dict[str, Any]) -> str:
    return _fill(
        f"A sequence is a beginning-of-sequence token and {N_CTX - 1} tokens. Its words are"
        f" distinct, but one segment of {MIN_SEGMENT} to {MAX_SEGMENT} words comes twice, at random"
        " places; elsewhere stand questions `ask word yes` or `ask word no`, answered by whether"
        " the word has occurred before. What can be foretold is the second occurrence of the"
        " segment beyond its first word (induction), and the answers (question). Measured on"
        f" {held_out['sequences']} sequences of seed {held_out['seed']}, which training never uses."
        " Chance is a word drawn evenly for induction, the more frequent answer for questions."
        " Losses are in nats."
    )


def _labels_text(card: dict[str, Any]) -> str:
    labels = ", ".join(f"{text} for `{name}`" for name, text in card["labels"]["classes"].items())
    needed = [
        f"{task}: "
        + ", ".join(
            head["head"]
            for head in card["heads"]
            if head["accuracy_without"][task] < figures["accuracy"] - NEEDED_DROP
        )
        for task, figures in card["performance"].items()
    ]
    return _fill(
        "The last two columns give the accuracy that is left when that head alone writes nothing."
        " A head gets a label when the mean attention that goes with it is at least"
        f" {card['labels']['threshold']}: {labels}; otherwise the label is None. Heads without"
        f" which a task loses more than {NEEDED_DROP} of its accuracy: {'; '.join(needed)}."
    )


def _training_text(training: dict[str, Any]) -> str:
    return _fill(
        f"AdamW, learning rate {training['learning_rate']}, weight decay"
        f" {training['weight_decay']}, batches of {training['batch_size']}, seed"
        f" {training['seed']}; a token that nothing foretells counts"
        f" {training['unpredictable_weight']} in the loss. Left alone, training spreads each job"
        f" over several heads. Therefore all heads learn for {training['learn_steps']} steps; then"
        f" every {training['steps_per_removal']} steps the head whose removal raises the loss least"
        f" is switched off, until each layer has {training['kept_heads']}; these settle for"
        f" {training['settle_steps']} steps; the others start again from random weights and train"
        f" with them for {training['regrow_steps']} steps. Both tasks are solved by then, so the"
        " restarted heads find little to do and stay close to random: a reference within the model"
        " for what chance looks like."
    )


def _performance_table(performance: dict[str, dict[str, float]]) -> str:
    rows = [
        "| task | accuracy | chance | loss | chance | predictions |",
        "|---|---|---|---|---|---|",
    ]
    for task, f in performance.items():
        rows.append(
            f"| {task} | {f['accuracy']:.4f} | {f['chance_accuracy']:.4f} | {f['loss']:.4f}"
            f" | {f['chance_loss']:.4f} | {f['predictions']} |"
        )
    return "\n".join(rows)


def _heads_table(card: dict[str, Any]) -> str:
    names = list(card["measures"])
    titles = ["head", "label", *names, "induction without", "questions without"]
    rows = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for head in card["heads"]:
        figures = [f"{head['attention'][name]:.3f}" for name in names]
        figures += [f"{value:.3f}" for value in head["accuracy_without"].values()]
        rows.append(f"| {head['head']} | {head['label']} | " + " | ".join(figures) + " |")
    uniform = [f"{card['uniform_attention'][name]:.3f}" for name in names]
    rows.append("| uniform attention | | " + " | ".join(uniform) + " | | |")
    return "\n".join(rows)
