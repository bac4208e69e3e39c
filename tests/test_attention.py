"""Queries and keys of running models against the models' own attention, and written scores."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ZOO, fresh_model

import skhead
from skhead import ContrastiveQKDecomposer, QKPrompts, collect_qk, intervene_on_model
from skhead.exceptions import HeadShapeError, HeadTableError, UnsupportedLayoutError
from skhead.weights import running
from skhead.weights.running import open_bridge

pytest.importorskip("transformer_lens")
transformers = pytest.importorskip("transformers")

BUNDLED = "skhead/induction-2l"
FAMILIES = ["gpt2", "gpt_neox", "llama", "qwen3"]
#: Models whose attention is computed in yet other places, or with another scale.
OTHERS = ["gpt_neo", "gptj", "opt", "phi", "phi3", "gemma3_text", "mixtral"]
DOORS = ["module", "bridge"]
#: Lengths and query positions differ, and batches regroup them.
SEQUENCES = [[1, 2, 3, 4, 5, 6], [3, 1, 4], [9, 2, 6, 5, 3, 5], [8, 8, 1, 7], [2, 7, 1]]
QUERIES = [5, 2, 3, 3, 1]
LABELS = [["L2H1", (0, 3)], ["L2H1", "L0H3"]]


def whole_prompts(sequences=SEQUENCES, queries=QUERIES):
    """Every token up to the query is a key, so that attention is the softmax of all scores."""
    return QKPrompts(
        tokens=sequences,
        query_positions=queries,
        key_positions=[range(at + 1) for at in queries],
        query_labels=[row[at] for row, at in zip(sequences, queries, strict=True)],
        key_labels=[row[: at + 1] for row, at in zip(sequences, queries, strict=True)],
        key_groups=[range(at + 1) for at in queries],
        features=["token"],
        key_names=[
            [str(t) for t in row[: at + 1]] for row, at in zip(sequences, queries, strict=True)
        ],
    )


@pytest.fixture
def recording():
    """Attention of transformers' own modules, which shows what it takes and may change keys."""
    state = {"seen": {}, "edit": None}

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        state["seen"][module.layer_idx] = query.detach(), key.detach()
        group = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
        scores = query @ key.mT * scaling
        if state["edit"] is not None and state["edit"]["layer"] == module.layer_idx:
            head, at, (o, t), projector = (state["edit"][n] for n in ("head", "at", "keys", "P"))
            moved = (key[0, head, t] - key[0, head, o]) @ projector
            q = query[0, head, at]
            scores[0, head, at, o] = q @ (key[0, head, o] + moved) * scaling
            scores[0, head, at, t] = q @ (key[0, head, t] - moved) * scaling
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(later, -torch.inf).softmax(-1)
        state["pattern"] = state.get("pattern", {}) | {module.layer_idx: pattern.detach()}
        return (pattern @ value).transpose(1, 2).contiguous(), pattern

    transformers.AttentionInterface.register("skhead-recording", attend)
    transformers.AttentionMaskInterface.register(
        "skhead-recording", transformers.masking_utils.eager_mask
    )
    return state


def recorded(module):
    """A copy of the module that attends as `recording` says."""
    module = copy.deepcopy(module)
    module.set_attn_implementation("skhead-recording")
    return module


#: What makes scores larger, where it is not the norm in front of the heads.
SHARPENED = {"qwen3": "model.layers.{i}.self_attn.q_norm"}


def opened(family, door):
    """A model whose heads in layer 1 attend sharply and write much."""
    module, spec = fresh_model(ZOO[family]), ZOO[family]
    with torch.no_grad():
        for name, factor in ((spec.out, 30), (SHARPENED.get(family, spec.norm), 6)):
            module.get_submodule(name.format(i=1)).weight.mul_(factor)
    return module, module if door == "module" else open_bridge(module)


