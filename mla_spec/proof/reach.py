"""Which operations of a subject can run code in which it differs from the class it is derived from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from mla_spec.operations.all import OPERATIONS

_DECLARATIONS = ("profile", "supports")


def operations_that_differ(derived: type) -> set[str]:
    """Operations of ``derived`` whose code can reach a name that its own body defines.

    A name counts as reached when code that may run mentions it, so the set may be too large; it is too small only where
    names are made up at run time. All operations differ where the profile, what is supported, or the arguments of the base's
    constructor do.
    """
    offered = {name for name in OPERATIONS if callable(getattr(derived, name, None))}
    changed = {name for name in vars(derived) if not name.startswith("__") and name != "name"}
    constructor = vars(derived).get("__init__")
    configures = isinstance(constructor, FunctionType) and "__init__" in _mentioned(constructor.__code__)
    if configures or changed.intersection(_DECLARATIONS) or changed & _reached(derived, "__init__"):
        return offered
    return {name for name in offered if changed & ({name} | _reached(derived, name))}


def _reached(derived: type, start: str) -> set[str]:
    """Names that the method ``start`` mentions, and the methods of ``derived`` with these names, and so on."""
    names: set[str] = set()
    pending: list[Any] = list(_definitions(derived, start))
    seen: set[Any] = set()
    while pending:
        thing = pending.pop()
        if thing in seen:
            continue
        seen.add(thing)
        if isinstance(thing, type):
            pending += [made for name in dir(thing) for made in _definitions(thing, name)]
            continue
        for name in _mentioned(thing.__code__) - names:
            names.add(name)
            pending += _definitions(derived, name)
        globals_ = (thing.__globals__.get(name) for name in _mentioned(thing.__code__))
        # A base is mentioned to call its methods on the object, whose names are followed already.
        pending += [found for found in globals_ if _is_ours(found) and found not in derived.__mro__]
    return names


def _is_ours(thing: Any) -> bool:
    """Whether a global is a function or class of this package, whose code is followed."""
    return isinstance(thing, (type, FunctionType)) and thing.__module__.startswith("mla_spec.")


def _definitions(owner: type, name: str) -> Iterator[FunctionType]:
    """Every function called ``name`` in a class and its bases: any of them may be reached, through ``super()``."""
    for base in owner.__mro__:
        found = vars(base).get(name)
        found = getattr(found, "__func__", found)
        if isinstance(found, FunctionType):
            yield inspect.unwrap(found)


def _mentioned(code: CodeType) -> set[str]:
    nested = (_mentioned(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)
