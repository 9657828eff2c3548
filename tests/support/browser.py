"""Headless Chromium without network, driven through chromedriver by the WebDriver protocol (https://w3.org/TR/webdriver)."""

import base64
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
MISSING = (
    ""
    if shutil.which("chromedriver") and shutil.which("chromium")
    else ("no Chromium: apt-get install chromium chromium-driver")
)


class Browser:
    def __init__(self, port: int, profile: Path, size: tuple[int, int]) -> None:
        self.session = f"http://127.0.0.1:{port}/session"
        arguments = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        chrome = {"binary": shutil.which("chromium"), "args": arguments}
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
        found = self.call("", capabilities={"alwaysMatch": wanted})
        self.session += f"/{found['sessionId']}"
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        self.call("/goog/cdp/execute", cmd="Network.emulateNetworkConditions", params=offline)

    def call(self, path: str, **parameters: Any) -> Any:
        request = Request(self.session + path, json.dumps(parameters).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self.call("/url", url=page.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript function body returns."""
        return self.call("/execute/sync", script=script, args=list(arguments))

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Wait until a function body returns true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"not true after {seconds} s: {condition}"
            time.sleep(0.02)

    def pointer(self, x: float, y: float, click: bool = False) -> None:
        """Move the mouse to a place of the window in CSS pixels."""
        actions: list[dict[str, Any]] = [{"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}]
        if click:
            actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self.call("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": actions}])

    def keys(self, text: str) -> None:
        """Press keys one after the other, where the focus is."""
        pressed = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": pressed}])

    def screenshot(self, path: Path) -> None:
        with urlopen(f"{self.session}/screenshot", timeout=120) as answer:
            path.write_bytes(base64.b64decode(json.load(answer)["value"]))

    def requests(self) -> list[str]:
        """Addresses that were requested since the last call."""
        entries = (json.loads(entry["message"])["message"] for entry in self.call("/se/log", type="performance"))
        return [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]

    def messages(self) -> list[str]:
        """Errors and warnings in the browser's console since the last call."""
        return [entry["message"] for entry in self.call("/se/log", type="browser")]


@contextmanager
def browser(profile: Path, size: tuple[int, int] = (1300, 850)) -> Iterator[Browser]:
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            assert driver.stdout is not None
            port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
            opened = Browser(int(port), profile, size)
            try:
                yield opened
            finally:
                with urlopen(Request(opened.session, method="DELETE"), timeout=60):
                    pass
        finally:
            driver.terminate()
