"""Faults of what runs when an operation is compiled, and not otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, wide
from mla_spec.planted_bugs.registry import planted
from mla_spec.reference.config import RopeConfig

BACKEND = "eager"
"""What torch.compile traces, without a compiler behind it: the faults are in what it traces."""


@planted(
    "B19-compiled",
    source=(
        "https://github.com/pytorch/torchtitan/pull/2575",
        "https://github.com/pytorch/torchtitan/commit/3da072e7b",
    ),
    symptom="a compiled model differs from the eager one",
    shows_when="16-bit formats, compiled",
    killed_by=("test_compiled_rope_agrees_with_reference",),
    compile=BACKEND,
)
class CompiledTableInDtype(TorchAbsorbed):
    """What is compiled keeps cos and sin in the dtype of what is rotated."""

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().rope(x, positions, rope=rope)
        cos, sin = (y.to(x.dtype) for y in self.cos_sin(positions, rope, wide(x.dtype)))
        if x.ndim == positions.ndim + 2:
            cos, sin = cos[..., None, :], sin[..., None, :]
        return self.rotate(x, cos, sin, rope.interleaved)


@planted(
    "X-compiled-mask-top-left",
    symptom="a compiled model does not know its context",
    shows_when="more keys than queries, compiled",
    killed_by=("test_compiled_decode_agrees_with_reference", "test_compiled_prefill_agrees_with_reference"),
    compile=BACKEND,
)
class CompiledMaskTopLeft(TorchExplicit):
    """The mask that can be traced starts at the first key."""

    def visible(self, s: int, t: int, seqlens: Tensor, causal: bool) -> Tensor:
        visible = super().visible(s, t, seqlens, causal)
        if not (causal and torch.compiler.is_compiling()):
            return visible
        return torch.ones(s, t, dtype=torch.bool, device=seqlens.device).tril().expand_as(visible)
