"""Warnings: at the user's line, and once however often weights are read."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.pipeline import make_pipeline
from toys import random_weights, registered

import skhead
from skhead._callers import saying_once, warn_user

PAIRS = {"copying": [(token, token) for token in range(30)]}
CALLS = {
    "CircuitScorer": lambda heads: skhead.CircuitScorer(
        center=True, max_memory="16MiB"
    ).fit_transform(heads),
    "SubspaceExtractor": lambda heads: skhead.SubspaceExtractor(center=True).fit_transform(heads),
    "Pipeline": lambda heads: make_pipeline(
        skhead.SubspaceExtractor(center=True), skhead.ProjectionKernel()
    ).fit(heads),
    "CompositionScore": lambda heads: skhead.CompositionScore(center=True).fit_transform(heads),
    "OperationMapper": lambda heads: skhead.OperationMapper(
        PAIRS, source_embedding="raw", center=True
    ).fit(heads),
    "SubspaceReadout": lambda heads: skhead.SubspaceReadout(center=True).fit_transform(heads),
    "identity_scores": lambda heads: skhead.identity_scores(heads, center=True),
    "virtual_heads": lambda heads: skhead.virtual_heads(heads, center=True),
    "induction_pairs": lambda heads: skhead.induction_pairs(heads, center=True),
    "skip_trigrams": lambda heads: skhead.skip_trigrams(heads, center=True),
    "stream_usage": lambda heads: skhead.stream_usage(heads, center=True),
    "erasures": lambda heads: skhead.erasures(heads, center=True),
}


@pytest.fixture(scope="module")
def heads():
    tensors = random_weights(n_layers=4)
    generator = torch.Generator().manual_seed(1)
    for name, size in (
        ("embed.W_E", (30, 24)),
        ("unembed.W_U", (24, 30)),
        ("pos_embed.W_pos", (16, 24)),
    ):
        tensors[name] = torch.randn(size, generator=generator)
    with registered(tensors) as table:
        yield table


@pytest.mark.parametrize("call", CALLS)
def test_centring_is_warned_of_once_for_a_call(call, heads):
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            CALLS[call](heads)
        centring = [w for w in caught if "centring changes what its heads read" in str(w.message)]
        assert [w.filename for w in centring] == [__file__]


def test_transforming_warns_once_too(heads):
    scorer = skhead.CircuitScorer("maps", center=True, max_memory="16MiB").fit(heads)
    with pytest.warns(UserWarning, match="center=True") as caught:
        scorer.transform(heads)
    assert len(caught) == 1


def test_only_equal_messages_inside_are_left_out():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            warn_user("outside")
        with saying_once():
            warn_user("one")
            with saying_once():
                warn_user("one")
                warn_user("two")
            warn_user("two")
        warn_user("one")
    assert [str(w.message) for w in caught] == ["outside", "outside", "one", "two", "one"]
