"""Faults of attention whose keys are spread over ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.registry import planted

DECODE = "test_decode_agrees_with_reference"
PREFILL = "test_prefill_agrees_with_reference"


class ContextParallel(TorchAbsorbed):
    """Correct: two ranks have one half of the keys each, attend to it, and their parts are merged."""

    name = "torch-context-parallel"
    ranks = 2
    profile = {dtype: replace(p, splits=2, split_format=dtype) for dtype, p in TorchAbsorbed.profile.items()}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        cuts = [k.shape[-2] * rank // self.ranks for rank in range(self.ranks + 1)]
        parts = [
            super(ContextParallel, self).attend(
                q, k[..., i:j, :], v[..., i:j, :], self.visible_on_rank(visible, i, j), softmax_scale
            )
            for i, j in pairwise(cuts)
        ]
        outs, lses = zip(*parts, strict=True)
        out, lse = self.merge_ranks(torch.stack(outs).transpose(2, 3), torch.stack(lses))
        return out.transpose(1, 2), lse

    def visible_on_rank(self, visible: Tensor, start: int, stop: int) -> Tensor:
        """The mask of the rank that has keys start .. stop - 1."""
        return visible[..., start:stop]

    def merge_ranks(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        """Parts [ranks, b, s, h, v] and their LSEs [ranks, b, h, s], joined."""
        return self.merge(outs, lses)


@planted(
    "X-rank-offset-lost",
    symptom="context-parallel ranks attend to future or missing keys",
    shows_when="keys on the second rank that not every query sees",
    killed_by=(DECODE, PREFILL),
)
class RankOffsetLost(ContextParallel):
    """Every rank takes its first key for the first of the sequence."""

    def visible_on_rank(self, visible: Tensor, start: int, stop: int) -> Tensor:
        return visible[..., : stop - start]


@planted(
    "X-rank-lses-in-base-2",
    symptom="context-parallel decode picks other tokens",
    shows_when="LSEs of the ranks differ",
    killed_by=(DECODE, PREFILL),
)
class RankLsesInBase2(ContextParallel):
    """Ranks send binary logarithms, which are merged as natural ones."""

    def merge_ranks(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().merge_ranks(outs, lses / math.log(2))
        return out, lse * math.log(2)


@planted(
    "X-ranks-averaged",
    symptom="ranks without keys halve the output",
    shows_when="the ranks' keys have different mass",
    killed_by=(DECODE, PREFILL, "test_decode_equal_scores_give_the_mean"),
)
class RanksAveraged(ContextParallel):
    """Ranks' outputs are averaged, as those of data parallelism."""

    def merge_ranks(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        _, lse = super().merge_ranks(outs, lses)
        return outs.mean(dim=0), lse


@planted(
    "X-page-of-one-sequence",
    symptom="sequences with a common prefix read zeros, all but one of them",
    shows_when="two rows of the block table name the same page",
    killed_by=("test_context_parallel_decode_is_the_whole",),
)
class PageOfOneSequence(TorchAbsorbed):
    """The table is turned round to say whose each page is, and a page can only be one sequence's."""

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        rows = super().gather_batch(kv_cache, block_table, cache_seqlens)
        page_size = kv_cache.shape[1]
        token = torch.arange(rows.shape[1], device=rows.device)
        pages = block_table[:, token // page_size].long().clamp(0, len(kv_cache) - 1)  # [b, t]
        owner = torch.full((len(kv_cache),), -1, device=rows.device)
        for sequence, length in enumerate(cache_seqlens.tolist()):
            owner[pages[sequence, :length]] = sequence
        own = owner[pages] == torch.arange(len(rows), device=rows.device)[:, None]
        return rows.masked_fill(~own[..., None], 0.0)


@planted(
    "X-equal-lengths-are-causal",
    symptom="ring attention loses the keys of other ranks",
    shows_when="as many keys as queries, and no mask",
    killed_by=("test_ring_attention_is_the_whole",),
)
class EqualLengthsAreCausal(TorchExplicit):
    """As many keys as queries are taken for self-attention, which is causal."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, seqlens, causal or s == t > 1)
