"""Memory as laws want it: filled where nothing was written, ending where a tensor ends, shared or not."""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla_spec.subjects.near import near

ALIGNMENT = 64
"""Bytes to which torch aligns its own tensors on a CPU, and which vectorized kernels rely on."""

_PROT_NONE = 0

_DEFAULT, _WARN = "default", "warn"
"""Torch's modes. ``torch.use_deterministic_algorithms`` sets the same, and imports torch's compiler for it: a second in each process."""


class Memory(NamedTuple):
    """Bytes of a device."""

    free: int
    total: int


def free_memory(device: torch.device) -> Memory | None:
    """What a device has left, after torch has given back what it only keeps; None on the CPU, whose memory may be sparse."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return Memory(*torch.cuda.mem_get_info(device))


def give_back_memory(device: str) -> None:
    """Give back to a device what torch keeps for later, so that other processes can have it."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def filled_memory(device: str) -> Iterator[None]:
    """On the CPU, have ``torch.empty`` and its like give NaN, or the largest integer, instead of what was there.

    Torch can do it in its deterministic mode only. On other devices that mode changes algorithms, so it stays off there.
    """
    if torch.device(device).type != "cpu":
        yield
        return
    with _deterministic(True):
        yield


def fill_memory(device: str) -> None:
    """``filled_memory`` for good, in a process of the subject's own."""
    if torch.device(device).type == "cpu":
        torch.set_deterministic_debug_mode(_WARN)


@contextmanager
def filled_memory_of_any_device() -> Iterator[None]:
    """As ``filled_memory``, on every device, in whose deterministic mode torch's own algorithms may be others."""
    with _deterministic(True):
        yield


@contextmanager
def ordinary_memory() -> Iterator[None]:
    """Torch's algorithms as users have them, inside ``filled_memory``."""
    with _deterministic(False):
        yield


@contextmanager
def _deterministic(mode: bool) -> Iterator[None]:
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(_WARN if mode else _DEFAULT)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@near
def share_memory(x: Any, y: Any) -> bool:
    """Whether the memories that two tensors are views of overlap; False where one is no tensor, or has no elements."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or not x.numel() or not y.numel():
        return False
    a, b = x.untyped_storage(), y.untyped_storage()
    return (
        x.device == y.device and a.data_ptr() < b.data_ptr() + b.nbytes() and b.data_ptr() < a.data_ptr() + a.nbytes()
    )


@near
def at_the_end(x: Tensor, *, guarded: bool) -> Tensor:
    """The same elements, in memory that ends with them, up to alignment.

    Args:
        x: a tensor; on other devices than the CPU a copy of exactly its size stands for the end of memory.
        guarded: whether to read beyond the end ends the process. Otherwise NaN lies there, or 0 in integers that are no bytes.
    """
    if x.device.type != "cpu" or not x.numel():
        return x.clone()
    if not guarded:
        beyond = float("nan") if x.is_floating_point() else 255 if x.dtype is torch.uint8 else 0
        flat = torch.full((x.numel() + mmap.PAGESIZE,), beyond, dtype=x.dtype)
        return flat[: x.numel()].view(x.shape).copy_(x)
    count = -(-x.numel() * x.element_size() // ALIGNMENT) * ALIGNMENT
    pages = -(-count // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + pages * mmap.PAGESIZE), mmap.PAGESIZE, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=pages * mmap.PAGESIZE - count)
    raw.fill_(0xFF)  # NaN in every format of numbers
    used = raw[: x.numel() * x.element_size()]
    return used.view(x.dtype).view(x.shape).copy_(x)
