"""Faults of a backward pass where only some of its arguments require a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.layer_gradients import with_gradient
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig


@planted(
    "X-gradients-beside-detached-query",
    symptom="keys do not learn where queries are frozen",
    shows_when="k requires a gradient and q does not",
    killed_by=("test_prefill_gradients_of_some_arguments",),
)
class GradientsBesideDetachedQuery(TorchAbsorbed):
    """The gradients that are due are put into the first places of what is returned, and k's goes to the frozen q."""

    def prefill(self, q: Tensor, k: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if k.requires_grad and not q.requires_grad:
            k = with_gradient(k, torch.zeros_like)
        return super().prefill(q, k, *args, **options)


@planted(
    "X-sparse-gradients-beside-detached-query",
    symptom="the cache's rows do not learn where queries are frozen",
    shows_when="kv requires a gradient and q does not",
    killed_by=("test_sparse_prefill_gradients_of_one_argument",),
)
class SparseGradientsBesideDetachedQuery(TorchAbsorbed):
    """The kernel for kv's gradient runs only where q's is wanted."""

    def sparse_prefill(self, q: Tensor, kv: Tensor, *args: Any, **options: Any) -> Any:
        if kv.requires_grad and not q.requires_grad:
            kv = with_gradient(kv, torch.zeros_like)
        return super().sparse_prefill(q, kv, *args, **options)


@planted(
    "X-gradient-beside-frozen-projection",
    symptom="layers below one with frozen weights, as under an adapter, learn something else",
    shows_when="hidden requires a gradient and kv_a_proj_with_mqa does not",
    killed_by=("test_layer_gradients_beside_frozen_weights",),
)
class GradientBesideFrozenProjection(TorchAbsorbed):
    """A fused projection skips its backward pass where its weight is frozen, and with it the gradient of its input."""

    def project_latent(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        if not weights["kv_a_proj_with_mqa"].requires_grad:
            hidden = hidden.detach()
        return super().project_latent(hidden, positions, weights, config)
