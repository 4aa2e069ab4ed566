"""Hypothesis strategies of cases of quantised caches."""

from __future__ import annotations

import math
from dataclasses import fields, replace

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from mla_spec.bounds.profile import Profile
from mla_spec.operations.quantised_cache import (
    HEAD_DIM_V,
    ROPE_DIM,
    PagesCase,
    QuantiseCase,
    QuantisedDecodeCase,
    latent_formats,
)
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.sizes import LOGIT_STDS, SEEDS
from mla_spec.reference.cache_layout import layout_of
from mla_spec.reference.formats import format_of
from mla_spec.subjects.supports import Supports

PAGE_SIZES = (1, 2, 3, 16, 64, 7, 128)
REGIMES = ("typical", "outlier", "ties", "offset", "sink", "zeros", "rope", "negative")
QUANTISE_REGIMES = ("typical", "zeros", "outlier", "rope", "tiny", "huge", "edges")


def stores_scales(supports: Supports) -> list[str]:
    """The formats that store scales."""
    return [name for name in supports.cache_formats if layout_of(name).scale]


def _page_sizes(supports: Supports) -> SearchStrategy[int]:
    return st.sampled_from(supports.page_sizes or PAGE_SIZES)


@st.composite
def quantise_cases(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    regimes: tuple[str, ...] = QUANTISE_REGIMES,
    latent: bool = False,
    scaled: bool = False,
    min_tokens: int = 1,
) -> QuantiseCase:
    """Rows of every regime; ``latent`` asks for formats of latent caches only, ``scaled`` for those that store scales."""
    formats = latent_formats(supports) if latent else supports.cache_formats
    name = draw(st.sampled_from([name for name in formats if layout_of(name).scale or not scaled]))
    return QuantiseCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        format=name,
        page_size=draw(_page_sizes(supports)),
        tokens=draw(st.integers(min_tokens, 9) | st.sampled_from((63, 64, 65, 130))),
        regime=draw(st.sampled_from([r for r in regimes if r != "rope" or name in HEAD_DIM_V])),
    )


@st.composite
def pages_cases(draw: DrawFn, supports: Supports, profile: Profile) -> PagesCase:
    """Pages of every format, the last one full or not."""
    return PagesCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        format=draw(st.sampled_from(supports.cache_formats)),
        page_size=draw(_page_sizes(supports)),
        tokens=draw(st.integers(1, 9) | st.sampled_from((63, 64, 65, 130))),
        power_of_two=draw(st.booleans()),
    )


@st.composite
def quantised_decode_cases(
    draw: DrawFn, supports: Supports, profile: Profile, *, min_batch: int = 1
) -> QuantisedDecodeCase:
    """Ragged batches over shuffled pages of every format of a latent cache, as ``decode_cases`` draws them."""
    name = draw(st.sampled_from(latent_formats(supports)))
    power_of_two = draw(st.booleans())
    layout = layout_of(name)
    narrowed = replace(
        supports,
        latent_dims=((layout.width - ROPE_DIM, ROPE_DIM),),
        page_sizes=supports.page_sizes or PAGE_SIZES,
    )
    inexact = layout.scale in ("", "float32") and not (layout.scale and power_of_two)
    stds = _judgeable(profile, layout.width, inexact)
    case = draw(decode_cases(narrowed, profile, min_batch=min_batch, regimes=REGIMES, logit_stds=stds))
    names = {f.name for f in fields(case)} & {f.name for f in fields(QuantisedDecodeCase)}
    shared = {field: getattr(case, field) for field in names}
    return QuantisedDecodeCase(format=name, power_of_two=power_of_two, **shared)


def _judgeable(profile: Profile, head_dim: int, inexact: bool) -> tuple[float, ...]:
    """Those that leave the scores an error below about 0.04 where rows are rounded after they are dequantised."""
    stds: tuple[float, ...] = LOGIT_STDS
    if not inexact or profile.cache_dequantised is None:
        return stds
    rounding = format_of(profile.cache_dequantised).unit_roundoff
    return tuple(std for std in stds if std * math.sqrt(head_dim) * rounding < 0.04)