def rows_of(pairs):
    """Softmax of the scores of each query over its keys."""
    scores = pairs.logits().astype(np.float64)
    parts = [scores[pairs.query_index == i] for i in range(len(pairs))]
    return [np.exp(part - part.max()) / np.exp(part - part.max()).sum() for part in parts]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_the_models_own_attention(family, door, recording):
    module, model = opened(family, door)
    prompts = whole_prompts()
    found = collect_qk(model, prompts, LABELS[0])
    assert list(found) == LABELS[1]
    reference = recorded(module)
    module.set_attn_implementation("eager")
    for label, (layer, head) in zip(LABELS[1], [(2, 1), (0, 3)], strict=True):
        pairs = found[label]
        assert pairs.head == label and pairs.scale == ZOO[family].d_head ** -0.5
        rows = rows_of(pairs)
        for number, (tokens, at) in enumerate(zip(SEQUENCES, QUERIES, strict=True)):
            with torch.no_grad():
                reference(torch.tensor([tokens]))
                out = module(torch.tensor([tokens]), output_attentions=True)
            query, key = recording["seen"][layer]
            group = query.shape[1] // key.shape[1]
            own = pairs.keys[pairs.query_index == number]
            close = {"atol": 2e-5, "rtol": 1e-4}
            np.testing.assert_allclose(pairs.queries[number], query[0, head, at], **close)
            np.testing.assert_allclose(own, key[0, head // group, : at + 1], **close)
            expected = out.attentions[layer][0, head, at, : at + 1]
            np.testing.assert_allclose(rows[number], expected, atol=1e-5)


@pytest.mark.parametrize("family", OTHERS)
def test_attention_of_other_families_is_the_softmax_of_their_scores(family):
    module = fresh_model(ZOO[family])
    label = f"L{ZOO[family].n_layers - 1}H2"
    rows = rows_of(collect_qk(module, whole_prompts(), [label])[label])
    module.set_attn_implementation("eager")
    for row, tokens, at in zip(rows, SEQUENCES, QUERIES, strict=True):
        with torch.no_grad():
            out = module(torch.tensor([tokens]), output_attentions=True)
        np.testing.assert_allclose(row, out.attentions[-1][0, 2, at, : at + 1], atol=1e-5)


@pytest.mark.parametrize("source", [BUNDLED, "skhead/zoo/rope-attn-2"])
def test_bundled_models_attend_with_their_scores(source):
    bridge = open_bridge(source)
    tokens = torch.randint(0, 64, (4, 20), generator=torch.Generator().manual_seed(3)).tolist()
    heads = [(layer, head) for layer in range(2) for head in range(bridge.cfg.n_heads)]
    found = collect_qk(source, whole_prompts(tokens, [19, 5, 12, 19]), heads)
    with torch.no_grad():
        _, seen = bridge.run_with_cache(torch.tensor(tokens))
    for (layer, head), pairs in zip(heads, found.values(), strict=True):
        for number, (row, at) in enumerate(zip(rows_of(pairs), [19, 5, 12, 19], strict=True)):
            np.testing.assert_allclose(
                row,
                seen[f"blocks.{layer}.attn.hook_pattern"][number, head, at, : at + 1],
                atol=1e-5,
            )


def test_a_trained_model_with_grouped_heads(models_dir):
    path = models_dir / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(3, 512, (3, 24), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 1
    heads = [f"L{layer}H{head}" for layer in range(5) for head in range(8)]
    found = collect_qk(path, whole_prompts(tokens.tolist(), [23, 10, 17]), heads)
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    for label, pairs in found.items():
        layer, head = int(label[1]), int(label[3])
        for number, (row, at) in enumerate(zip(rows_of(pairs), [23, 10, 17], strict=True)):
            expected = attentions[layer][number, head, at, : at + 1]
            np.testing.assert_allclose(row, expected, atol=2e-5)
    shared = [found["L2H4"].keys, found["L2H5"].keys, found["L2H6"].keys]
    assert np.array_equal(shared[0], shared[1]) and not np.allclose(shared[1], shared[2])
    table = intervene_on_model(
        path, whole_prompts(tokens.tolist(), [23, 10, 17]), Subspace(np.eye(8)), head="L2H4",
        n_random=2, random_state=0,
    )  # fmt: skip
    check_exchanged(table)


def test_labels_stay_with_their_prompts():
    prompts = whole_prompts()
    pairs = collect_qk(fresh_model(ZOO["llama"]), prompts, ["L1H0"])["L1H0"]
    index = [i for i, at in enumerate(QUERIES) for _ in range(at + 1)]
    assert pairs.query_index.tolist() == index
    assert pairs.query_labels[:, 0].tolist() == [6, 4, 5, 7, 7]
    taken = [token for row, at in zip(SEQUENCES, QUERIES, strict=True) for token in row[: at + 1]]
    assert pairs.key_labels[:, 0].tolist() == taken
    assert pairs.key_names.tolist() == [str(token) for token in taken]
    assert pairs.key_groups[:, 0].tolist() == [i for at in QUERIES for i in range(at + 1)]
    assert pairs.features == ("token",)
    alone = collect_qk(fresh_model(ZOO["llama"]), prompts[[3]], ["L1H0"])["L1H0"]
    np.testing.assert_allclose(pairs[[3]].keys, alone.keys, atol=1e-5)
    np.testing.assert_allclose(pairs[[3]].queries, alone.queries, atol=1e-5)


def test_single_prompts_give_what_batches_give(monkeypatch):
    bridge = open_bridge("skhead/zoo/rope-attn-2")
    prompts = whole_prompts()
    whole = collect_qk(bridge, prompts, ["L1H2"])["L1H2"]
    settings = {"head": "L1H2", "original": 0, "target": 1, "n_random": 2, "random_state": 1}
    table = intervene_on_model(bridge, prompts, Subspace(np.eye(16)[:, :3]), **settings)
    monkeypatch.setattr(running, "_LOGIT_NUMBERS", 1)
    single = collect_qk(bridge, prompts, ["L1H2"])["L1H2"]
    np.testing.assert_allclose(whole.keys, single.keys, atol=1e-5)
    np.testing.assert_allclose(whole.queries, single.queries, atol=1e-5)
    again = intervene_on_model(bridge, prompts, Subspace(np.eye(16)[:, :3]), **settings)
    pd.testing.assert_frame_equal(table, again, atol=1e-5)


class Subspace:
    """A stand-in for a fitted decomposer: features with given key subspaces."""

    def __init__(self, *bases, head=""):
        self.head_ = head
        self.feature_names_ = [f"f{i}" for i in range(len(bases))]
        self._bases = dict(zip(self.feature_names_, bases, strict=True))

    def key_subspace(self, *names):
        chosen = [self._bases[name] for name in names or self.feature_names_]
        return np.linalg.qr(np.concatenate(chosen, axis=1))[0]


def random_basis(d_head, rank, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d_head, rank)))[0]


def check_exchanged(table):
    """With all dimensions exchanged, the two keys exchange their attention."""
    rows = table
    full = rows.loc["f0"]
    assert full["attention_original"] == pytest.approx(full["attention_target_before"], abs=1e-5)
    assert full["attention_target"] == pytest.approx(full["attention_original_before"], abs=1e-5)
    assert full["flip_rate"] == 1 and full["rank_share"] == 1
    random = rows.loc[f"random (rank {int(full['rank'])})"]
    assert random["attention_target"] == pytest.approx(full["attention_target"], abs=1e-5)
    assert random["n_draws"] == 2 and full["n_draws"] == 1
    none = rows.loc["none"]
    assert none["shift"] == pytest.approx(0, abs=1e-5) and none["output_kl"] < 1e-6
    assert none["top1_changed"] == none["flip_rate"] == 0


#: Places of two keys of each of the sequences.
NUMBERS = {"original": [2, 0, 1, 3, 0], "target": [4, 2, 0, 1, 1]}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_intervention_is_that_of_keys_changed_inside_of_the_model(family, door, recording):
    module, model = opened(family, door)
    d_head = ZOO[family].d_head
    bases = {"f0": random_basis(d_head, 2), "f1": random_basis(d_head, 1, seed=1)}
    bases["all"] = np.linalg.qr(np.concatenate([*bases.values()], axis=1))[0]
    decomposer = Subspace(bases["f0"], bases["f1"], head="L1H2")
    found = intervene_on_model(model, whole_prompts(), decomposer, n_random=0, **NUMBERS)
    assert found.index.tolist() == ["none", "f0", "f1", "all"]
    assert found["rank"].tolist() == [0, 2, 1, 3]
    reference = recorded(module)
    for name, basis in bases.items():
        measures = []
        for tokens, at, o, t in zip(SEQUENCES, QUERIES, *NUMBERS.values(), strict=True):
            runs = []
            for projector in (None, torch.from_numpy(basis @ basis.T).float()):
                edit = {"layer": 1, "head": 2, "at": at, "keys": (o, t), "P": projector}
                recording["edit"] = None if projector is None else edit
                with torch.no_grad():
                    logits = reference(torch.tensor([tokens])).logits[0, -1]
                runs.append((recording["pattern"][1][0, 2, at], logits.double().log_softmax(-1)))
            (before, clean), (after, edited) = runs
            flipped = int(before.argmax()) == o and int(after.argmax()) == t
            measures.append(
                {
                    "attention_original": after[o],
                    "attention_target": after[t],
                    "attention_original_before": before[o],
                    "attention_target_before": before[t],
                    "shift": after[t] / (after[o] + after[t]) - before[t] / (before[o] + before[t]),
                    "flip_rate": flipped,
                    "output_kl": (clean.exp() * (clean - edited)).sum(),
                    "top1_changed": clean.argmax() != edited.argmax(),
                }
            )
        for measure in measures[0]:
            expected = np.mean([float(values[measure]) for values in measures])
            close = {"rel": 0.01, "abs": 1e-6} if measure == "output_kl" else {"abs": 1e-5}
            assert found.loc[name, measure] == pytest.approx(expected, **close), measure
    assert found["output_kl"].max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_all_dimensions_exchange_the_attention(family):
    prompts = replace(whole_prompts(), query_labels=[-1] * 5)
    full = Subspace(np.eye(ZOO[family].d_head), head="L2H0")
    table = intervene_on_model(fresh_model(ZOO[family]), prompts, full, n_random=2, random_state=0)
    check_exchanged(table)
    assert (table["n_prompts"] == 5).all()


@pytest.fixture(scope="module")
def induction():
    """Prompts that end with a token again; keys are the tokens behind three others."""
    rng = np.random.default_rng(0)
    words = rng.permuted(np.tile(np.arange(64), (500, 1)), axis=1)[:, :6]
    asked = words[np.arange(500), rng.integers(0, 3, 500) * 2]
    return QKPrompts(
        tokens=[[64, *row, last] for row, last in zip(words, asked, strict=True)],
        query_positions=[-1] * 500,
        key_positions=[[2, 4, 6]] * 500,
        query_labels=asked,
        key_labels=words[:, ::2],
        features=["token before"],
    )


def test_a_fitted_subspace_moves_the_induction_head_more_than_chance(induction):
    pairs = collect_qk(BUNDLED, induction[:400], ["L1H1"])["L1H1"]
    right = pairs.agreement[:, 0].reshape(-1, 3).argmax(1)
    assert (pairs.logits().reshape(-1, 3).argmax(1) == right).mean() > 0.98
    decomposer = ContrastiveQKDecomposer(rank=4).fit(pairs)
    settings = {"n_random": 4, "random_state": 3}
    table = intervene_on_model(BUNDLED, induction[400:], decomposer, **settings)
    again = intervene_on_model(BUNDLED, induction[400:], decomposer, **settings)
    pd.testing.assert_frame_equal(table, again)
    rows = table
    assert rows.index.tolist() == ["none", "token before", "random (rank 4)"]
    assert rows.loc["token before", "shift"] > 1.5 * rows.loc["random (rank 4)", "shift"] > 0
    assert rows.loc["token before", "output_kl"] > rows.loc["random (rank 4)", "output_kl"] > 0
    assert (rows["attention_original_before"] > 0.8).all() and (rows["n_prompts"] == 100).all()
    offline = decomposer.intervene(pairs, n_random=0).loc["token before"]
    assert rows.loc["token before", "flip_rate"] == pytest.approx(offline["flip_rate"], abs=0.15)


def test_conditions_and_random_subspaces_are_those_asked_for(induction):
    two = Subspace(random_basis(16, 2), random_basis(16, 3, seed=1), head="L1H1")
    few = {"random_state": 0, "n_random": 3}
    table = intervene_on_model(BUNDLED, induction[:5], two, conditions=["all", "f1"], **few)
    names = ["all", "f1", "random (rank 3)", "random (rank 5)"]
    assert table.index.tolist() == names
    assert table["rank"].tolist() == [5, 3, 3, 5]
    assert table["rank_share"].tolist() == [5 / 16, 3 / 16, 3 / 16, 5 / 16]
    assert table["n_draws"].tolist() == [1, 1, 3, 3]
    none = intervene_on_model(BUNDLED, induction[:5], two, conditions=["none"], **few)
    assert none.index.tolist() == ["none"]


def test_the_model_is_left_as_it_was(induction):
    bridge = open_bridge(BUNDLED).train()
    tokens = torch.tensor(induction.tokens[:3])
    with torch.no_grad():
        before = bridge(tokens)
        collect_qk(bridge, induction[:5], ["L1H1", "L0H0"])
        two = Subspace(random_basis(16, 2))
        intervene_on_model(bridge, induction[:5], two, head="L1H1", n_random=1)
        torch.testing.assert_close(bridge(tokens), before, rtol=0, atol=0)
    assert bridge.training
    assert not bridge.blocks[1].attn._forward_pre_hooks


def test_hidden_keys_are_named():
    spec = ZOO["gpt_neo"]
    local = fresh_model(replace(spec, sizes=spec.sizes | {"window_size": 2}))
    collect_qk(local, whole_prompts(), ["L0H0"])
    with pytest.raises(ValueError, match="L1H0 does not let the query of prompt 0, at 5, see the"):
        collect_qk(local, whole_prompts(), ["L1H0"])


@pytest.mark.parametrize(
    "family, message",
    [
        ("bloom", r"no product of queries and keys alone, as where a bias of positions \(ALiBi\)"),
        ("falcon-per-head", "attention scores of L0H1 .* differ by .* adds a bias of positions"),
        ("t5-decoder", "no single list of blocks"),
    ],
)
def test_scores_that_do_not_come_from_queries_and_keys_are_refused(family, message):
    with pytest.raises(UnsupportedLayoutError, match=f"collect_qk: .*{message}"):
        collect_qk(fresh_model(ZOO[family]), whole_prompts(), ["L0H1"])


def test_capped_scores_are_refused():
    spec = ZOO["gemma2"]
    module = fresh_model(replace(spec, sizes=spec.sizes | {"attn_logit_softcapping": 0.5}))
    with pytest.raises(UnsupportedLayoutError, match="differ by .* or caps them"):
        collect_qk(module, whole_prompts(), ["L1H3"])


def changed(change):
    """A hook that goes on with something else."""

    def hook_function(value, hook):
        return change(value)

    return hook_function


def test_hooks_that_decide_otherwise_are_refused(induction):
    bridge = open_bridge(BUNDLED)
    bridge.blocks[1].attn.hook_pattern.add_hook(changed(lambda pattern: pattern / 2))
    with pytest.raises(UnsupportedLayoutError, match="layer 1 .* does not weigh its values with"):
        collect_qk(bridge, induction[:3], ["L1H1"])
    bridge = open_bridge(fresh_model(ZOO["llama"]))
    bridge.blocks[1].attn.hook_attn_scores.add_hook(changed(lambda x: x + 3 * x.sin()))
    with pytest.raises(UnsupportedLayoutError, match="attention scores of L1H1 .* differ by"):
        collect_qk(bridge, whole_prompts(), ["L1H1"])


def test_a_model_that_answers_otherwise_each_time_is_refused(induction):
    bridge = open_bridge(BUNDLED)
    bridge.unembed.hook_out.add_hook(changed(lambda x: x + torch.randn_like(x)))
    with pytest.raises(UnsupportedLayoutError, match="it does not compute the same twice"):
        intervene_on_model(bridge, induction[:3], Subspace(np.eye(16)), head="L1H1", n_random=0)


def test_activations_that_overflow_are_named():
    module = fresh_model(ZOO["llama"])
    with torch.no_grad():
        module.model.layers[1].self_attn.k_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="keys of L1H0 hold NaN or infinite values"):
        collect_qk(module, whole_prompts(), ["L1H0"])


