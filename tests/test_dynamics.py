"""Scores of heads in action against dense references, planted heads and other libraries."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toys import random_weights, registered

import skhead
from skhead import dynamics
from skhead._agreement import compare_scores
from skhead._prompts import Prompter
from skhead.ablation import ablate, rank_heads
from skhead.dynamics import dynamic_scores, multi_token_pairs
from skhead.exceptions import HeadTableError, UnsupportedLayoutError
from skhead.operations import OperationMapper
from skhead.weights import running

pytest.importorskip("transformer_lens")
transformers = pytest.importorskip("transformers")

BUNDLED = "skhead/induction-2l"
N_LAYERS, N_HEADS, D_MODEL, D_HEAD, N_VOCAB, N_CTX = 2, 3, 24, 5, 17, 9
#: Token ids before and behind the source.
TEMPLATES = [([1, 2], [3]), ([4], []), ([5, 6, 7], [8, 9])]
PAIRS = [(10, 11), ([12, 3], 13), (14, 10), (2, 2), ([7, 15, 6], 4)]
ALONE, WITHIN = "without", "with"


def toy_model(seed=4):
    """A small attention-only model without norms, biases included."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.5

    shape = (N_LAYERS, N_HEADS, D_MODEL, D_HEAD)
    tensors = {name: tensor * 0.4 for name, tensor in random_weights(*shape).items()}
    tensors |= {"embed.W_E": draw(N_VOCAB, D_MODEL), "pos_embed.W_pos": draw(N_CTX, D_MODEL)}
    tensors |= {"unembed.W_U": draw(D_MODEL, N_VOCAB), "unembed.b_U": draw(N_VOCAB) * 5}
    for layer in range(N_LAYERS):
        for role in "QKV":
            tensors[f"blocks.{layer}.attn.b_{role}"] = draw(N_HEADS, D_HEAD)
        tensors[f"blocks.{layer}.attn.b_O"] = draw(D_MODEL) * 5
    return tensors


