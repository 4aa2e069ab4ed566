"""The indexer's operands of the PyTorch subjects. Each step is a method, so that a variant overrides one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.adapters.pytorch_layer import TorchLayerSteps
from mla_spec.adapters.pytorch_steps import wide
from mla_spec.reference.indexer import IndexerConfig


class TorchIndexerProjection(TorchLayerSteps):
    """Projections, LayerNorm and rotation of the leading dims."""

    def project_indexer(
        self, hidden: Tensor, q_latent: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: IndexerConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(q [tokens, h, d], k [tokens, d], weights [tokens, h]) of hidden [tokens, e] and q_latent [tokens, q_lora_rank]."""
        q = self.linear(q_latent, weights["wq_b"]).unflatten(-1, (config.index_n_heads, config.index_head_dim))
        k = self.linear(hidden, weights["wk"])
        k = self.layer_norm(k, weights["k_norm.weight"], weights["k_norm.bias"], config.k_norm_eps)
        return (
            self.indexer_query_rope(q, positions, config),
            self.indexer_key_rope(k, positions, config),
            self.head_weights(hidden, weights["weights_proj"], config),
        )

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        dtype = wide(x.dtype)
        return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)

    def indexer_query_rope(self, q: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        return self.indexer_rope(q, positions, config)

    def indexer_key_rope(self, k: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        return self.indexer_rope(k, positions, config)

    def indexer_rope(self, x: Tensor, positions: Tensor, config: IndexerConfig) -> Tensor:
        """The first dims of x [..., d] rotated."""
        if config.rope is None:
            return x
        x_pe, x_nope = x.split([config.rope_dim, config.index_head_dim - config.rope_dim], dim=-1)
        return torch.cat([self.rope(x_pe, positions, rope=config.rope), x_nope], dim=-1)

    def head_weights(self, hidden: Tensor, weights_proj: Tensor, config: IndexerConfig) -> Tensor:
        """[tokens, h], not rounded to the dtype of hidden."""
        dtype = wide(hidden.dtype)
        return hidden.to(dtype) @ weights_proj.to(dtype).T * config.weight_scale
