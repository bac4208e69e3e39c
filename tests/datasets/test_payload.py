"""Payload retrieval: its sequences and contrast pairs, and the heads that solve it."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from skhead.datasets import (
    PayloadEmbeddings,
    PayloadHead,
    list_payload_heads,
    load_payload_card,
    load_payload_head,
    make_contrast_pairs,
    make_payload_retrieval,
    payload_head,
)
from skhead.datasets._payload_heads import payload_directory
from skhead.exceptions import HeadShapeError, SourceNotFoundError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NAMES = list_payload_heads()
#: Heads whose dimensions suffice for all latents.
ROOMY = ("d16-r3-r5", "d16-r7-r7", "d8-r3-r5")
#: Published validation accuracies of heads trained in the same way.
PUBLISHED = {
    "d16-r3-r5": 0.974,
    "d16-r7-r7": 1.000,
    "d8-r3-r5": 0.974,
    "d8-r5-r5": 0.987,
    "d8-r2-r3": 0.819,
    "d16-r3-r5-gaussian": 0.881,
}


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("train_payload_heads")


def draw(**sizes):
    return PayloadEmbeddings.draw(random_state=0, **sizes)


def arrays_of(made):
    return {
        field.name: getattr(made, field.name)
        for field in fields(made)
        if isinstance(getattr(made, field.name), np.ndarray)
    }


def difference_of_moments(pairs):
    """Mean outer product of queries with positive keys, less that with negative ones."""
    agree = pairs.agreement[:, 0]
    moments = []
    for kind in (1, 0):
        chosen = np.flatnonzero(agree == kind)
        asked = pairs.queries[pairs.query_index[chosen]].astype(np.float64)
        moments.append(asked.T @ pairs.keys[chosen] / len(chosen))
    return moments[0] - moments[1]


class TestEmbeddings:
    def test_shapes_and_variances(self):
        embeddings = draw(r1=7, r2=4, n_payloads=50, d_model=400)
        assert embeddings.A1.shape == embeddings.B1.shape == (400, 7)
        assert embeddings.A2.shape == embeddings.B2.shape == (400, 4)
        assert embeddings.payload.shape == (50, 400)
        assert embeddings.query_side.shape == embeddings.key_side.shape == (400, 11)
        assert embeddings.A1.std() == pytest.approx(7**-0.5, rel=0.05)
        assert embeddings.B2.std() == pytest.approx(4**-0.5, rel=0.05)
        assert embeddings.payload.std() == pytest.approx(400**-0.5, rel=0.05)

    def test_no_two_matrices_are_the_same(self):
        embeddings = draw(r1=3, r2=3)
        drawn = [embeddings.A1, embeddings.A2, embeddings.B1, embeddings.B2]
        assert len({array.tobytes() for array in drawn}) == 4

    def test_single_precision_stays_if_all_have_it(self):
        single = {name: array.astype(np.float32) for name, array in arrays_of(draw()).items()}
        assert PayloadEmbeddings(**single).A1.dtype == np.float32
        single["B2"] = single["B2"].astype(np.float64)
        assert {array.dtype.name for array in arrays_of(PayloadEmbeddings(**single)).values()} == {
            "float64"
        }

    def test_shapes_that_do_not_fit_are_listed(self):
        parts = arrays_of(draw())
        with pytest.raises(HeadShapeError, match=r"PayloadEmbeddings: A1 and B1 .*B1 \(32, 5\)"):
            PayloadEmbeddings(**parts | {"B1": parts["B2"]})
        with pytest.raises(HeadShapeError, match=r"payload must be a matrix, got shape \(32,\)"):
            PayloadEmbeddings(**parts | {"payload": parts["payload"][0]})
        with pytest.raises(HeadShapeError, match=r"r1 \+ r2 = 70 latents; use 62"):
            draw(r1=35, r2=35)
        with pytest.raises(ValueError, match=r"PayloadEmbeddings.draw: r2 must be an integer"):
            draw(r2=0)


class TestSequences:
    def test_tokens_are_made_of_latents_payload_and_noise(self):
        task = make_payload_retrieval(3000, noise=0.05, random_state=1)
        made_of = task.embeddings
        assert task.context.shape == (3000, 16, 32)
        assert task.query.shape == (3000, 32)
        tokens = task.z1 @ made_of.A1.T + task.z2 @ made_of.A2.T + made_of.payload[task.payloads]
        rows = np.arange(len(task))
        query = np.hstack([task.z1[rows, task.i_star], task.z2[rows, task.i_star]])
        for noise in (task.context - tokens, task.query - query @ made_of.query_side.T):
            assert noise.std() == pytest.approx(0.05, rel=0.02)
            assert abs(noise.mean()) < 0.001
        assert np.array_equal(task.target, task.payloads[rows, task.i_star])

    def test_positions_payloads_and_latents_are_drawn_evenly(self):
        task = make_payload_retrieval(20_000, random_state=2)
        assert stats.chisquare(np.bincount(task.i_star, minlength=16)).pvalue > 1e-3
        assert stats.chisquare(np.bincount(task.payloads.ravel(), minlength=10)).pvalue > 1e-3
        latents = np.concatenate([task.z1, task.z2], axis=-1)
        assert set(np.unique(latents)) == {-1, 1}
        moments = np.einsum("nci,ncj->ij", latents, latents) / latents[..., 0].size
        assert moments == pytest.approx(np.eye(8), abs=0.01)
        assert np.abs(latents.mean(axis=(0, 1))).max() < 0.01

    def test_normal_latents(self):
        task = make_payload_retrieval(2000, latent="gaussian", random_state=2)
        assert stats.kstest(task.z2.ravel(), "norm").pvalue > 1e-3
        assert "gaussian latents 3 + 5" in repr(task)

    @pytest.mark.parametrize(("r1", "r2", "context"), [(3, 5, 16), (1, 2, 8), (2, 2, 3)])
    def test_unique_latents_never_repeat_and_stay_even(self, r1, r2, context):
        task = make_payload_retrieval(
            4000, r1=r1, r2=r2, context=context, unique_latents=True, random_state=3
        )
        bits = np.concatenate([task.z1, task.z2], axis=-1) > 0
        codes = bits @ (1 << np.arange(r1 + r2))
        assert (np.diff(np.sort(codes, axis=1), axis=1) > 0).all()
        for column in range(context):
            counts = np.bincount(codes[:, column], minlength=1 << (r1 + r2))
            assert stats.chisquare(counts).pvalue > 1e-4

    def test_latents_repeat_unless_forbidden(self):
        task = make_payload_retrieval(500, r1=1, r2=1, random_state=3)
        assert len(np.unique(np.concatenate([task.z1, task.z2], axis=-1)[0], axis=0)) <= 4

    def test_more_tokens_than_codes_are_refused(self):
        with pytest.raises(ValueError, match=r"context=9 .* 3 sign latents have 8 codes; use a"):
            make_payload_retrieval(r1=1, r2=2, context=9, unique_latents=True)

    def test_the_seed_decides_everything(self):
        first, again = (make_payload_retrieval(9, random_state=4) for _ in range(2))
        other = make_payload_retrieval(9, random_state=5)
        for name, array in arrays_of(first).items():
            assert np.array_equal(array, getattr(again, name))
        assert not np.array_equal(first.context, other.context)
        assert np.array_equal(first.embeddings.A1, again.embeddings.A1)

    def test_a_generator_goes_on(self):
        rng = np.random.default_rng(0)
        embeddings = draw()
        one, two = (
            make_payload_retrieval(9, embeddings=embeddings, random_state=rng) for _ in range(2)
        )
        assert not np.array_equal(one.context, two.context)

    def test_embeddings_decide_the_sizes(self):
        embeddings = draw(r1=2, r2=4, n_payloads=6, d_model=20)
        task = make_payload_retrieval(7, embeddings=embeddings, r2=4, random_state=0)
        assert task.z1.shape == (7, 16, 2)
        assert task.z2.shape == (7, 16, 4)
        assert task.context.shape == (7, 16, 20)
        assert task.payloads.max() < 6

    @pytest.mark.parametrize("wrong", ["r1", "r2", "n_payloads", "d_model"])
    def test_sizes_that_contradict_the_embeddings_are_refused(self, wrong):
        with pytest.raises(ValueError, match=rf"{wrong}=9, and .* {wrong}=\d+; leave {wrong} out"):
            make_payload_retrieval(embeddings=draw(), **{wrong: 9})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"latent": "uniform"}, "latent='uniform'; use 'sign' or 'gaussian'"),
            ({"noise": -1.0}, "noise=-1.0; it is a standard deviation"),
            ({"noise": np.nan}, "noise=nan; it is a standard deviation"),
            ({"n_sequences": 0}, "n_sequences must be an integer of at least 1; got 0"),
            ({"context": 1.5}, "context must be an integer of at least 1; got 1.5"),
        ],
    )
    def test_wrong_options_are_named(self, options, message):
        with pytest.raises(ValueError, match=f"make_payload_retrieval: {message}"):
            make_payload_retrieval(**options)


class TestPairs:
    def test_signs_are_labelled_by_their_codes(self):
        head = payload_head(draw())
        task = make_payload_retrieval(40, embeddings=head.embeddings, random_state=1)
        pairs = task.pairs(head)
        assert pairs.features == ("z1", "z2")
        assert pairs.queries == pytest.approx(head.queries(task.query))
        assert pairs.keys.reshape(40, 16, -1) == pytest.approx(head.keys(task.context))
        rows = np.arange(40)
        for at, latents in enumerate((task.z1, task.z2)):
            same = (latents == latents[rows, task.i_star][:, None]).all(axis=-1)
            assert np.array_equal(pairs.agreement[:, at].reshape(40, 16), same)
            assert pairs.key_labels[:, at].max() < 2 ** latents.shape[-1]
        assert np.array_equal(pairs.key_groups, pairs.key_labels[:, ::-1])
        assert pairs.scale == head.scale
        assert pairs.head == "closed-form"

    def test_normal_latents_agree_at_one_position_only(self):
        head = payload_head(draw())
        task = make_payload_retrieval(
            40, embeddings=head.embeddings, latent="gaussian", random_state=1
        )
        pairs = task.pairs(head)
        assert pairs.features == ("position",)
        agreement = pairs.agreement.reshape(40, 16)
        assert (agreement.sum(axis=1) == 1).all()
        assert np.array_equal(agreement.argmax(axis=1), task.i_star)


class TestContrastPairs:
    @pytest.mark.parametrize("latent", ["sign", "gaussian"])
    @pytest.mark.parametrize("factor", ["z1", "z2"])
    def test_difference_of_moments_is_the_analytic_one(self, factor, latent):
        head = payload_head(draw())
        pairs = make_contrast_pairs(factor, head=head, latent=latent, random_state=0)
        assert len(pairs) == 40960
        outer = {
            "z1": head.embeddings.B1 @ head.embeddings.A1.T,
            "z2": head.embeddings.B2 @ head.embeddings.A2.T,
        }
        exact = head.W_Q.T @ outer[factor] @ head.W_K
        error = np.linalg.norm(difference_of_moments(pairs) - exact) / np.linalg.norm(exact)
        assert error < 0.03

    @pytest.mark.parametrize("factor", ["z1", "z2"])
    def test_keys_differ_in_one_factor_and_share_the_other(self, factor):
        head = payload_head(draw(), sharpness=1.0)
        pairs = make_contrast_pairs(factor, 4000, head=head, noise=0, random_state=0)
        keys, asked = np.rint(pairs.keys).reshape(4000, 2, -1), np.rint(pairs.queries)
        own, rest = (slice(0, 3), slice(3, 8)) if factor == "z1" else (slice(3, 8), slice(0, 3))
        assert np.array_equal(keys[:, 0, own], asked[:, own])
        assert np.array_equal(keys[:, 0, rest], keys[:, 1, rest])
        same = (keys[:, 1, own] == asked[:, own]).all(axis=-1).mean()
        assert same == pytest.approx(2.0 ** -(own.stop - own.start), rel=0.25)
        assert abs(np.corrcoef(keys[:, 0, rest].ravel(), asked[:, rest].ravel())[0, 1]) < 0.05

    def test_labels_state_which_key_is_the_positive(self):
        pairs = make_contrast_pairs("z2", 5, head=payload_head(draw()), random_state=0)
        assert pairs.features == ("z2",)
        assert pairs.agreement[:, 0].tolist() == [1, 0] * 5
        assert pairs.query_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]

    def test_the_seed_decides_everything(self):
        head = payload_head(draw())
        one, again, other = (
            make_contrast_pairs("z1", 50, head=head, random_state=seed) for seed in (0, 0, 1)
        )
        assert np.array_equal(one.keys, again.keys)
        assert not np.array_equal(one.keys, other.keys)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"factor": "z3"}, "factor='z3'; use 'z1' or 'z2'"),
            ({"n_pairs": 0}, "n_pairs must be an integer of at least 1; got 0"),
            ({"latent": "uniform"}, "latent='uniform'; use"),
        ],
    )
    def test_wrong_options_are_named(self, options, message):
        with pytest.raises(ValueError, match=f"make_contrast_pairs: {message}"):
            make_contrast_pairs(**{"factor": "z1", "head": payload_head(draw())} | options)


class TestClosedForm:
    @pytest.mark.parametrize("d_head", [8, 16, 24])
    def test_it_solves_the_task_and_its_default_is_as_sharp_as_a_trained_head(self, d_head):
        head = payload_head(draw(), d_head=d_head)
        task = make_payload_retrieval(
            4000, embeddings=head.embeddings, unique_latents=True, random_state=1
        )
        attention = head.attention(task)
        assert attention.sum(axis=1) == pytest.approx(1)
        assert head.accuracy(task) > 0.99
        if d_head == 16:
            assert attention[np.arange(4000), task.i_star].mean() == pytest.approx(0.96, abs=0.01)

    def test_keys_are_blind_to_payloads_and_values_to_latents(self):
        head = payload_head(draw())
        assert head.keys(head.embeddings.payload) == pytest.approx(0, abs=1e-10)
        latents_in_values = head.embeddings.key_side.T @ head.W_V
        assert latents_in_values == pytest.approx(0, abs=1e-10)

    @pytest.mark.parametrize("d_head", [2, 5, 8, 9, 10, 16])
    def test_every_payload_has_a_code_of_its_own(self, d_head):
        head = payload_head(draw(r1=1, r2=1), d_head=d_head)
        named = head.embeddings.payload @ head.W_V @ head.W_out
        assert np.array_equal(named.argmax(axis=1), np.arange(10))

    def test_too_few_dimensions_are_refused(self):
        with pytest.raises(HeadShapeError, match=r"d_head=8 .* r1 \+ r2 = 10 .*load_payload_head"):
            payload_head(draw(r1=5, r2=5), d_head=8)
        with pytest.raises(HeadShapeError, match=r"d_model=17 .* 8 latents and 10 .*d_model of 18"):
            payload_head(draw(d_model=17))


class TestBundledHeads:
    def test_files(self):
        names = {path.name for path in payload_directory().iterdir()}
        assert names == {"README.md", "card.json", *(f"{name}.npz" for name in NAMES)}
        assert sum(path.stat().st_size for path in payload_directory().iterdir()) < 200_000
        assert set(NAMES) == set(PUBLISHED)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_head_is_as_accurate_as_its_card_says_on_fresh_sequences(self, name):
        head, card = load_payload_head(name), load_payload_card(name)
        assert card["name"] == head.name == name
        sizes = (head.d_head, head.embeddings.r1, head.embeddings.r2)
        assert sizes == (card["d_head"], card["r1"], card["r2"])
        task = make_payload_retrieval(
            4000, embeddings=head.embeddings, latent=card["latent"], random_state=99
        )
        found = head.attention(task)[np.arange(4000), task.i_star]
        assert head.accuracy(task) == pytest.approx(card["accuracy"], abs=0.015)
        assert found.mean() == pytest.approx(card["attention"], abs=0.015)
        assert card["accuracy"] == pytest.approx(PUBLISHED[name], abs=0.01)

    @pytest.mark.parametrize("name", ROOMY)
    @pytest.mark.parametrize("factor", ["z1", "z2"])
    def test_subspaces_have_the_rank_of_their_factor_and_end_in_a_gap(self, name, factor):
        head = load_payload_head(name)
        rank = head.embeddings.r1 if factor == "z1" else head.embeddings.r2
        pairs = make_contrast_pairs(factor, head=head, random_state=5)
        values = np.linalg.svd(difference_of_moments(pairs), compute_uv=False)
        energy = np.cumsum(values**2) / np.sum(values**2)
        assert np.searchsorted(energy, 0.99) + 1 == rank
        assert values[rank - 1] > 100 * values[rank]

    def test_with_too_few_dimensions_ranks_fall_below_the_truth(self):
        head = load_payload_head("d8-r5-r5")
        ranks = []
        for factor in ("z1", "z2"):
            pairs = make_contrast_pairs(factor, head=head, random_state=5)
            values = np.linalg.svd(difference_of_moments(pairs), compute_uv=False)
            ranks.append(np.searchsorted(np.cumsum(values**2) / np.sum(values**2), 0.99) + 1)
        assert sum(ranks) < 10

    def test_a_trained_head_ignores_what_it_does_not_need(self):
        head = load_payload_head("d16-r3-r5")
        payload, latents = head.embeddings.payload, head.embeddings.key_side.T
        assert np.linalg.norm(head.keys(payload)) < 0.2 * np.linalg.norm(head.keys(latents))

    @pytest.mark.parametrize("name", ROOMY)
    def test_tokens_change_places_if_both_subspaces_are_swapped_and_partly_if_one_is(self, name):
        swaps = load_payload_card(name)["swaps"]
        assert swaps["none"]["other"] < 0.01
        assert swaps["both"]["found"] < 0.01
        assert swaps["both"]["other"] == pytest.approx(swaps["none"]["found"], abs=0.01)
        for factor in ("z1", "z2"):
            assert 0.1 < swaps[factor]["found"] < 0.5
            assert 0.1 < swaps[factor]["other"] < 0.6

    def test_unknown_names_list_the_known(self):
        for function in (load_payload_head, load_payload_card):
            with pytest.raises(SourceNotFoundError, match=r"'d4-r1-r1'; there are d16-r3-r5, "):
                function("d4-r1-r1")


class TestHeads:
    def test_weights_must_fit(self):
        head = payload_head(draw())
        parts = arrays_of(head)
        with pytest.raises(
            HeadShapeError, match=r"'head': W_V must have shape \(32, 16\).*\(32, 9"
        ):
            PayloadHead(**parts | {"W_V": parts["W_V"][:, :9]}, embeddings=head.embeddings)

    def test_tokens_must_fit(self):
        with pytest.raises(HeadShapeError, match=r"'closed-form': reads tokens of d_model 32, got"):
            payload_head(draw()).queries(np.zeros((4, 31)))


class TestScript:
    def test_training_repeats_to_the_bit(self, script):
        config = script.HeadConfig(8, 2, 3)
        first, second = (script.train(config, script.Training(steps=4)) for _ in range(2))
        longer = script.train(config, script.Training(steps=5))
        for name, array in arrays_of(first).items():
            assert np.array_equal(array, getattr(second, name))
        assert not np.array_equal(first.W_Q, longer.W_Q)

    def test_embeddings_on_file_are_those_of_the_seed(self, script):
        for config in script.HEADS:
            rng = np.random.default_rng(script.Training.seed)
            drawn = PayloadEmbeddings.draw(config.r1, config.r2, random_state=rng)
            stored = load_payload_head(config.name).embeddings
            for name, array in arrays_of(drawn).items():
                assert getattr(stored, name) == pytest.approx(array, rel=1e-6)

    def test_the_card_is_what_the_script_measures(self, script, tmp_path):
        name = "d8-r5-r5"
        for file in ("card.json", "README.md", f"{name}.npz"):
            shutil.copy(payload_directory() / file, tmp_path)
        script.main(["--evaluate-only", "--only", name, "--output", str(tmp_path)])
        again = json.loads((tmp_path / "card.json").read_text())["heads"][name]
        card = load_payload_card(name)
        for key in ("accuracy", "attention", "diagonal_share", "cross_block_ratio"):
            assert again[key] == pytest.approx(card[key], abs=2e-3)
        assert again["ranks"] == card["ranks"]
        for swap, measures in again["swaps"].items():
            assert measures == pytest.approx(card["swaps"][swap], abs=2e-3)
        shipped = (payload_directory() / "README.md").read_text()
        card = json.loads((payload_directory() / "card.json").read_text())
        assert shipped == script.readme(card)
