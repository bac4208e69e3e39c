from __future__ import annotations

import re
from html import unescape

import numpy as np
import pandas as pd
import pytest
from architectures import ZOO, fresh_model
from pages import Tables, summary_of, words_of
from safetensors.numpy import load_file, save_file

import skhead
from skhead._report.glossary import COMPOSITION, MAPS, PLACES, figures
from skhead._report.verdicts import rules_for
from skhead.datasets import bundled_path
from skhead.readout import SubspaceReadout
from skhead.report import write_report

MODEL = "skhead/induction-2l"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(MODEL, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def scores():
    return skhead.CircuitScorer().fit_transform(skhead.load_heads(MODEL))


def cards_of(page):
    """Markup of every card by its head."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<details class="card" id="([^"]*)">(.*?)</details>', text, flags=re.S)
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


def plain_text(markup):
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def told(cells):
    """Figures of a table without its headings, NaN where a cell is empty."""
    return [
        [float(cell.replace("−", "-").replace(",", "")) if cell else np.nan for cell in row]
        for row in cells
    ]


def figures_on_cards(page, present):
    """Figures read back from every card, by head and column."""
    tables = Tables(page).tables
    maps = [row[1:3] for row in MAPS if set(row[1:3]) & present]
    places = [(column,) for _, column, _ in PLACES if column in present]
    composed = [
        tuple(
            f"{kind}_composition_{side}_{how}" for side in ("in", "out") for how in ("max", "mean")
        )
        for kind, _ in COMPOSITION
    ]
    found = {}
    for label in cards_of(page):
        row = {}
        for name, columns in (("maps", maps), ("places", places), ("composition", composed)):
            cells = told(tables[f"{label}-{name}"][1:])
            assert len(cells) == len(columns)
            for values, names in zip(cells, columns, strict=True):
                row |= dict(zip(names, values, strict=True))
        row.pop(None, None)
        found[label] = row
    return pd.DataFrame(found).T


def assert_same_figures(shown, scores):
    """Equal to three decimals, or to four digits from ten on."""
    assert set(shown.columns) == set(scores.columns)
    expected = scores.loc[shown.index, shown.columns]
    allowed = np.where(expected.abs() < 10, 5.01e-4, expected.abs() * 5.1e-4)
    off = (shown - expected).abs() > allowed
    assert not off.any(axis=None), off.stack()[lambda found: found].index.tolist()


def test_every_score_is_on_a_card():
    names = [name for name, _, _ in figures()]
    assert len(names) == len(set(names))
    scorer = skhead.CircuitScorer().fit(skhead.load_heads(MODEL))
    assert set(names) == set(scorer.get_feature_names_out())


def test_figures_of_cards_are_those_of_the_scorer(page, scores):
    shown = figures_on_cards(page, set(scores.columns))
    assert shown.index.tolist() == scores.index.tolist()
    assert_same_figures(shown, scores)
    assert "nan" not in plain_text("".join(cards_of(page).values())).lower()


def test_heads_file_has_the_scores(page, scores):
    heads = pd.read_csv(page.with_name("heads.csv"), index_col="label")
    np.testing.assert_allclose(heads[scores.columns], scores, rtol=1e-9, atol=1e-12)


def test_words_follow_from_thresholds_and_scores(page, scores):
    rules = rules_for(128, 16, composition=True)
    cards, told_of = cards_of(page), summary_of(page)["cards"]["rules"]
    assert set(told_of) == {rule.key for rule in rules}
    for rule in rules:
        reached = np.ones(len(scores), dtype=bool)
        for condition in rule.conditions:
            sign = np.sign(condition.threshold)
            reached &= sign * scores[condition.score] >= abs(condition.threshold)
        assert told_of[rule.key]["heads"] == scores.index[reached].tolist()
        words = rule.words.partition(" {")[0]
        for label, markup in cards.items():
            assert (words in plain_text(markup)) == (label in told_of[rule.key]["heads"])
    assert told_of["induction"]["heads"] == told_of["copies"]["heads"] == ["L1H1"]
    assert told_of["previous_token"]["heads"] == told_of["feeds_induction"]["heads"] == ["L0H0"]
    assert "builds its keys on L0H0" in plain_text(cards["L1H1"])
    assert "shapes the keys of L1H1" in plain_text(cards["L0H0"])
    assert "Previous Token" in plain_text(cards["L0H0"])


def test_induction_heads_of_the_zoo_are_told(tmp_path):
    page = write_report("skhead/zoo/learned-attn-2", tmp_path)
    rules = summary_of(page)["cards"]["rules"]
    pairs = skhead.induction_pairs(skhead.load_heads("skhead/zoo/learned-attn-2"))
    called = pairs[pairs["is_induction"]]
    assert rules["induction"]["heads"] == sorted(set(called["induction_head"]))
    assert set(rules["feeds_induction"]["heads"]) >= set(called["previous_head"])


@pytest.fixture
def random_model(tmp_path):
    """Heads of independent random weights, with tokens and learned positions."""
    rng = np.random.default_rng(3)
    tensors = {
        "embed.W_E": rng.normal(size=(90, 96)),
        "unembed.W_U": rng.normal(size=(96, 90)),
        "pos_embed.W_pos": rng.normal(size=(64, 96)),
    }
    for layer in range(3):
        for role in "QKV":
            tensors[f"blocks.{layer}.attn.W_{role}"] = rng.normal(size=(8, 96, 12)) / 96**0.5
        tensors[f"blocks.{layer}.attn.W_O"] = rng.normal(size=(8, 12, 96)) / 12**0.5
    path = tmp_path / "random.safetensors"
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, path)
    return path


def test_nothing_is_said_of_random_heads(random_model, tmp_path):
    page = write_report(random_model, tmp_path / "out")
    rules = summary_of(page)["cards"]["rules"]
    assert {key: found["heads"] for key, found in rules.items() if found["heads"]} == {}
    cards = cards_of(page)
    assert len(cards) == 24
    assert all("nothing above the thresholds" in plain_text(card) for card in cards.values())
    assert "Head by head" not in words_of(page)


def test_thresholds_grow_for_heads_of_few_dimensions():
    def threshold(d_head, key):
        rules = {rule.key: rule for rule in rules_for(64, d_head, composition=False)}
        return rules[key].conditions[0].threshold

    assert threshold(64, "copies") == -threshold(64, "suppresses") == 0.5
    assert threshold(8, "copies") == pytest.approx(3 * 1.6 / 8)
    assert threshold(8, "previous_token") == threshold(64, "previous_token")


@pytest.mark.parametrize("label,side", [("L1H1", "in"), ("L0H0", "out")])
def test_partners_are_the_strongest_of_each_kind(page, label, side):
    heads = skhead.load_heads(MODEL)
    similarity = skhead.ProjectionKernel().fit_transform(heads)
    judged = skhead.NullCalibrator(null="anisotropic").fit_transform(similarity).calibration
    composition = skhead.CompositionScore().fit_transform(heads)
    rows = Tables(page).tables[f"{label}-{side}"][1:]
    assert len(rows) == 9
    for p, pair in enumerate(similarity.pairs):
        scores = similarity.pair(pair).loc[label] if side == "out" else similarity.pair(pair)[label]
        best = scores.dropna().sort_values(ascending=False).head(3)
        for row, (other, score) in zip(rows[3 * p : 3 * p + 3], best.items(), strict=True):
            source, target = (label, other) if side == "out" else (other, label)
            at = heads.index.get_loc(source), heads.index.get_loc(target), p
            assert row[1] == other
            figures = told([[cell.rstrip("*") for cell in row[2:]]])[0]
            weight = composition.pair(pair).loc[source, target] * 128**0.5
            expected = [score, score / 2.0, judged.z[at], weight]
            assert figures == pytest.approx(expected, rel=6e-3, abs=6e-4)
            assert row[4].endswith("*") == (judged.q[at] <= 0.05)


def links_and_names(page):
    text = page.read_text(encoding="utf-8")
    return set(re.findall(r'href="#([^"]*)"', text)), re.findall(r'\bid="([^"]*)"', text)


def test_links_lead_somewhere(page):
    links, names = links_and_names(page)
    assert len(names) == len(set(names))
    assert links <= set(names)
    assert links >= set(skhead.load_heads(MODEL).index)
    text = page.read_text(encoding="utf-8")
    nodes = re.findall(r'<a class="node[^>]*href="#([^"]*)"[^>]*data-head="([^"]*)"', text)
    assert len(nodes) == 16
    assert all(target == head for target, head in nodes)


def test_gpt2_cards_say_what_is_missing(gpt2_page, gpt2_path):
    cards, text = cards_of(gpt2_page), words_of(gpt2_page)
    assert len(cards) == 144
    assert gpt2_page.stat().st_size < 3_000_000
    scores = skhead.CircuitScorer(errors="ignore").fit_transform(skhead.load_heads(gpt2_path))
    scores = scores.dropna(axis=1, how="all")
    assert_same_figures(figures_on_cards(gpt2_page, set(scores.columns)), scores)
    for markup in cards.values():
        card = plain_text(markup)
        assert "copying of tokens, matching of tokens" in card
        assert "there is no tensor 'wte.weight' in model.safetensors." in card
        assert "Tokens nearest to what it writes are not told: there is no tensor" in card
        assert "copying, matching" not in card
    assert re.search(r"\bnan\b", text, flags=re.IGNORECASE) is None
    assert "erases what it reads signed identity −0.867" in plain_text(cards["L4H7"])
    missing = summary_of(gpt2_page)["cards"]["missing"]
    assert set(missing) == {
        "ov_copying", "ov_diagonal", "ov_top1_self", "qk_matching", "qk_diagonal", "qk_top1_self",
        "induction_matching", "induction_feeding", "induction_strength",
    }  # fmt: skip
    links, names = links_and_names(gpt2_page)
    assert links <= set(names)


def test_a_gain_that_cannot_be_folded_is_told(tmp_path):
    fresh_model(ZOO["llama"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    page = write_report(tmp_path, tmp_path / "report", fold_norm=True)
    card = plain_text(cards_of(page)["L1H0"])
    assert "Cannot be told here: copying of tokens" in card
    assert "there is no tensor 'model.norm.weight' in" in card
    assert "Tokens nearest to what it writes are not told: fold_norm=True" in card
    missing = summary_of(page)["cards"]["missing"]
    assert set(missing) == {"ov_copying", "ov_diagonal", "ov_top1_self", "induction_strength"}


def test_cards_can_be_left_out(tmp_path):
    page = write_report(MODEL, tmp_path, cards=False)
    assert cards_of(page) == {}
    assert summary_of(page)["cards"] is None
    links, names = links_and_names(page)
    assert links <= set(names)
    assert 'role="img" data-head="L1H1"' in page.read_text(encoding="utf-8")
    heads = pd.read_csv(page.with_name("heads.csv"))
    assert {"pk_vo", "identity_signed"} <= set(heads)
    assert "previous_token" not in heads


def test_without_composition_none_is_told(tmp_path):
    page = write_report(MODEL, tmp_path, composition=False)
    assert "L0H0-composition" not in Tables(page).tables
    assert not any("composition" in key for key in summary_of(page)["cards"]["rules"])
    heads = pd.read_csv(page.with_name("heads.csv"))
    assert not any("composition" in name for name in heads)
    assert "induction_strength" in heads
    assert "compared pairs, with random expectation and null law" in words_of(page)
    assert "composition" not in pd.read_csv(page.with_name("pairs.csv"))


def test_large_models_have_cards_of_some_heads(models_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("skhead._report.data.MOST_CARDS", 39)
    monkeypatch.setattr("skhead._report.data._BEST", 1)
    page = write_report(models_dir / "stories260k", tmp_path, k=3)
    cards, summary = cards_of(page), summary_of(page)
    drawn = {edge[side] for edge in summary["top_pairs"] for side in ("source", "target")}
    scores = skhead.CircuitScorer().fit_transform(skhead.load_heads(models_dir / "stories260k"))
    assert drawn | {scores["previous_token"].idxmax(), scores["ov_copying"].idxmin()} <= set(cards)
    assert list(cards) == summary["cards"]["heads"]
    assert len(cards) < 40
    assert f"Cards for {len(cards)} of 40 heads" in words_of(page)
    links, names = links_and_names(page)
    assert links <= set(names)
    heads = pd.read_csv(page.with_name("heads.csv"), index_col="label")
    np.testing.assert_allclose(heads["ov_copying"], scores["ov_copying"], rtol=1e-9)


def test_shared_layers_say_which_card_lists_what(models_dir, tmp_path):
    page = write_report(models_dir / "rxnmapper-albert", tmp_path)
    cards = cards_of(page)
    assert len(cards) == 16
    assert "There is no earlier head to compare with." in plain_text(cards["L0H5"])
    assert "There is no later head to compare with." in plain_text(cards["L1H5"])
    assert "the logits come after a dense layer" in plain_text(cards["L0H5"])
    assert "a card of layer 0 lists readers of what the head writes" in words_of(page)


def test_heads_across_streams_have_no_token_circuits(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=32, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=3, d_ff=16, vocab_size=20
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    page = write_report(tmp_path / "t5", tmp_path / "cross", part="cross")
    card = plain_text(cards_of(page)["L1H2"])
    assert "reads keys and values from another stream" in card
    assert re.search(r"\bnan\b", words_of(page), flags=re.IGNORECASE) is None
    heads = skhead.load_heads(tmp_path / "t5", part="cross")
    norms = skhead.CircuitScorer(["ov_norm"], errors="ignore").fit_transform(heads)["ov_norm"]
    assert f"norm {norms['L1H2']:.3f}" in card
    assert summary_of(page)["cards"]["rules"] == {}
    assert "None of the scores that plain words rest on is defined" in words_of(page)


def test_overlaps_fixed_by_ranks_leave_the_order_to_composition(models_dir, tmp_path):
    page = write_report(models_dir / "induction-1head" / "perfect.safetensors", tmp_path)
    cards = cards_of(page)
    assert "continues what came after a repeat (induction)" in plain_text(cards["L1H0"])
    assert "it writes to the whole residual stream" in plain_text(cards["L1H0"])
    assert [row[1] for row in Tables(page).tables["L1H0-in"][1:]] == ["L0H0"] * 3
    page = write_report(
        models_dir / "induction-1head" / "perfect.safetensors", tmp_path, composition=False
    )
    assert "All overlaps are fixed by the ranks" in plain_text(cards_of(page)["L1H0"])


def test_tokens_are_those_of_the_readout(page):
    heads = skhead.load_heads(MODEL)
    best = SubspaceReadout(n_tokens=8).fit(heads).top_tokens(heads)
    for label, markup in cards_of(page).items():
        own = best[best["head"] == label]
        shown = re.search(r'<p class="tokens">(.*?)</p>', markup).group(1)
        assert re.findall(r"<code>(\d+)</code>", shown) == own["token"].astype(str).tolist()
        values = [float(text) for text in re.findall(r"</code> ([\d.]+)", shown)]
        assert values == pytest.approx(own["score"].tolist(), abs=5.1e-3)
        assert "Tokens (ids) nearest" in shown


def test_token_texts_are_shown_and_escaped(tmp_path):
    model = tmp_path / "model.safetensors"
    model.write_bytes((bundled_path(MODEL) / "model.safetensors").read_bytes())
    heads = skhead.load_heads(tmp_path)
    nearest = SubspaceReadout(n_tokens=1).fit(heads).top_tokens(heads).set_index("head")["token"]
    (tmp_path / "vocab.txt").write_text("".join(f"<b>{token}\n" for token in range(68)))
    card = cards_of(write_report(tmp_path, tmp_path / "out"))["L1H1"]
    assert f"<code>&lt;b&gt;{nearest['L1H1']}</code>" in card
    assert "Tokens nearest to what it writes" in plain_text(card)
