"""Faults of addresses: offsets in 32 bits, numbers of pages in 16, views that do not begin where their memory does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted


def _is_far(x: Tensor) -> Tensor:
    """Which of the leading axis begin beyond 2^31 elements, [len(x)]."""
    return torch.arange(len(x), device=x.device) * x.stride(0) >= 2**31


def _from_start_of_memory(x: Tensor) -> Tensor:
    """As many elements with the same strides, from the first of the memory on."""
    return x.as_strided(x.shape, x.stride(), 0)


@planted(
    "X-far-pages-read-as-zeros",
    symptom="requests whose pages are at the end of a large pool write nonsense",
    shows_when="a page lies beyond 2^31 elements",
    killed_by=("test_decode_reaches_beyond_2_31_elements",),
)
class FarPagesReadAsZeros(TorchAbsorbed):
    """The hardware returns 0 for loads whose offset does not fit 31 bits."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        rows = super().gather_batch(kv_cache, block_table, cache_seqlens)
        token = torch.arange(rows.shape[1], device=rows.device)
        used = token < cache_seqlens[:, None]  # [b, t]
        pages = block_table[:, token // kv_cache.shape[1]].long().masked_fill(~used, 0)
        return rows.masked_fill(_is_far(kv_cache)[pages][..., None], 0.0)


@planted(
    "X-far-keys-read-as-zeros",
    symptom="very long packed prompts are misread from some token on",
    shows_when="a key lies beyond 2^31 elements",
    killed_by=("test_prefill_reaches_beyond_2_31_elements",),
)
class FarKeysReadAsZeros(TorchAbsorbed):
    """The offset of a token's key, token · heads · width, is a 32-bit number."""

    def prefill(self, q: Tensor, k: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().prefill(q, k.masked_fill(_is_far(k)[:, None, None], 0.0), *args, **options)


@planted(
    "X-far-slots-read-as-zeros",
    symptom="sparse attention forgets what is in the last pages of a large pool",
    shows_when="a slot lies beyond 2^31 elements",
    killed_by=("test_sparse_decode_reaches_beyond_2_31_elements",),
)
class FarSlotsReadAsZeros(TorchExplicit):
    """The offset of a slot, index · width, is a 32-bit number."""

    def gather_rows(self, pool: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
        page = indices.long().masked_fill(~selected, 0) // pool.shape[1]
        return super().gather_rows(pool, indices, selected).masked_fill(_is_far(pool)[page][..., None], 0.0)


@planted(
    "X-far-bytes-read-as-zeros",
    symptom="a quantised cache holds less than it has room for",
    shows_when="a page lies beyond 2^31 bytes",
    killed_by=(
        "test_dequantize_cache_reaches_beyond_2_31_elements",
        "test_decode_quantized_reaches_beyond_2_31_elements",
    ),
)
class FarBytesReadAsZeros(TorchAbsorbed):
    """The offset of a page in bytes is a 32-bit number."""

    def dequantize_cache(self, pages: Tensor, **options: Any) -> Tensor:
        return super().dequantize_cache(pages.masked_fill(_is_far(pages)[:, None], 0), **options)

    def named_pages(self, pages: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
        return super().named_pages(pages.masked_fill(_is_far(pages)[:, None], 0), block_table)


@planted(
    "X-pool-read-from-start-of-memory",
    symptom="every layer but the first reads the first one's cache",
    shows_when="kv_cache is a view that does not begin where its memory does",
    killed_by=("test_decode_reads_strides",),
)
class PoolFromStartOfMemory(TorchAbsorbed):
    """The address of the pool is passed on without the view's offset."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        return super().gather_batch(_from_start_of_memory(kv_cache), block_table, cache_seqlens)


@planted(
    "X-pages-read-from-start-of-memory",
    symptom="every layer but the first reads the first one's cache",
    shows_when="pages are a view that does not begin where its memory does",
    killed_by=("test_dequantize_cache_reads_strides", "test_decode_quantized_reads_strides"),
)
class PagesFromStartOfMemory(TorchAbsorbed):
    """The address of the pages is passed on without the view's offset."""

    def dequantize_cache(self, pages: Tensor, **options: Any) -> Tensor:
        return super().dequantize_cache(_from_start_of_memory(pages), **options)

    def named_pages(self, pages: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
        return super().named_pages(_from_start_of_memory(pages), block_table)


@planted(
    "X-parts-read-from-start-of-memory",
    symptom="a merge of some of the parts in a buffer takes the first ones",
    shows_when="outs are a view that does not begin where its memory does",
    killed_by=("test_merge_reads_strides",),
)
class PartsFromStartOfMemory(TorchAbsorbed):
    """The address of the outputs is passed on without the view's offset."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return super().merge(_from_start_of_memory(outs), lses)


@planted(
    "X-page-ids-of-16-bits",
    symptom="answers mix with those of other users on a machine with much memory",
    shows_when="a page beyond 65535",
    killed_by=("test_decode_at_production_counts",),
)
class PageIdsOf16Bits(TorchAbsorbed):
    """Entries of the table are kept in 16 bits without sign."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        return super().gather_batch(kv_cache, block_table & 0xFFFF, cache_seqlens)


@planted(
    "X-page-ids-of-16-bits-with-a-sign",
    symptom="answers mix with those of other users once half of a pool is in use",
    shows_when="a page beyond 32767, of any size",
    killed_by=(
        "test_decode_reads_pages_of_any_number",
        "test_rank_decode_reads_pages_of_any_number",
        "test_decode_quantized_reads_pages_of_any_number",
    ),
)
class PageIdsOf16BitsWithASign(TorchAbsorbed):
    """Entries of the table are kept in 16 bits; negative ones are taken for those of no page, and name page 0."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        return super().gather_batch(kv_cache, block_table.short().int().clamp(min=0), cache_seqlens)

    def named_pages(self, pages: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
        return super().named_pages(pages, block_table.short().int().clamp(min=0))


@planted(
    "X-chunked-page-ids-of-16-bits",
    symptom="chunked prefill answers out of other users' prompts on a machine with much memory",
    shows_when="a page beyond 65535 in a batch of prompts and decoded tokens",
    killed_by=("test_ragged_decode_reads_pages_of_any_number",),
)
class ChunkedPageIdsOf16Bits(TorchAbsorbed):
    """The kernel of mixed batches keeps entries of the table in 16 bits without sign."""

    def ragged_decode(
        self, q: Tensor, kv_cache: Tensor, block_table: Tensor, *tensors: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        return super().ragged_decode(q, kv_cache, block_table & 0xFFFF, *tensors, **options)
