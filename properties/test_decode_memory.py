"""Law of the memory that ``decode`` takes while it runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs
from mla_spec.subjects.allocation import PeakAllocations
from mla_spec.subjects.driver import Driver, Tensors
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports

COPIES = (2, 4, 8, 16)
"""How often the sequences of a case are decoded at once; each is twice the one before."""


def _cases(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Two short sequences in the smallest dims that the subject takes."""
    c, r = (8, 4) if supports.latent_dims is None else min(supports.latent_dims)
    return [
        DecodeCase(
            dtype=profile.dtype,
            seqlens=(5, 9),
            num_heads=min(supports.num_heads or (2,)),
            kv_lora_rank=c,
            qk_rope_head_dim=r,
            page_size=min(supports.page_sizes or (4,)),
            causal=causal,
        )
        for causal in supports.causal
    ]


def _repeated(inputs: DecodeInputs, copies: int) -> DecodeInputs:
    """The same sequences ``copies`` times, in the same pages."""
    q, block_table, cache_seqlens = (
        np.concatenate([x] * copies) for x in (inputs.q, inputs.block_table, inputs.cache_seqlens)
    )
    return replace(inputs, q=q, block_table=block_table, cache_seqlens=cache_seqlens)


def _peak(driver: Driver, inputs: Any, tensors: Tensors) -> int:
    """The most bytes in use during a call."""
    with PeakAllocations() as memory:
        driver.raw(DECODE, inputs, tensors)
    peak: int = memory.peak
    return peak


@law(needs=("decode",), cases=_cases, live="tensors")
def test_decode_memory_grows_with_the_batch(run: Run, case: DecodeCase) -> None:
    """The most of torch's memory in use, the only one seen, grows no faster than the batch: it does not always more than double.

    Whatever a kernel allocates once, per sequence, per tile or per split at most doubles with the sequences. A kernel that
    does otherwise from some batch size on more than doubles once, not three times.
    """
    inputs = case.build()
    peaks = []
    for copies in COPIES:
        batch = _repeated(inputs, copies)
        tensors = run.driver.tensors(DECODE, batch)
        peaks.append(there(_peak, run.driver, DECODE.asked(batch, tensors=False), tensors))
    sequences = " and ".join(str(copies * len(case.seqlens)) for copies in COPIES)
    run.require(
        any(larger <= 2 * smaller for smaller, larger in pairwise(peaks)),
        f"decode of {sequences} sequences allocates up to {' and '.join(map(str, peaks))} B at once",
    )
