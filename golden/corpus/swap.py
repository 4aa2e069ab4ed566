"""Replacing files and folders all at once: after a failure, an interrupt or a kill, the old ones can be put back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

PENDING = ".regenerate"
"""The folder, beside what is replaced, that holds "new" and, during the swap, "old"."""


def swap(root: Path, names: Sequence[str]) -> None:
    """Move each name of ``root`` to "old" and that of "new" into its place.

    The folder "old" exists from before the first rename until after the last: so long ``roll_back`` undoes everything.
    """
    new, old = root / PENDING / "new", root / PENDING / "old"
    old.mkdir()
    for name in names:
        if (root / name).exists():
            os.rename(root / name, old / name)
    for name in names:
        os.rename(new / name, root / name)
    os.rename(old, root / PENDING / "replaced")


def roll_back(root: Path, names: Sequence[str]) -> None:
    """Undo a swap that did not end; nothing where there is none. May itself be interrupted and repeated."""
    new, old = root / PENDING / "new", root / PENDING / "old"
    if not old.exists():
        return
    for name in names:
        if not (new / name).exists() and (root / name).exists():
            os.rename(root / name, new / name)
        if (old / name).exists():
            os.rename(old / name, root / name)
    old.rmdir()
