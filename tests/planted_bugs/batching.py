"""Faults of tiles over heads and tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.planted_bugs.registry import planted


@planted(
    "H2",
    source=("https://github.com/tile-ai/tilelang-mlir-ascend/pull/96",),
    symptom="36 to 44 % of the output is wrong",
    shows_when="fewer than 16 heads, several tokens",
    killed_by=("test_decode_agrees_with_reference",),
)
class StoresPaddedHeads(TorchAbsorbed):
    """A tile of 16 heads is stored whole, over the first heads of the next token."""

    def decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().decode(*args, **options)
        heads, stored = out.shape[2], out.flatten(0, 2).clone()
        for token in reversed(range(len(stored) // heads)):
            stored[token * heads : token * heads + 16] = 0
            stored[token * heads : (token + 1) * heads] = out.flatten(0, 1)[token]
        return stored.view_as(out), lse
