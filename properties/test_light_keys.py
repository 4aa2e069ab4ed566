"""Laws of a few keys against thousands that weigh e^-8 each, together about as much.

The two groups have values of opposite sign, so that an output is the small difference of two large sums: a wrong score, a wrong
scale or lost keys move it far beyond what rounding may, in any format and without an LSE. Queries and keys have two elements that
are not 0, so that the bound needs no reference of the full width.
"""

from __future__ import annotations

import numpy as np

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs
from mla_spec.properties.fixed.counts import ELEMENTS, latent_dims, nearest
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.supports import Supports

BELOW = 8.0
"""By how much a light key scores less."""

LENGTHS = (4096, 4161, 32768)
"""Keys of a sequence: whole parts of any kernel, and a few more."""

MOST = 32 * ELEMENTS
"""Elements of the rows that a case reads, at most."""

SIZES = 4
"""Values are 1, 2, 3 and 4, or as much below 0."""


def _needs_values(supports: Supports) -> str:
    return "" if latent_dims(supports)[0] > 1 else "a latent of one element is all key and no value"


def _cases(supports: Supports, profile: Profile) -> list[DecodeCase]:
    c, r = latent_dims(supports)
    return [
        DecodeCase(
            dtype=profile.dtype,
            seed=seed,
            seqlens=(length,),
            s=1,
            num_heads=nearest(supports.num_heads, 2),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=nearest(supports.page_sizes, (64, 16)[seed % 2]),
            causal=supports.causal[seed % len(supports.causal)],
        )
        for seed, length in enumerate(LENGTHS)
        if length * (c + r) <= MOST
    ]


def _scores(case: DecodeCase, heavy: Array) -> Array:
    """What decides the score of each key, [t, 2]: an element of the latent, and one of the rope part where there is one."""
    light = np.array([BELOW / 2, BELOW / 2]) if case.qk_rope_head_dim else np.array([BELOW, 0.0])
    scores: Array = np.where(heavy[:, None], 0.0, -light)
    return scores


def _inputs(case: DecodeCase, scores: Array, values: Array) -> DecodeInputs:
    """One sequence in pages in random order; each of its heads has the same query."""
    (t,), c, d = case.seqlens, case.kv_lora_rank, case.kv_lora_rank + case.qk_rope_head_dim
    pages = -(-t // case.page_size)
    rows = np.zeros((pages * case.page_size, d))
    rows[:t, : c - 1] = values
    rows[:t, c - 1] = scores[:, 0]
    if case.qk_rope_head_dim:
        rows[:t, d - 1] = scores[:, 1]
    order: IntArray = np.random.default_rng([case.seed, 41]).permutation(pages).astype(np.int32)
    cache = np.empty((pages, case.page_size, 1, d))
    cache[order] = rows.reshape(pages, case.page_size, 1, d)
    q = np.zeros((1, 1, case.num_heads, d))
    q[..., c - 1] = q[..., d - 1] = 1.0
    return DecodeInputs(
        q=q,
        kv_cache=cache,
        block_table=order[None],
        cache_seqlens=np.array(case.seqlens, dtype=np.int32),
        head_dim_v=c,
        softmax_scale=1.0,
        causal=case.causal,
    )


@law(needs=DECODE, cases=_cases, missing=_needs_values)
def test_decode_weighs_many_light_keys(run: Run, case: DecodeCase) -> None:
    """A few keys and thousands that score 8 less, half of it by their rope part, balance as their scores and numbers say."""
    (t,) = case.seqlens
    few = max(1, round(t * np.exp(-BELOW)))
    heavy = np.zeros(t, dtype=bool)
    heavy[np.random.default_rng([case.seed, 42]).permutation(t)[:few]] = True
    scores, sign = _scores(case, heavy), np.where(heavy, 1.0, -1.0)
    size = 1.0 + np.arange(case.kv_lora_rank - 1) % SIZES
    out, lse = run.call(DECODE, _inputs(case, scores, sign[:, None] * size))
    want = attention_with_bound(
        np.ones((1, 1, 2)),
        scores[:, None],
        (sign[:, None] * (1.0 + np.arange(SIZES)))[:, None],
        softmax_scale=1.0,
        profile=run.profile,
    )
    index = np.arange(case.kv_lora_rank - 1) % SIZES
    run.compares(out.value[..., :-1].size)
    off = np.abs(out.value[..., :-1] - want.out[0, 0, index]) / want.out_error.total[0, 0, index]
    worst = float(np.nanmax(off)) if not np.isnan(off).any() else np.inf
    if run.worst is None or worst > run.worst:
        run.worst, run.worst_case = worst, run.case_id
    first = out.value[0, 0, 0, 0]
    run.require(
        worst <= 1,
        f"out is {worst:.3g} times as far off as it may be: got {float(first)!r}, want {float(want.out[0, 0, 0])!r} within "
        f"{float(want.out_error.total[0, 0, 0]):.2g}, since {few} keys of {t} score {BELOW} more than the others; "
        "a wrong scale, a part of the score that is ignored, or keys that are lost do this",
    )
    if lse is not None:
        ((score,),), ((bound,),) = want.lse, want.lse_error.total
        run.require(
            bool((np.abs(lse.value - score) <= bound).all()),
            f"LSE: got {lse.value.ravel()[:1]}, want {float(score)!r} within {float(bound):.3g}",
        )
