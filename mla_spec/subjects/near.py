"""Code that runs where the subject is: in its process, or in this one where there is no other.

What lives in the process of a subject is a ``Handle`` here. ``there`` runs a function beside the handles that it is given, and a
function decorated with ``near`` always does. Without a handle both are plain calls, so laws are written once for either way.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ParamSpec, Protocol, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Process(Protocol):
    """What holds a subject; see ``mla_spec.subjects.process``."""

    facts: dict[str, Any]

    def request(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the function returns there: plain data as it is, everything else as handles."""

    def attribute(self, handle: Handle, name: str) -> Any:
        """An attribute, or a method to call."""

    def holds(self, handle: Handle) -> bool:
        """Whether what it stands for is still there."""

    def require_silence(self) -> None:
        """Raise Violation where a tool under which the subject runs has reported anything."""

    def finish(self) -> None:
        """End the process as it ends by itself, where a tool tells more then."""

    def release(self, handle: Handle) -> None:
        """Nobody here asks for it any more."""


class Handle:
    """Something in the process of a subject: a tensor, a driver, a layer.

    Attributes, methods, calls and items are those of what it stands for; what they give comes back as from ``there``.
    """

    __slots__ = ("key", "life", "of", "process")
    __iter__ = None  # else Python would ask for items without end

    def __init__(self, process: Process, life: int, key: int, of: str) -> None:
        self.process, self.life, self.key, self.of = process, life, key, of

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.process.attribute(self, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return there(_called, self, *arguments, **options)

    def __getitem__(self, index: Any) -> Any:
        return there(operator.getitem, self, index)

    def __len__(self) -> int:
        return int(there(len, self))

    def __repr__(self) -> str:
        return f"<{self.of} in the process of the subject>"

    def __del__(self) -> None:
        self.process.release(self)


def gone(x: Any) -> bool:
    """Whether something was in a process that has ended."""
    return isinstance(x, Handle) and not x.process.holds(x)


def _called(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


def call_method(of: Any, name: str, *arguments: Any, **options: Any) -> Any:
    """``of.name(...)``."""
    return getattr(of, name)(*arguments, **options)


def there(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What ``function`` returns where its arguments are. Where they are elsewhere, it must be importable by name."""
    handle = _first_handle([*arguments, *options.values()])
    return function(*arguments, **options) if handle is None else handle.process.request(function, arguments, options)


def near(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs where its arguments are."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        handle = _first_handle([*arguments, *options.values()])
        if handle is None:
            return function(*arguments, **options)
        return cast(R, handle.process.request(run, arguments, options))

    return run


def _first_handle(tree: Any) -> Handle | None:
    """A handle in nested lists, tuples and values of dicts, all of which are of one process."""
    for x in tree.values() if isinstance(tree, dict) else tree:
        found = x if isinstance(x, Handle) else _first_handle(x) if isinstance(x, (list, tuple, dict)) else None
        if found is not None:
            return found
    return None


HANDLES: dict[str, type[Handle]] = {}
"""Handles that do more than forward, by the class of what they stand for."""

TRAVELS: dict[str, tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]] = {}
"""Classes whose objects come back whole, by name: how to make one of its parts, and its parts."""


def travels(cls: type[T]) -> type[T]:
    """A dataclass that comes back from there as itself; its fields are plain, travel, or become handles."""
    TRAVELS[cls.__name__] = cls, lambda x: {f.name: getattr(x, f.name) for f in fields(x)}
    return cls
