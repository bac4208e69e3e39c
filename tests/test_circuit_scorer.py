"""Circuit scores of heads against dense circuits, planted heads and trained models."""

from __future__ import annotations

import json
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ZOO, fresh_model
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import StandardScaler
from toys import random_weights, registered

import skhead
from skhead.circuits import CircuitScorer, identity_scores
from skhead.exceptions import CheckpointError, DegenerateHeadError, HeadShapeError, HeadTableError
from skhead.linalg.rotary import rotate

N_VOCAB = 30
GROUPS = ("maps", "tokens", "positions", "composition", "induction")
MAPS = 18


def model(seed=0, n_vocab=N_VOCAB, **shape):
    """A random model with tokens and learned positions."""
    tensors = random_weights(seed=seed, **shape)
    d_model = tensors["blocks.0.attn.W_Q"].shape[1]
    generator = torch.Generator().manual_seed(seed + 100)
    for name, size in (
        ("embed.W_E", (n_vocab, d_model)),
        ("unembed.W_U", (d_model, n_vocab)),
        ("pos_embed.W_pos", (16, d_model)),
    ):
        tensors[name] = torch.randn(size, generator=generator)
    return tensors


def weights(heads):
    return {role: skhead.load_weights(heads, role).astype(float) for role in "QKVO"}


def ratio(circuit):
    eigenvalues = np.linalg.eigvals(circuit)
    return eigenvalues.sum().real / np.abs(eigenvalues).sum()


@pytest.fixture
def toy():
    tensors = model(n_layers=3, n_heads=4, n_kv_heads=2)
    with registered(tensors) as heads:
        yield tensors, heads


@pytest.fixture(scope="module")
def bundled():
    heads = skhead.load_heads("skhead/induction-2l")
    return heads, CircuitScorer().fit_transform(heads)


def test_every_score_of_a_complete_model_is_defined(toy):
    features = CircuitScorer().fit_transform(toy[1])
    assert features.shape == (12, len(set(features.columns)))
    assert np.isfinite(features.to_numpy()).all()
    assert features.dtypes.unique().tolist() == [np.float64]
    listed = CircuitScorer(scores=GROUPS).fit(toy[1]).get_feature_names_out().tolist()
    assert listed == features.columns.tolist()
    named = {"ov_copying", "qk_matching", "identity_signed", "pk_vo", "ov_norm", "qk_norm"}
    assert named | {"ov_effective_rank", "previous_token", "induction_strength"} <= set(listed)


def test_a_score_asked_alone_is_that_of_all(toy):
    _, heads = toy
    every = CircuitScorer().fit_transform(heads)
    for name in every:
        alone = CircuitScorer([name]).fit_transform(heads)
        # Composition with all kinds is one float32 product, of another size than with one.
        rtol = 5e-7 if "composition" in name else 1e-12
        pd.testing.assert_frame_equal(alone, every[[name]], rtol=rtol)


def test_token_scores_equal_dense_circuits(toy):
    tensors, heads = toy
    embedding = tensors["embed.W_E"].double().numpy()
    unembedding = tensors["unembed.W_U"].double().numpy().T
    features = CircuitScorer("tokens").fit_transform(heads)
    w = weights(heads)
    for i, label in enumerate(heads.index):
        ov = embedding @ w["V"][i] @ w["O"][i].T @ unembedding.T
        qk = embedding @ w["Q"][i] @ w["K"][i].T @ embedding.T
        for circuit, name, matching in ((ov, "ov", "ov_copying"), (qk, "qk", "qk_matching")):
            row = features.loc[label]
            assert row[matching] == pytest.approx(ratio(circuit), abs=1e-5)
            above = np.trace(circuit) / N_VOCAB - circuit.mean()
            assert row[f"{name}_diagonal"] == pytest.approx(above / circuit.std(), abs=1e-8)
            own = (circuit.argmax(1) == np.arange(N_VOCAB)).mean()
            assert row[f"{name}_top1_self"] == pytest.approx(own)


