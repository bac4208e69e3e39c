"""Check every link, anchor and picture of built HTML pages, without network.

    python scripts/check_links.py docs/_build/html

A link to another page must lead to a file, its anchor to an element of that page. Addresses on the
web are not opened; they are checked for form, and listed with ``--external``. Pages must not load
anything from the web, so that they can be read without it.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

ATTRIBUTES = {
    "a": ("href",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "object": ("data",),
}
NO_FILES = ("data", "mailto", "javascript")


@dataclass
class Page:
    """Targets and links of one page.

    Attributes
    ----------
    anchors : set of str
        Ids of its elements, and names of its old-style anchors.
    links : list of str
        Addresses as written.
    loaded : set of str
        Those of them without which the page is not complete.
    missing_alt : list of str
        Pictures that say nothing to those who do not see them.
    """

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)
    missing_alt: list[str] = field(default_factory=list)


class Reader(HTMLParser):
    """Collect the links and anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag links to and what can be linked to."""
        given = {name: value or "" for name, value in attrs}
        self.page.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "img" and "alt" not in given:
            self.page.missing_alt.append(given.get("src", ""))
        for name in ATTRIBUTES.get(tag, ()):
            if name not in given:
                continue
            several = name == "srcset"
            found = given[name].split(",") if several else [given[name]]
            self.page.links += [part.split()[0] for part in found if part.split()]
            if not several and not given[name].strip():
                self.page.links.append("")
            if tag not in ("a", "link") or given.get("rel") == "stylesheet":
                self.page.loaded |= set(self.page.links[-len(found) :])


def read_pages(folder: Path) -> dict[Path, Page]:
    """All pages below a folder."""
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        if "_static" in path.relative_to(folder).parts:  # templates of the theme
            continue
        reader = Reader()
        reader.feed(path.read_text(encoding="utf-8"))
        pages[path.resolve()] = reader.page
    return pages


def check_external(address: SplitResult) -> str | None:
    """What is wrong with the form of an address on the web."""
    if address.scheme not in ("http", "https"):
        return f"scheme {address.scheme!r}"
    if "." not in address.netloc or " " in address.geturl():
        return "not the address of a page"
    return None


def check_internal(link: str, page: Path, folder: Path, pages: dict[Path, Page]) -> str | None:
    """What is wrong with a link within the site."""
    address = urlsplit(link)
    path = unquote(address.path)
    start = folder if path.startswith("/") else page.parent
    target = (start / path.lstrip("/")).resolve() if path else page
    if target.is_dir():
        target = target / "index.html"
    if folder not in target.parents:
        return "leads out of the site"
    if not target.is_file():
        return "no such file"
    if address.fragment and target in pages:
        anchor = unquote(address.fragment)
        if anchor not in pages[target].anchors:
            return f"no element {anchor!r} there"
    return None


def check_site(folder: Path) -> tuple[list[str], dict[str, set[str]], int]:
    """Errors, pages by external address, and the number of internal links of a site."""
    folder = folder.resolve()
    pages = read_pages(folder)
    errors: list[str] = []
    external: dict[str, set[str]] = defaultdict(set)
    n_internal = 0
    for path, page in pages.items():
        name = path.relative_to(folder).as_posix()
        errors += [f"{name}: picture {source!r} has no alt" for source in page.missing_alt]
        for link in page.links:
            address = urlsplit(link)
            if address.scheme in NO_FILES:
                continue
            if not link:
                wrong: str | None = "empty"
            elif address.scheme or address.netloc:
                external[link].add(name)
                wrong = "loaded from the web" if link in page.loaded else check_external(address)
            else:
                n_internal += 1
                wrong = check_internal(link, path, folder, pages)
            if wrong:
                errors.append(f"{name}: link {link!r}: {wrong}")
    if not pages:
        errors.append(f"{folder}: no pages")
    return list(dict.fromkeys(errors)), external, n_internal


def main() -> int:
    """Check a site and say what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--external", action="store_true", help="list the addresses on the web")
    options = parser.parse_args()
    errors, external, n_internal = check_site(options.folder)
    if options.external:
        for link, names in sorted(external.items()):
            print(f"{link}  ({len(names)} pages, such as {min(names)})")
    for error in errors:
        print(error, file=sys.stderr)
    print(f"{n_internal} links within the site, {len(external)} addresses outside")
    print(f"{len(errors)} errors")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
