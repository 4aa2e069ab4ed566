"""Whether honest kernels stay within the bounds: attention is emulated in random low-precision arithmetic and judged.

Every case draws a preset profile, often changed in several fields, a schedule, shapes and values. A kernel that does what
its profile says must never leave the worst-case bound. The probable bound may fail, with the probability it states.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.kernel_presets import all_presets
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.proof.emulated import EmulatedAttention, Schedule
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.formats import Rounding, format_of, round_to
from mla_spec.reference.typing import Array
from mla_spec.text.table import format_table

LOGIT_STDS = (0.01, 0.1, 1.0, 4.0, 16.0, 64.0, 256.0, 1e3, 1e4)
REGIMES = ("typical", "outlier", "ties", "offset", "sink", "negative")
SIZES = {
    # name: (share, most latent dims, most rope dims, most heads, most queries, most sequences, longest sequence)
    "small": (0.9, 32, 8, 4, 3, 2, 96),
    "medium": (0.06, 128, 16, 4, 2, 2, 512),
    "published": (0.02, 512, 64, 4, 1, 1, 128),
    "long": (0.02, 16, 8, 2, 1, 1, 4096),
}
QUERIES: tuple[dict[str, Any], ...] = (
    *({"query": "float8_e4m3fn", "query_scale": sharing} for sharing in ("tensor", "token", "head")),
    {"query": "bfloat16", "query_times_scale": True},
)
"""How a query may be rounded."""
MOST_FOR_A_ROUNDED_MAXIMUM = 64.0
"""Standard deviation of the scores: exp of what the rounding of larger ones moves would overflow."""
CHUNK = 25
"""Cases that a process takes at a time."""


@dataclass(frozen=True)
class HonestCase:
    """One emulated kernel and what it is given."""

    index: int
    preset: str
    profile: Profile
    schedule: dict[str, Any]
    inputs: DecodeCase

    def describe(self) -> str:
        """All that the case consists of, in one line."""
        schedule = "".join(f", {name}" for name, value in self.schedule.items() if value)
        return f"{self.profile.describe()}{schedule}; {self.inputs.id}"


def draw_case(seed: int, index: int) -> HonestCase:
    """Case ``index`` of a run with ``seed``; equal numbers give equal cases."""
    rng = np.random.default_rng([seed, index])
    presets = all_presets()
    name = str(rng.choice(list(presets)))
    size = str(rng.choice(list(SIZES), p=[share for share, *_ in SIZES.values()]))
    profile = presets[name]
    if rng.random() < 0.75:
        profile = _varied(profile, rng)
    schedule = {
        "exp2": bool(rng.random() < 0.5),
        "stepwise": bool(size == "small" and rng.random() < 0.3),
        "reverse": bool(rng.random() < 0.3),
        "shares_from_lse": bool(rng.random() < 0.5) and profile.merge_shares == "unnormalised",
        "exp_bias": float(rng.choice([0.0, 1.0, -1.0])),
    }
    inputs = _inputs(profile, size, rng)
    wide = profile.probabilities_scale == 1 and format_of(profile.value.format).max_finite > 1e5
    able = wide and inputs.logit_std <= MOST_FOR_A_ROUNDED_MAXIMUM
    if able and np.random.default_rng([seed, index, 1]).random() < 0.15:
        profile = replace(profile, maximum="bfloat16")
    return HonestCase(index, name, profile, schedule, inputs)


def _varied(profile: Profile, rng: np.random.Generator) -> Profile:
    """The profile with some fields drawn anew; what is more precise than the inputs' format stays so."""
    wide = "float64" if profile.dtype == "float64" else "float32"
    accumulators = [Accumulator(format=wide), Accumulator(format=wide, order="blocked", block=int(rng.choice([8, 16])))]
    if wide == "float32":
        accumulators.append(Accumulator(order="tensor-core", block=int(rng.choice([1, 4, 8, 16])), fraction_bits=25))
        accumulators.append(Accumulator(order="tensor-core", block=16, fraction_bits=13))
        accumulators.append(Accumulator(format=profile.dtype))
        operands, parts = str(rng.choice(["tfloat32", "bfloat16"])), int(rng.integers(1, 4))
        rounding: Rounding = "nearest" if rng.random() < 0.5 else "truncate"
        accumulators.append(Accumulator(operands=operands, operand_parts=parts, operand_rounding=rounding))
    choices: dict[str, list[Any]] = {
        "tile": [None, 16, 32, 64, 128, 256],  # multiples of every block
        "splits": [1, 2, 3, 7, 16, 64],
        "probabilities": [wide, "bfloat16", "float16"],
        "row_sum": ["unrounded", "rounded", "normalised", "lse"],
        "merge_shares": ["unnormalised", "normalised", "sigmoid"],
        "score": accumulators,
        "value": accumulators,
        "output_rounding": ["nearest", "truncate"],
        "split_format": [wide, profile.dtype],
        "operand_roundings": [0, 4],
        "lse": [wide, profile.dtype],
    }
    changes = {name: values[rng.integers(len(values))] for name, values in choices.items() if rng.random() < 0.4}
    if profile.dtype != "float64" and rng.random() < 0.15:
        changes |= {"probabilities": "float8_e4m3fn", "probabilities_scale": float(rng.choice([1.0, 256.0]))}
    if profile.dtype != "float64" and rng.random() < 0.25:
        changes |= QUERIES[rng.integers(len(QUERIES))]
    return replace(profile, **changes)


