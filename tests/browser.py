"""A headless Chromium for tests: spoken to over a pipe (the DevTools protocol), so that no library is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
REQUIRED = "SDCLI_TESTS_NEED_BROWSER"
"""Set in continuous integration: a missing browser fails the test instead of skipping it."""
KEY_CODES = {"Enter": 13, "Escape": 27, " ": 32, "Tab": 9, "Delete": 46}
KEY_CODES |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
KEY_CODES |= {letter: ord(letter.upper()) for letter in "bcez"}


class Browser:
    """One tab. `problems` collects what pages complain of: exceptions, and what their policy forbade."""

    def __init__(self, read: int, write: int) -> None:
        self._in, self._out = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self._last, self._rest, self._session = 0, b"", ""
        self._events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, page: Path | str) -> None:
        """Load a file or an address, and wait until it has run."""
        self._events.clear()
        self._call("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        self._wait_for_load()

    def reload(self) -> None:
        """Load the page again, as the user does."""
        self._events.clear()
        self._call("Page.reload")
        self._wait_for_load()

    def _wait_for_load(self) -> None:
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()

    def run(self, script: str) -> Any:
        """What an expression of JavaScript is worth, awaited; as if the user had clicked before."""
        answer = self._call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Return once an expression of JavaScript is true; some events come a moment later."""
        check = f"const check = () => {condition} ? met() : requestAnimationFrame(check); check()"
        self.run(
            f"new Promise((met, failed) => {{ {check}; setTimeout(() => failed({json.dumps(condition)}), 20000) }})"
        )

    def press(self, key: str, *, ctrl: bool = False, shift: bool = False) -> None:
        """A key, as the keyboard sends it."""
        modifiers = 2 * ctrl + 8 * shift
        for kind in ("keyDown", "keyUp"):
            text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") and kind == "keyDown" else {}
            code = KEY_CODES.get(key, 0)
            self._call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers, **text
            )

    def type(self, text: str) -> None:
        """Put a text in where the focus is, as typing or pasting does."""
        self._call("Input.insertText", text=text)

    def drag(self, *points: tuple[float, float], touch: bool = False) -> None:
        """Press at the first point (in CSS pixels), move over the others, and let go."""
        kinds = ["Pressed", *["Moved"] * (len(points) - 1)]
        for (x, y), kind in zip(points, kinds, strict=True):
            if touch:
                event = {"Pressed": "touchStart", "Moved": "touchMove"}[kind]
                self._call("Input.dispatchTouchEvent", type=event, touchPoints=[{"x": x, "y": y}])
            else:
                self._call(
                    "Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1, clickCount=1
                )
        if touch:
            self._call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            x, y = points[-1]
            self._call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def drop(self, x: float, y: float, *files: Path) -> None:
        """Drag files from outside to a point of the page, and drop them there."""
        data = {"items": [], "files": [str(file.absolute()) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self._call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, selector: str, *files: Path) -> None:
        """Give files to a file input, as the file dialog does."""
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", nodeId=node, files=[str(file.absolute()) for file in files])

    def resize(self, width: int, height: int, *, touch: bool = False) -> None:
        """The size of the window in CSS pixels, and whether it is one for fingers."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self._call("Emulation.setTouchEmulationEnabled", enabled=touch)

    def emulate(self, **features: str) -> None:
        """What media queries see: prefers_color_scheme="dark", prefers_reduced_motion="reduce"."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self._call("Emulation.setEmulatedMedia", features=named)

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    @property
    def problems(self) -> list[str]:
        self.run("0")  # what came before it has arrived
        wrong = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [json.dumps(event["params"]) for event in self._events if event["method"] in wrong]

    @property
    def requests(self) -> list[str]:
        """The addresses that were asked for since `open`, without data URLs."""
        self.run("0")
        sent = [event["params"] for event in self._events if event["method"] == "Network.requestWillBeSent"]
        urls = [one["request"]["url"] for one in sent]
        return [url for url in urls if not url.startswith("data:")]

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._receive()).get("id") != self._last:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in.fileno(), 1 << 20)
            assert more, "Chromium has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self._events.append(message)
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile, and end it. Skips the test where there is none, or fails it if REQUIRED."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        assert not os.environ.get(REQUIRED), f"no Chromium or Chrome is installed, and {REQUIRED} is set"
        pytest.skip("no Chromium or Chrome is installed")
    to_read, to_write = os.pipe(), os.pipe()
    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
    line = f'exec "$0" {flags} --user-data-dir="$1" about:blank 3<&{to_write[0]} 4>&{to_read[1]}'
    process = subprocess.Popen(
        ["bash", "-c", line, program, str(profile)], pass_fds=(to_write[0], to_read[1]), stderr=subprocess.DEVNULL
    )
    os.close(to_write[0])
    os.close(to_read[1])
    try:
        yield Browser(to_read[0], to_write[1])
    finally:
        process.kill()
        process.wait()
