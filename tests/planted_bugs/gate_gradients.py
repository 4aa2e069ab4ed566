"""Faults of the backward pass of a layer's output gates and sinks. What the layer returns is right in all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit
from mla_spec.planted_bugs.layer_gradients import GRADIENTS, PRESENT, step, with_gradient
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig


@planted(
    "K37",
    source=(
        "https://github.com/Dao-AILab/flash-attention/issues/1973",
        "https://github.com/NVIDIA/TransformerEngine/pull/3551",
    ),
    symptom="the sinks of a model keep the values they were initialised with",
    shows_when="a layer with sinks is trained",
    killed_by=(PRESENT, GRADIENTS),
)
class SinkGetsNoGradient(TorchAbsorbed):
    """The sink is an argument of the forward kernel alone."""

    def sink_share(self, lse: Tensor, attn_sink: Tensor) -> Tensor:
        return super().sink_share(lse, attn_sink.detach())


@planted(
    "X-gradient-of-share-detached",
    symptom="queries and keys of a model with sinks learn something else",
    shows_when="a layer with sinks is trained",
    killed_by=(GRADIENTS,),
)
class ShareDetachedFromScores(TorchExplicit):
    """What the sink leaves is a constant of the backward pass: more scores do not take from the sink."""

    def sink_share(self, lse: Tensor, attn_sink: Tensor) -> Tensor:
        return super().sink_share(lse.detach(), attn_sink)


@planted(
    "X-sink-gradient-of-whole-output",
    symptom="sinks learn too fast, the more so the larger they are",
    shows_when="a layer with sinks is trained",
    killed_by=(GRADIENTS,),
)
class SinkGradientOfWholeOutput(TorchAbsorbed):
    """The gradient of the sink is P_sink Σ dO O, of an output that the sink has not taken its share of."""

    def sink_share(self, lse: Tensor, attn_sink: Tensor) -> Tensor:
        share = super().sink_share(lse, attn_sink)
        for_each = attn_sink.expand_as(share)
        of_sink = with_gradient(for_each, lambda grad: grad / share.detach().to(grad.dtype))
        return super().sink_share(lse, of_sink)


@planted(
    "X-sink-gradient-of-the-last-query",
    symptom="sinks learn from the ends of sequences only",
    shows_when="a layer with sinks is trained on several tokens",
    killed_by=(GRADIENTS,),
)
class SinkGradientOfTheLastQuery(TorchExplicit):
    """Queries write what they add to the gradient of a sink one over the other."""

    def sink_share(self, lse: Tensor, attn_sink: Tensor) -> Tensor:
        last = torch.arange(lse.shape[1], device=lse.device)[:, None] == lse.shape[1] - 1  # lse [b, s, h]
        for_each = with_gradient(attn_sink.expand_as(lse), lambda grad: torch.where(last, grad, 0.0))
        return super().sink_share(lse, for_each)


@planted(
    "X-gate-gradient-without-slope",
    symptom="gates that are open do not learn to close, and training is unstable",
    shows_when="a gated layer is trained",
    killed_by=(GRADIENTS,),
)
class GateGradientWithoutSlope(TorchAbsorbed):
    """The sigmoid passes its gradient on times its value, without 1 − y."""

    def gate(self, g: Tensor) -> Tensor:
        y = super().gate(g.detach())
        return step(g, super().gate, lambda grad: (grad * y).to(g.dtype))


@planted(
    "X-gate-gradient-recomputed-of-output",
    symptom="gates learn too slowly, the more so the further they are shut",
    shows_when="a gated layer is trained",
    killed_by=(GRADIENTS,),
)
class GateGradientOfGatedOutput(TorchAbsorbed):
    """The output is gated in its own memory, and the backward pass takes what it finds there for the output before its gate."""

    def gate(self, g: Tensor) -> Tensor:
        y = super().gate(g)
        return with_gradient(y, lambda grad: grad * y.detach())


@planted(
    "X-gate-gradient-of-one-element",
    symptom="gates of heads learn from one of their elements",
    shows_when="a layer with a gate of each head is trained",
    killed_by=(GRADIENTS,),
)
class GateGradientOfOneElement(TorchAbsorbed):
    """The elements of a head write the gradient of their common gate one over the other."""

    def scaled(self, x: Tensor, factor: Tensor | float) -> Tensor:
        if isinstance(factor, Tensor) and factor.requires_grad and factor.shape[-1] == 1:  # a gate, not a temperature
            last = torch.arange(x.shape[-1], device=x.device) == x.shape[-1] - 1
            factor = with_gradient(factor.expand_as(x), lambda grad: torch.where(last, grad, 0.0))
        return super().scaled(x, factor)


@planted(
    "X-query-gate-gradient-past-the-norm",
    symptom="the down-projection of the query learns as if it had one user",
    shows_when="a layer whose gates come with its queries is trained",
    killed_by=(GRADIENTS,),
)
class LatentPastTheNormDetached(TorchExplicit):
    """The latent that skips the norm is a buffer that the forward pass saved."""

    def query_latent(self, hidden: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        latent = super().query_latent(hidden, weights, config)
        if config.output_gate != "query":
            return latent
        normed, past = latent.split(config.q_lora_rank or 0, dim=-1)
        return torch.cat([normed, past.detach()], dim=-1)
