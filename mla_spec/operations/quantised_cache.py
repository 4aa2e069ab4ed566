"""``quantize_cache`` and ``dequantize_cache``: latent caches in narrow formats.

``format`` is a name of ``mla_spec.reference.cache_layout.LAYOUTS``. Its layout says where the bytes of pages [pages, bytes
per page] (uint8) lie; pages may lie further apart than their bytes. ``tensor_scale`` is the float32 scale of all codes of a
format that stores none, and 1 for the others.

quantize_cache stores rows [n, width], [latent | k_pe] or keys of an indexer, in token order in as few pages as hold them. It
is free to choose scales within ``scale_limits``; the codes and the plain elements are the nearest, none beyond the largest
number (``mla_spec.reference.quantised_cache``), computed in float32 or better. Padding and unused rows may hold anything.

dequantize_cache returns all rows, [pages, page_size, 1, width] in ``dtype``. Those that hold no token may be anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mla_spec.bounds.profile import Profile
from mla_spec.bounds.quantised_cache import dequantised_error, quantised_error
from mla_spec.operations.case import Case
from mla_spec.operations.operation import Answers, Judge, Operation, Within
from mla_spec.operations.regimes import values
from mla_spec.reference.cache_layout import Bytes, CacheLayout, QuantisedRows, layout_of, pack, unpack
from mla_spec.reference.formats import decode_bits, format_of, round_to
from mla_spec.reference.quantised_cache import dequantise
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Result, Tensors, computed
from mla_spec.subjects.near import near
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import ROW_PADDING, slice_of_wider, viewed

ROPE_DIM = 64
"""qk_rope_head_dim of every model whose cache has one of the layouts."""

HEAD_DIM_V = {name: 512 for name in ("fp8_per_tensor", "fp8_ds_mla", "deepseek_v4", "deepseek_v4_1", "nvfp4_ds_mla")}
"""Leading elements of a row that are the value, for the formats of latent caches; indexer keys have no values."""


@dataclass(frozen=True, kw_only=True)
class InFormat:
    """What all calls of quantised caches are told."""

    format: str
    page_size: int
    tensor_scale: float

    @property
    def layout(self) -> CacheLayout:
        return layout_of(self.format)


@dataclass(frozen=True, kw_only=True)
class QuantiseInputs(InFormat):
    """Arguments of ``quantize_cache``."""

    rows: Array  # [n, width], float64 values exactly representable in the dtype, and in float32


@dataclass(frozen=True, kw_only=True)
class PagesInputs(InFormat):
    """Arguments of ``dequantize_cache``."""

    pages: Bytes  # [pages, bytes per page]
    rows: Array  # [n, width], the exact values of the rows in token order


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


@near
def _pages_of_two_layers(t: Tensors) -> Tensors:
    return t | {"pages": torch.stack([t["pages"].roll(1, 0), t["pages"]], dim=1).flatten(0, 1)[1::2]}


PAGES_VIEWS = {"pages of two layers alternating in memory": _pages_of_two_layers}
SCALES = (
    ("powers of two", lambda case: case.power_of_two),
    ("any scales", lambda case: not case.power_of_two),
)


def no_format(supports: Supports) -> str:
    """Why no case of quantised caches can be made, or ""."""
    return "" if supports.cache_formats else "supports no format of quantised caches"


QUANTIZE_CACHE = Operation(
    name="quantize_cache",
    sizes=("page_sizes",),
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
    sizes=("page_sizes",),
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
