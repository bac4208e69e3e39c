"""Induction pairs: planted ones, real ones, and those that only look like it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from toys import random_weights, registered

import skhead
from skhead.exceptions import DegenerateHeadError, HeadTableError, UnsupportedLayoutError
from skhead.induction import induction_pairs
from skhead.linalg.circuits import composed_matching
from skhead.weights.tokens import read_token_space

SIZE = 8


def random_rotation(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def planted(scramble=False, shift=1, copy=1.0):
    """Two layers of two heads; L0H1 and L1H0 carry out induction unless something is spoilt.

    The stream holds tokens, a slot for previous tokens, and positions, side by side.
    """
    turn = random_rotation(3 * SIZE, 0)
    token, slot, place = turn[:, :SIZE], turn[:, SIZE : 2 * SIZE], turn[:, 2 * SIZE :]
    tensors = random_weights(n_layers=2, n_heads=2, d_model=3 * SIZE, d_head=SIZE)
    later = torch.eye(SIZE).roll(shift, dims=1)
    tensors["blocks.0.attn.W_Q"][1] = 20 * place
    tensors["blocks.0.attn.W_K"][1] = place @ later
    tensors["blocks.0.attn.W_V"][1] = token @ (
        random_rotation(SIZE, 1) if scramble else torch.eye(SIZE)
    )
    tensors["blocks.0.attn.W_O"][1] = slot.T
    tensors["blocks.1.attn.W_Q"][0] = token
    tensors["blocks.1.attn.W_K"][0] = slot
    tensors["blocks.1.attn.W_V"][0] = token
    tensors["blocks.1.attn.W_O"][0] = copy * token.T
    tensors["embed.W_E"] = token.T.contiguous()
    tensors["unembed.W_U"] = token.contiguous()
    tensors["pos_embed.W_pos"] = place.T.contiguous()
    return tensors


def called(pairs):
    chosen = pairs[pairs["is_induction"]]
    return list(zip(chosen["previous_head"], chosen["induction_head"], strict=True))


def test_a_planted_pair_is_found():
    with registered(planted()) as heads:
        pairs = induction_pairs(heads)
    assert called(pairs) == [("L0H1", "L1H0")]
    best = pairs.iloc[0]
    assert best["matching"] == pytest.approx(1, abs=1e-5)
    assert best["copying"] == pytest.approx(1, abs=1e-5)
    assert best["previous_token"] > 0.8
    assert best["score"] == min(best[["previous_token", "matching", "copying"]])
    assert best["matching_z"] == pytest.approx(SIZE, rel=0.1)


@pytest.mark.parametrize("spoilt", [{"scramble": True}, {"shift": 2}, {"copy": -1.0}])
def test_a_pair_with_one_part_spoilt_is_not_called(spoilt):
    with registered(planted(**spoilt)) as heads:
        assert called(induction_pairs(heads)) == []


def test_frobenius_composition_cannot_tell_a_scrambled_pair():
    ratios = []
    for scramble in (False, True):
        with registered(planted(scramble=scramble)) as heads:
            composition = skhead.CompositionScore(pairs=("OK",)).fit_transform(heads)
            ratios.append(composition.values[1, 2, 0])
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)


def test_alpha_bounds_the_calls_in_random_models():
    strict, lax = 0, 0
    for seed in range(20):
        tensors = random_weights(n_layers=3, n_heads=4, d_model=48, d_head=12, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("embed.W_E", (30, 48)), ("pos_embed.W_pos", (9, 48))):
            tensors[name] = torch.randn(*shape, generator=generator)
        tensors["unembed.W_U"] = tensors["embed.W_E"].T.contiguous()
        with registered(tensors) as heads:
            strict += len(called(induction_pairs(heads, min_score=0.0, alpha=0.05)))
            lax += len(called(induction_pairs(heads, min_score=0.0, alpha=0.99)))
    assert strict <= 3
    assert lax > strict


def test_rows_in_any_order_give_the_same_pairs():
    with registered(planted()) as heads:
        straight = induction_pairs(heads)
        mixed = induction_pairs(heads.iloc[[2, 1, 3, 0]])
    key = ["previous_head", "induction_head"]
    straight, mixed = (p.sort_values(key).reset_index(drop=True) for p in (straight, mixed))
    assert straight[key].equals(mixed[key])
    np.testing.assert_allclose(straight["score"], mixed["score"], rtol=1e-6)


def test_matching_equals_the_shared_function():
    heads = skhead.load_heads("skhead/induction-2l")
    pairs = induction_pairs(heads)
    embedding = read_token_space("skhead/induction-2l").embedding.double()
    centred = embedding - embedding.mean(0)
    first, second = heads[heads["layer"] == 0], heads[heads["layer"] == 1]
    later = [torch.from_numpy(skhead.load_weights(second, role)) for role in "QK"]
    earlier = [torch.from_numpy(skhead.load_weights(first, role)) for role in "VO"]
    expected = composed_matching(*later, *earlier, centred.T @ centred)
    for _, pair in pairs.iterrows():
        i = first.index.get_loc(pair["previous_head"])
        j = second.index.get_loc(pair["induction_head"])
        assert pair["matching"] == pytest.approx(float(expected[i, j]), abs=1e-5)


def test_k_composition_equals_the_estimator():
    heads = skhead.load_heads("skhead/induction-2l")
    pairs = induction_pairs(heads)
    composition = skhead.CompositionScore(pairs=("OK",)).fit_transform(heads).to_frame()
    expected = composition.set_index(["source", "target"])["score"]
    found = [expected[p, q] for p, q in zip(pairs.previous_head, pairs.induction_head, strict=True)]
    np.testing.assert_allclose(pairs["k_composition"], found, rtol=1e-5)


def test_bundled_model_has_the_pair_that_behaviour_shows():
    card = skhead.datasets.load_model_card("skhead/induction-2l")
    labelled = {head["head"]: head["label"] for head in card["heads"]}
    expected = [
        (first, second)
        for first, one in labelled.items()
        for second, other in labelled.items()
        if one == "Previous Token" and other == "Induction"
    ]
    heads = skhead.load_heads("skhead/induction-2l")
    for fold_norm in (False, True):
        assert called(induction_pairs(heads, fold_norm=fold_norm)) == expected == [("L0H0", "L1H1")]


def test_both_one_head_models_have_their_pair(models_dir):
    found = {}
    for name in ("loose", "perfect"):
        path = models_dir / "induction-1head" / f"{name}.safetensors"
        pairs = induction_pairs(skhead.load_heads(path))
        assert called(pairs) == [("L0H0", "L1H0")]
        found[name] = pairs.iloc[0]
    assert found["loose"]["k_ratio"] > 3
    assert found["perfect"]["k_composition"] == pytest.approx(0.06, abs=0.001)
    assert found["perfect"]["k_ratio"] < 0.5
    assert found["perfect"]["matching"] > 0.99
    assert found["perfect"]["matching_z"] > 15


def test_a_model_without_induction_has_no_pair(models_dir):
    """No head of this model attends to induction targets: at most 0.16 on repeated tokens."""
    heads = skhead.load_heads(models_dir / "stories260k")
    for fold_norm in (False, True):
        pairs = induction_pairs(heads, fold_norm=fold_norm, top=None)
        assert called(pairs) == []
        assert pairs["matching_z"].max() < 3
    assert pairs["matching"].max() > 0.9


def test_reading_layer_by_layer_changes_nothing(monkeypatch):
    heads = skhead.load_heads("skhead/induction-2l").sample(frac=1, random_state=0)
    expected = induction_pairs(heads, fold_norm=True)
    monkeypatch.setattr("skhead._inputs._HELD", 1)
    pd.testing.assert_frame_equal(induction_pairs(heads, fold_norm=True), expected)


def test_models_are_not_mixed():
    with registered(planted()) as one, registered(planted()) as other:
        both = induction_pairs(
            skhead.load_heads([*one["source"].unique(), *other["source"].unique()])
        )
    pairs = called(both)
    assert len(pairs) == 2
    assert all(first.split(":")[0] == second.split(":")[0] for first, second in pairs)


def test_a_model_without_embedding_is_refused(gpt2_path):
    with pytest.raises(UnsupportedLayoutError, match=r"induction_pairs: .*wte\.weight"):
        induction_pairs(skhead.load_heads(gpt2_path))


def test_a_stack_has_no_tokens():
    with pytest.raises(HeadTableError, match="needs the tokens of a model"):
        induction_pairs(np.random.default_rng(0).standard_normal((2, 4, 6, 2)))


def test_missing_positions_are_named():
    tensors = planted()
    del tensors["pos_embed.W_pos"]
    with registered(tensors) as heads, pytest.raises(UnsupportedLayoutError, match="positions"):
        induction_pairs(heads)


def test_a_zero_map_is_refused():
    tensors = planted()
    tensors["blocks.0.attn.W_V"][0] = 0
    with registered(tensors) as heads, pytest.raises(DegenerateHeadError, match="OV map of L0H0"):
        induction_pairs(heads)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"alpha": 1.5}, "alpha must lie between 0 and 1; got 1.5"),
        ({"min_score": "a"}, "min_score must be a finite number; got 'a'"),
        ({"top": 0}, "top must be an integer of at least 1; got 0"),
        ({"n_positions": 2}, "n_positions must be an integer of at least 3; got 2"),
    ],
)
def test_parameters_out_of_range(wrong, message):
    heads = skhead.load_heads("skhead/induction-2l")
    with pytest.raises(ValueError, match=message):
        induction_pairs(heads, **wrong)


def zoo_pairs(fold_norm):
    """Called pairs, and pairs of a previous-token and a later induction head by behaviour."""
    zoo = skhead.datasets.load_head_zoo()
    pairs = induction_pairs(zoo.heads, fold_norm=fold_norm)
    pairs = pairs[pairs["is_induction"]]
    found = set(zip(pairs["previous_head"], pairs["induction_head"], strict=True))
    table = zoo.heads.assign(
        label=skhead.weights.head_labels(zoo.heads), kind=zoo.target.to_numpy()
    )
    first = table[table["kind"] == "Previous Token"]
    second = table[table["kind"] == "Induction"]
    both = first.merge(second, on="source", suffixes=("_1", "_2"))
    both = both[both["layer_1"] < both["layer_2"]]
    return found, set(zip(both["label_1"], both["label_2"], strict=True))


@pytest.mark.parametrize("fold_norm", [False, True])
def test_attention_only_models_of_the_zoo_show_exactly_what_is_found(fold_norm):
    found, shown = (
        {pair for pair in pairs if "-attn-" in pair[0]} for pairs in zoo_pairs(fold_norm)
    )
    assert len(shown) >= 36
    assert found == shown


def test_precision_and_recall_over_the_whole_zoo():
    """Folded, exactly the pairs that behaviour shows; raw, one head too many.

    learned-mlp-2:L0H3 pays .37 of its attention to the previous token, under the threshold of .5.
    """
    found, shown = zoo_pairs(True)
    assert found == shown
    assert len(shown) == 72
    found, shown = zoo_pairs(False)
    assert shown < found
    assert {pair[0] for pair in found - shown} == {"learned-mlp-2:L0H3"}
    assert len(found) == 76


def test_folded_previous_token_score_is_close_to_behaviour():
    """First layers see tokens and positions alone, so that weights and biases tell everything."""
    zoo = skhead.datasets.load_head_zoo()
    pairs = induction_pairs(zoo.heads, fold_norm=True, top=None)
    scores = pairs.groupby("previous_head")["previous_token"].first().filter(like=":L0")
    labels = skhead.weights.head_labels(zoo.heads)
    behaviour = zoo.scores["previous_token"].set_axis(labels)[scores.index]
    assert (scores > 0.5).sum() >= 10
    assert (scores - behaviour).abs().max() < 0.08
