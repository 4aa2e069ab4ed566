"""Where a run takes place, and which code it judges: what a record needs so that others can compare it."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mla_spec
from mla_spec.installed import FROM_FILES, SHIPPED
from mla_spec.subjects.find import elsewhere


def environment(*devices: str) -> dict[str, Any]:
    """Versions, and the machine as far as it matters."""
    gpus = {torch.cuda.get_device_name(device): None for device in devices if device.startswith("cuda")}
    return {
        "suite": mla_spec.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": ",".join(devices),
        "gpu": ", ".join(gpus) or None,
    }


def code_of(spec: str) -> dict[str, Any]:
    """The state of a subject's code, which is not imported: its file's digest, its repository's commit, whether it differs."""
    kind, _, rest = spec.partition(":")
    module = rest if kind in FROM_FILES else spec.rpartition(":")[0]
    path = None if spec in SHIPPED or elsewhere(spec) else _source(module)
    if path is None:
        return {"source": None, "revision": None, "modified": None}
    folder = path.parent if path.is_file() else path
    revision = _git(folder, "rev-parse", "HEAD")
    changes = None if revision is None else _git(folder, "status", "--porcelain", "--", ".")
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {"source": digest, "revision": revision, "modified": None if changes is None else bool(changes)}


def _source(module: str) -> Path | None:
    """The file, or the folder of the package, that a module's name or path means."""
    if module.endswith(".py"):
        return Path(module) if Path(module).is_file() else None
    found = PathFinder.find_spec(module.partition(".")[0], [str(Path.cwd()), *sys.path])
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return None
    return Path(found.origin).parent if found.submodule_search_locations else Path(found.origin)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says of a folder; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
