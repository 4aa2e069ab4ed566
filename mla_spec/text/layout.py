"""Text for a terminal of some width: cut, wrapped, colored."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import TextIO

WIDTH = 80
"""Columns where no terminal says how many it has."""

_CODES = {"green": "32", "red": "31", "yellow": "33", "dim": "2", "bold": "1"}


@dataclass(frozen=True)
class Screen:
    """What text is made for.

    Attributes:
        width: no line is longer.
        color: whether it shows colors.
    """

    width: int = WIDTH
    color: bool = False

    @classmethod
    def of(cls, stream: TextIO | None = None) -> Screen:
        """That of a stream: no color where it is no terminal, or NO_COLOR is set."""
        stream = stream or sys.stdout
        if not stream.isatty():
            return cls()
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        return cls(max(40, shutil.get_terminal_size((WIDTH, 24)).columns), not plain)

    def paint(self, text: str, *styles: str) -> str:
        """``text`` in a color, where there are any."""
        if not self.color or not styles:
            return text
        return f"\x1b[{';'.join(_CODES[style] for style in styles)}m{text}\x1b[0m"

    def cut(self, text: str, width: int | None = None) -> str:
        """One line, with dots where it was too long."""
        width = self.width if width is None else width
        return text if len(text) <= width else text[: max(0, width - 3)] + "..."

    def wrapped(self, text: str, first: str = "", rest: str = "", most: int | None = None) -> list[str]:
        """Lines that begin with ``first``, and then with ``rest``; at most ``most``, the last of them with dots."""
        return textwrap.wrap(
            text,
            self.width,
            initial_indent=first,
            subsequent_indent=rest,
            max_lines=most,
            placeholder=" ...",
            break_on_hyphens=False,
        )

    def command(self, command: str, indent: str = "  ") -> list[str]:
        """A command of the shell over as many lines as it needs, which can be copied as they are."""
        lines, line = [], indent
        for word in command.split(" "):
            if len(line) + len(word) + 2 > self.width and line.strip():
                lines.append(f"{line}\\")
                line = indent
            while len(line) + len(word) + 2 > self.width:
                room = self.width - 1 - len(line)
                room = word.rfind(",", 0, room) + 1 or room
                lines.append(f"{line}{word[:room]}\\")
                word, line = word[room:], ""
            line += f"{word} "
        return [*lines, line.rstrip()]
