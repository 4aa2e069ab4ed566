"""Faults of the paged cache: tables, tails of pages, addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted


@planted(
    "F2",
    source=(
        "https://github.com/flashinfer-ai/flashinfer/pull/942",
        "https://github.com/flashinfer-ai/flashinfer/issues/941",
    ),
    symptom="NaN everywhere",
    shows_when="a page is partly filled and its tail holds NaN",
    killed_by=("test_decode_ignores_unused_cache_slots",),
)
class ReadsWholePages(TorchExplicit):
    """Keys are bounded by pages: the tail of the last page gets weight 0, and 0 · NaN is NaN."""

    def gather(self, kv_cache: Tensor, table: Tensor, length: int) -> Tensor:
        page_size = kv_cache.shape[1]
        return super().gather(kv_cache, table, -(-length // page_size) * page_size)


@planted(
    "F15",
    source=("https://github.com/ROCm/aiter/pull/2954",),
    symptom="gathered keys are corrupt",
    shows_when="rows are no multiple of 16 bytes",
    killed_by=("test_decode_agrees_with_reference",),
)
class RowsAt16Bytes(TorchExplicit):
    """The address of a row is rounded down to the 16 bytes of a vector load."""

    def gather(self, kv_cache: Tensor, table: Tensor, length: int) -> Tensor:
        page_size, width = kv_cache.shape[1], kv_cache.shape[3]
        vector = max(1, 16 // kv_cache.element_size())
        token = torch.arange(length, device=kv_cache.device)
        slot = table[token // page_size].long() * page_size + token % page_size
        start = slot * width // vector * vector
        return kv_cache.flatten()[start[:, None] + torch.arange(width, device=kv_cache.device)]


@planted(
    "F16",
    source=("https://github.com/vllm-project/vllm/pull/49427",),
    symptom="illegal access",
    shows_when="a table entry past a sequence's pages names no page",
    killed_by=("test_decode_ignores_unused_table_entries",),
)
class TableReadPastEnd(TorchAbsorbed):
    """The number of a sequence's pages does not bound what is read of its row of the table."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        page_size = kv_cache.shape[1]
        token = torch.arange(int(cache_seqlens.max()), device=kv_cache.device)
        rows = kv_cache[block_table[:, token // page_size].long(), token % page_size, 0]
        return rows.masked_fill((token >= cache_seqlens[:, None])[..., None], 0.0)


@planted(
    "F20",
    source=(
        "https://github.com/ModelTC/LightLLM/pull/743",
        "https://github.com/ModelTC/LightLLM/commit/00e4de743",
    ),
    symptom="prefill after a cached prefix is wrong",
    shows_when="several sequences, more keys than queries",
    killed_by=("test_decode_sequences_are_independent",),
)
class KeysStartWithQueries(TorchAbsorbed):
    """In the packed keys a sequence starts at its index among the queries, not after the keys of those before it."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        rows = super().gather_batch(kv_cache, block_table, cache_seqlens)
        packed = torch.cat([row[:n] for row, n in zip(rows, cache_seqlens.tolist(), strict=True)] + [rows[-1] * 0])
        taken = [packed[i : i + n] for i, n in enumerate(cache_seqlens.tolist())]
        return torch.nn.utils.rnn.pad_sequence(taken, batch_first=True)


@planted(
    "F21",
    source=(
        "https://github.com/ikawrakow/ik_llama.cpp/pull/2031",
        "https://github.com/ikawrakow/ik_llama.cpp/commit/4553cd005",
    ),
    symptom="fine for short contexts, garbage for longer ones",
    shows_when="more than c + r keys",
    killed_by=(
        "test_decode_agrees_with_reference",
        "test_decode_equal_scores_give_the_mean",
        "test_absorbed_equals_explicit",
    ),
)
class ValueRowsByValueWidth(TorchExplicit):
    """The loop over keys steps by blocks of c + r, that over values by blocks of c."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        key = torch.arange(k.shape[-2], device=k.device)
        width, width_v = k.shape[-1], v.shape[-1]
        value = (key // width * width_v + key % width).clamp(max=max(0, len(key) - 1))
        return super().attend(q, k, v[..., value, :], visible, softmax_scale)


@planted(
    "F22",
    source=("https://github.com/flashinfer-ai/flashinfer/pull/3022",),
    symptom="the second tile comes from the wrong page",
    shows_when="pages smaller than a tile, two pages of one sequence",
    killed_by=("test_decode_agrees_with_reference",),
)
class PageOfFirstTile(TorchAbsorbed):
    """The page is looked up for every other page only."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        first = torch.arange(block_table.shape[1], device=block_table.device) // 2 * 2
        return super().gather_batch(kv_cache, block_table[:, first], cache_seqlens)


@planted(
    "X3",
    symptom="right as long as the allocator hands out pages in order",
    shows_when="a sequence's pages do not follow each other in the pool",
    killed_by=(
        "test_decode_page_relabelling_changes_nothing",
        "test_decode_one_hot_by_the_latent_part",
    ),
)
class PagesTakenAsRun(TorchAbsorbed):
    """A sequence's pages are taken to follow its first one."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        run = block_table[:, :1] + torch.arange(block_table.shape[1], device=block_table.device)
        return super().gather_batch(kv_cache, run % len(kv_cache), cache_seqlens)


@planted(
    "X-keys-in-order-of-memory",
    symptom="a request that is preempted and resumed gets other logits",
    shows_when="a sequence of several full pages that do not lie in order",
    killed_by=("test_decode_page_relabelling_changes_nothing",),
)
class KeysInOrderOfMemory(TorchAbsorbed):
    """With one query, full pages are read as they lie in memory, so that the order of the sums depends on the allocator."""

    def decode(
        self, q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if q.shape[1] == 1:
            block_table = block_table.clone()
            for row, full in zip(block_table, (cache_seqlens // kv_cache.shape[1]).tolist(), strict=True):
                row[:full] = row[:full].sort().values
        return super().decode(q, kv_cache, block_table, cache_seqlens, **options)
