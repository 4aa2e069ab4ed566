"""``rank_decode``: decode of the keys that one rank of context parallelism holds, with the mask of the whole sequence.

Token i of a sequence is that of rank i // interleave % ranks: tokens are dealt in blocks of ``interleave``, 1 to deal them singly.
q is [b, s, h, c+r], the same on all ranks. kv_cache [pages, page_size, 1, c+r] and block_table int32 [b, max pages] are those of
this rank, ``rank`` of ``ranks``: its tokens follow each other in its pages. cache_seqlens int32 [b] counts the tokens of the
whole sequence on all ranks, the s new ones among them. Query i of s sees those of the rank's keys that are among keys
0 .. seqlen - s + i of the whole where ``causal``, all of the rank's keys otherwise.

Whatever lies beyond the rank's tokens, in pages or in table entries, may hold anything. Returned are out [b, s, h, head_dim_v]
in the dtype and the LSE [b, h, s] of the rank's keys alone, the natural logarithm, in float32 or better, or None where
``supports.lse`` is False. A row that sees no key of this rank gives what ``supports.empty_row`` declares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.attention import BoundedAttention
from mla_spec.bounds.context_parallel import rank_decode_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.operations.case import ATTENTION_REGIMES, Case
from mla_spec.operations.conventions import RANK_CONVENTIONS
from mla_spec.operations.decode import (
    ATTENTION_OUTPUTS,
    BATCH_VIEWS,
    DISTANT_PAGES,
    POOL_VIEWS,
    TABLE_VIEWS,
    attention_expected,
    probably,
)
from mla_spec.operations.latent_pages import LatentPages, PagedInputs, at_half_the_scale, without_spare_pages
from mla_spec.operations.operation import Operation, as_it_is
from mla_spec.operations.regimes import QUERIES, SCORES, Regime, values
from mla_spec.reference.context_parallel import own_tokens
from mla_spec.reference.typing import IntArray
from mla_spec.subjects.extent import cached
from mla_spec.subjects.signature import Argument
from mla_spec.subjects.supports import Supports


@dataclass(frozen=True, kw_only=True)
class RankDecodeInputs(PagedInputs):
    """Arguments of ``rank_decode``, of which q is [b, s, h, c+r] and cache_seqlens counts the tokens of all ranks."""

    ranks: int
    rank: int
    interleave: int

    @property
    def own(self) -> IntArray:
        """How many tokens of each sequence this rank holds, [b]."""
        return own_tokens(self.cache_seqlens, ranks=self.ranks, rank=self.rank, interleave=self.interleave)


REGIMES: tuple[Regime, ...] = (
    *values("regime", "typical", "outlier", "ties", "negative"),
    *SCORES,
    *QUERIES,
    ("one rank", lambda case: case.ranks == 1),
    ("tokens dealt singly", lambda case: case.ranks > 1 and case.interleave == 1),
    ("tokens dealt in blocks", lambda case: case.ranks > 1 and case.interleave > 1),
    ("no keys on this rank", lambda case: 0 in case.own),
)


@dataclass(frozen=True, kw_only=True)
class RankDecodeCase(LatentPages, Case):
    """Queries against the tokens of one rank; ``seqlens`` are those of whole sequences, other fields as in ``DecodeCase``."""

    kind = "rank_decode"
    known_regimes = ATTENTION_REGIMES
    optional = ("shared_pages",)
    seqlens: tuple[int, ...] = (1,)
    s: int = 1
    ranks: int = 1
    rank: int = 0
    interleave: int = 1
    num_heads: int = 1
    kv_lora_rank: int = 1
    qk_rope_head_dim: int = 0
    page_size: int = 1
    causal: bool = True
    logit_std: float = 1.0
    regime: str = "typical"
    shared_pages: int = 0

    @property
    def own(self) -> tuple[int, ...]:
        """How many tokens of each sequence the rank holds."""
        own = own_tokens(np.array(self.seqlens), ranks=self.ranks, rank=self.rank, interleave=self.interleave)
        return tuple(own.tolist())

    def build(self) -> RankDecodeInputs:
        """The inputs: pages in random order in a pool with spare pages, unused slots and entries harmless."""
        b = len(self.seqlens)
        made = self.paged(self.generator(), (self.s,) * b, self.own)
        return RankDecodeInputs(
            q=made.q.reshape(b, self.s, *made.q.shape[1:]),
            kv_cache=made.kv_cache,
            block_table=made.block_table,
            cache_seqlens=np.array(self.seqlens, dtype=np.int32),
            head_dim_v=self.kv_lora_rank,
            softmax_scale=made.softmax_scale,
            causal=self.causal,
            ranks=self.ranks,
            rank=self.rank,
            interleave=self.interleave,
        )


def rank_decode_expected(inputs: RankDecodeInputs, profile: Profile) -> BoundedAttention:
    """Exact attention to a rank's keys and its bound."""
    return rank_decode_with_bound(**vars(inputs), profile=profile, probable=profile.coarse).judged_by(profile)


