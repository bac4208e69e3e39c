"""The numbers of a report as plain Python values, the same for page and ``summary.json``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import skhead
from skhead._report.chance import CONSTANT, FDR, STANDS_OUT
from skhead._report.class_section import class_numbers
from skhead._report.comparison import Comparison, title_of
from skhead._report.data import Analysis, Cards, expected_of, scores_of
from skhead._report.induction import induction_numbers
from skhead._report.operations import operation_numbers
from skhead._report.text import json_value
from skhead.calibration import informativeness
from skhead.containers import Similarity, reference_law

__all__ = ["QUANTILES", "kernel_numbers", "summarize", "summarize_comparison"]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.97, 0.99)
_HUBS = 15


def summarize(analysis: Analysis) -> dict[str, Any]:
    """Everything that the page says in numbers.

    Parameters
    ----------
    analysis : Analysis

    Returns
    -------
    dict
        Ready for JSON: strings, finite floats, ints, bools, None, lists and dicts.
    """
    composition, operations = analysis.composition, analysis.operations
    induction = analysis.induction
    return {
        "versions": {"skhead": skhead.__version__, "torch": torch.__version__},
        "source": _source(analysis),
        "comparison": {
            "scope": analysis.scope,
            "rows": len(analysis.kernel.rows),
            "columns": len(analysis.kernel.columns),
            "k": analysis.options.k,
            "record": dict(analysis.kernel.record),
        },
        "classes": _classes(analysis),
        "projection_kernel": kernel_numbers(analysis.kernel, analysis.options.k),
        "nulls": _nulls(analysis),
        "composition": None if composition is None else _composition(analysis, composition),
        "hubs": _hubs(analysis),
        "within_head": _within_head(analysis),
        "cards": None if analysis.cards is None else _cards(analysis.cards),
        "operations": None if operations is None else operation_numbers(operations),
        "predicted_classes": class_numbers(analysis.guesses),
        "induction": None if induction is None else induction_numbers(induction),
        "top_pairs": _records(analysis.edges),
        "outstanding_pairs": _records(analysis.verdicts[STANDS_OUT].furthest),
    }


def summarize_comparison(found: Comparison) -> dict[str, Any]:
    """Everything that the page on two models says in numbers, but heads and edges one by one.

    Parameters
    ----------
    found : Comparison

    Returns
    -------
    dict
        Ready for JSON.
    """
    distances = [name for name in found.heads if str(name).startswith("distance_")]
    return {
        "versions": {"skhead": skhead.__version__, "torch": torch.__version__},
        "sides": {
            side: {
                "title": title_of(analysis),
                "source": _source(analysis),
                "record": dict(analysis.kernel.record),
                "classes": _classes(analysis),
                "predicted_classes": class_numbers(analysis.guesses)["zoo"],
                "roles": None if analysis.cards is None else _cards(analysis.cards)["rules"],
            }
            for side, analysis in zip("AB", found.sides, strict=True)
        },
        "null": {"chosen": found.sides[0].options.null, "fdr": FDR},
        "head_by_head": found.refusal is None,
        "refused": found.refusal,
        "closest_to_namesake": found.matched,
        "mean_distances": {
            str(name).removeprefix("distance_"): float(found.heads[name].mean())
            for name in distances
        },
        "pairs": _indexed(found.pairs),
        "edges": {str(k): int(n) for k, n in found.edges["change"].value_counts().items()}
        if not found.edges.empty
        else {},
        "overlaps": _records(found.overlaps),
        "scores": _indexed(found.scores),
        "spectra": _indexed(found.spectra),
    }


def _indexed(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {str(label): row for label, row in zip(table.index, _records(table), strict=True)}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(name): json_value(value) for name, value in row.items()}
        for row in table.to_dict("records")
    ]


def kernel_numbers(similarity: Similarity, k: int) -> dict[str, dict[str, Any]]:
    """Distribution of every pair kind, against random subspaces.

    Parameters
    ----------
    similarity : Similarity
    k : int
        Edges of each kind in the wiring graph, whose weakest is the ``cutoff``.

    Returns
    -------
    dict
        By pair kind. ``constant`` tells that the value is fixed by the ranks alone, ``above`` and
        ``below`` count pairs more than three standard deviations off the random mean.
    """
    divergence = _divergences(similarity)
    best = similarity.top_pairs(k)
    found = {}
    for pair in similarity.pairs:
        mean, sd = expected_of(similarity, pair)
        scores = scores_of(similarity, pair)
        numbers = _distribution(scores)
        null_mean, null_sd = reference_law(similarity, pair)
        constant = bool((sd <= CONSTANT * mean).all())
        off = scores - mean
        numbers |= {
            "cutoff": json_value(best.loc[best["pair"] == pair, "score"].min()),
            "null_mean": json_value(null_mean),
            "null_sd": json_value(null_sd),
            "constant": constant,
            "above": 0 if constant else int((off > 3 * sd).sum()),
            "below": 0 if constant else int((off < -3 * sd).sum()),
            "informativeness": None if constant else divergence.get(pair),
        }
        found[pair] = numbers
    return found


def _distribution(scores: NDArray[np.float32]) -> dict[str, Any]:
    values = scores.astype(np.float64)
    quantiles = np.quantile(values, QUANTILES)
    return {
        "pairs": int(values.size),
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if values.size > 1 else None,
        "min": float(values.min()),
        "max": float(values.max()),
        "quantiles": {f"{q:g}": float(x) for q, x in zip(QUANTILES, quantiles, strict=True)},
    }


def _divergences(similarity: Similarity) -> dict[str, float | None]:
    """Informativeness of the kinds in which one reference serves all pairs; None where infinite."""
    one_rank = all(
        len(np.unique(ranks[:, p])) == 1
        for ranks in (similarity.row_ranks, similarity.column_ranks)
        for p in range(len(similarity.pairs))
    )
    if not one_rank or not (similarity.null_sd > CONSTANT * similarity.null_mean).all():
        return {}
    return {str(pair): json_value(value) for pair, value in informativeness(similarity).items()}


def _nulls(analysis: Analysis) -> dict[str, Any]:
    """What each null law calls; ``chosen`` names the one that the edges are held against."""
    return {
        "chosen": analysis.options.null,
        "fdr": FDR,
        "laws": {
            name: {
                "refused": verdict.refusal,
                "calls": {
                    pair: {key: json_value(value) for key, value in asdict(calls).items()}
                    for pair, calls in verdict.calls.items()
                },
            }
            for name, verdict in analysis.verdicts.items()
        },
    }


def _composition(analysis: Analysis, composition: Similarity) -> dict[str, dict[str, Any]]:
    kernel, k = analysis.kernel, analysis.options.k
    best = {
        name: similarity.top_pairs(k)
        for name, similarity in (("pk", kernel), ("composition", composition))
    }
    found = {}
    for pair in composition.pairs:
        scores = scores_of(composition, pair)
        chance = float(np.broadcast_to(composition.null_mean, composition.values.shape)[0, 0, 0])
        edges = {
            name: set(zip(rows["source"], rows["target"], strict=True))
            for name, rows in ((name, t[t["pair"] == pair]) for name, t in best.items())
        }
        top = best["composition"][best["composition"]["pair"] == pair]
        found[pair] = _distribution(scores) | {
            "chance": chance,
            "above_chance": int((scores > chance).sum()),
            "shared_top": len(edges["pk"] & edges["composition"]),
            "top": len(edges["composition"]),
            "top_pairs": [
                {name: json_value(edge[name]) for name in ("rank", "source", "target", "score")}
                for edge in top.to_dict("records")
            ],
        }
    return found


def _source(analysis: Analysis) -> dict[str, Any]:
    info, subspaces = analysis.info, analysis.subspaces
    fields = (
        "name", "source", "family", "part", "revision", "dtype", "n_layers", "n_heads",
        "n_kv_heads", "d_model", "d_head", "norm", "norm_placement", "shared_layers",
    )  # fmt: skip
    ranks = {
        role: [int(subspaces.ranks(role).min()), int(subspaces.ranks(role).max())]
        for role in subspaces.roles
    }
    return {name: getattr(info, name) for name in fields} | {
        "heads": analysis.n_heads,
        "layers_with_heads": sorted({int(layer) for layer in analysis.heads["layer"]}),
        "numerical_ranks": ranks,
        "distinct_matrices": {role: len(subspaces.role(role).ranks) for role in subspaces.roles},
    }


def _classes(analysis: Analysis) -> dict[str, Any] | None:
    classes = analysis.classes
    if classes is None:
        return None
    active = analysis.table["degree"] > 0
    labelled = analysis.table["class"] != "None"
    counts = classes.values[classes.values != "None"].value_counts()
    return {
        "set": classes.name,
        "origin": classes.origin,
        "automatic": classes.automatic,
        "labelled_heads": int(labelled.sum()),
        "nodes": int(active.sum()),
        "in_class": int((active & labelled).sum()),
        "counts": {name: int(counts[name]) for name in sorted(counts.index)},
    }


def _hubs(analysis: Analysis) -> list[dict[str, Any]]:
    table = analysis.table[analysis.table["degree"] > 0]
    order = ["degree", "layer", "head"]
    table = table.sort_values(order, ascending=[False, True, True], kind="stable").head(_HUBS)
    return _labelled(table)


def _within_head(analysis: Analysis) -> dict[str, Any] | None:
    """Heads that write back most of what they read, and how strongly with which sign."""
    if not analysis.within_head:
        return None
    table = analysis.table
    if analysis.scope == "shared":
        table = table[table["layer"] == table["layer"].min()]
    ranks = np.minimum(table["rank_V"], table["rank_O"])
    expected = table["rank_V"] * table["rank_O"] / analysis.info.d_model
    columns = table[["pk_vo", "identity_signed"]].assign(expected=expected, largest=ranks)
    top = columns.sort_values("pk_vo", ascending=False, kind="stable").head(5)
    return {
        "mean_pk_vo": float(table["pk_vo"].mean()),
        "constant": bool((table[["rank_V", "rank_O"]] == analysis.info.d_model).all(axis=None)),
        "top": _labelled(top),
    }


def _cards(cards: Cards) -> dict[str, Any]:
    """Heads that every rule holds of, and scores that are missing with the reason."""
    return {
        "heads": list(cards.labels),
        "missing": dict(cards.scores.missing),
        "rules": {
            rule.key: {
                "words": rule.words,
                "thresholds": {c.score: c.threshold for c in rule.conditions},
                "heads": [label for label, held in cards.verdicts.items() if rule in held],
            }
            for rule in cards.rules
        },
        "tokens": cards.tokens.refusal,
    }


def _labelled(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table of heads, each with its label."""
    return [
        {"label": str(label)} | {str(name): json_value(value) for name, value in row.items()}
        for label, row in zip(table.index, table.to_dict("records"), strict=True)
    ]