def test_map_scores_equal_dense_maps(toy):
    _, heads = toy
    features = CircuitScorer("maps").fit_transform(heads)
    w = weights(heads)
    for name, left, right in (("ov", w["V"], w["O"]), ("qk", w["Q"], w["K"])):
        maps = left @ right.transpose(0, 2, 1)
        values = np.linalg.svd(maps, compute_uv=False)[:, :5]
        shares = values / values.sum(1, keepdims=True)
        energy = values**2 / (values**2).sum(1, keepdims=True)
        expected = {
            "norm": np.linalg.norm(maps, axis=(1, 2)),
            "effective_rank": np.exp(-(shares * np.log(shares)).sum(1)),
            "stable_rank": 1 / energy[:, 0],
            "spectral_entropy": -(energy * np.log(energy)).sum(1) / np.log(5),
            "eigenvalue_ratio": [ratio(m) for m in maps],
        }
        for score, values in expected.items():
            np.testing.assert_allclose(features[f"{name}_{score}"], values, atol=1e-6)
    both = ["pk_vo", "identity_signed"]
    np.testing.assert_allclose(features[both], identity_scores(heads)[both], rtol=1e-6)


def test_composition_is_that_of_all_pairs(toy):
    _, heads = toy
    features = CircuitScorer("composition").fit_transform(heads)
    pairs = skhead.CompositionScore(baseline="ratio").fit_transform(heads)
    for kind in "qkv":
        ratios = pairs.pair(f"O{kind.upper()}").to_numpy()
        for i, label in enumerate(heads.index):
            for side, values in (("in", ratios[:, i]), ("out", ratios[i])):
                defined = values[~np.isnan(values)]
                mean, largest = (defined.mean(), defined.max()) if defined.size else (0, 0)
                prefix = f"{kind}_composition_{side}"
                assert features.loc[label, f"{prefix}_mean"] == pytest.approx(mean, abs=1e-5)
                assert features.loc[label, f"{prefix}_max"] == pytest.approx(largest, abs=1e-5)


def test_induction_is_the_best_over_all_partners(toy):
    tensors, heads = toy
    names = ["induction_matching", "induction_feeding", "induction_strength"]
    features = CircuitScorer([*names, "previous_token", "ov_copying"]).fit_transform(heads)
    embedding = tensors["embed.W_E"].double().numpy()
    w = weights(heads)
    layers = heads["layer"].to_numpy()
    ratios = np.full((12, 12), -np.inf)
    for i, j in zip(*np.nonzero(layers[:, None] < layers[None]), strict=True):
        moved = w["V"][i] @ w["O"][i].T @ w["K"][j]
        ratios[i, j] = ratio(embedding @ w["Q"][j] @ moved.T @ embedding.T)
    weakest = np.minimum(ratios, features["previous_token"].to_numpy()[:, None])
    weakest = np.minimum(weakest, features["ov_copying"].to_numpy()[None])
    expected = np.stack([ratios.max(0), ratios.max(1), weakest.max(0)], axis=1)
    np.testing.assert_allclose(features[names], np.where(expected > -2, expected, 0), atol=1e-5)


def test_a_score_does_not_depend_on_the_other_rows(toy):
    _, heads = toy
    scorer = CircuitScorer().fit(heads)
    rows = [10, 3, 7]
    some = scorer.transform(heads.iloc[rows])
    pd.testing.assert_frame_equal(some, scorer.transform(heads).iloc[rows], rtol=1e-9)


def test_the_memory_budget_changes_nothing(toy):
    _, heads = toy
    roomy = CircuitScorer(["composition", "induction"]).fit_transform(heads)
    layer_by_layer = CircuitScorer(["composition", "induction"], max_memory="64kB")
    pd.testing.assert_frame_equal(layer_by_layer.fit_transform(heads), roomy, rtol=1e-4, atol=1e-6)


def test_models_of_different_widths_in_one_table():
    one, other = model(n_layers=2, d_model=16), model(seed=1, n_layers=2, d_model=24, d_head=6)
    with registered(one) as first, registered(other) as second:
        mixed = pd.concat([first, second]).iloc[[0, 9, 1, 15, 7, 8]]
        features = CircuitScorer().fit_transform(mixed)
        apart = [CircuitScorer().fit_transform(heads) for heads in (first, second)]
        expected = pd.concat(apart).iloc[[0, 9, 1, 15, 7, 8]]
    pd.testing.assert_frame_equal(features, expected, rtol=1e-9)


