"""The steps of the PyTorch subjects below the layer: rotary embedding, attention, merging, the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_spec.reference.config import RopeConfig


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to compute on ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TorchRope:
    """Rotary embedding."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        """Rotate x = positions.shape + (r,) or positions.shape + (h, r)."""
        cos, sin = self.cos_sin(positions, rope, wide(x.dtype))  # [..., r/2]
        if x.ndim == positions.ndim + 2:
            cos, sin = cos[..., None, :], sin[..., None, :]  # [..., 1, r/2]
        return self.rotate(x.to(cos.dtype), cos, sin, rope.interleaved).to(x.dtype)

    def frequencies(self, rope: RopeConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Angle per position of each pair, [r/2]."""
        pair = torch.arange(rope.dim // 2, device=device, dtype=dtype)
        extrapolated = 1.0 / rope.theta ** (2 * pair / rope.dim)
        if rope.frequency_divisors is not None:
            return extrapolated / torch.tensor(rope.frequency_divisors, device=device, dtype=dtype)
        yarn = rope.active_yarn
        if yarn is None:
            return extrapolated
        low, high = rope.yarn_correction_range()
        if low == high:
            assert yarn.ramp_guard is not None
            high += yarn.ramp_guard
        ramp = ((pair - low) / (high - low)).clamp(0, 1)
        return extrapolated / yarn.factor * ramp + extrapolated * (1 - ramp)

    def angles(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> Tensor:
        """[..., r/2] for positions [...]."""
        return positions[..., None].to(dtype) * self.frequencies(rope, positions.device, dtype)

    def cos_sin(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cos and sin with their factor, each [..., r/2]."""
        angles = self.angles(positions, rope, dtype)
        factor = self.cos_sin_factor(rope)
        return angles.cos() * factor, angles.sin() * factor

    def cos_sin_factor(self, rope: RopeConfig) -> float:
        return rope.cos_sin_factor

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """Rotate the pairs of x [..., r]."""
        if interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
            pairs = [first * cos - second * sin, first * sin + second * cos]
            return torch.stack(pairs, dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ columns of [b, h, s, ·] and [b, h or 1, ·, t]; what all heads share is read once, not copied for each."""
    h, s = rows.shape[1:3]
    if columns.shape[1] == h:
        return rows @ columns
    products: Tensor = (rows.flatten(1, 2) @ columns[:, 0]).unflatten(1, (h, s))
    return products


class TorchAttention:
    """Attention of one dense batch, and the merge of parts."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        """Which of t keys each of s queries sees, bottom-right aligned; [b, 1, s, t]."""
        key = torch.arange(t, device=seqlens.device)
        last = seqlens[:, None] - 1  # [b, 1]
        if causal:
            last = last - s + 1 + torch.arange(s, device=seqlens.device)  # [b, s]
        return (key <= last[..., None])[:, None].expand(-1, -1, s, -1)

    def windowed(self, visible: Tensor, window: int | None) -> Tensor:
        """Of the keys that each query sees the last ``window``; [..., s, t]."""
        if window is None:
            return visible
        count = visible.cumsum(dim=-1)
        return visible & (count > count[..., -1:] - window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """softmax(scale · q kᵀ) v with its LSE; q [b, h, s, d], k and v [b, h or 1, t, ·], visible [b, 1, s, t]."""
        out, lse = self.unrounded(q, k, v, visible, softmax_scale)
        return out.to(q.dtype), lse

    def unrounded(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """``attend`` before its output is stored."""
        scores = self.scores(q, k, softmax_scale)  # [b, h, s, t]
        p, lse = self.softmax(self.masked(scores, visible))
        return self.weighted_values(p, v), lse

    def attend_beside(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float, attn_sink: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``attend`` where a sink [h] takes its share."""
        if attn_sink is None:
            return self.attend(q, k, v, visible, softmax_scale)
        out, lse = self.unrounded(q, k, v, visible, softmax_scale)
        share = self.sink_share(lse.transpose(1, 2), attn_sink).transpose(1, 2)  # [b, h, s]
        return (out * share[..., None]).to(q.dtype), lse

    def sink_share(self, lse: Tensor, attn_sink: Tensor) -> Tensor:
        """What a sink [h] leaves to the keys of rows with LSE [..., h]."""
        return torch.sigmoid(lse.masked_fill(lse == -torch.inf, 0.0) - attn_sink)

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        dtype = wide(q.dtype)
        return products(q.to(dtype), k.to(dtype).transpose(-1, -2)) * softmax_scale

    def masked(self, scores: Tensor, visible: Tensor) -> Tensor:
        """The scores, which are nobody else's: -inf is written where nothing is visible."""
        return scores.masked_fill_(~visible, -torch.inf)

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, LSE); weights are 0 and the LSE -inf in a row that sees nothing."""
        if scores.shape[-1] == 0:
            return scores, scores.new_full(scores.shape[:-1], -torch.inf)
        m = scores.amax(dim=-1, keepdim=True)
        m = m.masked_fill(m == -torch.inf, 0.0)
        weights = (scores - m).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        empty = total == 0
        total = total.masked_fill(empty, 1.0)  # before the logarithm, whose gradient at 0 is infinite
        lse = (m + total.log()).masked_fill(empty, -torch.inf).squeeze(-1)
        return weights / total, lse

    def weighted_values(self, p: Tensor, v: Tensor) -> Tensor:
        return products(p, v.to(p.dtype))

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        """Parts outs [parts, (b,) s, h, v] and lses [parts, (b,) h, s] of one attention, joined."""
        shares, lse = self.shares(lses)
        return self.weighted_parts(shares.transpose(-1, -2)[..., None], outs), lse

    def shares(self, lses: Tensor) -> tuple[Tensor, Tensor]:
        """(exp(lses - lse) [parts, (b,) h, s], lse [(b,) h, s]): a softmax over the parts."""
        shares, lse = self.softmax(lses.movedim(0, -1))
        return shares.movedim(-1, 0), lse

    def weighted_parts(self, shares: Tensor, outs: Tensor) -> Tensor:
        """[(b,) s, h, v] of shares [parts, (b,) s, h, 1]."""
        return (shares * outs.to(shares.dtype)).sum(dim=0).to(outs.dtype)


class TorchCache:
    """Reading and writing a paged latent cache [pages, page_size, 1, c+r]."""

    def gather(self, kv_cache: Tensor, table: Tensor, length: int) -> Tensor:
        """Rows 0 .. length - 1 of one sequence, [length, c+r]."""
        page_size = kv_cache.shape[1]
        token = torch.arange(length, device=kv_cache.device)
        return kv_cache[table[token // page_size].long(), token % page_size, 0]

    def write_cache(self, latent: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Store rows [latent | k_pe] in their slots of the pool; slot -1 stores nothing."""
        kept = slot_mapping >= 0
        self.store(torch.cat([latent, k_pe], dim=-1)[kept], kv_cache, slot_mapping[kept])

    def store(self, rows: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        """Rows [n, c+r] into slots [n] ≥ 0."""
        page_size = kv_cache.shape[1]
        kv_cache[slots // page_size, slots % page_size, 0] = rows
