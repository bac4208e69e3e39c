"""Score operations from parameters and in action, beside the figures published with MAPS.

    python scripts/reproduce_maps.py DIRECTORY --model gpt2-xl --operations MAPS --out table.csv

``DIRECTORY`` is a model in Hugging Face layout with its tokenizer (``openai-community/gpt2-xl``,
``EleutherAI/pythia-6.9b``, ...), ``MAPS`` a checkout of github.com/amitelhelo/MAPS; without
``--operations`` the operations of the package are used, whose word lists are others. Every
operation is read from the weights of every head, then the model runs on the prompts of the
published runs, and both are compared. With ``--model`` the published figures stand beside. With
``--prompts FILE`` (a JSON object with a list of prompts by operation, such as ``{"capital":
["The capital of <X> is"]}``) the heads of these operations are also taken out one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import skhead
from skhead import ablate, compare_scores, rank_heads
from skhead.datasets import filter_operations, load_operations
from skhead.dynamics import TEMPLATES, dynamic_scores
from skhead.operations import OperationMapper
from skhead.weights.running import open_bridge

PUBLISHED = Path(__file__).resolve().parents[1] / "tests" / "data" / "maps_published.json"
COPYING = "copying"
N_FIRST = 6
FDR = 0.01
#: Column of the table -> where its published figure stands.
FIGURES = {
    "n_pairs": ("n_pairs",),
    "max": ("max_phi",),
    "r_without": ("r_without_context",),
    "r_with": ("r_with_context",),
    "-max": ("suppression", "max_phi"),
    "-r_without": ("suppression", "r_without_context"),
    "-r_with": ("suppression", "r_with_context"),
    "n_heads": ("n_heads_above_zero",),
    "first_heads": ("first_heads",),
}


def reproduce(
    source: Any,
    operations: Mapping[str, Any],
    tokenizer: Any,
    *,
    templates: Sequence[Any] | None = None,
    k: int = 10,
    k_copying: int = 1,
    min_pairs: int = 30,
    leading_space: bool = True,
    bos_token: int | str | None = "auto",
    prompts: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Static scores, dynamic scores and their agreement, for every operation that is left.

    Returns
    -------
    table : DataFrame
        One row per operation: number of pairs, highest scores, correlations, heads.
    curves : DataFrame
        What `skhead.ablation.ablate` measures for the operations in `prompts`; empty without them.
    """
    kept = filter_operations(
        operations, tokenizer, leading_space=leading_space, min_pairs=min_pairs
    )
    if not kept.operations:
        raise SystemExit(
            f"no operation keeps {min_pairs} pairs of single tokens:\n{kept.counts.to_string()}"
        )
    mapper = OperationMapper(kept.token_ids, k=k, copying_k=k_copying, min_pairs=1)
    mapper.fit(skhead.load_heads(source))
    static = mapper.scores_
    bridge = open_bridge(source)
    rows, curves = {}, []
    for name, pairs in kept.operations.items():
        dynamic = dynamic_scores(
            bridge,
            {name: pairs},
            templates,
            tokenizer,
            k=k_of(name, k, k_copying),
            leading_space=leading_space,
            bos_token=bos_token,
        )
        agreement = compare_scores(static[[name, f"-{name}"]], dynamic)
        rows[name] = _row(name, mapper, agreement)
        ranked = rank_heads(static[name], n=limit)
        if ranked and name in (prompts or {}):
            settings = {"leading_space": leading_space, "bos_token": bos_token}
            task = ({name: pairs}, prompts[name], tokenizer)
            curves.append(ablate(bridge, ranked, *task, **settings))
        print(f"{name}: {len(pairs)} pairs", file=sys.stderr, flush=True)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("operation")
    return table, pd.concat(curves) if curves else pd.DataFrame()


def k_of(name: str, k: int, k_copying: int) -> int:
    """How many logits count for an operation; fewer for those that copy."""
    return k_copying if COPYING in name else k


