"""``decode_quantized``: attention of a few queries per sequence over a latent cache in a narrow format.

The pages are those that ``quantize_cache`` writes: ``format`` is a name of ``mla_spec.reference.cache_layout.LAYOUTS``, whose layout
says where the bytes of pages [pages, bytes per page] (uint8) lie; pages may lie further apart than their bytes. ``tensor_scale`` is
the float32 scale of all codes of a format that stores none, and 1 for the others.

decode_quantized is ``decode`` of the dequantised rows, of which the first ``head_dim_v`` elements are the values. A reader that
rounds code times scale to a format narrower than its softmax's arithmetic declares that as ``Profile.cache_dequantised``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mla_spec.bounds.attention import BoundedAttention
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.weight_rounding import FAILURE_PROBABILITY
from mla_spec.operations.case import ATTENTION_REGIMES
from mla_spec.operations.decode import (
    ATTENTION_OUTPUTS,
    BATCH_VIEWS,
    TABLE_VIEWS,
    DecodeCase,
    DecodeInputs,
    attention_expected,
    decode_expected,
    in_three_pages,
    probably,
    shortened,
)
from mla_spec.operations.latent_pages import at_half_the_scale, without_spare_pages
from mla_spec.operations.lattice import PAGED_AXES, Lattice, lengths, takes_pages
from mla_spec.operations.operation import Operation
from mla_spec.operations.quantised_cache import HEAD_DIM_V, PAGES_VIEWS, ROPE_DIM, InFormat, QuantisedCase, groups_of
from mla_spec.operations.regimes import QUERIES, SCORES, values
from mla_spec.operations.workload_line import (
    WorkloadLine,
    elements_of_decode,
    flag,
    integer,
    length_list,
    one_of,
    shared,
)
from mla_spec.reference.cache_layout import Bytes, layout_of, pack
from mla_spec.reference.quantised_cache import dequantised_cache, quantise
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.extent import cached
from mla_spec.subjects.signature import Argument
from mla_spec.subjects.supports import Supports


@dataclass(frozen=True, kw_only=True)
class QuantisedDecodeInputs(InFormat):
    """Arguments of ``decode_quantized``; ``exact`` has those of ``decode`` of the dequantised cache."""

    pages: Bytes  # [pages, bytes per page]
    exact: DecodeInputs

    @property
    def q(self) -> Array:
        return self.exact.q

    @property
    def block_table(self) -> IntArray:
        return self.exact.block_table

    @property
    def cache_seqlens(self) -> IntArray:
        return self.exact.cache_seqlens

    @property
    def head_dim_v(self) -> int:
        return self.exact.head_dim_v

    @property
    def softmax_scale(self) -> float:
        return self.exact.softmax_scale

    @property
    def causal(self) -> bool:
        return self.exact.causal


@dataclass(frozen=True, kw_only=True)
class QuantisedDecodeCase(QuantisedCase):
    """Queries against pages of quantised rows, at the full width of the layout.

    Fields and regimes are those of ``DecodeCase``, and two regimes more: "zeros" has groups of 0, "rope" a k_pe 64 times
    the latent. Every group has another scale. ``power_of_two``: scales of float32 are powers of two, so that dequantised
    rows are exact in 16-bit formats.
    """

    kind = "quantised-decode"
    known_regimes = (*ATTENTION_REGIMES, "offset", "sink", "rope", "zeros")
    optional = ("shared_pages",)
    seqlens: tuple[int, ...] = (1,)
    s: int = 1
    num_heads: int = 1
    causal: bool = True
    logit_std: float = 1.0
    regime: str = "typical"
    power_of_two: bool = False
    shared_pages: int = 0

    def build(self) -> QuantisedDecodeInputs:
        """The inputs: pages in random order in a pool with spare pages; unused bytes are 0."""
        rng, layout, latent = self.generator(), self.layout, self.layout.width - ROPE_DIM
        unquantised = DecodeCase(
            dtype=self.dtype,
            seed=self.seed,
            seqlens=self.seqlens,
            s=self.s,
            num_heads=self.num_heads,
            kv_lora_rank=latent,
            qk_rope_head_dim=ROPE_DIM,
            page_size=self.page_size,
            causal=self.causal,
            logit_std=self.logit_std,
            regime=self.regime if self.regime not in ("zeros", "rope") else "typical",
            shared_pages=self.shared_pages,
        ).build()
        factors = rng.uniform(0.5, 2, (layout.groups, 1))
        sequences = []
        every = np.arange(len(unquantised.kv_cache))[None], (unquantised.kv_cache[..., 0, 0].size,)  # of shared pages
        runs = every if self.shared_pages else (unquantised.block_table, self.seqlens)
        for table, length in zip(*runs, strict=True):
            used = table[: -(-length // self.page_size)]
            rows = unquantised.kv_cache[used].reshape(-1, layout.width)[:length]
            if self.regime == "rope":
                rows[:, latent:] *= 64
            groups = groups_of(rows, layout)
            groups *= factors
            if self.regime == "zeros":
                groups *= rng.random((*groups.shape[:2], 1)) < 0.7
            sequences.append((used, rows))
        amax = max((float(np.abs(rows).max(initial=0)) for _, rows in sequences), default=0.0)
        scale = self.tensor_scale(rng, amax)
        pages = np.zeros((len(unquantised.kv_cache), layout.bytes_per_page(self.page_size)), dtype=np.uint8)
        kv_cache = np.zeros_like(unquantised.kv_cache)
        for used, rows in sequences:
            stored = quantise(rows, layout, power_of_two=self.power_of_two, tensor_scale=scale)
            pages[used] = pack(stored, layout, self.page_size)
            kv_cache[used] = dequantised_cache(pages[used], layout, self.page_size, tensor_scale=scale)
        softmax_scale = unquantised.softmax_scale / (64 if self.regime == "rope" else 1)
        exact = replace(unquantised, kv_cache=kv_cache, head_dim_v=HEAD_DIM_V[self.format], softmax_scale=softmax_scale)
        return QuantisedDecodeInputs(pages=pages, exact=exact, **self.told(scale))


def latent_formats(supports: Supports) -> list[str]:
    """The formats of latent caches that the subject supports, without those of an indexer."""
    return [name for name in supports.cache_formats if name in HEAD_DIM_V]


def no_latent_format(supports: Supports) -> str:
    """Why no case of quantised latent caches can be made, or ""."""
    return "" if latent_formats(supports) else "supports no format of a latent cache"


def quantised_decode_expected(
    inputs: QuantisedDecodeInputs, profile: Profile, probable: bool = False, failure: float = FAILURE_PROBABILITY
) -> BoundedAttention:
    """Exact decode of the dequantised rows; unless declared otherwise they are rounded to the softmax's arithmetic."""
    rounded = profile.cache_dequantised or profile.softmax
    exact_rows = replace(profile, cache_dequantised=rounded)
    return decode_expected(inputs.exact, exact_rows, probable=probable, failure=failure)


