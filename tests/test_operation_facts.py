"""What the guide says of operations: in the zoo, in lists of words, in a trained language model."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import skhead
from skhead.datasets import filter_operations, load_operations

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "guide" / "operations.rst").read_text(encoding="utf-8")
PUBLISHED = json.loads(
    (ROOT / "tests" / "data" / "maps_published.json").read_text(encoding="utf-8")
)["models"]
WORDS = range(64)
COPYING = [(word, word) for word in WORDS]
TEMPLATES = ["Once upon a time there was a <X>", "Tim said that <X>", "They saw the <X>"]
#: As rounded to two decimals, and for other versions of the libraries.
TOLERANCE = 0.0151


def rows_of_the_page(header):
    """Cells of the table of the page whose first line of text starts so, by first cell."""
    after = PAGE[PAGE.index(f"\n{header} ") :].split("\n")[3:]
    rows = after[: next(place for place, row in enumerate(after) if row.startswith("==="))]
    cells = [re.split(r"\s{2,}", row.strip()) for row in rows]
    return {first.strip("`"): rest for first, *rest in cells}


@pytest.fixture(scope="module")
def zoo():
    return skhead.datasets.load_head_zoo()


def score(heads, operations, **parameters):
    parameters = {"source_embedding": "raw", "k": 1} | parameters
    return skhead.OperationMapper(operations, **parameters).fit(heads)


def test_copying_finds_every_induction_head_and_two_others(zoo):
    mapper = score(zoo.heads, {"copying": COPYING})
    called = (mapper.scores_["copying"] >= 0.15) & (mapper.q_["copying"] <= 0.01)
    kind = zoo.target
    assert kind[called.to_numpy()].value_counts().to_dict() == {
        "Induction": 30,
        "Previous Token": 2,
    }
    assert (mapper.implementing()["operation"] == "copying").sum() == 32
    assert (kind == "Induction").sum() == 30


@pytest.mark.parametrize("seed", range(4))
def test_an_operation_by_lot_passes_the_threshold_and_is_never_called(zoo, seed):
    lots = np.random.default_rng(seed).choice([66, 67, 68], 64).tolist()
    mapper = score(zoo.heads, {"by_lot": list(zip(WORDS, lots, strict=True))})
    passing = mapper.scores_ >= 0.15
    assert passing.sum().sum() >= 10
    assert mapper.null_expectation_.to_numpy()[passing].mean() > 0.12
    assert mapper.lift_.max().max() < 0.15
    assert mapper.q_.min().min() > 0.2 and mapper.implementing().empty


def test_five_pairs_are_too_few_to_be_called():
    heads = skhead.load_heads("skhead/induction-2l")
    five = score(heads, {"copying": COPYING[:5]}, min_pairs=1)
    assert five.scores_.loc["L1H1", "copying"] == 1
    assert 10 ** -five.log10_p_.loc["L1H1", "copying"] == pytest.approx(120, rel=0.01)
    assert five.q_.size == 32 and five.implementing().empty
    all_words = score(heads, {"copying": COPYING}).implementing()
    assert "L1H1" in all_words["head"].to_numpy()


def test_source_vectors_decide_what_heads_behind_an_mlp_are_seen_to_copy(zoo):
    chosen = zoo.heads["source"].str.contains("mlp") & (zoo.target == "Induction").to_numpy()
    heads = zoo.heads[chosen]
    found = {
        kind: score(heads, {"copying": COPYING}, source_embedding=kind).scores_["copying"].mean()
        for kind in ("raw", "resid_post_mlp0", "mlp0")
    }
    assert len(heads) == 8
    assert found == pytest.approx(
        {"raw": 0.58, "resid_post_mlp0": 0.51, "mlp0": 0.23}, abs=TOLERANCE
    )


def test_copying_heads_of_every_zoo_model_stand_in_for_each_other(zoo):
    pytest.importorskip("transformer_lens")
    blocks = np.random.default_rng(0).permuted(np.tile(np.arange(64), (20, 1)), axis=1)[:, :20]
    prompts = [([*block, *block[:8]], block[8]) for block in blocks.tolist()]
    for source in zoo.heads["source"].unique():
        scores = score(skhead.load_heads(source), {"copying": COPYING}).scores_["copying"]
        ranked = [head for head in skhead.rank_heads(scores) if scores[head] >= 0.15]
        curve = skhead.ablate(
            source, ranked, prompts, [([64], [])], counts=[1, len(ranked)], n_random=2
        )
        own = curve[curve["kind"] == "operation"].set_index("n_removed")["accuracy"]
        assert len(ranked) >= 3 and (own.loc[[0, 1]] == 1).all()
        assert own.loc[len(ranked)] <= 0.1
        assert (curve.loc[curve["kind"] == "random", "accuracy"] > 0.95).all()


def test_table_of_operations_is_what_the_gpt2_tokenizer_leaves(gpt2_path):
    pytest.importorskip("tokenizers")
    found = filter_operations(load_operations(), gpt2_path)
    table = rows_of_the_page("operation                         pairs  kept")
    assert list(table) == found.counts.index.tolist()
    constant = {}
    for name, (n_pairs, n_kept, *rest) in table.items():
        counts = found.counts.loc[name]
        assert (int(n_pairs), int(n_kept)) == (counts["n_pairs"], counts["n_kept"])
        if not counts["used"]:
            assert rest == ["too few"]
            continue
        frequent = Counter(found.token_ids[name][:, 1].tolist()).most_common(10)
        constant[name] = sum(count for _, count in frequent) / counts["n_kept"]
        assert int(rest[0]) == counts["n_targets"]
        assert float(rest[1]) == pytest.approx(constant[name], abs=0.0051)
    assert len(constant) == 18 and sum(value >= 0.15 for value in constant.values()) == 9


@pytest.fixture(scope="module")
def stories(models_dir):
    """Static scores of stories260k at the operations that its vocabulary holds, and its encoder."""
    pytest.importorskip("transformer_lens")
    from test_dynamics import stories_encoder

    path = models_dir / "stories260k"
    encode, texts = stories_encoder(path)
    known = set(texts)
    words = [text[1:] for text in texts if text[:1] == " " and text[1:].isalpha() and text[2:]]
    letters = [c for c in "abcdefghijklmnopqrstuvwxyz" if {f" {c}", f" {c.upper()}"} <= known]
    operations = {
        "word_copying": [(word, word) for word in words],
        "word_first_letter": [(word, word[0]) for word in words if f" {word[0]}" in known],
        "letter_to_capital": [(letter, letter.upper()) for letter in letters],
    }
    mapper = skhead.OperationMapper(operations, encode, copying_k=10, min_pairs=1)
    return path, operations, encode, mapper.fit(skhead.load_heads(path))


@pytest.mark.slow
def test_static_and_dynamic_scores_of_stories260k(stories):
    path, operations, encode, mapper = stories
    dynamic = skhead.dynamic_scores(path, operations, TEMPLATES, encode, bos_token=1)
    found = skhead.compare_scores(mapper.scores_, dynamic)
    table = rows_of_the_page("operation              pairs  best score")
    assert list(table) == list(operations)
    for name, (n_pairs, *figures) in table.items():
        best = mapper.scores_[name].idxmax()
        own = found.loc[name]
        expected = [
            mapper.scores_.loc[best, name],
            mapper.lift_.loc[best, name],
            own.loc["without", "pearson"],
            own.loc["with", "pearson"],
            own.loc["without", "overlap"],
            own.loc["with", "overlap"],
        ]
        assert int(n_pairs) == mapper.n_pairs_[name]
        assert [float(figure) for figure in figures] == pytest.approx(expected, abs=TOLERANCE)
    assert (found["chance"] == 0.25).all()


@pytest.mark.slow
def test_templates_decide_what_is_left_with_context(stories):
    path, operations, encode, mapper = stories
    asked = {"letter_to_capital": operations["letter_to_capital"]}
    dynamic = skhead.dynamic_scores(path, asked, None, encode, bos_token=1)
    within = skhead.compare_scores(mapper.scores_, dynamic).loc[("letter_to_capital", "with")]
    assert within["pearson"] == pytest.approx(0.08, abs=TOLERANCE) and within["n_templates"] == 4


@pytest.mark.slow
def test_one_score_of_stories260k_is_called(stories):
    mapper = stories[3]
    called = mapper.implementing()
    assert called[["head", "operation"]].to_numpy().tolist() == [["L4H4", "word_copying"]]
    assert mapper.q_.size == 240
    capitals = mapper.scores_["letter_to_capital"]
    assert capitals.max() == 4 / 7 and mapper.q_.loc[capitals.idxmax(), "letter_to_capital"] > 0.5


def test_commands_of_the_page_are_those_of_the_script():
    parser = runpy.run_path(str(ROOT / "scripts" / "reproduce_maps.py"))["_parser"]()
    commands = re.findall(r"^   python scripts/reproduce_maps\.py (.+)$", PAGE, flags=re.MULTILINE)
    models = [parser.parse_args(shlex.split(command)).model for command in commands]
    assert models == ["gpt2-xl", "EleutherAI/pythia-6.9b"]
    assert set(models) < set(PUBLISHED)


def test_published_correlations_are_summed_up_as_they_are():
    medians = pd.DataFrame(
        {
            context: {
                model: np.nanmedian([row[f"r_{context}_context"] for row in operations.values()])
                for model, operations in PUBLISHED.items()
            }
            for context in ("without", "with")
        }
    )
    assert len(medians) == 5
    assert medians.agg(["min", "max"]).to_numpy() == pytest.approx(
        np.array([[0.82, 0.68], [0.94, 0.80]]), abs=0.0051
    )
