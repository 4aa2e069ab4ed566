"""What commands share: usage errors, progress on a terminal, JSON files."""

from __future__ import annotations

import json
import sys
from typing import Any

from mla_spec.text.files import write_atomically


class UsageError(Exception):
    """The command cannot be carried out as given; the text is one sentence."""


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
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: str, content: Any) -> None:
    """Write ``content`` whole; UsageError where that is not possible."""
    try:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
