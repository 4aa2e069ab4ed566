"""Calls a subject: inputs to tensors on its device, and what it returns back to plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mla_spec.reference.formats import encode
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.contract import supports_of
from mla_spec.subjects.extent import require_call_within
from mla_spec.subjects.near import HANDLES, TRAVELS, Handle, call_method, near, there, travels
from mla_spec.subjects.signature import Argument, Asked, Output, Signature
from mla_spec.subjects.violation import SubjectCrashed, Violation, raised, subject_code

Tensors = dict[str, torch.Tensor]
"""Tensor arguments by name; those of a dict are called "argument.key"."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@travels
@dataclass(frozen=True)
class Result:
    """A tensor that a subject returned, as plain data.

    Attributes:
        value: float64.
        bits: the stored bit patterns, as integers.
        what: what it is, for messages.
    """

    value: Array
    bits: IntArray
    what: str

    def __getitem__(self, index: Any) -> Result:
        return Result(self.value[index], self.bits[index], self.what)

    def arranged(self, arrange: Callable[[Any], Any]) -> Result:
        """The same elements in another shape or order."""
        return Result(arrange(self.value), arrange(self.bits), self.what)


class Results(tuple[Any, ...]):
    """What a call gave, each output a Result, in their order; None for what the subject does not declare.

    ``results.out`` is the output called "out". Unpacking gives all of them.
    """

    names: tuple[str, ...]

    def __new__(cls, parts: Mapping[str, Result | None]) -> Results:
        made = super().__new__(cls, parts.values())
        made.names = tuple(parts)
        return made

    def __getattr__(self, name: str) -> Any:
        if name not in self.names:
            raise AttributeError(f"no output is called {name!r}; there are {', '.join(self.names)}")
        return self[self.names.index(name)]

    def leading(self, index: slice | IntArray) -> Results:
        """Some of the leading axis of each."""
        parts = (None if part is None else part[index] for part in self)
        return Results(dict(zip(self.names, parts, strict=True)))


TRAVELS["Results"] = Results, lambda results: {"parts": dict(zip(results.names, results, strict=True))}


def computed(value: Array, what: str) -> Result:
    """A float64 value that a law computed from results, as a Result."""
    return Result(value, np.ascontiguousarray(value).view(np.int64), what)


@near
def tensor_bits(x: torch.Tensor) -> IntArray:
    """The bit patterns of a tensor's elements."""
    bits: IntArray = x.detach().cpu().contiguous().view(_BITS[x.element_size()]).numpy().copy()
    return bits


@near
def is_tensor(x: Any) -> bool:
    """Whether something that a subject returned is a tensor."""
    return isinstance(x, torch.Tensor)


