"""Laws of the operation ``merge``: parts of one attention joined by their LSEs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs, declared_lse, decode_expected
from mla_spec.operations.merge import OPERATION as MERGE
from mla_spec.operations.merge import MergeCase, MergeInputs, merge_expected
from mla_spec.properties.attention import judge_merged_results
from mla_spec.properties.fixed.counts import nearest
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.merge import merge_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.typing import IntArray
from mla_spec.subjects.supports import Supports


def _needs_empty_rows(supports: Supports) -> str:
    return "no rule for rows without keys" if supports.empty_row == "unsupported" else ""


def _needs_lse(supports: Supports) -> str:
    return "" if supports.lse else "decode returns no LSE"


@law(needs=MERGE, cases=merge_cases)
def test_merge_agrees_with_reference(run: Run, case: MergeCase) -> None:
    """out = Σ exp(lse_i - lse) · out_i, within the worst-case bound of the profile, and 0 where no part has keys."""
    inputs = case.build()
    want = merge_expected(inputs, run.profile)
    run.within(run.call(MERGE, inputs)[0], want.out, want.out_error)


@law(needs=MERGE, cases=merge_cases)
def test_merge_lse_agrees_with_reference(run: Run, case: MergeCase) -> None:
    """lse = log Σ exp(lse_i), natural, laid out like each part's, the declared value where no part has keys."""
    inputs = case.build()
    want = merge_expected(inputs, run.profile)
    run.within(run.call(MERGE, inputs)[1], declared_lse(want.lse, run.supports), want.lse_error, gate=False)


@law(needs=MERGE, cases=narrowed(merge_cases, min_parts=2))
def test_merge_order_of_parts_changes_nothing(run: Run, case: MergeCase) -> None:
    """Parts in another order give the same, but for rounding."""
    inputs = case.build()
    want = merge_expected(inputs, run.profile)
    order = np.random.default_rng([case.seed, 4]).permutation(case.parts)
    shuffled = MergeInputs(outs=inputs.outs[order], lses=inputs.lses[order])
    why = f"the parts came in the order {order.tolist()}"
    first, second = run.call(MERGE, inputs), run.call(MERGE, shuffled)
    run.same_function(second[0], first[0], want.out_error, why)
    run.same_function(second[1], first[1], want.lse_error, why)


@law(needs=MERGE, cases=narrowed(merge_cases, min_parts=2, lse_means=(0.0, 5.0, -5.0, 200.0, -200.0)))
def test_merge_is_associative(run: Run, case: MergeCase) -> None:
    """Merging some parts, the rest, and then the two results is merging all at once."""
    inputs = case.build()
    cut = 1 + case.seed % (case.parts - 1)
    groups = [MergeInputs(inputs.outs[i:j], inputs.lses[i:j]) for i, j in ((0, cut), (cut, case.parts))]
    parts = [(run.call(MERGE, group), merge_expected(group, run.profile)) for group in groups]
    judge_merged_results(run, [got for got, _ in parts], [want for _, want in parts])


def _one_part(supports: Supports, profile: Profile) -> list[MergeCase]:
    """Nothing to merge, but rows without keys."""
    heads = nearest(supports.num_heads, 3)
    return [MergeCase(dtype=profile.dtype, batch=2, s=2, num_heads=heads, head_dim_v=4, empty=0.7)]


@law(needs=MERGE, cases=narrowed(merge_cases, min_empty=0.3), missing=_needs_empty_rows, first=_one_part)
def test_merge_ignores_outputs_of_empty_parts(run: Run, case: MergeCase) -> None:
    """Whatever finite number the output of a part without keys holds changes no bit."""
    inputs = case.build()
    want = run.call(MERGE, inputs)
    empty = np.isneginf(np.swapaxes(inputs.lses, -1, -2))
    for left_over in (1.0, -(2.0**15 if case.dtype == "float16" else 2.0**100)):
        outs = np.where(empty[..., None], left_over, inputs.outs)
        got = run.call(MERGE, replace(inputs, outs=outs))
        for a, b in zip(got, want, strict=True):
            run.same_bits(a, b, f"outputs of parts with LSE -inf were set to {left_over:g}")


@law(needs=MERGE, cases=narrowed(merge_cases, min_parts=2), cost=2, live="calls")
def test_merge_calls_are_independent(run: Run, case: MergeCase) -> None:
    """Nothing of a call (LSEs, outputs) lives on in the next one with the same shapes, or with fewer parts."""
    inputs, other = case.build(), replace(case, seed=case.seed + 1).build()
    fewer = MergeInputs(outs=inputs.outs[1:], lses=inputs.lses[1:])
    for this in (other, inputs, fewer):
        run.agrees(MERGE, this, run.call(MERGE, this))


@law(
    needs=("merge", "decode"),
    cases=narrowed(decode_cases, max_s=1, min_length=1, logit_stds=(1.0, 4.0, 0.1, 16.0)),
    missing=_needs_lse,
    cost=2,
)
def test_merge_of_decoded_parts_is_the_whole(run: Run, case: DecodeCase) -> None:
    """Keys cut into any number of parts, decoded part by part and merged, are decoded whole."""
    inputs = case.build()
    got, want = [], []
    for part in _parts_of_keys(inputs, np.random.default_rng([case.seed, 5]), run.supports):
        out, lse = run.call(DECODE, part)
        assert lse is not None
        got.append((out, lse))
        want.append(decode_expected(part, run.profile))
    judge_merged_results(run, got, want)


def _parts_of_keys(inputs: DecodeInputs, rng: np.random.Generator, supports: Supports) -> list[DecodeInputs]:
    """Each sequence's keys cut into the same number of consecutive parts, some of them empty if they may be."""
    lengths = inputs.cache_seqlens
    shortest = int(lengths.min())
    may_be_empty = supports.empty_row != "unsupported"
    count = min(int(rng.integers(1, 6)), supports.max_parts or 5, 5 if may_be_empty else shortest)
    if may_be_empty:
        cuts = np.sort(rng.integers(0, lengths[:, None] + 1, (len(lengths), count - 1)), axis=1)
    else:
        cuts = np.sort([rng.permutation(np.arange(1, n))[: count - 1] for n in lengths], axis=1).reshape(-1, count - 1)
    edges: IntArray = np.concatenate([0 * lengths[:, None], cuts, lengths[:, None]], axis=1)
    return [_key_range(inputs, edges[:, i], edges[:, i + 1]) for i in range(count)]


def _key_range(inputs: DecodeInputs, start: IntArray, stop: IntArray) -> DecodeInputs:
    """Keys start .. stop - 1 of each sequence, copied to pages of their own."""
    page_size, b = inputs.kv_cache.shape[1], len(start)
    width = -(-max(1, int((stop - start).max())) // page_size)  # pages of a sequence
    cache = np.zeros((b * width, *inputs.kv_cache.shape[1:]))
    for i in range(b):
        token = np.arange(start[i], stop[i])
        rows = inputs.kv_cache[inputs.block_table[i, token // page_size], token % page_size]
        cache[i * width : (i + 1) * width].reshape(-1, *rows.shape[1:])[: len(token)] = rows
    table = np.arange(b * width, dtype=np.int32).reshape(b, width)
    return replace(inputs, kv_cache=cache, block_table=table, cache_seqlens=(stop - start).astype(np.int32))
