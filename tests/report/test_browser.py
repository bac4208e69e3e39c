from __future__ import annotations

import pytest

from skhead.report import write_report

pytestmark = pytest.mark.browser

COLUMN = (
    "Array.from(document.querySelectorAll('#edge-table tbody tr'))"
    ".map(row => row.cells[{}].textContent)"
)


def assert_clean(tab):
    assert tab.complaints == []
    assert tab.js("document.documentElement.dataset.ready") == "true"
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_loads_without_complaint_or_network(tab, page, width, dark):
    tab.open(page, width=width, dark=dark)
    assert_clean(tab)
    assert tab.js("document.documentElement.scrollWidth") <= width
    ground = tab.js("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(21, 23, 27)" if dark else "rgb(252, 251, 248)")


@pytest.mark.parametrize("name", ["perfect", "loose"])
def test_two_heads_render(tab, models_dir, tmp_path, name):
    tab.open(write_report(models_dir / "induction-1head" / f"{name}.safetensors", tmp_path))
    assert_clean(tab)
    assert tab.js("document.querySelectorAll('.node').length") == 2
    assert tab.js("document.querySelectorAll('.edge.weak').length") == 3


def test_gpt2_renders(tab, gpt2_page):
    tab.open(gpt2_page)
    assert_clean(tab)
    assert tab.js("document.querySelectorAll('.node').length") == 52
    assert tab.js("document.querySelectorAll('.node.classed').length") == 24


def test_labels_fit_their_boxes(opened):
    widest = opened.js(
        "Math.max(...Array.from(document.querySelectorAll('.node')).map(n => "
        "n.querySelector('text').getBBox().width - n.querySelector('rect').getBBox().width))"
    )
    assert widest < 0


def test_a_click_sorts_and_a_second_turns_round(opened):
    button = "document.querySelectorAll('#edge-table th button')[4]"
    opened.js(f"{button}.click()")
    scores = [float(text) for text in opened.js(COLUMN.format(4))]
    assert scores == sorted(scores, reverse=True)
    assert opened.js(f"{button}.parentElement.getAttribute('aria-sort')") == "descending"
    opened.js(f"{button}.click()")
    scores = [float(text) for text in opened.js(COLUMN.format(4))]
    assert scores == sorted(scores)
    assert opened.js("document.querySelectorAll('#edge-table [aria-sort]').length") == 1


def test_sorting_by_keyboard(opened):
    opened.js("document.querySelectorAll('#edge-table th button')[2].focus()")
    opened.press("Enter")
    names = opened.js(COLUMN.format(2))
    assert names == sorted(names, key=lambda text: [int(part) for part in text[1:].split("H")])


def test_filter_keeps_rows_with_all_words(opened):
    opened.js(
        "(() => { const box = document.querySelector('[data-filter=edge-table]');"
        "box.value = 'ok l0h0'; box.dispatchEvent(new Event('input')); })()"
    )
    shown = opened.js(
        "Array.from(document.querySelectorAll('#edge-table tbody tr:not([hidden])'))"
        ".map(r => r.textContent)"
    )
    assert shown
    assert all("OK" in text and "L0H0" in text for text in shown)
    assert opened.js("document.getElementById('edge-count').textContent") == f"{len(shown)} of 60"


def test_pointing_and_focus_show_a_head(opened):
    details = "document.getElementById('details').textContent"
    before = opened.js(details)
    opened.move(".node[data-head=L1H1] rect")
    assert opened.js(details).startswith("L1H1")
    lit = "Array.from(document.querySelectorAll('.edge.lit')).map(e => e.dataset.target)"
    assert set(opened.js(lit)) == {"L1H1"}
    opened.move("h1")
    assert opened.js(details) == before
    opened.js("document.querySelector('.node[data-head=L0H0]').focus()")
    assert opened.js(details).startswith("L0H0")
    opened.press("Escape")
    assert opened.js(details) == before


def test_kinds_can_be_hidden(opened):
    hidden = "document.querySelectorAll('.edge.off').length"
    opened.js("document.getElementById('show-OK').click()")
    assert opened.js(hidden) == 20
    opened.js("document.getElementById('show-OK').click()")
    assert opened.js(hidden) == 0


def test_heat_maps_tell_the_value_under_the_pointer(opened, page):
    opened.move("#matrices figure:nth-of-type(2) image", 1.5 / 8, 0.5 / 8)
    told = opened.js("document.querySelectorAll('#matrices .readout')[1].textContent")
    label, _, value = told.partition(": ")
    assert label == "L0H0 → L1H1"
    rows = (line.split(",") for line in page.with_name("edges.csv").read_text().splitlines())
    score = next(float(row[4]) for row in rows if row[:4] == ["OK", "1", "L0H0", "L1H1"])
    assert float(value) == pytest.approx(score, rel=5e-4)
