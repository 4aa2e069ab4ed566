"""How an operation is called, as data: its arguments, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from types import SimpleNamespace
from typing import Any, Literal

from mla_spec.installed import operation_named
from mla_spec.subjects.extent import CallExtent
from mla_spec.subjects.supports import Supports

ArgumentKind = Literal["values", "wide", "lse", "float32", "int32", "int64", "bytes", "codes", "config"]
"""What the elements of an argument are.

"values": numbers in the dtype of the case. "wide": float32, or float64 where the case is. "lse": the same, with the value
that the subject declares where there is no key. "bytes": uint8. "codes": float8_e4m3fn. "config": no tensor but an object.
"""

OutputKind = Literal["values", "wide", "float32 or better", "indices", "bytes"]
"""What the elements of an output are; "indices" are int32 or int64."""


@dataclass(frozen=True)
class Argument:
    """One argument of a call.

    Attributes:
        name: of the parameter, and of the attribute of the inputs that holds it.
        axes: its shape, for people.
        kind: of its elements. An argument that is a dict of arrays is a dict of tensors of this kind.
        optional: passed by name, and left out where the inputs hold None.
        written: the call changes it.
        far: its first axis may be stored with any stride.
    """

    name: str
    axes: str = ""
    kind: ArgumentKind = "values"
    optional: bool = False
    written: bool = False
    far: bool = False

    @property
    def leading_axes(self) -> tuple[str, ...]:
        """What lies along its first axes, up to one that may be absent, or be several."""
        names = self.axes.strip("[]").split(", ")
        return tuple(takewhile(lambda name: not name.startswith(("(", "...")), names))


@dataclass(frozen=True)
class Output:
    """One part of what a call returns.

    Attributes:
        name: how a law asks for it; that of an argument which the call writes, where the call returns nothing.
        axes: its shape, for people.
        shape: from the inputs, its shape.
        kind: of its elements.
        offered: from what the subject supports, whether it is returned; None stands in its place where it is not.
        what: how messages call it; its name where this is empty.
        view: whether it may share memory with an argument.
    """

    name: str
    axes: str
    shape: Callable[[Any], tuple[int, ...]]
    kind: OutputKind = "values"
    offered: Callable[[Supports], bool] = lambda _: True
    what: str = ""
    view: bool = False


class Asked(SimpleNamespace):
    """Of the inputs of a call what its caller knows: arguments, keywords, and ``shapes``, those of its outputs by name.

    Inputs may also hold what the call must give, which is not to be where the subject is.
    """


@dataclass(frozen=True, kw_only=True)
class Signature:
    """How an operation is called.

    Attributes:
        name: of the subject's method.
        arguments: in the order of the call.
        keywords: attributes of the inputs that are passed by name; "dtype" is the torch dtype of the case.
        options: likewise, but left out where the inputs hold None.
        outputs: in the order in which they are returned. A call returns one as it is, several as a tuple, and nothing where
            what it gives is an argument that it writes.
        extent: how many sequences a call has, and how many keys a query of it sees; None where it has neither.
        sizes: the fields of ``Supports`` that say how large its arguments and outputs may be.
    """

    name: str
    arguments: tuple[Argument, ...]
    keywords: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    outputs: tuple[Output, ...]
    extent: CallExtent | None = None
    sizes: tuple[str, ...] = ()

    def __reduce__(self) -> Any:
        """By name: its functions are no data."""
        if operation_named(self.name) is not self:
            raise TypeError(f"{self.name} is not the operation of this name")
        return operation_named, (self.name,)

    def asked(self, inputs: Any, *, tensors: bool = True, shapes: bool = True) -> Asked | None:
        """What a call on ``inputs`` is asked, with or without its tensors and ``shapes``; None where the inputs are."""
        if inputs is None:
            return None
        names = [a.name for a in self.arguments if tensors or a.kind == "config"]
        values = {
            name: getattr(inputs, name)
            for name in [*names, *(k for k in (*self.keywords, *self.options) if k != "dtype")]
        }
        return Asked(**values, shapes={o.name: o.shape(inputs) for o in self.outputs} if shapes else {})

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the arguments that the call changes."""
        return tuple(argument.name for argument in self.arguments if argument.written)

    @property
    def returned(self) -> tuple[Output, ...]:
        """The outputs that the call returns."""
        return tuple(output for output in self.outputs if output.name not in self.written)

    @property
    def call(self) -> str:
        """The call as one writes it."""
        names = [argument.name for argument in self.arguments if not argument.optional]
        optional = [*(a.name for a in self.arguments if a.optional), *self.options]
        by_name = [*self.keywords, *(f"{name}=None" for name in optional)]
        return f"{self.name}({', '.join([*names, *(['*', *by_name] if by_name else [])])})"

    @property
    def returns(self) -> str:
        """What it returns, as one writes it."""
        parts = [f"{output.name} {output.axes}" for output in self.returned]
        if not parts:
            return f"None; changes {', '.join(self.written)}"
        return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"