def _recorded(inputs: Any) -> QuantisedDecodeInputs:
    """The arguments of a recorded call, and what its pages hold."""
    told = {"format": inputs.format, "page_size": inputs.page_size, "tensor_scale": inputs.tensor_scale}
    rows = dequantised_cache(inputs.pages, layout_of(inputs.format), inputs.page_size, tensor_scale=inputs.tensor_scale)
    exact = DecodeInputs(
        q=inputs.q,
        kv_cache=rows,
        block_table=inputs.block_table,
        cache_seqlens=inputs.cache_seqlens,
        head_dim_v=inputs.head_dim_v,
        softmax_scale=inputs.softmax_scale,
        causal=inputs.causal,
    )
    return QuantisedDecodeInputs(pages=inputs.pages, exact=exact, **told)


def _others(case: QuantisedDecodeCase) -> tuple[QuantisedDecodeInputs, ...]:
    """Half the lengths; the lengths of the same sequences in another order; and the same lengths at half the scale."""
    shorter = replace(case, seed=case.seed + 1).build()
    mirrored = replace(case, seed=case.seed + 2, seqlens=case.seqlens[::-1]).build()
    flatter = replace(case, seed=case.seed + 3).build()
    return (
        replace(shorter, exact=shortened(shorter.exact)),
        mirrored,
        replace(flatter, exact=at_half_the_scale(flatter.exact)),
    )


