"""What commands share: usage errors, text that any terminal takes, progress, JSON files."""

from __future__ import annotations

import json
import sys
from typing import Any

from mla_spec.text.files import require_writable, write_atomically


class UsageError(Exception):
    """The command cannot be carried out as given; the text is one sentence."""


def printable(text: str, limit: int = 2000) -> str:
    """``text`` without control characters but line breaks, and cut in its middle to ``limit`` characters."""
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]} ... {text[len(text) - limit // 4 :]}"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: object, limit: int = 1000) -> str:
    """``printable`` without line breaks."""
    return printable(" ".join(str(text).split()), limit)


def shown(value: object, limit: int = 60) -> str:
    """A value for a message: its ``repr``, in one line and not long, whatever the value."""
    try:
        return one_line(repr(value), limit)
    except Exception:
        return f"a {type(value).__name__} without a repr"


def any_encoding() -> None:
    """From here on the standard streams escape what their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def show_progress(text: str) -> None:
    """Replace the line of progress, on a terminal only; "" clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def append_json(path: str, *contents: Any) -> None:
    """Append each of ``contents`` as one line, at once; UsageError where that is not possible."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(content) + "\n" for content in contents))
    except OSError as error:
        raise UsageError(f"cannot write {shown(path)}: {error.strerror}") from error


def write_json(path: str, content: Any) -> None:
    """Write ``content`` whole, as ``write_atomically`` does; UsageError where that is not possible."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: str, text: str) -> None:
    """Write ``text`` whole, as ``write_atomically`` does, in UTF-8; UsageError where that is not possible."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UsageError(f"cannot write {shown(path)}: {error.strerror}") from error


def require_output(option: str, path: str | None) -> None:
    """Raise UsageError where a file named by ``option`` could not be written: before work is done for it."""
    try:
        if path is not None:
            require_writable(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{option} {shown(path)}: cannot write there: {reason}") from error
