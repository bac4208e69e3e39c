"""A headless chromium, spoken to over the pipe of its debugging protocol."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skhead.report import write_report

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip
_TIMEOUT = 60.0


def find_browser() -> str | None:
    """Path of an installed chromium, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page in the browser, with everything that it complained about and asked for."""

    def __init__(self, write_to: int, read_from: int) -> None:
        self._write_to, self._read_from = write_to, read_from
        self._buffer = b""
        self._last = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def open(
        self,
        page: Path,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        fragment: str = "",
    ) -> None:
        """Load a file in a window of a size, and wait until its script has run."""
        self.complaints.clear()
        self.requests.clear()
        self.resize(width, dark, height)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.resolve().as_uri() + fragment)
        end = time.monotonic() + _TIMEOUT
        while (
            self.js("document.readyState") != "complete"
            or self.js("location.href") == "about:blank"
        ):
            if time.monotonic() > end:
                raise TimeoutError(f"{page} did not load within {_TIMEOUT:.0f} s")
            time.sleep(0.05)

    def js(self, expression: str) -> Any:
        """Value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def resolve(self, expression: str) -> Any:
        """Value that a promise in the page comes to."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def resize(self, width: int, dark: bool, height: int = 900) -> None:
        """Size of the window and the colours that its user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def type(self, text: str) -> None:
        """Put text in where the focus is."""
        self.call("Input.insertText", text=text)

    def wait_for(self, condition: str) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + _TIMEOUT / 6
        while not self.js(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"the page never came to {condition}")
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press and release a key."""
        code = {"Tab": 9, "Escape": 27, "Enter": 13, " ": 32}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **text,
            )

    def move(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Scroll an element into view and put the pointer at a share of its width and height."""
        box = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()"
        )
        self.call(
            "Input.dispatchMouseEvent",
            type="mouseMoved",
            x=box[0] + x * box[2],
            y=box[1] + y * box[3],
        )

    def click(self, selector: str) -> None:
        """Press and release the pointer in the middle of an element."""
        self.move(selector)
        box = self.js(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind, x=box[0], y=box[1], button="left", clickCount=1,
            )  # fmt: skip

    def screenshot(self, path: Path) -> None:
        """Picture of the whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read_from], [], [], _TIMEOUT)
            part = os.read(self._read_from, 1 << 20) if ready else b""
            if not part:
                raise TimeoutError("chromium does not answer")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def running(browser: str) -> Iterator[Tab]:
    """A tab of a freshly started browser with a profile of its own, ended afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        (commands, write_to), (read_from, answers) = os.pipe(), os.pipe()
        # chromium speaks on descriptors 3 and 4, so that the ones to be renamed must lie beyond.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        rename = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        process = subprocess.Popen(
            ["bash", "-c", rename, "bash", browser, *_FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=ends,
        )
        for end in (commands, answers, *ends):
            os.close(end)
        try:
            yield Tab(write_to, read_from)
        finally:
            process.terminate()
            process.wait(20)
            os.close(write_to)
            os.close(read_from)


@pytest.fixture(scope="session")
def gpt2_page(gpt2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report on GPT-2 small."""
    return write_report(gpt2_path, tmp_path_factory.mktemp("gpt2"), labels="yamagiwa2026")


def find_axe() -> Path | None:
    """Script of axe-core, if it is installed: named by SKHEAD_AXE, or in node_modules."""
    given = os.environ.get("SKHEAD_AXE")
    if given is not None:
        return Path(given)
    script = Path("node_modules") / "axe-core" / "axe.min.js"
    places = (ROOT / script, ROOT / ".venv" / script)
    return next((path for path in places if path.is_file()), None)


@pytest.fixture(scope="session")
def axe() -> str:
    """Source of axe-core; skips where it is not installed."""
    path = find_axe()
    if path is None:
        pytest.skip("axe-core not found: npm install axe-core, or set SKHEAD_AXE to axe.min.js")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def tab() -> Iterator[Tab]:
    """A tab of a real browser; skips where none is installed."""
    browser = find_browser()
    if browser is None:
        pytest.skip(f"no browser found: install one of {', '.join(NAMES)} to render pages")
    with running(browser) as page:
        yield page


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the bundled model."""
    return write_report("skhead/induction-2l", tmp_path_factory.mktemp("report"))


@pytest.fixture
def opened(tab: Tab, page: Path) -> Tab:
    """A tab that shows it."""
    tab.open(page)
    return tab
