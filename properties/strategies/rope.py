"""Hypothesis strategies of cases of ``rope``, and the rotary embeddings that other cases have."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from mla_spec.bounds.profile import Profile
from mla_spec.operations.rope import LONGROPE, YARN, RopeCase
from mla_spec.properties.strategies.sizes import MANY_HEADS, SEEDS, among, between, choice, large_size
from mla_spec.subjects.supports import Supports

THETAS = (10000.0, 50000.0, 1000000.0, 500.0)


def layouts(supports: Supports) -> SearchStrategy[str]:
    """Layouts of the rotated pairs."""
    made: SearchStrategy[str] = choice(*supports.rope_layouts)
    return made


@cache
def scalings(supports: Supports) -> SearchStrategy[dict[str, str]]:
    """The field of a case that names its YaRN or LongRoPE scaling, or none."""
    yarns = list(YARN) if supports.yarn else ["none"]
    if supports.yarn_mscale_rule == "equal":
        yarns = [name for name in yarns if (y := YARN[name]) is None or y.mscale == y.mscale_all_dim]
    longropes = [name for name in LONGROPE if name != "none"] if supports.longrope else []
    return st.sampled_from([*({"yarn": name} for name in yarns), *({"longrope": name} for name in longropes)])


@st.composite
def rope_cases(draw: DrawFn, supports: Supports, profile: Profile) -> RopeCase:
    """Vectors with and without a head axis, all layouts and scalings, positions up to 163,840."""
    dim = 2 * draw(among(1, 8, 32))
    size = large_size(draw, ("heads", "tokens", "positions"))
    start = draw(among(0, 8192, 0, 1, 60, 63, 64, 1023, 4095, 4096))
    if size == "positions" and profile.rope.angle in ("float32", "float64"):
        start = draw(choice(16383, 32767, 65535, 131071, 163700))
        dim = draw(choice(16, 24, 64))  # most pairs turn slowly: the angle of the first is off by 0.1 rad
    return RopeCase(
        dtype=profile.dtype,
        seed=draw(SEEDS),
        batch=draw(between(1, 3)),
        s=draw(choice(33, 65, 129) if size == "tokens" else between(1, 5)),
        heads=draw(choice(*MANY_HEADS) if size == "heads" else between(0, 3)),
        dim=dim,
        layout=draw(layouts(supports)),
        theta=draw(choice(*THETAS)),
        **draw(scalings(supports)),
        start=start,
        stride=draw(choice(1, 2, 17)),
        shift=draw(between(1, 4096)),
    )
