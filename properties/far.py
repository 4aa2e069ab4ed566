"""Tensors so far apart in memory that offsets exceed 2^31, and 2^32, elements; pools in which numbers of pages need 17 bits."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mla_spec.judging.law import Run
from mla_spec.subjects.memory import free_memory
from mla_spec.subjects.near import near
from mla_spec.subjects.views import ROW_PADDING
from mla_spec.subjects.violation import DoesNotFit, NotOffered

FAR = 2**31 + ROW_PADDING
"""Elements from one of the leading axis to the next, so that the second lies beyond 2^31, and the third beyond 2^32."""

RESERVE = 2**31
"""Bytes of a device that are left to everything else: inputs, outputs, and what a subject allocates."""

NUMBERS = (2**15 + 40, 3, 2**16 + 40)
"""Of pages: one that is negative in 16 bits with a sign, and one that needs 17 bits."""

COPIED = 2**26
"""Elements of a pool on the CPU, where a subject may well copy all of it."""

PATIENCE = 60.0
"""Seconds to wait for memory that other processes hold: those that check one device take turns."""


@near
def far_zeros(like: Tensor, count: int, wait: bool = True) -> Tensor:
    """Zeros [count, *like.shape[1:]], ``FAR`` elements apart.

    On the CPU 2^31 elements lie before it too, so that an offset which wraps around to a negative one hits no foreign memory.

    Raises:
        DoesNotFit: the device has not that much memory, or another process holds it and does not give it back while we ``wait``.
    """
    strides = torch.empty(like.shape[1:], device="meta").stride()
    lead = 2**31 if like.device.type == "cpu" else 0
    size = lead + (count - 1) * FAR + like[0].numel()
    return _zeros(size, like, wait).as_strided((count, *like.shape[1:]), (FAR, *strides), lead)


def _zeros(size: int, like: Tensor, wait: bool) -> Tensor:
    """Zeros [size] of the dtype and on the device of ``like``; on the CPU, memory is taken only where it is written."""
    require_memory(size * like.element_size(), like.device, wait)
    if like.device.type == "cpu":
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the mapping keeps it alive
        memory = np.memmap(file, dtype=np.uint8, mode="w+", shape=(size * like.element_size(),))
        return torch.from_numpy(memory).view(like.dtype)
    return _zeros_on_device(size, like, wait)


def _zeros_on_device(size: int, like: Tensor, wait: bool) -> Tensor:
    """Zeros [size] of the dtype and on the device of ``like``, where they have just been seen to fit."""
    try:
        return torch.zeros(size, dtype=like.dtype, device=like.device)
    except torch.OutOfMemoryError:  # another process was quicker
        require_memory(size * like.element_size(), like.device, wait)
        return torch.zeros(size, dtype=like.dtype, device=like.device)


def require_memory(size: int, device: torch.device, wait: bool = True) -> None:
    """Return once ``size`` bytes and ``RESERVE`` are free on ``device``.

    Raises:
        DoesNotFit: the device is too small, or not enough is free, after ``PATIENCE`` where ``wait``.
    """
    end = time.monotonic() + PATIENCE * wait
    while (memory := free_memory(device)) is not None and size + RESERVE > memory.free:
        if size + RESERVE > memory.total or time.monotonic() >= end:
            raise DoesNotFit(
                f"needs {size / 1e9:.1f} GB of the device and {RESERVE / 1e9:.1f} GB beside it; "
                f"{memory.free / 1e9:.1f} GB of {memory.total / 1e9:.1f} GB are free"
            )
        time.sleep(0.1)


@near
def far_apart(x: Tensor, wait: bool = True) -> Tensor:
    """The same elements, ``FAR`` apart along the leading axis."""
    return far_zeros(x, len(x), wait).copy_(x)


@near
def renumbered(pool: Tensor) -> Tensor:
    """The pages of ``pool``, as many as ``NUMBERS``, with those numbers in a pool whose other pages are 0.

    Raises:
        DoesNotFit: as for ``far_zeros``.
        NotOffered: such a pool has more than ``COPIED`` elements on the CPU.
    """
    count, size = max(NUMBERS) + 1, pool[0].numel()
    if pool.device.type == "cpu" and count * size > COPIED:
        raise NotOffered(f"takes no smaller pages: {count} of {size} elements are too many for the CPU")
    large = _zeros(count * size, pool, wait=True).view(count, *pool.shape[1:])
    for number, page in zip(NUMBERS, pool, strict=True):
        large[number] = page
    return large


@contextmanager
def left_out_where_too_large(run: Run, what: str) -> Iterator[None]:
    """Where the distant tensor ``what`` does not fit, go on without it, and say so."""
    try:
        yield
    except DoesNotFit as error:
        run.leave_out(f"{what} in {run.driver.dtype} {error}")
