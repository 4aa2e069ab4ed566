"""A second, independent reference in ball arithmetic (Arb, through python-flint).

DeepSeek-V2 (arXiv 2405.04434), appendix C, and YaRN (arXiv 2309.00071), section 3.2, as the formulas stand there: no
maximum is subtracted, nothing is blocked or fused. Of ``mla_spec.reference`` only the configuration dataclasses are used;
frequencies, scale and mscale are computed here.

Functions take float64 arrays or balls and return object arrays of balls; ``rounded`` evaluates them. einsum letters:
b batch, s query position, t key position, h head, n nope dim, r rope dim, c latent, v value dim, e model dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from flint import arb, ctx

from mla_spec.reference.config import Llama4Scaling, LongRopeScaling, MLAConfig, RopeConfig, YarnScaling
from mla_spec.reference.typing import Array, IntArray

Ball: TypeAlias = Any
Balls: TypeAlias = Any
"""Object array of balls; a float64 array wherever a function takes one."""

FIRST_BITS, LAST_BITS = 128, 2**14


class NotRoundable(ArithmeticError):
    """A ball still holds two doubles or more: at this precision, or, from ``rounded``, at every precision tried."""


def rounded(compute: Callable[[], Sequence[Balls]]) -> list[Array]:
    """The arrays that ``compute`` returns, each element correctly rounded to float64 (ties to even, no -0).

    ``compute`` runs at doubling precision until each ball lies between two reals that round to the same double. -inf must
    be exact.

    Raises:
        NotRoundable: some element does not get there, being NaN, beyond float64, or a tie that is not exact.
    """
    bits = FIRST_BITS
    while bits <= LAST_BITS:
        with ctx.workprec(bits):
            try:
                return [_one_double(balls) for balls in compute()]
            except NotRoundable:
                bits *= 2
    raise NotRoundable(f"an element has no certain float64 value at {LAST_BITS} bits")


def _one_double(balls: Balls) -> Array:
    def convert(x: Ball) -> float:
        low, high = float(x.lower()), float(x.upper())
        if low != high or (np.isinf(low) and x.is_finite()):
            raise NotRoundable
        return low + 0.0  # -0.0 becomes 0.0

    return np.array([convert(x) for x in balls.ravel()]).reshape(balls.shape)


def ball(x: Any) -> Balls:
    """Numbers as balls; a double is an exact ball."""
    x = np.asarray(x)
    exact = x.astype(np.float64) if x.dtype != object else x
    balls = np.empty(x.shape, dtype=object)
    balls.ravel()[:] = [arb(value) for value in exact.ravel().tolist()]
    return balls


# Rotary embedding


def rope_frequencies(rope: RopeConfig) -> Balls:
    """Angle per position of each pair, [r/2]: theta^(-2i/r), blended with itself over YaRN's factor, or over LongRoPE's."""
    pairs = range(rope.dim // 2)
    extrapolated = [arb(rope.theta) ** (arb(-2 * i) / rope.dim) for i in pairs]
    if rope.longrope is not None:
        factors = rope.longrope.long_factor if _beyond(rope, rope.longrope) else rope.longrope.short_factor
        return np.array([f / arb(factor) for f, factor in zip(extrapolated, factors, strict=True)], dtype=object)
    yarn = rope.active_yarn
    if yarn is None:
        return np.array(extrapolated, dtype=object)
    low, high = correction_range(rope, yarn)
    if low == high:
        high = high + arb(yarn.ramp_guard)
    ramp = [((i - low) / (high - low)).max(arb(0)).min(arb(1)) for i in pairs]
    return np.array(
        [f * (1 - g) + f / arb(yarn.factor) * g for f, g in zip(extrapolated, ramp, strict=True)], dtype=object
    )


def _beyond(rope: RopeConfig, longrope: LongRopeScaling) -> bool:
    return (rope.max_position_embeddings or 0) > longrope.original_max_position_embeddings


def correction_range(rope: RopeConfig, yarn: YarnScaling) -> tuple[Ball, Ball]:
    """Where YaRN's ramp begins and ends: the pair that turns β times over the original context L, 2πβ θ^(2i/r) = L."""

    def pair(rotations: float) -> Ball:
        wavelength = arb(yarn.original_max_position_embeddings) / (2 * arb.pi() * arb(rotations))
        return rope.dim * wavelength.log() / (2 * arb(rope.theta).log())

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        low, high = _integer(low.floor()), _integer(high.ceil())
    return low.max(arb(0)), high.min(arb(rope.dim - 1))


