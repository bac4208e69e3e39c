"""Head classes follow the rows of the table, whatever their order, and only on the right model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from skhead.datasets import load_head_classes, load_model_card
from skhead.exceptions import HeadTableError


def heads_table(n_layers: int, n_heads: int, d_model: int, d_head: int) -> pd.DataFrame:
    layer, head = np.divmod(np.arange(n_layers * n_heads), n_heads)
    return pd.DataFrame(
        {
            "source": "model",
            "layer": layer,
            "head": head,
            "kv_head": head,
            "n_layers": n_layers,
            "d_model": d_model,
            "d_head": d_head,
        },
        index=[f"L{i}H{j}" for i, j in zip(layer, head, strict=True)],
    )


@pytest.fixture
def gpt2() -> pd.DataFrame:
    return heads_table(12, 12, 768, 64)


@pytest.mark.parametrize(
    "name, counts",
    [
        (
            "wang2022",
            {
                "Backup Name Mover": 8,
                "Induction": 4,
                "S-Inhibition": 4,
                "Duplicate Token": 3,
                "Name Mover": 3,
                "Negative Name Mover": 2,
                "Previous Token": 2,
            },
        ),
        (
            "yamagiwa2026",
            {
                "Previous Token": 9,
                "Induction": 6,
                "Backup Name Mover": 5,
                "S-Inhibition": 2,
                "Name Mover": 2,
                "Negative Name Mover": 2,
                "Identity": 2,
                "Duplicate Token": 1,
            },
        ),
    ],
)
def test_sets_hold_the_published_heads(gpt2, name, counts):
    classes = load_head_classes(name, gpt2)
    assert classes.name == name
    assert classes.index.equals(gpt2.index)
    assert classes[classes != "None"].value_counts().to_dict() == counts
    assert (classes == "None").sum() == 144 - sum(counts.values())


def test_the_sets_are_not_merged(gpt2):
    wang, yamagiwa = (load_head_classes(name, gpt2) for name in ("wang2022", "yamagiwa2026"))
    assert (wang["L5H8"], yamagiwa["L5H8"]) == ("Induction", "None")
    assert (wang["L11H3"], yamagiwa["L11H3"]) == ("None", "Backup Name Mover")
    assert (wang["L4H7"], yamagiwa["L4H7"]) == ("None", "Identity")


def test_classes_follow_shuffled_subset_and_repeated_rows(gpt2):
    whole = load_head_classes("wang2022", gpt2)
    rows = np.random.default_rng(0).permutation(144)[:80]
    rows = np.concatenate([rows, rows[:5]])
    part = load_head_classes("wang2022", gpt2.iloc[rows])
    assert list(part) == list(whole.iloc[rows])
    assert list(part.index) == list(gpt2.index[rows])


def test_classes_do_not_depend_on_the_index_labels(gpt2):
    renamed = gpt2.set_axis([f"gpt2:{label}" for label in gpt2.index])
    classes = load_head_classes("wang2022", renamed)
    assert classes["gpt2:L9H9"] == "Name Mover"
    assert list(classes) == list(load_head_classes("wang2022", gpt2))


def test_bundled_model_has_the_labels_of_its_card():
    classes = load_head_classes("induction-2l", heads_table(2, 8, 128, 16))
    card = {head["head"]: head["label"] for head in load_model_card("skhead/induction-2l")["heads"]}
    assert classes.to_dict() == card
    assert {"Previous Token", "Induction"} <= set(classes)


def test_unknown_set_lists_the_known(gpt2):
    with pytest.raises(ValueError, match=r"'merged'; .*'wang2022', 'yamagiwa2026', 'induction-2l'"):
        load_head_classes("merged", gpt2)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 8, 128, 16), r"12 layers x 12 heads, d_model 768, .*; L0H0 has n_layers 2"),
        ((12, 12, 1024, 64), r"d_model 768, .*; L0H0 has d_model 1024"),
        ((12, 12, 768, 32), r"d_head 64; L0H0 has d_head 32"),
        ((12, 16, 768, 64), r"12 layers x 12 heads.*; L0H12 has head 12"),
    ],
)
def test_other_models_are_refused(shape, message):
    with pytest.raises(HeadTableError, match=message):
        load_head_classes("wang2022", heads_table(*shape))


def test_gpt2_is_not_the_bundled_model(gpt2):
    with pytest.raises(HeadTableError, match=r"2 layers x 8 heads, .*; L0H0 has n_layers 12"):
        load_head_classes("induction-2l", gpt2)


def test_tables_that_are_none_are_refused(gpt2):
    with pytest.raises(HeadTableError, match=r"load_head_classes\('wang2022'\).*got ndarray"):
        load_head_classes("wang2022", gpt2.to_numpy())
    with pytest.raises(HeadTableError, match="no column layer, d_head"):
        load_head_classes("wang2022", gpt2.drop(columns=["layer", "d_head"]))
    with pytest.raises(HeadTableError, match="is empty"):
        load_head_classes("wang2022", gpt2.iloc[:0])
