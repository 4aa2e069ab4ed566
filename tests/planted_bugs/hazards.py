"""Faults of any call, whatever it computes: one behavior each, planted in every operation that had none.

A behavior makes, from the correct method of a subject, a faulty one. Each is triggered by what triggers it in real kernels:
offsets beyond 2^32, a number of rows that is no multiple of a tile, contents that change behind autograd's counter.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.operations.all import CALLED
from mla_spec.planted_bugs.registry import planted

Method = Callable[..., Any]
Behavior = Callable[[str, Method], Method]

TILE = 16
NAMES = tuple(operation.name for operation in CALLED)


def _tensors(returned: Any) -> list[Tensor]:
    parts = returned if isinstance(returned, tuple) else (returned,)
    return [x for x in parts if isinstance(x, Tensor)]


def _each(change: Callable[[Tensor], Tensor], returned: Any) -> Any:
    """The same with ``change`` made to every tensor."""
    if isinstance(returned, tuple):
        return tuple(change(x) if isinstance(x, Tensor) else x for x in returned)
    return change(returned)


def _store(subject: Any) -> dict[Any, Any]:
    """What a subject keeps between calls."""
    kept: dict[Any, Any] = subject.__dict__.setdefault("_kept", {})
    return kept


def clobbers_its_first_argument(operation: str, method: Method) -> Method:
    """The first argument serves as scratch memory and is left in whatever state."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        returned = _each(torch.clone, method(self, *arguments, **options))
        arguments[0].data.view(torch.uint8).zero_()
        return returned

    return call


def returns_one_buffer(operation: str, method: Method) -> Method:
    """Results of equal shapes are written to the same memory every time."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        def buffered(x: Tensor) -> Tensor:
            buffer: Tensor = _store(self).setdefault((tuple(x.shape), x.dtype), torch.empty_like(x.contiguous()))
            return buffer.copy_(x)

        return _each(buffered, method(self, *arguments, **options))

    return call


def alternates_between_buffers(operation: str, method: Method) -> Method:
    """Results are written to two buffers in turn, so that the call after the next overwrites them."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        kept = _store(self)
        kept["calls"] = kept.get("calls", 0) + 1

        def buffered(x: Tensor) -> Tensor:
            key = (tuple(x.shape), x.dtype, kept["calls"] % 2)
            buffer: Tensor = kept.setdefault(key, torch.empty_like(x.contiguous()))
            return buffer.copy_(x)

        return _each(buffered, method(self, *arguments, **options))

    return call


PLANNED = {
    "rope": 1,
    "absorb": 0,
    "dequantize_weight": 1,
    "prefill": 3,
    "decode": 3,
    "merge": 1,
    "write_cache": 3,
    "quantize_cache": 0,
    "dequantize_cache": 0,
    "decode_quantized": 2,
    "sparse_prefill": 2,
    "sparse_decode": 2,
    "project_indexer": 2,
    "indexer": 4,
}
"""The argument from which a plan is made, by its place in the call."""


def keeps_a_plan_by_address(operation: str, method: Method) -> Method:
    """What was planned for a tensor serves as long as its address and autograd's version of it stay the same."""
    place = PLANNED[operation]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        x = arguments[place]
        key = x.data_ptr(), x._version, tuple(x.shape), x.dtype
        plan, _ = _store(self).setdefault(key, (x.clone(), x))  # alive, so that the address is not used again
        return method(self, *arguments[:place], plan, *arguments[place + 1 :], **options)

    return call


def keeps_a_plan_by_shape(operation: str, method: Method) -> Method:
    """What was planned for the first tensor of a shape serves all that follow."""
    place = PLANNED[operation]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        key = tuple(tuple(x.shape) for x in arguments if isinstance(x, Tensor)), arguments[0].dtype, repr(options)
        plan = _store(self).setdefault(key, arguments[place].clone())
        return method(self, *arguments[:place], plan, *arguments[place + 1 :], **options)

    return call


LENGTHS = {"prefill": 4, "decode": 3, "decode_quantized": 3, "indexer": 4}
"""The argument that says how long sequences are."""


def keeps_a_plan_by_summary(operation: str, method: Method) -> Method:
    """Work is divided among blocks by a plan that is kept for the batch, the longest sequence and the total."""
    place = LENGTHS[operation]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        lengths = arguments[place]
        each = lengths.diff() if operation in ("prefill", "indexer") else lengths
        shapes = tuple(tuple(x.shape) for x in arguments if isinstance(x, Tensor))
        key = shapes, arguments[0].dtype, int(each.max()), int(each.sum())
        plan = _store(self).setdefault(key, lengths.clone())
        return method(self, *arguments[:place], plan, *arguments[place + 1 :], **options)

    return call


