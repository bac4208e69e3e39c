"""Superposition of latents in heads whose embeddings are known."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import skhead
from skhead.datasets import (
    PayloadEmbeddings,
    list_payload_heads,
    load_payload_card,
    load_payload_head,
    make_payload_retrieval,
    payload_head,
)
from skhead.exceptions import HeadShapeError


def closed_form(**options):
    return payload_head(PayloadEmbeddings.draw(random_state=0), **options)


def test_the_closed_form_matches_latents_with_themselves_only():
    report = skhead.analyse_superposition(closed_form(sharpness=4.0))
    assert report.interaction == pytest.approx(4 * np.eye(8), abs=1e-6)
    assert report.diagonal_share == pytest.approx(1)
    assert report.cross_block_ratio == pytest.approx(0, abs=1e-6)
    assert (report.n_latents, report.d_head, report.superposed) == (8, 16, False)


@pytest.mark.parametrize("name", list_payload_heads())
def test_bundled_heads_mix_latents_as_their_cards_say(name):
    card, report = load_payload_card(name), skhead.analyse_superposition(load_payload_head(name))
    assert report.diagonal_share == pytest.approx(card["diagonal_share"], abs=1e-3)
    assert report.cross_block_ratio == pytest.approx(card["cross_block_ratio"], abs=1e-3)
    assert report.superposed == (card["r1"] + card["r2"] > card["d_head"])
    assert np.linalg.matrix_rank(report.interaction) == min(report.n_latents, report.d_head)


def test_the_superposed_head_mixes_latents_most():
    shares = {
        name: skhead.analyse_superposition(load_payload_head(name)).diagonal_share
        for name in list_payload_heads()
    }
    assert min(shares, key=shares.__getitem__) == "d8-r5-r5"
    assert shares.pop("d8-r5-r5") < 0.9 < min(shares.values())


def test_report_shows_its_verdict_and_survives_pickling():
    report = skhead.analyse_superposition(load_payload_head("d8-r5-r5"))
    assert "10 latents in 8 dimensions, superposed" in repr(report)
    assert "not superposed" in repr(skhead.analyse_superposition(closed_form()))
    again = pickle.loads(pickle.dumps(report))
    assert np.array_equal(again.interaction, report.interaction)
    assert copy.deepcopy(report) is report


@pytest.mark.parametrize("latent", ["sign", "gaussian"])
def test_true_logits_are_all_of_the_closed_form(latent):
    head = closed_form()
    task = make_payload_retrieval(
        50, embeddings=head.embeddings, latent=latent, noise=0, random_state=1
    )
    dots = np.einsum("nd,ncd->nc", head.queries(task.query), head.keys(task.context))
    assert skhead.true_logits(head, task).sum(axis=-1) == pytest.approx(dots)


def test_true_logits_of_sign_latents_count_agreements():
    head = closed_form(sharpness=1.0)
    task = make_payload_retrieval(50, embeddings=head.embeddings, random_state=1)
    rows = np.arange(50)
    for at, latents in enumerate((task.z1, task.z2)):
        agree = (latents == latents[rows, task.i_star][:, None]).sum(axis=-1)
        found = skhead.true_logits(head, task)[..., at]
        assert found == pytest.approx(2 * agree - latents.shape[-1])


def test_sequences_of_other_embeddings_meet_the_head_by_theirs():
    head = closed_form()
    others = PayloadEmbeddings.draw(2, 4, random_state=5)
    task = make_payload_retrieval(20, embeddings=others, random_state=1)
    interaction = others.B1.T @ head.W_Q @ head.W_K.T @ others.A1
    asked = task.z1[np.arange(20), task.i_star]
    expected = np.einsum("nr,rs,ncs->nc", asked, interaction, task.z1)
    assert skhead.true_logits(head, task)[..., 0] == pytest.approx(expected)


def test_sequences_of_another_width_are_refused():
    task = make_payload_retrieval(20, d_model=40, random_state=1)
    with pytest.raises(HeadShapeError, match=r"true_logits: .*d_model 32 .* 40; make them with"):
        skhead.true_logits(closed_form(), task)
