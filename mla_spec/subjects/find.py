"""Finds the subject that a name on the command line means."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mla_spec.installed import FROM_FILES, SHIPPED, kernel_signatures, operation_names, subject_elsewhere
from mla_spec.subjects.contract import Unreadable, require_subject
from mla_spec.subjects.violation import BrokenSubject, UnknownSubject, raised

__all__ = ["BrokenSubject", "UnknownSubject", "available_subjects", "resolve_subject", "unavailable"]


ELSEWHERE = {"command": "pipe", "files": "files"}
"""Where the answers of a subject come from that is no Python object, by what its name begins with."""


class FunctionSubject:
    """A subject of one bare function, which implements the operation ``signature``."""

    def __init__(self, function: Any, signature: str) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        setattr(self, signature, function)


def elsewhere(spec: str) -> str:
    """Where the answers of the subject called ``spec`` come from: "pipe", "files", or "" of a Python object."""
    kind, _, rest = spec.partition(":")
    return ELSEWHERE.get(kind, "") if rest else ""


def unavailable(name: str) -> str:
    """Why the shipped subject ``name`` cannot run here, or ""."""
    found = _attribute(SHIPPED[name])
    reason = getattr(found, "unavailable", None)
    return str(reason()) if reason is not None else ""


def available_subjects() -> list[str]:
    """The shipped subjects that can run here."""
    return [name for name in SHIPPED if not unavailable(name)]


def resolve_subject(spec: str, signature: str | None = None) -> Any:
    """The subject called ``spec``: a shipped one, ``package.module:object``, or ``path/to/file.py:object``.

    Or ``deepseek:path/to/model.py``, of a file that an adapter knows how to call; "command:PROGRAM ..." answers through a pipe,
    "files:FOLDER" by files. A class is made into an object without arguments.

    Args:
        signature: of ``object``: the operation that it implements, where it is a bare function, or the public kernel that it is
            called like.

    Raises:
        UnknownSubject: it does not exist, or is no subject.
        BrokenSubject: its code did not let it be made.
    """
    if elsewhere(spec):
        if signature is not None:
            raise UnknownSubject(f"{spec} says itself what it offers; --signature is of Python objects")
        return subject_elsewhere(spec)
    if spec in SHIPPED:
        reason = unavailable(spec)
        if reason:
            raise UnknownSubject(f"{spec} cannot run here: {reason}")
        found = _attribute(SHIPPED[spec])
    else:
        found = _user_attribute(spec)
    if inspect.isclass(found):
        _require_no_arguments(spec, found)
    try:
        subject = found() if inspect.isclass(found) else found
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise BrokenSubject(f"{spec}: making the object failed with {raised(error)}") from error
    if signature is not None:
        subject = _with_signature(spec, subject, signature)
    elif inspect.isroutine(subject):
        raise UnknownSubject(f"{spec} is a bare function; name its operation with --signature, e.g. decode")
    try:
        require_subject(subject)
    except Unreadable as error:
        raise BrokenSubject(str(error)) from error
    except TypeError as error:
        raise UnknownSubject(str(error)) from error
    return subject


def _with_signature(spec: str, found: Any, signature: str) -> Any:
    """The subject that calls ``found`` as ``signature`` says."""
    operations, kernels = operation_names(), kernel_signatures()
    if signature in operations:
        if not callable(found):
            raise UnknownSubject(f"{spec} is not callable, so it cannot implement {signature!r}")
        return FunctionSubject(found, signature)
    if signature not in kernels.SIGNATURES:
        known = f"known are {', '.join(operations)}, and of public kernels {', '.join(kernels.SIGNATURES)}"
        raise UnknownSubject(f"unknown operation {signature!r} for --signature; {known}")
    reason = kernels.unfit(signature, found)
    if reason:
        raise UnknownSubject(f"{spec} cannot have the signature {signature!r}: {reason}")
    return kernels.adapter_of(signature, found)


def _require_no_arguments(spec: str, found: type) -> None:
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise UnknownSubject(f"{spec}: making the object failed with TypeError: {error}") from error
    except Exception:  # it cannot be told before
        return


def _user_attribute(spec: str) -> Any:
    adapter, _, path = spec.partition(":")
    if adapter in FROM_FILES and path.endswith(".py"):
        return _from_file(spec, adapter, path)
    module, separator, attribute = spec.rpartition(":")
    if not separator or not module or not attribute:
        close = difflib.get_close_matches(spec, SHIPPED, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(SHIPPED)}"
        raise UnknownSubject(f"unknown subject {spec!r}; {hint}; own ones are package.module:object or file.py:object")
    try:
        return _attribute(spec)
    except (UnknownSubject, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        kind = UnknownSubject if error.name and f"{module}.".startswith(f"{error.name}.") else BrokenSubject
        raise kind(f"{spec}: importing {module} failed with {raised(error)}") from error
    except BaseException as error:  # SystemExit too: a file that ends the process has not been judged
        raise BrokenSubject(f"{spec}: importing {module} failed with {raised(error)}") from error


def _from_file(spec: str, adapter: str, path: str) -> Any:
    """The subject that an adapter makes of a user's file."""
    if not Path(path).is_file():
        raise UnknownSubject(f"no such file: {path}")
    try:
        return _attribute(FROM_FILES[adapter])(path)
    except (UnknownSubject, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise BrokenSubject(f"{spec}: importing {path} failed with {raised(error)}") from error


def _attribute(spec: str) -> Any:
    module_name, _, attribute = spec.rpartition(":")
    module = _load_file(Path(module_name)) if module_name.endswith(".py") else _import(module_name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UnknownSubject(f"{module_name} has no attribute {attribute!r}")
        found = getattr(found, part)
    return found


def _import(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` would: a console script does not look in the working directory
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    """The module of a file, which is executed once whatever number of subjects it holds; its folder is importable."""
    if not path.is_file():
        raise UnknownSubject(f"no such file: {path}")
    path = path.resolve()
    if path in _FILES:
        return _FILES[path]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return _FILES.setdefault(path, module)


_FILES: dict[Path, ModuleType] = {}