def test_planted_copying_and_erasing_heads():
    tensors = model(n_layers=1, n_heads=2, d_model=24, d_head=8, n_vocab=60)
    tensors["unembed.W_U"] = tensors["embed.W_E"].T.contiguous()
    basis = torch.linalg.qr(tensors["blocks.0.attn.W_V"])[0]
    tensors["blocks.0.attn.W_V"] = basis
    tensors["blocks.0.attn.W_O"] = basis.mT * torch.tensor([1.0, -1.0])[:, None, None]
    with registered(tensors) as heads:
        features = CircuitScorer(["ov_copying", "ov_diagonal", "ov_mean_phase"]).fit_transform(
            heads
        )
    assert features.loc["L0H0", "ov_copying"] > 0.99
    assert features.loc["L0H1", "ov_copying"] < -0.99
    assert features.loc["L0H0", "ov_diagonal"] > 1 > -1 > features.loc["L0H1", "ov_diagonal"]
    assert features["ov_mean_phase"].tolist() == pytest.approx([0, 1], abs=1e-6)


def test_random_heads_scatter_around_zero():
    with registered(model(n_layers=2, n_heads=32, d_model=64, d_head=8, n_vocab=200)) as heads:
        features = CircuitScorer(["maps", "tokens", "positions"]).fit_transform(heads)
    for name in ("ov_copying", "qk_matching", "ov_eigenvalue_ratio", "identity_signed"):
        assert abs(features[name].mean()) < 0.08, name
        assert features[name].std() < 0.3, name
    assert features["qk_symmetric"].mean() == pytest.approx(0.5, abs=0.02)
    assert features["pk_vo"].mean() == pytest.approx(8 * 8 / 64, abs=0.1)
    assert abs(features["previous_token"].mean()) < 0.03


def test_the_bundled_model_shows_its_circuit(bundled):
    _, features = bundled
    assert features["previous_token"].nlargest(2).index.tolist() == ["L0H0", "L0H2"]
    assert features.loc["L0H0", "previous_token"] == pytest.approx(0.964, abs=0.01)
    assert features["induction_strength"].idxmax() == "L1H1"
    assert features.loc["L1H1", ["ov_copying", "induction_matching"]].min() > 0.98
    assert features["induction_strength"].drop("L1H1").max() < 0.1
    assert features["induction_feeding"].idxmax() == "L0H0"


@pytest.mark.parametrize("name, composition", [("loose", 3.86), ("perfect", 0.479)])
def test_induction_where_composition_fails(models_dir, name, composition):
    """In `perfect` the heads compose below chance, 0.06 against 0.125, and form the circuit."""
    heads = skhead.load_heads(models_dir / "induction-1head" / f"{name}.safetensors")
    row = CircuitScorer().fit_transform(heads).loc["L1H0"]
    assert row["k_composition_in_max"] == pytest.approx(composition, abs=0.01)
    assert row["induction_matching"] > 0.99
    assert row["induction_strength"] > 0.6
    assert row["ov_copying"] > 0.99


def test_atom_mapper_of_rxnmapper(models_dir):
    """Head 5, which maps atoms, matches equal tokens more than any other head, by every measure."""
    heads = skhead.load_heads(models_dir / "rxnmapper-albert").iloc[:8]
    names = ["qk_matching", "qk_diagonal", "qk_top1_self", "qk_symmetric", "pk_qk"]
    features = CircuitScorer([*names, "previous_token"]).fit_transform(heads)
    assert features[names].idxmax().tolist() == ["L0H5"] * 5
    assert features.loc["L0H5", "qk_matching"] == pytest.approx(0.681, abs=0.005)
    assert features["qk_matching"].nlargest(2).iloc[1] == pytest.approx(0.375, abs=0.005)
    assert features["previous_token"].idxmax() == "L0H3"


def test_previous_token_heads_of_gpt2_need_the_gains(gpt2_path):
    """Ranks of the published heads 2.2 and 4.11 among 144: weights see 4.11 only in part."""
    heads = skhead.load_heads(gpt2_path)
    ranks = []
    for fold_norm in (False, True):
        scores = CircuitScorer(["previous_token"], fold_norm=fold_norm).fit_transform(heads)
        falling = scores["previous_token"].rank(ascending=False)
        ranks.append(falling[["L2H2", "L4H11"]].astype(int).tolist())
    np.testing.assert_allclose(ranks, [[111, 16], [10, 19]], atol=2)