def _inputs(profile: Profile, size: str, rng: np.random.Generator) -> DecodeCase:
    _, c, r, h, s, b, longest = SIZES[size]
    if size != "published":
        c, r = int(rng.integers(1, c + 1)), 2 * int(rng.integers(0, r // 2 + 1))
    first = 2048 if size == "long" else 0
    s = int(rng.integers(1, s + 1))
    # Scores in a format that ends at 65504 must not overflow: no profile speaks of that.
    ends = [format_of(name).max_finite for name in (profile.score.format, profile.score_format, profile.lse)]
    largest = 64.0 if min(ends) < 1e5 else np.inf
    return DecodeCase(
        dtype=profile.dtype,
        seed=int(rng.integers(2**32)),
        seqlens=tuple(int(n) for n in rng.integers(first, longest + 1, int(rng.integers(1, b + 1)))),
        s=s,
        num_heads=int(rng.integers(1, h + 1)),
        kv_lora_rank=c,
        qk_rope_head_dim=r,
        page_size=64,
        causal=bool(rng.random() < 0.5),
        logit_std=float(rng.choice([std for std in LOGIT_STDS if std <= largest])),
        regime=str(rng.choice(REGIMES)),
    )


@dataclass(frozen=True)
class Ratios:
    """Errors of the elements of out or lse of one case, as multiples of a bound."""

    worst: float
    elements: int
    outside: int

    @classmethod
    def of(cls, got: Array, want: Array, bound: Array) -> Ratios:
        """Of arrays of equal shape; infinities must agree."""
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.where(np.isinf(want) & (got == want), 0.0, np.abs(got - want))
            ratio = np.where(error == 0, 0.0, error / np.maximum(bound, np.finfo(float).tiny))
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        return cls(float(ratio.max(initial=0.0)), got.size, int((ratio > 1).sum()))

    @classmethod
    def of_probable(cls, got: Array, want: Array, bound: BoundedAttention, what: str) -> Ratios:
        """Of those elements whose probable bound is below the worst case."""
        worst, probable = (getattr(bound, f"{what}_error{kind}").total for kind in ("", "_probable"))
        used = probable < worst
        return cls.of(got[used], want[used], probable[used])


@dataclass(frozen=True)
class Judged:
    """What came of one case."""

    index: int
    preset: str
    out: Ratios
    lse: Ratios
    out_probable: Ratios
    lse_probable: Ratios
    seconds: float


def judge_case(case: HonestCase) -> Judged:
    """Emulate the kernel and compare it with the exact result, by every bound."""
    start = time.perf_counter()
    inputs = case.inputs.build()
    rows = gather_rows(inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)[:, :, None]  # [b, t, 1, c+r]
    if case.profile.cache_dequantised is not None:
        rows = _quantised(rows, inputs.head_dim_v)
    arguments: dict[str, Any] = {
        "q": inputs.q,
        "k": rows,
        "v": rows[..., : inputs.head_dim_v],
        "softmax_scale": inputs.softmax_scale,
        "cache_seqlens": inputs.cache_seqlens,
        "causal": inputs.causal,
    }
    kernel = EmulatedAttention(case.profile, Schedule(**case.schedule))
    out, lse = kernel.attend(**arguments)
    want = attention_with_bound(**arguments, profile=case.profile, probable=True)
    return Judged(
        case.index,
        case.preset,
        Ratios.of(out, want.out, want.out_error.total),
        Ratios.of(lse, want.lse, want.lse_error.total),
        Ratios.of_probable(out, want.out, want, "out"),
        Ratios.of_probable(lse, want.lse, want, "lse"),
        time.perf_counter() - start,
    )


def _quantised(rows: Array, latent: int) -> Array:
    """Rows whose latent part went through float8_e4m3fn with a scale per row that is no power of two."""
    c = rows[..., :latent]
    scale = round_to(np.maximum(np.abs(c).max(axis=-1, keepdims=True), 1.0) / 448, "float32")
    return np.concatenate([round_to(c / scale, "float8_e4m3fn") * scale, rows[..., latent:]], axis=-1)


RESULTS = ("out", "lse", "out_probable", "lse_probable")

HEADER = ("preset", "cases", "elements", "outside", "out max", "median", "lse max", "median")
HEADER_PROBABLE = ("probable elements", "outside", "max", "seconds")


def _row(name: str, judged: list[Judged]) -> tuple[str, ...]:
    out, lse, *probable = ([getattr(j, result) for j in judged] for result in RESULTS)
    likely = [ratios for each in probable for ratios in each]
    return (
        name,
        str(len(judged)),
        str(sum(r.elements for r in out + lse)),
        str(sum(r.outside for r in out + lse)),
        *(f"{figure(r.worst for r in each):.3f}" for each in (out, lse) for figure in (max, median)),
        str(sum(r.elements for r in likely)),
        str(sum(r.outside for r in likely)),
        f"{max(r.worst for r in likely):.3f}",
        f"{sum(j.seconds for j in judged):.1f}",
    )


def run_soundness(
    cases: int,
    *,
    seed: int = 0,
    first: int = 0,
    jobs: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Judged]:
    """Judge cases ``first`` .. ``first + cases - 1`` in ``jobs`` processes; Ctrl-C ends the run and keeps what is done.

    Args:
        progress: called with the number of cases done.
    """
    chunks = [(seed, i, min(i + CHUNK, first + cases)) for i in range(first, first + cases, CHUNK)]
    done: list[Judged] = []
    try:
        with _mapper(jobs) as map_chunks:
            for judged in map_chunks(_judge_chunk, chunks):
                done += judged
                progress(len(done))
    except KeyboardInterrupt:
        pass
    return done


def _judge_chunk(chunk: tuple[int, int, int]) -> list[Judged]:
    seed, first, end = chunk
    return [judge_case(draw_case(seed, index)) for index in range(first, end)]


@contextmanager
def _mapper(jobs: int) -> Iterator[Any]:
    if jobs == 1:
        yield map
        return
    # Ctrl-C reaches every process of a terminal, and is for the one that collects.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("spawn").Pool(jobs, signal.signal, ignore) as pool:
        yield pool.imap_unordered


def report(judged: list[Judged], seed: int) -> str:
    """The table by preset, and the cases that came closest to a bound with the commands that repeat them.

    A median is that of the cases' largest error / bound.
    """
    if not judged:
        return "no case is done"
    by_preset = {name: [j for j in judged if j.preset == name] for name in all_presets()} | {"all": judged}
    rows = [_row(name, those) for name, those in by_preset.items() if those]
    lines = [format_table([HEADER + HEADER_PROBABLE, *rows]), ""]
    for what in RESULTS:
        worst = max(judged, key=lambda j: getattr(j, what).worst)
        lines.append(f"largest error / bound of {what.replace('_', ', ')}: {getattr(worst, what).worst:.3f}")
        lines.append(f"  {draw_case(seed, worst.index).describe()}")
        lines.append(f"  replay: mla-spec soundness --cases 1 --seed {seed} --first {worst.index}")
    return "\n".join(lines)


def exit_code(judged: list[Judged], cases: int) -> int:
    """0 if all of ``cases`` are judged and within their bounds, 1 if an element is outside, 3 if cases are missing."""
    if any(getattr(j, result).outside for j in judged for result in RESULTS):
        return 1
    return 0 if len(judged) == cases else 3