class Driver:
    """One subject on one device with one dtype.

    Every call is checked for what it returns (type, shape, dtype: a wrong one is a violation) and an exception of the
    subject becomes ``SubjectCrashed``. Autograd records nothing unless ``recording``.
    """

    recording = False

    def __init__(self, subject: Any, dtype: str, device: str = "cpu") -> None:
        self.subject = subject
        self.dtype = dtype
        self.device = device
        self.supports = supports_of(subject)

    @property
    def wide(self) -> torch.dtype:
        """float64 where the case is, else float32."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def tensor(self, x: Array) -> torch.Tensor:
        """float64 data as a tensor of the case's dtype; values are representable, so this is exact."""
        return self._copy(x, TORCH_DTYPES[self.dtype])

    def number(self, bits: Any) -> float:
        """The number of the case's dtype that has these bits."""
        dtype = TORCH_DTYPES[self.dtype]
        return float(torch.tensor(int(bits), dtype=_BITS[dtype.itemsize]).view(dtype))

    def integers(self, x: IntArray, dtype: torch.dtype) -> torch.Tensor:
        return self._copy(x, dtype)

    def _copy(self, x: Any, dtype: torch.dtype) -> torch.Tensor:
        # Always a copy: a subject that writes to its arguments must not reach what they were made from.
        return torch.from_numpy(np.array(x, order="C")).to(device=self.device, dtype=dtype)

    def tensors(self, operation: Signature, inputs: Any) -> Tensors:
        """The tensor arguments by name, without the optional ones that are absent."""
        tensors = {}
        for argument in operation.arguments:
            value = getattr(inputs, argument.name)
            if argument.kind == "config" or value is None:
                continue
            parts = {f"{argument.name}.{key}": x for key, x in value.items()} if isinstance(value, Mapping) else None
            for name, x in ({argument.name: value} if parts is None else parts).items():
                tensors[name] = self._argument(argument, x)
        return tensors

    def _argument(self, argument: Argument, x: Any) -> torch.Tensor:
        if argument.kind == "lse" and self.supports.empty_row == "zero/+inf":
            x = np.where(np.isneginf(x), np.inf, x)
        if argument.kind == "codes":
            x = encode(x, "float8_e4m3fn")
        dtypes = {
            "values": TORCH_DTYPES[self.dtype],
            "wide": self.wide,
            "lse": self.wide,
            "float32": torch.float32,
            "int32": torch.int32,
            "int64": torch.int64,
            "bytes": torch.uint8,
            "codes": torch.uint8,  # the bytes, of which views can be made; the call sees them as numbers
        }
        return self._copy(x, dtypes[argument.kind])

    def raw(self, operation: Signature, inputs: Any, tensors: Tensors) -> tuple[Any, ...]:
        """Call the operation, and give its outputs unread; written arguments stand where they are outputs."""
        arguments = []
        options = {
            name: TORCH_DTYPES[self.dtype] if name == "dtype" else getattr(inputs, name) for name in operation.keywords
        }
        options |= {name: value for name in operation.options if (value := getattr(inputs, name)) is not None}
        for argument in operation.arguments:
            value = _passed(argument, inputs, tensors)
            if not argument.optional:
                arguments.append(value)
            elif value is not None:
                options[argument.name] = value
        require_call_within(self.supports, operation.extent, tensors)
        returned = parts_of(operation, self.guard(lambda: getattr(self.subject, operation.name)(*arguments, **options)))
        return tuple(
            tensors[output.name] if output.name in operation.written else returned[output.name]
            for output in operation.outputs
        )

    def read(self, operation: Signature, inputs: Any, unread: tuple[Any, ...]) -> Results:
        """Outputs of a call on ``inputs`` as plain data; Violation where one is not what the contract says."""
        parts: dict[str, Result | None] = {}
        for output, x in zip(operation.outputs, unread, strict=True):
            offered = output.offered(self.supports)
            shape = inputs.shapes[output.name] if isinstance(inputs, Asked) else output.shape(inputs)
            parts[output.name] = self._output(output, x, shape) if offered else None
        return Results(parts)

    def _output(self, output: Output, x: Any, shape: tuple[int, ...]) -> Result:
        dtypes = {
            "values": (TORCH_DTYPES[self.dtype],),
            "wide": (self.wide,),
            "float32 or better": (torch.float32, torch.float64),
            "indices": (torch.int32, torch.int64),
            "bytes": (torch.uint8,),
        }
        return self.result(x, output.what or output.name, shape, dtypes[output.kind])

    def call(self, operation: Signature, inputs: Any, tensors: Tensors | None = None) -> Results:
        """The outputs of the operation. ``tensors`` replace those built from ``inputs``."""
        tensors = self.tensors(operation, inputs) if tensors is None else tensors
        return self.read(operation, inputs, self.raw(operation, inputs, tensors))

    def guard(self, call: Callable[[], Any]) -> Any:
        """Run a call into the subject, to its end on the device: what goes wrong there is the call's."""
        with subject_code(), torch.set_grad_enabled(self.recording):
            returned = call()
            self._wait()
            return returned

    def _wait(self) -> None:
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self.device)

    def result(
        self, x: Any, what: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] | None = None
    ) -> Result:
        """A returned tensor as plain data; Violation when its type, shape or dtype is not the contract's."""
        dtypes = dtypes or (TORCH_DTYPES[self.dtype],)
        if not isinstance(x, torch.Tensor):
            raise Violation(f"{what} must be a torch tensor, got {type(x).__name__}")
        if odd := odd_for(x, self.device):
            raise Violation(f"{what} must be a plain tensor on {self.device}, got {odd}")
        if tuple(x.shape) != shape:
            raise Violation(f"{what} must have shape {list(shape)}, got {list(x.shape)}")
        if x.dtype not in dtypes:
            raise Violation(f"{what} must be {' or '.join(str(d) for d in dtypes)}, got {x.dtype}")
        return Result(_numbers(x, what), tensor_bits(x), what)


