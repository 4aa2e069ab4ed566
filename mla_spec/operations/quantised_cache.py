"""``quantize_cache``, ``dequantize_cache`` and ``decode_quantized``: latent caches in narrow formats.

``format`` is a name of ``mla_spec.reference.cache_layout.LAYOUTS``. Its layout says where the bytes of pages [pages, bytes
per page] (uint8) lie; pages may lie further apart than their bytes. ``tensor_scale`` is the float32 scale of all codes of a
format that stores none, and 1 for the others.

quantize_cache stores rows [n, width], [latent | k_pe] or keys of an indexer, in token order in as few pages as hold them. It
is free to choose scales within ``scale_limits``; the codes and the plain elements are the nearest, none beyond the largest
number (``mla_spec.reference.quantised_cache``), computed in float32 or better. Padding and unused rows may hold anything.

dequantize_cache returns all rows, [pages, page_size, 1, width] in ``dtype``. Those that hold no token may be anything.

decode_quantized is ``decode`` of these rows, of which the first ``head_dim_v`` elements are the values. A reader that rounds
code times scale to a format narrower than its softmax's arithmetic declares that as ``Profile.cache_dequantised``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mla_spec.bounds.attention import BoundedAttention
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.quantised_cache import dequantised_error, quantised_error
from mla_spec.operations.case import ATTENTION_REGIMES, Case
from mla_spec.operations.decode import (
    ATTENTION_OUTPUTS,
    BATCH_VIEWS,
    TABLE_VIEWS,
    DecodeCase,
    DecodeInputs,
    attention_expected,
    decode_expected,
    in_three_pages,
    shortened,
)
from mla_spec.operations.latent_pages import at_half_the_scale, without_spare_pages
from mla_spec.operations.lattice import PAGED_AXES, Lattice, lengths, takes_pages
from mla_spec.operations.operation import Answers, Judge, Operation, Within
from mla_spec.operations.regimes import QUERIES, SCORES, values
from mla_spec.reference.cache_layout import Bytes, CacheLayout, QuantisedRows, layout_of, pack, unpack
from mla_spec.reference.formats import decode_bits, format_of, round_to
from mla_spec.reference.quantised_cache import dequantise, dequantised_cache, quantise
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Result, Tensors, computed
from mla_spec.subjects.extent import cached
from mla_spec.subjects.near import near
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import ROW_PADDING, slice_of_wider, viewed

ROPE_DIM = 64
"""qk_rope_head_dim of every model whose cache has one of the layouts."""

HEAD_DIM_V = {name: 512 for name in ("fp8_per_tensor", "fp8_ds_mla", "deepseek_v4", "deepseek_v4_1", "nvfp4_ds_mla")}
"""Leading elements of a row that are the value, for the formats of latent caches; indexer keys have no values."""


@dataclass(frozen=True, kw_only=True)
class _InFormat:
    """What all calls of quantised caches are told."""

    format: str
    page_size: int
    tensor_scale: float

    @property
    def layout(self) -> CacheLayout:
        return layout_of(self.format)


@dataclass(frozen=True, kw_only=True)
class QuantiseInputs(_InFormat):
    """Arguments of ``quantize_cache``."""

    rows: Array  # [n, width], float64 values exactly representable in the dtype, and in float32


@dataclass(frozen=True, kw_only=True)
class PagesInputs(_InFormat):
    """Arguments of ``dequantize_cache``."""

    pages: Bytes  # [pages, bytes per page]
    rows: Array  # [n, width], the exact values of the rows in token order


@dataclass(frozen=True, kw_only=True)
class QuantisedDecodeInputs(_InFormat):
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
class QuantisedCase(Case):
    """What all cases of quantised caches have."""

    format: str = "fp8_ds_mla"
    page_size: int = 1

    @property
    def layout(self) -> CacheLayout:
        return layout_of(self.format)

    def told(self, tensor_scale: float) -> dict[str, Any]:
        """What calls are told of the format."""
        return {"format": self.format, "page_size": self.page_size, "tensor_scale": tensor_scale}

    def tensor_scale(self, rng: np.random.Generator, amax: float) -> float:
        """A scale of the whole tensor that is no power of two, near the least without saturation; 1 where none is due."""
        if self.layout.scale:
            return 1.0
        least = max(amax, 2.0**-20) / format_of(self.layout.code).max_finite
        return float(round_to(np.array(least * rng.uniform(0.9, 1.4)), "float32"))


@dataclass(frozen=True, kw_only=True)
class QuantiseCase(QuantisedCase):
    """Rows for ``quantize_cache``, whose groups differ in size by many binades.

    ``regime``: "typical"; "zeros" has groups and rows of 0 and -0; "outlier" has one large element in each group; "rope"
    has a k_pe 2^12 times the latent; "tiny" lies below every floor of scales; "huge" has the largest numbers of the dtype
    and of bfloat16; "edges" has groups whose largest element over the largest code is a power of two, or next to one.
    """

    kind = "quantise"
    known_regimes = ("typical", "outlier", "edges", "huge", "rope", "tiny", "zeros")
    tokens: int = 1
    regime: str = "typical"

    def build(self) -> QuantiseInputs:
        """The inputs."""
        rng, layout, fmt = self.generator(), self.layout, format_of(self.dtype)
        largest = min(fmt.max_finite, format_of("bfloat16").max_finite)
        rows = rng.standard_normal((self.tokens, layout.width))
        groups = groups_of(rows, layout)
        groups *= 2.0 ** rng.integers(-6, 7, (*groups.shape[:2], 1))
        if self.regime == "zeros":
            groups *= rng.random((*groups.shape[:2], 1)) < 0.5
            rows[rng.random(self.tokens) < 0.2] *= 0
        elif self.regime == "outlier":
            groups[..., rng.integers(layout.group)] *= 2.0**6
        elif self.regime == "rope":
            rows *= 2.0**-6
            rows[:, -ROPE_DIM:] *= 2.0**12
        elif self.regime == "tiny":
            rows *= 2.0**-20 if fmt.min_exponent > -100 else 2.0**-60
        elif self.regime == "huge":
            rows[...] = np.where(rng.random(rows.shape) < 0.1, np.copysign(largest, rows), rows)
        elif self.regime == "edges":
            code = format_of(layout.code)
            factor = rng.choice([1.0, 1 + 2.0**-7, 1 - 2.0**-8], groups.shape[:2])
            amax = code.max_finite * 2.0 ** rng.integers(-6, 6, groups.shape[:2])
            groups[...] = np.clip(groups, -amax[..., None], amax[..., None])
            groups[..., rng.integers(layout.group)] = amax * factor
        # float32 at most, so that a cast from float64 through float32 rounds once
        rows = round_to(round_to(rows, self.dtype), "float32")
        ordinary = 1.0 if self.regime == "huge" else float(np.abs(rows).max())
        return QuantiseInputs(rows=rows, **self.told(self.tensor_scale(rng, ordinary)))


@dataclass(frozen=True, kw_only=True)
class PagesCase(QuantisedCase):
    """Pages for ``dequantize_cache`` with every finite code, any scales, and any plain elements, 0 and -0 among them.

    ``power_of_two``: all scales of float32 are powers of two.
    """

    kind = "pages"
    tokens: int = 1
    power_of_two: bool = False

    def build(self) -> PagesInputs:
        """The inputs; padding and unused rows are 0."""
        rng, layout = self.generator(), self.layout
        # in the middle of the dtype's range, so that no product leaves it
        exponents = (-8, 6) if self.dtype == "float16" else (-30, 30)
        tensor_scale = self.tensor_scale(rng, 1.0)
        scales: Array = np.full((self.tokens, 1), tensor_scale, dtype=np.float64)
        if layout.scale == "float8_e4m3fn":
            scales = _any_numbers(rng, (self.tokens, layout.groups), layout.scale, least=1)
        elif layout.scale:
            scales = np.ldexp(1.0, rng.integers(*exponents, (self.tokens, layout.groups)))
            if layout.scale == "float32" and not self.power_of_two:
                scales = round_to(scales * rng.uniform(1, 2, scales.shape), "float32")
        codes = _signed(rng, _any_numbers(rng, (self.tokens, layout.scaled_dim), layout.code))
        plain = rng.standard_normal((self.tokens, layout.plain_dim)) * 2.0 ** rng.integers(-4, 9)
        plain *= rng.random(plain.shape) < 0.9
        stored = QuantisedRows(codes, scales, round_to(plain, layout.plain, overflow="saturate"))
        pages = pack(stored, layout, self.page_size)
        return PagesInputs(pages=pages, rows=dequantise(stored, layout), **self.told(tensor_scale))


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


def groups_of(rows: Array, layout: CacheLayout) -> Array:
    """A view of the scaled elements by group, [n, groups, group]."""
    return rows[:, : layout.scaled_dim].reshape(len(rows), layout.groups, layout.group)


def _any_numbers(rng: np.random.Generator, shape: tuple[int, ...], name: str, *, least: int = 0) -> Array:
    """Finite numbers without sign of a format of at most 8 bits, all patterns from ``least`` on equally likely."""
    return decode_bits(rng.integers(least, format_of(name).largest_pattern + 1, shape), name)


def _signed(rng: np.random.Generator, x: Array) -> Array:
    return np.where(rng.random(x.shape) < 0.5, -x, x)


@dataclass(frozen=True)
class Stored:
    """Pages that hold rows: codes are the nearest, given the scales that were stored."""

    inputs: QuantiseInputs

    def judge(self, judge: Judge, got: Result) -> None:
        """Every element read back is as near to its row as its scale allows."""
        stored = stored_rows(self.inputs, got.bits.astype(np.uint8))
        rows, layout = self.inputs.rows, self.inputs.layout
        with np.errstate(invalid="ignore"):  # a subject may store anything
            value = dequantise(stored, layout)
        bound = quantised_error(rows, stored.scales, layout)
        judge.within(computed(value, "stored rows"), rows, bound, gate=False)


def stored_rows(inputs: QuantiseInputs, pages: Bytes) -> QuantisedRows:
    """What pages hold of the tokens that were quantised, each part [n, ...]."""
    stored = unpack(pages, inputs.layout, inputs.page_size, tensor_scale=inputs.tensor_scale)
    slots = len(pages) * inputs.page_size
    parts = (stored.codes, stored.scales, stored.plain)
    return QuantisedRows(*(x.reshape(slots, x.shape[-1])[: len(inputs.rows)] for x in parts))


def _dequantised(inputs: PagesInputs, profile: Profile, supports: Supports) -> Answers:
    """Code times scale in the rows that hold a token."""
    shape = len(inputs.pages), inputs.page_size, 1, inputs.layout.width
    rows, held = np.zeros(shape), np.zeros(shape, dtype=bool)
    rows.reshape(-1, shape[-1])[: len(inputs.rows)] = inputs.rows
    held.reshape(-1, shape[-1])[: len(inputs.rows)] = True
    return (Within(rows, dequantised_error(rows, profile), read=held),)


def quantised_decode_expected(inputs: QuantisedDecodeInputs, profile: Profile) -> BoundedAttention:
    """Exact decode of the dequantised rows; unless declared otherwise they are rounded to the softmax's arithmetic."""
    rounded = profile.cache_dequantised or profile.softmax
    return decode_expected(inputs.exact, replace(profile, cache_dequantised=rounded))


