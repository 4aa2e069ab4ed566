"""How many sequences and keys a call has: no subject is given more than it declares, whatever a law asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Unsupported

Extent = tuple[int, int]
"""Sequences of a call, and the most keys that a query of it sees."""

CallExtent = Callable[[Mapping[str, torch.Tensor]], Extent]
"""That of a call, from its tensors."""


def cached(tensors: Mapping[str, torch.Tensor]) -> Extent:
    """Of a call over a paged cache."""
    lengths = tensors["cache_seqlens"]
    return len(lengths), int(lengths.max()) if len(lengths) else 0


def packed(tensors: Mapping[str, torch.Tensor]) -> Extent:
    """Of a call over packed keys."""
    lengths = tensors["cu_seqlens_k"].diff()
    return len(lengths), int(lengths.max()) if len(lengths) else 0


def require_extent(supports: Supports, batch: int, keys: int) -> None:
    """Raise Unsupported where a call exceeds what the subject declares."""
    for name, most, count in (("max_batch", supports.max_batch, batch), ("max_keys", supports.max_keys, keys)):
        if most is not None and count > most:
            raise Unsupported(f"{name}={most}, and a call has {count}")


def selected(tensors: Mapping[str, torch.Tensor]) -> Extent:
    """Of a call over the keys that indices [b, s, k] select."""
    return len(tensors["indices"]), tensors["indices"].shape[-1]


def selected_of_one(tensors: Mapping[str, torch.Tensor]) -> Extent:
    """Of a call of one sequence, over the keys that indices [s, 1, k] select."""
    return 1, tensors["indices"].shape[-1]


def require_call_within(supports: Supports, extent: CallExtent | None, tensors: Mapping[str, torch.Tensor]) -> None:
    """``require_extent`` for a call. Lengths are read from the device only where there is a limit."""
    if extent is not None and (supports.max_batch is not None or supports.max_keys is not None):
        require_extent(supports, *extent(tensors))
