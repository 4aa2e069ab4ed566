"""How many sequences and keys a call has: no subject is given more than it declares, whatever a law asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Unsupported

Extent = tuple[int, int]
"""Sequences of a call, and the most keys that a query of it sees."""


def _cached(tensors: Mapping[str, torch.Tensor]) -> Extent:
    lengths = tensors["cache_seqlens"]
    return len(lengths), int(lengths.max()) if len(lengths) else 0


def _packed(tensors: Mapping[str, torch.Tensor]) -> Extent:
    lengths = tensors["cu_seqlens_k"].diff()
    return len(lengths), int(lengths.max()) if len(lengths) else 0


EXTENT: dict[str, Callable[[Mapping[str, torch.Tensor]], Extent]] = {
    "decode": _cached,
    "ragged_decode": _cached,
    "rank_decode": _cached,
    "decode_quantized": _cached,
    "prefill": _packed,
    "indexer": _packed,
    "sparse_prefill": lambda tensors: (1, tensors["indices"].shape[-1]),
    "sparse_decode": lambda tensors: (len(tensors["indices"]), tensors["indices"].shape[-1]),
}
"""By operation, from its tensors; others have neither."""


def require_extent(supports: Supports, batch: int, keys: int) -> None:
    """Raise Unsupported where a call exceeds what the subject declares."""
    for name, most, count in (("max_batch", supports.max_batch, batch), ("max_keys", supports.max_keys, keys)):
        if most is not None and count > most:
            raise Unsupported(f"{name}={most}, and a call has {count}")


def require_call_within(supports: Supports, operation: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """``require_extent`` for the call of an operation. Lengths are read from the device only where there is a limit."""
    if operation in EXTENT and (supports.max_batch is not None or supports.max_keys is not None):
        require_extent(supports, *EXTENT[operation](tensors))
