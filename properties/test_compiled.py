"""Laws of operations compiled by ``torch.compile``; they run where a backend is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.judging.compiled import compiled, needs_compiler
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.rope import OPERATION as ROPE
from mla_spec.operations.rope import RopeCase
from mla_spec.properties.fixed import decode, prefill
from mla_spec.subjects.supports import Supports


def _rope_cases(supports: Supports, profile: Profile) -> list[RopeCase]:
    """Each layout at positions of a long context, as for queries."""
    return [
        RopeCase(dtype=profile.dtype, batch=2, s=3, heads=2, dim=16, layout=layout, start=131_072, stride=17)
        for layout in supports.rope_layouts
    ]


@law(needs=DECODE, cases=decode.ordinary, unavailable=needs_compiler, live="tensors")
def test_compiled_decode_agrees_with_reference(run: Run, case: DecodeCase) -> None:
    """Compiled once, decode is within the bound of its profile for longer and for shorter sequences."""
    driver, inputs = compiled(run, "decode"), case.build()
    shorter = np.maximum(inputs.cache_seqlens // 2, case.s).astype(np.int32)
    for this in (inputs, replace(inputs, cache_seqlens=shorter, softmax_scale=inputs.softmax_scale / 2)):
        run.agrees(DECODE, this, driver.call(DECODE, this))


@law(needs=PREFILL, cases=prefill.ordinary, unavailable=needs_compiler, live="tensors")
def test_compiled_prefill_agrees_with_reference(run: Run, case: PrefillCase) -> None:
    """Compiled once, prefill is within the bound of its profile for longer and for shorter sequences."""
    driver = compiled(run, "prefill")
    shorter = replace(case, seqlens_q=case.seqlens_q[1:], seqlens_k=case.seqlens_k[1:])
    for this in (case, shorter):
        inputs = this.build()
        run.agrees(PREFILL, inputs, driver.call(PREFILL, inputs))


@law(needs=ROPE, cases=_rope_cases, unavailable=needs_compiler, live="tensors")
def test_compiled_rope_agrees_with_reference(run: Run, case: RopeCase) -> None:
    """Compiled, rope is within the bound of its profile, at the positions of a long context too."""
    inputs = case.build()
    run.agrees(ROPE, inputs, compiled(run, "rope").call(ROPE, inputs))