def dense_outputs(tensors, tokens, source, silent=()):
    """Final logits, and what heads write at the last position: layer, head, context, d_model."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    stream = weights["embed.W_E"][tokens] + weights["pos_embed.W_pos"][: len(tokens)]
    written = torch.zeros(N_LAYERS, N_HEADS, 2, D_MODEL).double()
    for layer in range(N_LAYERS):
        get = {
            name: weights[f"blocks.{layer}.attn.{name}"]
            for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
        }
        total = get["b_O"].expand(len(tokens), -1).clone()
        for head in range(N_HEADS):
            q, k, v = (stream @ get[f"W_{role}"][head] + get[f"b_{role}"][head] for role in "QKV")
            later = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
            pattern = (q @ k.T / math.sqrt(D_HEAD)).masked_fill(later, -torch.inf).softmax(-1)
            z = pattern @ v
            written[layer, head, 0] = v[source] @ get["W_O"][head]
            written[layer, head, 1] = z[-1] @ get["W_O"][head]
            if (layer, head) in silent:
                z[-1] = 0
            total += z @ get["W_O"][head]
        stream = stream + total
    return stream[-1] @ weights["unembed.W_U"] + weights["unembed.b_U"], written


def dense_prompt(template, source):
    middle = [source] if isinstance(source, int) else source
    tokens = [*template[0], *middle, *template[1]]
    return tokens, len(template[0]) + len(middle) - 1


def dense_scores(tensors, template, k, unembedding):
    """Scores from sorted logits: layer, head, context, sign."""
    hits = torch.zeros(N_LAYERS, N_HEADS, 2, 2)
    for source, target in PAIRS:
        _, written = dense_outputs(tensors, *dense_prompt(template, source))
        logits = written @ unembedding
        for sign, values in enumerate((logits, -logits)):
            hits[..., sign] += (values.topk(k).indices == target).any(-1)
    return hits / len(PAIRS)


def as_array(table, k, template):
    """Scores of a long table in the order of `dense_scores`."""
    rows = table[(table["k"] == k) & (table["template"] == template)]
    arrays = [
        [
            rows[(rows["context"] == context) & (rows["feature"] == feature)]["score"].to_numpy()
            for feature in ("operation", "-operation")
        ]
        for context in (ALONE, WITHIN)
    ]
    return np.moveaxis(np.array(arrays).reshape(2, 2, N_LAYERS, N_HEADS), (2, 3), (0, 1))


@pytest.mark.parametrize("logits_at_once", [1 << 24, 1])
def test_scores_are_those_of_sorted_logits(monkeypatch, logits_at_once):
    monkeypatch.setattr(dynamics, "_LOGITS", logits_at_once)
    tensors = toy_model()
    with registered(tensors) as heads:
        table = dynamic_scores(heads["source"].iloc[0], PAIRS, TEMPLATES, k=(1, 3, 6))
    assert len(table) == 3 * 2 * 2 * 3 * N_LAYERS * N_HEADS
    assert table.attrs == {"n_pairs": {"operation": len(PAIRS)}}
    for k in (1, 3, 6):
        for place, template in enumerate(TEMPLATES):
            expected = dense_scores(tensors, template, k, tensors["unembed.W_U"].double())
            found = as_array(table, k, f"template {place}")
            np.testing.assert_allclose(found, expected, atol=1e-7)
    assert table["score"].nunique() > 3


def test_many_prompts_of_one_length_take_the_other_order_of_products():
    tensors = toy_model()
    pairs = [(a, b) for a in range(N_VOCAB) for b in (a, (a + 3) % N_VOCAB)]
    with registered(tensors) as heads:
        table = dynamic_scores(heads["source"].iloc[0], pairs, [([1], [2])], k=4)
    hits = torch.zeros(N_LAYERS, N_HEADS, 2, 2)
    for source, target in pairs:
        _, written = dense_outputs(tensors, [1, source, 2], 1)
        logits = written @ tensors["unembed.W_U"].double()
        for sign, values in enumerate((logits, -logits)):
            hits[..., sign] += (values.topk(4).indices == target).any(-1)
    np.testing.assert_allclose(as_array(table, 4, "template 0"), hits / len(pairs), atol=1e-7)


def test_batches_do_not_change_scores(monkeypatch):
    with registered(toy_model()) as heads:
        source = heads["source"].iloc[0]
        whole = dynamic_scores(source, PAIRS, TEMPLATES, k=3)
        monkeypatch.setattr(running, "_LOGIT_NUMBERS", 1)
        single = dynamic_scores(source, PAIRS, TEMPLATES, k=3)
    pd.testing.assert_frame_equal(whole, single)


def test_another_unembedding_and_fewer_valid_tokens():
    tensors = toy_model()
    pairs = [pair for pair in PAIRS if pair[1] < 12]
    other = torch.randn(N_VOCAB, D_MODEL, generator=torch.Generator().manual_seed(1))
    with registered(tensors) as heads:
        source = heads["source"].iloc[0]
        table = dynamic_scores(source, PAIRS, TEMPLATES[:1], k=3, unembedding=other.numpy())
        cut = dynamic_scores(source, pairs, TEMPLATES[:1], k=3, n_valid_tokens=12)
        with pytest.raises(ValueError, match="target 13 is beyond n_valid_tokens=12"):
            dynamic_scores(source, PAIRS, TEMPLATES, n_valid_tokens=12)
        with pytest.raises(ValueError, match=r"n_valid_tokens must be from 1 to 17, got 18"):
            dynamic_scores(source, PAIRS, TEMPLATES, n_valid_tokens=18)
        with pytest.raises(ValueError, match=r"unembedding has shape \(24, 17\); expected"):
            dynamic_scores(source, PAIRS, TEMPLATES, unembedding=other.T)
    expected = dense_scores(tensors, TEMPLATES[0], 3, other.double().T)
    np.testing.assert_allclose(as_array(table, 3, "template 0"), expected, atol=1e-7)
    hits = torch.zeros(N_LAYERS, N_HEADS)
    for source, target in pairs:
        _, written = dense_outputs(tensors, *dense_prompt(TEMPLATES[0], source))
        logits = (written @ tensors["unembed.W_U"].double())[..., 1, :12]
        hits += (logits.topk(3).indices == target).any(-1)
    found = as_array(cut, 3, "template 0")[..., 1, 0]
    np.testing.assert_allclose(found, hits / len(pairs), atol=1e-7)


def hugging_face_reference(module, attention, prompts, n_kv_heads):
    """Values of the source and outputs at the last position of every head, by forward hooks."""
    n_heads, seen = module.config.num_attention_heads, []
    handles = []
    for layer in attention(module):
        handles += [
            layer.v_proj.register_forward_hook(lambda _, __, out: seen.append(out.detach())),
            layer.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())),
        ]
    rows = []
    for tokens, source in prompts:
        seen.clear()
        with torch.no_grad():
            module(torch.tensor([tokens]))
        layers = []
        for values, outputs, layer in zip(seen[::2], seen[1::2], attention(module), strict=True):
            w_o = layer.o_proj.weight.detach().T.unflatten(0, (n_heads, -1))
            own = values[0, source].view(n_kv_heads, -1)
            own = own.repeat_interleave(n_heads // n_kv_heads, dim=0)
            z = torch.stack([own, outputs[0, -1].view(n_heads, -1)], dim=1)
            layers.append(z @ w_o)
        rows.append(torch.stack(layers))
    for handle in handles:
        handle.remove()
    return torch.stack(rows)


def test_grouped_heads_rotary_positions_and_gated_mlps():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=16,
        intermediate_size=20,
        vocab_size=40,
        max_position_embeddings=16,
    )
    module = transformers.LlamaForCausalLM(config).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pairs = [(a, (3 * a + 1) % 40) for a in range(40)]
    prompts = [([1, 5, a, 7], 2) for a, _ in pairs]
    table = dynamic_scores(module, pairs, [([1, 5], [7])], k=10)
    written = hugging_face_reference(
        module, lambda m: [x.self_attn for x in m.model.layers], prompts, 2
    )
    logits = written @ module.lm_head.weight.detach().T
    targets = torch.tensor([b for _, b in pairs]).view(-1, 1, 1, 1, 1)
    for context, place in ((ALONE, 0), (WITHIN, 1)):
        for feature, sign in (("operation", 1), ("-operation", -1)):
            top = (sign * logits).topk(10).indices == targets
            expected = top.any(-1).double().mean(0)[..., place].flatten()
            rows = table[(table["context"] == context) & (table["feature"] == feature)]
            np.testing.assert_allclose(rows["score"], expected, atol=1e-7)
            assert rows.index.tolist() == [f"L{i}H{h}" for i in range(2) for h in range(4)]
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_the_model_is_left_as_it_was():
    bridge = running.open_bridge(BUNDLED)
    tokens = torch.arange(12)[None]
    first = bridge(tokens)
    copying = [(token, token) for token in range(20)]
    dynamic_scores(bridge, copying, [([64], [3])], k=1)
    ablate(bridge, ["L1H1", "L0H0"], copying, [([64], [3])], n_random=1)
    torch.testing.assert_close(bridge(tokens), first, rtol=0, atol=0)


N_WORDS, N_PLACES = 40, 4


@pytest.fixture(scope="module")
def planted():
    """Two heads look one token back: L0H1 writes the next word of what it sees, L0H2 the same.

    Words are unit vectors, and so are positions in the dimensions behind them.
    """
    d_model = N_WORDS + N_PLACES
    eye = torch.eye(d_model)
    tensors = {name: 0.01 * t for name, t in random_weights(1, 4, d_model, d_model).items()}
    for head in (1, 2):
        look = torch.zeros(d_model, d_model)
        for place in range(1, N_PLACES):
            look[N_WORDS + place, N_WORDS + place - 1] = 300
        tensors["blocks.0.attn.W_Q"][head] = look
        tensors["blocks.0.attn.W_K"][head] = eye
        tensors["blocks.0.attn.W_V"][head] = eye
    words = torch.arange(N_WORDS)
    tensors["blocks.0.attn.W_O"][1:3] = 0
    tensors["blocks.0.attn.W_O"][1, words, (words + 1) % N_WORDS] = 5
    tensors["blocks.0.attn.W_O"][2, words, words] = 2
    tensors["embed.W_E"] = eye[:N_WORDS].clone()
    tensors["pos_embed.W_pos"] = eye[N_WORDS:].clone()
    tensors["unembed.W_U"] = eye[:, :N_WORDS].clone()
    with registered(tensors) as heads:
        yield heads["source"].iloc[0]


NEXT = [(word, (word + 1) % N_WORDS) for word in range(N_WORDS)]
SAME = [(word, word) for word in range(N_WORDS)]


def test_planted_operations_are_found(planted):
    found = dynamic_scores(planted, {"next": NEXT, "same": SAME}, [([3], [5])], k=1)
    for feature, head in (("next", "L0H1"), ("same", "L0H2")):
        for context in (ALONE, WITHIN):
            scores = found[(found["feature"] == feature) & (found["context"] == context)]["score"]
            assert scores[head] == 1
            assert (scores.drop(head) < 0.2).all()


def test_attention_matters_only_with_context(planted):
    elsewhere = dynamic_scores(planted, NEXT, [([3], [5, 7])], k=1)
    scores = elsewhere[elsewhere["feature"] == "operation"].set_index("context", append=True)
    assert scores.loc[("L0H1", ALONE), "score"] == 1
    assert scores.loc[("L0H1", WITHIN), "score"] == 1 / N_WORDS


def test_ablation_takes_the_operation_and_nothing_else(planted):
    table = ablate(
        planted,
        ["L0H1", (0, 2)],
        {"next": NEXT},
        [([3], [5])],
        controls={"same": (SAME, [([3], [5])])},
    )
    curves = {kind: rows["accuracy"].tolist() for kind, rows in table.groupby("kind")}
    assert curves["operation"] == [1, 0, 1 / N_WORDS]
    assert curves["control"] == [0, 1, 1 / N_WORDS]
    assert curves["random"] == [1] * 10
    assert set(table["operation"]) == {"next", "same"}
    assert (table["n_prompts"] == N_WORDS).all()


def test_counts_and_random_heads_follow_what_is_there(planted):
    three = ["L0H1", "L0H2", "L0H3"]
    table = ablate(planted, three, NEXT, [([3], [5])], counts=[3, 1], n_random=2)
    numbers = table.groupby("kind")["n_removed"].apply(lambda column: sorted(set(column)))
    assert numbers["operation"] == [0, 1, 3]
    assert numbers["random"] == [1]
    again = ablate(planted, three, NEXT, [([3], [5])], counts=[3, 1], n_random=2)
    pd.testing.assert_frame_equal(table, again)


def test_ablation_is_that_of_heads_silenced_at_the_last_position():
    tensors = toy_model()
    order = [(1, 2), (0, 0), (0, 2), (1, 0)]
    tokens, source = dense_prompt(TEMPLATES[0], 10)
    finals = [
        int(dense_outputs(tensors, tokens, source, order[:number])[0].argmax())
        for number in range(len(order) + 1)
    ]
    assert len(set(finals)) > 1
    with registered(tensors) as heads:
        for target in set(finals):
            table = ablate(
                heads["source"].iloc[0], order, [(10, target)], TEMPLATES[:1], n_random=0
            )
            assert table["accuracy"].tolist() == [float(final == target) for final in finals]


def test_a_bridge_whose_hooks_change_nothing_is_refused(monkeypatch):
    bridge = running.open_bridge(BUNDLED)
    run = bridge.run_with_hooks

    def without_hooks(tokens, *, fwd_hooks, **settings):
        return run(tokens, **settings)

    monkeypatch.setattr(bridge, "run_with_hooks", without_hooks)
    with pytest.raises(UnsupportedLayoutError, match="still reads the token before when all its"):
        ablate(bridge, ["L0H0"], [(1, 2)], [([64], [3])])
    with pytest.raises(UnsupportedLayoutError, match="does not show pattern, values and outputs"):
        dynamic_scores(bridge, [(1, 2)], [([64], [3])])


def test_heads_that_write_more_than_attention_times_values_are_refused():
    bridge = running.open_bridge(BUNDLED)

    def add_one(value, hook):
        return value + 1

    bridge.blocks[1].attn.o.hook_in.add_hook(add_one)
    with pytest.raises(UnsupportedLayoutError, match="is not what the heads of layer 1 write"):
        dynamic_scores(bridge, [(1, 2)], [([64], [3])])


class Letters:
    """A tokenizer of characters that puts token 1 in front unless told otherwise."""

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(letter) - 30 for letter in text]


def test_text_prompts_know_where_the_source_ends():
    prompter = Prompter(Letters(), True, "auto", "test")
    (prompt,) = prompter.write([([33, 34], 7)], ["ab <X> cd"], "x")
    plain = Letters().encode
    front = plain("ab", add_special_tokens=False)
    assert prompt.tokens == (1, *front, 33, 34, *plain(" cd", add_special_tokens=False))
    assert prompt.source == 4
    short = Prompter(lambda text: [len(word) for word in text.split(" ")], False, 9, "test")
    (prompt,) = short.write([("word", "abc")], ["The <X> is here"], "x")
    assert prompt.tokens == (9, 3, 4, 2, 4) and prompt.source == 2 and prompt.target == 3
    bare = Prompter(Letters(), False, None, "test")
    (prompt,) = bare.write([("yz", "q")], ["<X>"], "x")
    assert prompt.tokens == tuple(plain("yz", add_special_tokens=False)) and prompt.source == 1


def test_prompts_of_the_gpt2_tokenizer(gpt2_path):
    pytest.importorskip("tokenizers")
    prompter = Prompter(gpt2_path, True, "auto", "test")
    pairs = [("France", "Paris"), ("Liechtenstein", "Berlin")]
    prompts = prompter.write(pairs, dynamics.TEMPLATES, "capital")
    assert [prompt.template for prompt in prompts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [prompt.source for prompt in prompts[::2]] == [1, 3, 5, 4]
    vocabulary = json.loads((Path(gpt2_path) / "vocab.json").read_text(encoding="utf-8"))
    assert prompts[0].target == vocabulary["\u0120Paris"]
    assert all(p.tokens[p.source] == vocabulary["\u0120France"] for p in prompts[::2])
    last = {p.tokens[p.source] for p in prompts[1::2]}
    assert len(last) == 1 and last != {vocabulary["\u0120France"]}
    assert len(prompts[1].tokens) > len(prompts[0].tokens)
    several = multi_token_pairs([*pairs, ("Luxembourg", "Luxembourg"), ("oil", "x y")], gpt2_path)
    assert [target for _, target in several] == [
        vocabulary["\u0120Berlin"],
        vocabulary["\u0120Luxembourg"],
    ]


def stories_encoder(path):
    """The byte-pair encoding of stories260k: the pair of the best score is merged first."""
    entries = json.loads((path / "tokens.json").read_text(encoding="utf-8"))[3:]
    tokens = {e["text"]: e for e in entries if not e["text"].startswith("<0x")}

    def encode(text):
        parts = list(text)
        while True:
            merged = [
                (tokens[a + b]["score"], -place)
                for place, (a, b) in enumerate(pairwise(parts))
                if a + b in tokens
            ]
            if not merged:
                return [tokens[part]["id"] for part in parts]
            place = -max(merged)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]

    return encode, list(tokens)


def test_static_scores_of_a_trained_model_hold_in_action(models_dir):
    path = models_dir / "stories260k"
    encode, texts = stories_encoder(path)
    words = [text[1:] for text in texts if text[:1] == " " and text[1:].isalpha() and text[2:]]
    assert encode(" Lily") == [317] and len(words) == 61
    operations = {
        "copying": [(word, word) for word in words],
        "first": [(word, word[0]) for word in words if f" {word[0]}" in texts],
        "capital": [(c, c.upper()) for c in "stmbohiu" if f" {c.upper()}" in texts],
    }
    templates = ["Once upon a time there was a <X>", "Tim said that <X>", "They saw the <X>"]
    found = {}
    for name, pairs in operations.items():
        dynamic = dynamic_scores(path, {name: pairs}, templates, encode, bos_token=1)
        mapper = OperationMapper({name: pairs}, encode, k=10, copying_k=10, min_pairs=1)
        found[name] = compare_scores(mapper.fit_transform(skhead.load_heads(path)), dynamic)
    table = pd.concat(found.values())
    alone = table.xs(ALONE, level="context")
    within = table.xs(WITHIN, level="context")
    assert len(table) == 12 and (alone["n_heads"] == 40).all() and (alone["n_templates"] == 3).all()
    assert (alone["pearson"] > 0.2).all() and alone["pearson"].mean() > 0.4
    assert (alone["overlap"] > alone["chance"]).all()
    assert alone["pearson"].mean() > within["pearson"].mean() + 0.2


def test_ranking_is_that_of_the_published_lists():
    rng = np.random.default_rng(0)
    labels = [f"L{i // 16}H{i % 16}" for i in range(384)]
    scores = pd.Series(rng.integers(0, 4, 384) / 4, index=labels)
    order = np.argsort(scores.to_numpy(), kind="stable")[::-1]
    assert rank_heads(scores) == [labels[i] for i in order[:50]]
    assert len(rank_heads(scores[:100])) == 30
    assert rank_heads(scores, n=384) == [labels[i] for i in order if scores.iloc[i] > 0]
    assert rank_heads(scores * 0) == []
    with pytest.raises(ValueError, match="the score of L0H3 is not finite"):
        rank_heads(scores.mask(scores.index == "L0H3"))
    with pytest.raises(ValueError, match="n must be an integer of at least 1; got 0"):
        rank_heads(scores, n=0)


@pytest.mark.parametrize(
    "operation, templates, options, error, message",
    [
        ([], [([1], [])], {}, ValueError, "operation 'operation' has no pairs"),
        ({}, [([1], [])], {}, ValueError, "there is no operation in the mapping"),
        ({"-x": [(1, 2)]}, [([1], [])], {}, ValueError, "do not begin with '-', .* got '-x'"),
        ([(1, 2, 3)], [([1], [])], {}, ValueError, r"pair 0 .* is \(1, 2, 3\), not a source"),
        ("ab", [([1], [])], {}, TypeError, "must be a list of .source, target. pairs, got str"),
        ([(1, 2.5)], [([1], [])], {}, TypeError, "must be words or token ids, got 2.5"),
        ([(1.5, 2)], [([1], [])], {}, TypeError, "token ids must be integers, .* got 1.5"),
        ([((), 2)], [([1], [])], {}, ValueError, r"source \(\) has no tokens"),
        (
            [(1, 99)],
            [([1], [])],
            {},
            ValueError,
            "target 99 is none of the model's tokens, 0 to 67",
        ),
        ([(1, 2)], [], {}, ValueError, "give at least one template"),
        ([(1, 2)], "The <X>", {}, ValueError, "give at least one template, in a list"),
        ([(1, 2)], [[1, 2, 3]], {}, TypeError, "a pair of lists of token ids"),
        ([(1, 2)], ["The X"], {}, ValueError, "must hold <X> once, it holds it 0 times"),
        ([(1, 2)], ["The <X>"], {}, TypeError, "the text 'The' needs a tokenizer"),
        ([(1, "ab")], [([1], [])], {"tokenizer": Letters()}, ValueError, "' ab' .* is 3 tokens"),
        ([(1, 2)], [([1], [])], {"k": 0}, ValueError, "k must be an integer of at least 1; got 0"),
        ([(1, 2)], [([1], [])], {"k": [2, 2]}, ValueError, r"distinct numbers, got \[2, 2\]"),
        ([(1, 2)], [([1], [])], {"k": {"a": 1}}, ValueError, "no number for operation 'operation'"),
        ([(1, 2)], [([1], [])], {"bos_token": "<s>"}, TypeError, "bos_token must be a token id"),
        ([(1, 2)], [([99], [])], {}, ValueError, "sequence 0 holds token 99"),
    ],
)
def test_bad_input(operation, templates, options, error, message):
    with pytest.raises(error, match=f"dynamic_scores: .*{message}"):
        dynamic_scores(BUNDLED, operation, templates, **options)


def test_a_source_that_merges_with_what_follows():
    with pytest.raises(ValueError, match="no token ends where the source 'wo' ends"):
        dynamic_scores(
            BUNDLED,
            [("wo", 3)],
            ["The <X>rd"],
            lambda text: [len(word) for word in text.split(" ")],
        )


@pytest.mark.parametrize(
    "heads, options, error, message",
    [
        ("L1H1", {}, TypeError, "heads must be a list of labels"),
        ([], {}, ValueError, "heads is empty"),
        (["L2H0"], {}, HeadTableError, "'L2H0' is no head of the model; it has layers 0 to 1"),
        (["first"], {}, HeadTableError, "'first' is no head"),
        ([(0, 1), "L0H1"], {}, HeadTableError, "head 'L0H1' is named twice"),
        (["L1H1"], {"counts": [2]}, ValueError, "counts must be from 0 to the 1 heads given"),
        (
            ["L1H1"],
            {"counts": [0.5]},
            ValueError,
            "counts must be an integer of at least 0; got 0.5",
        ),
        (["L1H1"], {"n_random": -1}, ValueError, "n_random must be an integer of at least 0"),
        (["L1H1"], {"operation": {"a": [(1, 2)], "b": [(1, 2)]}}, ValueError, "holds a, b; give"),
        (["L1H1"], {"templates": [([], [])]}, ValueError, "has 1 tokens; at least 2 are needed"),
    ],
)
def test_bad_ablations(heads, options, error, message):
    settings = {"operation": [(1, 2)], "templates": [([64], [])]} | options
    with pytest.raises(error, match=message):
        ablate(BUNDLED, heads, **settings)


def test_activations_that_overflow():
    tensors = toy_model()
    tensors["blocks.1.attn.W_V"] = tensors["blocks.1.attn.W_V"].sign() * 3e38
    with (
        registered(tensors) as heads,
        pytest.raises(ValueError, match="heads of layer 1 write NaN or infinite values"),
    ):
        dynamic_scores(heads["source"].iloc[0], PAIRS, TEMPLATES)
    tensors = toy_model()
    tensors["unembed.W_U"] = tensors["unembed.W_U"].sign() * 3e38
    with (
        registered(tensors) as heads,
        pytest.raises(ValueError, match="logits are NaN or infinite when 0 heads write nothing"),
    ):
        ablate(heads["source"].iloc[0], ["L0H0"], PAIRS, TEMPLATES)


def test_labels_agree_with_the_heads_table():
    table = dynamic_scores(BUNDLED, [(1, 2)], [([64], [])])
    assert list(dict.fromkeys(table.index)) == skhead.load_heads(BUNDLED).index.tolist()


def test_pairs_that_are_none_are_named():
    prompter = Prompter(None, False, None, "f")
    for pair in (1, "ab", (1, 2, 3), None):
        with pytest.raises(ValueError, match=r"f: pair 1 of operation 'op' is .*, not a source"):
            prompter.write([(1, 2), pair], [([1], [2])], "op")
