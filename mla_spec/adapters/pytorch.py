"""The PyTorch subjects that ship: three ways to compute MLA, on any device, in any dtype.

Each is built from small steps, so that a variant (or a planted bug) overrides exactly one. Arithmetic is float32, or
float64 for float64 inputs; a layer rounds every intermediate to the dtype of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.harness.contract import DTYPES, Supports
from mla_spec.reference.config import MLAConfig, RopeConfig
from mla_spec.reference.profile import Profile


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to compute on ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _profiles(**changes: Any) -> Mapping[str, Profile]:
    """Per dtype: arithmetic in the wide dtype, with P kept there."""
    return {
        dtype: Profile.default(dtype, probabilities="float64" if dtype == "float64" else "float32", **changes)
        for dtype in DTYPES
    }


class TorchExplicit:
    """Plain PyTorch; a layer expands keys and values per head, ``decode`` takes one sequence at a time."""

    name = "torch-explicit"
    profile = _profiles(form="explicit")
    supports = Supports()

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
        """Cos and sin with their YaRN factor, each [..., r/2]."""
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

    def absorb(self, kv_b_proj: Tensor, *, config: MLAConfig) -> tuple[Tensor, Tensor]:
        """(w_uk [h, n, c], w_uv [h, v, c])."""
        per_head = kv_b_proj.view(config.num_heads, -1, config.kv_lora_rank)  # [h, n+v, c]
        w_uk, w_uv = per_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return w_uk, w_uv

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
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of q [b, s, h, c+r] to the cached rows of each sequence."""
        outs, lses = [], []
        for i, length in enumerate(cache_seqlens.tolist()):
            rows = self.gather(kv_cache, block_table[i], length)[None, None]  # [1, 1, t, c+r]
            visible = self.visible(q.shape[1], rows.shape[2], cache_seqlens[i : i + 1], causal)  # [1, 1, s, t]
            query = q[i : i + 1].transpose(1, 2)  # [1, h, s, c+r]
            out, lse = self.attend(query, rows, rows[..., :head_dim_v], visible, softmax_scale)
            outs.append(out.transpose(1, 2))  # [1, s, h, c]
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    def gather(self, kv_cache: Tensor, table: Tensor, length: int) -> Tensor:
        """Rows 0 .. length - 1 of one sequence, [length, c+r]."""
        page_size = kv_cache.shape[1]
        token = torch.arange(length, device=kv_cache.device)
        return kv_cache[table[token // page_size].long(), token % page_size, 0]

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        """Which of t keys each of s queries sees, bottom-right aligned; [b, 1, s, t]."""
        key = torch.arange(t, device=seqlens.device)
        last = seqlens[:, None] - 1  # [b, 1]
        if causal:
            last = last - s + 1 + torch.arange(s, device=seqlens.device)  # [b, s]
        return (key <= last[..., None])[:, None].expand(-1, -1, s, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """softmax(scale · q kᵀ) v with its LSE; q [b, h, s, d], k and v [b, h or 1, t, ·], visible [b, 1, s, t]."""
        scores = self.scores(q, k, softmax_scale)  # [b, h, s, t]
        p, lse = self.softmax(self.masked(scores, visible))
        return self.weighted_values(p, v).to(q.dtype), lse

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        dtype = wide(q.dtype)
        return q.to(dtype) @ k.to(dtype).transpose(-1, -2) * softmax_scale

    def masked(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores.masked_fill(~visible, -torch.inf)

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, LSE); weights are 0 and the LSE -inf in a row that sees nothing."""
        if scores.shape[-1] == 0:
            return scores, scores.new_full(scores.shape[:-1], -torch.inf)
        m = scores.amax(dim=-1, keepdim=True)
        m = m.masked_fill(m == -torch.inf, 0.0)
        weights = torch.exp(scores - m)
        total = weights.sum(dim=-1, keepdim=True)
        lse = (m + total.log()).squeeze(-1)
        return weights / total.masked_fill(total == 0, 1.0), lse

    def weighted_values(self, p: Tensor, v: Tensor) -> Tensor:
        return p @ v.to(p.dtype)

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return TorchLayer(self, weights, config)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """X Wᵀ, rounded to the dtype of x."""
        dtype = wide(x.dtype)
        return (x.to(dtype) @ weight.to(dtype).transpose(-1, -2)).to(x.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
        return (y * weight.to(y.dtype)).to(x.dtype)

    def softmax_scale(self, config: MLAConfig) -> float:
        return config.scale

    def layer_rope(self, x: Tensor, positions: Tensor, config: MLAConfig) -> Tensor:
        return x if config.rope is None else self.rope(x, positions, rope=config.rope)

    def project_output(self, out: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        """[b, s, e] of out [b, s, h, v]."""
        return self.linear(out.flatten(-2), weights["o_proj"])

    def project_query(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        """(q_nope [b, s, h, n], q_pe [b, s, h, r])."""
        if config.q_lora_rank is None:
            q = self.linear(hidden, weights["q_proj"])
        else:
            c_q = self.linear(hidden, weights["q_a_proj"])
            c_q = self.rms_norm(c_q, weights["q_a_layernorm"], config.latent_norm_eps)
            q = self.linear(c_q, weights["q_b_proj"])
        q = q.unflatten(-1, (config.num_heads, config.qk_head_dim))
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return q_nope, self.layer_rope(q_pe, positions, config)

    def project_latent(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        """What is cached: (latent [b, s, c], k_pe [b, s, r])."""
        both = self.linear(hidden, weights["kv_a_proj_with_mqa"])
        latent, k_pe = both.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent = self.rms_norm(latent, weights["kv_a_layernorm"], config.latent_norm_eps)
        return latent, self.layer_rope(k_pe, positions, config)

    def attend_latent(
        self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float
    ) -> Tensor:
        """Attention of the last s tokens to all t cached rows; [b, s, h, v]. The explicit form."""
        k_nope = self.linear(latent[:, None], w_uk)  # [b, h, t, n]
        value = self.linear(latent[:, None], w_uv)  # [b, h, t, v]
        shared = k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1)  # [b, h, t, r]
        q = torch.cat([q_nope, q_pe], dim=-1).transpose(1, 2)  # [b, h, s, n+r]
        k = torch.cat([k_nope, shared], dim=-1)
        out, _ = self.attend(q, k, value, self.layer_visible(q, k), scale)
        return out.transpose(1, 2)

    def layer_visible(self, q: Tensor, k: Tensor) -> Tensor:
        """[b, 1, s, t]: causal, bottom-right, for a batch of equal lengths."""
        t = k.shape[-2]
        return self.visible(q.shape[-2], t, torch.full((q.shape[0],), t, device=q.device), causal=True)


class TorchAbsorbed(TorchExplicit):
    """Plain PyTorch; a layer attends to the latent cache itself, ``decode`` takes the whole batch, padded."""

    name = "torch-absorbed"
    profile = _profiles(form="absorbed")

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
    ) -> tuple[Tensor, Tensor | None]:
        rows = self.gather_batch(kv_cache, block_table, cache_seqlens)[:, None]  # [b, 1, t, c+r]
        visible = self.visible(q.shape[1], rows.shape[2], cache_seqlens, causal)  # [b, 1, s, t]
        out, lse = self.attend(q.transpose(1, 2), rows, rows[..., :head_dim_v], visible, softmax_scale)
        return out.transpose(1, 2), lse

    def gather_batch(self, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
        """The rows of every sequence, padded with zeros to the longest; [b, t, c+r]."""
        page_size = kv_cache.shape[1]
        token = torch.arange(int(cache_seqlens.max()), device=kv_cache.device)  # [t]
        used = token < cache_seqlens[:, None]  # [b, t]
        pages = block_table[:, token // page_size].long().masked_fill(~used, 0)
        rows = kv_cache[pages, token % page_size, 0]  # [b, t, c+r]
        return rows.masked_fill(~used[..., None], 0.0)

    def attend_latent(
        self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float
    ) -> Tensor:
        """The absorbed form."""
        q_latent = self.linear(q_nope.transpose(1, 2), w_uk.transpose(-1, -2))  # [b, h, s, c]
        q = torch.cat([q_latent, q_pe.transpose(1, 2)], dim=-1)  # [b, h, s, c+r]
        rows = torch.cat([latent, k_pe], dim=-1)[:, None]  # [b, 1, t, c+r]
        out, _ = self.attend(q, rows, latent[:, None], self.layer_visible(q, rows), scale)  # [b, h, s, c]
        return self.linear(out, w_uv).transpose(1, 2)


class TorchSDPA(TorchAbsorbed):
    """``torch.nn.functional.scaled_dot_product_attention``, whose backends round P to the dtype and return no LSE."""

    name = "torch-sdpa"
    profile = {dtype: Profile.default(dtype, form="absorbed", tile=16, operand_roundings=4) for dtype in DTYPES}
    supports = Supports(lse=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        if k.shape[-2] == 0:
            return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_empty(0)
        heads = q.shape[1]
        out = F.scaled_dot_product_attention(
            q,
            k.expand(-1, heads, -1, -1),
            v.expand(-1, heads, -1, -1),
            attn_mask=visible,
            scale=softmax_scale,
        )
        return out.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0), q.new_empty(0)


class TorchLayer:
    """One layer of a PyTorch subject, with its latent cache."""

    def __init__(self, subject: TorchExplicit, weights: Mapping[str, Tensor], config: MLAConfig) -> None:
        self.subject = subject
        self.weights = weights
        self.config = config
        self.w_uk, self.w_uv = subject.absorb(weights["kv_b_proj"], config=config)
        self.reset()

    def reset(self) -> None:
        self.cache: tuple[Tensor, Tensor] | None = None

    def prefill(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return self.forward(hidden, positions)

    def decode(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return self.forward(hidden, positions)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        q_nope, q_pe = self.subject.project_query(hidden, positions, self.weights, self.config)
        self.append(*self.subject.project_latent(hidden, positions, self.weights, self.config))
        assert self.cache is not None
        out = self.subject.attend_latent(
            q_nope, q_pe, *self.cache, self.w_uk, self.w_uv, self.subject.softmax_scale(self.config)
        )
        return self.subject.project_output(out, self.weights, self.config)

    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        if self.cache is not None:
            latent = torch.cat([self.cache[0], latent], dim=1)
            k_pe = torch.cat([self.cache[1], k_pe], dim=1)
        self.cache = latent, k_pe

    def cache_bytes(self) -> int:
        return 0 if self.cache is None else sum(x.numel() * x.element_size() for x in self.cache)