def ignores_strides(operation: str, method: Method) -> Method:
    """The first argument is read as if its rows followed each other in memory."""

    def call(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Any:
        dense = torch.empty(x.shape, device="meta").stride()
        return method(self, x.as_strided(x.shape, dense, x.storage_offset()), *arguments, **options)

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

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        return method(self, *(_wrapped(x, 32) for x in arguments), **options)

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

        return _each(lambda x: tiled(x) if x.numel() else x, method(self, *arguments, **options))

    return call


def sums_in_another_order(operation: str, method: Method) -> Method:
    """Partial results are added as they come: every other call, the last bit of the first element differs."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        kept = _store(self)
        kept["calls"] = kept.get("calls", 0) + 1

        def moved(x: Tensor) -> Tensor:
            x = x.clone()
            bits = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
            bits.view(-1)[:1] ^= kept["calls"] % 2
            return x

        returned = method(self, *arguments, **options)
        if operation == "write_cache":
            arguments[2].copy_(moved(arguments[2].contiguous()))
            return returned
        if operation == "indexer":
            logits, indices = returned
            return logits, indices.flip(-1) if kept["calls"] % 2 and int(indices.min()) >= 0 else indices
        return _each(lambda x: moved(x) if x.numel() and x.is_contiguous() else x, returned)

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
        return _each(
            lambda y: torch.full_like(y, torch.nan if y.is_floating_point() else -1 if y.dtype != torch.uint8 else 255),
            returned,
        )

    return call


CELLS: Sequence[tuple[str, Behavior, str, str, str, Sequence[str]]] = (
    (
        "X-clobbers",
        clobbers_its_first_argument,
        "does_not_modify_its_inputs",
        "the next step sees other inputs",
        "always",
        ("quantize_cache", "dequantize_cache"),
    ),
    (
        "X-one-buffer",
        returns_one_buffer,
        "output_is_not_aliased",
        "results change when the next call is made",
        "a second call with the same shapes",
        tuple(name for name in NAMES if name not in ("write_cache", "absorb")),
    ),
    (
        "X-two-buffers",
        alternates_between_buffers,
        "output_is_not_aliased",
        "results change when the call after the next is made",
        "a third call with the same shapes",
        ("absorb", "decode", "prefill"),
    ),
    (
        "X-plan-by-shape",
        keeps_a_plan_by_shape,
        "calls_are_independent",
        "results are those of an earlier request",
        "a second call with the same shapes",
        ("rope", "quantize_cache", "dequantize_cache", "project_indexer"),
    ),
    (
        "X-plan-by-summary",
        keeps_a_plan_by_summary,
        "calls_are_independent",
        "sequences are cut off or read beyond their ends, in some batches",
        "lengths of one batch in another order",
        tuple(LENGTHS),
    ),
    (
        "X-plan-by-address",
        keeps_a_plan_by_address,
        "reads_its_tensors_anew",
        "results are those of an earlier step where buffers are used again",
        "contents overwritten by a kernel, which autograd's version counter does not see",
        NAMES,
    ),
    (
        "X-no-strides",
        ignores_strides,
        "reads_strides",
        "wrong values for weights that are slices of a fused one",
        "a first argument that is a view of a larger tensor",
        ("absorb", "rope"),
    ),
    (
        "X-offsets-of-32-bits",
        wraps_offsets_at_2_32,
        "reaches_beyond_2_31_elements",
        "rows far into a large tensor are read from its beginning",
        "offsets of 2^32 elements and more",
        tuple(name for name in NAMES if name != "write_cache"),
    ),
    (
        "X-last-tile",
        leaves_the_last_tile_unwritten,
        "writes_all_of_its_outputs",
        "garbage in the last rows",
        "a number of rows that is no multiple of 16",
        tuple(name for name in NAMES if name != "write_cache"),
    ),
    (
        "X-order-of-sums",
        sums_in_another_order,
        "gives_the_same_bits_again",
        "the same request gives other tokens on another day",
        "always",
        NAMES,
    ),
    (
        "X-one-element-beyond",
        reads_beyond_its_first_argument,
        "stays_within_memory",
        "NaN now and then, or an illegal memory access",
        "a tensor at the end of mapped memory, or before NaN",
        NAMES,
    ),
)
"""Id, behavior, hazard, symptom and trigger, and the operations in which it is planted."""


def _plant(bug_id: str, behavior: Behavior, hazard: str, symptom: str, shows_when: str, operation: str) -> None:
    method = getattr(TorchAbsorbed, operation)
    call = functools.wraps(method)(behavior(operation, method))
    words = f"{bug_id}-{operation}".replace("_", "-").split("-")
    name = "".join(word.capitalize() for word in words)
    body: Mapping[str, Any] = {operation: call, "__doc__": behavior.__doc__, "__module__": __name__}
    made = type(name, (TorchAbsorbed,), dict(body))
    made.__qualname__ = name
    globals()[name] = planted(
        f"{bug_id}-{operation}", symptom=symptom, shows_when=shows_when, killed_by=(f"test_{operation}_{hazard}",)
    )(made)


for _id, _behavior, _hazard, _symptom, _trigger, _operations in CELLS:
    for _operation in _operations:
        _plant(_id, _behavior, _hazard, _symptom, _trigger, _operation)
