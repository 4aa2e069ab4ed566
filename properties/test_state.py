"""Laws of calls whose tensors are used again: other contents in the same memory, as graphs are replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from mla_spec.judging.cuda_graph import Replay, captured, needs_cuda
from mla_spec.judging.law import Run, law
from mla_spec.operations.all import DecodeCase, DecodeInputs, PrefillCase
from mla_spec.properties.expected import decode_expected, judge_attention, prefill_expected
from mla_spec.properties.strategies.sizes import decode_cases, prefill_cases
from mla_spec.subjects.supports import Supports


def _needs_graphs(supports: Supports) -> str:
    return "" if supports.cuda_graphs else "does not declare cuda_graphs"


def _static(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In memory of their own: on the CPU a driver's tensors may be the memory of what they were made from."""
    return {name: x.clone() for name, x in tensors.items()}


def _fill(tensors: dict[str, Tensor], contents: dict[str, Tensor]) -> None:
    """Other contents for the same memory."""
    for name, x in tensors.items():
        x.copy_(contents[name])


@law(needs=("decode",), cases=decode_cases, cost=2)
def test_decode_reads_its_tensors_anew(run: Run, case: DecodeCase) -> None:
    """Longer and then shorter lengths, other tables, pages and queries in the same tensors give what they should."""
    judge_replays(run, case, lambda call: call)


@law(needs=("decode",), cases=decode_cases, missing=_needs_graphs, unavailable=needs_cuda)
def test_decode_is_replayed_in_a_cuda_graph(run: Run, case: DecodeCase) -> None:
    """Captured for short sequences, decode gives what it should for longer ones, other tables, pages and queries."""
    judge_replays(run, case, lambda call: captured(call, run.driver.device))


def judge_replays(run: Run, case: DecodeCase, capture: Callable[[Callable[[], Any]], Replay]) -> None:
    """Judge what a call of decode gives when it is replayed on new contents of its tensors.

    Args:
        capture: from a call, what runs it again.
    """
    longer, driver = case.build(), run.driver
    shorter = _shortened(replace(case, seed=case.seed + 1).build(), case.s)
    tensors = _static(driver.decode_tensors(shorter))
    options = {"head_dim_v": case.kv_lora_rank, "softmax_scale": longer.softmax_scale, "causal": case.causal}
    replay = driver.guard(lambda: capture(lambda: driver.subject.decode(*tensors.values(), **options)))
    for inputs in (longer, shorter):
        _fill(tensors, driver.decode_tensors(inputs))
        got = driver.read_decode(inputs, driver.guard(replay))
        judge_attention(run, got, decode_expected(inputs, run.profile))


def _shortened(inputs: DecodeInputs, s: int) -> DecodeInputs:
    """Sequences of half the length, but of no fewer tokens than there are queries."""
    lengths = inputs.cache_seqlens
    return replace(inputs, cache_seqlens=np.maximum(lengths // 2, np.minimum(lengths, s)).astype(np.int32))


@law(needs=("prefill",), cases=prefill_cases, cost=4)
def test_prefill_reads_its_tensors_anew(run: Run, case: PrefillCase) -> None:
    """Other offsets, queries, keys and values in the same tensors give what they should."""
    other = replace(case, seed=case.seed + 1, seqlens_q=case.seqlens_q[::-1], seqlens_k=case.seqlens_k[::-1])
    first = case.build()
    tensors = _static(run.driver.prefill_tensors(first))
    run.driver.prefill_raw(first, tensors)
    for inputs in (other.build(), first):
        _fill(tensors, run.driver.prefill_tensors(inputs))
        judge_attention(run, run.driver.prefill(inputs, tensors), prefill_expected(inputs, run.profile))
