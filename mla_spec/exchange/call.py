"""A call of an operation as data: its tensors by name, and everything else as texts. ``docs/exchange.md`` describes both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mla_spec.exchange.moments import Moments, read_moments
from mla_spec.exchange.tensor_file import DTYPES, ExchangeError, decode, encode
from mla_spec.installed import operation_named
from mla_spec.reference.config import MLAConfig, RopeConfig
from mla_spec.reference.indexer import IndexerConfig
from mla_spec.subjects.signature import Signature
from mla_spec.text.terminal import shown
from mla_spec.text.typed import Mistyped, checked, read_object

SCHEMA, VERSION = "mla-spec-call", "1"

OBJECTS: dict[tuple[str, str], type[Any]] = {
    ("rope", "rope"): RopeConfig,
    ("absorb", "config"): MLAConfig,
    ("project_indexer", "config"): IndexerConfig,
}
"""Classes of what is no tensor and no plain value, by operation and name."""

RESERVED = ("schema", "version", "operation")


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        operation: its name.
        tensors: arguments by name, those of a dict as "argument.key", without the optional ones that are absent.
        values: everything else by name, as JSON has it; a configuration is an object of its fields.
        strides: of tensors that were not dense where the call was made, in elements; a file holds the elements dense.
        moments: of tensors that are not known; each stands among ``tensors`` as zeros of its shape, which take no memory.
    """

    operation: str
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    strides: Mapping[str, tuple[int, ...]] = ()  # type: ignore[assignment]
    moments: Mapping[str, Moments] = field(default_factory=dict)

    def encoded(self) -> bytes:
        """The bytes of its file."""
        texts = {"schema": SCHEMA, "version": VERSION, "operation": self.operation, **_flat(self.values)}
        texts |= {f"strides.{name}": json.dumps(each) for name, each in dict(self.strides).items()}
        texts |= {f"moments.{name}": each.encoded() for name, each in self.moments.items()}
        return encode({name: x for name, x in self.tensors.items() if name not in self.moments}, texts)

    @property
    def signature(self) -> Signature:
        """How its operation is called."""
        found: Signature = operation_named(self.operation)
        return found

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """What the method of a subject gets: by place, and by name. What it changes is a copy."""
        places: list[Any] = []
        options = {name: _option(name, value) for name, value in self._objects().items()}
        for argument in self.signature.arguments:
            value = options.pop(argument.name, None) if argument.kind == "config" else self._tensor(argument.name)
            if not argument.optional:
                places.append(value.clone() if argument.written else value)
            elif value is not None:
                options[argument.name] = value
        return places, options

    def _tensor(self, name: str) -> Any:
        """A tensor, a dict of those below a name, or None."""
        if name in self.tensors:
            return self.tensors[name]
        prefix = f"{name}."
        return {k.removeprefix(prefix): x for k, x in self.tensors.items() if k.startswith(prefix)} or None

    def _objects(self) -> dict[str, Any]:
        """``values``, with configurations made."""
        made = {}
        for name, value in self.values.items():
            cls = OBJECTS.get((self.operation, name))
            try:
                made[name] = value if cls is None else read_object(cls, value, name)
            except (Mistyped, ValueError) as error:
                raise ExchangeError(f"{self.operation}: {error}") from error
        return made

    def inputs(self) -> SimpleNamespace:
        """The arguments as the reference takes them: float64 numbers and integers by name.

        An LSE of +inf, by which some subjects mark rows without keys, is -inf there.
        """
        values: dict[str, Any] = dict.fromkeys(self.signature.options)
        values |= {k: tuple(v) if isinstance(v, list) else v for k, v in self._objects().items()}
        for argument in self.signature.arguments:
            if argument.kind == "config":
                continue
            found = self._tensor(argument.name)
            if isinstance(found, dict):
                found = {name: _numbers(x) for name, x in found.items()}
            elif found is not None:
                found = _numbers(found)
            if argument.kind == "lse" and found is not None:
                found = np.where(np.isposinf(found), -np.inf, found)
            values[argument.name] = found
        return SimpleNamespace(**values)


