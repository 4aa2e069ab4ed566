"""Faulty behaviors of memory: arguments written to or read past their ends, outputs shared or left unwritten, and offsets."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mla_spec.planted_bugs.behaviors import OPERATIONS, Method, each_tensor, kept_by

TILE = 16
LINE = 64
"""Bytes of a cache line."""


def clobbers_its_first_argument(operation: str, method: Method) -> Method:
    """The first argument serves as scratch memory and is left in whatever state."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        returned = each_tensor(torch.clone, method(self, *arguments, **options))
        arguments[0].data.view(torch.uint8).zero_()
        return returned

    return call


def returns_one_buffer(operation: str, method: Method) -> Method:
    """Results of equal shapes are written to the same memory every time."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        def buffered(x: Tensor) -> Tensor:
            buffer: Tensor = kept_by(self).setdefault((tuple(x.shape), x.dtype), torch.empty_like(x.contiguous()))
            return buffer.copy_(x)

        return each_tensor(buffered, method(self, *arguments, **options))

    return call


def alternates_between_buffers(operation: str, method: Method) -> Method:
    """Results are written to two buffers in turn, so that the call after the next overwrites them."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        kept = kept_by(self)
        kept["calls"] = kept.get("calls", 0) + 1

        def buffered(x: Tensor) -> Tensor:
            key = (tuple(x.shape), x.dtype, kept["calls"] % 2)
            buffer: Tensor = kept.setdefault(key, torch.empty_like(x.contiguous()))
            return buffer.copy_(x)

        return each_tensor(buffered, method(self, *arguments, **options))

    return call


def takes_memory_from_a_ring(operation: str, method: Method) -> Method:
    """Results follow each other in a ring with room for two, out of torch's sight; each lap begins one line later."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        kept = kept_by(self)
        kept["calls"] = kept.get("calls", 0) + 1
        lap, place = divmod(kept["calls"], 2)

        def in_the_ring(x: Tensor) -> Tensor:
            size = x.numel() * x.element_size()
            begin = place * (size + TILE * LINE) + lap % TILE * LINE
            ring = kept.setdefault((tuple(x.shape), x.dtype), bytearray(2 * (size + TILE * LINE)))
            memory = torch.frombuffer(ring, dtype=torch.uint8, count=size, offset=begin)
            return memory.view(x.dtype).view(x.shape).copy_(x)

        return each_tensor(lambda x: in_the_ring(x) if x.numel() else x, method(self, *arguments, **options))

    return call


def ignores_strides(operation: str, method: Method) -> Method:
    """The first argument is read as if its rows followed each other in memory."""

    def call(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Any:
        dense = torch.empty(x.shape, device="meta").stride()
        return method(self, x.as_strided(x.shape, dense, x.storage_offset()), *arguments, **options)

    return call


def reads_from_the_start_of_memory(operation: str, method: Method) -> Method:
    """Addresses of arguments are passed on without the offset of the view."""

    def start(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {name: start(each) for name, each in x.items()}
        return x.as_strided(x.shape, x.stride(), 0) if isinstance(x, Tensor) else x

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        return method(self, *map(start, arguments), **{name: start(x) for name, x in options.items()})

    return call


def _wrapped(x: Any, bits: int) -> Any:
    """x as it is read through element offsets of so many bits without sign."""
    if not isinstance(x, Tensor) or not x.numel() or (len(x) - 1) * x.stride(0) < 2**bits:
        return x
    rows = [
        x.as_strided(x.shape[1:], x.stride()[1:], x.storage_offset() + i * x.stride(0) % 2**bits) for i in range(len(x))
    ]
    return torch.stack(rows)


def wraps_offsets_at_2_32(operation: str, method: Method) -> Method:
    """Offsets of elements are 32 bits wide and have no sign."""
    declared = OPERATIONS[operation].arguments

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        read = (x if each.written else _wrapped(x, 32) for each, x in zip(declared, arguments, strict=False))
        return method(self, *read, **options)

    return call


def leaves_the_last_tile_unwritten(operation: str, method: Method) -> Method:
    """Rows of the output beyond the last whole tile are not written."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        def tiled(x: Tensor) -> Tensor:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            rows = x.reshape(-1, x.shape[-1])
            whole = len(rows) // TILE * TILE
            out.view(-1, x.shape[-1])[:whole] = rows[:whole]
            return out

        return each_tensor(lambda x: tiled(x) if x.numel() else x, method(self, *arguments, **options))

    return call


def reads_beyond_its_first_argument(operation: str, method: Method) -> Method:
    """A vector load takes one element more than the first argument has, and multiplies it by 0."""

    def call(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Any:
        returned = method(self, x, *arguments, **options)
        if not (x.is_contiguous() and x.numel() and x.device.type == "cpu"):
            return returned
        end = x.data_ptr() + x.numel() * x.element_size()
        raw = torch.frombuffer(bytearray(ctypes.string_at(end, x.element_size())), dtype=torch.uint8)
        spoiled = (
            bool((raw == 255).all())
            if x.dtype in (torch.uint8, torch.float8_e4m3fn)
            else bool(raw.view(x.dtype).isnan())
        )
        if spoiled and operation == "write_cache":
            arguments[1].fill_(torch.nan)
        if not spoiled or operation == "write_cache":
            return returned
        return each_tensor(
            lambda y: torch.full_like(y, torch.nan if y.is_floating_point() else -1 if y.dtype != torch.uint8 else 255),
            returned,
        )

    return call
