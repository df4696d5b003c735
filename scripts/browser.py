"""A real browser without a window, Chromium, by its DevTools protocol: for tests and benchmarks of pages."""

import asyncio
import base64
import json
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page:
    """An open page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = 0
        self.events: list[dict[str, Any]] = []
        """What the browser told unasked: requests, messages of the console, errors."""

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=240)
            if message.get("id") == self._calls:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def open(self, url: str) -> None:
        """Loads a page to its end."""
        for domain in ("Page", "Network", "Log", "Runtime"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 240
        while not (await self.ask("document.readyState + location.href")).startswith("complete" + url):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    async def until(self, expression: str, timeout_s: float = 600) -> Any:
        """The value of an expression, once it is one that counts as true."""
        deadline = time.monotonic() + timeout_s
        while not (found := await self.ask(expression)):
            assert time.monotonic() < deadline, (expression, await self.ask("document.body.innerText"))
            await asyncio.sleep(0.05)
        return found

    async def go(self, address: str) -> None:
        """To another view of the page that is open."""
        await self.ask(f"location.hash = {json.dumps(address)}")

    async def resize(self, width: int, height: int = 900) -> None:
        """Another size of the window."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)

    async def dark(self, *, is_dark: bool) -> None:
        """The colours that the user prefers."""
        value = "dark" if is_dark else "light"
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    async def screenshot(self) -> bytes:
        """What the window shows, as a PNG."""
        image = await self.call("Page.captureScreenshot")
        return base64.b64decode(image["data"])

    def requests(self) -> list[str]:
        """Every address that was asked for."""
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[dict[str, Any]]:
        """Errors and messages of the console."""
        told = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [event for event in self.events if event["method"] in told]


@asynccontextmanager
async def open_browser(profile: Path) -> AsyncIterator[Page]:
    """Starts a browser with a fresh profile and an empty page; ends it."""
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    flags += ["--remote-allow-origins=*", "--window-size=1100,900", f"--user-data-dir={profile}"]
    silence = asyncio.subprocess.DEVNULL
    browser = await asyncio.create_subprocess_exec(CHROMIUM, *flags, "about:blank", stdout=silence, stderr=silence)
    try:
        deadline = time.monotonic() + 240
        while (port := _port(profile)) is None:
            assert browser.returncode is None, "the browser ended"
            assert time.monotonic() < deadline, "the browser does not start"
            await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                targets = await answer.json()
            address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        browser.terminate()
        await asyncio.wait_for(browser.wait(), 120)


def _port(profile: Path) -> str | None:
    """Where the browser listens, once it does."""
    file = profile / "DevToolsActivePort"
    lines = file.read_text().split("\n") if file.exists() else []
    return lines[0] if len(lines) > 1 else None
