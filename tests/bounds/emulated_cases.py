"""Emulated kernels, the cases they are given, and how their results compare with the bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.proof.emulated import EmulatedAttention, Schedule
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array


def profile_kernels() -> Iterator[EmulatedAttention]:
    """The honest family: one change at a time, then mixtures."""
    for dtype in ("float32", "float16", "bfloat16"):
        default = Profile.default(dtype)
        yield EmulatedAttention(default)
        yield EmulatedAttention(default, Schedule(exp2=True))
        for tile in (1, 3, 16, 64):
            yield EmulatedAttention(replace(default, tile=tile))
        yield EmulatedAttention(replace(default, row_sum="rounded"))
        yield EmulatedAttention(replace(default, output_rounding="truncate", probabilities="float32"))
        yield EmulatedAttention(replace(default, splits=3))
        yield EmulatedAttention(
            replace(default, splits=5, tile=4, row_sum="rounded", split_format=dtype), Schedule(exp2=True)
        )
        yield EmulatedAttention(replace(default, merge_every=7, tile=2))
        yield EmulatedAttention(
            replace(default, splits=4, split_format="bfloat16", probabilities="float32", output="float32")
        )
        yield EmulatedAttention(replace(default, row_sum="lse"))
        yield EmulatedAttention(replace(default, row_sum="lse", splits=3), Schedule(exp2=True))
        yield EmulatedAttention(replace(default, splits=5, merge_shares="sigmoid"))
        yield EmulatedAttention(replace(default, merge_every=7, merge_shares="sigmoid", tile=2), Schedule(reverse=True))
        yield EmulatedAttention(replace(default, tile=16), Schedule(clamp=True))
        yield EmulatedAttention(replace(default, operand_roundings=4))
        yield EmulatedAttention(replace(default, value=Accumulator(format=dtype)), Schedule(stepwise=True))
        yield EmulatedAttention(replace(default, score_format="bfloat16", score_roundings=2))
        yield EmulatedAttention(
            replace(default, score_format="bfloat16", score_roundings=2, row_sum="rounded", tile=16)
        )
    for operands, parts, rounding in (
        ("tfloat32", 1, "nearest"),
        ("tfloat32", 1, "truncate"),
        ("tfloat32", 2, "nearest"),
        ("bfloat16", 1, "nearest"),
        ("bfloat16", 2, "truncate"),
        ("bfloat16", 3, "nearest"),
    ):
        products = Accumulator(operands=operands, operand_parts=parts, operand_rounding=rounding)
        yield EmulatedAttention(Profile.default("float32", score=products, value=products))
    for sharing in ("tensor", "token", "head"):
        query = {"query": "float8_e4m3fn", "query_scale": sharing}
        yield EmulatedAttention(Profile.default("bfloat16", **query))
        yield EmulatedAttention(Profile.default("float32", tile=16, splits=3, **query), Schedule(exp2=True))
    for dtype in ("float16", "bfloat16"):
        yield EmulatedAttention(Profile.default(dtype, query=dtype, query_times_scale=True))
    coarse = {"probabilities": "float8_e4m3fn", "probabilities_scale": 256.0}
    yield EmulatedAttention(Profile.default("bfloat16", tile=16, **coarse))
    yield EmulatedAttention(Profile.default("bfloat16", row_sum="rounded", **coarse))
    yield EmulatedAttention(Profile.default("float64"))
    yield EmulatedAttention(Profile.default("float64", tile=5, splits=2))
    yield EmulatedAttention(Profile.default("float64", probabilities="bfloat16", output="bfloat16"))
    yield EmulatedAttention(Profile.default("bfloat16", lse="bfloat16", probabilities="float16"))


def _name(kernel: EmulatedAttention) -> str:
    schedule = kernel.schedule
    return kernel.profile.describe() + ", exp2" * schedule.exp2 + ", stepwise" * schedule.stepwise


KERNELS = {_name(kernel): kernel for kernel in profile_kernels()}


@dataclass(frozen=True)
class Inputs:
    """Operands, exactly representable in their format."""

    q: Array
    k: Array
    v: Array
    scale: float
    seqlen: int


def inputs(seed: int, dtype: str, logit_std: float, t: int | None = None, v_mean: float | None = None) -> Inputs:
    """One case; the shapes, the values' mean, ties and outliers vary with the seed."""
    rng = np.random.default_rng(seed)
    s, h, d, dv = 2, 2, int(rng.choice([4, 16, 40])), 5
    t = int(rng.choice([1, 2, 9, 33, 64])) if t is None else t
    g = int(rng.choice([1, 2]))
    q, k, v = rng.standard_normal((s, h, d)), rng.standard_normal((t, g, d)), rng.standard_normal((t, g, dv))
    v += float(rng.choice([0.0, 1.0, 30.0])) if v_mean is None else v_mean
    if seed % 3 == 1 and t > 4:
        k[rng.integers(t)] = k[0]  # ties
        v[rng.integers(t)] *= 20
    scale = d**-0.5
    q *= logit_std
    seqlen = t if seed % 4 else max(t - 3, 0)
    return Inputs(*(round_to(x, dtype) for x in (q, k, v)), scale, seqlen)


