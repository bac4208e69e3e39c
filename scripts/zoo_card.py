"""What the models of the zoo do on held-out sequences: measures, labels and the card for people."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from induction_2l_model import ASK, NO, YES
from zoo_model import (
    BEFORE,
    BOS,
    D_HEAD,
    D_MODEL,
    D_VOCAB,
    N_CTX,
    N_HEADS,
    N_WORDS,
    TASKS,
    Parameters,
    Sequences,
    ZooModel,
    forward,
    logits,
    sample_sequences,
)

HELD_OUT_SEED, HELD_OUT_SEQUENCES, REPEATED_SEQUENCES = 20_260_111, 1024, 256
BLOCK = (N_CTX - 1) // 2
FIRST_QUERY = 2
LABEL_THRESHOLD = 0.5
MEASURES = {
    "previous_token": "to the token just before",
    "duplicate_token": "from the second block, to the same word in the first",
    "induction": "from the second block, to the token after the same word in the first",
    "first_token": "to the beginning-of-sequence token",
    "current_token": "to the token itself",
}
LABELS = {
    "previous_token": "Previous Token",
    "duplicate_token": "Duplicate Token",
    "induction": "Induction",
    "first_token": "First Token",
    "current_token": "Current Token",
}


@dataclass(frozen=True)
class HeldOut:
    """Sequences of the tasks, and blocks of distinct random words that come twice."""

    tasks: Sequences
    repeated: torch.Tensor


def held_out(sequences: int = HELD_OUT_SEQUENCES, repeated: int = REPEATED_SEQUENCES) -> HeldOut:
    """Sequences of a seed that training never uses."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    block = rng.permuted(np.tile(np.arange(N_WORDS), (repeated, 1)), axis=1)[:, :BLOCK]
    tokens = np.concatenate([np.full((repeated, 1), BOS), block, block], axis=1)
    return HeldOut(sample_sequences(sequences, rng), torch.from_numpy(tokens))


def task_accuracy(predicted: torch.Tensor, batch: Sequences) -> dict[str, float]:
    """Share of the foretold next tokens that are predicted, by task."""
    hit = predicted[:, :-1].argmax(-1) == batch.tokens[:, 1:]
    return {task: hit[mask[:, :-1]].float().mean().item() for task, mask in batch.tasks.items()}


def chance_accuracy(batch: Sequences) -> dict[str, float]:
    """Accuracy of the more frequent answer, or of a word drawn evenly from those seen so far."""
    chance = {}
    for task, mask in batch.tasks.items():
        rows, at = torch.where(mask)
        answers = batch.tokens[rows, at + 1]
        if torch.isin(answers, torch.tensor([YES, NO])).all():
            chance[task] = max((answers == answer).double().mean().item() for answer in (YES, NO))
            continue
        shares = [
            1 / len({token for token in batch.tokens[row, : end + 1].tolist() if token < N_WORDS})
            for row, end in zip(rows.tolist(), at.tolist(), strict=True)
        ]
        chance[task] = float(np.mean(shares))
    return chance


