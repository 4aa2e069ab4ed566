"""What the process of a subject prints, of which the end is kept."""

from __future__ import annotations

import re

KEPT = 1 << 16
"""Bytes that are kept."""

LINES = 5
"""Lines that are shown."""

WIDTH = 200
"""Characters that are shown of a line."""

_REPORT = re.compile(r"==+|#nixnan")
_NOTHING = re.compile(r"(ERROR|RACECHECK) SUMMARY: 0|^=+\d*=*\s*$|COMPUTE-SANITIZER")


class Output:
    """The last bytes of a stream."""

    def __init__(self) -> None:
        self.data = b""

    def add(self, data: bytes) -> None:
        self.data = (self.data + data)[-KEPT:]

    def clear(self) -> None:
        self.data = b""

    def lines(self) -> list[str]:
        """What is kept, line by line, safe to print."""
        return [_printable(line) for line in self.data.decode(errors="replace").splitlines() if line.strip()]

    def reported(self) -> str:
        """The lines of a tool such as valgrind, compute-sanitizer or nixnan, without those that report nothing."""
        return "\n".join(line for line in self.lines() if _REPORT.match(line) and not _NOTHING.search(line))

    def told(self) -> str:
        """The end of it, to be added to a message; empty where nothing was printed."""
        shown = self.lines()[-LINES:]
        return "\nits output ended with:" + "".join(f"\n  {line}" for line in shown) if shown else ""


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in line)[:WIDTH]
