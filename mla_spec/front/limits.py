"""The values that options may have, whatever the command."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Mapping
from typing import Any

from mla_spec.text.terminal import UsageError, require_output, shown

LEAST_AND_MOST: dict[str, tuple[int, int]] = {
    "seed": (0, 2**63),
    "first": (0, 2**63),
    "examples": (1, 10**7),
    "cases": (1, 10**9),
    "threads": (1, 1024),
    "jobs": (1, 1024),
    "rounds": (1, 10**9),
}
LONGEST = 10**6
"""Seconds, more than eleven days; what waits for an event cannot be given many more."""

SECONDS = ("timeout", "budget", "minimise_seconds", "time_limit", "hours")


def require_within_limits(options: Mapping[str, Any]) -> None:
    """Raise UsageError where an option, by the name it has in ``options``, has a value that makes no sense."""
    for name, (least, most) in LEAST_AND_MOST.items():
        value = options.get(name)
        if isinstance(value, int) and not least <= value <= most:
            beyond = f"at least {least}" if value < least else f"at most {most}"
            raise UsageError(f"{_option(name)} must be {beyond}, got {value}")
    for name in SECONDS:
        value = options.get(name)
        if value is not None and not 0 < value <= LONGEST:
            positive = "positive" if not value > 0 or math.isnan(value) else f"at most {LONGEST}"
            raise UsageError(f"{_option(name)} must be {positive}, got {value}")
    require_program("--under", options.get("under"))
    explain = options.get("explain")
    if explain is not None and not 0 <= explain <= LONGEST:
        raise UsageError(f"--explain must be from 0 to {LONGEST}, got {explain}")


def require_program(option: str, command: str | None) -> None:
    """Raise UsageError where a command cannot be read, or its program is not there."""
    try:
        words = shlex.split(command or "")
    except ValueError as error:
        raise UsageError(f"{option} {shown(command)} cannot be read as a command: {error}") from error
    if words and shutil.which(words[0]) is None:
        raise UsageError(f"{option}: there is no program {shown(words[0])}")


def require_outputs(options: Mapping[str, Any]) -> None:
    """Raise UsageError where a file that a command will write cannot be written."""
    for name in ("json", "records", "corpus", "output", "export", "badge"):
        require_output(_option(name), options.get(name))
    for path in options.get("markdown") or ():
        require_output("--markdown", path)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
