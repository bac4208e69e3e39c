"""What builds and checks the documentation, and figures on its pages that tests elsewhere lack."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import skhead
from skhead.weights.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


links = load("scripts/check_links.py")
gallery = load("scripts/check_gallery.py")
wiring = load("scripts/draw_wiring.py")


@pytest.fixture
def site(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "picture.png").write_bytes(b"png")
    (tmp_path / "sub" / "index.html").write_text(
        '<h1 id="top">Sub</h1><a href="../index.html#part">up</a><a href="/index.html">home</a>'
        '<img src="../picture.png" alt="a picture">'
    )
    index = tmp_path / "index.html"
    index.write_text(
        '<a id="part" href="sub/#top">sub</a><a href="https://example.org/x#y">out</a>'
        '<a href="mailto:a@example.org">mail</a><a href="#part">here</a>'
    )
    return tmp_path, index


def test_a_site_whose_links_resolve_has_no_errors(site):
    errors, external, n_internal = links.check_site(site[0])
    assert errors == []
    assert dict(external) == {"https://example.org/x#y": {"index.html"}}
    assert n_internal == 5


@pytest.mark.parametrize(
    "html, error",
    [
        ('<a href="gone.html">x</a>', "no such file"),
        ('<a href="sub/index.html#gone">x</a>', "no element 'gone' there"),
        ('<a href="#gone">x</a>', "no element 'gone' there"),
        ('<img src="gone.png" alt="">', "no such file"),
        ('<img src="picture.png" srcset="picture.png, gone.png 2x" alt="">', "no such file"),
        ('<img src="picture.png">', "has no alt"),
        ('<a href="../outside.html">x</a>', "leads out of the site"),
        ('<a href="">x</a>', "empty"),
        ('<script src="https://example.org/x.js"></script>', "loaded from the web"),
        ('<link rel="stylesheet" href="https://example.org/x.css">', "loaded from the web"),
        ('<a href="http://nowhere">x</a>', "not the address of a page"),
        ('<a href="ftp://example.org">x</a>', "scheme 'ftp'"),
    ],
)
def test_a_broken_link_is_an_error(site, html, error, monkeypatch, capsys):
    folder, index = site
    index.write_text(index.read_text() + html)
    (found,) = links.check_site(folder)[0]
    assert found.startswith("index.html: ") and found.endswith(error)
    monkeypatch.setattr(sys, "argv", ["check_links.py", str(folder)])
    assert links.main() == 1
    assert error in capsys.readouterr().err


def test_an_empty_folder_is_no_site(tmp_path):
    assert "no pages" in links.check_site(tmp_path)[0][0]


def test_names_of_a_gallery_script_are_found_however_they_are_imported():
    script = (
        "import skhead\nfrom skhead.inspection import NullDisplay as Shown\n"
        "from skhead import stats\nskhead.ProjectionKernel().fit(x)\nShown.from_x(y)\n"
        "stats.haar_moments(1, 2, 3)\nother.load_heads()\n"
    )
    names = {
        "skhead.ProjectionKernel",
        "skhead.inspection.NullDisplay",
        "skhead.stats.haar_moments",
    }
    found = gallery.names_used(script)
    assert names <= found and "skhead.load_heads" not in found


def test_a_page_that_does_not_show_its_script_is_an_error(tmp_path, monkeypatch, capsys):
    generated = tmp_path / "api" / "generated"
    generated.mkdir(parents=True)
    names = [f"skhead.{name}" for name in skhead._EXPORTS]
    used = gallery.scripts_by_name(names)
    for name in names:
        shown = "".join(f'<a href="../../gallery/{script}.html">' for script in used[name])
        (generated / f"{name}.html").write_text(shown)
    monkeypatch.setattr(sys, "argv", ["check_gallery.py", str(tmp_path)])
    assert gallery.main() == 0
    (generated / "skhead.wiring_graph.html").write_text("nothing")
    assert gallery.main() == 1
    assert "skhead.wiring_graph: its page does not show" in capsys.readouterr().err


def edges_of(picture):
    nodes = [node.attrib for node in picture.iter() if "data-source" in node.attrib]
    return {(edge["data-pair"], edge["data-source"], edge["data-target"]) for edge in nodes}


def edges_by_weights(source, k):
    heads = skhead.load_heads(source)
    strongest = skhead.ProjectionKernel().fit_transform(heads).top_pairs(k)
    columns = strongest[["pair", "source", "target"]]
    return heads, set(columns.itertuples(index=False, name=None))


def test_the_drawn_wiring_is_that_of_the_weights():
    _, expected = edges_by_weights("skhead/induction-2l", 4)
    picture = ET.fromstring(wiring.draw("skhead/induction-2l", "induction-2l", 4))
    assert edges_of(picture) == expected
    text = " ".join(picture.itertext())
    assert "Previous Token" in text and "L1H1" in text
    assert not [node for node in picture.iter() if {"tabindex", "data-details"} & set(node.attrib)]


def test_the_picture_of_the_first_page_is_that_of_gpt2(gpt2_path):
    heads, expected = edges_by_weights(gpt2_path, 20)
    picture = ET.parse(DOCS / "_static" / "gpt2-wiring.svg").getroot()
    assert edges_of(picture) == expected
    classes = skhead.datasets.load_head_classes("yamagiwa2026", heads)
    nodes = [node.attrib for node in picture.iter() if "data-head" in node.attrib]
    classed = {node["data-head"] for node in nodes if "style" in node}
    assert classed == {node["data-head"] for node in nodes if classes[node["data-head"]] != "None"}


def test_the_changelog_page_shows_every_fragment():
    pytest.importorskip("towncrier", reason="towncrier gathers the fragments; it is in skhead[dev]")
    changelog = load("docs/_ext/changelog_pages.py")
    lines = "\n".join(changelog.as_rest(changelog.unreleased(), set()))
    for fragment in (ROOT / "changelog.d").glob("+*.md"):
        first = fragment.read_text(encoding="utf-8").split("`")[0].strip()
        assert first in lines, fragment.name


def test_the_changelog_becomes_restructured_text():
    changelog = load("docs/_ext/changelog_pages.py")
    markdown = "## 0.2.0 (2027-01-01)\n### Added\n- `load_heads` and `skhead.Subspaces`, `x=1`"
    lines = changelog.as_rest(markdown, {"load_heads", "Subspaces"})
    assert [line for line in lines if line] == [
        "0.2.0 (2027-01-01)",
        "------------------",
        "Added",
        "~~~~~",
        "- `~skhead.load_heads` and `~skhead.Subspaces`, ``x=1``",
    ]


def test_the_architecture_page_shows_the_import_contract():
    directive = load("docs/_ext/import_layers.py")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (contract,) = [found for found in contracts if found["id"] == "layers"]
    shown = directive.layers()
    assert " ".join(shown).split() == " ".join(contract["layers"]).split()
    assert max(map(len, shown)) <= directive.WIDTH
    text = page("contributing/architecture.rst")
    assert ".. import-layers::" in text
    named = re.findall(r"``((?:skhead|docs|tests)/[\w./]+)``", text)
    assert len(named) > 15
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_guide_lists_the_architectures_that_are_read():
    table = (
        page("guide/heads.rst").partition("\nArchitectures\n")[2].partition("by tensor names")[0]
    )
    words = set(re.findall(r"[a-z][a-z0-9_]+", table.rpartition("``model_type``")[2]))
    assert {family.name for family in FAMILIES} <= words
    assert f"**{len(FAMILIES)} architectures**" in page("index.rst")


def test_ratios_to_transformer_lens_are_those_that_were_measured():
    """A fifth to a seventh of the time for kernels, less than a twentieth for composition."""
    tables = page("benchmarks.rst").partition("\ngpt2-small, 12 layers, 1 thread\n")[2]
    rows = re.findall(r"\* - TransformerLens\n((?:     - .*\n)+)", tables)
    (_, _, _, _, kernels, *_), (_, _, peak, _, scores, *_) = (
        [float(cell) for cell in re.findall(r"- ([\d.e-]+)", row)] for row in rows[:2]
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"^\| projection kernel .*\| ([\d.]+) \|$", readme, flags=re.MULTILINE)
    assert 5 <= kernels < 7.5 and 5 <= float(stated) < 7.5
    assert scores > 20 and "over 20 |" in readme
    assert peak > 9 and "9.5 GB at peak" in readme
    for name in ("index.rst", "coming_from/transformer_lens.rst"):
        text = " ".join(page(name).split())
        assert "a fifth to a seventh" in text and "less than a twentieth" in text


def test_the_citation_file_names_the_version_and_the_papers():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == skhead.__version__
    assert f"version = {{{skhead.__version__}}}" in page("citing.rst")
    references = citation["references"]
    assert len(references) == 4
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for reference in references:
        assert {"authors", "title", "type", "year", "url"} <= set(reference)
        for text in (readme, page("citing.rst")):
            assert reference["url"] in text
            assert " ".join(reference["title"].split()) in " ".join(text.split())


#: From the table of the guide: rank correlation with the projection kernel, shared strongest pairs.
AGREEMENT = {
    "GrassmannDistance": ((-1.0, -1.0, -1.0), (20, 20, 20)),
    "SimpleComposition": ((0.92, 0.90, 0.92), (2, 3, 16)),
    "CompositionScore": ((0.89, 0.84, 0.87), (2, 5, 5)),
    "ProcrustesSimilarity": ((0.88, 0.86, 0.89), (17, 18, 17)),
    "LinearCKA": ((0.76, 0.69, 0.75), (12, 15, 13)),
    "SpectrumSimilarity": ((0.10, -0.29, -0.07), (1, 0, 0)),
}
KINDS = ("OQ", "OK", "OV")
FAST = "CompositionScore"


@pytest.fixture(scope="module")
def gpt2_overlap(gpt2_path):
    return skhead.ProjectionKernel(pairs=KINDS).fit_transform(skhead.load_heads(gpt2_path))


@pytest.mark.parametrize(
    "name",
    [
        FAST,
        *(pytest.param(name, marks=pytest.mark.slow) for name in AGREEMENT if name != FAST),
    ],
)
def test_agreement_of_kernels_on_gpt2(name, gpt2_overlap):
    kernel = getattr(skhead, name)(pairs=KINDS, layer_order="forward")
    other = kernel.fit_transform(gpt2_overlap.rows)
    correlations, shared = [], []
    for kind in KINDS:
        both = [similarity.pair(kind).to_numpy().ravel() for similarity in (gpt2_overlap, other)]
        defined = ~np.isnan(both[0])
        correlations.append(spearmanr(both[0][defined], both[1][defined]).statistic)
        best = [set(map(tuple, of_kind(s, kind))) for s in (gpt2_overlap, other)]
        shared.append(len(best[0] & best[1]))
    assert correlations == pytest.approx(AGREEMENT[name][0], abs=0.006)
    assert tuple(shared) == AGREEMENT[name][1]


def of_kind(similarity, kind):
    strongest = similarity.top_pairs(20)
    return strongest.loc[strongest["pair"] == kind, ["source", "target"]].to_numpy()


def test_the_guide_prints_the_agreement_of_kernels():
    text = page("guide/kernels.rst")
    for name, (correlations, shared) in AGREEMENT.items():
        (row,) = re.findall(rf"^``{name}`` +([-.0-9 ]+)$", text, flags=re.MULTILINE)
        printed = [float(number) for number in row.split()]
        assert printed == [*correlations, *shared]