@pytest.mark.slow
def test_previous_token_heads_of_stories260k(models_dir):
    """Weights alone rank the heads much as their behaviour on repeated random tokens does."""
    transformers = pytest.importorskip("transformers")
    path = models_dir / "stories260k"
    module = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(3, 512, (64, 32), generator=generator)
    tokens = torch.cat([torch.ones(64, 1, dtype=torch.long), half, half], dim=1)
    with torch.no_grad():
        attention = torch.stack(module.eval()(tokens, output_attentions=True).attentions)
    behaviour = attention.diagonal(offset=-1, dim1=-2, dim2=-1).mean((1, 3)).flatten().numpy()
    heads = skhead.load_heads(path)
    for fold_norm, expected in ((False, 0.785), (True, 0.801)):
        scores = CircuitScorer(["previous_token"], fold_norm=fold_norm).fit_transform(heads)
        found = spearmanr(behaviour, scores["previous_token"]).statistic
        assert found == pytest.approx(expected, abs=0.02)
        assert scores["previous_token"].idxmax() == heads.index[behaviour.argmax()] == "L3H6"


def rotary_directory(path, tensors):
    """A model with rotary positions in TransformerLens' own layout."""
    n_heads, d_model, d_head = tensors["blocks.0.attn.W_Q"].shape
    config = {
        "architecture": "TransformerLensNative", "n_layers": 2, "n_heads": n_heads,
        "n_key_value_heads": n_heads, "d_model": d_model, "d_head": d_head, "n_ctx": 16,
        "d_vocab": N_VOCAB, "d_mlp": None, "act_fn": "gelu", "gated_mlp": False,
        "attn_only": True, "normalization_type": None, "eps": 1e-5,
        "positional_embedding_type": "rotary", "rotary_dim": d_head, "rotary_base": 100,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    kept = {name: tensor for name, tensor in tensors.items() if name != "pos_embed.W_pos"}
    save_file(kept, path / "model.safetensors")
    return skhead.load_heads(path)


def test_rotary_queries_turn_with_the_relative_position(tmp_path):
    tensors = model(n_layers=2, d_head=4)
    heads = rotary_directory(tmp_path, tensors)
    names = ["qk_matching", "qk_norm", "ov_copying", "induction_matching"]
    here, behind = (
        CircuitScorer(names, relative_position=offset).fit_transform(heads) for offset in (0, 3)
    )
    embedding = tensors["embed.W_E"].double()
    queries, keys = (torch.tensor(w).double() for w in (weights(heads)[r] for r in "QK"))
    frequencies = 100.0 ** -torch.tensor([0.0, 0.5], dtype=torch.float64)
    turned = rotate(queries, 3, frequencies, 4, "adjacent")
    for features, q in ((here, queries), (behind, turned)):
        circuits = (embedding @ q @ keys.mT @ embedding.T).numpy()
        expected = [ratio(circuit) for circuit in circuits]
        np.testing.assert_allclose(features["qk_matching"], expected, atol=1e-5)
        norms = torch.linalg.matrix_norm(q @ keys.mT)
        np.testing.assert_allclose(features["qk_norm"], norms, rtol=1e-5)
    assert here["ov_copying"].tolist() == behind["ov_copying"].tolist()
    later = heads["layer"] == 1
    assert (here["induction_matching"] != behind["induction_matching"])[later].any()


def test_rotary_positions_come_from_the_mean_token(tmp_path):
    """A query and a key of the mean token, four positions apart in angle, look one back."""
    tensors = model(n_layers=2, d_head=2)
    mean = tensors["embed.W_E"].mean(0)
    along = mean / mean.norm() ** 2
    angle = torch.tensor(1.0)
    tensors["blocks.0.attn.W_Q"][0] = 20 * torch.outer(along, torch.tensor([1.0, 0.0]))
    tensors["blocks.0.attn.W_K"][0] = torch.outer(along, torch.stack([angle.cos(), angle.sin()]))
    tensors["blocks.0.attn.W_K"][1] = torch.outer(along, torch.tensor([1.0, 0.0]))
    tensors["blocks.0.attn.W_Q"][1] = 20 * torch.outer(along, torch.tensor([1.0, 0.0]))
    heads = rotary_directory(tmp_path, tensors)
    features = CircuitScorer("positions", n_positions=5).fit_transform(heads)
    assert features["previous_token"].idxmax() == "L0H0"
    assert features.loc["L0H0", "previous_token"] > 0.9
    assert features.loc["L0H1", "current_token"] > 0.9


def test_folding_and_centring_reach_the_embeddings(bundled):
    heads, raw = bundled
    space = skhead.weights.tokens.read_token_space(
        heads["source"].iloc[0], fold_norm=True, center=True
    )
    options = {"fold_norm": True, "center": True}
    found = CircuitScorer("tokens", **options).fit_transform(heads)
    v, o = (skhead.load_weights(heads, role, **options).astype(float) for role in "VO")
    embedding, unembedding = (x.double().numpy() for x in (space.embedding, space.unembedding))
    expected = [ratio(embedding @ a @ b.T @ unembedding.T) for a, b in zip(v, o, strict=True)]
    np.testing.assert_allclose(found["ov_copying"], expected, atol=1e-5)
    assert (found["ov_copying"] - raw["ov_copying"]).abs().max() > 0.01


def test_a_checkpoint_without_embedding_gives_nan_and_one_warning(gpt2_path):
    heads = skhead.load_heads(gpt2_path).iloc[:3]
    scorer = CircuitScorer(["ov_copying", "previous_token", "pk_vo", "induction_matching"])
    with pytest.warns(UserWarning, match="wte.weight") as caught:
        features = scorer.fit_transform(heads)
    assert len(caught) == 1
    assert features.isna().all().tolist() == [True, False, False, True]
    message = str(caught[0].message)
    assert "CircuitScorer" in message
    assert "ov_copying, induction_matching: " in message
    with pytest.raises(CheckpointError, match="wte.weight.*Choose other scores"):
        clone(scorer).set_params(errors="raise").fit_transform(heads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = clone(scorer).set_params(errors="ignore").fit_transform(heads)
    pd.testing.assert_frame_equal(silent, features)


def test_missing_ones_are_told_apart():
    tensors = model(n_layers=2)
    del tensors["unembed.W_U"], tensors["pos_embed.W_pos"]
    with registered(tensors) as heads, pytest.warns(UserWarning, match="W_U") as caught:
        features = CircuitScorer(["tokens", "positions", "induction"]).fit_transform(heads)
    missing = features.columns[features.isna().all()].tolist()
    assert missing == [
        "ov_copying", "ov_diagonal", "ov_top1_self",
        "previous_token", "current_token", "first_token", "induction_strength",
    ]  # fmt: skip
    assert not features.drop(columns=missing).isna().to_numpy().any()
    assert "positions" in str(caught[0].message)


@pytest.mark.parametrize(
    ("family", "gain", "lost", "kept"),
    [
        ("llama", "model.norm.weight", {"ov_copying"}, {"qk_matching", "previous_token"}),
        ("bloom", "embeddings_layernorm.weight", {"qk_matching", "ov_copying"}, {"pk_vo"}),
    ],
)
def test_a_gain_that_cannot_be_folded_is_named(family, gain, lost, kept, tmp_path):
    fresh_model(ZOO[family]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(gain))
    del tensors[name]
    save_file(tensors, path)
    heads = skhead.load_heads(tmp_path)
    scorer = CircuitScorer([*lost, *kept], fold_norm=True)
    with pytest.warns(UserWarning, match=f"there is no tensor '{name}' in .*the gain of the norm"):
        features = scorer.fit_transform(heads)
    assert set(features.columns[features.isna().all()]) == lost
    assert features[[*kept]].notna().all(axis=None)
    assert set(scorer.missing_scores(heads)["score"]) == lost
    with pytest.raises(CheckpointError, match=f"{name}.*fold_norm=True"):
        clone(scorer).set_params(errors="raise").fit_transform(heads)
    raw = CircuitScorer([*lost, *kept]).fit(heads)
    assert raw.missing_scores(heads).empty


def test_missing_scores_are_those_of_nan(toy):
    _, complete = toy
    tensors = model(seed=1, n_layers=2)
    del tensors["unembed.W_U"]
    scorer = CircuitScorer(errors="ignore").fit(complete)
    assert scorer.missing_scores(complete).empty
    with registered(tensors) as lacking:
        both = pd.concat([complete, lacking])
        features = scorer.transform(both)
        missing = scorer.missing_scores(both)
    assert set(missing["source"]) == {lacking["source"].iloc[0]}
    absent = features.loc[(both["source"] == lacking["source"].iloc[0]).to_numpy()].isna().all()
    assert missing["score"].tolist() == features.columns[absent].tolist()
    assert missing["reason"].str.contains("unembed.W_U").all()


def test_a_stack_has_maps_only(toy):
    _, heads = toy
    w = weights(heads)
    stack = np.stack([w[role] for role in "QKVO"], axis=1).astype(np.float32)
    scorer = CircuitScorer()
    found = scorer.fit_transform(stack)
    assert isinstance(found, np.ndarray)
    assert found.shape == (12, MAPS)
    expected = CircuitScorer("maps").fit_transform(heads)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert scorer.get_feature_names_out().tolist() == expected.columns.tolist()
    np.testing.assert_array_equal(scorer.fit_transform(torch.tensor(stack)), found)
    with pytest.warns(UserWarning, match="the stack lacks .* no tokens"):
        mixed = CircuitScorer(["ov_norm", "ov_copying"]).fit_transform(stack)
    assert np.isnan(mixed).any(axis=0).tolist() == [False, True]


def test_scores_do_not_depend_on_the_basis(toy):
    _, heads = toy
    w = weights(heads)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0]
    stack = np.stack([w[role] for role in "QKVO"], axis=1)
    found, turned = (CircuitScorer().fit_transform(x) for x in (stack, turn @ stack))
    np.testing.assert_allclose(turned, found, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(
        CircuitScorer().fit_transform(stack[::-1]), found[::-1], rtol=1e-9, atol=1e-12
    )


def test_output_follows_set_output(toy):
    _, heads = toy
    w = weights(heads)
    stack = np.stack([w[role] for role in "QKVO"], axis=1)
    scorer = CircuitScorer("maps").set_output(transform="pandas")
    frame = scorer.fit_transform(stack)
    assert frame.columns.tolist() == scorer.get_feature_names_out().tolist()
    assert scorer.fit_transform(heads).index.tolist() == heads.index.tolist()


def test_in_pipelines(bundled):
    heads, features = bundled
    scaled = make_pipeline(CircuitScorer(), StandardScaler()).fit_transform(heads)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-9)
    union = FeatureUnion([("maps", CircuitScorer("maps")), ("tokens", CircuitScorer("tokens"))])
    joined = np.asarray(union.fit_transform(heads))
    names = [name.split("__")[1] for name in union.get_feature_names_out()]
    np.testing.assert_allclose(joined, features[names], rtol=1e-9)
    columns = ColumnTransformer(
        [
            ("circuits", CircuitScorer("maps"), list(heads.columns)),
            ("layer", "passthrough", ["layer"]),
        ]
    )
    found = np.asarray(columns.fit_transform(heads))
    assert found.shape == (16, MAPS + 1)
    assert columns.get_feature_names_out()[-1] == "layer__layer"
    scorer = CircuitScorer("maps", center=True).fit(heads)
    again = pickle.loads(pickle.dumps(scorer)).transform(heads)
    pd.testing.assert_frame_equal(again, scorer.transform(heads))


def planted_tensors(seed):
    """Two layers in a random basis: a previous-token, an induction and six random heads."""
    generator = torch.Generator().manual_seed(seed)
    d_model, d_head = 64, 16
    tensors = random_weights(n_layers=2, n_heads=4, d_model=d_model, d_head=d_head, seed=seed)
    tensors = {name: tensor / d_model**0.5 for name, tensor in tensors.items()}
    basis = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator))[0]
    tokens, moved, places = basis[:, :16], basis[:, 16:32], basis[:, 32:48]
    tensors["embed.W_E"] = torch.randn(40, 16, generator=generator) @ tokens.T
    tensors["unembed.W_U"] = tensors["embed.W_E"].T.contiguous()
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    steps = [torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)]
    for _ in range(11):
        steps.append(turn @ steps[-1])
    tensors["pos_embed.W_pos"] = torch.stack(steps) @ places.T
    previous, induction = (int(i) for i in torch.randint(4, (2,), generator=generator))
    for layer, head, roles in (
        (0, previous, (60 * places @ turn.T, places, tokens, moved)),
        (1, induction, (tokens, moved, tokens, tokens)),
    ):
        for role, matrix in zip("QKVO", roles, strict=True):
            oriented = matrix.T if role == "O" else matrix
            tensors[f"blocks.{layer}.attn.W_{role}"][head] = oriented
    return tensors, {f"L0H{previous}": "previous", f"L1H{induction}": "induction"}


