"""A whole layer: projections, norms, rotary embedding, latent cache, attention in the absorbed form.

    mla-spec check examples/latent_layer.py:LatentLayers

``LatentLayer`` stands for the code under test. It gets weights under their checkpoint names and an ``MLAConfig``; what it
does not implement it declares, and is then not asked.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mla_spec import MLAConfig, Profile, Supports


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [b, s, h, r] with its pairs (2i, 2i+1) rotated by position · theta^(-2i/r)."""
    dim = x.shape[-1]
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=x.dtype, device=x.device) / dim)  # [r/2]
    angle = (positions[..., None].to(x.dtype) * frequency)[:, :, None]  # [b, s, 1, r/2]
    first, second = x[..., 0::2], x[..., 1::2]
    pairs = first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()
    return torch.stack(pairs, dim=-1).flatten(-2)


class LatentLayer:
    """One layer; its cache holds c + r numbers a token."""

    def __init__(self, weights: Mapping[str, Tensor], config: MLAConfig) -> None:
        assert config.rope is not None
        self.weights, self.config, self.theta = weights, config, config.rope.theta
        self.reset()

    def reset(self) -> None:
        self.cache: Tensor | None = None

    def cache_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.numel() * self.cache.element_size()

    def prefill(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return self.decode(hidden, positions)

    def decode(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[b, s, e] of hidden [b, s, e]; appends s rows to the cache."""
        row = self.project_row(hidden, positions)
        self.cache = row if self.cache is None else torch.cat([self.cache, row], dim=1)  # [b, t, c+r]
        w = self.weights["kv_b_proj"].unflatten(0, (self.config.num_heads, -1))  # [h, n+v, c]
        w_uk, w_uv = w.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=1)
        q = self.project_query(hidden, positions, w_uk)  # [b, s, h, c+r]
        scores = torch.einsum("bshd,btd->bhst", q, self.cache) * self.config.scale
        s, t = scores.shape[-2:]
        future = torch.ones(s, t, dtype=torch.bool, device=q.device).triu(t - s + 1)
        p = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        latent = torch.einsum("bhst,btc->bshc", p, self.cache[..., : self.config.kv_lora_rank])
        return torch.einsum("bshc,hvc->bshv", latent, w_uv).flatten(-2) @ self.weights["o_proj"].T

    def project_row(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[latent | k_pe], [b, s, c+r]."""
        both = hidden @ self.weights["kv_a_proj_with_mqa"].T
        latent, k_pe = both.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        latent = rms_norm(latent, self.weights["kv_a_layernorm"], self.config.latent_norm_eps)
        return torch.cat([latent, rotate(k_pe[:, :, None], positions, self.theta)[:, :, 0]], dim=-1)

    def project_query(self, hidden: Tensor, positions: Tensor, w_uk: Tensor) -> Tensor:
        """[q_nope W_UK | q_pe], [b, s, h, c+r]."""
        if self.config.q_lora_rank is None:
            q = hidden @ self.weights["q_proj"].T
        else:
            c_q = hidden @ self.weights["q_a_proj"].T
            q = rms_norm(c_q, self.weights["q_a_layernorm"], self.config.latent_norm_eps) @ self.weights["q_b_proj"].T
        q = q.unflatten(-1, (self.config.num_heads, -1))
        q_nope, q_pe = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        return torch.cat([torch.einsum("bshn,hnc->bshc", q_nope, w_uk), rotate(q_pe, positions, self.theta)], dim=-1)


class LatentLayers:
    """The subject: it makes layers."""

    name = "latent-layer"
    supports = Supports(
        dtypes=("float32", "float64"),
        rope_layouts=("interleaved",),
        rope_optional=False,
        yarn=False,
        longrope=False,
        mla_scale_lora=False,
        k_pe_norm=False,
        llama_4_scaling=False,
    )
    profile = {dtype: Profile.default(dtype, form="absorbed") for dtype in supports.dtypes}

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> LatentLayer:
        return LatentLayer(weights, config)
