"""What every case is: plain data with an id that carries all of it."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, get_type_hints

import numpy as np

from mla_spec.text.terminal import shown

ATTENTION_REGIMES = ("typical", "outlier", "ties", "negative")
"""Distributions of the numbers that attention is computed of."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Base of all cases. ``kind`` begins the id."""

    kind: ClassVar[str]
    known_regimes: ClassVar[tuple[str, ...]] = ("typical",)
    """What ``regime`` may be, where the case has one."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Fields that the id leaves out where they have their default."""
    dtype: str
    seed: int = 0

    @property
    def id(self) -> str:
        """kind:field=value,...; tuples are joined by "+"."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if not self._left_out(f)}
        return f"{self.kind}:" + ",".join(f"{name}={_write(value)}" for name, value in values.items())

    @property
    def short_id(self) -> str:
        """The id without fields that have their default: it builds the same case."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"{self.kind}:" + ",".join(f"{name}={_write(value)}" for name, value in values.items())

    def _left_out(self, f: Field[Any]) -> bool:
        return f.name in self.optional and getattr(self, f.name) == f.default

    def generator(self) -> np.random.Generator:
        """The generator of the case's values."""
        return np.random.default_rng([self.seed, sum(self.kind.encode())])


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(str(v) for v in value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _read(text: str, hint: Any) -> Any:
    if hint is bool:
        return {"true": True, "false": False}[text]
    if hint == int | None:
        return None if text == "none" else int(text)
    if hint == tuple[int, ...]:
        return tuple(int(part) for part in text.split("+") if part)
    return hint(text)


def read_case(cls: type[Case], text: str) -> Case:
    """The case of this class with the id ``text``; ValueError names the part that cannot be read."""
    hints = {field.name: get_type_hints(cls)[field.name] for field in fields(cls)}
    values: dict[str, Any] = {}
    for part in text.partition(":")[2].split(","):
        name, _, value = part.partition("=")
        if name not in hints:
            raise ValueError(f"case {shown(text)}: a {cls.kind} case has no field {shown(name)}")
        if name in values:
            raise ValueError(f"case {shown(text)}: {name} is given twice")
        try:
            values[name] = _read(value, hints[name])
        except (ValueError, KeyError):
            raise ValueError(f"case {shown(text)}: {name} cannot be {shown(value)}") from None
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"case {shown(text)}: {error}") from None
