"""OperationMapper against dense circuits of small models, planted heads and its own null."""

from __future__ import annotations

import pickle
import uuid
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import skhead
from skhead import load_weights
from skhead.exceptions import (
    DegenerateHeadError,
    HeadShapeError,
    MemoryBudgetError,
    UnsupportedLayoutError,
)
from skhead.operations import OperationMapper
from tests.architectures import ZOO, fresh_model
from tests.toys import random_weights, registered

N_VOCAB = 60
KS = [1, 3, 10]
RNG = np.random.default_rng(0)
OPERATIONS = {
    "some": RNG.integers(0, N_VOCAB, (40, 2)),
    "others": np.stack([np.arange(35), RNG.integers(0, 4, 35)], axis=1),
    "copying": np.stack([np.arange(N_VOCAB)] * 2, axis=1),
}
LLAMA = ("model.layers.0.post_attention_layernorm", "model.layers.0.mlp")
#: Tied and conv1d; untied; grouped queries and a gated MLP; tied and scaled.
MODELS = {
    "gpt2": ("transformer.wte", "transformer.h.0.ln_2", "transformer.h.0.mlp"),
    "gpt_neox": (
        "gpt_neox.embed_in",
        "gpt_neox.layers.0.post_attention_layernorm",
        "gpt_neox.layers.0.mlp",
    ),
    "llama": ("model.embed_tokens", *LLAMA),
    "gemma": ("model.embed_tokens", *LLAMA),
}


@contextmanager
def _live(model):
    name = skhead.register_model(model, f"operations-{uuid.uuid4().hex[:8]}")
    try:
        yield skhead.load_heads(name)
    finally:
        skhead.unregister_model(name)


def _small(name):
    model = fresh_model(replace(ZOO[name], sizes={**ZOO[name].sizes, "vocab_size": N_VOCAB}))
    if not model.config.tie_word_embeddings:
        with torch.no_grad():
            rows = model.get_output_embeddings().weight
            rows[5] = rows[2] = rows[1]
    return model


def _dense(model, name, heads, kind):
    """All token circuits, ``(n_heads, n_vocab, n_vocab)``, from the modules of the model."""
    embedding, *block = MODELS[name]
    with torch.no_grad():
        raw = written = attrgetter(embedding)(model)(torch.arange(N_VOCAB))
        for module in block:
            written = attrgetter(module)(model)(written)
        vectors = {"raw": raw, "mlp0": written, "resid_post_mlp0": raw + written}[kind]
        unembedding = model.get_output_embeddings().weight.double().numpy()
    read, write = (load_weights(heads, role).astype(float) for role in "VO")
    first = (heads["layer"] == 0).to_numpy()[:, None, None]
    sources = np.where(first, raw.double().numpy(), vectors.double().numpy())
    return sources @ (read @ write.transpose(0, 2, 1)) @ unembedding.T


def _hits(circuits, pairs, k):
    """Whether target j is among the k largest of source i: all pairs of the operation."""
    rows = circuits[:, pairs[:, 0]]
    least = np.sort(rows, axis=2)[:, :, -k]
    scale = np.abs(rows).max(2)
    return rows[:, :, pairs[:, 1]] >= (least - 1e-9 * scale)[:, :, None]


