"""Faults of the backward pass of merged parts. What ``merge`` and ``prefill`` return is right in all of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, wide
from mla_spec.planted_bugs.fused_backward import FusedBackward
from mla_spec.planted_bugs.layer_gradients import with_gradient
from mla_spec.planted_bugs.registry import planted
from mla_spec.planted_bugs.strides import as_if_contiguous

AGREES = "test_merge_gradients_agree_with_reference"
THROUGH_LSE = "test_merge_gradients_through_the_lse"
ONE = "test_merge_gradients_of_one_argument"
EMPTY = "test_merge_gradients_of_empty_parts"
STRIDES = "test_merge_gradients_read_strides"
UNMODIFIED = "test_merge_backward_does_not_modify_its_arguments"
RING = "test_gradients_through_merged_parts_are_those_of_the_whole"


class _Merge(torch.autograd.Function):
    """``merge`` with a backward pass of its own, which forms the shares anew."""

    @staticmethod
    def forward(ctx: Any, subject: FusedMerge, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super(FusedMerge, subject).merge(outs, lses)
        ctx.subject, ctx.kept = subject, (outs, lses, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        outs_grad, lses_grad = ctx.subject.merge_gradients(*ctx.kept, *grads)
        return None, outs_grad, lses_grad


class FusedMerge(TorchAbsorbed):
    """Correct: the gradients of a merge by their formulas, in steps."""

    name = "torch-fused-merge"

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _Merge.apply(self, outs, lses)  # type: ignore[no-untyped-call]
        return out, lse

    def merge_gradients(
        self, outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, out_grad: Tensor, lse_grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of outs [parts, (b,) s, h, v] and lses [parts, (b,) h, s]."""
        dtype = wide(outs.dtype)
        p, do = self.merge_shares(lses, lse), out_grad.to(dtype)
        dp = (do * outs.to(dtype)).sum(dim=-1).transpose(-1, -2)  # [parts, (b,) h, s]
        outs_grad = self.outs_grad(p.transpose(-1, -2)[..., None], do)
        return outs_grad.to(outs.dtype), self.lses_grad(p, dp, self.mean(do, out), lse_grad)

    def merge_shares(self, lses: Tensor, lse: Tensor) -> Tensor:
        """exp(lses − lse), 0 where no part has keys."""
        return torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0))

    def outs_grad(self, p: Tensor, out_grad: Tensor) -> Tensor:
        return p * out_grad

    def mean(self, out_grad: Tensor, out: Tensor) -> Tensor:
        """D, [(b,) h, s]."""
        return (out_grad * out.to(out_grad.dtype)).sum(dim=-1).transpose(-1, -2)

    def lses_grad(self, p: Tensor, dp: Tensor, mean: Tensor, lse_grad: Tensor) -> Tensor:
        return p * (dp - mean + lse_grad)


@planted(
    "K32",
    source=("https://github.com/SHI-Labs/NATTEN/issues/274",),
    symptom="queries and keys of merged branches are trained as if shares were constants",
    shows_when="the LSEs of parts depend on what is trained",
    killed_by=(AGREES, THROUGH_LSE, ONE, RING),
)
class SharesAreConstants(FusedMerge):
    """The gradient of each part's LSE is 0."""

    def lses_grad(self, p: Tensor, dp: Tensor, mean: Tensor, lse_grad: Tensor) -> Tensor:
        return torch.zeros_like(p)


@planted(
    "K33",
    source=("https://github.com/NVIDIA/TransformerEngine/pull/716",),
    symptom="NaN in the gradients of rows with large scores",
    shows_when="exp(LSE) overflows",
    killed_by=(AGREES, THROUGH_LSE),
)
class SharesOfOverflowingExponentials(FusedMerge):
    """Shares are formed anew as exp(L_i) / exp(lse)."""

    def merge_shares(self, lses: Tensor, lse: Tensor) -> Tensor:
        total = torch.exp(lse)
        return torch.exp(lses) / total.masked_fill(total == 0, 1.0)


@planted(
    "K34",
    source=("https://github.com/pytorch/pytorch/pull/196170",),
    symptom="one padded query makes all gradients NaN",
    shows_when="no part of a row has keys",
    killed_by=(EMPTY, AGREES),
)
class EmptyRowsAreNaN(FusedMerge):
    """Rows without keys are masked in the forward pass only: their shares are exp(−inf + inf)."""

    def merge_shares(self, lses: Tensor, lse: Tensor) -> Tensor:
        return torch.exp(lses - lse)


