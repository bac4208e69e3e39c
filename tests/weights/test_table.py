"""The heads table: its checks, labels and descriptions, and reading any rows of it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import skhead
from skhead.exceptions import HeadShapeError, HeadTableError, SourceNotFoundError
from skhead.weights import HEAD_COLUMNS, check_heads, describe_sources, head_labels, read_role
from skhead.weights import stacks as stacks_module


@pytest.fixture
def path(write_model, llama_tensors, llama_config):
    return write_model(llama_tensors, llama_config)


@pytest.fixture
def heads(path):
    return skhead.load_heads(path)


def test_columns_and_types(heads):
    assert tuple(heads.columns) == HEAD_COLUMNS
    assert all(heads[name].dtype == np.int64 for name in HEAD_COLUMNS[1:])
    assert heads.index[[0, 7, 11]].tolist() == ["L0H0", "L1H3", "L2H3"]
    assert heads["kv_head"].tolist() == [0, 0, 1, 1] * 3


def test_table_survives_pickle_and_csv(heads, tmp_path):
    assert pickle.loads(pickle.dumps(heads)).equals(heads)
    heads.to_csv(tmp_path / "heads.csv")
    back = pd.read_csv(tmp_path / "heads.csv", index_col=0)
    np.testing.assert_array_equal(skhead.load_weights(back), skhead.load_weights(heads))


def test_any_rows_in_any_order(heads):
    whole = skhead.load_weights(heads, "V")
    order = np.array([5, 0, 11, 5, 6, 2, 5])
    np.testing.assert_array_equal(skhead.load_weights(heads.iloc[order], "V"), whole[order])
    stack = read_role(heads.iloc[order], "V")
    assert len(stack.tensor) == len({(r // 4, r % 4 // 2) for r in order})
    assert stack.index.dtype == np.int64


@pytest.mark.parametrize("role", list("QKVO"))
def test_matrices_act_as_stated(role, heads, llama_tensors):
    stack = torch.from_numpy(skhead.load_weights(heads, role))
    assert stack.dtype == torch.float32
    x, z = torch.randn(24), torch.randn(4, 8)
    for layer in range(3):
        stored = llama_tensors[f"model.layers.{layer}.self_attn.{role.lower()}_proj.weight"]
        of_layer = stack[4 * layer : 4 * layer + 4]
        if role == "O":
            written = sum(z[h] @ of_layer[h].T for h in range(4))
            torch.testing.assert_close(written, stored @ z.flatten())
            continue
        projected = (stored @ x).reshape(-1, 8)
        expected = projected if role == "Q" else projected.repeat_interleave(2, 0)
        torch.testing.assert_close(torch.stack([x @ w for w in of_layer]), expected)


@pytest.mark.parametrize(
    "dtype, name, eps",
    [
        (torch.float16, "float16", 2.0**-10),
        (torch.bfloat16, "bfloat16", 2.0**-7),
        (torch.float32, "float32", 2.0**-23),
        (torch.float64, "float64", 2.0**-23),
    ],
)
def test_stored_dtype(dtype, name, eps, write_model, llama_tensors, llama_config):
    stored = {key: value.to(dtype) for key, value in llama_tensors.items()}
    heads = skhead.load_heads(write_model(stored, llama_config, name=name))
    stack = read_role(heads, "Q")
    assert stack.tensor.dtype == torch.float32
    assert stack.eps.dtype == np.float64
    assert stack.eps.tolist() == [eps] * 12
    expected = stored["model.layers.0.self_attn.q_proj.weight"].float()[:8].T
    torch.testing.assert_close(stack.tensor[0], expected, rtol=0, atol=0)
    assert describe_sources(heads)[0].dtype == name


def test_mixed_dtypes_keep_their_own_rounding_error(write_model, llama_tensors, llama_config):
    key = "model.layers.1.self_attn.q_proj.weight"
    llama_tensors[key] = llama_tensors[key].to(torch.bfloat16)
    heads = skhead.load_heads(write_model(llama_tensors, llama_config))
    assert describe_sources(heads)[0].dtype == "bfloat16+float32"
    coarse, fine = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float32).eps
    stack = read_role(heads.iloc[::-1], "Q")
    assert stack.eps.shape == (len(stack.tensor),)
    assert stack.eps[stack.index].tolist() == [fine] * 4 + [coarse] * 4 + [fine] * 4
    values = read_role(heads, "V")
    assert values.eps.tolist() == [fine] * 6


def test_folding_then_centring(heads, llama_tensors):
    raw = skhead.load_weights(heads, "Q")
    gains = np.stack(
        [llama_tensors[f"model.layers.{i}.input_layernorm.weight"] for i in heads["layer"]]
    )
    expected = raw * gains[:, :, None]
    np.testing.assert_allclose(skhead.load_weights(heads, "Q", fold_norm=True), expected, rtol=1e-6)
    expected = expected - expected.mean(1, keepdims=True)
    with pytest.warns(UserWarning, match=r"center=True: .*normalises by rmsnorm, which keeps"):
        both = skhead.load_weights(heads, "Q", fold_norm=True, center=True)
    np.testing.assert_allclose(both, expected, atol=1e-6)


def test_centring_warns_once_per_source(heads, write_model, llama_tensors, llama_config):
    other = skhead.load_heads(write_model(llama_tensors, llama_config, name="other"))
    with pytest.warns(UserWarning, match="center=True") as caught:
        skhead.load_weights(pd.concat([heads, other]), "Q", center=True)
    assert len(caught) == 2
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize("role", ["", "QK", "q", "W_Q", 0, None])
def test_unknown_role(role, heads):
    with pytest.raises(ValueError, match="role must be one of Q, K, V, O, got"):
        skhead.load_weights(heads, role)


# Several sources


def test_list_of_sources(path, heads, write_model, llama_tensors, llama_config):
    doubled = {key: 2 * value for key, value in llama_tensors.items()}
    other = write_model(doubled, llama_config, name="other")
    both = skhead.load_heads([path, str(other)])
    assert both.index[[0, 12]].tolist() == ["model:L0H0", "other:L0H0"]
    assert both.index.is_unique
    stack = skhead.load_weights(both.iloc[::-1], "K")[::-1]
    np.testing.assert_array_equal(stack[:12], skhead.load_weights(heads, "K"))
    np.testing.assert_array_equal(stack[12:], 2 * stack[:12])
    assert [info.name for info in describe_sources(both)] == ["model", "other"]
    assert skhead.load_heads([path]).equals(heads)


def test_names_of_equal_directories_are_told_apart(tmp_path, path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "model").symlink_to(path)
    both = skhead.load_heads([tmp_path / "a" / "model", tmp_path / "b" / "model"])
    assert both.index[[0, 12]].tolist() == ["a/model:L0H0", "b/model:L0H0"]


def test_parts_of_one_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=24, num_layers=2, num_heads=4, d_kv=8, d_ff=32, vocab_size=11
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    path = str(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"encoder-decoder \(t5\).*'encoder', 'decoder', 'cross'"):
        skhead.load_heads(path)
    with pytest.raises(
        ValueError, match=r"part='self' is not a part of t5; it has 'encoder', 'dec"
    ):
        skhead.load_heads(path, part="self")
    with pytest.raises(ValueError, match=r"#decoder' and part='cross' disagree"):
        skhead.load_heads(f"{path}#decoder", part="cross")
    both = skhead.load_heads([f"{path}#decoder", f"{path}#cross"])
    assert both.index[[0, 8]].tolist() == ["t5#decoder:L0H0", "t5#cross:L0H0"]
    assert [info.part for info in describe_sources(both)] == ["decoder", "cross"]
    assert skhead.load_weights(both).shape == (16, 24, 8)


def test_list_of_sources_that_is_wrong(path):
    with pytest.raises(HeadTableError, match="the list of sources is empty"):
        skhead.load_heads([])
    with pytest.raises(HeadTableError, match="is named 2 times"):
        skhead.load_heads([path, f"{path}/."])


def test_sizes_that_do_not_fit(heads, write_model, lens_tensors):
    wide = {key: torch.randn(4, 8, 32) for key in lens_tensors if not key.endswith("W_O")}
    wide |= {key: torch.randn(4, 32, 8) for key in lens_tensors if key.endswith("W_O")}
    other = skhead.load_heads(write_model(wide, None, name="wide"))
    with pytest.raises(HeadShapeError, match=r"different d_model .*model: 24, .*wide: 8\)"):
        skhead.load_weights(pd.concat([heads, other]))
    thick = {key: torch.randn(4, 24, 6) for key in lens_tensors if not key.endswith("W_O")}
    thick |= {key: torch.randn(4, 6, 24) for key in lens_tensors if key.endswith("W_O")}
    other = skhead.load_heads(write_model(thick, None, name="thick"))
    with pytest.raises(HeadShapeError, match=r"several d_head .*model: 8, .*thick: 6\)"):
        skhead.load_weights(pd.concat([heads, other]))


# Checks


def test_check_returns_the_table(heads):
    heads["label"] = "x"
    checked = check_heads(heads, "Test")
    assert tuple(checked.columns) == HEAD_COLUMNS
    assert checked.equals(heads[list(HEAD_COLUMNS)])


@pytest.mark.parametrize("name", ["layer", "source", "anything"])
def test_index_name_does_no_harm(name, heads):
    column = heads[name] if name in heads else heads["head"]
    named = heads.set_index(column.rename(name), drop=False)
    checked = check_heads(named, "Test")
    assert checked.index.name is None
    assert checked.index.tolist() == column.tolist()
    assert named.index.name == name
    np.testing.assert_array_equal(skhead.load_weights(named), skhead.load_weights(heads))
    assert len(set(head_labels(named))) == 12
    assert describe_sources(named) == describe_sources(heads)


def test_index_of_several_levels(heads):
    named = heads.set_index(["source", "layer", "head"], drop=False)
    assert list(check_heads(named, "Test").index.names) == [None] * 3
    np.testing.assert_array_equal(skhead.load_weights(named), skhead.load_weights(heads))
    assert len(set(head_labels(named))) == 12


@pytest.mark.parametrize("dtype", [object, float, np.int32])
def test_check_restores_integer_types(dtype, heads):
    integers = list(HEAD_COLUMNS[1:])
    pd.testing.assert_frame_equal(
        check_heads(heads.astype(dict.fromkeys(integers, dtype)), "Test"), heads
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h: h.iloc[:0], r"Test: the heads table is empty"),
        (lambda h: h.drop(columns="layer"), r"Test: the heads table lacks the column layer\."),
        (lambda h: h[["source"]], r"lacks the columns layer, head, kv_head, n_layers, d_model, d_"),
        (lambda h: h[[*HEAD_COLUMNS, "layer"]], r"Test: .* has several columns named layer\."),
        (lambda h: h.to_numpy(), r"Test: expected a heads table .*got ndarray"),
        (lambda h: h.assign(head=h["head"] + 0.5), r"row 'L0H0' .*head=.*0\.5.*an integer"),
        (lambda h: h.assign(layer=-1), r"row 'L0H0' .* layer=.*-1.*of at least 0"),
        (lambda h: h.assign(d_head=0), r"row 'L0H0' .* d_head=.*0.*of at least 1"),
        (lambda h: h.assign(head="two"), r"row 'L0H0' .* head='two'"),
        (lambda h: h.assign(layer=np.nan), r"row 'L0H0' .* layer=.*nan"),
        (lambda h: h.assign(source=""), r"row 'L0H0' of the heads table has source ''"),
        (lambda h: h.assign(source=3), r"row 'L0H0' of the heads table has source 3"),
        (lambda h: h.assign(n_layers=2), r"has layer 2 of 2"),
    ],
)
def test_check_refuses(change, message, heads):
    with pytest.raises(HeadTableError, match=message):
        check_heads(change(heads), "Test")


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("head", 4, r"row L0H4 of the heads table does not exist in "),
        ("kv_head", 1, r"row L0H0 of the heads table says kv_head=1, and .* has 0"),
        ("n_layers", 9, r"row L0H0 of the heads table says n_layers=9, and .* has 3"),
        ("d_head", 9, r"row L0H0 of the heads table says d_head=9, and .* has 8"),
        ("d_model", 9, r"row L0H0 of the heads table says d_model=9, and .* has 24"),
    ],
)
def test_rows_that_are_not_in_the_source(column, value, message, heads):
    with pytest.raises(HeadTableError, match=message):
        skhead.load_weights(heads.iloc[:1].assign(**{column: value}))


def test_layer_that_is_not_in_the_source(heads):
    with pytest.raises(HeadTableError, match="row L7H0 of the heads table does not exist"):
        skhead.load_weights(heads.iloc[:1].assign(layer=7, n_layers=8))


def test_foreign_source(heads):
    with pytest.raises(SourceNotFoundError, match="'somewhere', and no live model of that name"):
        skhead.load_weights(heads.assign(source="somewhere"))


# Labels


def test_labels(heads, write_model, llama_tensors, llama_config):
    assert head_labels(heads) == heads.index.tolist()
    other = skhead.load_heads(write_model(llama_tensors, llama_config, name="other"))
    labels = head_labels(pd.concat([heads, other]))
    assert labels[0] == "model:L0H0"
    assert labels[12] == "other:L0H0"
    repeated = head_labels(heads.iloc[[3, 3, 4, 3]])
    assert repeated == ["model:L0H3", "model:L0H3 (2)", "model:L1H0", "model:L0H3 (3)"]
    assert head_labels(heads.reset_index(drop=True))[:2] == ["0", "1"]


def test_short_name_of_an_index_is_its_directory(write_sharded, llama_tensors, llama_config):
    one, other = (
        write_sharded(llama_tensors, llama_config, name=name) / "model.safetensors.index.json"
        for name in ("first", "second")
    )
    both = skhead.load_heads([one, other])
    assert [both.index[0], both.index[-1]] == ["first:L0H0", "second:L2H3"]


def test_layer_beyond_the_last_is_named(heads):
    wrong = heads.assign(n_layers=[1] + [3] * (len(heads) - 1), layer=2)
    with pytest.raises(HeadTableError, match=r"me: row 'L0H0' of the heads table has layer 2 of 1"):
        check_heads(wrong, "me")


def test_labels_that_are_equal_as_text(heads):
    labels = head_labels(heads.iloc[:3].set_axis(pd.Index([1, "1", 2], dtype=object)))
    assert labels == ["model:L0H0", "model:L0H1", "model:L0H2"]
    repeated = heads.iloc[[0, 0, 1]].set_axis(pd.Index([1, "1", 2], dtype=object))
    assert head_labels(repeated) == ["model:L0H0", "model:L0H0 (2)", "model:L0H1"]


def test_names_of_a_directory_and_its_file(path):
    both = skhead.load_heads([path, path / "model.safetensors"])
    assert both.index.is_unique
    assert both.index[0] == f"{path}:L0H0"
    assert both.index[12] == f"{path}/model.safetensors:L0H0"
    assert len({info.name for info in describe_sources(both)}) == 2


def test_live_name_that_is_no_file_name(lens_tensors):
    name = skhead.register_model(lens_tensors, ".")
    try:
        assert describe_sources(skhead.load_heads(name))[0].name == "."
    finally:
        skhead.unregister_model(name)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are not told here")
@pytest.mark.parametrize(("most", "open_maps"), [(0, [0, 0, 0]), (2**30, [0, 1, 1])])
def test_memory_maps_are_closed_once_much_was_read(path, heads, monkeypatch, most, open_maps):
    seen = []

    def reading(*arguments):
        seen.append(len(set(Path("/proc/self/maps").read_text().split()) & {str(file)}))
        return read_layer(*arguments)

    read_layer = stacks_module.read_layer
    file = next(Path(path).glob("*.safetensors")).resolve()
    monkeypatch.setattr(stacks_module, "_MAPPED_BYTES", most)
    monkeypatch.setattr(stacks_module, "read_layer", reading)
    read_role(heads, "Q")
    assert seen == open_maps
