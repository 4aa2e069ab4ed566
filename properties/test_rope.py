"""Laws of the operation ``rope``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis.strategies import SearchStrategy

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.operand_rounding import InheritedError
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.rope import rope_with_bound
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs
from mla_spec.operations.rope import OPERATION as ROPE
from mla_spec.operations.rope import RopeCase, RopeInputs
from mla_spec.properties.repeated import judge_repeated
from mla_spec.properties.strategies.decode import DECODE_REGIMES, decode_cases
from mla_spec.properties.strategies.rope import options, rope_cases
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.config import RopeConfig
from mla_spec.reference.rope import half_from_interleaved
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Result, Results, computed
from mla_spec.subjects.supports import Supports


def _expected(run: Run, x: Array, positions: IntArray, case: RopeCase) -> tuple[Array, ErrorBound]:
    return rope_with_bound(x, positions, case.rope, run.profile.rope, output=case.dtype)


def _rotated(run: Run, x: Array, positions: IntArray, case: RopeCase) -> Result:
    """x as the subject rotates it."""
    got: Result = run.call(ROPE, RopeInputs(x, positions, case.rope)).out
    return got


@law(needs=ROPE, cases=rope_cases, first=options)
def test_rope_agrees_with_reference(run: Run, case: RopeCase) -> None:
    """Rotation of every pair by position · frequency, with and without a head axis."""
    (x,) = case.vectors(1)
    run.within(_rotated(run, x, case.positions(), case), *_expected(run, x, case.positions(), case))


@law(needs=ROPE, cases=rope_cases)
def test_rope_takes_positions_in_any_order(run: Run, case: RopeCase) -> None:
    """Positions that jump, go back, repeat and begin anew, as of packed or drafted tokens, are each their token's own."""
    (x,) = case.vectors(1)
    positions = case.positions()
    rng = np.random.default_rng([case.seed, 15])
    positions = rng.choice(np.append(positions.ravel(), 0), positions.shape)
    run.within(_rotated(run, x, positions, case), *_expected(run, x, positions, case), gate=False)


@law(needs=ROPE, cases=rope_cases)
def test_rope_depends_on_relative_position_only(run: Run, case: RopeCase) -> None:
    """⟨rope(q, m + a), rope(k, n + a)⟩ is the same for every common shift a."""
    q, k = case.vectors(2)
    m, n = case.positions(), case.positions() + 7

    def product(shift: int) -> tuple[Array, Array]:
        """The product and its worst-case error."""
        rotated_q, rotated_k = (_rotated(run, x, p + shift, case).value for x, p in ((q, m), (k, n)))
        exact_q, bound_q = _expected(run, q, m + shift, case)
        exact_k, bound_k = _expected(run, k, n + shift, case)
        e_q, e_k = bound_q.total, bound_k.total
        error = e_q * (np.abs(exact_k) + e_k) + np.abs(exact_q) * e_k
        return (rotated_q * rotated_k).sum(-1), error.sum(-1)

    here, error = product(0)
    there, error_there = product(case.shift)
    shifted = computed(there, f"⟨rope(q), rope(k)⟩ after a shift by {case.shift}")
    rounding = 2 * case.dim * 2.0**-53 * (np.abs(q) * np.abs(k)).sum(-1) * case.rope.cos_sin_factor**2
    bound = ErrorBound({"rotation before and after the shift": error + error_there, "float64 sums": 4 * rounding})
    run.within(shifted, here, bound, gate=False)


def _wide_head(supports: Supports, profile: Profile) -> list[RopeCase]:
    """One head of 1040 tokens."""
    return [RopeCase(dtype=profile.dtype, s=1040, heads=1, dim=64, layout=supports.rope_layouts[0], start=3)]


@law(needs=ROPE, cases=_wide_head, live="tensors")
def test_rope_of_many_wide_heads(run: Run, case: RopeCase) -> None:
    """1040 tokens of 128 heads of 64 elements, all heads alike, are each rotated as one head is."""
    judge_repeated(run, ROPE, case.build(), "x", 128, axis=2)


def _needs_rope_dims(supports: Supports) -> str:
    dims = supports.latent_dims
    return "" if dims is None or any(r > 0 for _, r in dims) else "decode has no rope dims"


def _rotated_cases(supports: Supports, profile: Profile) -> SearchStrategy[DecodeCase]:
    """Cases of decode with rope dims; a sink with small scores, for its rotation rounds it by more than it leaves the others."""
    others = tuple(regime for regime in DECODE_REGIMES if regime != "sink")
    most: SearchStrategy[DecodeCase] = decode_cases(
        supports, profile, min_rope=2, logit_stds=(1.0, 0.1), regimes=others
    )
    sinks: SearchStrategy[DecodeCase] = decode_cases(
        supports, profile, min_rope=2, logit_stds=(0.1,), regimes=("sink",)
    )
    return most | sinks