def _decode_others(case: QuantisedDecodeCase) -> tuple[QuantisedDecodeInputs, ...]:
    """Half the lengths; the lengths of the same sequences in another order; and the same lengths at half the scale."""
    shorter = replace(case, seed=case.seed + 1).build()
    mirrored = replace(case, seed=case.seed + 2, seqlens=case.seqlens[::-1]).build()
    flatter = replace(case, seed=case.seed + 3).build()
    return (
        replace(shorter, exact=shortened(shorter.exact)),
        mirrored,
        replace(flatter, exact=at_half_the_scale(flatter.exact)),
    )


def _decode_distant(case: QuantisedDecodeCase) -> QuantisedDecodeInputs:
    """Three sequences in three pages."""
    inputs = replace(case, seqlens=tuple(np.resize(case.seqlens, 3).tolist())).build()
    exact, pages = in_three_pages(inputs.exact)
    return replace(inputs, pages=inputs.pages[pages], exact=exact)


def _decode_tight(inputs: QuantisedDecodeInputs) -> QuantisedDecodeInputs:
    exact, pages = without_spare_pages(inputs.exact)
    return replace(inputs, pages=inputs.pages[pages], exact=exact)


@near
def _pages_of_two_layers(t: Tensors) -> Tensors:
    return t | {"pages": torch.stack([t["pages"].roll(1, 0), t["pages"]], dim=1).flatten(0, 1)[1::2]}


