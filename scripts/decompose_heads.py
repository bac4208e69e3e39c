"""Decompose the query-key space of heads of a language model, and intervene on what was found.

    python scripts/decompose_heads.py MODEL --experiment category --chat --out results

``MODEL`` is a directory in Hugging Face layout with its tokenizer. Prompts are made for its
tokenizer, the queries and keys of the heads are collected while the model reads them, and
``skhead.ContrastiveQKDecomposer`` contrasts pairs that agree with pairs that differ:

- ``category``: lists of words with a question for those of one category, a subspace per category;
- ``order``: objects in boxes, the place of the box that is asked for among all;
- ``lexical``: objects in boxes, prompts about used objects against those about unused ones.

Heads are by default those of Llama-3.1-8B-Instruct that Lee, Belinkov, Viegas and Wattenberg
(arXiv:2602.04752) show. Printed for every head are ranks, the rank of all features together, the
area under the ROC curve on prompts that were not fitted, and what the model does when two keys
trade places in the subspace, on lists with a single right word or boxes with an object that was not
fitted. ``--out`` receives the same as ``summary.json``, ``features.csv`` and ``interventions.csv``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import skhead
from skhead.datasets import load_prompt_words, make_binding_prompts, make_category_prompts
from skhead.weights.running import open_bridge

HEADS = {
    "category": "L16H19,L20H26,L20H14",
    "order": "L16H1,L16H19,L17H24",
    "lexical": "L16H1,L16H19,L17H24",
}
N_PROMPTS = {"category": 2000, "order": 3000, "lexical": 3000}
N_BOXES = 9
RANK = 0.99
#: Columns of the table of interventions that are printed; the file has all of them.
SHOWN = [
    "rank", "attention_original_before", "attention_original",
    "attention_target_before", "attention_target", "shift", "flip_rate",
]  # fmt: skip


class Experiment:
    """Makes the prompts of one experiment, and pairs of what heads do on them.

    Parameters
    ----------
    name : {"category", "order", "lexical"}
    tokenizer : tokenizer, path or callable
    settings : dict
        Further arguments of the function that makes the prompts.
    """

    def __init__(self, name: str, tokenizer: Any, settings: dict[str, Any]) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._settings = settings

    def contrasted(self, n_prompts: int, seed: int) -> list[Any]:
        """Prompts to fit or score; for "lexical" two sets, of which the second is the contrast."""
        if self.name == "category":
            return [self._categories(n_prompts, seed)]
        made = self._boxes(n_prompts, seed, contrast=self.name)
        return list(made) if self.name == "lexical" else [made]

    def intervened(self, n_prompts: int, seed: int) -> Any:
        """Prompts with one right key each, on which no decomposer is fitted."""
        if self.name == "category":
            return self._categories(n_prompts, seed, n_asked=1)
        unused = load_prompt_words()["objects"][N_BOXES]
        return self._boxes(n_prompts, seed, queried=unused)

    def collect(
        self, model: Any, prompts: Sequence[Any], heads: Sequence[str]
    ) -> dict[str, skhead.QKPairs]:
        """Pairs of every head."""
        found = [skhead.collect_qk(model, part, heads) for part in prompts]
        if self.name != "lexical":
            return found[0]
        used, unused = found
        return {head: self._against(used[head], unused[head]) for head in used}

    def _against(self, used: skhead.QKPairs, unused: skhead.QKPairs) -> skhead.QKPairs:
        rows = [array for part in (used, unused) for array in (part.queries, part.keys)]
        return skhead.QKPairs.from_pairs(*rows, feature=self.name, head=used.head, scale=used.scale)

    def _categories(self, n_prompts: int, seed: int, **changes: Any) -> Any:
        settings = {**self._settings, **changes}
        return make_category_prompts(self._tokenizer, n_prompts, random_state=seed, **settings)

    def _boxes(self, n_prompts: int, seed: int, **changes: Any) -> Any:
        settings = {**self._settings, "n_items": N_BOXES, **changes}
        return make_binding_prompts(self._tokenizer, n_prompts, random_state=seed, **settings)


def decompose(
    model: Any,
    experiment: Experiment,
    heads: Sequence[str],
    *,
    n_prompts: int,
    n_held_out: int,
    n_interventions: int,
    pair_weighting: str = "pair",
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Features of heads, interventions on them, and a summary by head.

    Returns
    -------
    features : DataFrame
        A row for each feature of each head, as ``ContrastiveQKDecomposer.summary`` gives it.
    interventions : DataFrame
        What ``intervene_on_model`` measures, with the head; empty without interventions.
    summary : dict
        By head ranks, rank of all features together, and area under the ROC curve; or the error
        that says why it has no contrast, such as a head of layer 0 that knows nothing of context.
    """
    bridge = open_bridge(model)
    fitted = experiment.collect(bridge, experiment.contrasted(n_prompts, seed), heads)
    held_out = experiment.collect(bridge, experiment.contrasted(n_held_out, seed + 1), heads)
    swapped = experiment.intervened(n_interventions, seed + 2) if n_interventions else None
    features, interventions, summary = {}, {}, {}
    for head, pairs in fitted.items():
        decomposer = skhead.ContrastiveQKDecomposer(
            rank=RANK,
            pair_weighting=pair_weighting,
            per_class=experiment.name == "category",
            random_state=seed,
        )
        try:
            decomposer.fit(pairs)
        except skhead.exceptions.NoContrastError as error:
            summary[head] = {"error": str(error)}
            continue
        features[head] = decomposer.summary()
        summary[head] = {
            "rank": {name: int(rank) for name, rank in features[head]["rank"].items()},
            "rank_of_union": len(decomposer.union_key_components_),
            "d_head": decomposer.d_head_,
            "auc": decomposer.score(held_out[head]),
            "auc_of_logits": area_of_logits(held_out[head], decomposer.per_class),
        }
        if swapped is not None:
            interventions[head] = skhead.intervene_on_model(
                bridge,
                swapped,
                decomposer,
                original="agreeing",
                conditions=["none", "all"],
                random_state=seed,
            )
    tables = [
        pd.concat(found, names=["head"]) if found else pd.DataFrame()
        for found in (features, interventions)
    ]
    return tables[0], tables[1], summary


