"""Sizes, seeds and spreads that the strategies of operations share, and strategies that are made once.

Structure and seeds of a case are drawn; its values come from the seeded generator. Every strategy takes what the subject
supports and its profile, so that it draws only what the subject can be given, and cases whose bound means something in that
profile.

To make a strategy takes Hypothesis longer than to draw from it. So ``choice``, ``between`` and ``among`` keep what they
made, and what depends on earlier draws is chosen by a drawn number, not by a new union of strategies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from mla_spec.bounds.profile import Profile
from mla_spec.reference.formats import format_of
from mla_spec.subjects.supports import Supports

T = TypeVar("T")

SEEDS = st.integers(0, 2**32 - 1)
FLAGS = st.booleans()
_ALIKE = st.sampled_from((False, False, False, True))
PAGE_SIZES = (1, 2, 3, 16, 64, 7, 128, 32, 256)
HEADS = (1, 2, 3, 4, 5, 8, 16, 20)
MANY_HEADS = (72, 128, 24, 32, 48, 64, 96, 112)
"""More than a tile of 64, and in the first no whole number of tiles; and what tensor parallelism leaves of 128 or 96."""

SINK_STDS = (1.0, 4.0, 0.1)
"""Standard deviations of logits for which the LSE is known well enough to be compared with a sink."""

WINDOWS = (1, 2, 5, 16, 17, 64)
"""Keys that a query sees: one, a few, a tile or page, and one more."""

MANY_SEQUENCES = (9, 17, 33, 65, 128, 200)
PREFILL_REGIMES = ("typical", "outlier", "ties", "negative")
LOGIT_STDS = (1.0, 4.0, 0.1, 16.0, 64.0, 0.01, 256.0, 1e3, 1e4, 1e5)
"""The last puts whole rows of scores beyond -5e4, which some kernels use for -inf."""


@lru_cache(4096, typed=True)  # 1 is not True
def choice(*values: T) -> SearchStrategy[T]:
    """One of ``values``."""
    return st.sampled_from(values)


@lru_cache(4096)
def between(least: int, most: int) -> SearchStrategy[int]:
    """An integer, ``most`` included."""
    return st.integers(least, most)


@lru_cache(4096)
def among(least: int, most: int, *others: int) -> SearchStrategy[int]:
    """In one of two draws an integer from ``least`` to ``most``, else one of ``others``."""
    return between(least, most) | choice(*others)


def several(draw: DrawFn, each: Callable[[], int], least: int, most: int) -> list[int]:
    """From ``least`` to ``most`` integers; in one of four draws all are alike, for which kernels have paths of their own."""
    count = draw(between(least, most))
    return [each()] * count if draw(_ALIKE) else [each() for _ in range(count)]


def near(draw: DrawFn, unit: int, least: int, most: int, *, below: int = 1, above: int = 1) -> int:
    """A multiple of ``unit``, from ``least`` to ``most`` of it, or up to ``below`` less or ``above`` more."""
    return unit * draw(between(least, most)) + draw(between(-below, above))


@cache
def _large(sizes: tuple[str, ...]) -> SearchStrategy[str]:
    others = tuple(size for size in sizes if size != "published")
    eighth = ("published",) * ("published" in sizes)
    count = max(1, len(others))
    return choice(*("",) * (8 - 2 * bool(others) - len(eighth)) * count, *others * 2, *eighth * count)


def large_size(draw: DrawFn, sizes: tuple[str, ...]) -> str:
    """Which of a case's sizes is beyond the tiles, and the thresholds between kernels, that most have; "" in most draws.

    In one of four draws it is one of ``sizes``, and, where they include it, in one of eight "published": all sizes are those of
    a published model.
    """
    return draw(_large(sizes))


def cycled(items: list[int], count: int) -> list[int]:
    """``count`` items: the same over and over. Of five items none comes again after a power of two."""
    return [items[i % len(items)] for i in range(count)]


@cache
def supported(
    regimes: tuple[str, ...], supports: Supports, profile: Profile, columns: int | None = None
) -> tuple[str, ...]:
    """Those of ``regimes`` that the subject can be given, and that leave the bound of ``columns`` of values a meaning.

    An outlier has no mean. Where it is the only column, outputs over many keys are near 0, and 16 bits say nothing of them.
    """
    left_out = set() if supports.negative_scale else {"negative"}
    if columns == 1 and format_of(profile.dtype).bits <= 16:
        left_out.add("outlier")
    return tuple(regime for regime in regimes if regime not in left_out)


LARGE_PRODUCTS = 16.0
"""How much larger the products of a score may be, against the score, than in the regime "typical"."""


FAR_FROM_ZERO = {"sunken": (1.25, 0.5), "outlier": (5.0, 0.0), "offset": (5.0, 0.0), "sink": (5.0, 0.0)}
"""Regimes in which scores are larger than their spread: by about which factor, times which power of the width of rows."""


def _feels_score_roundings(std: float, profile: Profile, head_dim: int, regime: str) -> bool:
    """Whether roundings of scores that are stored in 16 bits move outputs by so much that their bound says nothing.

    Measured, not derived: a bound that says nothing fails no kernel. Where scores are spread so far that one key has all the
    weight, no rounding is felt.
    """
    rounding = profile.score_roundings * format_of(profile.score_format).unit_roundoff
    if rounding < 2.0**-12 or (std >= 64 and regime not in FAR_FROM_ZERO):
        return False
    factor, power = FAR_FROM_ZERO.get(regime, (1.0, 0.0))
    size: float = std * factor * head_dim**power
    return size * rounding > 0.1


def _power_of_two(x: float) -> float:
    """The largest that is not above x > 0."""
    return float(2.0 ** math.floor(math.log2(x)))


@cache
def judgeable_stds(
    logit_stds: tuple[float, ...], profile: Profile, head_dim: int, regime: str = ""
) -> tuple[float, ...]:
    """Those that leave the scores an error below about 0.4, and so the bound a meaning.

    Operands or queries that are rounded before they are multiplied, and sums in 16 bits, leave products an error that is felt
    at any size of the scores: then 0.03 is the limit, and where it is too little for all of ``logit_stds``, one is made.

    Args:
        regime: of the case; "" where it is any.
    """
    # All keys meet the same rounded query, so that it moves an output by little more than the square of this.
    query = format_of(profile.query).unit_roundoff if profile.query else 0.0
    coarse_sums = profile.score.relative_error(head_dim) > 2.0**-10
    if profile.score.operand_error or query or coarse_sums:
        large = head_dim**0.5 * (1.0 if regime in ("typical", "ties", "sunken") else LARGE_PRODUCTS)
        products = large * profile.score.relative_error(head_dim)
        candidates = (*logit_stds, 0.5, 0.25) if query else logit_stds
        most = 0.2 if head_dim <= 128 else 0.08  # covariances of wide rows are not formed where they would take long
        fine = tuple(std for std in candidates if std * products < 0.03 and std * large * query < most)
        return fine or (min(*LOGIT_STDS, _power_of_two(0.03 / products)),)
    rounding = profile.score_roundings * format_of(profile.score_format).unit_roundoff
    gamma = profile.score.relative_error(head_dim + profile.operand_roundings)
    # Merging parts by LSEs takes two roundings of numbers as large as the largest score, and each moves out by as much.
    u_lse = max(format_of(name).unit_roundoff for name in (profile.softmax, profile.lse))
    merging = 8 * profile.merges(1) * u_lse

    def judgeable(std: float) -> bool:
        fine = std <= 64 or (std * (head_dim**0.5 * gamma + rounding) < 0.4 and std * merging < 0.02)
        return fine and not _feels_score_roundings(std, profile, head_dim, regime)

    fine = tuple(std for std in logit_stds if judgeable(std))
    return fine or (max(std for std in LOGIT_STDS if judgeable(std) or std == min(LOGIT_STDS)),)


def cancelling_stds(stds: tuple[float, ...], profile: Profile, head_dim: int) -> tuple[float, ...]:
    """Those up to 4 that leave scores, sums of products so much larger than they are, an error below 0.075; or the largest that does."""
    products = LARGE_PRODUCTS * head_dim**0.5 * profile.score.relative_error(head_dim + profile.operand_roundings)
    fine = tuple(std for std in stds if std <= 4 and std * products < 0.075)
    return fine or (min(*stds, _power_of_two(0.075 / products)),)


def long_enough(length: int, unit: int, profile: Profile) -> int:
    """A length, with so many keys more, in multiples of ``unit``, that roundings of a coarse P spread."""
    return length + -(-768 // unit) * unit if profile.coarse else length


def narrowed(strategy: Callable[..., SearchStrategy[Any]], **keywords: Any) -> Callable[..., SearchStrategy[Any]]:
    """``strategy`` with keywords given, as ``law(cases=...)`` takes it."""
    return lambda supports, profile, **more: strategy(supports, profile, **keywords, **more)