def _row(name: str, mapper: OperationMapper, agreement: pd.DataFrame) -> dict[str, Any]:
    static = mapper.scores_
    row: dict[str, Any] = {"n_pairs": mapper.n_pairs_[name]}
    for sign in ("", "-"):
        own = agreement.loc[sign + name]
        row[f"{sign}max"] = static[sign + name].max()
        row[f"{sign}lift"] = mapper.lift_[sign + name].max()
        for context in ("without", "with"):
            row[f"{sign}r_{context}"] = own.loc[context, "pearson"]
            row[f"{sign}rho_{context}"] = own.loc[context, "spearman"]
            row[f"{sign}overlap_{context}"] = own.loc[context, "overlap"]
    row["n_heads"] = int((static[name] > 0).sum())
    row["n_significant"] = int((mapper.q_[name] < FDR).sum())
    row["first_heads"] = " ".join(rank_heads(static[name], n=N_FIRST))
    return row


def beside_published(table: pd.DataFrame, model: str, path: Path = PUBLISHED) -> pd.DataFrame:
    """Figures of a table next to those that were published for a model.

    An operation that was not published under its name, or a figure that was not, is left empty.
    """
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    if model not in models:
        raise SystemExit(f"no figures were published for {model!r}, but for {', '.join(models)}")
    columns: dict[tuple[str, str], list[Any]] = {}
    for figure, keys in FIGURES.items():
        columns[figure, "here"] = table[figure].tolist()
        columns[figure, "published"] = [_figure(models[model].get(n), keys) for n in table.index]
    return pd.DataFrame(columns, index=table.index)


def _figure(entry: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        entry = None if entry is None else entry.get(key)
    return " ".join(entry) if isinstance(entry, list) else entry


def ablation_summary(curves: pd.DataFrame) -> pd.DataFrame:
    """Accuracy before and after, at the first number of heads that leaves none right, or at all."""
    rows = {}
    for name, curve in curves.groupby("operation", sort=False):
        own = curve[curve["kind"] == "operation"].set_index("n_removed")["accuracy"]
        gone = own.index[own == 0]
        at = int(gone.min()) if len(gone) else int(own.index.max())
        others = curve[(curve["kind"] == "random") & (curve["n_removed"] == at)]["accuracy"]
        rows[name] = {
            "heads removed": at,
            "base": own.loc[0],
            "after": own.loc[at],
            "random": others.mean() if len(others) else np.nan,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("operation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = _parser().parse_args(arguments)
    tokenizer = options.tokenizer or options.source
    prompts = None
    if options.prompts is not None:
        prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
    table, curves = reproduce(
        options.source,
        load_operations(options.operations, names=options.names),
        tokenizer,
        templates=options.template or TEMPLATES,
        k=options.k,
        k_copying=options.k_copying,
        min_pairs=options.min_pairs,
        leading_space=not options.no_leading_space,
        bos_token=options.bos,
        prompts=prompts,
        limit=options.limit,
    )
    if options.model is not None:
        table = beside_published(table, options.model)
    pd.set_option("display.width", 200, "display.max_columns", None, "display.max_colwidth", 50)
    print(table.round(2).to_string())
    flat = table.copy()
    flat.columns = [c if isinstance(c, str) else " ".join(c) for c in flat.columns]
    flat.to_csv(options.out)
    if len(curves):
        print(ablation_summary(curves).round(2).to_string())
        curves.to_csv(options.out.with_suffix(".ablation.csv"), index=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="directory of a model, or a bundled model")
    parser.add_argument("--operations", type=Path, help="MAPS checkout, directory or CSV file")
    parser.add_argument("--names", nargs="+", help="which operations; all by default")
    parser.add_argument("--tokenizer", help="directory of the tokenizer, if not the model's")
    parser.add_argument("--model", help="name under which figures were published, as gpt2-xl")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--template", action="append", help="prompt with <X>; may come repeatedly")
    parser.add_argument("--prompts", type=Path, help="JSON file of prompts to take heads out on")
    parser.add_argument("--limit", type=int, help="heads to take out at most")
    parser.add_argument("--k", type=int, default=10, help="logits that count (25 for Llama 3)")
    parser.add_argument("--k-copying", type=int, default=1, help="for copying (3 for Llama 3)")
    parser.add_argument("--min-pairs", type=int, default=30, help="pairs an operation must keep")
    parser.add_argument("--no-leading-space", action="store_true", help="words without a space")
    parser.add_argument("--bos", type=int, help="token id in front of every prompt")
    return parser


if __name__ == "__main__":
    sys.exit(main())
