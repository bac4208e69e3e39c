"""What notebooks show of containers, heads tables and estimators."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
from email.message import Message
from html.parser import HTMLParser

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.pipeline import make_pipeline
from test_common import public_estimators
from test_docs import OBJECTS, ROOT

import skhead
from skhead.datasets import load_payload_head, make_payload_retrieval
from skhead.metrics import LayerPermutation

EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Tags, attributes and texts, refusing tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)


@pytest.fixture(scope="module")
def heads():
    return skhead.load_heads("skhead/induction-2l")


@pytest.fixture(scope="module")
def containers(heads):
    head = load_payload_head("d16-r3-r5")
    task = make_payload_retrieval(30, embeddings=head.embeddings, random_state=0)
    similarity = skhead.ProjectionKernel().fit_transform(heads)
    salience = skhead.SalientOperations(n_salient=1, n_targets=2, source_embedding="raw")
    found = [
        skhead.SubspaceExtractor(rank=0.9).fit_transform(heads),
        similarity,
        task,
        head,
        head.embeddings,
        task.pairs(head),
        skhead.analyse_superposition(head),
        skhead.virtual_heads(heads, top=10),
        salience.fit(heads).mappings(heads),
        prompts(),
        LayerPermutation(0.8, np.array([0.1, 0.3, 0.2]), 0.25),
        skhead.TermImportance(
            1.5, np.array([3.0, 2.0, 1.5]), 4.0, pd.Series([-0.5, 0.1], ["L0H0", "L0H1"]), 78
        ),
    ]
    return {type(one).__name__: one for one in found}


def prompts(text: str = "a b"):
    return skhead.QKPrompts(
        tokens=[[5, 7, 5]],
        query_positions=[-1],
        key_positions=[[0, 1]],
        query_labels=[5],
        key_labels=[[5, 7]],
        texts=[text],
    )


def words(one) -> str:
    return " ".join(Page(one._repr_html_()).texts)


def test_every_public_container_is_covered(containers):
    public = {
        path.rpartition(".")[2]
        for path, value in OBJECTS.items()
        if inspect.isclass(value)
        and dataclasses.is_dataclass(value)
        and ".stats." not in path
        and not path.startswith(("skhead.base.", "skhead.testing."))
    }
    assert public == set(containers)


def test_page_is_small_closed_and_needs_nothing_from_elsewhere(containers):
    for one in containers.values():
        html = one._repr_html_()
        page = Page(html)
        assert len(html) < 8_000
        assert not {"script", "img", "link", "iframe"} & set(page.tags)
        assert not any(
            name in ("src", "href") or name.startswith("on") for name, _ in page.attributes
        )
        assert "url(" not in html and "http" not in html


def test_page_says_what_its_tables_and_cells_are(containers):
    for name, one in containers.items():
        page = Page(one._repr_html_())
        assert ("aria-label", name) in page.attributes
        assert page.tags.count("caption") == page.tags.count("table")
        scopes = [value for key, value in page.attributes if key == "scope"]
        assert len(scopes) == page.tags.count("th")


def test_colours_are_those_of_the_page(containers):
    """Fixed colours would be unreadable on either a dark or a light page."""
    style = containers["Subspaces"]._repr_html_().partition("<style>")[2].partition("</style>")[0]
    fixed = re.findall(r"#\w+|rgba?\([^)]*\)", style)
    assert fixed == ["rgba(128,128,128,.4)"]
    assert "color:inherit" in style and "background:none" in style


def test_plain_representations_are_one_line(containers):
    for name, one in containers.items():
        assert repr(one).startswith(f"{name}(")
        assert "\n" not in repr(one) and len(repr(one)) < 250


def test_similarity_tells_its_numbers(containers):
    similarity = containers["Similarity"]
    text = words(similarity)
    best = similarity.top_pairs(1).iloc[0]
    assert "16 rows × 16 columns" in text and "pk (large values are similar)" in text
    assert f"{best['score']:.4g}" in text and best["source"] in text
    assert "as stored" in text and "skhead/induction-2l" in text
    assert f"{np.count_nonzero(~np.isnan(similarity.values[:, :, 0]))}" in text


def test_calibrated_similarity_names_its_null(containers):
    calibrated = skhead.NullCalibrator().fit_transform(
        skhead.ProjectionKernel(pairs=["OK"]).fit_transform(containers["Subspaces"])
    )
    text = words(calibrated)
    assert "haar, two-sided" in text and "log10_p" in text and "before calibration" in text
    assert f"{calibrated.top_pairs(1)['log10_p'].iloc[0]:.4g}" in text


def test_subspaces_tell_ranks_by_role(containers):
    subspaces = containers["Subspaces"]
    text = words(subspaces)
    ranks = subspaces.ranks("Q")
    assert f"{ranks.min()} to {ranks.max()}" in text and "rank 0.9" in text and "cpu" in text


def test_empty_selections_still_show(containers):
    assert "0 rows × 16 columns" in words(containers["Similarity"][[]])
    assert "none" in words(containers["Subspaces"][[]])
    assert "0" in words(containers["QKPairs"][[]])


def test_arrays_are_matrices_without_a_model():
    stack = np.random.default_rng(0).normal(size=(3, 8, 2))
    assert "3 matrices without a model" in words(skhead.SubspaceExtractor().fit_transform(stack))


def test_many_models_are_counted(containers):
    similarity = containers["Similarity"]
    rows = similarity.rows.assign(source=[f"model-{i}" for i in range(16)])
    told = words(dataclasses.replace(similarity, rows=rows, columns=rows))
    assert "model-0, model-1, model-2 and 13 more" in told


def test_texts_cannot_inject(containers, heads):
    similarity = containers["Similarity"]
    rows = similarity.rows.assign(source=EVIL)
    evil = dataclasses.replace(similarity, rows=rows, columns=rows, unit=EVIL)
    subspaces = dataclasses.replace(containers["Subspaces"], heads=rows)
    for one in (evil, subspaces, prompts(EVIL)):
        assert "<script" not in one._repr_html_()
        assert EVIL in words(one)
    assert "<script" not in heads.assign(source=EVIL)._repr_html_()


def test_showing_leaves_pickle_and_hash_alone(containers):
    for name in ("Subspaces", "Similarity", "QKPairs"):
        one = containers[name]
        before = joblib.hash(one)
        one._repr_html_()
        assert joblib.hash(one) == before
        assert pickle.loads(pickle.dumps(one))._repr_html_() == one._repr_html_()


@pytest.fixture
def docs(monkeypatch):
    monkeypatch.setenv("SKHEAD_DOCS_URL", "https://docs.example/skhead/")
    return "https://docs.example/skhead/api/generated/skhead."


def links(estimator) -> set[str]:
    html = estimator._repr_html_()
    return {link.partition("#")[0] for link in re.findall(r'href="([^"]+)"', html)}


@pytest.mark.parametrize("cls", public_estimators(), ids=lambda cls: cls.__name__)
def test_estimators_link_to_their_page(cls, docs):
    """Pages are those that autosummary generates for the names in docs/api/index.rst."""
    reference = (ROOT / "docs" / "api" / "index.rst").read_text(encoding="utf-8")
    assert f"\n   {cls.__name__}\n" in reference
    needed = {
        name: "x"
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    estimator = cls(**needed)
    assert estimator._get_doc_link() == f"{docs}{cls.__name__}.html"
    assert links(estimator) == {f"{docs}{cls.__name__}.html"}


def test_fitted_pipeline_shows_steps_and_their_pages(heads, docs):
    steps = make_pipeline(skhead.SubspaceExtractor(), skhead.ProjectionKernel())
    html = steps.fit(heads)._repr_html_()
    assert links(steps) >= {f"{docs}SubspaceExtractor.html", f"{docs}ProjectionKernel.html"}
    assert "SubspaceExtractor" in html and "fitted" in html


def test_without_documentation_nothing_is_linked(monkeypatch):
    monkeypatch.delenv("SKHEAD_DOCS_URL", raising=False)
    monkeypatch.setattr("skhead._estimators.metadata", lambda _: Message())
    assert skhead.ProjectionKernel()._get_doc_link() == ""
    assert links(skhead.ProjectionKernel()) == set()


def test_link_follows_what_the_installed_package_states(monkeypatch):
    stated = Message()
    stated["Project-URL"] = "Source, https://code.example"
    stated["Project-URL"] = "Documentation, https://docs.example"
    monkeypatch.delenv("SKHEAD_DOCS_URL", raising=False)
    monkeypatch.setattr("skhead._estimators.metadata", lambda _: stated)
    found = skhead.ProjectionKernel()._get_doc_link()
    assert found == "https://docs.example/api/generated/skhead.ProjectionKernel.html"


def test_estimators_of_others_do_not_link_to_ours(docs):
    class Own(skhead.ProjectionKernel):
        pass

    assert Own()._get_doc_link() == ""
