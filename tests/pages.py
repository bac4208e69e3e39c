"""What a report says, read back from its files."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path


class Tables(HTMLParser):
    """Rows of every table of a page, a cell by its sort value or else its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self._name, self._cell = "", None
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "table":
            self._name = given["id"]
            self.tables[self._name] = []
        elif tag == "tr":
            self.tables[self._name].append([])
        elif tag == "td":
            self._cell = given.get("data-v", "")
            self.tables[self._name][-1].append(self._cell)

    def handle_endtag(self, tag):
        if tag == "td":
            self._cell = None

    def handle_data(self, data):
        if self._cell == "":
            self.tables[self._name][-1][-1] += data


def words_of(page: Path) -> str:
    """Visible text of a page, with single spaces."""
    text = re.sub(r"<(style|script).*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


def summary_of(page: Path) -> dict:
    """Numbers written beside a page."""
    return json.loads(page.with_name("summary.json").read_text(encoding="utf-8"))
