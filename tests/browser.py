"""Headless Chromium with a page open in it, driven through its DevTools protocol over two pipes."""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

_NAMES = ("chromium", "google-chrome")
_SECONDS = 60  # that an answer may take

# Of each clip: what stands against its playing, and what it has shown.
_PLAY = """
Promise.all([...document.querySelectorAll("video")].map(async (video) => {
  const late = (what) =>
    new Promise((_, no) => setTimeout(() => no(Error(what + " takes 20 s")), 2e4));
  try {
    await Promise.race([video.play(), late("play()")]);
    const begin = video.currentTime;
    const moved = new Promise((yes) => {
      video.addEventListener("timeupdate", () => { if (video.currentTime !== begin) yes(); });
    });
    await Promise.race([moved, late("a second frame")]);
  } catch (error) {
    return {trouble: String(error), width: video.videoWidth, frames: 0};
  }
  const frames = video.getVideoPlaybackQuality().totalVideoFrames;
  return {trouble: video.error && video.error.message, width: video.videoWidth, frames};
}))
"""
_BROKEN_PICTURES = """
Promise.all([...document.images].map((image) => image.decode().then(() => null, String)))
"""


@dataclass
class Page:
    """A file as the browser shows it."""

    browser: "Browser"
    session: str
    console: list[str] = field(default_factory=list)
    """Messages, exceptions that nobody caught, and what the browser complains of."""
    requests: list[str] = field(default_factory=list)
    """URLs asked for; those of data as `data:`."""
    failed: list[str] = field(default_factory=list)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **parameters)

    def evaluate(self, script: str) -> Any:
        """A script's value; a promise's, once it is kept."""
        found = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def play(self) -> list[dict[str, Any]]:
        """Of each clip: `trouble` or None, `width` in pixels, `frames` shown so far."""
        return list(self.evaluate(_PLAY))

    def broken_pictures(self) -> list[str]:
        return [why for why in self.evaluate(_BROKEN_PICTURES) if why is not None]

    def pictures(self) -> int:
        return int(self.evaluate("document.images.length"))

    def resize(self, width: int, height: int = 900) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        root = "document.documentElement"
        return int(self.evaluate(f"{root}.scrollWidth - {root}.clientWidth"))

    def screenshot(self) -> npt.NDArray[np.uint8]:
        """(H, W, 3) of the whole page."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        with Image.open(io.BytesIO(base64.b64decode(shot))) as image:
            return np.asarray(image.convert("RGB"))

    def take(self, event: dict[str, Any]) -> None:
        """Note what the browser tells of it."""
        what = event["params"]
        match event["method"]:
            case "Runtime.consoleAPICalled":
                said = [str(one.get("value", one.get("description"))) for one in what["args"]]
                self.console.append(f"{what['type']}: {' '.join(said)}")
            case "Runtime.exceptionThrown":
                details = what["exceptionDetails"]
                self.console.append(details.get("exception", details).get("description", "thrown"))
            case "Log.entryAdded":
                self.console.append(f"{what['entry']['level']}: {what['entry']['text']}")
            case "Network.requestWillBeSent":
                url = what["request"]["url"]
                self.requests.append("data:" if url.startswith("data:") else url)
            case "Network.loadingFailed":
                # A clip that has enough of its data for now ends the request itself.
                if not what.get("canceled"):
                    self.failed.append(f"{what['type']}: {what['errorText']}")


class Browser:
    """A running Chromium; `running` starts one."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, out
        self._unread = b""
        self._last = 0
        self._pages: dict[str, Page] = {}

    def open(self, file: Path, width: int = 1200) -> Page:
        """The file, loaded, in a tab of its own."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        page = self._pages[attached["sessionId"]] = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.resize(width)
        sent = page.send("Page.navigate", url=file.resolve().as_uri())
        assert "errorText" not in sent, sent
        page.evaluate(
            'document.readyState === "complete" || '
            'new Promise((yes) => addEventListener("load", yes, {once: true}))'
        )
        return page

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A command's result; events that come before it go to their pages."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._last:
                assert "error" not in found, f"{method}: {found.get('error')}"
                return dict(found["result"])
            if (page := self._pages.get(found.get("sessionId", ""))) is not None:
                page.take(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._out], [], [], _SECONDS)[0], "Chromium says nothing"
            block = os.read(self._out, 1 << 20)
            assert block, "Chromium has ended"
            self._unread += block
        message, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(message))


def executable() -> str:
    """Path of Chromium. Fails where there is none: pages that nobody looks at may be broken."""
    for name in _NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    raise AssertionError(
        f"the pages are looked at in Chromium, and none of {', '.join(_NAMES)} is on the PATH: "
        "apt-get install chromium"
    )


@contextmanager
def running() -> Iterator[Browser]:
    """Chromium without a window, with a profile of its own, not sandboxed (root may not be)."""
    profile = tempfile.mkdtemp(prefix="wandistill-chromium-")
    command = [
        executable(), "--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
        "--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile}",
        "--remote-debugging-pipe",
    ]  # fmt: skip
    # The protocol wants the descriptors 3 and 4.
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" 3<&0 4>&1 0</dev/null 1>/dev/null', "sh", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        browser = Browser(process.stdin.fileno(), process.stdout.fileno())
        yield browser
        browser.send("Browser.close")
        process.wait(_SECONDS)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(profile, ignore_errors=True)
