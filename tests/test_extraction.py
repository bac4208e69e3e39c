"""SubspaceExtractor by both doors, and the Subspaces that it gives."""

from __future__ import annotations

import pickle

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from toys import random_weights, registered, toy_heads

import skhead
from skhead import SubspaceExtractor, load_weights
from skhead.exceptions import DegenerateHeadError, HeadShapeError, HeadTableError
from skhead.weights import stacks


def projectors(bases):
    return bases @ bases.transpose(0, 2, 1)


def stack(n_heads=6, d_model=20, d_head=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n_heads, d_model, d_head))


def test_both_doors_give_the_same_subspaces():
    with toy_heads() as heads:
        table = SubspaceExtractor().fit_transform(heads)
        for role in "QKVO":
            array = SubspaceExtractor().fit_transform(load_weights(heads, role))
            assert array.roles == ("X",)
            np.testing.assert_allclose(
                projectors(array.numpy("X")), projectors(table.numpy(role)), atol=1e-6
            )


def test_stack_of_four_roles():
    with toy_heads() as heads:
        four = np.stack([load_weights(heads, role) for role in "QKVO"], axis=1)
        found = SubspaceExtractor(roles="OV").fit_transform(four)
        assert found.roles == ("O", "V")
        expected = SubspaceExtractor(roles="O").fit_transform(heads)
        np.testing.assert_allclose(found.numpy("O"), expected.numpy("O"), atol=1e-6)


def test_grouped_heads_share_one_basis():
    with toy_heads(n_heads=6, n_kv_heads=2) as heads:
        found = SubspaceExtractor().fit_transform(heads)
        assert len(found.role("Q").vectors) == 18
        assert len(found.role("K").vectors) == 6
        k = found.numpy("K")
        np.testing.assert_array_equal(k[0], k[2])
        assert np.abs(k[0] - k[3]).max() > 0.1


def test_unequal_ranks_are_measured_head_by_head():
    weights = random_weights(n_layers=2, n_heads=3, d_model=16, d_head=4)
    weights["blocks.1.attn.W_Q"][2, :, 3] = weights["blocks.1.attn.W_Q"][2, :, 0]
    with registered(weights) as heads:
        found = SubspaceExtractor(roles="Q").fit_transform(heads)
    assert found.ranks("Q").tolist() == [4, 4, 4, 4, 4, 3]
    assert "ranks 3 to 4" in repr(found)


@pytest.mark.parametrize("rank, expected", [(2, 2), (np.int64(3), 3), (None, 4)])
def test_rank(rank, expected):
    assert set(SubspaceExtractor(rank=rank).fit_transform(stack()).ranks("X")) == {expected}


def test_energy_rank_grows_with_the_share():
    ranks = [
        SubspaceExtractor(rank=share).fit_transform(stack()).ranks("X").sum()
        for share in (0.3, 0.6, 0.9)
    ]
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_and_tensor_input(dtype):
    X = stack().astype(dtype)
    array = SubspaceExtractor().fit_transform(X).numpy("X")
    tensor = SubspaceExtractor().fit_transform(torch.from_numpy(X)).numpy("X")
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, tensor)


def test_integer_stack():
    X = np.rint(10 * stack()).astype(np.int64)
    np.testing.assert_allclose(
        SubspaceExtractor().fit_transform(X).numpy("X"),
        SubspaceExtractor().fit_transform(X.astype(float)).numpy("X"),
    )


def test_indexing_selects_heads_and_drops_unused_bases():
    with toy_heads(n_heads=6, n_kv_heads=2) as heads:
        found = SubspaceExtractor().fit_transform(heads)
        for key in (slice(2, 5), [2, 3, 4], np.arange(18) % 5 == 2, (np.array([4, 1]), ...)):
            part = found[key]
            rows = np.arange(18)[key[0] if isinstance(key, tuple) else key]
            assert part.heads.index.tolist() == heads.index[rows].tolist()
            np.testing.assert_array_equal(part.numpy("K"), found.numpy("K")[rows])
        assert len(found[[0, 1, 2]].role("K").vectors) == 1
        assert len(found[3]) == 1
        assert found.shape == (18, 24)


def test_pickle_and_content_hash():
    with toy_heads() as heads:
        first = SubspaceExtractor().fit_transform(heads)
        second = SubspaceExtractor().fit_transform(heads)
    again = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(again.numpy("V"), first.numpy("V"))
    pd.testing.assert_frame_equal(again.heads, first.heads, check_index_type=False)
    assert joblib.hash(first) == joblib.hash(second) == joblib.hash(again)
    assert joblib.hash(first) != joblib.hash(first[:5])


