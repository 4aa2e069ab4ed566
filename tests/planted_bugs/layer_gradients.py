"""Faults of a layer's backward pass. What a layer returns is right in all of them; its gradients are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchLayer, wide
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import MLAConfig, RopeConfig

GRADIENTS = "test_layer_gradients_agree_with_reference"
PRESENT = "test_every_weight_gets_a_gradient"
REPEATABLE = "test_layer_backward_is_repeatable"
UNMODIFIED = "test_layer_backward_does_not_modify_its_inputs"
BATCH = "test_gradients_of_a_batch_add_up"


Step = Callable[[Tensor], Tensor]


class _Step(torch.autograd.Function):
    """A step with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Step, backward: Step) -> Tensor:
        ctx.step = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.step(grads[0]), None, None


def step(x: Tensor, forward: Step, backward: Step) -> Tensor:
    """``forward(x)``, whose gradient ``backward`` takes to that of x."""
    result: Tensor = _Step.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return result


def with_gradient(x: Tensor, backward: Step) -> Tensor:
    """X, whose gradient ``backward`` changes."""
    return step(x, lambda x: x.view_as(x), backward)


class TrainedLayer(TorchExplicit):
    """Correct: with the places at which gradients of a layer can be changed."""

    name = "torch-trained"

    def project_latent(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        latent, k_pe = super().project_latent(hidden, positions, weights, config)
        return latent, self.shared_key(k_pe)

    def shared_key(self, k_pe: Tensor) -> Tensor:
        """The rotated key [b, s, r] that all heads share."""
        return k_pe

    def layer_rope(self, x: Tensor, positions: Tensor, config: MLAConfig) -> Tensor:
        if config.rope is None:
            return x
        return self.rotated_for_training(x, positions, config.rope)

    def rotated_for_training(self, x: Tensor, positions: Tensor, rope: RopeConfig) -> Tensor:
        """``rope`` of x in a layer."""
        return self.rope(x, positions, rope=rope)


@planted(
    "K5-layer",
    source=("https://github.com/NVIDIA/Megatron-LM/pull/6839",),
    symptom="the gradient of the rope rows of the down-projection points elsewhere; the latent rows are right",
    shows_when="several ranks, and so several heads, and a rope part",
    killed_by=(GRADIENTS,),
)
class SharedKeyOfLocalHeads(TrainedLayer):
    """The gradient of the shared key is that of the first rank's heads alone: no sum over the ranks."""

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
        local = -(-q_nope.shape[2] // 2)

        def of_heads(heads: slice, key: Tensor) -> Tensor:
            queries = q_nope[:, :, heads], q_pe[:, :, heads]
            sink = None if attn_sink is None else attn_sink[heads]
            return super(SharedKeyOfLocalHeads, self).attend_latent(
                *queries, latent, key, w_uk[heads], w_uv[heads], scale, sink
            )

        parts = [
            of_heads(heads, key)
            for heads, key in ((slice(local), k_pe), (slice(local, None), k_pe.detach()))
            if w_uk[heads].numel()
        ]
        return torch.cat(parts, dim=2)


@planted(
    "K7",
    source=(
        "https://github.com/NVIDIA/Megatron-LM/pull/5273",
        "https://github.com/NVIDIA/Megatron-LM/commit/76d26e24b0",
    ),
    symptom="a fused projection gets no weight gradient",
    shows_when="weight gradients are computed later than the others",
    killed_by=(GRADIENTS, PRESENT),
)
class WeightGradientNeverComputed(TorchAbsorbed):
    """The down-projections leave their weight gradients for later, and later nobody asks for them."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        delayed = {"q_a_proj", "q_proj", "kv_a_proj_with_mqa"}
        return super().layer(
            {name: with_gradient(w, torch.zeros_like) if name in delayed else w for name, w in weights.items()}, config
        )


@planted(
    "X-gradient-of-frozen-weight",
    symptom="a weight does not learn",
    shows_when="always",
    killed_by=(PRESENT, GRADIENTS),
)
class NormWeightDetached(TorchAbsorbed):
    """The weight of the norm is taken as data, not as a parameter."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, weight.detach(), eps)


@planted(
    "X-gradient-of-shared-key-detached",
    symptom="the rope rows of the down-projection do not learn",
    shows_when="a rope part",
    killed_by=(PRESENT, GRADIENTS),
)
class SharedKeyDetached(TrainedLayer):
    """The key that is cached is cut off from what it was computed of."""

    def shared_key(self, k_pe: Tensor) -> Tensor:
        return k_pe.detach()


@planted(
    "X-gradient-rotated-forward",
    symptom="training is worse the later a token comes",
    shows_when="positions other than 0",
    killed_by=(GRADIENTS,),
)
class GradientRotatedForward(TrainedLayer):
    """The backward pass of the rotary embedding rotates once more by the angle, not back."""

    def rotated_for_training(self, x: Tensor, positions: Tensor, rope: RopeConfig) -> Tensor:
        def rotate(x: Tensor) -> Tensor:
            return self.rope(x, positions, rope=rope)

        return step(x, rotate, rotate)


@planted(
    "X-gradient-without-rope-factor",
    symptom="gradients of the rope part are too small with LongRoPE or YaRN",
    shows_when="a factor on cos and sin",
    killed_by=(GRADIENTS,),
)
class GradientWithoutRopeFactor(TrainedLayer):
    """The backward pass rotates back, by plain cos and sin."""

    def rotated_for_training(self, x: Tensor, positions: Tensor, rope: RopeConfig) -> Tensor:
        rotated = super().rotated_for_training(x, positions, rope)
        return with_gradient(rotated, lambda grad: grad / rope.cos_sin_factor)


@planted(
    "X-gradient-of-norm-not-projected",
    symptom="gradients before a norm are too large",
    shows_when="always",
    killed_by=(GRADIENTS,),
)
class RmsIsConstant(TorchAbsorbed):
    """The backward pass of RMSNorm takes the rms as a constant and leaves out the projection."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps).detach()
        return (y * weight.to(y.dtype)).to(x.dtype)


@planted(
    "X-gradient-of-norm-weight-not-normalised",
    symptom="the weights of the norms run away",
    shows_when="latents whose rms is not 1",
    killed_by=(GRADIENTS,),
)
class NormWeightGradientOfRawLatent(TorchAbsorbed):
    """The gradient of the norm's weight is summed from the latent as it was before the norm."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.to(wide(x.dtype))
        rms = (y.square().mean(dim=-1, keepdim=True) + eps).sqrt().detach()
        for_each = with_gradient(weight.to(y.dtype).expand_as(y), lambda grad: grad * rms)
        return (y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps) * for_each).to(x.dtype)


@planted(
    "X-gradient-without-latent-factor",
    symptom="the up-projections learn at another rate than the rest",
    shows_when="factors on latents, or a temperature by position",
    killed_by=(GRADIENTS,),
)
class GradientWithoutFactor(TorchExplicit):
    """A factor is applied forwards only."""

    def scaled(self, x: Tensor, factor: Tensor | float) -> Tensor:
        return with_gradient(super().scaled(x, factor), lambda grad: (grad / factor).to(grad.dtype))


@planted(
    "X-gradient-of-key-rows-missing",
    symptom="the keys do not learn",
    shows_when="always",
    killed_by=(PRESENT, GRADIENTS),
)
class KeyRowsDetached(TorchAbsorbed):
    """The key rows of kv_b_proj are absorbed into the query once, as for inference, and so are data."""

    def absorb(self, kv_b_proj: Tensor, *, config: MLAConfig) -> tuple[Tensor, Tensor]:
        w_uk, w_uv = super().absorb(kv_b_proj, config=config)
        return w_uk.detach(), w_uv


@planted(
    "X-gradient-of-one-head",
    symptom="the up-projections get the gradient of one head for all",
    shows_when="several heads",
    killed_by=(GRADIENTS,),
)
class GradientsOfHeadsMixed(TorchExplicit):
    """The gradients of the keys of all heads are written one over the other, the last remains."""

    def absorb(self, kv_b_proj: Tensor, *, config: MLAConfig) -> tuple[Tensor, Tensor]:
        w_uk, w_uv = super().absorb(kv_b_proj, config=config)
        return with_gradient(w_uk, lambda grad: grad[-1:].expand_as(grad)), w_uv


@planted(
    "X-gradient-buffer-not-cleared",
    symptom="the second step learns the first one again",
    shows_when="two backward passes",
    killed_by=(REPEATABLE,),
)
class GradientBufferNotCleared(TorchAbsorbed):
    """Gradients of o_proj are added to a buffer that is allocated once for each shape."""

    def __init__(self) -> None:
        self.buffers: dict[torch.Size, Tensor] = {}

    def project_output(self, out: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        accumulated = {**weights, "o_proj": with_gradient(weights["o_proj"], self.accumulate)}
        return super().project_output(out, accumulated, config)

    def accumulate(self, grad: Tensor) -> Tensor:
        """The gradient and what the buffer holds."""
        self.buffers[grad.shape] = grad + self.buffers.get(grad.shape, 0)
        return self.buffers[grad.shape]


@planted(
    "X-arriving-gradient-scaled-in-place",
    symptom="what else the gradient of the output goes to gets half of it",
    shows_when="a residual connection around the layer",
    killed_by=(UNMODIFIED,),
)
class ScalesGradientInPlace(TorchExplicit):
    """The gradient that arrives is scaled in its own memory, lest sums overflow; the result is scaled back."""

    def project_output(self, out: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        return with_gradient(super().project_output(out, weights, config), lambda grad: grad.mul_(0.5) * 2)


@planted(
    "X-weight-gradient-averaged",
    symptom="the learning rate depends on the batch size",
    shows_when="several sequences",
    killed_by=(BATCH, GRADIENTS),
)
class WeightGradientAveraged(TorchAbsorbed):
    """Gradients of the projections are means over the sequences of the batch, not sums."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if weight.ndim == 2:
            weight = with_gradient(weight, lambda grad: grad / len(x))
        return super().linear(x, weight)


@planted(
    "X-weight-gradient-of-last-sequence",
    symptom="only the last sequence of a batch is learnt",
    shows_when="several sequences",
    killed_by=(BATCH, GRADIENTS),
)
class WeightGradientOfLastSequence(TorchExplicit):
    """The weight gradients of the sequences are written one over the other."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if weight.ndim != 2:
            return super().linear(x, weight)
        each = [super(WeightGradientOfLastSequence, self).linear(row, weight.detach()) for row in x[:-1]]
        return torch.stack([*each, super().linear(x[-1], weight)])
