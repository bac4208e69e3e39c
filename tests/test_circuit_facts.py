"""What the guide states about trained models, and no other test holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

import skhead

BUNDLED = "skhead/induction-2l"
TRAINED = ["L0H0", "L0H2", "L1H0", "L1H1"]


def matrices(heads, role, **options):
    return np.asarray(skhead.load_weights(heads, role=role, **options), dtype=np.float64)


def ov_maps(heads, **options):
    return matrices(heads, "V", **options) @ matrices(heads, "O", **options).swapaxes(1, 2)


def eigenvalue_ratio(circuit):
    values = np.linalg.eigvals(circuit)
    return values.sum().real / np.abs(values).sum()


def forward(similarity):
    values = similarity.pair("OK").to_numpy(dtype=np.float64)
    return values[~np.isnan(values)]


@pytest.fixture(scope="module")
def gpt2(gpt2_path):
    return skhead.load_heads(gpt2_path)


@pytest.fixture(scope="module")
def k_composition(gpt2):
    """K-composition of GPT-2 small, raw and folded."""
    return [
        skhead.CompositionScore(pairs=["OK"], fold_norm=fold_norm).fit_transform(gpt2)
        for fold_norm in (False, True)
    ]


def test_folding_moves_some_pairs_and_not_others(k_composition):
    raw, folded = (similarity.pair("OK") for similarity in k_composition)
    for head, others, expected in (
        ("L4H11", ["L6H9", "L5H1", "L5H5"], [[0.103, 0.102, 0.098], [0.102, 0.102, 0.097]]),
        ("L1H8", ["L10H9", "L10H5"], [[0.091, 0.083], [0.235, 0.225]]),
    ):
        found = [table.loc[head, others].tolist() for table in (raw, folded)]
        np.testing.assert_allclose(found, expected, atol=6e-4)
    top = k_composition[1].top_pairs(2)[["source", "target"]].to_numpy().tolist()
    assert top == [["L1H8", "L10H9"], ["L1H8", "L10H5"]]


def test_most_pairs_of_gpt2_compose_more_than_random_ones(k_composition):
    for similarity, mean, share in zip(k_composition, (0.0417, 0.0414), (0.73, 0.61), strict=True):
        values = forward(similarity)
        assert values.mean() == pytest.approx(mean, abs=6e-5)
        assert (values > 768**-0.5).mean() == pytest.approx(share, abs=0.006)


def test_a_few_coordinates_make_the_largest_folded_score(gpt2):
    heads = gpt2.loc[["L1H8", "L10H9"]]

    def parts(fold_norm):
        writes = ov_maps(heads, fold_norm=fold_norm)[0]
        keys, queries = (matrices(heads, role, fold_norm=fold_norm)[1] for role in "KQ")
        return writes, keys @ queries.T

    def score(writes, reads):
        norms = np.linalg.norm(writes) * np.linalg.norm(reads)
        return np.linalg.norm(writes @ reads) / norms

    shares = {fold: np.square(parts(fold)[1]).sum(1) for fold in (False, True)}
    shares = {fold: energy / energy.sum() for fold, energy in shares.items()}
    largest = np.argsort(-shares[True])[:4]
    assert shares[True][largest].sum() == pytest.approx(0.52, abs=0.005)
    assert shares[False][largest].sum() == pytest.approx(0.059, abs=0.001)
    writes, reads = parts(True)
    written = np.square(writes).sum(0)
    assert written[largest].sum() / written.sum() == pytest.approx(0.39, abs=0.005)
    assert score(writes, reads) == pytest.approx(0.235, abs=6e-4)
    kept = np.argsort(written * np.square(reads).sum(1))[:-5]
    assert score(writes[:, kept], reads[kept]) == pytest.approx(0.039, abs=6e-4)


@pytest.mark.slow
def test_bandwidth_of_gpt2(gpt2):
    usage = skhead.stream_usage(gpt2).set_index(["role", "layer"])
    assert (usage.loc[["V", "O"], "dimension"] == 768).all()
    assert usage.loc[("O", 0), "effective_random"] == pytest.approx(401, abs=0.5)
    effective = usage.loc["O", "effective_dimension"]
    assert effective.idxmin() == 0 and effective.idxmax() == 10
    assert effective[[0, 10]].tolist() == pytest.approx([195, 401], abs=0.5)
    ratio = usage.loc["V", "earlier_ratio"]
    assert ratio.idxmax() == 5 and ratio.idxmin() == 10
    assert ratio[[5, 10]].tolist() == pytest.approx([1.21, 0.68], abs=0.005)


def test_copying_of_restarted_heads_is_what_they_share():
    """A ratio of -.6 of a head that does nothing: small, and gone without the common part."""
    heads = skhead.load_heads(BUNDLED).query("layer == 1")
    space = skhead.weights.read_token_space(BUNDLED)
    embedding, unembedding = (
        part.double().numpy() for part in (space.embedding, space.unembedding)
    )
    maps = dict(zip(heads.index, ov_maps(heads), strict=True))

    def circuit(ov):
        return embedding @ ov @ unembedding.T

    restarted = [label for label in maps if label not in TRAINED]
    assert len(restarted) == 6
    for label in restarted:
        others = np.mean([maps[other] for other in restarted if other != label], axis=0)
        assert eigenvalue_ratio(circuit(maps[label])) < -0.4
        assert abs(eigenvalue_ratio(circuit(maps[label] - others))) < 0.2
    assert eigenvalue_ratio(circuit(maps["L1H2"])) == pytest.approx(-0.62, abs=0.006)
    own = {label: np.diag(circuit(ov)).mean() for label, ov in maps.items()}
    assert own["L1H2"] == pytest.approx(-0.03, abs=0.006)
    assert own["L1H1"] == pytest.approx(0.71, abs=0.006)


def test_three_virtual_heads_stand_out():
    heads = skhead.load_heads(BUNDLED)
    table = skhead.virtual_heads(heads, top=64, min_ratio=0).table
    restarted = ~(table["head_1"].isin(TRAINED) & table["head_2"].isin(TRAINED))
    assert table.index[~restarted].tolist() == ["L0H2>L1H0", "L0H2>L1H1", "L0H0>L1H0", "L0H0>L1H1"]
    assert table["ratio"].idxmin() == "L0H0>L1H1"
    assert table.loc[restarted, "ratio"].max() < 1.1 < table["ratio"].iloc[2]


def test_induction_heads_of_the_zoo_lie_in_the_corner():
    zoo = skhead.datasets.load_head_zoo()
    scores = skhead.CircuitScorer(["ov_copying", "induction_matching"]).fit_transform(zoo.heads)
    later = (zoo.heads["layer"] > 0).to_numpy()
    induction = (zoo.target == "Induction").to_numpy()
    least = scores.to_numpy().min(axis=1)
    assert induction[~later].sum() == 0 and induction.sum() >= 20
    assert least[induction].min() > 0.55 > 0.45 > least[later & ~induction].max()


def test_folded_circuits_of_the_zoo_are_those_of_behaviour():
    zoo = skhead.datasets.load_head_zoo()
    pairs = skhead.induction_pairs(zoo.heads, fold_norm=True).query("is_induction")
    labels = skhead.weights.head_labels(zoo.heads)
    table = zoo.heads.assign(label=labels, kind=zoo.target.to_numpy())
    first, second = (table[table["kind"] == kind] for kind in ("Previous Token", "Induction"))
    both = first.merge(second, on="source", suffixes=("_1", "_2"))
    both = both[both["layer_1"] < both["layer_2"]]
    found = set(zip(pairs["previous_head"], pairs["induction_head"], strict=True))
    assert found == set(zip(both["label_1"], both["label_2"], strict=True))


@pytest.mark.slow
def test_heads_that_share_a_job_are_missed_one_by_one_at_little_cost():
    generator = np.random.default_rng(0)
    block = generator.permuted(np.tile(np.arange(64), (32, 1)), axis=1)[:, :30]
    tokens = np.concatenate([np.full((32, 1), 64), block, block], axis=1)
    shared = skhead.term_importance("skhead/zoo/learned-attn-1", tokens)
    assert shared.individual_heads == pytest.approx(-3.5, abs=0.05)
    assert shared.heads.min() > -0.1
    alone = skhead.term_importance(BUNDLED, tokens)
    assert alone.heads.min() < 1.01 * alone.individual_heads
    assert abs(alone.heads["L0H0"]) < 0.01


@pytest.mark.slow
def test_weights_and_behaviour_of_stories260k(models_dir):
    path = models_dir / "stories260k"
    heads = skhead.load_heads(path)
    pieces = json.loads((path / "tokens.json").read_text())
    words = [piece["id"] for piece in pieces if piece["id"] > 258]  # before: single bytes
    behaviour = skhead.label_heads(str(path), vocabulary=words)["previous_token"]
    leading = ["L3H6", "L1H3", "L1H6", "L1H5", "L2H0"]
    assert behaviour.nlargest(5).index.tolist() == leading
    for fold_norm, expected in ((False, 0.75), (True, 0.73)):
        scorer = skhead.CircuitScorer(["previous_token"], fold_norm=fold_norm)
        scores = scorer.fit_transform(heads)["previous_token"]
        assert spearmanr(scores, behaviour).statistic == pytest.approx(expected, abs=0.01)
        if not fold_norm:
            assert scores.rank(ascending=False)[leading].tolist() == [1, 5, 8, 16, 2]


def test_order_decides_which_tokens_of_stories260k_are_near(models_dir):
    heads = skhead.load_heads(models_dir / "stories260k")
    source = heads["source"].iloc[0]
    vectors = skhead.weights.read_token_space(source).unembedding.double().numpy()
    common = np.square(vectors.mean(0)).sum() / np.square(vectors).sum(1).mean()
    assert common == pytest.approx(0.37, abs=0.005)
    orders = ["center-normalize", "normalize-center", "center", "normalize"]
    listed = {
        order: skhead.SubspaceReadout(order=order)
        .fit(heads)
        .top_tokens(heads)
        .groupby("head")["token"]
        .apply(set)
        for order in orders
    }
    first = listed.pop("center-normalize")
    kept = [np.mean([len(first[h] & found[h]) for h in heads.index]) for found in listed.values()]
    assert kept == pytest.approx([4.85, 4.4, 3.925], abs=0.06)


def test_best_pair_of_a_model_without_induction(models_dir):
    pairs = skhead.induction_pairs(skhead.load_heads(models_dir / "stories260k"))
    assert pairs["score"].max() == pytest.approx(0.46, abs=0.005)
    assert pairs["matching_z"].iloc[0] == pytest.approx(0.5, abs=0.05)
    assert not pairs["is_induction"].any()


@pytest.mark.parametrize(
    "name, score, composition", [("loose", 0.64, 0.48), ("perfect", 1.0, 0.06)]
)
def test_scores_of_the_one_head_models(models_dir, name, score, composition):
    heads = skhead.load_heads(models_dir / "induction-1head" / f"{name}.safetensors")
    best = skhead.induction_pairs(heads).iloc[0]
    assert best["is_induction"] and best["matching"] > 0.995
    assert best["score"] == pytest.approx(score, abs=0.006)
    assert best["k_composition"] == pytest.approx(composition, abs=0.006)


def test_what_the_atom_mapper_moves_is_not_remarkable(models_dir):
    heads = skhead.load_heads(models_dir / "rxnmapper-albert").iloc[:8]
    scores = skhead.CircuitScorer(errors="ignore").fit_transform(heads)
    places = scores.rank(ascending=False).loc["L0H5"]
    assert places["pk_vo"] == 8
    maps = [
        "ov_norm", "ov_effective_rank", "ov_stable_rank", "ov_spectral_entropy",
        "ov_eigenvalue_ratio", "ov_positive_share", "ov_mean_phase", "identity_signed",
    ]  # fmt: skip
    assert places[maps].between(3, 7).all()
    composition = scores["v_composition_out_mean"].nlargest(2)
    assert composition.index[0] == "L0H5" and composition.iloc[0] < 1.05 * composition.iloc[1]
    top1 = scores["qk_top1_self"].nlargest(2)
    assert top1.tolist() == pytest.approx([0.083, 0.015], abs=0.001)
    assert scores["ov_copying"].isna().all()