def test_a_linear_classifier_knows_classes_across_models():
    """Models share no basis; circuit scores carry over from one to another."""
    tables, labels = [], []
    drawn = [planted_tensors(seed) for seed in range(4)]
    names = [skhead.register_model(tensors, f"planted-{i}") for i, (tensors, _) in enumerate(drawn)]
    try:
        for name, (_, classes) in zip(names, drawn, strict=True):
            heads = skhead.load_heads(name)
            tables.append(heads)
            labels += [classes.get(label, "none") for label in heads.index]
        X = pd.concat(tables)
        steps = CircuitScorer(), StandardScaler(), LogisticRegression(class_weight="balanced")
        predicted = cross_val_predict(
            make_pipeline(*steps), X, labels, groups=X["source"], cv=GroupKFold(4)
        )
    finally:
        for name in names:
            skhead.unregister_model(name)
    assert predicted.tolist() == labels


def test_a_zero_map_has_no_circuits():
    tensors = model(n_layers=2)
    tensors["blocks.1.attn.W_O"][2] = 0.0
    with registered(tensors) as heads:
        with pytest.raises(DegenerateHeadError, match="CircuitScorer: the OV map of L1H2 is zero"):
            CircuitScorer("maps").fit_transform(heads)
        with pytest.raises(DegenerateHeadError, match="CircuitScorer: the OV map of L1H2 is zero"):
            CircuitScorer("induction").fit_transform(heads.iloc[1:])
        kept = heads.drop(index="L1H2")
        assert np.isfinite(CircuitScorer().fit_transform(kept).to_numpy()).all()


