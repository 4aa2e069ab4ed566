"""Tensors so far apart in memory that offsets exceed 2^31, and 2^32, elements."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from torch import Tensor

from mla_spec.subjects.views import ROW_PADDING

FAR = 2**31 + ROW_PADDING
"""Elements from one of the leading axis to the next, so that the second lies beyond 2^31, and the third beyond 2^32."""


def far_zeros(like: Tensor, count: int) -> Tensor:
    """Zeros [count, *like.shape[1:]], ``FAR`` elements apart; on the CPU, memory is taken only where it is written.

    There 2^31 elements lie before it too, so that an offset which wraps around to a negative one hits no foreign memory.
    """
    strides = torch.empty(like.shape[1:], device="meta").stride()
    lead = 2**31 if like.device.type == "cpu" else 0
    size = lead + (count - 1) * FAR + like[0].numel()
    if like.device.type == "cpu":
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the mapping keeps it alive
        memory = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="w+", shape=(size * like.element_size(),)))
        memory = memory.view(like.dtype)
    else:
        memory = torch.zeros(size, dtype=like.dtype, device=like.device)
    return memory.as_strided((count, *like.shape[1:]), (FAR, *strides), lead)


def far_apart(x: Tensor) -> Tensor:
    """The same elements, ``FAR`` apart along the leading axis."""
    return far_zeros(x, len(x)).copy_(x)
