"""A headless Chromium for tests, driven by ChromeDriver's WebDriver protocol over plain HTTP: no package needed."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The protocol's name of a reference to an element."""
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage
    --disable-background-networking --disable-component-update --disable-sync --window-size=1280,800"""
"""The sandbox needs rights that containers lack, and what is shown here is ours; the others keep it off the network."""


def missing() -> str | None:
    """Return why no browser can be driven here, or None if one can."""
    gone = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(gone)} not installed (Debian: chromium chromium-driver)" if gone else None


class Browser:
    """One window of a browser, behind the session's address."""

    def __init__(self, session: str) -> None:
        self._session = session

    def call(self, command: str, body: dict | None = None) -> object:
        """Send a command of the protocol (a POST, or a GET if there is no body) and return its value."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self._session}/{command}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self.call("url", {"url": url})

    def run(self, script: str, *args: object) -> object:
        """Return what the body of a JavaScript function returns."""
        return self.call("execute/sync", {"script": script, "args": list(args)})

    def _find(self, selector: str) -> str:
        return self.call("element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self.call(f"element/{self._find(selector)}/click", {})

    def keys(self, selector: str, text: str) -> None:
        """Type into an element, as a user without a mouse does."""
        self.call(f"element/{self._find(selector)}/value", {"text": text})

    def press(self, key: str) -> None:
        """Press and release a key where the focus is."""
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.call("actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def text(self, selector: str) -> str:
        return self.call(f"element/{self._find(selector)}/text")

    def complaints(self) -> list[str]:
        """Return the new warnings and errors of the page's console: failed scripts, refused or missing resources."""
        return [entry["message"] for entry in self.call("se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("screenshot")))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with its own empty profile; it ends with the context."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(m[1] for line in driver.stdout if (m := re.search(r"successfully on port (\d+)", line)))
        options = {"args": [*FLAGS.split(), f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "WARNING"}}
        root = Browser(f"http://127.0.0.1:{port}")
        session = root.call("session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield Browser(f"http://127.0.0.1:{port}/session/{session}")
        finally:
            with urlopen(Request(f"http://127.0.0.1:{port}/session/{session}", method="DELETE"), timeout=30):
                pass
    finally:
        driver.terminate()
        driver.wait(30)
        driver.stdout.close()