def attend(kernel: EmulatedAttention, case: Inputs, **options: Any) -> tuple[Array, Array]:
    """(out [s, h, dv], lse [h, s]) of the kernel; ``options`` replace arguments."""
    arguments = {"softmax_scale": case.scale, "cache_seqlens": case.seqlen} | options
    return kernel.attend(case.q, case.k, case.v, **arguments)


def bounded(case: Inputs, profile: Profile, **options: Any) -> BoundedAttention:
    return attention_with_bound(
        case.q,
        case.k,
        case.v,
        softmax_scale=case.scale,
        profile=profile,
        cache_seqlens=case.seqlen,
        **options,
    )


def one_row(seed: int, logit_std: float, t: int, d: int = 8, two_valued: bool = False) -> Inputs:
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((1, 1, d)) * logit_std, rng.standard_normal((t, 1, d))
    v = rng.standard_normal((t, 1, 4)) + rng.choice([0.0, 3.0])
    if two_valued:
        k = np.broadcast_to(k[0], k.shape)
        v = np.broadcast_to(np.where(np.arange(t) % 2, 1.0, -1.0)[:, None, None], v.shape)
    return Inputs(q, k, v, d**-0.5, t)


def spread(t: int, mean: float = 1.0) -> Inputs:
    """Equal scores and values of small spread around a mean: the most that rounding can show."""
    rng = np.random.default_rng(7)
    v = round_to(mean + rng.standard_normal((t, 1, 32)) / 16, "bfloat16")
    q = round_to(rng.standard_normal((2, 2, 8)), "bfloat16")
    k = round_to(rng.standard_normal((t, 1, 8)) / 16, "bfloat16")
    return Inputs(q, k, v, 1.0, t)


def excess(got: Array, want: Array, bound: ErrorBound) -> float:
    """The largest error as a multiple of the bound; rows without keys must be exact."""
    empty = np.isneginf(want)
    assert (np.isneginf(got) == empty).all()
    error = np.abs(np.where(empty, 0, got) - np.where(empty, 0, want))
    total = bound.total
    assert not np.isnan(total).any()
    return float(np.where(error > 0, error / np.maximum(total, 5e-324), 0).max(initial=0))


def excesses(kernel: EmulatedAttention, case: Inputs, profile: Profile | None = None) -> tuple[float, float]:
    """Of out and of lse, judged by ``profile`` or by the kernel's own."""
    out, lse = attend(kernel, case)
    want = bounded(case, profile or kernel.profile)
    return excess(out, want.out, want.out_error), excess(lse, want.lse, want.lse_error)
