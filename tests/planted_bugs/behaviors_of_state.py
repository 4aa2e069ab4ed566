"""Faulty behaviors of what a subject keeps between calls: plans, options, and the order in which it sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.planted_bugs.behaviors import Behavior, Method, each_tensor, kept_by

PLANNED = {
    "rope": 1,
    "absorb": 0,
    "dequantize_weight": 1,
    "prefill": 3,
    "decode": 3,
    "ragged_decode": 4,
    "rank_decode": 3,
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

LENGTHS = {"prefill": 4, "decode": 3, "ragged_decode": 3, "rank_decode": 3, "decode_quantized": 3, "indexer": 4}
"""The argument that says how long sequences are."""


def keeps_a_plan_by_address(operation: str, method: Method) -> Method:
    """What was planned for a tensor serves as long as its address and autograd's version of it stay the same."""
    place = PLANNED[operation]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        x = arguments[place]
        key = x.data_ptr(), x._version, tuple(x.shape), x.dtype
        plan, _ = kept_by(self).setdefault(key, (x.clone(), x))  # alive, so that the address is not used again
        return method(self, *arguments[:place], plan, *arguments[place + 1 :], **options)

    return call


def keeps_a_plan_by_shape(operation: str, method: Method) -> Method:
    """What was planned for the first tensor of a shape serves all that follow."""
    place = PLANNED[operation]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        key = tuple(tuple(x.shape) for x in arguments if isinstance(x, Tensor)), arguments[0].dtype, repr(options)
        plan = kept_by(self).setdefault(key, arguments[place].clone())
        return method(self, *arguments[:place], plan, *arguments[place + 1 :], **options)

    return call


def keeps_a_plan_by_summary(operation: str, method: Method) -> Method:
    """Work is divided among blocks by a plan that is kept for the batch, the longest sequence and the total."""
    place = LENGTHS[operation]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        lengths = arguments[place]
        each = lengths.diff() if operation in ("prefill", "indexer") else lengths
        shapes = tuple(tuple(x.shape) for x in arguments if isinstance(x, Tensor))
        key = shapes, arguments[0].dtype, int(each.max()), int(each.sum())
        plan = kept_by(self).setdefault(key, lengths.clone())
        return method(self, *arguments[:place], plan, *arguments[place + 1 :], **options)

    return call


def _keeps_an_option(name: str, told: str) -> Behavior:
    """Of an option of the call, the first value that a shape was seen with serves all that follow."""

    def behavior(operation: str, method: Method) -> Method:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            shapes = tuple((tuple(x.shape), x.dtype) for x in arguments if isinstance(x, Tensor))
            others = repr({other: value for other, value in options.items() if other != name})
            kept = kept_by(self).setdefault((shapes, others), options[name])
            return method(self, *arguments, **options | {name: kept})

        return call

    behavior.__doc__ = told
    return behavior


keeps_the_scale = _keeps_an_option("softmax_scale", "The key under which a compiled graph is kept lacks the scale.")
keeps_the_mask = _keeps_an_option("causal", "The key under which masks are kept lacks whether they are causal.")
keeps_the_angles = _keeps_an_option("rope", "The table of angles is kept by the shape of the positions alone.")


def sums_in_another_order(operation: str, method: Method) -> Method:
    """Partial results are added as they come: every other call, the last bit of the first element differs."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        kept = kept_by(self)
        kept["calls"] = kept.get("calls", 0) + 1

        def moved(x: Tensor) -> Tensor:
            x = x.contiguous().clone()
            bits = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
            bits.view(-1)[:1] ^= kept["calls"] % 2
            return x

        returned = method(self, *arguments, **options)
        if operation == "write_cache":
            arguments[2].copy_(moved(arguments[2]))
            return returned
        return each_tensor(
            lambda x: moved(x) if x.numel() and x.dtype not in (torch.int32, torch.int64) else x, returned
        )

    return call
