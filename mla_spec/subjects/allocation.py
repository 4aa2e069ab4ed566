"""What the operators of torch allocate: the bytes that are alive, and the most that ever were."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def holds_numbers(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype hold numbers, or bytes of a packed cache.

    Wider integers and booleans are lengths, addresses and masks.
    """
    return dtype.is_floating_point or dtype.is_complex or dtype in (torch.uint8, torch.int8)


class Allocations(TorchDispatchMode):
    """Counts the memory of all tensors of numbers that operators make while it is active, whoever keeps them.

    Memory counts once, whatever views it has, and in whole: a view of one row keeps the tensor that it was cut from. What
    existed before, such as weights and preallocated pools, does not count. Neither does what a kernel allocates for
    itself, out of sight of torch's dispatcher: counts are too small rather than too large.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # A weak reference keeps the key, the address of the storage, from being used again.
        self._storages: dict[int, tuple[Any, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # lest torch import its compiler to keep this mode out of it

    @property
    def live(self) -> int:
        """Bytes alive now."""
        dead = [key for key, (reference, _) in self._storages.items() if reference.expired()]
        for key in dead:
            del self._storages[key]
        return sum(size for _, size in self._storages.values())

    def exceeds(self, limit: int) -> bool:
        """Whether more than ``limit`` bytes are alive, garbage that waits for the collector aside."""
        if self.live <= limit:
            return False
        gc.collect()
        return self.live > limit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False):  # Makes no memory, as many operators do.
            return out
        made = [x for x in _tensors(out) if holds_numbers(x.dtype)]
        if made:
            given = {x.untyped_storage()._cdata for x in _tensors([args, *(kwargs or {}).values()])}
            for storage in (x.untyped_storage() for x in made):
                # What was counted before is counted anew: it may have been resized in place.
                if storage._cdata not in given or storage._cdata in self._storages:
                    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._storages[storage._cdata] = reference, storage.nbytes()
        return out


class PeakAllocations(Allocations):  # type: ignore[no-untyped-call]
    """Also knows the most bytes that were alive after any operator, ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0

    def __torch_dispatch__(self, *arguments: Any, **keywords: Any) -> Any:
        out = super().__torch_dispatch__(*arguments, **keywords)
        self.peak = max(self.peak, self.live)
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors with a storage in nested lists and tuples."""
    if isinstance(tree, Tensor):
        if tree.layout is torch.strided:
            yield tree
    elif isinstance(tree, (list, tuple)):
        for x in tree:
            yield from _tensors(x)
