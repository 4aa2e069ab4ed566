"""Hypothesis strategies of cases: structure and seeds are drawn here, values come from the seeded generator.

Every strategy takes what the subject supports and its profile, so that it draws only what the subject can be given and
cases whose bound means something in that profile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from mla_spec.harness.cases import YARN, DecodeCase, LayerCase, RopeCase
from mla_spec.harness.contract import Supports
from mla_spec.reference.formats import format_of
from mla_spec.reference.profile import Profile

SEEDS = st.integers(0, 2**32 - 1)
THETAS = (10000.0, 50000.0, 1000000.0, 500.0)
PAGE_SIZES = (1, 2, 3, 16, 64, 7, 128)
DECODE_REGIMES = ("typical", "outlier", "ties", "offset", "sink")
LOGIT_STDS = (1.0, 4.0, 0.1, 16.0, 64.0, 0.01, 1e5)
"""The last puts whole rows of scores beyond -5e4, which some kernels use for -inf."""


def _layouts(supports: Supports) -> SearchStrategy[str]:
    return st.sampled_from(supports.rope_layouts)


def _yarns(supports: Supports) -> SearchStrategy[str]:
    """Names of YaRN scalings."""
    if not supports.yarn:
        return st.just("none")
    equal = [name for name, y in YARN.items() if y is None or y.mscale == y.mscale_all_dim]
    return st.sampled_from(equal if supports.yarn_mscale_rule == "equal" else list(YARN))


def _judgeable(logit_stds: tuple[float, ...], profile: Profile, head_dim: int) -> tuple[float, ...]:
    """Those that leave the scores an error below about 0.4, and so the bound a meaning."""
    rounding = profile.score_roundings * format_of(profile.score_format).unit_roundoff
    gamma = profile.score.relative_error(head_dim + profile.operand_roundings)
    return tuple(std for std in logit_stds if std <= 64 or std * (head_dim**0.5 * gamma + rounding) < 0.4)


@st.composite
def rope_cases(draw: DrawFn, supports: Supports, profile: Profile) -> RopeCase:
    """Vectors with and without a head axis, all layouts and scalings, positions up to 163,840."""
    dim = 2 * draw(st.integers(1, 8) | st.just(32))
    return RopeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        batch=draw(st.integers(1, 3)),
        s=draw(st.integers(1, 5)),
        heads=draw(st.integers(0, 3)),
        dim=dim,
        layout=draw(_layouts(supports)),
        theta=draw(st.sampled_from(THETAS)),
        yarn=draw(_yarns(supports)),
        start=draw(st.sampled_from((0, 1, 60, 63, 64, 1023, 4095, 4096)) | st.integers(0, 8192)),
        stride=draw(st.sampled_from((1, 2, 17))),
        shift=draw(st.integers(1, 4096)),
    )


@st.composite
def decode_cases(
    draw: DrawFn,
    supports: Supports,
    profile: Profile,
    *,
    min_s: int = 1,
    max_s: int = 4,
    min_length: int = 0,
    min_batch: int = 1,
    min_rope: int = 0,
    causal: bool | None = None,
    regimes: tuple[str, ...] = DECODE_REGIMES,
    logit_stds: tuple[float, ...] = LOGIT_STDS,
) -> DecodeCase:
    """Ragged batches over shuffled pages; lengths around boundaries of pages and of tiles of 16 keys.

    Keywords narrow what is drawn, for laws that need, say, two queries. Where the subject has no rule for rows without
    keys, none occur.
    """
    page_size = draw(st.sampled_from(supports.page_sizes or PAGE_SIZES))
    s = draw(st.integers(min_s, max(min_s, min(max_s, supports.max_s or max_s))))
    is_causal = draw(st.sampled_from([c for c in supports.causal if causal is None or c == causal]))
    shortest = min_length
    if supports.empty_row == "unsupported":
        shortest = max(shortest, s if is_causal else 1)
    around_pages = st.builds(
        lambda pages, off: max(shortest, pages * page_size + off),
        st.integers(0, 3 if page_size < 32 else 1),
        st.integers(-1, 1),
    )
    around_tiles = st.builds(
        lambda tiles, off: max(shortest, 16 * tiles + off), st.integers(1, 4), st.integers(-1, max(1, s - 1))
    )
    lengths = st.integers(shortest, max(shortest, 40)) | around_pages | around_tiles
    if supports.latent_dims is not None:
        c, r = draw(st.sampled_from([dims for dims in supports.latent_dims if dims[1] >= min_rope]))
    else:
        c, r = draw(
            st.tuples(st.integers(1, 24), st.integers(min_rope // 2, 6).map(lambda half: 2 * half))
            | st.sampled_from([(32, 16), (48, 8), (512, 64)])
        )
    return DecodeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        seqlens=tuple(draw(st.lists(lengths, min_size=min_batch, max_size=max(min_batch, 4)))),
        s=s,
        num_heads=draw(st.sampled_from(supports.num_heads or (1, 2, 3, 4, 5, 8, 16, 20))),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=page_size,
        causal=is_causal,
        logit_std=draw(st.sampled_from(_judgeable(logit_stds, profile, c + r))),
        regime=draw(st.sampled_from(regimes)),
        qk_nope_head_dim=draw(st.integers(1, 8)),
        v_head_dim=draw(st.integers(1, 8)),
    )


@st.composite
def layer_cases(
    draw: DrawFn, supports: Supports, profile: Profile, *, min_prompt: int = 1, min_steps: int = 0, max_steps: int = 3
) -> LayerCase:
    """Layers with all dimensions different, with and without query compression, rope and YaRN.

    16-bit formats get aligned weights, small dims and small query gains: there the worst-case bound still means something.
    """
    narrow = format_of(profile.dtype).precision <= 11
    coarse = format_of(profile.dtype).precision <= 8
    rope_dim = 2 * draw(st.integers(0 if supports.rope_optional else 1, 4))
    layouts = [*supports.rope_layouts] * 2 + ["none"] * supports.rope_optional
    layout = draw(st.sampled_from(layouts)) if rope_dim else "none"
    eps = st.just(supports.latent_norm_eps) if supports.latent_norm_eps else st.sampled_from((1e-6, 1e-5))
    heads = draw(st.integers(1, 2 if coarse else 4))
    largest = 6 if narrow else 16
    multiple = supports.layer_dim_multiple
    return LayerCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        batch=draw(st.integers(1, 3)),
        prompt=draw(st.integers(min_prompt, 9)),
        steps=draw(st.integers(min_steps, max(min_steps, max_steps))),
        hidden_size=heads * draw(st.integers(2, 4 if narrow else 12)),
        num_heads=heads,
        q_lora_rank=draw(st.none() | st.integers(1, largest)),
        kv_lora_rank=multiple * draw(st.integers(-(-2 // multiple), largest // multiple)),
        qk_nope_head_dim=multiple * draw(st.integers(1, max(1, largest // 2 // multiple))),
        qk_rope_head_dim=rope_dim,
        v_head_dim=draw(st.integers(1, largest // 2)),
        layout=layout,
        theta=draw(st.sampled_from(THETAS)),
        yarn=draw(_yarns(supports)) if layout != "none" else "none",
        start=draw(st.sampled_from((0, 0, 1, 60, 4090))) if not narrow else draw(st.sampled_from((0, 1, 60))),
        latent_norm_eps=draw(eps),
        weights="aligned" if narrow else "dense",
        gain=draw(st.sampled_from((0.0625, 0.125) if coarse else (1.0, 0.5, 2.0))),
        hidden_scale=draw(st.sampled_from((1.0, 2.0**-10))),
    )


def narrowed(strategy: Callable[..., SearchStrategy[Any]], **keywords: Any) -> Callable[..., SearchStrategy[Any]]:
    """``strategy`` with keywords given, as ``law(cases=...)`` takes it."""
    return lambda supports, profile: strategy(supports, profile, **keywords)
