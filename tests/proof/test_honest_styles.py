"""Honest kernels whose arithmetic is that of no emulated one: each conforms when declared as its author would.

Steps are NumPy's own float32. ``Style.part`` gives the unnormalised output, the row sum and the maximum of some of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.kernel_presets import presets
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.bounds.profile_presets import preset
from mla_spec.installed import all_laws
from mla_spec.judging.judge import require_meaningful
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record, VacuousCase
from mla_spec.operations.decode import DecodeCase, decode_expected
from mla_spec.properties.strategies.sizes import LOGIT_STDS, cancelling_stds, judgeable_stds
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Unsupported

Array = np.ndarray[Any, Any]
LAWS = ("test_decode_agrees_with_reference", "test_decode_lse_agrees_with_reference")
F = np.float32
LOG2E, LN2 = F(math.log2(math.e)), F(math.log(2))


def to(name: str) -> Callable[[Array], Array]:
    """Rounds float32 numbers to a format of torch, to nearest."""
    dtype = getattr(torch, name)
    return lambda x: torch.from_numpy(np.ascontiguousarray(x, F)).to(dtype).float().numpy()


BF16, FP16, FP8 = to("bfloat16"), to("float16"), to("float8_e4m3fn")


def polynomial_exp2(x: Array) -> Array:
    """2^x by a cubic of the fraction, whose relative error is 8.8e-5, and an exponent that is added (Dao, softmax.py)."""
    whole = np.floor(np.maximum(x, F(-127)))
    f = (np.maximum(x, F(-127)) - whole).astype(F)
    cubic = ((F(0.077119089663028717) * f + F(0.22756439447402954)) * f + F(0.69514614343643188)) * f + F(1)
    return np.ldexp(cubic, whole.astype(int)).astype(F)


def half_exp2(x: Array) -> Array:
    """2^x as a number of float16, of an argument in float32."""
    return FP16(np.exp2(x))


@dataclass(frozen=True)
class Style:
    """An online softmax in base 2 over tiles of 64 keys, each step of which may be another.

    Attributes:
        exp2: powers of 2.
        maximum: what is kept of a running maximum.
        threshold: by how much a tile's maximum must exceed the running one before that is replaced.
        without_max: 0 stands for every maximum.
        most: scores beyond it are refused.
        p: rounding of the weights, times ``p_scale``; None for that of the inputs.
        product: P [h, t] · V [t, dv].
        rounded_sum: whether the row sum adds the rounded weights.
        parts: into which the keys are split; they are merged one after the other, in an order that changes.
        normalised: the output is divided by the row sum in every tile, as in the first FlashAttention.
        score: q [h, d] · K [d, t].
        levels: parts are merged four at a time, and these again; each result is stored in bfloat16.
    """

    exp2: Callable[[Array], Array] = np.exp2
    maximum: Callable[[Array], Array] = np.asarray
    threshold: float = 0.0
    without_max: bool = False
    most: float = math.inf
    p: Callable[[Array], Array] | None = None
    p_scale: float = 1.0
    product: Callable[[Array, Array], Array] = np.matmul
    rounded_sum: bool = False
    parts: int = 1
    normalised: bool = False
    score: Callable[[Array, Array], Array] = np.matmul
    levels: bool = False

    def part(self, scores: Array, v: Array, dtype: str) -> tuple[Array, Array, Array]:
        """Of scores [h, t] in base 2 and values [t, dv]: output [h, dv], row sum [h, 1], maximum [h, 1]."""
        h = len(scores)
        m, total = np.full((h, 1), 0.0 if self.without_max else -np.inf, F), np.zeros((h, 1), F)
        out, rounding = np.zeros((h, v.shape[1]), F), self.p or to(dtype)
        for first in range(0, len(v), 64):
            s = scores[:, first : first + 64]
            new = m if self.without_max else np.maximum(m, self.maximum(s.max(axis=1, keepdims=True)))
            new = np.where((new - m > self.threshold) | np.isneginf(m), new, m)
            decay = np.where(np.isneginf(m), F(0), np.exp2(np.where(np.isneginf(m), F(0), m - new)))
            p = self.exp2(s - new)
            before = total * decay
            coarse = rounding(p * F(self.p_scale))
            total = before + (coarse / F(self.p_scale) if self.rounded_sum else p).sum(axis=1, keepdims=True)
            if self.normalised:
                coarse, decay = rounding(p / total), before / total
            out = (out * decay + self.product(coarse, v[first : first + 64])).astype(F)
            m = new
        return out / F(self.p_scale), total.astype(F), m

    def result(self, scores: Array, v: Array, dtype: str) -> tuple[Array, Array]:
        """Of a part: output [h, dv] and LSE [h, 1] in base 2."""
        out, total, m = self.part(scores, v, dtype)
        return (out if self.normalised else out / total), m + np.log2(total)

    def attend(self, q: Array, rows: Array, dv: int, scale: float, dtype: str) -> tuple[Array, Array]:
        """Of q [h, d] and rows [t, d]: out [h, dv], lse [h]."""
        scores = self.score(q, rows.T) * F(F(scale) * LOG2E)
        if np.abs(scores).max() > self.most:
            raise Unsupported(f"scores beyond {self.most} are taken by another kernel")
        cuts = np.array_split(np.arange(len(rows)), min(self.parts, len(rows)))
        parts = [self.result(scores[:, cut], rows[cut, :dv], dtype) for cut in cuts]
        if self.levels:
            stored = [(BF16(out), lse) for out, lse in parts]
            fours = [merged(stored[i : i + 4]) for i in range(0, len(stored), 4)]
            parts = [merged([(BF16(out), lse) for out, lse in fours])]
        result, lse = parts[0]
        for i in np.random.default_rng(len(rows)).permutation(len(parts) - 1) + 1:
            result, lse = merged([(result, lse), parts[i]])
        return result, (lse * LN2)[:, 0]


def merged(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """One output and LSE of several, weighted by their LSEs."""
    outs, lses = (np.stack(each) for each in zip(*parts, strict=True))
    top = lses.max(axis=0)
    weights = np.exp2(lses - top)
    total = weights.sum(axis=0)
    return (weights * outs).sum(axis=0) / total, top + np.log2(total)


class Kernel:
    """Decodes one query of one sequence at a time."""

    def __init__(self, style: Style, profiles: dict[str, Profile]) -> None:
        self.style, self.profile = style, profiles
        self.supports = Supports(dtypes=tuple(profiles))

    def decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        *,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        b, s, h, _ = q.shape
        dtype, page = str(q.dtype).removeprefix("torch."), kv_cache.shape[1]
        out, lse = torch.zeros(b, s, h, head_dim_v), torch.full((b, h, s), -math.inf)
        for i, length in enumerate(cache_seqlens.tolist()):
            token = torch.arange(length)
            rows = kv_cache[block_table[i, token // page].long(), token % page, 0].float().numpy()
            for j in range(s):
                keys = length - s + j + 1 if causal else length
                if keys > 0:
                    with np.errstate(all="ignore"):
                        o, x = self.style.attend(q[i, j].float().numpy(), rows[:keys], head_dim_v, softmax_scale, dtype)
                    out[i, j], lse[i, :, j] = torch.from_numpy(o), torch.from_numpy(x)
        return out.to(q.dtype), lse


def tiled(*dtypes: str, **changes: Any) -> dict[str, Profile]:
    """Profiles of a flash kernel, changed."""
    return {dtype: Profile.default(dtype, tile=64, **changes) for dtype in dtypes}


def halves_of_v(p: Array, v: Array) -> Array:
    """V as the sum of two bfloat16 numbers, each of which meets P."""
    high = BF16(v)
    return np.asarray(p @ high + p @ BF16(v - high))


def promoted(p: Array, v: Array) -> Array:
    """16 products at a time in float16, added in float32."""
    total = np.zeros((len(p), v.shape[1]), F)
    for first in range(0, len(v), 16):
        block = np.zeros_like(total)
        for t in range(first, min(first + 16, len(v))):
            block = FP16(block + FP16(p[:, t, None] * v[t]))
        total += block
    return total


def half_sums(q: Array, k: Array) -> Array:
    """q · K, one product after the other added in float16."""
    total = np.zeros((len(q), k.shape[1]), F)
    for i in range(len(k)):
        total = FP16(total + FP16(q[:, i, None] * k[i]))
    return total


HALF = ("float16", "bfloat16")
STYLES: dict[str, tuple[Style, dict[str, Profile]]] = {
    "scale folded into log2(e)": (Style(), tiled("float32", *HALF)),
    "rescaled beyond a threshold of 8": (Style(threshold=8.0), tiled("float32", "bfloat16")),
    "cubic exp2": (Style(exp2=polynomial_exp2), presets("flash-attention-4")),
    "cubic exp2, a threshold of 8": (Style(exp2=polynomial_exp2, threshold=8.0), presets("flash-attention-4")),
    "exp2 in float16": (Style(exp2=half_exp2, rounded_sum=True), tiled("float16", row_sum="rounded", exp_error=8192.0)),
    "a maximum in bfloat16": (Style(maximum=BF16, most=8192.0), tiled("float32", "bfloat16", maximum="bfloat16")),
    "no maximum": (Style(without_max=True, most=64.0), tiled("float32", "bfloat16")),
    "P in e4m3, times 256": (
        Style(p=FP8, p_scale=256.0),
        tiled("bfloat16", probabilities="float8_e4m3fn", probabilities_scale=256.0),
    ),
    "V in two bfloat16": (
        Style(product=halves_of_v),
        tiled("float32", value=Accumulator(operands="bfloat16", operand_parts=2)),
    ),
    "P·V in float16 by 16, promoted": (
        Style(product=promoted),
        tiled("float16", value=Accumulator(format="float16", order="blocked", block=16)),
    ),
    "normalised in every tile": (
        Style(normalised=True),
        tiled("float32", *HALF, merge_every=64, merge_shares="normalised"),
    ),
    "two levels of parts in bfloat16": (
        Style(parts=8, levels=True),
        tiled(*HALF, splits=8, merge_every=2**20, split_format="bfloat16"),
    ),
    "q·k in float16": (Style(score=half_sums), tiled("float16", score=Accumulator(format="float16"))),
    "8 parts merged in any order": (Style(parts=8), tiled("float32", *HALF, splits=8)),
}


def records(style: Style, profiles: dict[str, Profile], examples: int = 40) -> list[Record]:
    options = Options(examples=examples, seed=0, minimise=False)
    return [run_law(all_laws()[law], Kernel(style, profiles), options) for law in LAWS]


@pytest.mark.parametrize("name", STYLES)
def test_an_honest_style_conforms(name: str) -> None:
    for record in records(*STYLES[name]):
        assert record.verdict == "pass", record.text()
        assert record.worst is not None and record.worst > 0


@pytest.mark.parametrize(
    "law",
    [
        "test_decode_two_equal_maxima_give_their_mean",
        "test_decode_equal_scores_give_the_mean",
        "test_decode_one_hot_by_the_latent_part",
        "test_decode_is_exact_at_length",
    ],
)
def test_a_rounded_maximum_is_held_to_its_bound_where_others_are_exact(law: str) -> None:
    options = Options(examples=24, seed=0, minimise=False)
    style, declared = STYLES["a maximum in bfloat16"]
    record = run_law(all_laws()[law], Kernel(style, declared), options)
    assert record.verdict == "pass", record.text()
    if "equal_maxima" in law:
        record = run_law(all_laws()[law], Kernel(style, tiled("float32", "bfloat16")), options)
        assert record.verdict == "fail" and "want exactly" in record.message, record.text()


@pytest.mark.parametrize(
    ("name", "undeclared"), [("normalised in every tile", {}), ("two levels of parts in bfloat16", {"splits": 8})]
)
def test_what_is_merged_more_often_than_declared_fails(name: str, undeclared: dict[str, Any]) -> None:
    """The first is exact no longer, the second has a rounding of parts too many."""
    if undeclared:
        undeclared |= {"split_format": "bfloat16"}
    style, declared = STYLES[name]
    laws = (LAWS[0], "test_decode_equal_scores_give_the_mean")
    kernel = Kernel(style, tiled(*declared, **undeclared))
    options = Options(examples=40, seed=0, minimise=False, dtypes=("float16",))
    verdicts = [run_law(all_laws()[law], kernel, options).verdict for law in laws]
    assert "fail" in verdicts and set(verdicts) <= {"fail", "pass"}
    for law in laws:
        record = run_law(all_laws()[law], Kernel(style, declared), options)
        assert record.verdict == "pass", record.text()


def test_scores_beyond_what_a_rounded_maximum_can_take_have_no_bound() -> None:
    """Of 2^15 the largest weight may be exp(±128)."""
    for maximum, finite in ((None, True), ("bfloat16", False)):
        profile = Profile.default("float32", maximum=maximum)
        k = np.array([-1.0, 1.0])[:, None, None] * 2.0**15
        bounded = attention_with_bound(np.ones((1, 1, 1)), k, k / 2**15, softmax_scale=1.0, profile=profile)
        assert bool(np.isfinite(bounded.out_error.total).all()) is finite


def test_scores_that_cancel_are_drawn_as_large_as_the_profile_can_bear() -> None:
    """Tensor cores cut products off, which wide rows of scores 16 times smaller feel; sums in float32 do not."""
    stds, wide, narrow = (1.0, 4.0, 16.0), 576, 40
    hopper = presets("flash-attention-4")["float16"]
    assert cancelling_stds(stds, Profile.default("float16"), wide) == (1.0, 4.0)
    assert cancelling_stds(stds, hopper, wide) == (1.0,)
    assert cancelling_stds(stds, hopper, narrow) == (1.0, 4.0)
    # 16 · √576 · γ_576 in float16 is 150, and 2^-11 of it below 0.075
    assert cancelling_stds(stds, Profile.default("float16", score=Accumulator(format="float16")), wide) == (2.0**-11,)


@pytest.mark.parametrize("regime", ["sunken", "offset", "outlier", "negative"])
def test_scores_stored_in_16_bits_are_drawn_as_large_as_their_bound_bears(regime: str) -> None:
    eager, widths = preset("bf16-eager"), {"kv_lora_rank": 48, "qk_rope_head_dim": 16}
    stds = judgeable_stds(LOGIT_STDS, eager, 64, regime)
    assert {0.1, 0.01} <= set(stds)
    assert 4.0 in judgeable_stds(LOGIT_STDS, Profile.default("bfloat16"), 64, regime)
    for std in stds:
        case = DecodeCase(dtype="bfloat16", seqlens=(63, 20), s=2, logit_std=std, regime=regime, **widths)
        want = decode_expected(case.build(), eager)
        require_meaningful(want.out, want.out_error.total)
    if regime == "sunken":
        case = DecodeCase(dtype="bfloat16", seqlens=(63, 20), s=2, logit_std=4.0, regime=regime, **widths)
        want = decode_expected(case.build(), eager)
        with pytest.raises(VacuousCase):
            require_meaningful(want.out, want.out_error.total)
