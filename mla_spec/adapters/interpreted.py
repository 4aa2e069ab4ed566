"""Triton kernels of a package on a CPU, by Triton's interpreter, without importing the package.

The interpreter runs a kernel's algorithm, its indexing and its masks. It does not round as a GPU does, and has neither races nor
shared memory. Its bfloat16 is wrong: bit patterns are multiplied (triton issue 11584). So adapters that use it take float32 and
float16 only, and their reports say that they were interpreted.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

CONVENTION = "interpreted: run by Triton's interpreter on a CPU, which does not round as a GPU does"
DTYPES = ("float32", "float16")


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

    That is settled when it is imported. Torch may have imported it before, compiled: then it is imported anew.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        compiled = [name for name in sys.modules if name.partition(".")[0] == "triton"]
        for name in compiled:
            if not name.startswith("triton._C"):  # the same extension cannot be loaded twice
                del sys.modules[name]
    return import_module("triton"), import_module("triton.language")


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
