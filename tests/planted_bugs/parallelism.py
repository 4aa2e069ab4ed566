"""Faults of work that is divided: among ranks, tiles of heads, work items, and the steps of a draft."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.registry import planted


@planted(
    "D14",
    source=("https://github.com/lightseekorg/tokenspeed/pull/364",),
    symptom="several queries of context-parallel decode miss keys",
    shows_when="several causal queries, keys spread over ranks",
    killed_by=("test_decode_agrees_with_reference", "test_decode_last_key_matters"),
)
class CausalBoundOfRank(TorchAbsorbed):
    """Two ranks hold every other key, and each aligns the causal mask to the end of its own keys."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        visible = super().visible(s, t, seqlens, causal).clone()
        for rank in range(2):
            local = visible[..., rank::2].shape[-1]
            visible[..., rank::2] = super().visible(s, local, (seqlens - rank + 1) // 2, causal)
        return visible


@planted(
    "G12",
    source=(
        "https://github.com/vllm-project/vllm-ascend/pull/14236",
        "https://github.com/vllm-project/vllm-ascend/commit/035b8d4071",
    ),
    symptom="few drafted tokens are accepted",
    shows_when="at least two draft steps",
    killed_by=("test_decode_ignores_future_keys", "test_decode_agrees_with_reference"),
)
class DraftStepsShareLengths(TorchAbsorbed):
    """Every step writes its lengths into one buffer, and so all steps have those of the last."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        if not causal or s == 1:
            return super().visible(s, t, seqlens, causal)
        buffer = torch.empty_like(seqlens)
        lengths = [buffer.copy_(seqlens - s + 1 + step) for step in range(s)]
        return torch.cat([super(DraftStepsShareLengths, self).visible(1, t, n, causal) for n in lengths], dim=2)


@planted(
    "H9",
    source=(
        "https://github.com/vllm-project/tpu-inference/issues/1847",
        "https://github.com/vllm-project/tpu-inference/pull/2988",
    ),
    symptom="out of bounds with tensor parallelism",
    shows_when="a page past the first",
    killed_by=("test_decode_agrees_with_reference", "test_decode_page_relabelling_changes_nothing"),
)
class GlobalPagesInShard(TorchAbsorbed):
    """A rank holds every other page, and looks up the pages of the whole pool there; what is past the end is clamped."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        shard = kv_cache[::2]
        return super().gather_batch(shard, block_table.clamp(max=len(shard) - 1), cache_seqlens)


@planted(
    "H10",
    source=(
        "https://github.com/ModelTC/LightLLM/pull/623",
        "https://github.com/ModelTC/LightLLM/commit/d26851756",
    ),
    symptom="a small model does not run with tensor parallelism",
    shows_when="fewer than 16 heads",
    killed_by=("test_decode_agrees_with_reference",),
)
class TileNeeds16Heads(TorchAbsorbed):
    """A tile of heads is multiplied without padding, and the instruction takes no fewer than 16 rows."""

    def decode(self, q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        heads = q.shape[2]
        if heads < 16:
            raise RuntimeError(f"dot: a tile must have at least 16 rows, got {heads}")
        return super().decode(q, *args, **options)


@planted(
    "E21",
    source=("https://github.com/flashinfer-ai/flashinfer/pull/5170",),
    symptom="a row of very large batches is silently wrong",
    shows_when="more work items than the plan has room for",
    killed_by=("test_decode_agrees_with_reference", "test_decode_sequences_are_independent"),
)
class PlanOverflows(TorchAbsorbed):
    """The plan has room for 64 rows (16384 in the report), and those beyond are written over the first."""

    room = 64

    def decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().decode(*args, **options)
        rows = out.flatten(0, 2)
        stored = torch.zeros_like(rows)
        for first in range(0, len(rows), self.room):
            part = rows[first : first + self.room]
            stored[: len(part)] = part
        return stored.view_as(out), lse