def test_a_dropped_head_is_no_partner():
    """A pruned head of the first layer gives the others what they have without it."""
    tensors = model(n_layers=2)
    scored = CircuitScorer("induction").fit_transform
    for role in "QV":
        tensors[f"blocks.0.attn.W_{role}"][1] = 0.0
    with registered(tensors) as heads:
        found = scored(heads.drop(index="L0H1"))
    for name, stack in tensors.items():
        if name.startswith("blocks.0.attn."):
            tensors[name] = stack[[0, 2, 3]]
    with registered(tensors) as heads:
        expected = scored(heads)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"scores": "copying"}, "scores holds 'copying'; it may hold 'all', the groups maps"),
        ({"scores": []}, r"scores is \[\]; name at least one"),
        ({"scores": None}, "scores is None"),
        ({"errors": "skip"}, "errors must be one of 'warn', 'raise', 'ignore'; got 'skip'"),
        ({"relative_position": -1}, "relative_position must be an integer of at least 0; got -1"),
        ({"n_positions": 2}, "n_positions must be an integer of at least 3; got 2"),
        ({"position_scale": 0}, "position_scale must be above 0; got 0"),
        ({"position_scale": True}, "position_scale must be a finite number; got True"),
        ({"n_tokens": 0}, "n_tokens must be an integer of at least 1; got 0"),
        ({"max_memory": "much"}, "max_memory must be a positive number of bytes"),
    ],
)
def test_parameters_are_checked(parameters, message, toy):
    with pytest.raises(ValueError, match=f"CircuitScorer: {message}"):
        CircuitScorer(**parameters).fit(toy[1])


def test_inputs_are_checked(toy):
    with pytest.raises(HeadShapeError, match="needs all four matrices"):
        CircuitScorer().fit(np.ones((2, 6, 3)))
    with pytest.raises(ValueError, match="a stack has none"):
        CircuitScorer(fold_norm=True).fit(np.ones((2, 4, 6, 3)))
    with pytest.raises(HeadTableError, match="lacks the column"):
        CircuitScorer().fit(toy[1].drop(columns="kv_head"))
    with pytest.raises(HeadTableError, match=r"has source \['a'\]"):
        CircuitScorer().fit(toy[1].assign(source=[["a"]] * 12))
    with pytest.raises(HeadTableError, match="does not exist"):
        CircuitScorer("maps").fit_transform(toy[1].assign(head=9))