@pytest.mark.parametrize(
    "heads, error, message",
    [
        ("L1H1", TypeError, "heads must be a list of labels"),
        (["L2H0"], HeadTableError, "'L2H0' is no head of the model; it has layers 0 to 1"),
        (["L1H8"], HeadTableError, "'L1H8' is no head of the model"),
        (["L0H1", (0, 1)], HeadTableError, r"head \(0, 1\) is named twice"),
        ([], ValueError, "heads is empty"),
    ],
)
def test_heads_that_are_not_there(heads, error, message, induction):
    with pytest.raises(error, match=f"collect_qk: {message}"):
        collect_qk(BUNDLED, induction[:3], heads)


def test_prompts_that_do_not_fit(induction):
    with pytest.raises(TypeError, match="collect_qk: prompts must be QKPrompts, got list"):
        collect_qk(BUNDLED, [[1, 2, 3]], ["L1H1"])
    long = whole_prompts([[1] * 70], [69])
    with pytest.raises(ValueError, match="sequence 0 has 70 tokens, and the model's context is 64"):
        collect_qk(BUNDLED, long, ["L1H1"])
    with pytest.raises(ValueError, match="sequence 0 holds token 68"):
        collect_qk(BUNDLED, whole_prompts([[1, 68]], [1]), ["L1H1"])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"head": None}, ValueError, "without the label of a head; name it, such as head='L4H7'"),
        ({"head": "L9H0"}, HeadTableError, "'L9H0' is no head"),
        ({"n_random": -1}, ValueError, "n_random must be an integer of at least 0; got -1"),
        ({"conditions": ["f9"]}, ValueError, r"some of none, f0, all; got \['f9'\]"),
        ({"conditions": "f0"}, ValueError, "must be a list of some of none, f0, all"),
        ({"conditions": []}, ValueError, "must be a list of some of none, f0, all"),
        ({"original": 3}, ValueError, "original of query 0 is 3, and it has 3 keys"),
        ({"target": [0, 1]}, ValueError, r"one for each of the 3 queries, .* got shape \(2,\)"),
        ({"target": 1.0}, ValueError, r"target must be an integer, .* of float64"),
        ({"original": 1, "target": 1}, ValueError, "original and target of query 0 are one key"),
    ],
)
def test_bad_interventions(options, error, message, induction):
    settings = {"head": "L1H1", "n_random": 0} | options
    with pytest.raises(error, match=f"intervene_on_model: .*{message}"):
        intervene_on_model(BUNDLED, induction[:3], Subspace(np.eye(16)[:, :2]), **settings)


