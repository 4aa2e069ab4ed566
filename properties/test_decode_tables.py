"""Laws of ``decode`` whose block tables are out of the ordinary: pages that sequences share."""

from __future__ import annotations

from dataclasses import replace

from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, decode_expected
from mla_spec.properties.attention import judge_attention, needs_several_sequences
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.sizes import narrowed


@law(needs=DECODE, cases=narrowed(decode_cases, min_batch=2), missing=needs_several_sequences, cost=2)
def test_decode_sequences_share_the_pages_of_a_prefix(run: Run, case: DecodeCase) -> None:
    """Sequences whose tables begin with the same pages, as after a prefix-cache hit, each read all of them."""
    inputs = case.build()
    table = inputs.block_table.copy()
    longest = int(inputs.cache_seqlens.argmax())
    for i, count in enumerate(case.pages_needed):
        shared = count - count // 3
        table[i, :shared] = table[longest, :shared]
    shared_inputs = replace(inputs, block_table=table)
    judge_attention(run, run.call(DECODE, shared_inputs), decode_expected(shared_inputs, run.profile))
