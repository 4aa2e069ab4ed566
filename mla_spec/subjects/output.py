"""What the process of a subject prints, of which the end is kept."""

from __future__ import annotations

import re

KEPT = 1 << 16
"""Bytes that are kept."""

LINES = 5
"""Lines that are shown."""

WIDTH = 200
"""Characters that are shown of a line."""

_REPORT = re.compile(r"==+|#nixnan|SUMMARY: \w+Sanitizer|WARNING: \w+Sanitizer|\S+:\d+:\d+: runtime error: ")
_PROCESS = re.compile(r"^=+\d*=+ *")
_NOTHING = re.compile(r"(ERROR|RACECHECK) SUMMARY: 0|^=+\d*=*\s*$|COMPUTE-SANITIZER")


class Output:
    """The last bytes of a stream, in which a ``tool`` may report."""

    def __init__(self, tool: bool = False) -> None:
        self.data, self.tool = b"", tool

    def add(self, data: bytes) -> None:
        self.data = (self.data + data)[-KEPT:]

    def clear(self) -> None:
        self.data = b""

    def lines(self) -> list[str]:
        """What is kept, line by line, safe to print."""
        return [_printable(line) for line in self.data.decode(errors="replace").splitlines() if line.strip()]

    def reported(self) -> str:
        """The lines of a tool such as valgrind, a sanitizer or nixnan, without those that report nothing, and process numbers."""
        found = [line for line in self.lines() if _REPORT.match(line) and not _NOTHING.search(line)]
        return "\n".join(_PROCESS.sub("", line) for line in found)

    def told(self) -> str:
        """What a tool reports, or the end of it, to be added to a message; empty where nothing was printed."""
        report, end = self.reported().splitlines()[:LINES] if self.tool else [], self.lines()[-LINES:]
        head = "it runs under a tool that reports" if report else "its output ended with"
        return f"\n{head}:" + "".join(f"\n  {line}" for line in report or end) if end else ""


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in line)[:WIDTH]
