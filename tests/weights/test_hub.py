"""Hub repositories: a cache laid out by hand, and a server that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest

import skhead
from skhead.exceptions import SourceNotFoundError, UnsafeCheckpointError
from skhead.weights import describe_sources, read_token_space

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD = "89abcdef0123456789abcdef0123456789abcdef"


def _fill_cache(cache: Path, repo: str, model: Path, refs: dict[str, str]) -> None:
    """Lay `model` out as huggingface_hub keeps it: blobs, and links to them per commit."""
    root = cache / f"models--{repo.replace('/', '--')}"
    for ref, commit in refs.items():
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            content = file.read_bytes()
            blob = root / "blobs" / sha256(content).hexdigest()
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(content)
            link = snapshot / file.name
            if not link.exists():
                link.symlink_to(Path("../../blobs") / blob.name)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    constants = pytest.importorskip("huggingface_hub.constants")
    path = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return path


@pytest.mark.parametrize("writer", ["write_model", "write_sharded"])
def test_cached_repository_offline(writer, cache, request, llama_tensors, llama_config):
    model = request.getfixturevalue(writer)(llama_tensors, llama_config)
    _fill_cache(cache, "org/tiny", model, {"main": COMMIT})
    heads = skhead.load_heads("org/tiny")
    assert set(heads["source"]) == {f"org/tiny@{COMMIT}"}
    info = describe_sources(heads)[0]
    assert (info.revision, info.name) == (COMMIT, "tiny")
    local = skhead.load_heads(model)
    for role in "QKVO":
        np.testing.assert_array_equal(
            skhead.load_weights(heads, role), skhead.load_weights(local, role)
        )


def test_tokens_of_a_cached_repository(cache, write_sharded, llama_tensors, llama_config):
    model = write_sharded(llama_tensors, llama_config)
    _fill_cache(cache, "org/tiny", model, {"main": COMMIT})
    source = skhead.load_heads("org/tiny")["source"].iloc[0]
    space = read_token_space(source)
    assert np.array_equal(space.embedding, llama_tensors["model.embed_tokens.weight"])
    assert f"no tensor 'lm_head.weight' in {source}" in space.missing["unembedding"]
    (cache / "models--org--tiny/snapshots" / COMMIT / "model-rest.safetensors").unlink()
    assert read_token_space(source, tables=()).rotary.n_dims == 8
    with pytest.raises(SourceNotFoundError, match=r"model-rest\.safetensors is not in the local"):
        read_token_space(source)


def test_revisions_are_kept_apart(cache, write_model, llama_tensors, llama_config):
    new = write_model(llama_tensors, llama_config, name="new")
    old = write_model({k: 2 * v for k, v in llama_tensors.items()}, llama_config, name="old")
    _fill_cache(cache, "org/tiny", new, {"main": COMMIT})
    _fill_cache(cache, "org/tiny", old, {"v1": OLD})
    recent = skhead.load_weights(skhead.load_heads("org/tiny"), "Q")
    heads = skhead.load_heads("org/tiny", revision="v1")
    assert set(heads["source"]) == {f"org/tiny@{OLD}"}
    np.testing.assert_array_equal(skhead.load_weights(heads, "Q"), 2 * recent)
    pinned = skhead.load_heads(f"org/tiny@{OLD}")
    assert pinned.equals(heads)
    both = skhead.load_heads([f"org/tiny@{OLD}", f"org/tiny@{COMMIT}"])
    assert both.index.is_unique
    with pytest.raises(ValueError, match="name different revisions"):
        skhead.load_heads(f"org/tiny@{OLD}", revision="main")


def test_what_the_cache_lacks(cache, write_sharded, llama_tensors, llama_config):
    model = write_sharded(llama_tensors, llama_config)
    (model / "model-1.safetensors").unlink()
    _fill_cache(cache, "org/tiny", model, {"main": COMMIT})
    with pytest.raises(
        SourceNotFoundError, match=r"model-1\.safetensors is not in the local cache"
    ):
        skhead.load_heads("org/tiny")
    with pytest.raises(
        SourceNotFoundError, match=r"'org/tiny' at revision 'v9': config\.json is not"
    ):
        skhead.load_heads("org/tiny", revision="v9")
    with pytest.raises(SourceNotFoundError, match=r"'org/other': config\.json is not in the local"):
        skhead.load_heads("org/other")


def test_index_that_leaves_the_snapshot(cache, write_sharded, llama_tensors, llama_config):
    model = write_sharded(llama_tensors, llama_config)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["x"] = "../../../x.safetensors"
    index.write_text(json.dumps(content))
    _fill_cache(cache, "org/tiny", model, {"main": COMMIT})
    with pytest.raises(UnsafeCheckpointError, match="outside its own directory"):
        skhead.load_heads("org/tiny")


class _Hub(BaseHTTPRequestHandler):
    """Enough of the hub to serve the files of one repository at `main` and its commit."""

    repo, model, log = "org/tiny", Path(), []

    def log_message(self, *_: Any) -> None:
        return

    def _answer(self, body: bool) -> None:
        path = urlparse(self.path).path.strip("/")
        self.log.append((self.command, path, self.headers.get("Authorization")))
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        file = self.model / name
        if repo != self.repo:
            self._refuse("RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._refuse("RevisionNotFound")
        elif not file.is_file():
            self._refuse("EntryNotFound")
        else:
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)


@pytest.fixture
def hub() -> Iterator[tuple[str, type[_Hub]]]:
    handler = type("Handler", (_Hub,), {"log": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
    import json
    import skhead

    def message(*args, **kwargs):
        try:
            skhead.load_heads(*args, **kwargs)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    heads = skhead.load_heads("org/tiny")
    print(json.dumps({
        "source": heads["source"].iloc[0],
        "sum": float(abs(skhead.load_weights(heads, "Q")).sum()),
        "revision": message("org/tiny", revision="v9"),
        "repository": message("org/none"),
        "word": message("gpt7"),
    }))
"""


def test_download(hub, tmp_path, write_sharded, llama_tensors, llama_config):
    """In a process of its own, since huggingface_hub reads its environment when imported."""
    endpoint, handler = hub
    handler.model = write_sharded(llama_tensors, llama_config)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    expected = skhead.load_weights(skhead.load_heads(handler.model), "Q")
    assert answer["source"] == f"org/tiny@{COMMIT}"
    assert answer["sum"] == pytest.approx(float(abs(expected).sum()))
    assert answer["revision"].startswith(
        "SourceNotFoundError: hub repository 'org/tiny' at revision 'v9' does not exist"
    )
    assert answer["repository"].startswith("SourceNotFoundError: 'org/none' is no registered live")
    assert answer["word"].startswith("SourceNotFoundError: 'gpt7' is no registered live model")
    downloaded = {path.rpartition("/")[2] for verb, path, _ in handler.log if verb == "GET"}
    assert {f"model-{i}.safetensors" for i in range(3)} <= downloaded
    assert "model-rest.safetensors" not in downloaded
    asked = [entry for entry in handler.log if "/resolve/" in entry[1]]
    assert {token for *_, token in asked} == {"Bearer hf_secret"}
    assert len(asked) == len(set(asked)), "a file of a pinned commit was asked for twice"
