"""A dataclass's annotations as its schema: values that a person or a file gives, held against them."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mla_spec.text.terminal import shown


class Mistyped(ValueError):
    """A value is not what its annotation says; the text names the value and what was expected."""


@dataclass(frozen=True)
class Least:
    """In ``Annotated``: the smallest number allowed."""

    value: float


Count = Annotated[int, Least(1)]
Size = Annotated[int, Least(0)]
"""A number of things, of which there may be none."""


def require_fields(made: Any) -> None:
    """Hold every field of a frozen dataclass against its annotation, in its ``__post_init__``.

    Lists become tuples, and numbers of other libraries those of Python.

    Raises:
        Mistyped: a field is something else.
    """
    cls: Any = type(made)
    for name, hint in _hints(cls).items():
        value = getattr(made, name)
        if type(value) not in _ATOMS or not _right(cls, name, value):
            object.__setattr__(made, name, checked(value, hint, f"{cls.__name__}: {name}"))


_ATOMS = frozenset({bool, int, float, str, NoneType})


@lru_cache(maxsize=4096, typed=True)
def _right(cls: Any, name: str, value: Any) -> bool:
    """Whether a field can hold an atom as it is."""
    try:
        return checked(value, _hints(cls)[name], name) is value
    except Mistyped:
        return False


def read_object(cls: type[Any], value: Any, where: str) -> Any:
    """The dataclass ``cls`` from a JSON object, whose keys are its fields.

    Raises:
        Mistyped: it is no object, a field is missing, unknown or of another type.
    """
    if not isinstance(value, dict):
        raise Mistyped(f"{where} is {shown(value)}; expected an object")
    hints = _hints(cls)
    for name in value:
        if name not in hints:
            raise Mistyped(f"{where} has the unknown field {shown(name)}; expected some of {', '.join(hints)}")
    values = {name: checked(value[name], hints[name], f"{where}: {name}") for name in value}
    try:
        return cls(**values)
    except TypeError as error:
        raise Mistyped(f"{where}: {str(error).partition('__init__() ')[2] or error}") from error


_FIELDS: dict[type[Any], dict[str, Any]] = {}


def _hints(cls: type[Any]) -> dict[str, Any]:
    if cls not in _FIELDS:
        hints = get_type_hints(cls, include_extras=True)
        _FIELDS[cls] = {field.name: hints[field.name] for field in fields(cls) if field.init}
    return _FIELDS[cls]


def checked(value: Any, hint: Any, where: str) -> Any:
    """``value``, as the type ``hint`` says.

    Raises:
        Mistyped: it is something else; ``where`` begins the sentence.
    """
    if get_origin(hint) in (Union, UnionType):
        return _one_of(value, get_args(hint), hint, where)
    if get_origin(hint) in (tuple, list):
        return _sequence(value, hint, where)
    if get_origin(hint) is dict and isinstance(value, dict):
        key, each = get_args(hint)
        return {checked(k, key, where): checked(v, each, f"{where}[{shown(k)}]") for k, v in value.items()}
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return read_object(hint, value, where)
    found = _plain(value, hint)
    if found is _WRONG:
        raise Mistyped(f"{where} is {shown(value)}; expected {expected(hint)}")
    return found


_WRONG: Any = object()


def _plain(value: Any, hint: Any) -> Any:
    """``value`` as a type without parts, or ``_WRONG``."""
    if get_origin(hint) is Annotated:
        base, *limits = get_args(hint)
        found = _plain(value, base)
        return _WRONG if found is _WRONG or any(found < limit.value for limit in limits) else found
    if get_origin(hint) is Literal:
        return value if any(type(value) is type(choice) and value == choice for choice in get_args(hint)) else _WRONG
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value) if math.isfinite(value) else _WRONG
        except OverflowError:
            return _WRONG
    if hint is Any or (hint not in (int, float) and isinstance(hint, type) and isinstance(value, hint)):
        return value
    return _WRONG


def _one_of(value: Any, hints: tuple[Any, ...], hint: Any, where: str) -> Any:
    if value is None and NoneType in hints:
        return None
    others = [each for each in hints if each is not NoneType]
    if len(others) == 1 and get_origin(others[0]) in (tuple, dict) and isinstance(value, list | tuple | dict):
        return checked(value, others[0], where)  # its error says which element is wrong
    for each in others:
        try:
            return checked(value, each, where)
        except Mistyped:
            continue
    raise Mistyped(f"{where} is {shown(value)}; expected {expected(hint)}")


def _sequence(value: Any, hint: Any, where: str) -> Any:
    args = get_args(hint)
    if get_origin(hint) is list or args[-1] is Ellipsis:
        parts = [args[0]] * len(value) if isinstance(value, list | tuple) else None
    else:
        parts = list(args)
    if parts is None or not isinstance(value, list | tuple) or len(value) != len(parts):
        raise Mistyped(f"{where} is {shown(value)}; expected {expected(hint)}")
    found = [checked(each, part, f"{where}[{i}]") for i, (each, part) in enumerate(zip(value, parts, strict=True))]
    return found if get_origin(hint) is list else tuple(found)


_NOUNS = {bool: "True or False", int: "an integer", float: "a finite number", str: "a string", NoneType: "None"}


def expected(hint: Any) -> str:
    """A type for people: "a list, each an integer of at least 1, or None"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{expected(args[0])} of at least {args[1].value:g}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (Union, UnionType):
        return ", or ".join(expected(each) for each in args)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list, each {expected(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(expected(each) for each in args)}"
    if origin is dict or is_dataclass(hint):
        return "an object" if origin is dict else f"the fields of {hint.__name__}"
    return _NOUNS.get(hint, f"a {getattr(hint, '__name__', hint)}")
