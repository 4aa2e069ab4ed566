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


def write_json(path: str, content: Any) -> None:
    """Write ``content`` whole; UsageError where that is not possible."""
    try:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
