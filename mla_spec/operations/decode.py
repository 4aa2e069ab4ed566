"""``decode``: attention of a few queries per sequence over a paged latent cache.

q is [b, s, h, c+r]. kv_cache is [pages, page_size, 1, c+r], rows [latent | k_pe]; the values are their first
``head_dim_v`` elements. block_table int32 [b, max pages] names the pages of each sequence. cache_seqlens int32 [b] counts
its tokens, the s new ones among them. Query i of s sees keys 0 .. seqlen - s + i where ``causal``, all keys otherwise.

``window``, an integer that only causal calls have, leaves each query the last so many of the keys that it would see.
attn_sink [h], float32 or float64 where the tensors are, is a logit per head that joins the softmax's sum and has no value: out
is multiplied by 1/(1 + exp(attn_sink - lse)). -inf changes nothing, and +inf gives out exactly 0. Neither is passed to a
subject unless ``supports.sliding_window`` and ``supports.dense_sink`` name "decode".

Whatever lies beyond a sequence's length, in pages or in table entries, may hold anything. Returned are out [b, s, h,
head_dim_v] in the dtype and the LSE [b, h, s], the natural logarithm, in float32 or better, without the sink, or None where
``supports.lse`` is False. A row that sees no key gives what ``supports.empty_row`` declares. The memory in use grows no
faster than the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.merge import BoundedMerge
from mla_spec.bounds.operand_rounding import InheritedError
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY
from mla_spec.operations.case import ATTENTION_REGIMES, Case
from mla_spec.operations.conventions import DECODE_CONVENTIONS
from mla_spec.operations.latent_pages import LatentPages, PagedInputs, at_half_the_scale, without_spare_pages
from mla_spec.operations.lattice import LENGTHS, PAGED_AXES, Lattice, latent_dims, lengths, takes_pages
from mla_spec.operations.operation import Answers, Operation, View, Within, as_it_is
from mla_spec.operations.regimes import QUERIES, SCORES, values
from mla_spec.operations.sinks import drawn_sink
from mla_spec.operations.workload_line import WorkloadLine, elements_of_decode, flag, integer, length_list, shared
from mla_spec.reference.cache import gather_rows, paged_decode
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.formats import round_to
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.extent import cached
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import ROW_PADDING, every_other, slice_of_wider, transposed, viewed

OPTIONS = ("attn_sink", "window")


@dataclass(frozen=True)
class DecodeInputs(PagedInputs):
    """Arguments of ``decode``, of which q is [b, s, h, c+r]."""

    attn_sink: Array | None = None  # [h], numbers of float32 or infinite
    window: int | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """The arguments without the options."""
        return {name: value for name, value in vars(self).items() if name not in OPTIONS}


@dataclass(frozen=True, kw_only=True)
class DecodeCase(LatentPages, Case):
    """Queries against a paged latent cache.

    ``logit_std`` is the standard deviation of the logits, reached through softmax_scale. ``regime``: "typical"; "outlier"
    has latent channels 30 times the rest; "ties" repeats keys; "offset" has values far from 0; "sink" gives the first key
    much of the weight; in "cancelling" scores are small sums of large products; in "negative" softmax_scale is; in "sunken" all
    scores are negative. Latents
    have a mean, as real ones do, so outputs do not average out to 0. ``qk_nope_head_dim`` and ``v_head_dim`` are those of the
    explicit form. Where ``shared_pages`` is not 0, so many pages are those of all sequences, each of which has them in an
    order of its own, again and again where they are too few. ``sink`` is "none", "finite", or "infinite" with both infinities
    among the heads. A ``window`` of 0 is none.
    """

    kind = "decode"
    known_regimes = (*ATTENTION_REGIMES, "offset", "sink", "cancelling", "sunken")
    optional = ("shared_pages", "sink", "window")
    seqlens: tuple[int, ...] = (1,)
    s: int = 1
    num_heads: int = 1
    kv_lora_rank: int = 1
    qk_rope_head_dim: int = 0
    page_size: int = 1
    causal: bool = True
    logit_std: float = 1.0
    regime: str = "typical"
    qk_nope_head_dim: int = 2
    v_head_dim: int = 3
    shared_pages: int = 0
    sink: str = "none"
    window: int = 0

    @property
    def pages_needed(self) -> list[int]:
        return self.pages_of(self.seqlens)

    def build(self) -> DecodeInputs:
        """The inputs: pages in random order in a pool with spare pages, unused slots and entries harmless."""
        b = len(self.seqlens)
        made = self.paged(self.generator(), (self.s,) * b, self.seqlens)
        inputs = DecodeInputs(
            q=made.q.reshape(b, self.s, *made.q.shape[1:]),
            kv_cache=made.kv_cache,
            block_table=made.block_table,
            cache_seqlens=np.array(self.seqlens, dtype=np.int32),
            head_dim_v=self.kv_lora_rank,
            softmax_scale=made.softmax_scale,
            causal=self.causal,
            window=self.window or None,
        )
        if self.sink == "none":
            return inputs
        _, lse = paged_decode(**vars(inputs))
        return replace(inputs, attn_sink=drawn_sink(np.random.default_rng([self.seed, 2]), self.sink, lse))

    def latent_weights(self) -> tuple[Array, MLAConfig, Array]:
        """(kv_b_proj, config, q_nope [b, s, h, n]) of the explicit form behind the case, rounded to the dtype."""
        config = MLAConfig(
            hidden_size=1,
            num_heads=self.num_heads,
            q_lora_rank=None,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        rng = np.random.default_rng([self.seed, 1])
        kv_b_proj = rng.standard_normal(weight_shapes(config)["kv_b_proj"]) / np.sqrt(self.kv_lora_rank)
        q_nope = rng.standard_normal((len(self.seqlens), self.s, self.num_heads, self.qk_nope_head_dim))
        return round_to(kv_b_proj, self.dtype), config, round_to(q_nope, self.dtype)


def decode_expected(
    inputs: DecodeInputs,
    profile: Profile,
    inherited_q: Array | None = None,
    probable: bool = False,
    failure: float = FAILURE_PROBABILITY,
) -> BoundedAttention:
    """Exact decode and its bound; ``inherited_q`` is how far q may be from an exact one."""
    rows = gather_rows(inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)[:, :, None]  # [b, t, 1, c+r]
    values = rows[..., : inputs.head_dim_v]
    inherited = None
    if inherited_q is not None:
        inherited = InheritedError(inherited_q, 0 * rows, 0 * values)
    return attention_with_bound(
        inputs.q,
        rows,
        values,
        softmax_scale=inputs.softmax_scale,
        profile=profile,
        cache_seqlens=inputs.cache_seqlens,
        causal=inputs.causal,
        window=inputs.window,
        inherited=inherited,
        attn_sink=inputs.attn_sink,
        sink_joins=True,
        probable=probable or profile.coarse,
        failure=failure,
    ).judged_by(profile)


def declared_lse(lse: Array, supports: Supports) -> Array:
    """The exact LSE with the value that the subject declares for rows without keys."""
    return np.where(np.isneginf(lse), np.inf, lse) if supports.empty_row == "zero/+inf" else lse


def attention_expected(want: BoundedAttention | BoundedMerge, supports: Supports) -> Answers:
    """out and LSE of an attention."""
    return Within(want.out, want.out_error, gate=True), Within(declared_lse(want.lse, supports), want.lse_error)


def probably(want: BoundedAttention, supports: Supports) -> Answers:
    """out and LSE of an attention, by the probable bound."""
    return attention_expected(
        replace(want, out_error=want.out_error_probable, lse_error=want.lse_error_probable), supports
    )


def shortened(inputs: DecodeInputs) -> DecodeInputs:
    """Sequences of half the length, but of no fewer tokens than there are queries."""
    lengths, s = inputs.cache_seqlens, inputs.q.shape[1]
    return replace(inputs, cache_seqlens=np.maximum(lengths // 2, np.minimum(lengths, s)).astype(np.int32))


def _others(case: DecodeCase) -> tuple[DecodeInputs, ...]:
    """Half the lengths; the lengths of the same sequences in another order; and the same lengths at half the scale."""
    shorter = shortened(replace(case, seed=case.seed + 1).build())
    mirrored = replace(case, seed=case.seed + 2, seqlens=case.seqlens[::-1]).build()
    return shorter, mirrored, flatter(replace(case, seed=case.seed + 3).build())


def flatter(inputs: DecodeInputs) -> DecodeInputs:
    """At half the scale, and with half of each sink, since LSEs are about half as large then."""
    half = at_half_the_scale(inputs)
    return half if half.attn_sink is None else replace(half, attn_sink=half.attn_sink / 2)


DISTANT_PAGES = 3


def in_three_pages(inputs: DecodeInputs) -> tuple[DecodeInputs, IntArray]:
    """Sequences that share three pages, of which the last comes first, and which pages of the pool they were."""
    page_size, (b, s) = inputs.kv_cache.shape[1], inputs.q.shape[:2]
    longest = int(inputs.cache_seqlens.argmax())
    used = max(1, -(-int(inputs.cache_seqlens[longest]) // page_size))
    pages = np.resize(inputs.block_table[longest, :used], DISTANT_PAGES)
    table = np.tile(np.array([2, 0, 1], dtype=np.int32), (b, 1))
    lengths = np.minimum(inputs.cache_seqlens, DISTANT_PAGES * page_size)
    kept = min(s, DISTANT_PAGES)  # no more queries than there are keys for each, where there were
    moved = replace(
        inputs, q=inputs.q[:, :kept], kv_cache=inputs.kv_cache[pages], block_table=table, cache_seqlens=lengths
    )
    return moved, pages


def _distant(case: DecodeCase) -> DecodeInputs:
    """Three sequences in three pages."""
    inputs, _ = in_three_pages(replace(case, seqlens=tuple(np.resize(case.seqlens, DISTANT_PAGES).tolist())).build())
    return inputs


ATTENTION_OUTPUTS = (
    Output("out", "[b, s, h, head_dim_v]", lambda inputs: (*inputs.q.shape[:3], inputs.head_dim_v)),
    Output(
        "lse",
        "[b, h, s] or None",
        lambda inputs: (inputs.q.shape[0], inputs.q.shape[2], inputs.q.shape[1]),
        "float32 or better",
        offered=lambda supports: supports.lse,
    ),
)
"""What ``decode`` returns, from whatever cache."""

BATCH_VIEWS: dict[str, View] = {"q with head and batch axes exchanged in memory": viewed(transposed, "q", 0, 2)}

TABLE_VIEWS: dict[str, View] = {
    "q as a slice of a wider row": viewed(slice_of_wider, "q", -1, ROW_PADDING),
    "block_table narrowed from a wider one": viewed(slice_of_wider, "block_table", 1, 3),
    "cache_seqlens as every other element": viewed(every_other, "cache_seqlens"),
}

POOL_VIEWS: dict[str, View] = {
    "kv_cache with rows longer than c + r": viewed(slice_of_wider, "kv_cache", -1, ROW_PADDING),
    "kv_cache with pages further apart than a page": viewed(slice_of_wider, "kv_cache", 1, 3),
}

LATTICE = Lattice(
    law="test_decode_agrees_with_reference",
    kind="length",
    classes=tuple(LENGTHS),
    axes=PAGED_AXES,
    fields=lambda supports, name, sizes: {
        "seqlens": lengths(name, sizes),
        "s": sizes["queries"],
        "num_heads": sizes["heads"],
        "page_size": sizes["page"],
        "causal": True in supports.causal,
        **latent_dims(supports),
    },
    declared=lambda supports, _, sizes: takes_pages(supports, sizes),
)
SINK_VIEWS: dict[str, View] = {"attn_sink as every other element": viewed(every_other, "attn_sink")}


def _of_line(**values: Any) -> DecodeCase:
    width = values["kv_lora_rank"] + values["qk_rope_head_dim"]
    return DecodeCase(dtype="float32", shared_pages=shared(values["seqlens"], values["page_size"], width), **values)


WORKLOAD = WorkloadLine(
    fields={
        "seqlens": length_list(),
        "s": integer(1, 1),
        "num_heads": integer(1),
        "kv_lora_rank": integer(1, 512),
        "qk_rope_head_dim": integer(0, 64),
        "page_size": integer(1, 64),
        "causal": flag(True),
    },
    case=_of_line,
    elements=lambda case: elements_of_decode(
        case.seqlens, case.s * case.num_heads, case.kv_lora_rank + case.qk_rope_head_dim
    ),
)

OPERATION = Operation(
    name="decode",
    sizes=("num_heads", "latent_dims", "page_sizes"),
    contract=__doc__,
    case=DecodeCase,
    extent=cached,
    recorded=as_it_is,
    arguments=(
        Argument("q", "[b, s, h, c+r]", far=True),
        Argument("kv_cache", "[pages, page_size, 1, c+r]", far=True),
        Argument("block_table", "[b, max pages]", "int32"),
        Argument("cache_seqlens", "[b]", "int32"),
        Argument("attn_sink", "[h]", "wide", optional=True),
    ),
    keywords=("head_dim_v", "softmax_scale", "causal"),
    options=("window",),
    outputs=ATTENTION_OUTPUTS,
    expected=lambda inputs, profile, supports: attention_expected(decode_expected(inputs, profile), supports),
    probable=lambda inputs, profile, supports, failure: probably(
        decode_expected(inputs, profile, probable=True, failure=failure), supports
    ),
    views=BATCH_VIEWS | TABLE_VIEWS | POOL_VIEWS | SINK_VIEWS,
    regimes=(
        *values("regime", "typical", "outlier", "ties", "offset", "sink", "cancelling", "negative", "sunken"),
        *SCORES,
        *QUERIES,
        ("no keys", lambda case: 0 in case.seqlens),
        ("ragged lengths", lambda case: len(set(case.seqlens)) > 1),
    ),
    others=_others,
    distant=_distant,
    tight=lambda inputs: without_spare_pages(inputs)[0],
    conventions=DECODE_CONVENTIONS,
    lattice=LATTICE,
    workload=WORKLOAD,
)
