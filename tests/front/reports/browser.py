"""A headless browser, spoken to in the protocol of WebDriver."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """One window of so many pixels; a context manager."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self) -> Browser:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = ["chromedriver", f"--port={self.port}"]
        self.driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._wait()
            options = {"args": [*ARGUMENTS, f"--user-data-dir={Path(self.folder.name)}"]}
            options["mobileEmulation"] = {  # type: ignore[assignment]
                "deviceMetrics": {"width": self.size[0], "height": self.size[1], "pixelRatio": 1.0}
            }
            capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
            self.session = self._ask("POST", "/session", {"capabilities": capabilities})["sessionId"]
        except BaseException:
            self.driver.kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._ask("DELETE", f"/session/{self.session}")
        finally:
            self.driver.terminate()
            self.driver.wait(20)
            self.folder.cleanup()

    def open(self, url: str) -> None:
        """Show a page, once it is loaded."""
        self._ask("POST", f"/session/{self.session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script of the page returns."""
        return self._ask("POST", f"/session/{self.session}/execute/sync", {"script": script, "args": []})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def _wait(self) -> None:
        for _ in range(200):
            try:
                self._ask("GET", "/status")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")
