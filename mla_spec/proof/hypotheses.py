"""Other ways to compute MLA, which a subject may have taken: each is a correct subject with one step changed.

A planted bug is a fault that shipped. What is here is more general: a convention of others, or an arithmetic that a profile may
declare. ``declare`` says which declaration would make it right, where there is one. Conventions that results show by themselves, such
as the base of an LSE, a scale or a mask, stand in ``mla_spec.operations.conventions``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.reference.config import MLAConfig, RopeConfig


@dataclass(frozen=True)
class Hypothesis:
    """A way to compute that gives other numbers.

    Attributes:
        id: its name.
        make: a subject that computes so.
        declare: what a subject that computes so should declare; empty where it is a fault.
    """

    id: str
    make: type
    declare: str = ""

    @property
    def claim(self) -> str:
        """What it does, in one sentence."""
        return (self.make.__doc__ or "").strip().splitlines()[0]


class EmptyRowsOfNaN(TorchAbsorbed):
    """A row without keys is divided by a sum of 0, and is NaN."""

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, lse = super().softmax(scores)
        return weights.masked_fill((lse == -torch.inf)[..., None], torch.nan), lse

    def weighted_values(self, p: Tensor, v: Tensor) -> Tensor:
        out = super().weighted_values(p, v)
        return torch.full_like(out, torch.nan) if p.shape[-1] == 0 else out


class LastKeyLost(TorchAbsorbed):
    """No query sees the last of its keys."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, seqlens - 1, causal)


class FirstKeyLost(TorchAbsorbed):
    """No query sees the first key."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, seqlens, causal) & (torch.arange(t, device=seqlens.device) > 0)


class OneKeyTooMany(TorchAbsorbed):
    """A causal query sees one key more than its own."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        return super().visible(s, t, seqlens + 1, causal) & super().visible(s, t, seqlens, False)


class UnnormalizedWeights(TorchAbsorbed):
    """The output is not divided by the sum of the weights."""

    def softmax(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, lse = super().softmax(scores)
        if scores.shape[-1] == 0:
            return weights, lse
        largest = scores.amax(dim=-1)
        return weights * torch.exp(lse - largest).nan_to_num(1.0)[..., None], lse


class ScoresInDtype(TorchAbsorbed):
    """Scores are rounded to the dtype before the softmax."""

    def scores(self, q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
        scores = super().scores(q, k, softmax_scale)
        return scores.to(q.dtype).to(scores.dtype)


class WeightsInBfloat16(TorchAbsorbed):
    """The weights P are rounded to bfloat16 before they multiply the values."""

    def weighted_values(self, p: Tensor, v: Tensor) -> Tensor:
        return super().weighted_values(p.bfloat16().to(p.dtype), v)


class OtherRopeLayout(TorchAbsorbed):
    """The pairs of rope are (i, i + r/2) where they should be (2i, 2i + 1), and the reverse."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return super().rotate(x, cos, sin, not interleaved)


class InverseRotation(TorchAbsorbed):
    """Rope rotates the other way round."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return super().rotate(x, cos, -sin, interleaved)


class PositionsFromOne(TorchAbsorbed):
    """Positions are one too large."""

    def angles(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> Tensor:
        return super().angles(positions + 1, rope, dtype)


class NoRopeScaling(TorchAbsorbed):
    """YaRN and LongRoPE are ignored."""

    def frequencies(self, rope: RopeConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
        return super().frequencies(replace(rope, yarn=None, longrope=None), device, dtype)


class NoRopeFactor(TorchAbsorbed):
    """Cos and sin have no factor."""

    def cos_sin_factor(self, rope: RopeConfig) -> float:
        return 1.0


class RopeTableInFloat16(TorchAbsorbed):
    """The table of cos and sin is rounded to float16."""

    def cos_sin(self, positions: Tensor, rope: RopeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = super().cos_sin(positions, rope, dtype)
        return cos.half().to(dtype), sin.half().to(dtype)


class ScaleWithoutMscale(TorchAbsorbed):
    """The scale of a layer is (n + r)^-1/2, without the square of YaRN's mscale."""

    def softmax_scale(self, config: MLAConfig) -> float:
        return float(config.qk_head_dim**-0.5)


class NoLatentNorm(TorchAbsorbed):
    """The latents are not normalized."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x


class NormWithoutWeight(TorchAbsorbed):
    """The latents are normalized, but not multiplied by the weight of the norm."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, torch.ones_like(weight), eps)


class OtherNormEps(TorchAbsorbed):
    """The eps of the latent norms is 1e-5, whatever the configuration says."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, weight, 1e-5)


class NoRotationInLayer(TorchAbsorbed):
    """A layer does not rotate."""

    def layer_rope(self, x: Tensor, positions: Tensor, config: MLAConfig) -> Tensor:
        return x


class OtherLayoutInLayer(TorchAbsorbed):
    """A layer has the pairs of rope (i, i + r/2) where they should be (2i, 2i + 1), and the reverse."""

    def layer_rope(self, x: Tensor, positions: Tensor, config: MLAConfig) -> Tensor:
        if config.rope is None:
            return x
        return self.rope(x, positions, rope=replace(config.rope, interleaved=not config.rope.interleaved))


class QueriesNotRotated(TorchAbsorbed):
    """Only keys are rotated."""

    def project_query(
        self, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: MLAConfig
    ) -> tuple[Tensor, Tensor]:
        return super().project_query(hidden, positions * 0, weights, config)


HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis("empty-rows-of-nan", EmptyRowsOfNaN, 'Supports(empty_row="unsupported")'),
    Hypothesis("last-key-lost", LastKeyLost),
    Hypothesis("first-key-lost", FirstKeyLost),
    Hypothesis("one-key-too-many", OneKeyTooMany),
    Hypothesis("unnormalized-weights", UnnormalizedWeights),
    Hypothesis("scores-in-dtype", ScoresInDtype, "Profile(score_format=dtype)"),
    Hypothesis("weights-in-bfloat16", WeightsInBfloat16, 'Profile(probabilities="bfloat16")'),
    Hypothesis("other-rope-layout", OtherRopeLayout, "Supports(rope_layouts=...), the one that is implemented"),
    Hypothesis("inverse-rotation", InverseRotation),
    Hypothesis("positions-from-one", PositionsFromOne),
    Hypothesis("no-rope-scaling", NoRopeScaling, "Supports(yarn=False, longrope=False)"),
    Hypothesis("no-rope-factor", NoRopeFactor),
    Hypothesis("rope-table-in-float16", RopeTableInFloat16, 'Profile(rope=RopeProfile(table="float16"))'),
    Hypothesis("scale-without-mscale", ScaleWithoutMscale),
    Hypothesis("no-latent-norm", NoLatentNorm),
    Hypothesis("norm-without-weight", NormWithoutWeight),
    Hypothesis("other-norm-eps", OtherNormEps, "Supports(latent_norm_eps=1e-5)"),
    Hypothesis("no-rotation-in-layer", NoRotationInLayer),
    Hypothesis("other-layout-in-layer", OtherLayoutInLayer, "Supports(rope_layouts=...), the one that is implemented"),
    Hypothesis("queries-not-rotated", QueriesNotRotated),
)