def _distant(case: QuantisedDecodeCase) -> QuantisedDecodeInputs:
    """Three sequences in three pages."""
    inputs = replace(case, seqlens=tuple(np.resize(case.seqlens, 3).tolist())).build()
    exact, pages = in_three_pages(inputs.exact)
    return replace(inputs, pages=inputs.pages[pages], exact=exact)


def _tight(inputs: QuantisedDecodeInputs) -> QuantisedDecodeInputs:
    exact, pages = without_spare_pages(inputs.exact)
    return replace(inputs, pages=inputs.pages[pages], exact=exact)


LATTICE = Lattice(
    law="test_quantised_decode_agrees_with_reference",
    kind="format, length",
    classes=tuple(f"{name}, {length}" for name in HEAD_DIM_V for length in ("a key beyond a page", "a thousand keys")),
    axes=PAGED_AXES,
    fields=lambda supports, name, sizes: {
        "format": name.partition(", ")[0],
        "seqlens": lengths(name.partition(", ")[2], sizes),
        "s": sizes["queries"],
        "num_heads": sizes["heads"],
        "page_size": sizes["page"],
        "causal": True in supports.causal,
    },
    declared=lambda supports, name, sizes: (
        name.partition(", ")[0] in supports.cache_formats and takes_pages(supports, sizes)
    ),
)


def _of_line(**values: Any) -> QuantisedDecodeCase:
    case = QuantisedDecodeCase(dtype="float32", logit_std=0.1, power_of_two=True, **values)
    return replace(case, shared_pages=shared(case.seqlens, case.page_size, case.layout.width))


WORKLOAD = WorkloadLine(
    fields={
        "seqlens": length_list(),
        "s": integer(1, 1),
        "num_heads": integer(1),
        "page_size": integer(1, 64),
        "format": one_of("fp8_ds_mla", *(name for name in HEAD_DIM_V if name != "fp8_ds_mla")),
        "causal": flag(True),
    },
    case=_of_line,
    elements=lambda case: elements_of_decode(case.seqlens, case.s * case.num_heads, case.layout.width),
)

OPERATION = Operation(
    name="decode_quantized",
    sizes=("num_heads", "page_sizes"),
    contract=__doc__,
    case=QuantisedDecodeCase,
    extent=cached,
    recorded=_recorded,
    arguments=(
        Argument("q", "[b, s, h, c+r]", far=True),
        Argument("pages", "[pages, bytes per page]", "bytes", far=True),
        Argument("block_table", "[b, max pages]", "int32"),
        Argument("cache_seqlens", "[b]", "int32"),
    ),
    keywords=("format", "page_size", "tensor_scale", "head_dim_v", "softmax_scale", "causal"),
    outputs=ATTENTION_OUTPUTS,
    expected=lambda inputs, profile, supports: attention_expected(quantised_decode_expected(inputs, profile), supports),
    probable=lambda inputs, profile, supports, failure: probably(
        quantised_decode_expected(inputs, profile, True, failure), supports
    ),
    views=BATCH_VIEWS | TABLE_VIEWS | PAGES_VIEWS,
    regimes=(
        *values("regime", "typical", "outlier", "ties", "offset", "sink", "zeros", "rope", "negative"),
        *SCORES,
        *QUERIES,
        ("no keys", lambda case: 0 in case.seqlens),
    ),
    others=_others,
    distant=_distant,
    missing=no_latent_format,
    tight=_tight,
    lattice=LATTICE,
    workload=WORKLOAD,
)
