"""``ragged_decode``: attention of packed queries over a paged latent cache, prompts and decoded tokens in one call.

q is [tokens, h, c+r], the queries of all sequences on one axis. Sequence i has the tokens cu_seqlens_q[i] ..
cu_seqlens_q[i + 1] - 1 (int32 [b + 1]). kv_cache, block_table and cache_seqlens are those of ``decode``: cache_seqlens counts
all tokens of a sequence, a cached prefix and the new ones among them. A sequence may have one query or hundreds, more keys
than queries, or fewer, or none of either. Query i of the s of a sequence sees keys 0 .. t - s + i of its t where ``causal``
(bottom-right), all of them otherwise.

Whatever lies beyond a sequence's length, in pages or in table entries, may hold anything. Returned are out [tokens, h,
head_dim_v] in the dtype and the LSE [h, tokens], the natural logarithm, in float32 or better, or None where
``supports.lse`` is False. A row that sees no key gives what ``supports.empty_row`` declares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mla_spec.bounds.attention import BoundedAttention
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.ragged import ragged_decode_with_bound
from mla_spec.operations.case import ATTENTION_REGIMES, Case
from mla_spec.operations.conventions import RAGGED_CONVENTIONS
from mla_spec.operations.decode import (
    DISTANT_PAGES,
    POOL_VIEWS,
    TABLE_VIEWS,
    attention_expected,
    probably,
)
from mla_spec.operations.latent_pages import LatentPages, PagedInputs, at_half_the_scale, without_spare_pages
from mla_spec.operations.lattice import LENGTHS, PAGED_AXES, Lattice, latent_dims, lengths, takes_pages
from mla_spec.operations.operation import Operation, as_it_is
from mla_spec.operations.prefill import PACKED_LSE
from mla_spec.operations.regimes import PACKED, SCORES, Regime, values
from mla_spec.reference.typing import IntArray
from mla_spec.subjects.extent import cached
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.views import every_other, transposed, viewed


@dataclass(frozen=True, kw_only=True)
class RaggedDecodeInputs(PagedInputs):
    """Arguments of ``ragged_decode``, of which q is [tokens, h, c+r]."""

    cu_seqlens_q: IntArray  # [b + 1]

    @property
    def queries(self) -> IntArray:
        """How many each sequence has, [b]."""
        return np.diff(self.cu_seqlens_q)


REGIMES: tuple[Regime, ...] = (
    *values("regime", "typical", "outlier", "ties", "negative", "sunken"),
    *SCORES,
    *PACKED,
    ("prompts and decoded tokens", lambda case: 1 in case.seqlens_q and max(case.seqlens_q) > 1),
)


@dataclass(frozen=True, kw_only=True)
class RaggedDecodeCase(LatentPages, Case):
    """Packed queries against a paged latent cache; the other fields are those of ``DecodeCase``."""

    kind = "ragged_decode"
    known_regimes = (*ATTENTION_REGIMES, "sunken")
    optional = ("shared_pages",)
    seqlens_q: tuple[int, ...] = (1,)
    seqlens_k: tuple[int, ...] = (1,)
    num_heads: int = 1
    kv_lora_rank: int = 1
    qk_rope_head_dim: int = 0
    page_size: int = 1
    causal: bool = True
    logit_std: float = 1.0
    regime: str = "typical"
    shared_pages: int = 0

    def build(self) -> RaggedDecodeInputs:
        """The inputs: pages in random order in a pool with spare pages, unused slots and entries harmless."""
        made = self.paged(self.generator(), self.seqlens_q, self.seqlens_k)
        return RaggedDecodeInputs(
            **vars(made),
            cache_seqlens=np.array(self.seqlens_k, dtype=np.int32),
            cu_seqlens_q=np.cumsum([0, *self.seqlens_q]).astype(np.int32),
            head_dim_v=self.kv_lora_rank,
            causal=self.causal,
        )


def ragged_decode_expected(inputs: RaggedDecodeInputs, profile: Profile) -> BoundedAttention:
    """Exact attention of packed queries and its bound."""
    return ragged_decode_with_bound(**vars(inputs), profile=profile, probable=profile.coarse).judged_by(profile)


def _others(case: RaggedDecodeCase) -> tuple[RaggedDecodeInputs, ...]:
    """Half the lengths; the sequences in another order; and other numbers at half the scale."""
    shorter = replace(case, seed=case.seed + 1).build()
    lengths = shorter.cache_seqlens
    least = np.minimum(lengths, np.maximum(shorter.queries, 1))  # no row loses its last key
    shorter = replace(shorter, cache_seqlens=np.maximum(lengths // 2, least).astype(np.int32))
    mirrored = replace(case, seed=case.seed + 2, seqlens_q=case.seqlens_q[::-1], seqlens_k=case.seqlens_k[::-1])
    return shorter, mirrored.build(), at_half_the_scale(replace(case, seed=case.seed + 3).build())


def _distant(case: RaggedDecodeCase) -> RaggedDecodeInputs:
    """A decoded token and a prompt of two, in the same three pages, of which the last comes first."""
    keys = tuple(max(2, int(n)) for n in np.resize(case.seqlens_k, 2))
    inputs = replace(case, seqlens_q=(1, 2), seqlens_k=keys).build()
    page_size = inputs.kv_cache.shape[1]
    used = -(-max(keys) // page_size)
    pages = np.resize(inputs.block_table[int(np.argmax(keys)), :used], DISTANT_PAGES)
    return replace(
        inputs,
        kv_cache=inputs.kv_cache[pages],
        block_table=np.tile(np.array([2, 0, 1], dtype=np.int32), (2, 1)),
        cache_seqlens=np.minimum(inputs.cache_seqlens, DISTANT_PAGES * page_size),
    )


LATTICE = Lattice(
    law="test_ragged_decode_agrees_with_reference",
    kind="length",
    classes=tuple(LENGTHS),
    axes=PAGED_AXES,
    fields=lambda supports, name, sizes: {
        "seqlens_q": (sizes["queries"],) * len(lengths(name, sizes)),
        "seqlens_k": lengths(name, sizes),
        "num_heads": sizes["heads"],
        "page_size": sizes["page"],
        "causal": True in supports.causal,
        **latent_dims(supports),
    },
    declared=lambda supports, _, sizes: takes_pages(supports, sizes),
)

OPERATION = Operation(
    name="ragged_decode",
    sizes=("num_heads", "latent_dims", "page_sizes"),
    contract=__doc__,
    case=RaggedDecodeCase,
    extent=cached,
    recorded=as_it_is,
    arguments=(
        Argument("q", "[tokens, h, c+r]", far=True),
        Argument("kv_cache", "[pages, page_size, 1, c+r]", far=True),
        Argument("block_table", "[b, max pages]", "int32"),
        Argument("cache_seqlens", "[b]", "int32"),
        Argument("cu_seqlens_q", "[b+1]", "int32"),
    ),
    keywords=("head_dim_v", "softmax_scale", "causal"),
    outputs=(
        Output("out", "[tokens, h, head_dim_v]", lambda inputs: (*inputs.q.shape[:2], inputs.head_dim_v)),
        PACKED_LSE,
    ),
    expected=lambda inputs, profile, supports: attention_expected(ragged_decode_expected(inputs, profile), supports),
    probable=lambda inputs, profile, supports, failure: probably(
        ragged_decode_with_bound(
            **vars(inputs), profile=profile, probable=True, failure=failure / max(1, len(inputs.cache_seqlens))
        ),
        supports,
    ),
    views=TABLE_VIEWS
    | POOL_VIEWS
    | {
        "q stored with heads before tokens": viewed(transposed, "q", 0, 1),
        "cu_seqlens_q as every other element": viewed(every_other, "cu_seqlens_q"),
    },
    regimes=REGIMES,
    others=_others,
    distant=_distant,
    tight=lambda inputs: without_spare_pages(inputs)[0],
    conventions=RAGGED_CONVENTIONS,
    lattice=LATTICE,
)
