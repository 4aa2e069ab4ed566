"""Arguments of ``decode`` as non-contiguous views with the same contents.

What a view leaves out is filled with ordinary numbers and valid page ids, so that code which ignores strides computes
something wrong rather than reading outside the tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

ROW_PADDING = 64
"""Elements between rows: aligned rows stay aligned, as kernels may demand of real caches."""


def _slice_of_wider(x: Tensor, dim: int, extra: int) -> Tensor:
    """X as the leading slice of a tensor that is ``extra`` longer in ``dim``; the rest repeats x's own elements."""
    if x.shape[dim] == 0:
        return x
    index = torch.arange(x.shape[dim] + extra, device=x.device) % x.shape[dim]
    return x.index_select(dim, index).narrow(dim, 0, x.shape[dim])


def _transposed(x: Tensor, first: int, second: int) -> Tensor:
    """X stored with two axes exchanged, as the output of a batched matrix product."""
    return x.transpose(first, second).contiguous().transpose(first, second)


VIEWS: dict[str, Callable[[Tensors], Tensors]] = {
    "q as a slice of a wider row": lambda t: t | {"q": _slice_of_wider(t["q"], -1, ROW_PADDING)},
    "q with head and batch axes exchanged in memory": lambda t: t | {"q": _transposed(t["q"], 0, 2)},
    "kv_cache with rows longer than c + r": lambda t: t | {"kv_cache": _slice_of_wider(t["kv_cache"], -1, ROW_PADDING)},
    "kv_cache with pages further apart than a page": lambda t: t | {"kv_cache": _slice_of_wider(t["kv_cache"], 1, 3)},
    "block_table narrowed from a wider one": lambda t: t | {"block_table": _slice_of_wider(t["block_table"], 1, 3)},
    "cache_seqlens as every other element": lambda t: (
        t | {"cache_seqlens": t["cache_seqlens"].repeat_interleave(2)[::2]}
    ),
}
"""Ways to pass the same arguments, by name."""
