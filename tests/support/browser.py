"""Drive headless Chromium in tests through the pipe of its DevTools protocol, with the standard library alone."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
DEADLINE_S = 60
KEYS = {"Enter": {"code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}}

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


class Page:
    """A page in the browser; `problems` are script errors and what the policy of the page has blocked."""

    def __init__(self, requests: int, answers: int):
        self._requests, self._answers = os.fdopen(requests, "wb"), os.fdopen(answers, "rb")
        self._count, self._session, self._pending = 0, {}, b""
        self.problems: list[str] = []
        self.addresses: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the result of a method of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        self._requests.write(json.dumps(message).encode() + b"\0")
        self._requests.flush()
        while (answer := self._next()).get("id") != self._count:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, address: str, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        """Open an address in a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.run(condition):
            assert time.monotonic() < deadline, f"not true: {condition}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click on an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field by typing."""
        self.run(f"(field => {{ field.focus(); field.select(); }})(document.querySelector({json.dumps(selector)}))")
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, modifiers=8 * shift, **KEYS[key])

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements that match."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(one => one.textContent)")

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            part = self._answers.read1()
            assert part, "Chromium has ended"
            self._pending += part
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["source"] in ("security", "javascript"):
            self.problems.append(params["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.addresses.append(params["request"]["url"])


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """Gives a page of a browser whose profile is in `folder`."""
    (child_in, requests), (answers, child_out) = os.pipe(), os.pipe()
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}"]
    script = f'exec "$@" 3<&{child_in} 4>&{child_out}'
    with subprocess.Popen(
        ["bash", "-c", script, "chromium", *command],
        pass_fds=(child_in, child_out),
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(folder)},
    ) as process:
        os.close(child_in)
        os.close(child_out)
        try:
            yield Page(requests, answers)
        finally:
            process.kill()
