"""Virtual heads against products of whole maps, and against figures that are known."""

from __future__ import annotations

import pickle

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from toys import random_weights, registered, toy_heads

import skhead
from skhead.exceptions import DegenerateHeadError, HeadShapeError, UnsupportedLayoutError
from skhead.paths import virtual_heads

RNG = np.random.default_rng(0)


def with_tokens(n_vocab=15, d_model=24, seed=0, **shape):
    tensors = random_weights(d_model=d_model, seed=seed, **shape)
    generator = torch.Generator().manual_seed(seed + 1)
    tensors["embed.W_E"] = torch.randn(n_vocab, d_model, generator=generator)
    tensors["unembed.W_U"] = torch.randn(d_model, n_vocab, generator=generator)
    return tensors


def dense_maps(heads):
    v, o = (skhead.load_weights(heads, role).astype(float) for role in "VO")
    return dict(zip(heads.index, v @ o.transpose(0, 2, 1), strict=True))


def test_every_column_equals_the_dense_map():
    tensors = with_tokens()
    with registered(tensors) as heads:
        virtual = virtual_heads(heads, length=3, min_ratio=0.0)
        maps = dense_maps(heads)
    assert len(virtual) == 4 * 4 * 4
    embedding, unembedding = (
        tensors[name].double().numpy() for name in ("embed.W_E", "unembed.W_U")
    )
    for i, (_, row) in enumerate(virtual.table.iterrows()):
        path = [maps[row[f"head_{step}"]] for step in (1, 2, 3)]
        whole = np.linalg.multi_dot(path)
        size = np.linalg.norm(whole)
        assert row["composition"] == pytest.approx(
            size / np.prod([np.linalg.norm(one) for one in path]), rel=1e-5
        )
        assert row["ratio"] == pytest.approx(row["composition"] * 24, rel=1e-9)
        assert row["ov_norm"] == pytest.approx(size, rel=1e-5)
        assert row["identity_signed"] == pytest.approx(np.trace(whole) / (size * 5**0.5), abs=1e-5)
        singular = np.linalg.svd(whole, compute_uv=False)[:5]
        shares = singular / singular.sum()
        assert row["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        eigenvalues = np.linalg.eigvals(embedding @ whole @ unembedding)
        expected = eigenvalues.sum().real / np.abs(eigenvalues).sum()
        assert row["ov_copying"] == pytest.approx(expected, abs=1e-5)
        reads, writes = virtual.factors(i)
        np.testing.assert_allclose(reads @ writes.T, whole, atol=1e-4 * np.abs(whole).max())


def test_copying_scores_read_no_positions():
    tensors = with_tokens() | {"pos_embed.W_pos": torch.full((6, 24), torch.nan)}
    with registered(tensors) as heads:
        assert virtual_heads(heads).table["ov_copying"].notna().all()


def test_paths_rise_through_layers_and_are_ranked():
    with toy_heads(n_kv_heads=2) as heads:
        with pytest.warns(UserWarning, match="Copying scores are NaN") as caught:
            virtual = virtual_heads(heads)
        assert caught[0].filename == __file__
    table = virtual.table
    layers = heads["layer"].to_numpy()[virtual.steps]
    assert (np.diff(layers, axis=1) > 0).all()
    assert (np.diff(table["ratio"]) <= 0).all()
    assert (table["ratio"] >= 1).all()
    assert table["ov_copying"].isna().all()
    assert table.index[0] == f"{table['head_1'].iloc[0]}>{table['head_2'].iloc[0]}"


def test_min_ratio_and_top_cut_the_same_list():
    with registered(with_tokens()) as heads:
        everything = virtual_heads(heads, min_ratio=0.0).table
        strong = virtual_heads(heads, min_ratio=1.1).table
        few = virtual_heads(heads, top=5, min_ratio=0.0).table
    assert len(everything) == 3 * 16
    assert strong.index.tolist() == everything.index[everything["ratio"] >= 1.1].tolist()
    assert few.index.tolist() == everything.index[:5].tolist()


def test_the_virtual_heads_are_heads():
    with registered(with_tokens()) as heads:
        virtual = virtual_heads(heads, top=7)
        stack = virtual.stack()
        last = heads.iloc[virtual.steps[:, -1]]
        for place, role in ((0, "Q"), (1, "K"), (3, "O")):
            np.testing.assert_array_equal(stack[:, place], skhead.load_weights(last, role))
    assert stack.shape == (7, 4, 24, 5)
    scores = skhead.identity_scores(stack)
    np.testing.assert_allclose(
        scores["identity_signed"], virtual.table["identity_signed"], atol=1e-5
    )
    scorer = skhead.circuits.CircuitScorer(scores=["ov_norm", "ov_effective_rank"])
    found = np.asarray(scorer.fit_transform(stack))
    np.testing.assert_allclose(
        found, virtual.table[["ov_norm", "effective_rank"]].to_numpy(), rtol=1e-4
    )


def test_a_planted_copying_path():
    """Two heads that hand a subspace of tokens on copy together, and erase with the sign turned."""
    basis = np.linalg.qr(RNG.standard_normal((24, 24)))[0]
    token, between = torch.tensor(basis[:, :5]).float(), torch.tensor(basis[:, 5:10]).float()
    for sign in (1, -1):
        tensors = with_tokens(n_layers=2)
        tensors["blocks.0.attn.W_V"][2], tensors["blocks.0.attn.W_O"][2] = token, between.T
        tensors["blocks.1.attn.W_V"][1], tensors["blocks.1.attn.W_O"][1] = between, sign * token.T
        tensors["unembed.W_U"] = tensors["embed.W_E"].T.contiguous()
        with registered(tensors) as heads:
            table = virtual_heads(heads).table
        best = table.iloc[0]
        assert (best["head_1"], best["head_2"]) == ("L0H2", "L1H1")
        assert best["composition"] == pytest.approx(5**-0.5, rel=1e-5)
        assert best["effective_rank"] == pytest.approx(5, rel=1e-5)
        assert sign * best["ov_copying"] > 0.99


def test_a_stack_has_paths_but_no_tokens():
    stack = RNG.standard_normal((4, 4, 12, 3))
    with pytest.warns(UserWarning, match="a stack has no tokens"):
        virtual = virtual_heads(stack, min_ratio=0.0)
    assert len(virtual) == 4 * 3
    assert virtual.table["source"].unique().tolist() == ["array"]
    with pytest.raises(UnsupportedLayoutError, match="a stack has no tokens"):
        virtual_heads(stack, errors="raise")


@pytest.mark.filterwarnings("ignore:.*both are kept as they are")
def test_ends_of_different_tokens_have_no_copying():
    tensors = with_tokens(n_layers=2)
    tensors["unembed.W_U"] = tensors["unembed.W_U"][:, :11]
    with registered(tensors) as heads:
        with pytest.warns(UserWarning, match="has 15 tokens in its embedding and 11 in its unemb"):
            virtual = virtual_heads(heads, min_ratio=0.0)
        assert len(virtual) == 16 and virtual.table["ov_copying"].isna().all()
        with pytest.raises(UnsupportedLayoutError, match="virtual_heads: .* 11 in its unembedding"):
            virtual_heads(heads, errors="raise")


def test_permuting_a_stack_permutes_its_paths():
    stack = RNG.standard_normal((5, 4, 12, 3))
    order = [3, 0, 4, 1, 2]
    with pytest.warns(UserWarning, match="no tokens"):
        straight = virtual_heads(stack, min_ratio=0.0)
    with pytest.warns(UserWarning, match="no tokens"):
        mixed = virtual_heads(stack[order], min_ratio=0.0)
    np.testing.assert_array_equal(np.asarray(order)[mixed.steps], straight.steps)
    np.testing.assert_allclose(mixed.table["ratio"], straight.table["ratio"], rtol=1e-10)


def test_gpt2_small_reproduces_the_largest_composition(gpt2_path):
    """The published maximum is .3628, from L1H10 into L11H8."""
    with pytest.warns(UserWarning, match=r"wte\.weight"):
        virtual = virtual_heads(skhead.load_heads(gpt2_path), top=5)
    best = virtual.table.iloc[0]
    assert (best["head_1"], best["head_2"]) == ("L1H10", "L11H8")
    assert best["composition"] == pytest.approx(0.3628, abs=5e-5)


def test_models_are_not_mixed():
    with registered(with_tokens()) as one, registered(with_tokens(seed=5)) as other:
        alone = virtual_heads(other, top=4)
        both = skhead.load_heads([*one["source"].unique(), *other["source"].unique()])
        virtual = virtual_heads(both, top=4)
        second = virtual.table[virtual.table["source"] == other["source"].iloc[0]]
    assert len(virtual) == 8
    np.testing.assert_allclose(second["ratio"], alone.table["ratio"])
    np.testing.assert_array_equal(virtual.stack()[4:], alone.stack())
    np.testing.assert_array_equal(virtual.steps[4:], alone.steps + len(one))


def test_reading_layer_by_layer_changes_nothing(monkeypatch):
    with registered(with_tokens(n_layers=4)) as heads:
        shuffled = heads.sample(frac=1, random_state=0)
        expected = virtual_heads(shuffled, length=3, min_ratio=0.0)
        monkeypatch.setattr("skhead._inputs._HELD", 1)
        found = virtual_heads(shuffled, length=3, min_ratio=0.0)
    pd.testing.assert_frame_equal(found.table, expected.table)
    np.testing.assert_array_equal(found.steps, expected.steps)
    np.testing.assert_allclose(found.stack(), expected.stack(), rtol=1e-5)


def test_pickled_by_content():
    with registered(with_tokens()) as heads:
        virtual = virtual_heads(heads, top=3)
    again = pickle.loads(pickle.dumps(virtual))
    np.testing.assert_array_equal(again.stack(), virtual.stack())
    assert joblib.hash(again) == joblib.hash(pickle.loads(pickle.dumps(again)))
    assert repr(again) == "VirtualHeads(3 paths of 2 heads)"


def test_no_path_at_all():
    with registered(with_tokens(n_layers=1)) as heads:
        virtual = virtual_heads(heads)
    assert len(virtual) == 0
    assert virtual.stack().shape == (0, 4, 24, 5)
    assert "ov_copying" in virtual.table


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"length": 1}, "length must be an integer of at least 2; got 1"),
        ({"top": 2.5}, "top must be an integer of at least 1; got 2.5"),
        ({"top": 10, "beam": 9}, "beam must be an integer of at least 10; got 9"),
        ({"min_ratio": float("nan")}, "min_ratio must be a finite number; got nan"),
        ({"errors": "ignore"}, "errors must be one of 'warn', 'raise'; got 'ignore'"),
    ],
)
def test_parameters_out_of_range(wrong, message):
    heads = skhead.load_heads("skhead/induction-2l")
    with pytest.raises(ValueError, match=f"virtual_heads: {message}"):
        virtual_heads(heads, **wrong)


@pytest.mark.parametrize(
    "function",
    [skhead.virtual_heads, skhead.stream_usage, skhead.erasures, skhead.identity_scores],
)
@pytest.mark.parametrize("asked", ["fold_norm", "center"])
def test_a_stack_is_not_processed(function, asked):
    stack = np.random.default_rng(0).normal(size=(3, 4, 8, 2))
    message = f"{function.__name__}: fold_norm and center need the model's norms; a stack has none"
    with pytest.raises(ValueError, match=message):
        function(stack, **{asked: True})


def test_bad_heads_are_refused():
    with pytest.raises(HeadShapeError, match="virtual_heads: needs all four matrices"):
        virtual_heads(np.ones((2, 6, 3)))
    tensors = with_tokens()
    tensors["blocks.1.attn.W_O"][2] = 0
    with registered(tensors) as heads, pytest.raises(DegenerateHeadError, match="OV map of L1H2"):
        virtual_heads(heads)
