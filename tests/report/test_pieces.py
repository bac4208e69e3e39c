from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import skhead
from skhead._report.charts import limits_of
from skhead._report.data import Options, analyse
from skhead._report.diagram import CLASS_COLOURS, class_colours
from skhead._report.labels import find_classes
from skhead._report.layout import BOX_HEIGHT, lay_out
from skhead._report.raster import Scale, pack_values, picture, shrink, spread
from skhead._report.text import number
from skhead.exceptions import HeadTableError
from skhead.weights import describe_sources


def decoded(uri):
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


def test_picture_is_the_matrix_in_colours():
    values = np.array([[0.0, 1.0, np.nan], [0.5, 2.0, -1.0]])
    pixels = decoded(picture(values, Scale(0.0, 1.0, "gray")))
    assert pixels.shape == (2, 3, 4)
    assert pixels[0, 2].tolist() == [0, 0, 0, 0]
    assert pixels[:, :, 0][[0, 0, 1, 1, 1], [0, 1, 0, 1, 2]].tolist() == [0, 255, 128, 255, 0]


def test_rounding_noise_gets_one_colour():
    values = np.array([[64.0, 64.0 + 1e-5]])
    pixels = decoded(picture(values, spread([values], 0.0)))
    assert (pixels[0, 0] == pixels[0, 1]).all()


def test_packed_values_come_back():
    values = np.random.default_rng(0).normal(size=(5, 7)) * 10
    values[2, 3] = np.nan
    packed = json.loads(pack_values(values))
    steps = np.frombuffer(base64.b64decode(packed["steps"]), "<u2").reshape(-1, packed["width"])
    back = packed["low"] + steps / 65534 * (packed["high"] - packed["low"])
    assert steps[2, 3] == 65535
    known = ~np.isnan(values)
    np.testing.assert_allclose(back[known], values[known], atol=1e-3)


def test_shrinking_keeps_the_largest_of_every_block():
    values = np.arange(35, dtype=np.float32).reshape(5, 7)
    values[:3, :3] = np.nan
    small, block = shrink(values, 3)
    assert block == 3
    assert small.shape == (2, 3)
    assert np.isnan(small[0, 0])
    assert small[0, 1:].tolist() == [19.0, 20.0]
    assert small[1].tolist() == [30.0, 33.0, 34.0]
    assert shrink(values, 7)[1] == 1


@pytest.mark.parametrize(
    "value,text",
    [
        (53.828, "53.83"),
        (-0.86712, "−0.8671"),
        (0.0027071, "0.002707"),
        (9504.0, "9,504"),
        (0.0, "0"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_numbers_have_four_digits_and_a_minus_sign(value, text):
    assert number(value) == text


def test_axis_holds_all_few_values_and_all_marks():
    low, high = limits_of([np.array([1.0, 9.0])], [0.5, None, 12.0])
    assert 0 <= low < 0.5
    assert high > 12
    many = np.r_[np.ones(100_000), 1000.0]
    assert limits_of([many], [2.0])[1] < 3


def test_classes_past_nine_share_a_grey():
    colours = class_colours([f"class {i}" for i in range(12)])
    assert len({colours[f"class {i}"] for i in range(9)}) == len(CLASS_COLOURS) == 9
    assert len({colours[f"class {i}"] for i in range(9, 12)}) == 1


def contrast(one, other):
    def luminance(colour):
        digits = colour.lstrip("#")
        digits = "".join(2 * c for c in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_on_classes_is_readable():
    assert (
        min(contrast(fill, ink) for fill, ink in class_colours(list("abcdefghij")).values()) > 4.5
    )


def test_layout_keeps_layers_in_columns_and_heads_apart():
    options = Options(composition=False)
    analysis = analyse("skhead/induction-2l", options, lambda _: None)
    layout = lay_out(analysis)
    nodes = set(layout.nodes.values())
    assert len({(node.x, node.y) for node in nodes}) == len(nodes) == 16
    for edge in analysis.edges.to_dict("records"):
        start = layout.nodes["writes", edge["source"]]
        assert start.x + layout.box < layout.nodes["reads", edge["target"]].x
    assert all(0 <= node.x <= layout.width - layout.box for node in nodes)
    assert all(0 <= node.y <= layout.height - BOX_HEIGHT for node in nodes)


def test_long_edges_pass_between_heads(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(5):
        for role in "QKV":
            tensors[f"blocks.{layer}.attn.W_{role}"] = rng.normal(size=(3, 12, 2))
        tensors[f"blocks.{layer}.attn.W_O"] = rng.normal(size=(3, 2, 12))
    path = tmp_path / "random.safetensors"
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, path)
    layout = lay_out(analyse(path, Options(composition=False), lambda _: None))
    passing = [stop for route in layout.routes.values() for stop in route]
    assert passing
    for left, height in passing:
        beside = [node.y for node in layout.nodes.values() if node.x == left]
        assert beside
        assert all(not y <= height <= y + BOX_HEIGHT for y in beside)
    for (source, target), route in layout.routes.items():
        start, end = layout.nodes["writes", source], layout.nodes["reads", target]
        places = [start.x, *(left for left, _ in route), end.x]
        assert places == sorted(set(places))


@pytest.fixture
def bundled():
    heads = skhead.load_heads("skhead/induction-2l")
    return heads, describe_sources(heads)[0]


def test_labels_from_a_file(bundled, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("layer,head,class\n1,2,Null\n0,7,b c\n")
    classes = find_classes(str(path), *bundled)
    assert classes.name == "mine"
    assert classes.values["L1H2"] == "Null"
    assert classes.values["L0H7"] == "b c"
    assert (classes.values == "None").sum() == 14


@pytest.mark.parametrize(
    "text,message",
    [
        ("layer,head\n1,2\n", r"mine.csv lacks the column 'class'.*found layer, head"),
        ("layer,head,class\n1,2,a\n1,9,b\n", r"line 3: the model has no head L1H9"),
        ("layer,head,class\n1,2,a\n1,2,b\n", r"line 3: L1H2 is listed a second time"),
        ("", r"mine.csv is no readable CSV file"),
    ],
)
def test_bad_label_files(bundled, tmp_path, text, message):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(HeadTableError, match=message):
        find_classes(str(path), *bundled)


def test_labels_are_chosen_only_where_they_fit(bundled, gpt2_path):
    assert find_classes(None, *bundled).name == "induction-2l"
    assert find_classes("none", *bundled) is None
    heads = skhead.load_heads(gpt2_path)
    info = describe_sources(heads)[0]
    assert find_classes(None, heads, info).automatic
    assert not find_classes("wang2022", heads, info).automatic
