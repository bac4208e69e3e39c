"""Two models, or one in two ways, compared on a page."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pages import Tables, words_of
from safetensors.numpy import load_file, save_file
from scipy.stats import spearmanr

import skhead
from skhead.cli import main
from skhead.datasets import bundled_path
from skhead.report import write_comparison

MODEL = "skhead/induction-2l"


def summary_of(page):
    return json.loads(page.with_name("summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def centred(tmp_path_factory):
    return write_comparison(MODEL, None, tmp_path_factory.mktemp("centred"), center_b=True)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    target = tmp_path_factory.mktemp("unlike")
    return write_comparison(MODEL, "skhead/zoo/learned-attn-2", target)


@pytest.fixture
def rotated(tmp_path):
    """The bundled model with its residual stream turned at random, as if trained apart."""
    tensors = load_file(bundled_path(MODEL) / "model.safetensors")
    width = tensors["embed.W_E"].shape[1]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0].astype(np.float32)
    for name in list(tensors):
        last = name.rsplit(".", 1)[-1]
        if last in ("W_Q", "W_K", "W_V"):
            tensors[name] = np.ascontiguousarray(turn.T @ tensors[name])
        elif last == "W_O":
            tensors[name] = np.ascontiguousarray(tensors[name] @ turn)
    path = tmp_path / "rotated.safetensors"
    save_file(tensors, path)
    return path


def test_distances_are_those_of_the_projection_kernel(centred):
    table = pd.read_csv(centred.with_name("compare.csv"), index_col="label", keep_default_na=False)
    heads = skhead.load_heads(MODEL)
    raw = skhead.SubspaceExtractor().fit_transform(heads)
    other = skhead.SubspaceExtractor(center=True).fit_transform(heads)
    for role in "QKVO":
        overlaps = [
            np.linalg.norm(a.T.astype(np.float64) @ b) ** 2
            for a, b in zip(raw.numpy(role), other.numpy(role), strict=True)
        ]
        np.testing.assert_allclose(
            table[f"distance_{role}"], 1 - np.array(overlaps) / 16, atol=1e-6
        )
        assert summary_of(centred)["mean_distances"][role] == table[f"distance_{role}"].mean()
    scores = skhead.CircuitScorer().fit_transform(heads)
    for name in ("qk_norm", "ov_copying", "induction_strength"):
        np.testing.assert_allclose(table[f"{name}_a"].astype(float), scores[name], rtol=1e-6)
    assert not np.allclose(table["qk_norm_a"].astype(float), table["qk_norm_b"].astype(float))


def test_pairs_agree_as_the_kernels_rank(centred):
    heads = skhead.load_heads(MODEL)
    kernels, called = [], []
    for center in (False, True):
        subspaces = skhead.SubspaceExtractor(center=center).fit_transform(heads)
        kernel = skhead.ProjectionKernel().fit_transform(subspaces)
        frame = skhead.NullCalibrator(null="empirical").fit_transform(kernel).to_frame()
        kernels.append(frame)
        hit = frame[(frame["q"] <= 0.05) & (frame["z"] > 0)]
        called.append(set(hit[["pair", "source", "target"]].itertuples(index=False, name=None)))
    told = summary_of(centred)
    for pair, row in told["pairs"].items():
        one, other = (frame.loc[frame["pair"] == pair, "score"] for frame in kernels)
        assert row["spearman"] == pytest.approx(spearmanr(one, other)[0])
        assert row["called_a"] == sum(edge[0] == pair for edge in called[0])
        assert row["called_both"] == sum(edge[0] == pair for edge in called[0] & called[1])
    edges = pd.read_csv(centred.with_name("compare_edges.csv"))
    found = set(edges[["pair", "source", "target"]].itertuples(index=False, name=None))
    assert found == called[0] ^ called[1]
    for edge in edges.to_dict("records"):
        appears = edge["change"] == "appears"
        assert (edge["q_b"] <= 0.05) == appears
        assert (edge["q_a"] <= 0.05) != appears
    rows = Tables(centred).tables["edge-table"][1:] if len(edges) else []
    assert len(rows) == len(edges)


def test_nothing_appears_where_only_one_side_is_judged(tmp_path):
    """Heads as wide as the stream overlap by their ranks alone; those of lower rank do not."""
    rng = np.random.default_rng(0)
    half = np.diag([1.0, 1, 1, 1, 0, 0, 0, 0])
    for name, kept in (("wide", np.eye(8)), ("narrow", half)):
        tensors = {
            f"blocks.{layer}.attn.W_{role}": kept @ rng.normal(size=(3, 8, 8)) @ kept
            for layer in range(2)
            for role in "QKVO"
        }
        tensors = {key: tensor.astype(np.float32) for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("wide", "narrow")]
    page = write_comparison(*paths, tmp_path / "out", bases="shared", null="haar")
    told = summary_of(page)
    assert told["head_by_head"]
    assert sum(row["called_a"] for row in told["pairs"].values()) == 0
    assert sum(row["called_b"] for row in told["pairs"].values()) > 0
    assert told["edges"] == {}
    words = words_of(page)
    assert "It takes a null law that judges both. The null law calls no pair of A" in words
    assert "in B only" not in words


@pytest.mark.slow
def test_folding_leaves_what_is_written_alone(gpt2_path, tmp_path):
    page = write_comparison(gpt2_path, None, tmp_path, fold_norm_b=True)
    told = summary_of(page)
    assert told["mean_distances"]["O"] < 1e-6
    assert 0.01 < told["mean_distances"]["Q"] < 0.05
    assert [told["sides"][side]["record"]["fold_norm"] for side in "AB"] == [False, True]
    assert told["edges"]["appears"] > 0
    assert told["edges"]["vanishes"] > 0
    assert page.stat().st_size < 3_000_000


def test_models_of_other_shape_are_compared_by_what_has_no_basis(unlike):
    told, words = summary_of(unlike), words_of(unlike)
    assert told["head_by_head"] is False
    assert told["refused"] == "the widths of the residual stream (d_model) differ: 128 and 64"
    assert "the widths of the residual stream (d_model) differ: 128 and 64" in words
    assert told["mean_distances"] == told["pairs"] == told["edges"] == {}
    assert not unlike.with_name("compare_edges.csv").exists()
    assert "head-table" not in Tables(unlike).tables
    table = pd.read_csv(unlike.with_name("compare.csv"))
    assert table["model"].value_counts().to_dict() == {
        "A": 16, "B": len(skhead.load_heads("skhead/zoo/learned-attn-2")),
    }  # fmt: skip
    sides = {side: table[table["model"] == side] for side in "AB"}
    row = told["scores"]["ov_copying"]
    assert row["median_a"] == pytest.approx(sides["A"]["ov_copying"].median())
    assert row["upper_b"] == pytest.approx(sides["B"]["ov_copying"].quantile(0.75))


def test_nearest_spectra_are_those_of_the_estimator(unlike):
    ours, others = skhead.load_heads(MODEL), skhead.load_heads("skhead/zoo/learned-attn-2")
    kernel = skhead.SpectrumSimilarity(("OVOV",)).fit(others).transform(ours)
    table = pd.read_csv(unlike.with_name("compare.csv"))
    own = table[table["model"] == "A"]
    values = kernel.values[:, :, 0]
    np.testing.assert_allclose(own["spectrum_OV"], values.max(axis=1), rtol=1e-5)
    told = summary_of(unlike)["spectra"]["OV"]
    assert told["mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert told["nearest"] == pytest.approx(values.max(axis=1).mean(), rel=1e-5)


def test_a_turned_stream_is_not_taken_for_the_same(rotated, tmp_path):
    told = summary_of(write_comparison(MODEL, rotated, tmp_path / "turned"))
    assert told["head_by_head"] is False
    assert "trained apart" in told["refused"]
    assert told["spectra"]["OV"]["nearest"] == pytest.approx(1, abs=1e-4)
    forced = write_comparison(MODEL, rotated, tmp_path / "forced", bases="shared")
    distances = summary_of(forced)["mean_distances"]
    assert distances["O"] == pytest.approx(1 - 16 / 128, abs=0.02)


def test_a_further_trained_copy_is_taken_for_the_same(tmp_path):
    tensors = load_file(bundled_path(MODEL) / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if name.rsplit(".", 1)[-1] in ("W_Q", "W_K", "W_V", "W_O"):
            step = torch.randn(value.shape, generator=noise).numpy()
            tensors[name] = value + 0.3 * value.std() * step
    save_file(tensors, tmp_path / "later.safetensors")
    page = write_comparison(MODEL, tmp_path / "later.safetensors", tmp_path / "out")
    told = summary_of(page)
    assert told["head_by_head"] is True
    assert told["closest_to_namesake"] > 0.8
    apart = write_comparison(
        MODEL, tmp_path / "later.safetensors", tmp_path / "apart", bases="unrelated"
    )
    assert summary_of(apart)["refused"] == "the residual streams were said to be unrelated"


def test_page_is_self_contained_and_the_same_every_time(centred, tmp_path):
    text = centred.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert 'href="http' not in text and 'src="http' not in text
    again = write_comparison(MODEL, None, tmp_path, center_b=True)
    for path in again.parent.iterdir():
        assert path.read_bytes() == centred.with_name(path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "options,message",
    [
        ({}, "would be compared with itself; name a second model, another revision"),
        ({"k": 0}, "write_comparison: k must be a positive integer, got 0"),
        ({"bases": "same"}, "write_comparison: bases must be one of 'auto'"),
        ({"null": "beta"}, "write_comparison: null must be one of 'haar'"),
        ({"device": "abacus"}, "write_comparison: device 'abacus' cannot be used"),
    ],
)
def test_bad_options_are_told(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_comparison(MODEL, None, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_shared_bases_need_one_shape(tmp_path):
    with pytest.raises(ValueError, match=r"bases='shared', but the widths of the residual stream"):
        write_comparison(MODEL, "skhead/zoo/learned-attn-2", tmp_path, bases="shared")


def test_command_line(tmp_path, capsys):
    assert main(["compare", MODEL, "-o", str(tmp_path), "--center-b", "--k", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'compare.html'}\n"
    assert "skhead: A: extracting" in err
    assert "skhead: B: extracting" in err
    told = json.loads((tmp_path / "summary.json").read_text())
    assert [told["sides"][side]["record"]["center"] for side in "AB"] == [False, True]
    assert told["null"] == {"chosen": "empirical", "fdr": 0.05}
    assert main(["compare", MODEL, "-o", str(tmp_path / "same")]) == 2
    assert "would be compared with itself" in capsys.readouterr().err