@law(
    needs=(ROPE, DECODE),
    cases=_rotated_cases,
    missing=_needs_rope_dims,
    cost=2,
)
def test_decode_depends_on_relative_positions_only(run: Run, case: DecodeCase) -> None:
    """Queries and cached keys that the subject rotates, all positions moved by as much, decode to the same."""
    inputs = case.build()
    rope = RopeConfig(dim=case.qk_rope_head_dim, interleaved=run.supports.rope_layouts[0] == "interleaved")
    edge = (512, 1024, 4096)[case.seed % 3]  # where a table may end: keys are moved to both sides of it
    results = [_decoded(run, inputs, rope, shift) for shift in (0, edge - max(case.seqlens) // 2)]
    (here, want), (there, _) = results
    run.meaningful(want.out, want.out_error)
    errors = [(exact.out_error, exact.lse_error) for _, exact in results]
    for a, b, *bounds in zip(here, there, *errors, strict=True):
        if a is not None and b is not None:
            run.require(not np.isnan(a.value).any(), f"{a.what} has NaN")
            both = bounds[0].plus("the same at moved positions", bounds[1].total)
            run.within(b, a.value, both, gate=False)


def _decoded(run: Run, inputs: DecodeInputs, rope: RopeConfig, shift: int) -> tuple[Results, BoundedAttention]:
    """Decode of queries and keys that the subject rotates, token t to position t + shift; and what is exact."""
    c, (b, s), page_size = inputs.head_dim_v, inputs.q.shape[:2], inputs.kv_cache.shape[1]
    rows = gather_rows(inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)[:, :, None]  # [b, t, 1, c+r]
    key = np.arange(rows.shape[1]) + np.zeros((b, 1), dtype=int)
    query = np.maximum(inputs.cache_seqlens[:, None] - s + np.arange(s), 0)
    operands = []
    for x, positions in ((inputs.q, query), (rows, key)):
        part, positions = x[..., c:], positions + shift
        exact, bound = rope_with_bound(part, positions, rope, run.profile.rope, output=run.driver.dtype)
        got = run.call(ROPE, RopeInputs(part, positions, rope)).out.value
        joined = [np.concatenate([x[..., :c], y], axis=-1) for y in (got, exact)]
        operands.append((*joined, np.concatenate([0 * x[..., :c], bound.total], axis=-1)))
    (q, exact_q, q_error), (stored, exact_rows, row_error) = operands
    pages = -(-rows.shape[1] // page_size)
    padded = np.zeros((b, pages * page_size, *rows.shape[2:]))
    padded[:, : rows.shape[1]] = stored
    called = replace(
        inputs,
        q=q,
        kv_cache=padded.reshape(b * pages, page_size, *rows.shape[2:]),
        block_table=np.arange(b * pages, dtype=np.int32).reshape(b, pages),
    )
    want = attention_with_bound(
        exact_q,
        exact_rows,
        exact_rows[..., :c],
        softmax_scale=inputs.softmax_scale,
        profile=run.profile,
        cache_seqlens=inputs.cache_seqlens,
        causal=inputs.causal,
        inherited=InheritedError(q_error, row_error, 0 * row_error[..., :c]),
    )
    return run.call(DECODE, called), want


@law(needs=ROPE, cases=rope_cases)
def test_rope_preserves_norm(run: Run, case: RopeCase) -> None:
    """Every pair keeps its length, times the factor on cos and sin."""
    (x,) = case.vectors(1)
    got = _rotated(run, x, case.positions(), case).value
    _, bound = _expected(run, x, case.positions(), case)
    factor = case.rope.cos_sin_factor
    lengths = computed(_pair_norm(got, case), "length of rotated pair")
    # Lengths are 1-Lipschitz, so a pair's length is off by at most the length of its error.
    off = bound.map(lambda term: _pair_norm(term, case))
    want = factor * _pair_norm(x, case)
    # Two lengths of an ulp each, and a product, in float64.
    run.within(lengths, want, off.plus("float64 of the law", 5 * 2.0**-53 * want), gate=False)


def _pair_norm(x: Array, case: RopeCase) -> Array:
    if case.layout == "interleaved":
        return np.hypot(x[..., 0::2], x[..., 1::2])
    return np.hypot(x[..., : case.dim // 2], x[..., case.dim // 2 :])


@law(needs=ROPE, cases=rope_cases)
def test_rope_at_position_zero_is_identity(run: Run, case: RopeCase) -> None:
    """Position 0 returns x, bit for bit, unless the model puts a factor on cos and sin."""
    (x,) = case.vectors(1)
    zero = np.zeros_like(case.positions())
    got = _rotated(run, x, zero, case)
    if case.rope.cos_sin_factor == 1.0:
        run.require(
            bool((got.value == x).all()),
            f"rope at position 0 changed {int((got.value != x).sum())} of {x.size} elements; "
            f"first: got {got.value[got.value != x][:1]}, want {x[got.value != x][:1]}",
        )
    else:
        run.within(got, *_expected(run, x, zero, case), gate=False)


@law(
    needs=ROPE,
    cases=rope_cases,
    missing=lambda supports: "" if len(supports.rope_layouts) == 2 else f"only {supports.rope_layouts[0]} layout",
)
def test_rope_layouts_are_equivalent(run: Run, case: RopeCase) -> None:
    """Half layout of the permuted vector is the permuted interleaved rotation."""
    case = replace(case, layout="interleaved")
    (x,) = case.vectors(1)
    order = half_from_interleaved(case.dim)
    interleaved = _rotated(run, x, case.positions(), case)
    half = run.call(ROPE, RopeInputs(x[..., order], case.positions(), replace(case.rope, interleaved=False))).out
    _, bound = _expected(run, x, case.positions(), case)
    run.same_function(
        half,
        interleaved[..., order],
        bound.map(lambda term: np.broadcast_to(term, x.shape)[..., order]),
        "half layout of the permuted vector differs from interleaved",
    )
