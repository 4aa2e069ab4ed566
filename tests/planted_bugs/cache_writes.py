"""Faults of writing new tokens into the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous

STORES = "test_write_cache_stores_latent_then_rope"
ONLY_NAMED = "test_write_cache_changes_named_slots_only"
SKIPS = "test_write_cache_skips_slot_minus_one"
STRIDES = "test_write_cache_reads_strides"
FAR = "test_write_cache_reaches_beyond_2_31_elements"


def _offsets(kv_cache: Tensor, slots: Tensor) -> Tensor:
    """Where each slot begins, in elements from the first of the pool; [n]."""
    page_size = kv_cache.shape[1]
    return slots // page_size * kv_cache.stride(0) + slots % page_size * kv_cache.stride(1)


def _memory(kv_cache: Tensor) -> Tensor:
    """All elements of the pool's memory, flat."""
    return torch.empty(0, dtype=kv_cache.dtype, device=kv_cache.device).set_(kv_cache.untyped_storage())


@planted(
    "F18",
    source=("https://github.com/NVIDIA/TensorRT-LLM/pull/4943",),
    symptom="out-of-bounds access, and a wrong block",
    shows_when="the next slot is in use",
    killed_by=(ONLY_NAMED,),
)
class CopiesKeyAndValue(TorchAbsorbed):
    """Two rows are copied per token, as for keys and values, where MLA has one."""

    def store(self, rows: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        last = kv_cache.shape[0] * kv_cache.shape[1] - 1
        super().store(rows, kv_cache, (slots + 1).clamp(max=last))
        super().store(rows, kv_cache, slots)


@planted(
    "F19",
    source=("https://github.com/sgl-project/sglang/pull/38666",),
    symptom="gsm8k falls to 0.34",
    shows_when="k_pe comes as a part of the latent's row, and the next slot is in use",
    killed_by=(ONLY_NAMED,),
)
class RopeWrittenPastRow(TorchAbsorbed):
    """The rope part is written once more, past the end of the row."""

    def store(self, rows: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        flat = kv_cache.flatten()
        width, r = rows.shape[-1], min(2, rows.shape[-1])
        start = slots * width + width
        start = start[start < flat.numel()]
        flat[start[:, None] + torch.arange(r, device=slots.device)] = rows[: len(start), -r:]
        kv_cache.copy_(flat.view(kv_cache.shape))
        super().store(rows, kv_cache, slots)


@planted(
    "F23",
    source=(
        "https://github.com/vllm-project/vllm-ascend/pull/6344",
        "https://github.com/vllm-project/vllm-ascend/pull/8547",
    ),
    symptom="decode writes to wrong slots",
    shows_when="requests of a batch have different numbers of new tokens",
    killed_by=(STORES, "test_decode_reads_what_write_cache_wrote"),
)
class SlotsOfEqualRequests(TorchAbsorbed):
    """Slots are cut as if every request had two new tokens."""

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        n = len(slot_mapping) // 2 * 2
        super().write_cache(latent[:n], k_pe[:n], kv_cache, slot_mapping[:n])


@planted(
    "F8",
    source=("https://github.com/ROCm/aiter/pull/4244",),
    symptom="rows past a certain one are never written",
    shows_when="a row lies beyond 2^31 elements",
    killed_by=(FAR,),
)
class FarRowsDropped(TorchAbsorbed):
    """The hardware drops stores whose offset does not fit 31 bits."""

    def store(self, rows: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        near = _offsets(kv_cache, slots) < 2**31
        super().store(rows[near], kv_cache, slots[near])


@planted(
    "F7",
    source=("https://github.com/ROCm/aiter/pull/4774",),
    symptom="all is 0 past a certain block",
    shows_when="a page lies beyond 2^31 elements",
    killed_by=(FAR,),
)
class OffsetIn32Bits(TorchAbsorbed):
    """The offset of a row is a 32-bit number, and wraps around."""

    def store(self, rows: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        start = _offsets(kv_cache, slots).to(torch.int32).long() + kv_cache.storage_offset()
        for row, offset in zip(rows, start.tolist(), strict=True):
            _memory(kv_cache)[offset : offset + len(row)] = row


@planted(
    "G7",
    source=("https://github.com/ROCm/aiter/pull/4342",),
    symptom="tokens after a padded one are missing",
    shows_when="a token with slot -1 is not the last",
    killed_by=(STORES, SKIPS),
)
class ReturnsAtSkippedToken(TorchAbsorbed):
    """A negative slot ends the whole write."""

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        n = int((slot_mapping >= 0).long().cumprod(dim=0).sum())
        super().write_cache(latent[:n], k_pe[:n], kv_cache, slot_mapping[:n])


@planted(
    "G10",
    source=(
        "https://github.com/vllm-project/vllm-ascend/pull/3482",
        "https://github.com/vllm-project/vllm-ascend/commit/ccb6fb9ec1",
    ),
    symptom="accuracy falls where graphs are replayed",
    shows_when="fewer tokens than in the call before",
    killed_by=("test_write_cache_calls_are_independent",),
)
class StaleSlots(TorchAbsorbed):
    """Slots are copied into a buffer of fixed size, whose tail is not cleared."""

    def __init__(self) -> None:
        self.slots = torch.empty(0, dtype=torch.int64)

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        n, pool = len(slot_mapping), kv_cache.shape[0] * kv_cache.shape[1]
        tail = self.slots[n:].to(slot_mapping.device)
        stale = tail[(tail < pool) & ~torch.isin(tail, slot_mapping)]
        self.slots = torch.cat([slot_mapping, tail])
        padded = torch.cat([slot_mapping, stale])
        rows = [torch.cat([x, x[-1:].expand(len(stale), -1)]) for x in (latent, k_pe)]
        super().write_cache(*rows, kv_cache, padded)


@planted(
    "X35",
    symptom="the last slot of the pool is overwritten now and then",
    shows_when="a token is padding",
    killed_by=(ONLY_NAMED, SKIPS),
)
class MinusOneIsLastSlot(TorchAbsorbed):
    """Slot -1 counts from the end."""

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        self.store(torch.cat([latent, k_pe], dim=-1), kv_cache, slot_mapping)


@planted(
    "X36",
    symptom="pages of other layers are overwritten",
    shows_when="the pool is a view of one for several layers",
    killed_by=(STRIDES, FAR),
)
class PoolIgnoresStrides(TorchAbsorbed):
    """Pages and rows of the pool are taken to follow each other."""

    def store(self, rows: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        super().store(rows, as_if_contiguous(kv_cache), slots)


@planted(
    "X37",
    symptom="the cache holds pieces of other rows",
    shows_when="latent and k_pe are slices of one projection",
    killed_by=(STRIDES,),
)
class RowsIgnoreStrides(TorchAbsorbed):
    """Latent and k_pe are taken to be contiguous."""

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        super().write_cache(as_if_contiguous(latent), as_if_contiguous(k_pe), kv_cache, slot_mapping)


@planted(
    "X38",
    symptom="garbage as soon as another kernel reads the cache",
    shows_when="the row is read with the latent first",
    killed_by=(STORES, "test_decode_reads_what_write_cache_wrote"),
)
class RopeFirst(TorchAbsorbed):
    """Rows hold the rope part before the latent."""

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        super().write_cache(k_pe, latent, kv_cache, slot_mapping)


@planted(
    "X39",
    symptom="the caller's slots have lost their -1",
    shows_when="slot_mapping is used again, for the next layer",
    killed_by=("test_write_cache_does_not_modify_its_inputs",),
)
class SlotsClampedInPlace(TorchAbsorbed):
    """Negative slots are set to 0 in the caller's tensor once they have been left out."""

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        super().write_cache(latent, k_pe, kv_cache, slot_mapping)
        slot_mapping.clamp_(min=0)
