"""Parts of a repeated call: those that differ from the first are judged, not refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.reference.config import RopeConfig

LAW = all_laws()["test_rope_of_many_wide_heads"]


class LateHeads(TorchAbsorbed):
    """Heads from 64 on are rotated by another kernel."""

    late = torch.float64

    def rope(self, x: Tensor, positions: Tensor, *, rope: RopeConfig) -> Tensor:
        out = super().rope(x, positions, rope=rope)
        if x.shape[-2] > 64:
            out[..., 64:, :] = super().rope(x[..., 64:, :].to(self.late), positions, rope=rope).to(x.dtype)
        return out


class CoarseLateHeads(LateHeads):
    late = torch.bfloat16


@pytest.mark.parametrize(("subject", "verdict"), [(LateHeads(), "pass"), (CoarseLateHeads(), "fail")])
def test_parts_with_other_bits_are_held_to_the_bound(subject: TorchAbsorbed, verdict: str) -> None:
    record = run_law(LAW, subject, Options(dtypes=("float32",), minimise=False))
    assert record.verdict == verdict
    assert ("in part 64 of out" in record.message) == (verdict == "fail")