@torch.no_grad()
def mean_attention(
    model: ZooModel, parameters: Parameters, repeated: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Mean attention of every head ``(n_layers, n_heads)`` for each of ``MEASURES``."""
    _, patterns = forward(model, parameters, repeated)
    return _attention(patterns.double())


def uniform_attention() -> dict[str, float]:
    """The same means for a head that attends to all tokens so far alike."""
    uniform = torch.ones(2 * BLOCK + 1, 2 * BLOCK + 1, dtype=torch.float64).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    return {name: value.item() for name, value in _attention(uniform[None, None, None]).items()}


def _attention(pattern: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means ``(layer, head)`` out of ``(layer, batch, head, query, key)``."""
    query = torch.arange(FIRST_QUERY, pattern.shape[-1])
    again = torch.arange(BLOCK + 1, 2 * BLOCK + 1)
    places = {
        "previous_token": (query, query - 1),
        "duplicate_token": (again, again - BLOCK),
        "induction": (again, again - BLOCK + 1),
        "first_token": (query, torch.zeros_like(query)),
        "current_token": (query, query),
    }
    return {name: pattern[..., at, to].mean((1, 3)) for name, (at, to) in places.items()}


def label(attention: dict[str, float]) -> str:
    """Class of a head: its highest measure if that reaches the threshold, or ``"None"``."""
    best = max(LABELS, key=lambda name: attention[name])
    return LABELS[best] if attention[best] >= LABEL_THRESHOLD else "None"


@torch.no_grad()
def measure_model(
    model: ZooModel, parameters: Parameters, steps: int, sequences: HeldOut
) -> dict[str, Any]:
    """The entry of one model in the card."""
    tokens = sequences.tasks.tokens
    accuracy = task_accuracy(logits(model, parameters, tokens), sequences.tasks)
    chance = chance_accuracy(sequences.tasks)
    predicted = logits(model, parameters, sequences.repeated)[:, BLOCK + 1 : -1].argmax(-1)
    repeated = (predicted == sequences.repeated[:, BLOCK + 2 :]).float().mean().item()
    attention = mean_attention(model, parameters, sequences.repeated)
    heads = []
    for layer in range(model.n_layers):
        for head in range(N_HEADS):
            writing = torch.ones(model.n_layers, 1, N_HEADS)
            writing[layer, 0, head] = 0
            without = task_accuracy(logits(model, parameters, tokens, writing), sequences.tasks)
            scores = {name: round(v[layer, head].item(), 4) for name, v in attention.items()}
            heads.append(
                {
                    "head": f"L{layer}H{head}",
                    "layer": layer,
                    "index": head,
                    "label": label(scores),
                    "attention": scores,
                    "accuracy_without": {task: round(v, 4) for task, v in without.items()},
                }
            )
    return {
        "family": model.family,
        "architecture": {
            "kind": _kind(model),
            "n_layers": model.n_layers,
            "n_heads": N_HEADS,
            "d_model": D_MODEL,
            "d_head": D_HEAD,
            "n_ctx": N_CTX,
            "d_vocab": D_VOCAB,
            "parameters": sum(tensor.numel() for tensor in parameters.values()),
        },
        "seed": model.seed,
        "steps": steps,
        "performance": {
            task: {"accuracy": round(accuracy[task], 4), "chance_accuracy": round(chance[task], 4)}
            for task in TASKS
        }
        | {"repeated": {"accuracy": round(repeated, 4), "chance_accuracy": round(1 / BLOCK, 4)}},
        "heads": heads,
    }


def _kind(model: ZooModel) -> str:
    norm = "RMSNorm" if model.rms else "LayerNorm"
    mlp = "no MLP"
    if model.d_mlp is not None:
        mlp = f"{'gated MLP, SiLU' if model.gated else 'MLP, GELU'}, width {model.d_mlp}"
    positions = "learned positions"
    if model.rotary_base is not None:
        positions = f"RoPE on {model.rotary_dim} coordinates, base {model.rotary_base:g}"
    return f"{positions}, {norm}, {mlp}"


def make_card(training: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """The whole card, from the entries of the models."""
    return {
        "name": "skhead/zoo",
        "licence": "MIT",
        "tokens": {
            f"0-{N_WORDS - 1}": "words",
            **{str(token): name for name, token in _SPECIAL.items()},
        },
        "training": training,
        "held_out": {
            "seed": HELD_OUT_SEED,
            "sequences": HELD_OUT_SEQUENCES,
            "repeated_sequences": REPEATED_SEQUENCES,
            "block": BLOCK,
        },
        "measures": MEASURES,
        "labels": {"threshold": LABEL_THRESHOLD, "classes": LABELS},
        "uniform_attention": {k: round(v, 4) for k, v in uniform_attention().items()},
        "models": models,
    }


_SPECIAL = {"bos": BOS, "ask": ASK, "yes": YES, "no": NO, "before": BEFORE}


def _fill(text: str, subsequent_indent: str = "") -> str:
    return textwrap.fill(text, 100, subsequent_indent=subsequent_indent, break_on_hyphens=False)


def readme(card: dict[str, Any]) -> str:
    """The card for people, in Markdown."""
    shape = next(iter(card["models"].values()))["architecture"]
    blocks = [
        f"# {card['name']}",
        _fill(
            f"{len(card['models'])} tiny transformers that come with skhead, for work across"
            " models: the same tasks, different weights and parts. `scripts/train_zoo.py` trains"
            " them and writes this file from `card.json`. Licence of the weights:"
            f" {card['licence']}."
        ),
        "## Models",
        _fill(
            f"Layers of {shape['n_heads']} heads, d_model {shape['d_model']}, d_head"
            f" {shape['d_head']}, context {shape['n_ctx']}, {shape['d_vocab']} tokens, norms in"
            " front of every layer, MLP and the unembedding. Each directory has"
            " `model.safetensors`, float16 under TransformerLens names, and `config.json` with the"
            " fields of its configuration of native models. A family is what the name says before"
            " the number: kind of positions, and whether there are MLPs."
        ),
        _models_table(card["models"]),
        "## Tasks",
        _tasks_text(card["held_out"]),
        _accuracy_table(card["models"]),
        "## Heads",
        _heads_text(card),
        _labels_table(card["models"]),
        *(_heads_table(name, entry) for name, entry in card["models"].items()),
        "## Training",
        _training_text(card["training"]),
    ]
    return "\n\n".join(blocks) + "\n"


def _tasks_text(held_out: dict[str, Any]) -> str:
    return _fill(
        "Copy: continue a segment or phrase of distinct words that occurred earlier. Question:"
        " answer `ask word` with `yes` or `no`, whether the word has occurred. Look-up: answer"
        " `before word` with the token in front of the word's earlier occurrence. Repeated:"
        " continue a block of"
        f" {held_out['block']} random words that comes twice. Accuracies in percent on"
        f" {held_out['sequences']} sequences of the tasks and {held_out['repeated_sequences']}"
        f" repeated blocks, of seed {held_out['seed']}, which training never uses. Chance is the"
        " more frequent answer, or a word drawn evenly from those seen so far."
    )


def _heads_text(card: dict[str, Any]) -> str:
    measures = "; ".join(f"`{name}`, {text}" for name, text in card["measures"].items())
    return _fill(
        f"Mean attention on the repeated blocks, from the third token on: {measures}. A head is"
        " labelled by its highest measure, if that is at least"
        f" {card['labels']['threshold']}, and is None otherwise. The last columns give the"
        " accuracy that is left on each task when that head alone writes nothing."
    )


def _training_text(training: dict[str, Any]) -> str:
    return _fill(
        f"AdamW, learning rate {training['learning_rate']}, weight decay"
        f" {training['weight_decay']}, batches of {training['batch_size']}; a token that nothing"
        f" foretells counts {training['unpredictable_weight']} in the loss. Models with RoPE also"
        " see pairs of words, each said twice in a row; without these they tend to settle on heads"
        " that look two and three tokens back in place of one. Each head is silent"
        f" with probability {training['head_dropout']} in a sequence, so that several heads learn"
        " one job. Training ends when every task has been solved to"
        f" {training['solved_accuracy']} of the training batches, or after"
        f" {training['most_steps']} steps; the learning rate falls to zero over the last"
        f" {training['decay_steps']}. A seed and shape that did not learn"
        " to copy in time, or learned it without a Previous Token or an Induction head, was given"
        " up, as happened to the models with RoPE that had an MLP or three layers; so"
        " the zoo does not tell how often training ends there."
    )


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _models_table(models: dict[str, Any]) -> str:
    rows = [
        [
            name,
            str(entry["architecture"]["n_layers"]),
            entry["architecture"]["kind"],
            f"{entry['architecture']['parameters']:,}",
            str(entry["seed"]),
            str(entry["steps"]),
        ]
        for name, entry in models.items()
    ]
    return _table(["model", "layers", "parts", "parameters", "seed", "steps"], rows)


def _accuracy_table(models: dict[str, Any]) -> str:
    tasks = list(next(iter(models.values()))["performance"])
    rows = [
        [name, *(f"{100 * entry['performance'][task]['accuracy']:.1f}" for task in tasks)]
        for name, entry in models.items()
    ]
    chance = next(iter(models.values()))["performance"]
    rows.append(["chance", *(f"{100 * chance[task]['chance_accuracy']:.1f}" for task in tasks)])
    return _table(["model", *tasks], rows)


def _labels_table(models: dict[str, Any]) -> str:
    classes = [*LABELS.values(), "None"]
    counts = [
        [sum(head["label"] == one for head in entry["heads"]) for one in classes]
        for entry in models.values()
    ]
    rows = [[name, *map(str, count)] for name, count in zip(models, counts, strict=True)]
    rows.append(["all", *(str(sum(column)) for column in zip(*counts, strict=True))])
    return _table(["model", *classes], rows)


def _heads_table(name: str, entry: dict[str, Any]) -> str:
    rows = [
        [
            head["head"],
            head["label"],
            *(f"{value:.3f}" for value in head["attention"].values()),
            *(f"{value:.3f}" for value in head["accuracy_without"].values()),
        ]
        for head in entry["heads"]
    ]
    return _table([name, "label", *MEASURES, *(f"{task} without" for task in TASKS)], rows)