def no_empty_rows(supports: Supports) -> str:
    """Why a subject cannot be asked: in any batch of short sequences some rank has no key."""
    return "no rule for ranks without keys" if supports.empty_row == "unsupported" else ""


def _others(case: RankDecodeCase) -> tuple[RankDecodeInputs, ...]:
    """Half the lengths; the sequences in another order; and other numbers at half the scale."""
    shorter = replace(case, seed=case.seed + 1).build()
    shorter = replace(shorter, cache_seqlens=shorter.cache_seqlens // 2)
    mirrored = replace(case, seed=case.seed + 2, seqlens=case.seqlens[::-1])
    return shorter, mirrored.build(), at_half_the_scale(replace(case, seed=case.seed + 3).build())


def _distant(case: RankDecodeCase) -> RankDecodeInputs:
    """Three sequences in the same three pages, of which the last comes first."""
    inputs = replace(case, seqlens=tuple(np.resize(case.seqlens, DISTANT_PAGES).tolist())).build()
    page_size, longest = inputs.kv_cache.shape[1], int(inputs.own.argmax())
    used = max(1, -(-int(inputs.own[longest]) // page_size))
    pages = np.resize(inputs.block_table[longest, :used], DISTANT_PAGES)
    return replace(
        inputs,
        kv_cache=inputs.kv_cache[pages],
        block_table=np.tile(np.array([2, 0, 1], dtype=np.int32), (DISTANT_PAGES, 1)),
        cache_seqlens=np.minimum(inputs.cache_seqlens, DISTANT_PAGES * page_size).astype(np.int32),
    )


def _tight(inputs: RankDecodeInputs) -> RankDecodeInputs:
    """A pool of the pages that the rank's tokens need."""
    found, _ = without_spare_pages(replace(inputs, cache_seqlens=inputs.own))
    return replace(found, cache_seqlens=inputs.cache_seqlens)


OPERATION = Operation(
    name="rank_decode",
    sizes=("num_heads", "latent_dims", "page_sizes"),
    contract=__doc__,
    case=RankDecodeCase,
    extent=cached,
    recorded=as_it_is,
    arguments=(
        Argument("q", "[b, s, h, c+r]", far=True),
        Argument("kv_cache", "[pages, page_size, 1, c+r]", far=True),
        Argument("block_table", "[b, max pages]", "int32"),
        Argument("cache_seqlens", "[b]", "int32"),
    ),
    keywords=("head_dim_v", "softmax_scale", "causal", "ranks", "rank", "interleave"),
    outputs=ATTENTION_OUTPUTS,
    expected=lambda inputs, profile, supports: attention_expected(rank_decode_expected(inputs, profile), supports),
    probable=lambda inputs, profile, supports, failure: probably(
        rank_decode_with_bound(**vars(inputs), profile=profile, probable=True, failure=failure), supports
    ),
    views=BATCH_VIEWS | TABLE_VIEWS | POOL_VIEWS,
    regimes=REGIMES,
    others=_others,
    distant=_distant,
    missing=no_empty_rows,
    tight=_tight,
    conventions=RANK_CONVENTIONS,
)
