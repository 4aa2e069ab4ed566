"""Laws of ``decode`` with one right answer, bit for bit, in any format, order and tiling.

Scores are chosen so that every weight is 1, 0 or a power of two, and values are small integers: no rounding happens before
the output's own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs, decode_expected
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Result
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import NotOffered

LEAD = 1024.0
"""By how much a winning score leads: exp(-1024) is 0 in float64 and in anything narrower."""

LOSERS = 2.0**20
"""Weights of losing keys, each times its value, of any case, at most."""


def _needs_rope(supports: Supports) -> str:
    dims = supports.latent_dims
    return "" if dims is None or any(r > 0 for _, r in dims) else "decode has no rope dims"


def _integer_inputs(case: DecodeCase) -> DecodeInputs:
    """The case's paging, with small integers for latents, zero rope rows and zero queries; softmax_scale 1."""
    inputs = case.build()
    rng = np.random.default_rng([case.seed, 3])
    cache = rng.integers(-8, 9, inputs.kv_cache.shape).astype(float)
    cache[..., case.kv_lora_rank :] = 0.0
    return replace(inputs, q=np.zeros_like(inputs.q), kv_cache=cache, softmax_scale=1.0)


def _slots(inputs: DecodeInputs, tokens: IntArray) -> tuple[IntArray, IntArray]:
    """Page and row of one token of each sequence."""
    page_size = inputs.kv_cache.shape[1]
    table = inputs.block_table[np.arange(len(tokens)), tokens // page_size]
    return table, tokens % page_size


def _targets(case: DecodeCase) -> list[IntArray]:
    """Tokens that some query sees: the first, those around the first page boundary, and the last that all queries see."""
    last = np.array(case.seqlens) - (case.s if case.causal else 1)
    wanted = (0, case.page_size - 1, case.page_size, max(case.seqlens))
    return [np.minimum(token, last) for token in wanted]


def _require_exact(run: Run, got: Result, want: Array, profile: Profile, why: str) -> None:
    """Bit for bit, but for the weights of losing keys, which may be the smallest normal number instead of 0."""
    rounded = round_to(want, profile.output)
    different = ~(np.abs(got.value - rounded) <= LOSERS * format_of(profile.softmax).smallest_normal)
    if different.any():
        index = tuple(int(i) for i in np.argwhere(different)[0])
        run.require(
            False,
            f"{got.what}{list(index)}: got {float(got.value[index])!r}, want exactly {float(rounded[index])!r}: {why}\n"
            f"{int(different.sum())} of {different.size} elements differ; nothing may be rounded here",
        )


def _check_one_hot(run: Run, case: DecodeCase, channel: int, query: float, winning: float, losing: float) -> None:
    """All queries hold ``query`` in one channel, and keys ``losing`` but for one key in turn, which holds ``winning``."""
    inputs = _integer_inputs(case)
    inputs.q[..., channel] = query
    score = query * winning
    for target in _targets(case):
        cache = inputs.kv_cache.copy()
        cache[..., channel] = losing
        cache[(*_slots(inputs, target), 0, channel)] = winning
        called = replace(inputs, kv_cache=cache)
        out, lse = run.call(DECODE, called)
        value = cache[_slots(inputs, target)][:, 0, : case.kv_lora_rank]  # [b, c]
        want = np.broadcast_to(value[:, None, None], out.value.shape)
        ring = run.profile.merge_shares == "sigmoid" and run.profile.merges(max(case.seqlens))
        if ring or run.profile.maximum is not None:
            expected = decode_expected(called, run.profile)  # out − 1 · (out − part) is rounded, and so is p · v / p
            run.within(out, expected.out, expected.out_error, gate=False)
            if lse is not None:
                run.within(lse, expected.lse, expected.lse_error, gate=False)
            continue
        _require_exact(run, out, want, run.profile, f"only token {list(target)} has weight")
        if lse is not None:
            # A rounded query, of which one element meets the keys, is off by a roundoff of its own, and so is the score.
            u = format_of(run.profile.query).unit_roundoff if run.profile.query else 0.0
            off = np.abs(lse.value - score)
            run.require(
                bool((off <= 1.1 * u * abs(score)).all()),
                f"lse must be {'exactly ' * (u == 0)}{score} where one key has all the weight, got {lse.value.min()} .. {lse.value.max()}",
            )


@law(needs=DECODE, cases=narrowed(decode_cases, min_length=4, max_s=4, regimes=("typical",), logit_stds=(1.0,)))
def test_decode_one_hot_by_the_latent_part(run: Run, case: DecodeCase) -> None:
    """A key that leads by its latent part alone gives exactly its value, and its score as LSE."""
    _check_one_hot(run, case, case.kv_lora_rank - 1, query=LEAD / 32, winning=32.0, losing=0.0)


@law(needs=DECODE, cases=narrowed(decode_cases, min_length=4, max_s=4, regimes=("typical",), logit_stds=(1.0,)))
def test_decode_one_hot_far_below_zero(run: Run, case: DecodeCase) -> None:
    """A key whose score of -65536 is the largest of its row gives exactly its value: no number stands for -inf.

    Says nothing of profiles that keep scores in float16, which has no such numbers.
    """
    if format_of(run.profile.score_format).max_finite <= 2 * 65536:
        raise NotOffered(f"scores in {run.profile.score_format} hold no such number")
    _check_one_hot(run, case, case.kv_lora_rank - 1, query=-LEAD / 0.5, winning=32.0, losing=32.5)


@law(
    needs=DECODE,
    cases=narrowed(decode_cases, min_length=4, max_s=4, min_rope=2, regimes=("typical",), logit_stds=(1.0,)),
    missing=_needs_rope,
)
def test_decode_one_hot_by_the_rope_part(run: Run, case: DecodeCase) -> None:
    """A key that leads by its rope part alone gives exactly its value, and its score as LSE."""
    channel = case.kv_lora_rank + case.seed % case.qk_rope_head_dim
    _check_one_hot(run, case, channel, query=LEAD / 32, winning=32.0, losing=0.0)


@law(needs=DECODE, cases=narrowed(decode_cases, min_length=5, max_s=4, regimes=("typical",), logit_stds=(1.0,)))
def test_decode_two_equal_maxima_give_their_mean(run: Run, case: DecodeCase) -> None:
    """Two keys that lead together weigh one half each, wherever they are: exactly the mean of their values.

    Where parts are merged by LSE, whose exponentials round, the two are in the first part.
    """
    inputs = _integer_inputs(case)
    channel = case.kv_lora_rank - 1
    inputs.q[..., channel] = LEAD / 32
    inputs.kv_cache[..., channel] = 0.0
    last = np.array(case.seqlens) - (case.s if case.causal else 1)
    pair = (np.zeros_like(last), np.minimum(last, (run.profile.merge_every or last.max() + 1) - 1))
    for token in pair:
        inputs.kv_cache[(*_slots(inputs, token), 0, channel)] = 32.0
    out, _ = run.call(DECODE, inputs)
    if not run.profile.averages_exactly:
        want = decode_expected(inputs, run.profile)
        run.within(out, want.out, want.out_error, gate=False)
        return
    values = [inputs.kv_cache[_slots(inputs, token)][:, 0, : case.kv_lora_rank] for token in pair]  # [b, c]
    mean = np.broadcast_to(((values[0] + values[1]) / 2)[:, None, None], out.value.shape)
    _require_exact(run, out, mean, run.profile, "tokens 0 and the last that all queries see have equal weight")


@law(needs=DECODE, cases=narrowed(decode_cases, min_length=4, max_s=4, regimes=("typical",), logit_stds=(1.0,)))
def test_decode_equal_scores_give_the_mean(run: Run, case: DecodeCase) -> None:
    """A zero query averages: over 2^k keys with integer values, exactly, rounded once to the output's format.

    Where parts are merged by LSE, whose exponentials round, sequences are no longer than a part.
    """
    part = run.profile.merge_every or max(case.seqlens)
    lengths = tuple(2 ** int(np.log2(min(n, part))) for n in case.seqlens)
    case = replace(case, seqlens=lengths, s=1)
    inputs = _integer_inputs(case)
    out, _ = run.call(DECODE, inputs)
    if not run.profile.averages_exactly:
        want = decode_expected(inputs, run.profile)
        run.within(out, want.out, want.out_error, gate=False)
        return
    page_size = inputs.kv_cache.shape[1]
    for i, length in enumerate(lengths):
        token = np.arange(length)
        rows = inputs.kv_cache[inputs.block_table[i, token // page_size], token % page_size, 0]
        mean = np.broadcast_to(rows[:, : case.kv_lora_rank].mean(axis=0), out.value[i].shape)
        _require_exact(run, out[i], mean, run.profile, f"sequence {i} has {length} keys of equal score")
