"""Contrast and names by axe-core, and everything that a keyboard reaches, in a real browser."""

from __future__ import annotations

import json

import pytest

from skhead.report import write_comparison

pytestmark = pytest.mark.browser

RUN = (
    "axe.run(document, {{runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'],"
    "resultTypes: ['violations']}}).then(found => JSON.stringify(found.{}.map("
    "rule => [rule.id, rule.nodes.map(node => node.html.slice(0, 160))])))"
)
FOCUSED = "document.activeElement"
GROUND = "getComputedStyle(document.body).backgroundColor"
DARK, LIGHT = "rgb(21, 23, 27)", "rgb(252, 251, 248)"
COUNT = "document.querySelectorAll('#{} tbody tr:not([hidden])').length"
COLUMN = (
    "Array.from(document.querySelectorAll('#head-table tbody tr')).map(row => row.cells[{}].{})"
)


def assert_no_violation(tab, axe, page):
    tab.open(page)
    tab.js(f"{axe}; 0")
    tab.js(
        "document.querySelectorAll('details:nth-of-type(-n+3)').forEach(d => { d.open = true; })"
    )
    for width in (1280, 390):
        for dark in (False, True):
            tab.resize(width, dark)
            found = json.loads(tab.resolve(RUN.format("violations")))
            assert found == [], (width, dark)


def test_report_has_no_violation(tab, axe, page):
    assert_no_violation(tab, axe, page)


@pytest.mark.parametrize("second", [None, "skhead/zoo/learned-attn-2"])
def test_comparison_has_no_violation(tab, axe, tmp_path, second):
    page = write_comparison("skhead/induction-2l", second, tmp_path, fold_norm_b=second is None)
    assert_no_violation(tab, axe, page)
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    assert tab.js("document.documentElement.scrollWidth") == 390
    tab.js("document.querySelector('[data-filter=score-table]').focus()")
    tab.type("copying")
    assert tab.js("document.getElementById('score-count').textContent") == (
        f"{tab.js(COUNT.format('score-table'))} of 42"
    )


def test_axe_sees_what_is_wrong(tab, axe, page):
    tab.open(page)
    tab.js(f"{axe}; 0")
    tab.js("document.documentElement.style.setProperty('--soft', '#d0d0d0')")
    tab.js("document.querySelector('#edge-count').parentElement.querySelector('label')"
           ".replaceWith(document.querySelector('[data-filter=edge-table]'))")  # fmt: skip
    tab.js("document.querySelector('[data-filter=edge-table]').removeAttribute('placeholder')")
    found = {name for name, _ in json.loads(tab.resolve(RUN.format("violations")))}
    assert {"color-contrast", "label"} <= found


def test_first_stop_of_the_tab_key_skips_to_the_content(opened):
    opened.press("Tab")
    assert opened.js(f"{FOCUSED}.className") == "skip"
    assert opened.js(f"{FOCUSED}.getBoundingClientRect().left") == 0
    opened.press("Enter")
    opened.wait_for(f"{FOCUSED}.id === 'main'")
    opened.press("Tab")
    assert opened.js(f"{FOCUSED}.closest('main') !== null")


def test_focus_is_seen_in_the_order_of_the_page(opened):
    seen = []
    for _ in range(12):
        opened.press("Tab")
        seen.append(opened.js(f"[{FOCUSED}.tagName, {FOCUSED}.matches(':focus-visible')]"))
    assert all(visible for _, visible in seen)
    assert [name for name, _ in seen[:3]] == ["A", "BUTTON", "A"]
    stops = "Array.from(document.querySelectorAll('[tabindex]')).map(e => e.tabIndex)"
    assert set(opened.js(stops)) <= {0, -1}


@pytest.mark.parametrize("prefers_dark", [False, True])
def test_colours_turn_round(tab, page, prefers_dark):
    tab.open(page, dark=prefers_dark)
    before, after = (DARK, LIGHT) if prefers_dark else (LIGHT, DARK)
    pressed = "document.getElementById('theme').getAttribute('aria-pressed')"
    assert (tab.js(GROUND), tab.js(pressed)) == (before, str(prefers_dark).lower())
    tab.click("#theme")
    assert (tab.js(GROUND), tab.js(pressed)) == (after, str(not prefers_dark).lower())
    tab.press(" ")
    assert (tab.js(GROUND), tab.js(pressed)) == (before, str(prefers_dark).lower())
    assert tab.complaints == []


def test_all_heads_sort_by_mouse_and_by_keyboard(opened):
    opened.click("#head-table th:nth-child(4) button")
    likely = [float(text) for text in opened.js(COLUMN.format(3, "dataset.v"))]
    assert likely == sorted(likely, reverse=True)
    assert opened.js("document.querySelector('#head-table th:nth-child(4)').ariaSort") == (
        "descending"
    )
    opened.js("document.querySelector('#head-table th button').focus()")
    opened.press("Enter")
    names = opened.js(COLUMN.format(0, "textContent"))
    assert names == [f"L{i}H{j}" for i in range(2) for j in range(8)]
    opened.press(" ")
    assert opened.js(COLUMN.format(0, "textContent")) == names[::-1]
    assert opened.js("document.querySelector('#head-table th').ariaSort") == "descending"


@pytest.mark.parametrize("key,word,total", [("head", "induction", 16), ("furthest", "ok", 60)])
def test_filters_tell_how_many_are_left(opened, key, word, total):
    opened.js(f"document.querySelector('[data-filter={key}-table]').focus()")
    opened.type(word)
    left = opened.js(COUNT.format(f"{key}-table"))
    assert 0 < left < total
    count = f"document.getElementById('{key}-count')"
    assert opened.js(f"{count}.textContent") == f"{left} of {total}"
    assert opened.js(f"{count}.getAttribute('role')") == "status"


def test_edges_that_do_not_stand_out_can_be_hidden(opened, page):
    numbers = json.loads(page.with_name("summary.json").read_text(encoding="utf-8"))
    standing = sum(edge["q_empirical"] <= 0.05 for edge in numbers["top_pairs"])
    shown = "Array.from(document.querySelectorAll('.edge')).filter(e => e.getClientRects().length)"
    opened.js("document.getElementById('only-standing').focus()")
    opened.press(" ")
    assert opened.js(f"{shown}.length") == standing
    opened.js("document.querySelector('.node[data-head=L0H0]').focus()")
    items = opened.js("Array.from(document.querySelectorAll('#details li')).map(e => e.innerText)")
    assert items
    assert all(text.endswith("stands out") for text in items)


def test_page_is_read_without_a_script(tab, page):
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(page, width=390)
        for hidden in ("#theme", ".scripted input"):
            assert tab.js(f"document.querySelector('{hidden}').getClientRects().length") == 0
        assert tab.js("document.querySelectorAll('#head-table tbody tr').length") == 16
        tab.click("#L1H1 summary")
        assert tab.js("document.getElementById('L1H1').open")
        assert tab.js("document.documentElement.scrollWidth") == 390
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


def test_print_hides_what_paper_cannot_do(opened):
    opened.call("Emulation.setEmulatedMedia", media="print")
    try:
        for hidden in ("nav", "#theme", ".skip", "input[type=search]"):
            assert opened.js(f"document.querySelector('{hidden}').getClientRects().length") == 0
        assert opened.js("getComputedStyle(document.querySelector('.tall')).maxHeight") == "none"
    finally:
        opened.call("Emulation.setEmulatedMedia", media="")
