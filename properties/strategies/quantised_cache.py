"""Hypothesis strategies of cases of quantised caches."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import cache

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from mla_spec.bounds.profile import Profile
from mla_spec.operations.quantised_cache import HEAD_DIM_V, ROPE_DIM, PagesCase, QuantiseCase
from mla_spec.operations.quantised_decode import QuantisedDecodeCase, latent_formats
from mla_spec.properties.strategies.decode import draw_decode
from mla_spec.properties.strategies.sizes import FLAGS, LOGIT_STDS, SEEDS, among, choice
from mla_spec.reference.cache_layout import layout_of
from mla_spec.reference.formats import format_of
from mla_spec.subjects.supports import Supports

PAGE_SIZES = (1, 2, 3, 16, 64, 7, 128, 32)
REGIMES = ("typical", "outlier", "ties", "offset", "sink", "zeros", "rope", "negative")
QUANTISE_REGIMES = ("typical", "zeros", "outlier", "rope", "tiny", "huge", "edges")


def stores_scales(supports: Supports) -> list[str]:
    """The formats that store scales."""
    return [name for name in supports.cache_formats if layout_of(name).scale]


@cache
def _of_layout(supports: Supports, width: int) -> Supports:
    """What ``decode`` may be given of rows as wide as a layout's."""
    return replace(supports, latent_dims=((width - ROPE_DIM, ROPE_DIM),), page_sizes=supports.page_sizes or PAGE_SIZES)


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
    name = draw(choice(*(name for name in formats if layout_of(name).scale or not scaled)))
    return QuantiseCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        format=name,
        page_size=draw(choice(*supports.page_sizes or PAGE_SIZES)),
        tokens=draw(among(min_tokens, 9, 63, 64, 65, 130)),
        regime=draw(choice(*(r for r in regimes if r != "rope" or name in HEAD_DIM_V))),
    )


@st.composite
def pages_cases(draw: DrawFn, supports: Supports, profile: Profile) -> PagesCase:
    """Pages of every format, the last one full or not."""
    return PagesCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        format=draw(choice(*supports.cache_formats)),
        page_size=draw(choice(*supports.page_sizes or PAGE_SIZES)),
        tokens=draw(among(1, 9, 63, 64, 65, 130)),
        power_of_two=draw(FLAGS),
    )


@st.composite
def quantised_decode_cases(
    draw: DrawFn, supports: Supports, profile: Profile, *, min_batch: int = 1
) -> QuantisedDecodeCase:
    """Ragged batches over shuffled pages of every format of a latent cache, as ``draw_decode`` draws them."""
    name = draw(choice(*latent_formats(supports)))
    power_of_two = draw(FLAGS)
    layout = layout_of(name)
    inexact = layout.scale in ("", "float32") and not (layout.scale and power_of_two)
    stds = _judgeable(profile, layout.width, inexact)
    case = draw_decode(
        draw, _of_layout(supports, layout.width), profile, min_batch=min_batch, regimes=REGIMES, logit_stds=stds
    )
    names = {f.name for f in fields(case)} & {f.name for f in fields(QuantisedDecodeCase)}
    shared = {field: getattr(case, field) for field in names}
    return QuantisedDecodeCase(format=name, power_of_two=power_of_two, **shared)


@cache
def _judgeable(profile: Profile, head_dim: int, inexact: bool) -> tuple[float, ...]:
    """Those that leave the scores an error below about 0.04 where rows are rounded after they are dequantised."""
    stds: tuple[float, ...] = LOGIT_STDS
    if not inexact or profile.cache_dequantised is None:
        return stds
    rounding = format_of(profile.cache_dequantised).unit_roundoff
    return tuple(std for std in stds if std * math.sqrt(head_dim) * rounding < 0.04)
