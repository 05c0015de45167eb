"""Chromium without a window, spoken to through its pipe (the DevTools protocol): what tests of pages open them with."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any


def found() -> str | None:
    """Chromium or Chrome of this system, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """One process and one page at a time.

    Attributes:
        errors: what the page wrote to its console as an error, and exceptions that nobody caught.
        requests: addresses that the page asked for, itself among them.
    """

    def __init__(self, seconds: float = 60.0):
        self.seconds, self.errors, self.requests = seconds, [], []
        self._events: list[dict[str, Any]] = []
        self._left, self._number, self._session = b"", 0, None
        self._folder = tempfile.TemporaryDirectory(prefix="lm-eval-sparse-browser-", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        options = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-extensions"
        quiet = "--disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage"
        # It reads from 3 and writes to 4. The copies are made by a shell: nothing of Python runs between fork and exec.
        ends = (os.dup(theirs_in), os.dup(theirs_out))
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", found()),
                *options.split(),
                *quiet.split(),
                f"--user-data-dir={self._folder.name}",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        os.set_blocking(self._in, False)
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # with its own children
        self._process.wait(10)
        os.close(self._in)
        os.close(self._out)
        self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command. Raises `RuntimeError` for an error, `TimeoutError` for silence."""
        self._number += 1
        said: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            said["sessionId"] = self._session
        os.write(self._out, json.dumps(said).encode() + b"\0")
        end = time.monotonic() + self.seconds
        while True:
            answer = self._read(end)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._left:
            try:
                more = os.read(self._in, 1 << 20)
                if not more:
                    raise RuntimeError(f"the browser ended with {self._process.wait(10)}")
                self._left += more
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError("the browser says nothing") from None
                time.sleep(0.002)
        message, _, self._left = self._left.partition(b"\0")
        event = json.loads(message)
        self._heard(event)
        return event

    def _heard(self, event: dict[str, Any]) -> None:
        said, method = event.get("params", {}), event.get("method", "")
        self._events.append({"method": method})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])

    def open(
        self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, touch: bool = False
    ) -> None:
        """Load a file and wait for it."""
        self.errors.clear()
        self.requests.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        end = time.monotonic() + self.seconds
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read(end)

    def run(self, script: str) -> Any:
        """The value of an expression; of a promise, what it brings. Raises `RuntimeError` with what went wrong."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"]))
        return found["result"].get("value")

    def picture(self, *, whole: bool = False) -> bytes:
        """A PNG of what is seen, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
