from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser

OPEN = "Array.from(document.querySelectorAll('.card[open]')).map(card => card.id)"
FOCUSED = "document.activeElement.closest('.card')?.id"
TOP = "document.getElementById('{}').getBoundingClientRect().top"


@pytest.fixture
def opened(tab, page):
    tab.open(page)
    tab.js("document.documentElement.style.scrollBehavior = 'auto'")
    yield tab
    assert tab.complaints == []


def test_a_click_on_a_node_opens_its_card(opened):
    assert opened.js(OPEN) == []
    opened.click(".node[data-head=L1H1] rect")
    opened.wait_for(f"{FOCUSED} === 'L1H1'")
    assert opened.js(OPEN) == ["L1H1"]
    assert opened.js("location.hash") == "#L1H1"
    assert -1 <= opened.js(TOP.format("L1H1")) < 900


def test_enter_on_a_node_opens_its_card(opened):
    opened.js("document.querySelector('.node[data-head=L0H0]').focus()")
    opened.press("Enter")
    opened.wait_for(f"{FOCUSED} === 'L0H0'")
    assert opened.js(OPEN) == ["L0H0"]


def test_a_closed_card_opens_again_by_the_same_link(opened):
    for _ in range(2):
        opened.click("#edge-table tbody a[href='#L1H1']")
        opened.wait_for(f"{FOCUSED} === 'L1H1'")
        assert opened.js(OPEN) == ["L1H1"]
        opened.press("Enter")
        opened.wait_for("!document.getElementById('L1H1').open")


def test_an_address_leads_to_a_card(tab, page):
    tab.open(page, fragment="#L0H2")
    tab.wait_for(f"{FOCUSED} === 'L0H2'")
    assert tab.js(OPEN) == ["L0H2"]
    assert tab.complaints == []
    tab.open(page, fragment="#%E0%A4")
    assert tab.js(OPEN) == []
    assert tab.complaints == []


def test_cards_are_filtered_by_their_words(opened):
    opened.js(
        "(() => { const box = document.getElementById('card-filter'); box.value = 'Induction';"
        "box.dispatchEvent(new Event('input')); })()"
    )
    shown = "Array.from(document.querySelectorAll('.card:not([hidden])')).map(card => card.id)"
    assert opened.js(shown) == ["L0H0", "L1H1"]
    assert opened.js("document.getElementById('card-count').textContent") == "2 of 16"
    opened.js("document.getElementById('card-filter').value = 'L1H3'")
    opened.js("document.getElementById('card-filter').dispatchEvent(new Event('input'))")
    assert opened.js("document.querySelector('#card-list h3').hidden") is True
    opened.js("location.hash = 'L0H5'")
    opened.wait_for(f"{shown}.join() === 'L0H5,L1H3'")


@pytest.mark.parametrize("width", [1280, 390])
def test_open_cards_fit_the_window(tab, page, width):
    tab.open(page, width=width)
    tab.js("document.getElementById('card-toggle').click()")
    assert len(tab.js(OPEN)) == 16
    tab.js("document.querySelector('.glossary').open = true")
    assert tab.js("document.documentElement.scrollWidth") <= width
    tab.js("document.getElementById('card-toggle').click()")
    assert tab.js(OPEN) == []
    assert tab.complaints == []
