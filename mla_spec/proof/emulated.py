"""Attention in low precision, emulated in NumPy: does what a ``Profile`` says, stage by stage.

Arrays are float64 throughout, and every operation is rounded to the format that the profile declares for it. Formats of at
most 24 significand bits are emulated exactly so: float64 has more than twice as many and two bits to spare, and then
rounding twice is rounding once (Figueroa 1995, "When is double rounding innocuous?").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from mla_spec.bounds.operand_rounding import SHARED_AXES
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.bounds.profile_presets import preset
from mla_spec.reference.attention import heads_to_rows, key_block, rows_to_heads, rows_to_lse
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.supports import Supports

_NATIVE = ("float32", "float64")
"""Formats in which NumPy computes."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a kernel may choose freely within its profile.

    Attributes:
        exp2: log2(e) is folded into the scale, and exponentials are powers of 2, as GPU kernels do.
        stepwise: products are added one at a time, in order, where else the order is that of a matrix product of NumPy.
        reverse: keys are taken from the last to the first.
        shares_from_lse: parts are weighted by exp(lse of the part − lse of all) and the sum is not divided again, as by
            FlashMLA's combine kernel; else by exp(lse of the part − the largest), and divided by the sum of these.
        exp_bias: every exp is off by this share of the error that the profile grants it, in -1 .. 1.
        clamp: exponents are no smaller than that of the smallest normal number, so that no exponential is 0.
        truncate_probabilities: P is truncated to its format. No profile declares this: such a kernel is wrong.
    """

    exp2: bool = False
    stepwise: bool = False
    reverse: bool = False
    shares_from_lse: bool = False
    exp_bias: float = 0.0
    clamp: bool = False
    truncate_probabilities: bool = False


def rounded(x: Array, name: str) -> Array:
    """``round_to`` nearest, by the processor where it has the format."""
    if name in _NATIVE:
        return x.astype(name).astype(float)
    return round_to(x, name)


def multiply_add(start: Array, a: Array, b: Array, accumulator: Accumulator, *, stepwise: bool = False) -> Array:
    """Start [..., m, p] + a [..., m, n] @ b [..., n, p], formed as ``accumulator`` says.

    Args:
        stepwise: one product at a time, in order.
    """
    if accumulator.operands is not None:
        whole = replace(accumulator, operands=None)
        parts = range(accumulator.operand_parts)
        of_a, of_b = (_operand_parts(x, accumulator) for x in (a, b))
        for i, j in itertools.product(reversed(parts), repeat=2):  # the small products first
            if i + j < len(parts):
                start = multiply_add(start, of_a[i], of_b[j], whole, stepwise=stepwise)
        return start
    n = a.shape[-1]
    size = n if accumulator.order == "sequential" else accumulator.block
    for first in range(0, n, max(size, 1)):
        left, right = a[..., first : first + size], b[..., first : first + size, :]
        if accumulator.order == "tensor-core":
            start = _fused(start, left, right, accumulator)
        elif accumulator.order == "sequential" and (stepwise or accumulator.format not in _NATIVE):
            start = _one_by_one(start, left, right, accumulator.format)
        else:
            start = rounded(start + _block_sum(left, right, accumulator.format, stepwise), accumulator.format)
    return start


def _operand_parts(x: Array, accumulator: Accumulator) -> list[Array]:
    """Numbers of the format of operands that add up to x, as nearly as so many can."""
    assert accumulator.operands is not None
    parts, rest = [], x
    for _ in range(accumulator.operand_parts):
        parts.append(round_to(rest, accumulator.operands, rounding=accumulator.operand_rounding))
        rest = rest - parts[-1]
    return parts


def _block_sum(a: Array, b: Array, name: str, stepwise: bool) -> Array:
    if stepwise or name not in _NATIVE:
        return _one_by_one(np.zeros(1), a, b, name)
    return np.asarray((a.astype(name) @ b.astype(name)).astype(float))


def _one_by_one(start: Array, a: Array, b: Array, name: str) -> Array:
    for i in range(a.shape[-1]):
        start = rounded(start + rounded(a[..., :, i, None] * b[..., i, None, :], name), name)
    return start


def _fused(start: Array, a: Array, b: Array, accumulator: Accumulator) -> Array:
    """One step of a tensor core: products and the running sum are aligned to the largest, cut off and added exactly."""
    products = a[..., :, None, :] * np.swapaxes(b, -1, -2)[..., None, :, :]  # [..., m, p, block]
    running = np.broadcast_to(start, products.shape[:-1])[..., None]
    terms = np.concatenate([products, running], axis=-1)
    exponent = np.frexp(np.abs(terms).max(axis=-1, keepdims=True))[1] - 1  # of the largest term, in [2^e, 2^(e+1))
    terms = np.trunc(np.ldexp(terms, accumulator.fraction_bits - exponent))
    total = np.ldexp(terms.sum(axis=-1), exponent[..., 0] - accumulator.fraction_bits)
    return round_to(total, accumulator.format, rounding="truncate")


@dataclass(frozen=True)
class EmulatedAttention:
    """Attention with the arithmetic of ``profile``, in float64 arrays."""

    profile: Profile
    schedule: Schedule = Schedule()

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        softmax_scale: float,
        cache_seqlens: IntArray | int | None = None,
        causal: bool = True,
    ) -> tuple[Array, Array]:
        """(out [..., s, h, dv], lse [..., h, s]), with the arguments of ``mla_spec.reference.attention.attention``."""
        s, h = q.shape[-3:-1]
        t, g = k.shape[-3:-1]
        seqlens = np.asarray(t if cache_seqlens is None else cache_seqlens)[..., None]
        seen = np.tile(seqlens + (np.arange(s) - s + 1 if causal else np.zeros(s, dtype=int)), h // g)
        visible = np.arange(t) < seen[..., None, :, None]  # [..., 1, rows, t]
        if self.profile.cache_dequantised is not None:
            k, v = (rounded(x, self.profile.cache_dequantised) for x in (k, v))
        q, factor = self.query(q, softmax_scale)
        every = slice(None, None, -1 if self.schedule.reverse else None)
        keys, values = key_block(k, every), key_block(v, every)  # [..., g, t, d or dv]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            scores = self.scores(heads_to_rows(q, g), keys, factor)  # [..., g, rows, t]
            out, lse = self.merged(np.where(visible[..., every], scores, -np.inf), values)
            if self.schedule.exp2:
                lse = self.softmax(lse * self.softmax(math.log(2)))
            out = round_to(out, self.profile.output, rounding=self.profile.output_rounding)
        return rows_to_heads(out, s, h), rows_to_lse(rounded(lse, self.profile.lse), s, h)

    def query(self, q: Array, scale: float) -> tuple[Array, float]:
        """(q [..., s, h, d] as it meets the keys, what is left of the softmax scale)."""
        profile = self.profile
        if profile.query is None:
            return q, scale
        if profile.query_times_scale:
            q, scale = self.softmax(q * self.softmax(scale)), 1.0
        if profile.query_scale == "none":
            return rounded(q, profile.query), scale
        largest = np.abs(q).max(axis=SHARED_AXES[profile.query_scale], keepdims=True, initial=0.0)
        unit = self.softmax(np.where(largest > 0, largest, 1.0) / format_of(profile.query).max_finite)
        code = round_to(self.softmax(q / unit), profile.query, overflow="saturate")
        return self.softmax(code * unit), scale

    def softmax(self, x: Array | float) -> Array:
        """Rounded to the format of the softmax arithmetic."""
        return rounded(np.asarray(x, dtype=float), self.profile.softmax)

    def exp(self, x: Array) -> Array:
        """The exponential of x, or the power of 2."""
        exact = np.exp2(x) if self.schedule.exp2 else np.exp(x)
        if self.schedule.clamp:
            exact = np.where(np.isneginf(x), exact, np.maximum(exact, format_of(self.profile.softmax).smallest_normal))
        granted = max(self.profile.exp_error - 1, 0.0) * format_of(self.profile.softmax).unit_roundoff
        return self.softmax(exact * (1 + self.schedule.exp_bias * granted))

    def log(self, x: Array) -> Array:
        return self.softmax(np.log2(x) if self.schedule.exp2 else np.log(x))

    def scores(self, q: Array, k: Array, scale: float) -> Array:
        """Scaled products of q [..., rows, d] and k [..., t, d], over ln 2 where powers of 2 follow; [..., rows, t]."""
        profile = self.profile
        factor = self.softmax(scale)
        if self.schedule.exp2:
            factor = self.softmax(factor * self.softmax(math.log2(math.e)))
        if profile.operand_roundings:
            root = self.softmax(math.sqrt(abs(factor)))
            q, k, factor = self.softmax(q * root), self.softmax(k * root), np.sign(factor)
        zero = np.zeros((*q.shape[:-1], k.shape[-2]))
        dot = multiply_add(zero, q, np.swapaxes(k, -1, -2), profile.score, stepwise=self.schedule.stepwise)
        if profile.score_roundings == 2:
            dot = rounded(dot, profile.score_format)
        return rounded(self.softmax(dot * factor), profile.score_format)

    def merged(self, scores: Array, v: Array) -> tuple[Array, Array]:
        """(out [..., rows, dv], lse [..., rows]) of all keys, in as many parts as the profile has."""
        t = scores.shape[-1]
        size = self.profile.merge_every or -(-t // max(self.profile.splits, 1))
        parts = [
            self.part(scores[..., i : i + size], v[..., i : i + size, :]) for i in range(0, max(t, 1), max(size, 1))
        ]
        ring = self.profile.merge_shares == "sigmoid"
        if self.profile.merge_every is None and not ring:
            return parts[0] if len(parts) == 1 else self.merge(parts)
        result = parts[0]
        for part in parts[1:]:
            result = self.merge_next(result, part) if ring else self.merge([result, part])
        return result

    def merge_next(self, whole: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[Array, Array]:
        """One (out, lse) of two by the sigmoid of the difference of their LSEs, as in ring attention."""
        softmax, (out, lse), (other, other_lse) = self.softmax, whole, part
        seen, more = ~np.isneginf(lse), ~np.isneginf(other_lse)
        factor = math.log(2) if self.schedule.exp2 else 1.0
        difference = softmax(np.where(seen & more, other_lse, 0.0) - np.where(seen & more, lse, 0.0))
        share = softmax(1 / (1 + np.exp(-difference * factor)))
        merged = softmax(out - softmax(share[..., None] * softmax(out - rounded(other, self.profile.split_format))))
        new = softmax(lse - softmax(-np.logaddexp(0.0, difference * factor) / factor))
        both = seen & more
        out = np.where(both[..., None], merged, np.where(more[..., None], other, out))
        return out, np.where(both, new, np.where(more, other_lse, lse))

    def part(self, scores: Array, v: Array) -> tuple[Array, Array]:
        """(out [..., rows, dv], lse [..., rows]) of some of the keys: an online softmax over tiles."""
        profile, softmax = self.profile, self.softmax
        if profile.row_sum == "lse":
            return self.log_domain(scores, v)
        *rows, t = scores.shape
        m, total = np.full(rows, -np.inf), np.zeros(rows)
        out = np.zeros((*rows, v.shape[-1]))
        divided_first = profile.row_sum == "normalised" and t <= (profile.tile or t)
        for first in range(0, t, profile.tile or max(t, 1)):
            keys = slice(first, first + (profile.tile or t))
            s = scores[..., keys]
            largest = s.max(axis=-1)
            m_new = np.maximum(m, largest if profile.maximum is None else rounded(largest, profile.maximum))
            shift = np.where(np.isneginf(m_new), 0.0, m_new)
            decay, p = self.exp(softmax(m - shift)), self.exp(softmax(s - shift[..., None]))
            p_rounded = self.probabilities(p)
            total = self.row_sum(softmax(total * decay), p_rounded if profile.row_sum == "rounded" else p)
            if divided_first:
                p_rounded = self.probabilities(softmax(p / np.where(total == 0, 1.0, total)[..., None]))
            out = rounded(out * decay[..., None], profile.value.format)
            out = multiply_add(out, p_rounded, v[..., keys, :], profile.value, stepwise=self.schedule.stepwise)
            m = m_new
        empty = total == 0
        divisor = np.where(empty, 1.0, total)
        lse = np.where(empty, -np.inf, softmax(np.where(empty, 0.0, m) + self.log(divisor)))
        return softmax(out if divided_first else out / divisor[..., None]), lse

    def log_domain(self, scores: Array, v: Array) -> tuple[Array, Array]:
        """The same by weights exp(s − lse), which nothing divides."""
        softmax = self.softmax
        m = scores.max(axis=-1, initial=-np.inf)
        empty = np.isneginf(m)
        shift = np.where(empty, 0.0, m)
        total = self.row_sum(np.zeros(m.shape), self.exp(softmax(scores - shift[..., None])))
        lse = softmax(shift + self.log(np.where(empty, 1.0, total)))
        p = self.probabilities(self.exp(softmax(scores - lse[..., None])))
        zero = np.zeros((*m.shape, v.shape[-1]))
        out = multiply_add(zero, p, v, self.profile.value, stepwise=self.schedule.stepwise)
        return softmax(out), np.where(empty, -np.inf, lse)

    def probabilities(self, p: Array) -> Array:
        """The weights as they multiply V."""
        scale, name = self.profile.probabilities_scale, self.profile.probabilities
        if self.schedule.truncate_probabilities:
            return round_to(p * scale, name, rounding="truncate") / scale
        return rounded(p * scale, name) / scale

    def row_sum(self, total: Array, p: Array) -> Array:
        """Total [..., rows] and the sum of p [..., rows, keys]."""
        accumulator = Accumulator(format=self.profile.softmax)
        ones = np.ones((p.shape[-1], 1))
        return multiply_add(total[..., None], p, ones, accumulator, stepwise=self.schedule.stepwise)[..., 0]

    def merge(self, parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        """One (out, lse) of several, weighted by their LSEs."""
        softmax = self.softmax
        lses = np.stack([lse for _, lse in parts])
        largest = lses.max(axis=0)
        shift = np.where(np.isneginf(largest), 0.0, largest)
        weights = self.exp(softmax(lses - shift))
        total = np.zeros(shift.shape)
        for weight in weights:
            total = softmax(total + weight)
        divisor = np.where(total == 0, 1.0, total)
        lse = softmax(shift + self.log(divisor))
        if self.schedule.shares_from_lse:
            weights, divisor = self.exp(softmax(lses - lse)), np.ones(shift.shape)
        out = np.zeros(parts[0][0].shape)
        for weight, (part, _) in zip(weights, parts, strict=True):
            out = softmax(out + softmax(weight[..., None] * rounded(part, self.profile.split_format)))
        return softmax(out / divisor[..., None]), np.where(total == 0, -np.inf, lse)


class EmulatedKernel:
    """A subject that decodes with the arithmetic of one profile per dtype.

    Args:
        profiles: of each dtype it takes; flash attention in float32, float16 and bfloat16 by default.
        schedule: what it chooses freely.
        declared: the profiles it claims to have, where they are not those it has.
        lse: whether it declares to return the LSE.
    """

    name = "emulated"

    def __init__(
        self,
        profiles: Mapping[str, Profile] | None = None,
        schedule: Schedule = Schedule(),
        *,
        declared: Mapping[str, Profile] | None = None,
        lse: bool = True,
    ) -> None:
        if profiles is None:
            profiles = {p.dtype: p for p in map(preset, ("fp32", "fp16-flash", "bf16-flash"))}
        self.attention = {dtype: EmulatedAttention(profile, schedule) for dtype, profile in profiles.items()}
        self.profile = MappingProxyType(dict(profiles if declared is None else declared))
        self.supports = Supports(dtypes=tuple(profiles), lse=lse)

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
        """Attention of q [b, s, h, c+r] to the cached rows; the LSE is float32, or float64 for float64 inputs."""
        attention = self.attention[str(q.dtype).removeprefix("torch.")]
        seqlens = cache_seqlens.cpu().numpy()
        rows = gather_rows(kv_cache.cpu().double().numpy(), block_table.cpu().numpy(), seqlens)[:, :, None]
        out, lse = attention.attend(
            q.cpu().double().numpy(),
            rows,
            rows[..., :head_dim_v],
            softmax_scale=softmax_scale,
            cache_seqlens=seqlens,
            causal=causal,
        )
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return torch.from_numpy(out).to(q.device, q.dtype), torch.from_numpy(lse).to(q.device, wide)
