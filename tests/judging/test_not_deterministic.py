"""A subject that declares that it is not deterministic is compared within its bound where others are bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla_spec import Options, check_subject
from mla_spec.bounds.profile import Profile
from mla_spec.proof.emulated import EmulatedKernel

LAW = "test_decode_page_relabelling_changes_nothing"


class Atomics(EmulatedKernel):
    """Adds up in another order each time, which moves a result by a few roundoffs; ``off`` of them."""

    def __init__(self, off: float, *, deterministic: bool) -> None:
        super().__init__({"float32": Profile.default("float32", deterministic=deterministic)})
        self.off, self.generator = off * 2.0**-24, torch.Generator().manual_seed(0)

    def decode(self, *tensors: Any, **options: Any) -> Any:
        out, lse = super().decode(*tensors, **options)
        return out * (1 + self.off * (2 * torch.rand(out.shape, generator=self.generator) - 1)), lse


@pytest.mark.parametrize(
    ("off", "deterministic", "verdict"), [(2.0, True, "fail"), (2.0, False, "pass"), (1e5, False, "fail")]
)
def test_bits_are_compared_within_the_bound(off: float, deterministic: bool, verdict: str) -> None:
    options = Options(examples=6, minimise=False)
    (record,) = check_subject(Atomics(off, deterministic=deterministic), laws=[LAW], options=options)
    assert record.verdict == verdict
    assert record.note.startswith("the subject is not deterministic") or verdict != "pass"