def test_a_pickled_part_does_not_carry_the_whole():
    with toy_heads(d_model=64) as heads:
        found = SubspaceExtractor().fit_transform(heads)
    assert len(pickle.dumps(found[:1])) < len(pickle.dumps(found)) / 4


def test_record_says_how_weights_were_processed():
    with toy_heads() as heads:
        found = SubspaceExtractor(rank=2, center=False).fit_transform(heads)
    assert found.record == {"fold_norm": False, "center": False, "rank": 2}


def test_parameters_are_checked():
    X = stack()
    for rank, message in (
        (0, "rank=0 must lie between 1 and the head dimension 4"),
        (5, "rank=5 must lie between 1 and the head dimension 4"),
        (1.0, "strictly between 0 and 1; got 1.0"),
        (-0.5, "strictly between 0 and 1; got -0.5"),
        (True, "rank must be None, an int or a float; got True"),
        ("4", "rank must be None, an int or a float; got '4'"),
    ):
        with pytest.raises(ValueError, match=message):
            SubspaceExtractor(rank=rank).fit(X)
    with toy_heads() as heads:
        for roles in ("QX", "", "QQ"):
            with pytest.raises(ValueError, match=f"distinct letters of 'QKVO', got '{roles}'"):
                SubspaceExtractor(roles=roles).fit(heads)
    with pytest.raises(ValueError, match="a stack has none"):
        SubspaceExtractor(fold_norm=True).fit(X)


@pytest.mark.parametrize("true_rank", [1, 2, 5])
def test_rank_of_double_precision_products(true_rank):
    rng = np.random.default_rng(0)
    for d_model, d_head in ((256, 16), (768, 64), (20, 7)):
        X = rng.standard_normal((3, d_model, true_rank)) @ rng.standard_normal(
            (3, true_rank, d_head)
        )
        assert set(SubspaceExtractor().fit_transform(X).ranks("X")) == {true_rank}
    whole = np.rint(10 * rng.standard_normal((2, 40, true_rank))).astype(int)
    repeated = np.concatenate([whole, whole], axis=2)
    assert set(SubspaceExtractor().fit_transform(repeated).ranks("X")) == {true_rank}


@pytest.mark.parametrize(
    "disguise",
    [
        lambda X: X[::-1][::-1],
        np.asfortranarray,
        lambda X: X.astype(">f8"),
        lambda X: X.astype(np.longdouble),
        lambda X: X.tolist(),
        lambda X: torch.from_numpy(X).requires_grad_(),
        lambda X: torch.nn.Parameter(torch.from_numpy(X)),
        lambda X: torch.from_numpy(X).mT.contiguous().mT,
    ],
)
def test_equal_stacks_in_any_guise(disguise):
    expected = SubspaceExtractor().fit_transform(stack()).numpy("X")
    np.testing.assert_allclose(
        SubspaceExtractor().fit_transform(disguise(stack())).numpy("X"), expected
    )


def test_reversed_view():
    expected = SubspaceExtractor().fit_transform(stack()).numpy("X")[::-1]
    np.testing.assert_array_equal(
        SubspaceExtractor().fit_transform(stack()[::-1]).numpy("X"), expected
    )


@pytest.mark.parametrize("key", ["L0H0", (1, 2), None, np.zeros((2, 2), int), [True, False], 1.5])
def test_other_keys_are_refused(key):
    found = SubspaceExtractor().fit_transform(stack())
    with pytest.raises(IndexError, match="a mask of length 6 or a list of positions"):
        found[key]
    assert repr(found[[]]) == "Subspaces(0 heads, roles X, d_model 20)"