def test_prompts_without_another_key_are_not_dropped_in_silence(induction):
    labels = np.array(induction.key_labels)[:4]
    labels[2] = induction.query_labels[2]
    prompts = replace(induction[:4], key_labels=labels)
    basis = Subspace(np.eye(16)[:, :2])
    with pytest.raises(ValueError, match="1 prompts lack a key .* such as prompt 2; leave them"):
        intervene_on_model(BUNDLED, prompts, basis, head="L1H1")
    table = intervene_on_model(
        BUNDLED, prompts, basis, head="L1H1", original=0, target=2, n_random=0
    )
    assert (table["n_prompts"] == 4).all()


def test_decomposers_that_do_not_fit(induction):
    with pytest.raises(HeadShapeError, match="subspace of f0 has d_head 8, and the keys of L1H1"):
        intervene_on_model(BUNDLED, induction[:3], Subspace(np.eye(8)), head="L1H1")
    with pytest.raises(TypeError, match="must be a fitted ContrastiveQKDecomposer, got Contrast"):
        intervene_on_model(BUNDLED, induction[:3], ContrastiveQKDecomposer())
    named = Subspace(np.eye(16))
    named.feature_names_ = ["all"]
    with pytest.raises(ValueError, match="must not be named 'none' or 'all'"):
        intervene_on_model(BUNDLED, induction[:3], named, head="L1H1")


def test_public_names():
    assert skhead.collect_qk is collect_qk and skhead.intervene_on_model is intervene_on_model
