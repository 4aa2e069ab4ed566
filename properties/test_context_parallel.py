"""Laws of attention whose keys are spread over ranks: each rank's part by the subject, merged by the subject."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.merge import BoundedMerge
from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, decode_expected
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillCase, PrefillInputs, prefill_expected
from mla_spec.properties.attention import judge_merged_results
from mla_spec.properties.fixed import prefill
from mla_spec.properties.ranks import PLACEMENTS, RingStep, decode_ranks, ring_steps
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.prefill import prefill_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import Result, computed
from mla_spec.subjects.supports import Supports

MERGEABLE = (1.0, 4.0, 0.1, 16.0)
"""Standard deviations of logits for which the LSE of a part is known well enough to merge by it."""


def _needs_parts(supports: Supports) -> str:
    if not supports.lse:
        return "attention returns no LSE"
    if supports.empty_row == "unsupported":
        return "no rule for ranks without keys"
    return "" if False in supports.causal else "attention is always causal"


def _needs_ring(supports: Supports) -> str:
    return _needs_parts(supports) or ("" if True in supports.causal else "prefill is never causal")


def _ranks(case: DecodeCase | PrefillCase, supports: Supports, most: int) -> int:
    return min(2 + case.seed % (most - 1), supports.max_parts or most)


@law(
    needs=("decode", "merge"),
    cases=narrowed(decode_cases, logit_stds=MERGEABLE),
    missing=_needs_parts,
    cost=5,
)
def test_context_parallel_decode_is_the_whole(run: Run, case: DecodeCase) -> None:
    """Keys spread over ranks in runs, singly or in zigzag, decoded rank by rank and merged, are decoded whole."""
    inputs = case.build()
    got, want = [], []
    for part in decode_ranks(inputs, _ranks(case, run.supports, 4), PLACEMENTS[case.seed // 3 % 3]):
        out, lse = run.call(DECODE, part)
        assert lse is not None
        got.append((out, lse))
        want.append(decode_expected(part, run.profile))
    judge_merged_results(run, got, want)


def _self_attention(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Sequences of hardly a token for each run of a rank, so that some steps have as many keys as queries."""
    lengths = (5, 3)
    return [
        replace(case, seed=seed, seqlens_q=lengths, seqlens_k=lengths, causal=True)
        for case in prefill.ordinary(supports, profile)
        for seed in range(3)  # another number of ranks each
    ]


@law(
    needs=("prefill", "merge"),
    cases=narrowed(prefill_cases, min_queries=1, causal=True, self_attention=True, logit_stds=MERGEABLE),
    missing=_needs_ring,
    cost=5,
    first=_self_attention,
)
def test_ring_attention_is_the_whole(run: Run, case: PrefillCase) -> None:
    """Tokens spread over ranks in zigzag, each rank's queries over the keys of one rank after the other, are the whole."""
    inputs = case.build()
    parts = _Parts(inputs, _ranks(case, run.supports, 3))
    for step in ring_steps(inputs, parts.ranks):
        parts.add(run, step)
    judge_merged_results(run, parts.got(), parts.want())


class _Parts:
    """For the keys of each rank, what all queries make of them; those that see none have output 0 and LSE -inf."""

    def __init__(self, inputs: PrefillInputs, ranks: int) -> None:
        tokens, h = inputs.q.shape[:2]
        self.ranks = ranks
        outs, lses = (ranks, tokens, h, inputs.v.shape[-1]), (ranks, h, tokens)
        self.out, self.exact_out, self.out_error = np.zeros(outs), np.zeros(outs), np.zeros(outs)
        self.lse, self.exact_lse, self.lse_error = np.full(lses, -np.inf), np.full(lses, -np.inf), np.zeros(lses)

    def add(self, run: Run, step: RingStep) -> None:
        """Have the subject compute one step."""
        out, lse = run.call(PREFILL, step.inputs)
        assert lse is not None
        want = prefill_expected(step.inputs, run.profile)
        rows, columns = (step.keys, step.queries), (step.keys, slice(None), step.queries)
        self.out[rows], self.exact_out[rows], self.out_error[rows] = out.value, want.out, want.out_error.total
        by_token = [np.moveaxis(x, 0, 1) for x in (lse.value, want.lse, want.lse_error.total)]  # [tokens, h]
        self.lse[columns], self.exact_lse[columns], self.lse_error[columns] = by_token

    def got(self) -> list[tuple[Result, Result]]:
        """out and LSE for each rank's keys."""
        return [(computed(out, "out"), computed(lse, "lse")) for out, lse in zip(self.out, self.lse, strict=True)]

    def want(self) -> list[BoundedMerge]:
        """The exact ones, and how far the subject's may be from them."""

        def bound(error: Array) -> ErrorBound:
            return ErrorBound({"error of the ranks": error})

        return [
            BoundedMerge(self.exact_out[i], bound(self.out_error[i]), self.exact_lse[i], bound(self.lse_error[i]))
            for i in range(self.ranks)
        ]
