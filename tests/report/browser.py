"""Chromium driven over its DevTools pipe: a few messages of JSON, no driver to install, and the page as it is."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Json = dict[str, Any]
_OPTIONS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--disable-sync"),
    *("--hide-scrollbars", "--force-color-profile=srgb"),
)
_SECONDS = 30.0


class Browser:
    """One tab; ``requests`` are the addresses that it asked for since the last ``open``."""

    def __init__(self, program: str, folder: Path) -> None:
        self._read, theirs = os.pipe()
        ours, self._write = os.pipe()
        sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
        # Chromium talks on descriptors 3 and 4, whatever ours are called.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ours} 4>&{theirs}', "bash", program, *_OPTIONS, *sandbox,
             f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(ours, theirs),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours)
        os.close(theirs)
        self._buffer, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self._loaded = False

    def __enter__(self) -> Self:
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def open(self, page: Path) -> None:
        """Load a file and wait until it and its pictures are there."""
        self.requests, self.dialogs, self._loaded = [], [], False
        self._ask("Page.navigate", url=page.as_uri())
        until = time.monotonic() + _SECONDS
        while not self._loaded:
            self._take(until)

    def look(self, *, width: int, height: int = 800, dark: bool = False, media: str = "screen") -> None:
        """Set the window and what the user likes."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def print(self) -> bytes:
        """The page as a PDF."""
        return base64.b64decode(self._ask("Page.printToPDF", printBackground=False)["data"])

    def shoot(self, target: Path, *, whole: bool = True) -> None:
        """A picture of the window, or of the whole page."""
        answer = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        target.write_bytes(base64.b64decode(answer["data"]))

    def _ask(self, method: str, **parameters: object) -> Json:
        self._number += 1
        body: Json = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            body["sessionId"] = self._session
        _write_all(self._write, json.dumps(body).encode() + b"\0")
        until = time.monotonic() + _SECONDS
        while True:
            message = self._take(until)
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: Json = message["result"]
                return result

    def _take(self, until: float) -> Json:
        """The next message; what the page does on its own is kept."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("Chromium said nothing more")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: Json = json.loads(line)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Page.javascriptDialogOpening":
                self.dialogs.append(parameters["message"])
            case "Page.loadEventFired":
                self._loaded = True
        return message


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