def _integer(x: Ball) -> Ball:
    value = x.unique_fmpz()
    if value is None:
        raise NotRoundable
    return arb(value)


def mscale(yarn: YarnScaling, weight: float) -> Ball:
    """1 + weight · ln(factor) / 10."""
    return 1 + arb(weight) * arb(yarn.factor).log() / 10


def cos_sin_factor(rope: RopeConfig) -> Ball:
    """What multiplies cos and sin: mscale over mscale_all_dim, or LongRoPE's root, unless stated."""
    if rope.longrope is not None:
        return longrope_factor(rope, rope.longrope)
    yarn = rope.active_yarn
    if yarn is None:
        return arb(1)
    if yarn.attention_factor is not None:
        return arb(yarn.attention_factor)
    above, below = yarn.mscale, yarn.mscale_all_dim
    if yarn.attention_factor_rule == "transformers" and not (above and below):
        return mscale(yarn, 1)
    return mscale(yarn, 1 if above is None else above) / mscale(yarn, 0 if below is None else below)


def longrope_factor(rope: RopeConfig, longrope: LongRopeScaling) -> Ball:
    """sqrt(1 + ln(extension) / ln(original context)), 1 where nothing is extended."""
    if longrope.attention_factor is not None:
        return arb(longrope.attention_factor)
    original = arb(longrope.original_max_position_embeddings)
    extended = arb(rope.max_position_embeddings) / original if longrope.factor is None else arb(longrope.factor)
    return (1 + extended.log() / original.log()).sqrt() if extended > 1 else arb(1)


def softmax_scale(config: MLAConfig) -> Ball:
    """(n + r)^-1/2, times mscale² under YaRN; a stated scale is that double."""
    if config.softmax_scale is not None:
        return arb(config.softmax_scale)
    scale = 1 / arb(config.qk_nope_head_dim + config.qk_rope_head_dim).sqrt()
    yarn = None if config.rope is None else config.rope.active_yarn
    if yarn is None:
        return scale
    if yarn.softmax_mscale is not None:
        return scale * arb(yarn.softmax_mscale) ** 2
    return scale * mscale(yarn, yarn.mscale_all_dim or 0) ** 2


def cos_sin(positions: IntArray, rope: RopeConfig) -> tuple[Balls, Balls]:
    """Cos and sin of position · frequency, [..., r/2] each, without ``cos_sin_factor``."""
    angle = ball(positions)[..., None] * rope_frequencies(rope)  # [..., r/2]
    return np.cos(angle), np.sin(angle)


