"""Faults of the backward pass of the rotary embedding. What ``rope`` returns is right in all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.layer_gradients import with_gradient
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous
from mla_spec.reference.config import RopeConfig

AGREES = "test_rope_gradient_agrees_with_reference"
TWO_CALLS = "test_rope_gradients_of_two_calls"
STRIDES = "test_rope_gradient_reads_strides"
UNMODIFIED = "test_rope_backward_does_not_modify_its_arguments"


class _Rotation(torch.autograd.Function):
    """``rope`` with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, subject: FusedRope, positions: Tensor, rope: RopeConfig) -> Tensor:
        ctx.subject, ctx.kept, ctx.rope = subject, subject.keep(x, positions), rope
        return subject.turned(x, positions, rope)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.subject.turned_back(grads[0], ctx.kept, ctx.rope), None, None, None


class FusedRope(TorchAbsorbed):
    """Correct: rope whose backward pass is a rotation by the negative angle."""

    name = "torch-fused-rope"

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        out: Tensor = _Rotation.apply(x, self, positions, rope)  # type: ignore[no-untyped-call]
        return out

    def keep(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the backward pass gets."""
        return x, positions

    def turned(self, x: Tensor, positions: Tensor, rope: RopeConfig) -> Tensor:
        """x rotated by the angles of its positions."""
        return super().rope(x, positions, rope=rope)

    def turned_back(self, grad: Tensor, kept: tuple[Tensor, Tensor], rope: RopeConfig) -> Tensor:
        """The gradient of x."""
        return self.turned(grad, -kept[1], rope)


@planted(
    "K30",
    source=("https://github.com/NVIDIA/Megatron-LM/issues/4640",),
    symptom="the gradient of a residual branch is rotated too",
    shows_when="something else uses the gradient of out",
    killed_by=(UNMODIFIED,),
)
class RotatesGradientInPlace(FusedRope):
    """The gradient of out is rotated where it lies."""

    def turned_back(self, grad: Tensor, kept: tuple[Tensor, Tensor], rope: RopeConfig) -> Tensor:
        return grad.copy_(super().turned_back(grad, kept, rope))


@planted(
    "K31",
    source=("https://github.com/NVIDIA/Megatron-LM/pull/5963",),
    symptom="what was rotated is garbage for whoever reads it after the backward pass",
    shows_when="the caller uses x again",
    killed_by=(UNMODIFIED,),
)
class GradientWrittenOverInput(FusedRope):
    """The memory of x is taken for the gradient, since the backward pass does not need x."""

    def turned_back(self, grad: Tensor, kept: tuple[Tensor, Tensor], rope: RopeConfig) -> Tensor:
        return kept[0].data.copy_(super().turned_back(grad, kept, rope)).clone()


@planted(
    "X-rope-gradient-rotated-forward",
    symptom="training is worse the later a token comes",
    shows_when="positions other than 0",
    killed_by=(AGREES,),
)
class RotatesForwardAgain(FusedRope):
    """The backward pass rotates once more by the angle, not back."""

    def turned_back(self, grad: Tensor, kept: tuple[Tensor, Tensor], rope: RopeConfig) -> Tensor:
        return self.turned(grad, kept[1], rope)


@planted(
    "X-rope-gradient-without-factor",
    symptom="queries and keys learn too slowly with YaRN or LongRoPE",
    shows_when="a factor on cos and sin",
    killed_by=(AGREES,),
)
class FactorLeftOut(FusedRope):
    """The backward pass rotates by plain cos and sin."""

    def turned_back(self, grad: Tensor, kept: tuple[Tensor, Tensor], rope: RopeConfig) -> Tensor:
        return super().turned_back(grad / rope.cos_sin_factor, kept, rope).to(grad.dtype)


@planted(
    "X-rope-gradient-with-factor-twice",
    symptom="queries and keys learn too fast with YaRN or LongRoPE",
    shows_when="a factor on cos and sin",
    killed_by=(AGREES,),
)
class FactorTwice(FusedRope):
    """The table holds the factor, and the backward pass multiplies by it too."""

    def turned_back(self, grad: Tensor, kept: tuple[Tensor, Tensor], rope: RopeConfig) -> Tensor:
        return super().turned_back(grad * rope.cos_sin_factor, kept, rope).to(grad.dtype)


@planted(
    "X-rope-gradient-at-last-positions",
    symptom="with several micro-batches under way, all but the last learn from other angles",
    shows_when="another call comes between a call and its backward pass",
    killed_by=(TWO_CALLS,),
)
class PositionsOfLastCall(FusedRope):
    """Positions lie in a workspace of the subject, where the next call of the same shape puts its own."""

    def __init__(self) -> None:
        self.workspace: dict[Any, Tensor] = {}

    def keep(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        space = self.workspace.setdefault(positions.shape, torch.empty_like(positions))
        return x, space.copy_(positions)


@planted(
    "X-rope-gradient-negates-positions",
    symptom="keys are rotated back the wrong way, queries the right way",
    shows_when="two calls share a tensor of positions",
    killed_by=(TWO_CALLS, UNMODIFIED),
)
class PositionsNegatedInPlace(FusedRope):
    """The backward pass negates the positions in place, and so the one after it rotates forward."""

    def turned_back(self, grad: Tensor, kept: tuple[Tensor, Tensor], rope: RopeConfig) -> Tensor:
        return self.turned(grad, kept[1].neg_(), rope)


@planted(
    "X-rope-out-gradient-ignores-strides",
    symptom="wrong gradients where the rotated part is a slice of a longer row",
    shows_when="the gradient of out is a view",
    killed_by=(STRIDES,),
)
class OutGradientIgnoresStrides(FusedRope):
    """The gradient of out is taken to be contiguous."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        return with_gradient(super().rope(x, positions, rope=rope), as_if_contiguous)
