"""Whose an exception is: the subject's, or the suite's own beside it."""

from __future__ import annotations

import sysconfig
import traceback
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from mla_spec.installed import HOLD_SUBJECTS
from mla_spec.subjects.violation import lacks_memory

_LIBRARIES = ("torch", "numpy", "hypothesis")


def suite_failed(error: BaseException) -> bool:
    """Whether an exception was raised by the suite's code alone, or by a library that it called.

    No frame is then a subject's. What has no frames of its own remains the subject's: lack of memory, and errors of a device,
    which come late.
    """
    if lacks_memory(error) or str(error).startswith("CUDA error"):
        return False
    return all(_is_ours(frame) for frame, _ in traceback.walk_tb(error.__traceback__))


def _is_ours(frame: FrameType) -> bool:
    name, file = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
    if name.startswith("mla_spec."):
        return not any(f"{name}.".startswith(f"{package}.") for package in HOLD_SUBJECTS)
    installed = "site-packages" in file or "dist-packages" in file
    return (
        file.startswith("<frozen ") or file.startswith(_libraries()) or (file.startswith(_standard()) and not installed)
    )


@cache
def _libraries() -> tuple[str, ...]:
    """Folders of the libraries that the suite calls."""
    found = [find_spec(name) for name in _LIBRARIES]
    return tuple(f"{Path(spec.origin).parent}/" for spec in found if spec is not None and spec.origin is not None)


@cache
def _standard() -> str:
    return f"{sysconfig.get_path('stdlib')}/"
