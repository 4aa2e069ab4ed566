"""Layers of the PyTorch subjects: projections, norms, and the layer with its latent cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch_steps import TorchAttention, TorchRope, wide
from mla_spec.reference.config import Llama4Scaling, MLAConfig

TRACED_WEIGHTS = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "g_proj")
"""Weights whose products and norms are stages of a layer under their names."""


class TorchLayerSteps(TorchRope, TorchAttention):
    """The steps of a layer, in the explicit form."""

    def absorb(self, kv_b_proj: Tensor, *, config: MLAConfig) -> tuple[Tensor, Tensor]:
        """(w_uk [h, n, c], w_uv [h, v, c])."""
        per_head = kv_b_proj.view(config.num_heads, -1, config.kv_lora_rank)  # [h, n+v, c]
        w_uk, w_uv = per_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return w_uk, w_uv

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return TorchLayer(self, weights, config)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x Wᵀ, rounded to the dtype of x."""
        dtype = wide(x.dtype)
        return (x.to(dtype) @ weight.to(dtype).transpose(-1, -2)).to(x.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
        return (y * weight.to(y.dtype)).to(x.dtype)

    def scaled(self, x: Tensor, factor: Tensor | float) -> Tensor:
        return (x.to(wide(x.dtype)) * factor).to(x.dtype)

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
            w_q = self.query_and_gate(weights, config)[0] if config.output_gate == "query" else weights["q_b_proj"]
            q = self.scaled(self.linear(self.query_latent(hidden, weights, config), w_q), config.q_lora_scale)
        q = q.unflatten(-1, (config.num_heads, config.qk_head_dim))
        q_nope, q_pe = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_pe = self.layer_rope(q_pe, positions, config)
        if config.llama_4_scaling is None:
            return q_nope, q_pe
        factor = self.temperature(positions, config.llama_4_scaling, wide(q.dtype))
        return self.scaled(q_nope, factor), self.scaled(q_pe, factor)

    def query_latent(self, hidden: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        """What is projected up to queries, [b, s, q_lora_rank]; beside it, with a gate "query", the latent before its norm."""
        down = self.linear(hidden, weights["q_a_proj"])
        c_q = self.rms_norm(down, weights["q_a_layernorm"], config.latent_norm_eps)
        return torch.cat([c_q, down], dim=-1) if config.output_gate == "query" else c_q

    def query_and_gate(self, weights: Mapping[str, Tensor], config: MLAConfig) -> tuple[Tensor, Tensor]:
        """The rows of ``q_gate_proj``: of queries [h·(n+r), 2·q_lora_rank], and of gates [h·v, 2·q_lora_rank]."""
        rows = weights["q_gate_proj"].unflatten(0, (config.num_heads, -1))  # [h, n+r+v, ·]
        of_query, of_gate = rows.split([config.qk_head_dim, config.v_head_dim], dim=1)
        return of_query.flatten(0, 1), of_gate.flatten(0, 1)

    def temperature(self, positions: Tensor, scaling: Llama4Scaling, dtype: torch.dtype) -> Tensor:
        """The factor of the queries, [b, s, 1, 1] for positions [b, s]."""
        periods = (positions // scaling.original_max_position_embeddings).to(dtype)
        return (1 + scaling.beta * torch.log1p(periods))[..., None, None]

    def project_latent(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        """What is cached: (latent [b, s, c], k_pe [b, s, r])."""
        both = self.linear(hidden, weights["kv_a_proj_with_mqa"])
        latent, k_pe = both.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent = self.rms_norm(latent, weights["kv_a_layernorm"], config.latent_norm_eps)
        latent = self.scaled(latent, config.kv_lora_scale)
        return latent, self.layer_rope(self.k_pe_norm(k_pe, weights, config), positions, config)

    def k_pe_norm(self, k_pe: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        """k_pe before it is rotated, [b, s, r]."""
        if not config.k_pe_norm:
            return k_pe
        return self.rms_norm(k_pe, weights["k_rope_only_layernorm"], config.latent_norm_eps)

    def gated(self, out: Tensor, hidden: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        """The result of attention [b, s, h, v] times its gates."""
        if config.output_gate == "query":
            g = self.linear(self.query_latent(hidden, weights, config), self.query_and_gate(weights, config)[1])
        else:
            g = self.linear(hidden, weights["g_proj"])  # [b, s, h or h·v]
        return self.scaled(out, self.gate(g).unflatten(-1, (config.num_heads, -1)))

    def gate(self, g: Tensor) -> Tensor:
        return g.to(wide(g.dtype)).sigmoid()

    def attend_latent(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        latent: Tensor,
        k_pe: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
        scale: float,
        attn_sink: Tensor | None = None,
    ) -> Tensor:
        """Attention of the last s tokens to all t cached rows; [b, s, h, v]. The explicit form."""
        k_nope = self.linear(latent[:, None], w_uk)  # [b, h, t, n]
        value = self.linear(latent[:, None], w_uv)  # [b, h, t, v]
        shared = k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1)  # [b, h, t, r]
        q = torch.cat([q_nope, q_pe], dim=-1).transpose(1, 2)  # [b, h, s, n+r]
        k = torch.cat([k_nope, shared], dim=-1)
        out, _ = self.attend_beside(q, k, value, self.layer_visible(q, k), scale, attn_sink)
        return out.transpose(1, 2)

    def layer_visible(self, q: Tensor, k: Tensor) -> Tensor:
        """[b, 1, s, t]: causal, bottom-right, for a batch of equal lengths."""
        t = k.shape[-2]
        return self.visible(q.shape[-2], t, torch.full((q.shape[0],), t, device=q.device), causal=True)


class TorchLayer:
    """One layer of a PyTorch subject, with its latent cache.

    It keeps views of its weights only, so that what is written to them later is what it uses.
    """

    def __init__(self, subject: TorchLayerSteps, weights: Mapping[str, Tensor], config: MLAConfig) -> None:
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
        sink = (self.weights["sinks"],) if self.config.attention_sink else ()
        out = self.subject.attend_latent(
            q_nope, q_pe, *self.cache, self.w_uk, self.w_uv, self.subject.softmax_scale(self.config), *sink
        )
        if self.config.output_gate is not None:
            out = self.subject.gated(out, hidden, self.weights, self.config)
        return self.subject.project_output(out, self.weights, self.config)

    def trace(self, method: str, hidden: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """The stages of ``prefill`` or ``decode``, by name; "o_proj" is what it returns."""
        own, stages = self.subject, dict[str, Tensor]()
        self.subject = watched(own, self.weights, stages)
        try:
            stages["o_proj"] = getattr(self, method)(hidden, positions)
            return stages
        finally:
            self.subject = own

    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        if self.cache is None:
            # What is not rotated is a slice, which would keep the whole projection in memory.
            self.cache = latent, k_pe.clone()
            return
        self.cache = torch.cat([self.cache[0], latent], dim=1), torch.cat([self.cache[1], k_pe], dim=1)

    def cache_bytes(self) -> int:
        return 0 if self.cache is None else sum(x.numel() * x.element_size() for x in self.cache)


def watched(subject: TorchLayerSteps, weights: Mapping[str, Tensor], stages: dict[str, Tensor]) -> TorchLayerSteps:
    """The subject, of which some steps also put what they give into ``stages``: a copy, in which its own methods find these."""
    watching = copy.copy(subject)

    def keep_named(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
            out = step(x, weight, *options)
            stages.update({name: out for name in TRACED_WEIGHTS if weights.get(name) is weight})
            return out

        return run

    def keep_result(step: Callable[..., Any], *names: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            out = step(*arguments)
            stages.update(zip(names, out if isinstance(out, tuple) else (out,), strict=True))
            return out

        return run

    steps: Any = watching  # an instance's own attributes stand before its class's methods
    steps.linear, steps.rms_norm = keep_named(subject.linear), keep_named(subject.rms_norm)
    steps.project_query = keep_result(watching.project_query, "q_nope", "q_pe")
    steps.project_latent = keep_result(watching.project_latent, "latent", "k_pe")
    steps.attend_latent = keep_result(watching.attend_latent, "attention")
    steps.gated = keep_result(watching.gated, "gated")
    return watching