def address(data: bytes) -> str:
    """The name of a call: the sha256 of its file."""
    return hashlib.sha256(data).hexdigest()


def call_of(operation: Signature, places: tuple[Any, ...], options: Mapping[str, Any]) -> Call:
    """The call that passes these arguments."""
    names = [argument.name for argument in operation.arguments if not argument.optional]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in [*zip(names, places, strict=False), *options.items()]:
        if isinstance(value, Tensor) and name in (*operation.keywords, *operation.options):
            values[name] = value.item()  # a number that some callers keep on the device
        elif isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            tensors |= {f"{name}.{key}": x for key, x in value.items()}
        elif value is not None:
            values[name] = _plain(value)
    strides = {name: tuple(x.stride()) for name, x in tensors.items() if not x.is_contiguous()}
    return Call(operation.name, tensors, values, strides)


def read_call(data: bytes, what: str) -> Call:
    """The call in the bytes of a file; ``what`` names it in messages.

    Raises:
        ExchangeError: it is none.
    """
    tensors, texts = decode(data, what)
    if (texts.get("schema"), texts.get("version")) != (SCHEMA, VERSION):
        found = f"{shown(texts.get('schema'))} version {shown(texts.get('version'))}"
        raise ExchangeError(f"{what}: the schema is {found}; this version reads {SCHEMA!r} version {VERSION!r}")
    name = texts.get("operation", "")
    operation = operation_named(name)
    if not isinstance(operation, Signature):
        raise ExchangeError(f"{what}: the operation is {shown(name)}, which takes no tensors or is unknown")
    strides = {key: _strides(value, f"{what}: strides.{key}") for key, value in _below("strides.", texts)}
    moments = {key: read_moments(_parsed(value), f"{what}: moments.{key}") for key, value in _below("moments.", texts)}
    tensors |= {key: torch.zeros((), dtype=DTYPES[each.dtype]).expand(each.shape) for key, each in moments.items()}
    plain = {k: v for k, v in texts.items() if k not in RESERVED and not k.startswith(("strides.", "moments."))}
    call = Call(name, tensors, _nested(plain, what), strides, moments)
    _require_whole(call, operation, what)
    return call


def _below(prefix: str, texts: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(key.removeprefix(prefix), text) for key, text in texts.items() if key.startswith(prefix)]


def _strides(text: str, where: str) -> tuple[int, ...]:
    try:
        found: tuple[int, ...] = checked(_parsed(text), tuple[int, ...], where)
    except Mistyped as error:
        raise ExchangeError(str(error)) from error
    return found


def _require_whole(call: Call, operation: Signature, what: str) -> None:
    for argument in operation.arguments:
        given = argument.name in call.values if argument.kind == "config" else call._tensor(argument.name) is not None
        if not given and not argument.optional:
            raise ExchangeError(f"{what}: {operation.name} has no argument {argument.name}")
    for name in operation.keywords:
        if name not in call.values:
            raise ExchangeError(f"{what}: {operation.name} has no {name}")


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return json.loads(json.dumps(asdict(value)))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _option(name: str, value: Any) -> Any:
    """A value as the method gets it."""
    if name == "dtype":
        return getattr(torch, str(value))
    return tuple(value) if isinstance(value, list) else value


def _numbers(x: Tensor) -> Any:
    """float64 of a tensor of numbers, int64 of integers."""
    if x.dtype == torch.uint8:
        return x.numpy()
    return x.to(torch.float64).numpy() if x.is_floating_point() else x.to(torch.int64).numpy()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Values as texts: fields of an object as "object.field", strings bare, everything else as JSON."""
    texts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            texts |= _flat(value, f"{prefix}{name}.")
        else:
            texts[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return texts


def _nested(texts: Mapping[str, str], what: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in texts.items():
        *path, last = name.split(".")
        into = values
        for part in path:
            into = into.setdefault(part, {})
            if not isinstance(into, dict):
                raise ExchangeError(f"{what}: {shown(name)} is given beside {shown(part)}, which has no fields")
        into[last] = _parsed(text)
    return values


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
