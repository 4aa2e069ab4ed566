"""Triton kernels of a package on a CPU, by Triton's interpreter, without importing the package.

The interpreter runs a kernel's algorithm, its indexing and its masks. It does not round as a GPU does, and has neither races nor
shared memory, and reports say that they were interpreted. Its bfloat16 is wrong, and repaired by ``triton_bfloat16``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from mla_spec.adapters import triton_bfloat16
from mla_spec.bounds.profile import Profile
from mla_spec.subjects.supports import Supports

RUNS = "runs, interpreted"
"""What a list of adapters says of one whose kernel is interpreted."""

CONVENTION = "interpreted: run by Triton's interpreter on a CPU, which does not round as a GPU does"
DTYPES = ("float32", "float16", "bfloat16")


def package_folder(package: str) -> Path | None:
    """Where a package is installed; None where it is not. The package is not imported."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(folders[0]) if folders else None


def unavailable(package: str, file: str) -> str:
    """Why a file of a package cannot be interpreted here, or ""."""
    folder = package_folder(package)
    if folder is None:
        return f"{package} is not installed"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if (folder / file).is_file() else f"this version of {package} has no {file}"


def interpreter() -> tuple[ModuleType, ModuleType]:
    """``triton`` and ``triton.language``, whose own functions are interpreted too.

    That is settled when it is imported. Torch may have imported it before, compiled: then it is imported anew. bfloat16 is
    repaired.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        compiled = [name for name in sys.modules if name.partition(".")[0] == "triton"]
        for name in compiled:
            if not name.startswith("triton._C"):  # the same extension cannot be loaded twice
                del sys.modules[name]
    found = import_module("triton"), import_module("triton.language")
    triton_bfloat16.repair()
    return found


def load_interpreted(package: str, file: str, stubs: Mapping[str, Mapping[str, object]]) -> ModuleType:
    """A file of a package as a module, its Triton kernels interpreted.

    Args:
        file: its path below the package's folder; it finds ``interpreter()`` imported.
        stubs: by name, the modules that it imports from its own package, and what they hold. They stand for the package while
            the file is loaded, and no longer.
    """
    folder = package_folder(package)
    assert folder is not None
    spec = importlib.util.spec_from_file_location(f"interpreted_{Path(file).stem}", folder / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where Triton looks for the source of a kernel
    with _in_place_of(package, stubs):
        spec.loader.exec_module(module)
    return module


def declared(adapter: Any, num_heads: tuple[int, ...]) -> tuple[tuple[str, ...], dict[str, Profile], Supports]:
    """Conventions, profiles and ``Supports`` of an adapter whose kernel is interpreted.

    Cases are small: an interpreted kernel takes a second where a compiled one takes a microsecond.
    """
    small = replace(
        adapter.supports,
        dtypes=DTYPES,
        num_heads=num_heads,
        latent_dims=((16, 8), (32, 16)),
        page_sizes=(1, 16, 64),
        max_batch=9,
        max_keys=256,
    )
    return (CONVENTION, *adapter.conventions), {dtype: adapter.profile[dtype] for dtype in DTYPES}, small


@contextmanager
def _in_place_of(package: str, stubs: Mapping[str, Mapping[str, object]]) -> Iterator[None]:
    """Here ``import package.name`` gives a stub."""
    made = {name: ModuleType(name) for name in (package, *stubs)}
    for name, held in stubs.items():
        vars(made[name]).update(held)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
