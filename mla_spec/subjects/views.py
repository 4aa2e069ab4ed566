"""Tensors as views of larger or transposed ones, with the same contents.

What a view leaves out is filled with ordinary numbers and valid page ids, so that code which ignores strides computes
something wrong rather than reading outside the tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mla_spec.subjects.driver import Tensors
from mla_spec.subjects.near import near

ROW_PADDING = 64
"""Elements between rows: aligned rows stay aligned, as kernels may demand of real caches."""


@near
def slice_of_wider(x: Tensor, dim: int, extra: int) -> Tensor:
    """x as the last slice of a tensor that is ``extra`` longer in ``dim``; what is before it repeats x's own elements."""
    if x.shape[dim] == 0:
        return x
    index = torch.arange(-extra, x.shape[dim], device=x.device) % x.shape[dim]
    return x.index_select(dim, index).narrow(dim, extra, x.shape[dim])


@near
def transposed(x: Tensor, first: int, second: int) -> Tensor:
    """x stored with two axes exchanged, as the output of a batched matrix product."""
    return x.transpose(first, second).contiguous().transpose(first, second)


@near
def every_other(x: Tensor) -> Tensor:
    """x as every other element, of its last axis, of a tensor that has each twice."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


@near
def behind_others(t: Tensors) -> Tensors:
    """Every tensor behind another of its shape in one memory."""
    return {name: _behind_another(x) for name, x in t.items()}


def _behind_another(x: Tensor) -> Tensor:
    """x in memory that begins with its elements in reverse, or with 0, which is valid, where they are integers."""
    lead = -(-x.numel() // ROW_PADDING) * ROW_PADDING
    memory = x.new_zeros(lead + x.numel())
    if x.is_floating_point() or x.dtype is torch.uint8:
        memory[: x.numel()] = x.flatten().flip(0)
    memory[lead:] = x.flatten()
    return memory[lead:].view(x.shape)


def viewed(view: Callable[..., Tensor], name: str, *arguments: int) -> Callable[[Tensors], Tensors]:
    """From tensor arguments, the same with the one called ``name``, where there is one, as ``view(x, *arguments)``."""
    return lambda t: t | {name: view(t[name], *arguments)} if name in t else t