def area_of_logits(pairs: skhead.QKPairs, per_class: bool) -> float:
    """The area under the ROC curve that attention scores reach without any decomposition."""
    from sklearn.metrics import roc_auc_score

    kinds, logits = pairs.agreement[:, 0], pairs.logits()
    asked = pairs.query_labels[pairs.query_index, 0]
    groups = [asked == label for label in pd.unique(asked)] if per_class else [kinds >= 0]
    areas = [roc_auc_score(kinds[rows], logits[rows]) for rows in groups]
    return float(sum(areas) / len(areas))


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a directory or hub name, with the special tokens that it adds by itself."""
    directory = Path(name)
    file = directory / "tokenizer.json"
    if not directory.is_dir() or (directory / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    if not file.is_file():
        return name
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def print_tables(
    features: pd.DataFrame, interventions: pd.DataFrame, summary: dict[str, Any]
) -> None:
    """Print what was found, head by head."""
    pd.set_option("display.width", 200, "display.max_columns", None)
    for head, found in summary.items():
        if "error" in found:
            print(f"{head}: {found['error']}\n")
            continue
        print(f"{head}: rank of all features {found['rank_of_union']} of d_head {found['d_head']}")
        print(f"AUC on held-out prompts {found['auc']:.3f}, of all logits", end=" ")
        print(f"{found['auc_of_logits']:.3f}")
        print(features.loc[head].round(3).to_string())
        if len(interventions):
            print(interventions.loc[head, SHOWN].round(3).to_string())
        print()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = {"bos_token": "auto" if options.bos is None else options.bos}
    if options.template is not None:
        settings["template"] = _text(options.template)
    if options.chat:
        if options.experiment != "category":
            parser.error("--chat is for the experiment category: boxes end in front of a letter")
        settings["chat"] = True
    n_prompts = options.n_prompts
    if n_prompts is None:
        n_prompts = N_PROMPTS[options.experiment]
    n_held_out = options.n_held_out
    if n_held_out is None:
        n_held_out = max(n_prompts // 5, 1)
    heads = (options.heads or HEADS[options.experiment]).split(",")
    tokenizer = open_tokenizer(options.tokenizer or options.model)
    features, interventions, summary = decompose(
        options.model,
        Experiment(options.experiment, tokenizer, settings),
        heads,
        n_prompts=n_prompts,
        n_held_out=n_held_out,
        n_interventions=options.n_interventions,
        pair_weighting=options.pair_weighting,
        seed=options.seed,
    )
    print_tables(features, interventions, summary)
    if options.out is not None:
        run = {**vars(options), "out": str(options.out), "n_prompts": n_prompts}
        run |= {"n_held_out": n_held_out, "heads": heads}
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"run": run, "heads": summary}, indent=2)
        (options.out / "summary.json").write_text(text + "\n", encoding="utf-8")
        features.to_csv(options.out / "features.csv")
        if len(interventions):
            interventions.to_csv(options.out / "interventions.csv")
    return 0


def _text(template: str) -> str:
    """A template as such, or what the file of that name holds."""
    path = Path(template)
    named = "{" not in template
    return path.read_text(encoding="utf-8").rstrip("\n") if named else template


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="directory of a model")
    parser.add_argument("--experiment", choices=list(HEADS), required=True)
    parser.add_argument("--heads", help="labels separated by commas, as L16H19,L20H26")
    parser.add_argument("--n-prompts", type=int, help="prompts to fit (2000, or 3000 of boxes)")
    parser.add_argument("--n-held-out", type=int, help="prompts to score; a fifth by default")
    parser.add_argument(
        "--n-interventions", type=int, default=1000, help="prompts to intervene on; 0 for none"
    )
    parser.add_argument("--tokenizer", help="directory of the tokenizer, if not the model's")
    parser.add_argument("--template", help="template of the prompts, or a file that holds one")
    parser.add_argument("--chat", action="store_true", help="use the tokenizer's chat template")
    parser.add_argument("--bos", type=int, help="token id in front of every prompt")
    parser.add_argument(
        "--pair-weighting", choices=["pair", "query", "released"], default="pair",
        help="what counts alike; released as in the code published with the paper",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