PAGES_VIEWS = {"pages of two layers alternating in memory": _pages_of_two_layers}
SCALES = (
    ("powers of two", lambda case: case.power_of_two),
    ("any scales", lambda case: not case.power_of_two),
)


def latent_formats(supports: Supports) -> list[str]:
    """The formats of latent caches that the subject supports, without those of an indexer."""
    return [name for name in supports.cache_formats if name in HEAD_DIM_V]


def no_format(supports: Supports) -> str:
    """Why no case of quantised caches can be made, or ""."""
    return "" if supports.cache_formats else "supports no format of quantised caches"


def no_latent_format(supports: Supports) -> str:
    """Why no case of quantised latent caches can be made, or ""."""
    return "" if latent_formats(supports) else "supports no format of a latent cache"


QUANTIZE_CACHE = Operation(
    name="quantize_cache",
    contract=__doc__,
    case=QuantiseCase,
    arguments=(Argument("rows", "[n, width]", far=True),),
    keywords=("format", "page_size", "tensor_scale"),
    outputs=(
        Output(
            "pages",
            "[pages, bytes per page]",
            lambda i: (-(-len(i.rows) // i.page_size), i.layout.bytes_per_page(i.page_size)),
            "bytes",
        ),
    ),
    expected=lambda inputs, profile, supports: (Stored(inputs),),
    views={"rows as slices of wider ones": viewed(slice_of_wider, "rows", -1, ROW_PADDING)},
    regimes=tuple(values("regime", "typical", "zeros", "outlier", "rope", "tiny", "huge", "edges")),
    others=lambda case: (replace(case, seed=case.seed + 1).build(),),
    distant=lambda case: replace(case, tokens=3).build(),
    missing=no_format,
)

DEQUANTIZE_CACHE = Operation(
    name="dequantize_cache",
    contract=__doc__,
    case=PagesCase,
    arguments=(Argument("pages", "[pages, bytes per page]", "bytes", far=True),),
    keywords=("format", "page_size", "tensor_scale", "dtype"),
    outputs=(
        Output(
            "rows",
            "[pages, page_size, 1, width]",
            lambda inputs: (len(inputs.pages), inputs.page_size, 1, inputs.layout.width),
            what="dequantised rows",
        ),
    ),
    expected=_dequantised,
    views=PAGES_VIEWS,
    regimes=SCALES,
    others=lambda case: (replace(case, seed=case.seed + 1).build(),),
    distant=lambda case: replace(case, tokens=2 * case.page_size + 1).build(),
    missing=no_format,
)

QUANTIZED_LATTICE = Lattice(
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

DECODE_QUANTIZED = Operation(
    name="decode_quantized",
    contract=__doc__,
    case=QuantisedDecodeCase,
    extent=cached,
    arguments=(
        Argument("q", "[b, s, h, c+r]", far=True),
        Argument("pages", "[pages, bytes per page]", "bytes", far=True),
        Argument("block_table", "[b, max pages]", "int32"),
        Argument("cache_seqlens", "[b]", "int32"),
    ),
    keywords=("format", "page_size", "tensor_scale", "head_dim_v", "softmax_scale", "causal"),
    outputs=ATTENTION_OUTPUTS,
    expected=lambda inputs, profile, supports: attention_expected(quantised_decode_expected(inputs, profile), supports),
    views=BATCH_VIEWS | TABLE_VIEWS | PAGES_VIEWS,
    regimes=(
        *values("regime", "typical", "outlier", "ties", "offset", "sink", "zeros", "rope", "negative"),
        *SCORES,
        *QUERIES,
        ("no keys", lambda case: 0 in case.seqlens),
    ),
    others=_decode_others,
    distant=_decode_distant,
    missing=no_latent_format,
    tight=_decode_tight,
    lattice=QUANTIZED_LATTICE,
)