class DriverHandle(Handle):
    """A driver in the process of the subject, which gets of inputs only what a caller knows."""

    __slots__ = ()

    def tensors(self, operation: Signature, inputs: Any) -> Tensors:
        """See ``Driver``."""
        made: Tensors = there(call_method, self, "tensors", operation, operation.asked(inputs, shapes=False))
        return made

    def raw(self, operation: Signature, inputs: Any, tensors: Tensors) -> Any:
        """See ``Driver``."""
        return there(call_method, self, "raw", operation, operation.asked(inputs, tensors=False), tensors)

    def read(self, operation: Signature, inputs: Any, unread: tuple[Any, ...]) -> Any:
        """See ``Driver``."""
        return there(call_method, self, "read", operation, operation.asked(inputs, tensors=False), unread)

    def call(self, operation: Signature, inputs: Any, tensors: Tensors | None = None) -> Any:
        """See ``Driver``."""
        return there(call_method, self, "call", operation, operation.asked(inputs, tensors=tensors is None), tensors)


HANDLES["Driver"] = HANDLES["BackwardDriver"] = DriverHandle


def _numbers(x: torch.Tensor, what: str) -> Array:
    """The elements of a returned tensor; SubjectCrashed where it does not let itself be read."""
    try:
        return x.detach().to("cpu", torch.float64).numpy().copy()
    except Exception as error:
        raise SubjectCrashed(f"{what} cannot be read: {raised(error)}") from error


def _elsewhere(found: torch.device, own: torch.device) -> bool:
    """Whether a device is another than a subject's own, which may leave open which of its kind it is."""
    return found.type != own.type or (own.type != "cpu" and own.index not in (None, found.index))


def odd_for(x: torch.Tensor, device: str) -> str:
    """What is unusual about a tensor, so that its elements could not be read as they lie in memory; or ""."""
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(x).__name__}"
    if x.is_nested:
        return "a nested tensor"
    if x.layout is not torch.strided:
        return f"one of layout {x.layout}"
    if _elsewhere(x.device, torch.device(device)):
        return f"one on {x.device}"
    if x.is_conj() or x.is_neg():
        return "a lazy view"
    return ""


def _passed(argument: Argument, inputs: Any, tensors: Tensors) -> Any:
    """What the call gets for an argument; None for an optional one that is absent."""
    if argument.kind == "config":
        return getattr(inputs, argument.name)
    if argument.kind == "codes":
        return tensors[argument.name].view(torch.float8_e4m3fn)
    if argument.name in tensors:
        return tensors[argument.name]
    if argument.optional:
        return None
    prefix = f"{argument.name}."
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def parts_of(operation: Signature, returned: Any) -> dict[str, Any]:
    """What a call returned, by the names of its outputs; Violation where it is not as many as they are."""
    names = [output.name for output in operation.returned]
    if not names and returned is not None:
        raise Violation(f"{operation.name} must return None, got {type(returned).__name__}")
    if len(names) == 1:
        return {names[0]: returned}
    if names and not (isinstance(returned, tuple) and len(returned) == len(names)):
        raise Violation(f"{operation.name} must return ({', '.join(names)}), got {type(returned).__name__}")
    return dict(zip(names, returned or (), strict=True))