def rotate(x: Balls, positions: IntArray, rope: RopeConfig | None) -> Balls:
    """Each pair of x [..., r] or [..., h, r] turned by its angle; positions [...]. None leaves x as it is."""
    x = ball(x)
    if rope is None:
        return x
    cos, sin = cos_sin(positions, rope)  # [..., r/2]
    if x.ndim > cos.ndim:
        cos, sin = cos[..., None, :], sin[..., None, :]  # [..., 1, r/2]
    i = np.arange(rope.dim // 2)
    first = 2 * i if rope.interleaved else i
    second = first + (1 if rope.interleaved else rope.dim // 2)
    a, b = x[..., first], x[..., second]
    out = np.empty_like(x)
    out[..., first] = (a * cos - b * sin) * cos_sin_factor(rope)
    out[..., second] = (b * cos + a * sin) * cos_sin_factor(rope)
    return out


# Attention


def attend(q: Balls, k: Balls, v: Balls, scale: Ball, sink: float = -math.inf) -> tuple[Balls, Ball]:
    """One query q [d] over keys k [t, d] and values v [t, v]: (Σ e^s v / (Σ e^s + e^sink), log Σ e^s), s = scale · k q."""
    if len(k) == 0:
        return ball(np.zeros(v.shape[1])), arb.neg_inf()
    weights = np.exp(scale * (k @ q))  # [t]
    total = weights.sum()
    if sink == math.inf:
        return ball(np.zeros(v.shape[1])), total.log()
    return weights @ v / (total if sink == -math.inf else total + arb(sink).exp()), total.log()


def attention(
    q: Balls,
    k: Balls,
    v: Balls,
    *,
    scale: Ball,
    causal: bool,
    window: int | None = None,
    attn_sink: Array | None = None,
) -> tuple[Balls, Balls]:
    """Query i of s sees keys 0 .. t - s + i when causal, else all; of these the last ``window``.

    Args:
        q, k, v: [s, h, d], [t, g, d], [t, g, v]; g is h or 1.
        attn_sink: score of one more key with value 0, which the LSE does not count, [h].

    Returns:
        (out [s, h, v], lse [h, s]).
    """
    q, k, v = ball(q), ball(k), ball(v)
    (s, h), t = q.shape[:2], len(k)
    out = np.empty((s, h, v.shape[2]), dtype=object)
    lse = np.empty((h, s), dtype=object)
    for i in range(s):
        end = max(t - s + i + 1, 0) if causal else t
        seen = slice(0 if window is None else max(end - window, 0), end)
        for head in range(h):
            shared, sink = head % k.shape[1], -math.inf if attn_sink is None else float(attn_sink[head])
            out[i, head], lse[head, i] = attend(q[i, head], k[seen, shared], v[seen, shared], scale, sink)
    return out, lse


def prefill(
    q: Balls, k: Balls, v: Balls, cu_seqlens_q: IntArray, cu_seqlens_k: IntArray, **options: Any
) -> tuple[Balls, Balls]:
    """``attention`` of each sequence; tokens of all sequences on one axis, sequence i being cu[i] .. cu[i + 1]."""
    outs, lses = [], []
    for i in range(len(cu_seqlens_q) - 1):
        queries, keys = slice(*cu_seqlens_q[i : i + 2]), slice(*cu_seqlens_k[i : i + 2])
        out, lse = attention(q[queries], k[keys], v[keys], **options)
        outs.append(out)
        lses.append(lse)
    return np.concatenate(outs), np.concatenate(lses, axis=1)


def decode(
    q: Balls,
    kv_cache: Balls,
    block_table: IntArray,
    cache_seqlens: IntArray,
    *,
    head_dim_v: int,
    **options: Any,
) -> tuple[Balls, Balls]:
    """``attention`` of each q[b] [s, h, c+r] to its own cached rows, whose first ``head_dim_v`` elements are values."""
    page_size = kv_cache.shape[1]
    outs, lses = [], []
    for queries, pages, length in zip(q, block_table, cache_seqlens, strict=True):
        rows = [kv_cache[pages[j // page_size], j % page_size] for j in range(length)]  # t × [1, c+r]
        keys = np.array(rows).reshape(length, 1, kv_cache.shape[-1])  # [t, 1, c+r]
        out, lse = attention(queries, keys, keys[..., :head_dim_v], **options)
        outs.append(out)
        lses.append(lse)
    return np.stack(outs), np.stack(lses)


def ragged_decode(
    q: Balls,
    kv_cache: Balls,
    block_table: IntArray,
    cache_seqlens: IntArray,
    cu_seqlens_q: IntArray,
    *,
    head_dim_v: int,
    scale: Ball,
    causal: bool,
) -> tuple[Balls, Balls]:
    """``decode`` of each sequence with its own number of queries, the tokens cu[i] .. cu[i + 1] of one axis."""
    outs, lses = [], []
    for i in range(len(cache_seqlens)):
        own, tokens = slice(i, i + 1), slice(*cu_seqlens_q[i : i + 2])
        out, lse = decode(
            q[None, tokens],
            kv_cache,
            block_table[own],
            cache_seqlens[own],
            head_dim_v=head_dim_v,
            scale=scale,
            causal=causal,
        )
        outs.append(out[0])
        lses.append(lse[0])
    return np.concatenate(outs), np.concatenate(lses, axis=1)


def rank_decode(
    q: Balls,
    kv_cache: Balls,
    block_table: IntArray,
    cache_seqlens: IntArray,
    *,
    head_dim_v: int,
    scale: Ball,
    causal: bool,
    ranks: int,
    rank: int,
    interleave: int,
) -> tuple[Balls, Balls]:
    """``decode`` of each query alone, over as many of the rank's tokens as there are before the end of what it sees."""
    s, outs, lses = q.shape[1], [], []
    for i in range(s):
        ends = [int(n) - s + i + 1 if causal else int(n) for n in cache_seqlens]
        seen = [sum(t // interleave % ranks == rank for t in range(end)) for end in ends]
        out, lse = decode(
            q[:, i : i + 1], kv_cache, block_table, np.array(seen), head_dim_v=head_dim_v, scale=scale, causal=False
        )
        outs.append(out)
        lses.append(lse)
    return np.concatenate(outs, axis=1), np.concatenate(lses, axis=2)


def merge(outs: Balls, lses: Balls) -> tuple[Balls, Balls]:
    """Parts of one attention over disjoint keys: weights e^lse.

    Args:
        outs, lses: [parts, b, s, h, v] and [parts, b, h, s].

    Returns:
        (out [b, s, h, v], lse [b, h, s]); 0 and -inf where every part is empty.
    """
    weights = np.exp(ball(lses))  # [parts, b, h, s]
    total = weights.sum(axis=0)  # [b, h, s]
    empty = np.isneginf(lses).all(axis=0)  # [b, h, s]
    total[empty] = arb(1)  # weights are all 0 there
    share = weights / total  # [parts, b, h, s]
    out = (np.swapaxes(share, -1, -2)[..., None] * ball(outs)).sum(axis=0)  # [b, s, h, v]
    lse = np.log(total)  # [b, h, s]
    lse[empty] = arb.neg_inf()
    return out, lse


# Layer


def rms_norm(x: Balls, weight: Balls, eps: float) -> Balls:
    """Weight · x / sqrt(mean(x²) + eps) over the last axis."""
    x = ball(x)
    mean = (x * x).sum(axis=-1, keepdims=True) / x.shape[-1]
    return ball(weight) * x / np.sqrt(mean + arb(eps))


def absorb(kv_b_proj: Balls, config: MLAConfig) -> tuple[Balls, Balls]:
    """(w_uk [h, n, c], w_uv [h, v, c]): of the n + v rows of each head the first n and the last v."""
    h, n, v = config.num_heads, config.qk_nope_head_dim, config.v_head_dim
    w_uk = np.stack([kv_b_proj[head * (n + v) :][:n] for head in range(h)])
    w_uv = np.stack([kv_b_proj[head * (n + v) + n :][:v] for head in range(h)])
    return ball(w_uk), ball(w_uv)


def explicit(
    q_nope: Balls, q_pe: Balls, latent: Balls, k_pe: Balls, w_uk: Balls, w_uv: Balls, scale: Ball, **options: Any
) -> Balls:
    """Keys [W_UK c; k_pe] and values W_UV c of each head; one causal sequence, out [s, h, v].

    Args:
        q_nope, q_pe, latent, k_pe: [s, h, n], [s, h, r], [t, c], [t, r].
        w_uk, w_uv: [h, n, c] and [h, v, c].
        options: of ``attention``.
    """
    keys = [np.concatenate([latent @ w.T, k_pe], axis=-1) for w in w_uk]  # h × [t, n+r]
    values = [latent @ w.T for w in w_uv]  # h × [t, v]
    q = np.concatenate([q_nope, q_pe], axis=-1)  # [s, h, n+r]
    k, v = np.stack(keys, axis=1), np.stack(values, axis=1)
    out, _ = attention(q, k, v, scale=scale, causal=True, **options)
    return out


def absorbed(
    q_nope: Balls, q_pe: Balls, latent: Balls, k_pe: Balls, w_uk: Balls, w_uv: Balls, scale: Ball, **options: Any
) -> Balls:
    """The same with W_UK in the query and W_UV after the attention; keys are the cached rows."""
    h = len(w_uk)
    folded = np.stack([q_nope[:, head] @ w_uk[head] for head in range(h)], axis=1)  # [s, h, c]
    q = np.concatenate([folded, q_pe], axis=-1)  # [s, h, c+r]
    rows = np.concatenate([latent, k_pe], axis=-1)[:, None]  # [t, 1, c+r]
    out, _ = attention(q, rows, latent[:, None], scale=scale, causal=True, **options)  # [s, h, c]
    return np.stack([out[:, head] @ w_uv[head].T for head in range(h)], axis=1)


def layer(
    hidden: Balls,
    positions: IntArray,
    weights: Mapping[str, Balls],
    config: MLAConfig,
    attend: Callable[..., Balls] = explicit,
) -> Balls:
    """One MLA layer over whole sequences, equations 37-47: hidden [b, s, e] -> [b, s, e].

    ``attend`` is ``explicit`` or ``absorbed``.
    """
    w = {name: ball(values) for name, values in weights.items() if name != "sinks"}
    attend = partial(attend, attn_sink=weights["sinks"] if config.attention_sink else None)
    return np.stack([_sequence(ball(x), at, w, config, attend) for x, at in zip(hidden, positions, strict=True)])


def temperature(positions: IntArray, scaling: Llama4Scaling) -> Balls:
    """1 + beta · ln(1 + floor(position / original context)) of each position."""
    return 1 + arb(scaling.beta) * np.log(ball(1 + positions // scaling.original_max_position_embeddings))


def _sequence(
    x: Balls, positions: IntArray, w: Mapping[str, Balls], config: MLAConfig, attend: Callable[..., Balls]
) -> Balls:
    n, c, eps = config.qk_nope_head_dim, config.kv_lora_rank, config.latent_norm_eps
    g = x @ w["g_proj"].T if config.output_gate in ("head", "element") else None  # [s, h or h·v]
    if config.q_lora_rank is None:
        q = x @ w["q_proj"].T  # [s, h·(n+r)]
    else:
        down = x @ w["q_a_proj"].T  # [s, q_lora_rank]
        c_q = rms_norm(down, w["q_a_layernorm"], eps)
        if config.output_gate == "query":
            rows = np.concatenate([c_q, down], axis=-1) @ w["q_gate_proj"].T  # [s, h·(n+r+v)]
            rows = rows.reshape(len(x), config.num_heads, -1)
            q, g = rows[..., : config.qk_head_dim], rows[..., config.qk_head_dim :]
        else:
            q = c_q @ w["q_b_proj"].T  # [s, h·(n+r)]
    if config.mla_scale_q_lora and config.q_lora_rank is not None:
        q = q * (arb(config.hidden_size) / config.q_lora_rank).sqrt()
    q = q.reshape(len(x), config.num_heads, -1)  # [s, h, n+r]
    if config.llama_4_scaling is not None:
        q = q * temperature(positions, config.llama_4_scaling)[:, None, None]
    q_pe = rotate(q[..., n:], positions, config.rope)  # [s, h, r]
    kv = x @ w["kv_a_proj_with_mqa"].T  # [s, c+r]
    latent = rms_norm(kv[:, :c], w["kv_a_layernorm"], eps)  # [s, c]
    if config.mla_scale_kv_lora:
        latent = latent * (arb(config.hidden_size) / c).sqrt()
    k_pe = rms_norm(kv[:, c:], w["k_rope_only_layernorm"], eps) if config.k_pe_norm else kv[:, c:]  # [s, r]
    k_pe = rotate(k_pe, positions, config.rope)
    w_uk, w_uv = absorb(w["kv_b_proj"], config)
    out = attend(q[..., :n], q_pe, latent, k_pe, w_uk, w_uv, softmax_scale(config))  # [s, h, v]
    if g is not None:
        out = out / (1 + np.exp(-g.reshape(*out.shape[:2], -1)))
    return out.reshape(len(x), -1) @ w["o_proj"].T  # [s, e]
