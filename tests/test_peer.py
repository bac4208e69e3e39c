"""The same numbers as TransformerLens, on its own bridge of a random model."""

from __future__ import annotations

import numpy as np
import pytest

import skhead

pytest.importorskip("transformer_lens")
transformers = pytest.importorskip("transformers")

KINDS = ("OQ", "OK", "OV")


def gpt2():
    config = transformers.GPT2Config(
        n_layer=3, n_head=4, n_embd=32, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), "GPT2LMHeadModel"


def llama():
    config = transformers.LlamaConfig(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
        intermediate_size=16, vocab_size=20,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), "LlamaForCausalLM"


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama-grouped"])
def bridge_and_heads(request):
    import torch
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    torch.manual_seed(0)
    model, architecture = request.param()
    bridge = build_bridge_from_module(model, architecture, hf_config=model.config)
    name = skhead.register_model(bridge, f"peer-{architecture}")
    yield bridge, skhead.load_heads(name)
    skhead.unregister_model(name)


def flat(scores):
    values = scores.detach().numpy()
    return values.reshape(values.shape[0] * values.shape[1], -1)


@pytest.mark.parametrize("layer_order", ["forward", "all"])
def test_projection_kernel(bridge_and_heads, layer_order):
    from transformer_lens.tools.analysis.projection_kernel import attention_head_subspace_affinity

    bridge, heads = bridge_and_heads
    kernels = {
        None: skhead.ProjectionKernel(pairs=KINDS, layer_order=layer_order),
        "cosine": skhead.ProjectionKernel(pairs=KINDS, layer_order=layer_order, normalize="cosine"),
    }
    for kind in KINDS:
        theirs = attention_head_subspace_affinity(
            bridge, target_role=kind[1], layer_order=layer_order
        )
        valid = flat(theirs.valid_mask)
        for normalize, scores in ((None, theirs.scores), ("cosine", theirs.normalized)):
            mine = kernels[normalize].fit_transform(heads).pair(kind).to_numpy()
            repeat = mine.shape[1] // valid.shape[1]
            expected = np.where(valid, flat(scores), np.nan).reshape(len(mine), 3, -1)
            expected = np.repeat(expected, repeat, axis=2).reshape(mine.shape)
            np.testing.assert_allclose(mine, expected, atol=2e-5)


def test_composition_scores(bridge_and_heads):
    bridge, heads = bridge_and_heads
    found = skhead.CompositionScore(pairs=KINDS).fit_transform(heads)
    for kind in KINDS:
        mine = found.pair(kind).to_numpy()
        theirs = flat(bridge.all_composition_scores(kind[1]).scores)
        np.testing.assert_allclose(np.nan_to_num(mine), theirs, atol=1e-6)