@pytest.mark.parametrize("kind", ["raw", "mlp0", "resid_post_mlp0"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_sorted_dense_circuits(name, kind):
    model = _small(name)
    with _live(model) as heads:
        mapper = OperationMapper(OPERATIONS, k=KS, copying_k=2, source_embedding=kind).fit(heads)
        circuits = _dense(model, name, heads, kind)
        transformed = mapper.transform(heads)
    for operation, pairs in OPERATIONS.items():
        for sign, signed in (("", circuits), ("-", -circuits)):
            for k in [2] if operation == "copying" else KS:
                column = sign + operation + ("" if operation == "copying" else f"@{k}")
                hits = _hits(signed, pairs, k)
                score = np.diagonal(hits, axis1=1, axis2=2).mean(1)
                np.testing.assert_allclose(mapper.scores_[column], score)
                np.testing.assert_allclose(mapper.null_expectation_[column], hits.mean((1, 2)))
            rows = signed[:, pairs[:, 0]]
            own = np.take_along_axis(rows, pairs[None, :, 1:], axis=2)
            slack = 1e-9 * np.abs(rows).max(2, keepdims=True)
            above, below = (rows > own + slack).sum(2), (rows < own - slack).sum(2)
            np.testing.assert_array_equal(mapper.rank_of_target_[sign + operation], 1 + above)
            np.testing.assert_allclose(mapper.mrr_[sign + operation], (1 / (1 + above)).mean(1))
            auc = 0.5 + (below - above).mean(1) / (2 * (N_VOCAB - 1))
            np.testing.assert_allclose(mapper.auc_[sign + operation], auc)
    assert transformed.equals(mapper.scores_)
    assert mapper.get_feature_names_out().tolist() == list(mapper.scores_.columns)
    assert mapper.scores_.columns[:6].tolist() == [f"{s}some@{k}" for s in ("", "-") for k in KS]


def test_copy_score_of_ioi_normalises_what_is_read_and_written():
    """LayerNorms without biases around the head, applied row by row, give the same hits."""
    model = _small("gpt2")
    with torch.no_grad():
        for part in (model.transformer.ln_f, *(block.ln_1 for block in model.transformer.h)):
            part.bias.zero_()
    pairs = OPERATIONS["copying"]
    with _live(model) as heads:
        mapper = OperationMapper({"copying": pairs}, preset="ioi_copy_score").fit(heads)
        read, write = (load_weights(heads, role) for role in "VO")
        layers = heads["layer"].to_numpy()
    assert mapper.settings_["k"] == (5,)
    decoder = model.transformer
    with torch.no_grad():
        embedded = decoder.wte.weight
        stream = embedded + decoder.h[0].mlp(decoder.h[0].ln_2(embedded))
        for i, layer in enumerate(layers):
            source = decoder.h[layer].ln_1(stream if layer else embedded)
            written = source @ torch.tensor(read[i]) @ torch.tensor(write[i]).T
            logits = decoder.ln_f(written) @ decoder.wte.weight.T
            hits = (logits.topk(5, dim=1).indices == torch.arange(N_VOCAB)[:, None]).any(1)
            assert mapper.scores_.iloc[i, 0] == pytest.approx(hits.float().mean().item())


def test_several_models_and_any_order_of_heads_score_alike():
    with _live(_small("llama")) as one, _live(_small("gpt_neox")) as other:
        operations = {"some": OPERATIONS["some"]}
        apart = [OperationMapper(operations).fit(heads) for heads in (one, other)]
        table = pd.concat([one.iloc[::-1], other.iloc[3:]])
        table.index = [f"{i}" for i in range(len(table))]
        together = OperationMapper(operations).fit(table)
    expected = np.concatenate([apart[0].scores_.to_numpy()[::-1], apart[1].scores_.to_numpy()[3:]])
    np.testing.assert_array_equal(together.scores_, expected)
    np.testing.assert_array_equal(
        together.auc_, np.concatenate([apart[0].auc_[::-1], apart[1].auc_[3:]])
    )


def test_memory_that_holds_one_operation_at_a_time_changes_nothing():
    with _live(_small("llama")) as heads:
        free = OperationMapper(OPERATIONS).fit(heads)
        least = (96 << 20) + 4 * N_VOCAB * 8 + 16 * 60 + 10
        tight = OperationMapper(OPERATIONS, max_memory=least).fit(heads)
        assert tight.log10_p_.equals(free.log10_p_)
        with pytest.raises(MemoryBudgetError, match="operation 'some' of .* sources needs"):
            OperationMapper(OPERATIONS, max_memory="1MiB").fit(heads)


def _random_model(n_layers=4, n_vocab=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = random_weights(n_layers=n_layers, n_heads=8, d_model=32, d_head=8, seed=seed)
    tensors["embed.W_E"] = torch.randn(n_vocab, 32, generator=generator)
    tensors["unembed.W_U"] = torch.randn(32, n_vocab, generator=generator)
    return tensors


def test_p_values_of_random_heads_are_never_too_small():
    """On average lift is 0, and a p-value below a is no more frequent than a."""
    rng = np.random.default_rng(0)
    operations = {f"random {i}": rng.integers(0, 400, (40, 2)) for i in range(12)}
    with registered(_random_model()) as heads:
        mapper = OperationMapper(operations, source_embedding="raw", k=[5, 40]).fit(heads)
    p = 10 ** mapper.log10_p_.to_numpy()
    assert ((p > 0) & (p <= 1)).all()
    for level in (0.001, 0.01, 0.05, 0.2):
        assert (p <= level).mean() <= level
    assert (p <= 0.2).any()
    assert abs(mapper.lift_.to_numpy().mean()) < 0.003
    assert len(mapper.implementing()) == 0


def test_p_value_is_near_that_of_drawn_permutations():
    tensors = _random_model()
    rng = np.random.default_rng(1)
    pairs = rng.integers(0, 400, (40, 2))
    with registered(tensors) as heads:
        mapper = OperationMapper({"random": pairs}, source_embedding="raw", k=12).fit(heads)
        read, write = (load_weights(heads, role).astype(float) for role in "VO")
    sources = tensors["embed.W_E"].double().numpy()
    circuits = sources @ read @ write.transpose(0, 2, 1) @ tensors["unembed.W_U"].double().numpy()
    hits = _hits(circuits, pairs, 12)
    order = np.argsort(rng.random((20_000, 40)), axis=1)
    ratios = []
    for head in range(len(heads)):
        drawn = hits[head][np.arange(40), order].mean(1)
        expectation = mapper.null_expectation_["random"].iloc[head]
        assert drawn.mean() == pytest.approx(expectation, abs=3e-3)
        simulated = (drawn >= mapper.scores_["random"].iloc[head] - 1e-12).mean()
        bound = 10 ** mapper.log10_p_["random"].iloc[head]
        assert bound >= 0.9 * simulated
        if simulated < 0.2:
            ratios.append(bound / simulated)
    assert len(ratios) >= 1
    assert max(ratios) < 4


@pytest.fixture
def stories(models_dir):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(models_dir / "stories260k").eval()


def _distinct_tokens(model, count):
    """The tokens that linear maps tell best from all others; many were never trained."""
    with torch.no_grad():
        left = torch.linalg.svd(model.lm_head.weight, full_matrices=False)[0]
    return left.square().sum(1).argsort(descending=True)[:count]


def _head_of(model, layer, head):
    """Views of W_V^T and W_O^T of one head."""
    attention, d_head = model.model.layers[layer].self_attn, model.config.head_dim
    group = head // (model.config.num_attention_heads // model.config.num_key_value_heads)
    values = attention.v_proj.weight[group * d_head : (group + 1) * d_head]
    return values, attention.o_proj.weight[:, head * d_head : (head + 1) * d_head]


def _behind_mlp(model, tokens):
    first = model.model.layers[0]
    return first.mlp(first.post_attention_layernorm(model.model.embed_tokens.weight[tokens]))


def _plant(model, layer, head, sources, targets):
    """Train one head alone, its values and outputs, to lead from sources to targets."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens, triangle = torch.linalg.qr(model.lm_head.weight)
        values, outputs = _head_of(model, layer, head)
    codes = torch.randn(len(sources), values.shape[0], generator=generator, requires_grad=True)
    faces = torch.randn(outputs.shape, generator=generator, requires_grad=True)
    optimiser = torch.optim.Adam([codes, faces], lr=0.1)
    for _ in range(500):
        optimiser.zero_grad()
        logits = codes @ faces.T @ tokens.T
        torch.nn.functional.cross_entropy(logits, targets).backward()
        optimiser.step()
    with torch.no_grad():
        values.copy_((torch.linalg.pinv(_behind_mlp(model, sources)) @ codes).T)
        outputs.copy_(torch.linalg.solve(triangle, faces))


def _plant_constant(model, layer, head, sources, targets):
    """Let one head write towards the same targets whatever source it reads."""
    with torch.no_grad():
        values, outputs = _head_of(model, layer, head)
        code = torch.ones(len(sources), values.shape[0])
        values.copy_((torch.linalg.pinv(_behind_mlp(model, sources)) @ code).T)
        unembedding = model.lm_head.weight
        towards = torch.linalg.solve(unembedding.T @ unembedding, unembedding[targets].sum(0))
        outputs.copy_(towards[:, None].expand_as(outputs))


def test_planted_operation_of_a_trained_model_is_found(stories):
    generator = torch.Generator().manual_seed(0)
    order = _distinct_tokens(stories, 100)[torch.randperm(100, generator=generator)]
    sources, targets = order[:32], order[32:64]
    _plant(stories, 3, 5, sources, targets)
    pairs = torch.stack([sources, targets], dim=1).tolist()
    rng = np.random.default_rng(0)
    control = rng.permutation(np.arange(3, 503))[:64].reshape(32, 2)
    with _live(stories) as heads:
        mapper = OperationMapper({"planted": pairs, "control": control}, k=2).fit(heads)
    assert mapper.lift_.loc["L3H5", "planted"] > 0.9
    assert mapper.q_.loc["L3H5", "planted"] < 0.01
    found = mapper.implementing()
    assert found[["head", "operation"]].to_numpy().tolist()[0] == ["L3H5", "planted"]
    assert not found["operation"].str.contains("control").any()


def test_a_head_of_constant_output_scores_high_and_is_not_called(stories):
    generator = torch.Generator().manual_seed(1)
    order = _distinct_tokens(stories, 104)
    sources, targets = order[4:][torch.randperm(100, generator=generator)[:40]], order[:4]
    _plant_constant(stories, 2, 6, sources, targets)
    pairs = torch.stack([sources, targets.repeat(10)], dim=1).tolist()
    with _live(stories) as heads:
        mapper = OperationMapper({"pronoun-like": pairs}).fit(heads)
    assert mapper.scores_.loc["L2H6", "pronoun-like"] > 0.95
    assert abs(mapper.lift_.loc["L2H6", "pronoun-like"]) < 0.02
    assert mapper.q_.loc["L2H6", "pronoun-like"] > 0.5
    assert "L2H6" not in mapper.implementing()["head"].to_numpy()


WORDS = {" one": [1], " two": [2], " three": [3], " eleven": [4, 5], "one": [6], "two": [7]}


def test_words_become_tokens_and_what_is_dropped_is_counted():
    operations = {
        "next": [("one", "two"), ("two", "three"), ("ten", "eleven")],
        "few": [("one", "eleven")],
    }
    encode = lambda text: WORDS.get(text, [8, 9])  # noqa: E731
    with registered(_random_model()) as heads:
        mapper = OperationMapper(operations, encode, source_embedding="raw", min_pairs=2)
        with pytest.warns(UserWarning, match=r"fewer than 2 .* left out: few \(0 of 1\)"):
            mapper.fit(heads)
        bare = OperationMapper(
            {"next": [("one", "two")]},
            encode,
            leading_space=False,
            min_pairs=1,
            source_embedding="raw",
        ).fit(heads)
    assert mapper.token_ids_["next"].tolist() == [[1, 2], [2, 3]]
    assert bare.token_ids_["next"].tolist() == [[6, 7]]
    assert mapper.n_pairs_ == {"next": 2}
    assert mapper.pair_counts_.loc["next", ["n_pairs", "n_kept"]].tolist() == [3, 2]
    assert mapper.pair_counts_.loc["few", "n_target_dropped"] == 1
    assert mapper.scores_.columns.tolist() == ["next", "-next"]


def test_padded_vocabularies_compete_unless_told_otherwise():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(390)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    operations = {"some": [(f"w{i}", f"w{i + 100}") for i in range(50)]}
    tensors = _random_model()
    options = {"leading_space": False, "source_embedding": "raw"}
    with registered(tensors) as heads:
        with pytest.warns(
            UserWarning, match=r"400 rows, and the tokenizer 390 .*n_valid_tokens=39"
        ):
            OperationMapper(operations, tokenizer, **options).fit(heads)
        valid = OperationMapper(operations, tokenizer, n_valid_tokens=390, **options).fit(heads)
        with pytest.raises(ValueError, match="n_valid_tokens is 401"):
            OperationMapper(operations, tokenizer, n_valid_tokens=401, **options).fit(heads)
        with pytest.raises(ValueError, match="target token 100, but the competing tokens"):
            OperationMapper(operations, tokenizer, n_valid_tokens=100, **options).fit(heads)
    cut = tensors | {"unembed.W_U": tensors["unembed.W_U"][:, :390]}
    cut["embed.W_E"] = tensors["embed.W_E"][:390]
    with registered(cut) as heads:
        assert OperationMapper(operations, tokenizer, **options).fit(heads).auc_.equals(valid.auc_)
    small = {name: t for name, t in tensors.items() if "embed" not in name}
    small |= {"embed.W_E": torch.randn(300, 32), "unembed.W_U": torch.randn(32, 300)}
    with (
        registered(small) as heads,
        pytest.raises(ValueError, match="tokenizer has 390 tokens, and the unembedding .* has 300"),
    ):
        OperationMapper(operations, tokenizer, **options).fit(heads)


def test_estimator_contract():
    labels = np.arange(32) % 2
    with registered(_random_model()) as heads:
        mapper = OperationMapper(
            {"some": OPERATIONS["some"]}, source_embedding="raw", output="lift"
        )
        search = GridSearchCV(
            make_pipeline(mapper, LogisticRegression()),
            {"operationmapper__k": [5, [5, 20]]},
            cv=2,
            error_score="raise",
        ).fit(heads, labels)
        assert len(search.cv_results_["params"]) == 2
        fitted = clone(mapper).fit(heads)
        again = pickle.loads(pickle.dumps(fitted))
        assert again.transform(heads.iloc[5:7]).equals(fitted.lift_.iloc[5:7])
        assert (
            clone(mapper).set_output(transform="pandas").fit_transform(heads).equals(fitted.lift_)
        )
        for output in ("score", "log10_p", "mrr", "auc"):
            found = clone(mapper).set_params(output=output, k=[3, 9]).fit(heads)
            columns = 2 if output in ("mrr", "auc") else 4
            assert found.transform(heads).shape == (32, columns)
            assert len(found.get_feature_names_out()) == columns
    assert mapper.get_params()["k"] is None
    assert fitted.settings_["k"] == (10,)


def test_ranks_of_a_head_do_not_depend_on_its_factors():
    tensors = _random_model(n_layers=1)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0]
    turned = dict(tensors)
    turned["blocks.0.attn.W_V"] = tensors["blocks.0.attn.W_V"].double() @ turn.double()
    turned["blocks.0.attn.W_O"] = turn.double().T @ tensors["blocks.0.attn.W_O"].double()
    found = []
    for weights in (tensors, turned):
        with registered(weights) as heads:
            mapper = OperationMapper({"some": OPERATIONS["some"]}, source_embedding="raw")
            found.append(mapper.fit(heads))
    assert found[0].scores_.equals(found[1].scores_)


def test_models_without_the_tables_or_the_mlp_that_are_asked_for(gpt2_path):
    operation = {"some": OPERATIONS["some"]}
    with pytest.raises(UnsupportedLayoutError, match=r"OperationMapper: there is no tensor 'wte"):
        OperationMapper(operation).fit(skhead.load_heads(gpt2_path))
    with registered(_random_model()) as heads:
        with pytest.raises(UnsupportedLayoutError, match="has no MLP.*missing_mlp='raw'"):
            OperationMapper(operation).fit(heads)
        raw = OperationMapper(operation, source_embedding="raw").fit(heads)
        assert OperationMapper(operation, missing_mlp="raw").fit(heads).scores_.equals(raw.scores_)
        first = heads[heads["layer"] == 0]
        assert OperationMapper(operation).fit(first).scores_.equals(raw.scores_.loc[first.index])


def test_zero_maps_and_zero_tokens_are_named():
    tensors = _random_model()
    tensors["embed.W_E"][int(OPERATIONS["some"][0, 0])] = 0.0
    mapper = OperationMapper({"some": OPERATIONS["some"]}, source_embedding="raw")
    with registered(tensors) as heads, pytest.raises(DegenerateHeadError, match="token .* is zero"):
        mapper.fit(heads)
    tensors = _random_model()
    tensors["blocks.2.attn.W_O"][3] = 0.0
    with registered(tensors) as heads, pytest.raises(DegenerateHeadError, match="OV map of L2H3"):
        mapper.fit(heads)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operations": {}}, "must be a mapping from names to lists"),
        ({"operations": {"-x": [(1, 2)]}}, "do not begin with '-'"),
        ({"operations": {"x": []}}, "operation 'x' must be a list of at least one"),
        ({"operations": {"x": [(1, 2, 3)]}}, "holds something that is not a pair"),
        ({"operations": {"x": [(1, "two")]}}, "of words alone, or of token ids alone"),
        ({"operations": {"x": [(1, 2.5)]}}, "of words alone, or of token ids alone"),
        ({"operations": {"x": [("one", "two")]}}, "made of words; pass the model's tokenizer"),
        ({"operations": {"x": [(1, 2)] * 5}}, r"no operation keeps 30 pairs .*\(kept: x 5\)"),
        ({"operations": {"x": [(1, 400)] * 40}}, "target token 400, but the competing tokens"),
        ({"operations": {"x": [(400, 1)] * 40}}, "tokens holds 400"),
        ({"k": 0}, "k must be an integer of at least 1; got 0"),
        ({"k": []}, "k is empty"),
        ({"preset": "maps"}, "preset must be one of 'maps_2025', 'ioi_copy_score'"),
        ({"source_embedding": "mlp"}, "source_embedding must be one of 'raw'"),
        ({"output": "phi"}, "output must be one of 'score'"),
        ({"missing_mlp": "skip"}, "missing_mlp must be one of"),
        ({"fold_norm": "yes"}, "fold_norm must be one of True, False"),
        ({"n_valid_tokens": 0}, "n_valid_tokens must be an integer of at least 1"),
        ({"max_memory": "much"}, "max_memory must be"),
    ],
)
def test_wrong_parameters_raise(changes, message):
    given = {"operations": {"some": OPERATIONS["some"]}, "source_embedding": "raw"} | changes
    with registered(_random_model()) as heads, pytest.raises(ValueError, match=message):
        OperationMapper(**given).fit(heads)


def test_stacks_have_no_tokens_and_limits_have_ranges():
    mapper = OperationMapper({"some": OPERATIONS["some"]}, source_embedding="raw")
    with pytest.raises(HeadShapeError, match="needs a heads table"):
        mapper.fit(np.ones((3, 4, 8, 2)))
    with registered(_random_model()) as heads:
        mapper.fit(heads)
    with pytest.raises(ValueError, match="fdr must be between 0 and 1"):
        mapper.implementing(fdr=2.0)


def test_called_heads_of_several_models_can_be_told_apart():
    zoo = skhead.datasets.load_head_zoo().heads
    two = zoo[zoo["source"].isin(zoo["source"].unique()[:2])]
    copying = [(token, token) for token in range(40)]
    mapper = OperationMapper({"copying": copying}, source_embedding="raw", copying_k=1).fit(two)
    called = mapper.implementing()["head"]
    assert called.is_unique and called.isin(skhead.weights.head_labels(two)).all()
    assert called.str.rpartition(":")[0].nunique() == 2
