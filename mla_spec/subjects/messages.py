"""What goes between the process that judges and that of a subject, as bytes.

A request names a function and carries its arguments. A reply can hold plain data, arrays, a few classes of the suite and
references to what stays behind, and nothing else: to read one runs no code that it names. Contents of arrays are sent as they lie
in memory.
"""

from __future__ import annotations

import io
import math
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mla_spec.bounds.profile import Accumulator, Profile, RopeProfile
from mla_spec.subjects.near import TRAVELS, Handle, travels
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import SubjectCrashed

Parts = list[Any]
"""The bytes of a message: its structure, and the contents of each array in it."""

_PLAIN = frozenset({type(None), bool, int, float, str, bytes, tuple, list, dict})
_SMALL = 1 << 16
_MOST_PARTS = 1 << 20

DECLARED = (Supports, Profile, Accumulator, RopeProfile)
"""Classes that a subject fills with what it likes: all that is in them must be plain."""

for each in DECLARED:
    travels(each)


class NoMessage(Exception):
    """What arrived is none of the suite's messages: somebody else wrote into the channel."""


def _held(key: int) -> Any:
    """What a handle stands for; a request names it so."""
    raise NoMessage(f"handle {key} outside a request")


class _RequestWriter(pickle.Pickler):
    def __init__(self, file: io.BytesIO, parts: Parts) -> None:
        super().__init__(file, protocol=5, buffer_callback=lambda buffer: parts.append(buffer.raw()))

    def reducer_override(self, x: Any) -> Any:
        if not isinstance(x, Handle):
            return NotImplemented
        if not x.process.holds(x):
            raise SubjectCrashed("the process that held it has ended")
        return _held, (x.key,)


class _RequestReader(pickle.Unpickler):
    def __init__(self, parts: Parts, found: Callable[[int], Any]) -> None:
        super().__init__(io.BytesIO(parts[0]), buffers=parts[1:])
        self.found = found

    def find_class(self, module: str, name: str) -> Any:
        return self.found if (module, name) == (__name__, _held.__name__) else super().find_class(module, name)


class _ReplyWriter(pickle.Pickler):
    def __init__(self, file: io.BytesIO, parts: Parts, keep: Callable[[Any], int]) -> None:
        super().__init__(file, protocol=5)
        self.parts, self.keep = parts, keep

    def persistent_id(self, x: Any) -> Any:
        kind = type(x)
        if kind in _PLAIN:
            return None
        if kind is np.ndarray and x.dtype.kind in "biuf":
            self.parts.append(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data if x.size else b"")
            return "array", x.dtype.str, x.shape, len(self.parts) - 1
        if isinstance(x, np.generic):
            return "plain", x.item()
        if kind is torch.Size:
            return "plain", tuple(x)
        if kind.__name__ in TRAVELS and kind is TRAVELS[kind.__name__][0]:
            values = TRAVELS[kind.__name__][1](x)
            if kind in DECLARED:
                _require_plain(kind.__name__, values)
            return "data", kind.__name__, values
        return "handle", self.keep(x), kind.__name__


class _ReplyReader(pickle.Unpickler):
    def __init__(self, parts: Parts, handle: Callable[[int, str], Any]) -> None:
        super().__init__(io.BytesIO(parts[0]))
        self.parts, self.handle = parts, handle

    def find_class(self, module: str, name: str) -> Any:
        raise NoMessage(f"a reply names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "array":
            return _array(self.parts, *rest)
        if kind == "plain":
            return rest[0]
        if kind == "data":
            return _data(*rest)
        return self.handle(*rest)


def _array(parts: Parts, dtype: str, shape: tuple[int, ...], part: int) -> np.ndarray[Any, Any]:
    if np.dtype(dtype).kind not in "biuf" or math.prod(shape) * np.dtype(dtype).itemsize != len(parts[part]):
        raise NoMessage(f"an array of {dtype} {shape} in {len(parts[part])} bytes")
    return np.frombuffer(parts[part], dtype=dtype).reshape(shape)


def _data(name: str, values: dict[str, Any]) -> Any:
    if TRAVELS[name][0] in DECLARED and _holds_handles(values):
        raise NoMessage(f"{name} holds what is no plain data")
    return TRAVELS[name][0](**values)


def _require_plain(what: str, tree: Any) -> None:
    """Raise SubjectCrashed where a declaration holds anything that is no plain data."""
    for x in [*tree, *tree.values()] if isinstance(tree, dict) else tree:
        if isinstance(x, (list, tuple, dict)):
            _require_plain(what, x)
        elif type(x) not in _PLAIN.union(DECLARED) and not isinstance(x, np.generic):
            raise SubjectCrashed(f"its {what} holds a {type(x).__name__}, which is no plain data")


def _holds_handles(tree: Any) -> bool:
    if isinstance(tree, dict):
        tree = [*tree, *tree.values()]
    return any(isinstance(x, Handle) or (isinstance(x, (list, tuple, dict)) and _holds_handles(x)) for x in tree)


def write_request(request: Any) -> Parts:
    """The parts of a request; what it names must be importable by name."""
    return _written(_RequestWriter, request)


def write_reply(reply: Any, keep: Callable[[Any], int]) -> Parts:
    """The parts of a reply; ``keep`` gives a number to what stays behind."""
    return _written(lambda file, parts: _ReplyWriter(file, parts, keep), reply)


def _written(writer: Callable[[io.BytesIO, Parts], pickle.Pickler], message: Any) -> Parts:
    file = io.BytesIO()
    parts: Parts = [b""]
    writer(file, parts).dump(message)
    parts[0] = file.getbuffer()
    return parts


def read_request(parts: Parts, found: Callable[[int], Any]) -> Any:
    """The request; ``found`` gives what a number stands for."""
    return _RequestReader(parts, found).load()


def read_reply(parts: Parts, handle: Callable[[int, str], Any]) -> Any:
    """The reply; ``handle`` makes what stands for a number and the name of a class.

    Raises:
        NoMessage: it is not what ``write_reply`` writes.
    """
    try:
        return _ReplyReader(parts, handle).load()
    except NoMessage:
        raise
    except Exception as error:
        raise NoMessage(f"{type(error).__name__}: {error}") from error


def framed(parts: Parts) -> Parts:
    """The parts with their number and sizes before them; small ones joined."""
    head = struct.pack(f"<{1 + len(parts)}Q", len(parts), *map(len, parts))
    if sum(map(len, parts)) < _SMALL:
        return [b"".join([head, *parts])]
    return [head, *parts]


def unwritten(size: int) -> memoryview:
    """Memory for so many bytes, which is not cleared first; MemoryError or ValueError where there is none."""
    return np.empty(size, dtype=np.uint8).data


def read_parts(read: Callable[[int], memoryview]) -> Parts:
    """The parts of the message that ``read`` gives the bytes of."""
    (count,) = struct.unpack("<Q", read(8))
    if not 0 < count < _MOST_PARTS:
        raise NoMessage(f"{count} parts")
    sizes = struct.unpack(f"<{count}Q", read(8 * count))
    try:
        return [read(size) for size in sizes]
    except (MemoryError, OverflowError, ValueError) as error:
        raise NoMessage(f"parts of {max(sizes)} bytes") from error


def read_exactly(channel: socket.socket, size: int) -> memoryview:
    """So many bytes of a blocking socket; EOFError at its end."""
    got, done = unwritten(size), 0
    while done < size:
        count = channel.recv_into(got[done:])
        if not count:
            raise EOFError
        done += count
    return got