@planted(
    "K35",
    source=("https://github.com/meta-pytorch/attention-gym/pull/200",),
    symptom="gradients of ring attention are wrong with the backend whose LSE is in base 2",
    shows_when="the forward pass was in base e",
    killed_by=(AGREES, THROUGH_LSE, RING),
)
class StoredLseInAnotherBase(FusedMerge):
    """The stored LSE is taken for one in base 2 when shares are formed anew."""

    def merge_shares(self, lses: Tensor, lse: Tensor) -> Tensor:
        return super().merge_shares(lses, lse * math.log(2))


@planted(
    "X-merged-lse-gradient-ignored",
    symptom="a loss on the LSE of all keys trains nothing, and neither does a merge of merges",
    shows_when="the loss depends on the merged LSE",
    killed_by=(THROUGH_LSE,),
)
class MergedLseGradientIgnored(FusedMerge):
    """The gradient of the merged LSE is dropped."""

    def lses_grad(self, p: Tensor, dp: Tensor, mean: Tensor, lse_grad: Tensor) -> Tensor:
        return super().lses_grad(p, dp, mean, torch.zeros_like(lse_grad))


@planted(
    "X-merge-gradient-without-mean",
    symptom="training converges to something worse with context parallelism",
    shows_when="parts have outputs with a mean",
    killed_by=(AGREES, RING),
)
class MeanNotSubtracted(FusedMerge):
    """D is not subtracted."""

    def mean(self, out_grad: Tensor, out: Tensor) -> Tensor:
        return torch.zeros_like(super().mean(out_grad, out))


@planted(
    "X-merge-gradient-not-shared",
    symptom="values of every rank get the gradient of the whole",
    shows_when="two parts and more",
    killed_by=(AGREES, RING),
)
class OutGradientNotShared(FusedMerge):
    """Each part gets the gradient of the merged output as it is."""

    def outs_grad(self, p: Tensor, out_grad: Tensor) -> Tensor:
        return out_grad.expand(len(p), *out_grad.shape)


@planted(
    "X-merge-gradient-written-over-outs",
    symptom="the outputs of ranks are garbage after the backward pass",
    shows_when="the caller uses outs again",
    killed_by=(UNMODIFIED,),
)
class GradientWrittenOverOuts(FusedMerge):
    """The memory of outs is taken for their gradient, since nothing else of the backward pass needs them any more."""

    def merge_gradients(self, outs: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        outs_grad, lses_grad = super().merge_gradients(outs, *args)
        return outs.data.copy_(outs_grad).clone(), lses_grad


@planted(
    "X-merge-gradient-scaled-in-place",
    symptom="the gradient of a residual branch beside attention is that of one rank's part",
    shows_when="something else uses the gradient of out",
    killed_by=(UNMODIFIED,),
)
class OutGradientScaledInPlace(FusedMerge):
    """The gradient of the first part is left in the memory of that of out."""

    def merge_gradients(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        outs_grad, lses_grad = super().merge_gradients(*args)
        args[4].copy_(outs_grad[0])
        return outs_grad, lses_grad


@planted(
    "X-merge-out-gradient-ignores-strides",
    symptom="wrong gradients where the merged output is transposed or summed next",
    shows_when="the gradient of out is a view",
    killed_by=(STRIDES,),
)
class OutGradientIgnoresStrides(TorchAbsorbed):
    """The gradient of out is taken to be contiguous."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().merge(outs, lses)
        return with_gradient(out, as_if_contiguous), lse


@planted(
    "X-merge-gradient-of-lses-beside-detached-outs",
    symptom="frozen values, as of a draft model, stop the training of the keys",
    shows_when="lses require a gradient and outs do not",
    killed_by=(ONE,),
)
class NothingForLsesAlone(FusedMerge):
    """The backward pass is skipped for all where outs need no gradient."""

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().merge(outs, lses)
        return out if outs.requires_grad else with_gradient(out, torch.zeros_like), lse


@planted(
    "K36",
    source=("https://github.com/NVIDIA/TransformerEngine/issues/1557",),
    symptom="gradients differ from those on one device by more than their own size; outputs agree",
    shows_when="context parallelism: the keys of the next rank are attended to before the first backward pass",
    killed_by=(RING,),
)
class LseOfLastPart(FusedBackward):
    """The LSE that the backward pass needs is kept in a buffer, which the part of the next rank overwrites."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def attend(self, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(*args)
        buffer = self.buffers.setdefault((lse.shape, lse.dtype), torch.empty_like(lse))
        buffer.data.copy_(lse)
        return out, lse

    def weights(self, q: Tensor, k: Tensor, visible: Tensor, lse: Tensor, softmax_scale: float) -> Tensor:
        return super().weights(q, k, visible, self.buffers[lse.shape, lse.dtype], softmax_scale)
