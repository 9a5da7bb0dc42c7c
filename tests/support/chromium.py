"""A headless Chromium for tests of pages: real pointer, keyboard and files, over its debugging pipe."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60  # seconds that an answer may take on a busy machine
# The debugging pipe is file descriptors 3 and 4 of the browser.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-extensions --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --mute-audio --remote-debugging-pipe"
).split()


class Page:
    """One tab."""

    def __init__(self, read: int, write: int):
        self.read, self.write, self.number, self.buffer = read, write, 0, b""
        self.session: str | None = None
        self.complaints: list[str] = []  # what the page's scripts threw or logged as an error
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(answer["params"]))
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.complaints.append(answer["params"]["entry"]["text"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], PATIENCE)[0], "the browser does not answer"
            found = os.read(self.read, 1 << 20)
            assert found, "the browser has ended"
            self.buffer += found
        line, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(line)

    def size(self, width: int, height: int, scale: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def dark(self, on: bool) -> None:
        value = "dark" if on else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def __call__(self, script: str) -> Any:
        """The value of a script."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{script}: {found}"
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until a script's value is true."""
        end = time.monotonic() + PATIENCE
        while not self(condition):
            assert time.monotonic() < end, f"the page never came to: {condition}; errors: {self.complaints}"

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width, height of an element, which is scrolled into view."""
        return tuple(
            self(
                f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
                "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
            )
        )

    def pointer(self, kind: str, x: float, y: float) -> None:
        pressed = {"button": "left", "buttons": 1, "clickCount": 1} if kind != "mouseReleased" else {"button": "left"}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **{"clickCount": 1, **pressed})

    def click(self, selector: str, at: tuple[float, float] = (0.5, 0.5)) -> None:
        """Click into an element, at a share of its width and height."""
        self.drag(selector, [at])

    def drag(self, selector: str, path: list[tuple[float, float]]) -> None:
        """Press at the first of these shares of an element, move over the others, release."""
        left, top, width, height = self.box(selector)
        points = [(left + x * width, top + y * height) for x, y in path]
        self.pointer("mousePressed", *points[0])
        for point in points[1:]:
            self.pointer("mouseMoved", *point)
        self.pointer("mouseReleased", *points[-1])

    def key(self, name: str) -> None:
        code = {" ": "Space"}.get(name, name)
        numbers = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=code, windowsVirtualKeyCode=numbers[name])

    def choose_file(self, selector: str, file: Path) -> None:
        """Put a file into a file input, as a person does in its dialog."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def drop_file(self, selector: str, file: Path) -> None:
        """Drop a file on an element, as from the desktop."""
        left, top, width, height = self.box(selector)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=left + width / 2, y=top + height / 2, data=data)


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """A tab of a new browser, which ends with it; the test is skipped where there is no Chromium."""
    program = next((found for found in map(shutil.which, NAMES) if found), None)
    if program is None:
        pytest.skip("no Chromium here: install one (apt-get install chromium) to test the page in it")
    (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}"]
        browser = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(ours_in, ours_out)
        finally:
            os.close(ours_out)  # a browser whose pipe ends closes itself
            try:
                browser.wait(10)
            except subprocess.TimeoutExpired:
                browser.kill()
                browser.wait()
            os.close(ours_in)
