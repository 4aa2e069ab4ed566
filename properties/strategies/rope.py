"""Hypothesis strategies of cases of ``rope``, and the rotary embeddings that other cases have."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from mla_spec.bounds.profile import Profile
from mla_spec.operations.rope import CONTEXTS, LONGROPE, YARN, RopeCase
from mla_spec.properties.strategies.sizes import MANY_HEADS, SEEDS, among, between, choice, large_size
from mla_spec.reference.config import YarnScaling
from mla_spec.subjects.supports import YARN_OPTIONS, Supports

THETAS = (10000.0, 50000.0, 1000000.0, 500.0, 8e6, 8e7)


def layouts(supports: Supports) -> SearchStrategy[str]:
    """Layouts of the rotated pairs."""
    made: SearchStrategy[str] = choice(*supports.rope_layouts)
    return made


def _supported(yarn: YarnScaling | None, supports: Supports) -> bool:
    """Whether the subject has the scaling, as far as it states any."""
    if yarn is None:
        return True
    plain = YarnScaling(factor=yarn.factor, original_max_position_embeddings=yarn.original_max_position_embeddings)
    stated = [name for name in YARN_OPTIONS if getattr(yarn, name) != getattr(plain, name)]
    rule = supports.yarn_mscale_rule == "any" or yarn.mscale == yarn.mscale_all_dim
    return supports.yarn and rule and all(name in supports.yarn_options for name in stated)


@cache
def supported_scalings(supports: Supports) -> tuple[dict[str, Any], ...]:
    """The field of a case that names its YaRN or LongRoPE scaling, for every one that the subject has, and for none."""
    yarns = [{"yarn": name} for name, yarn in YARN.items() if _supported(yarn, supports)]
    return (*yarns, *({"longrope": name} for name in LONGROPE if name != "none" and supports.longrope))


@cache
def scalings(supports: Supports) -> SearchStrategy[dict[str, Any]]:
    """One of ``supported_scalings``."""
    return st.sampled_from(supported_scalings(supports))


def _far(profile: Profile) -> tuple[tuple[int, int], ...]:
    """Dims and first positions of contexts as long as any published one, where angles are not coarse."""
    return ((64, 163_830), (64, 262_130), (64, 2**20 - 50)) if profile.rope.angle in ("float32", "float64") else ()


def _at_the_end(supports: Supports, profile: Profile) -> list[RopeCase]:
    """Positions on both sides of the end of the context that a scaling states, or makes, for which a table may be made."""
    cases = []
    for i, scaling in enumerate(supported_scalings(supports)):
        yarn, longrope = YARN[scaling.get("yarn", "none")], LONGROPE[scaling.get("longrope", "none")]
        made = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else None
        end = CONTEXTS.get(scaling.get("yarn", "none"), longrope or made)
        if end is not None and (end < 2**14 or profile.rope.angle in ("float32", "float64")):
            layout = supports.rope_layouts[i % len(supports.rope_layouts)]
            cases.append(RopeCase(dtype=profile.dtype, s=4, heads=2, dim=16, layout=layout, start=end - 3, **scaling))
    return cases


def options(supports: Supports, profile: Profile) -> list[RopeCase]:
    """Every scaling once in each layout, in few and many dims, and at the end of its context; the largest base of a published model."""
    cases = []
    for i, scaling in enumerate(supported_scalings(supports)):
        for j, layout in enumerate(supports.rope_layouts):
            dim = (16, 64, 8)[(i + j) % 3]
            cases.append(
                RopeCase(dtype=profile.dtype, s=3, heads=2, dim=dim, layout=layout, start=250, stride=5, **scaling)
            )
    cases += _at_the_end(supports, profile)
    return cases + [
        RopeCase(dtype=profile.dtype, s=3, dim=dim, layout=supports.rope_layouts[0], theta=8e7, start=start, stride=17)
        for dim, start in ((2, 60), (4, 4095), (24, 60), (64, 4095), *_far(profile))
    ]


@st.composite
def rope_cases(draw: DrawFn, supports: Supports, profile: Profile) -> RopeCase:
    """Vectors with and without a head axis, all layouts and scalings, positions up to 2^20, the longest of a published model."""
    dim = 2 * draw(among(1, 8, 32, 64))
    size = large_size(draw, ("heads", "tokens", "positions"))
    start = draw(among(0, 8192, 0, 1, 60, 63, 64, 1023, 4095, 4096))
    if size == "positions" and profile.rope.angle in ("float32", "float64"):
        start = draw(choice(16383, 32767, 65535, 131071, 163700, 262141, 1048570))
        dim = 64 if start > 2**18 else draw(choice(16, 24, 64))
        # Most pairs turn slowly: the angle of the first is off by 0.1 rad, or beyond 2^18 by 0.6.
    return RopeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        batch=draw(between(1, 3)),
        s=draw(choice(33, 65, 129) if size == "tokens" else between(1, 5)),
        heads=draw(choice(*MANY_HEADS) if size == "heads" else between(0, 3)),
        dim=dim,
        layout=draw(layouts(supports)),
        theta=draw(choice(*(theta for theta in THETAS if theta >= 1e6 or start < 2**18))),
        **draw(scalings(supports)),
        start=start,
        stride=draw(choice(1, 2, 17)),
        shift=draw(between(1, 4096)),
    )