def test_rank_does_not_depend_on_other_models_in_the_table():
    fine = random_weights(n_layers=1, n_heads=2, d_model=40, d_head=4)
    fine["blocks.0.attn.W_Q"] *= torch.tensor([1.0, 1e-2, 1e-3, 1e-4])
    coarse = {
        k: v.bfloat16()
        for k, v in random_weights(n_layers=1, n_heads=2, d_model=40, d_head=4).items()
    }
    with registered(fine) as a, registered(coarse) as b:
        alone = SubspaceExtractor(roles="Q").fit_transform(a).ranks("Q").tolist()
        both = SubspaceExtractor(roles="Q").fit_transform(pd.concat([a, b])).ranks("Q").tolist()
    assert alone == both[:2] == [4, 4]


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (np.zeros((3, 4)), HeadShapeError, r"SubspaceExtractor: a stack must .*got shape \(3, 4\)"),
        (np.zeros((0, 4, 2)), HeadShapeError, "at least one head"),
        (np.ones((2, 3, 4, 5)), HeadShapeError, r"got shape \(2, 3, 4, 5\)"),
        (np.full((2, 3, 2), "a"), HeadShapeError, "real numeric"),
        (np.ones((2, 3, 2), dtype=complex), HeadShapeError, "dtype complex128"),
        ([[[1.0, 2.0]], [[1.0]]], HeadShapeError, "got a ragged list"),
        (torch.ones(2, 3, 2, dtype=torch.complex64), HeadShapeError, "must be real.*complex64"),
        (torch.ones(2, 3, 2).to(torch.float8_e4m3fn), HeadShapeError, "16 bits or more.*float8"),
        (np.full((2, 3, 2), np.nan), DegenerateHeadError, "head 0 of the stack holds NaN"),
    ],
)  # fmt: skip
def test_bad_stacks(bad, error, message):
    with pytest.raises(error, match=message):
        SubspaceExtractor().fit(bad)


def test_zero_head_is_named():
    X = stack()
    X[3] = 0
    with pytest.raises(DegenerateHeadError, match="SubspaceExtractor: H3 matrix is zero"):
        SubspaceExtractor().fit_transform(X)
    weights = random_weights()
    weights["blocks.1.attn.W_O"][2] = 0
    with registered(weights) as heads, pytest.raises(DegenerateHeadError, match="L1H2 W_O is zero"):
        SubspaceExtractor().fit_transform(heads)


def test_nan_head_of_a_table_is_named():
    weights = random_weights()
    weights["blocks.2.attn.W_K"][1, 0, 0] = float("nan")
    with registered(weights) as heads, pytest.raises(DegenerateHeadError, match="L2H1 W_K"):
        SubspaceExtractor().fit_transform(heads)


def test_bad_tables():
    with toy_heads() as heads, toy_heads(d_model=30) as wider:
        with pytest.raises(HeadTableError, match=r"SubspaceExtractor: .*empty"):
            SubspaceExtractor().fit(heads.iloc[:0])
        with pytest.raises(HeadTableError, match=r"SubspaceExtractor: .*kv_head"):
            SubspaceExtractor().fit(heads.drop(columns="kv_head"))
        with pytest.raises(HeadShapeError, match=r"different d_model"):
            SubspaceExtractor().fit(pd.concat([heads, wider]))
        extractor = SubspaceExtractor().fit(heads)
        with pytest.raises(HeadShapeError, match="fitted on heads of d_model 24.*have d_model 30"):
            extractor.transform(wider)
        with pytest.raises(HeadShapeError, match="use one kind of input for both"):
            extractor.transform(np.ones((2, 24, 3)))


def test_concatenated_tables_keep_their_heads_apart():
    with toy_heads(seed=1) as a, toy_heads(seed=2) as b:
        both = pd.concat([a, b])
        found = SubspaceExtractor(roles="O").fit_transform(both)
        separate = [SubspaceExtractor(roles="O").fit_transform(t).numpy("O") for t in (a, b)]
        np.testing.assert_array_equal(found.numpy("O"), np.concatenate(separate))
        labels = (
            skhead.ProjectionKernel(pairs=["OO"], layer_order="all")
            .fit(found)
            .get_feature_names_out()
        )
        assert len(set(labels)) == 24


def test_what_is_no_table_is_told_how_to_become_one():
    heads = skhead.load_heads("skhead/induction-2l")
    with pytest.raises(HeadShapeError, match=r"got a Series.*heads.loc\[\['L1H0'\]\]"):
        SubspaceExtractor().fit(heads.loc["L1H0"])
    with pytest.raises(
        HeadShapeError, match=r"got the text 'skhead/induction-2l'; list .*load_heads"
    ):
        SubspaceExtractor().fit("skhead/induction-2l")


@pytest.mark.parametrize(
    "estimator",
    [SubspaceExtractor(), skhead.CompositionScore(pairs=("OQ", "OK", "OV"))],
    ids=["bases", "composition"],
)
def test_a_checkpoint_is_opened_once_for_all_roles(estimator, monkeypatch):
    opened = []

    def reopen(address):
        opened.append(address)
        return real(address)

    real = stacks.reopen
    monkeypatch.setattr(stacks, "reopen", reopen)
    heads = skhead.load_heads("skhead/induction-2l")
    estimator.fit_transform(heads)
    assert opened == ["skhead/induction-2l"]
