"""Fixed cases: which counts of production they reach, whatever widths a subject declares, and which rare conditions they meet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.profile import Profile
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.indexer import IndexerCase
from mla_spec.operations.layer import layer_models
from mla_spec.operations.rope import LONGROPE, YARN
from mla_spec.properties.cases import CASES, none
from mla_spec.properties.fixed import (
    decode,
    indexer,
    merge,
    prefill,
    ragged_decode,
    rank_decode,
    rope,
    sparse_decode,
    sparse_prefill,
    write_cache,
)
from mla_spec.properties.fixed.counts import ELEMENTS
from mla_spec.properties.fixed.options import with_windows
from mla_spec.properties.strategies.layer import every_option, long_layers
from mla_spec.properties.strategies.rope import options
from mla_spec.reference.sparse import indexer_logits
from mla_spec.subjects.supports import DTYPES, Supports

FREE = Supports()
REAL = Supports(
    page_sizes=(64,),
    num_heads=(16, 128),
    latent_dims=((512, 64),),
    prefill_dims=((192, 128),),
    indexer_dims=((64, 128),),
    indexer_top_k=(2048,),
    topk_multiple=64,
    empty_row="unsupported",
    causal=(True,),
)
PROFILE = Profile.default("bfloat16")


def fields(cases: list[Any], name: str) -> set[Any]:
    return {getattr(case, name) for case in cases}


def test_decode_reaches_the_counts_of_production() -> None:
    cases = decode.counts(FREE, PROFILE)
    assert {96, 128, 140, 256} <= {len(case.seqlens) for case in cases}
    assert {24, 32, 48, 64, 96, 112, 128} <= fields(cases, "num_heads")
    assert {5, 6, 7, 8} <= fields(cases, "s")
    assert {32, 64, 256} <= fields(cases, "page_size")
    assert max(case.s * case.num_heads for case in cases) > 512
    assert {4161, 8193, 32769, 65606, 131142} <= {max(case.seqlens) for case in cases}
    assert {case.seqlens.index(4161) for case in cases if 4161 in case.seqlens} == {0, 1, 2, 41}
    assert any(case.page_size == 256 and max(case.seqlens) % 256 > 128 for case in cases)


def test_some_page_of_a_long_sequence_has_no_number_of_16_bits() -> None:
    (case,) = (case for case in decode.counts(FREE, PROFILE) if 131142 in case.seqlens)
    inputs = case.build()
    i = case.seqlens.index(131142)
    used = inputs.block_table[i, : -(-131142 // case.page_size)]
    assert used.max() > 2**16
    assert len(np.unique(used)) == len(used)


def test_declared_widths_cost_no_sequences() -> None:
    cases = decode.counts(REAL, PROFILE)
    assert max(len(case.seqlens) for case in cases) == 256
    assert any(max(case.seqlens) >= 200 for case in cases)
    for case in cases:
        assert len(case.seqlens) * max(case.seqlens) * 576 <= 2 * ELEMENTS
        assert min(case.seqlens) >= case.s
        assert (case.shared_pages or sum(case.pages_needed)) * 64 * 576 <= 8 * ELEMENTS


@pytest.mark.parametrize("operation", [name for name, fixed in CASES.items() if fixed.counts is not none])
@pytest.mark.parametrize("supports", [FREE, REAL], ids=["free", "declared"])
def test_cases_are_what_the_subject_takes(operation: str, supports: Supports) -> None:
    cases = CASES[operation].counts(supports, PROFILE)
    assert cases
    for case in cases:
        if supports is REAL and hasattr(case, "page_size"):
            assert case.page_size == 64
        if supports is REAL and hasattr(case, "num_heads") and operation != "indexer":
            assert case.num_heads in (16, 128)
        assert case.dtype == "bfloat16"


def test_numbers_of_production_meet() -> None:
    cases = decode.crossed(FREE, PROFILE)
    long = [case for case in cases if max(case.seqlens) > 4096]
    assert any(case.s > 2 and case.causal for case in long)
    assert any(case.num_heads > 64 and case.s == 1 for case in long)
    assert any(0 in case.seqlens for case in long)
    assert any(len(case.seqlens) == 1 and case.seqlens[0] > 128 * 64 for case in long)
    assert any(sum(n > 4096 for n in case.seqlens) > 1 for case in long)
    assert any(len(case.seqlens) * case.s * case.num_heads > 65535 for case in cases)
    tiles = {-(-n // 64) for case in cases for n in case.seqlens if n > 512}
    assert all({n % remainder for n in tiles} == set(range(remainder)) for remainder in (2, 3, 4, 5, 8))
    windows = with_windows("decode", decode.long(FREE, PROFILE), FREE)
    assert all(case.window > 128 and case.causal for case in windows)
    prompts = [
        pair for case in prefill.crossed(FREE, PROFILE) for pair in zip(case.seqlens_q, case.seqlens_k, strict=True)
    ]
    assert any(q > 128 and k - q > 1024 for q, k in prompts)
    assert max(q for q, _ in prompts) > 2**16
    assert any(case.rank > 8 for case in rank_decode.crossed(FREE, PROFILE))
    (rows,) = merge.crossed(FREE, PROFILE)
    assert rows.batch * rows.s * rows.num_heads > 65535


@pytest.mark.parametrize("operation", [name for name, fixed in CASES.items() if fixed.crossed is not none])
def test_cases_that_meet_are_what_the_subject_takes(operation: str) -> None:
    for case in CASES[operation].crossed(REAL, PROFILE):
        if hasattr(case, "page_size"):
            assert case.page_size == 64
        if hasattr(case, "num_heads") and operation != "indexer":
            assert case.num_heads in (16, 128)
        if hasattr(case, "seqlens"):
            assert min(case.seqlens) >= min(case.s, 1)
        if hasattr(case, "seqlens_k"):
            assert all(k >= q for q, k in zip(case.seqlens_q, case.seqlens_k, strict=True))


def test_prefill_reaches_the_counts_of_production() -> None:
    cases = prefill.counts(FREE, PROFILE)
    assert {128, 140} <= {len(case.seqlens_q) for case in cases}
    assert max(max(case.seqlens_q) for case in cases) == 1100
    assert {4100, 8193, 65700} <= {max(case.seqlens_k) for case in cases}
    assert all(case.v_head_dim < case.qk_head_dim for case in cases)


def test_packed_queries_reach_the_counts_of_production() -> None:
    cases = ragged_decode.counts(FREE, PROFILE)
    assert {128, 140} <= {len(case.seqlens_q) for case in cases}
    assert {24, 48, 112, 128} <= fields(cases, "num_heads")
    assert {1, 16, 32, 64, 256} <= fields(cases, "page_size")
    (long,) = (case for case in cases if max(case.seqlens_q) == 1100)
    assert long.causal
    assert long.seqlens_q.count(1) == 2
    assert {4161, 8193, 32769, 65606, 131142} <= {max(case.seqlens_k) for case in cases}
    for case in ragged_decode.counts(REAL, PROFILE):
        assert all(t >= s for s, t in zip(case.seqlens_q, case.seqlens_k, strict=True))


def test_ranks_hold_parts_of_long_sequences() -> None:
    cases = rank_decode.counts(FREE, PROFILE)
    assert {65606, 131142} <= {max(case.seqlens) for case in cases}
    assert {2, 4, 8, 16} <= fields(cases, "ranks")
    assert {24, 128} <= fields(cases, "num_heads")
    assert any(case.interleave > 1 and max(case.seqlens) > 2**16 for case in cases)
    assert all(max(case.own) > 0 for case in cases)


def test_decoded_tokens_stand_before_and_behind_hundreds_of_queries() -> None:
    for supports in (FREE, REAL):
        cases = ragged_decode.rare(supports, PROFILE)
        assert any(max(case.seqlens_q) == 300 and case.seqlens_q.index(300) == 1 for case in cases)
        assert all(1 in case.seqlens_q for case in cases)
    assert any(0 in case.seqlens_k for case in ragged_decode.rare(FREE, PROFILE))
    assert all(t for case in ragged_decode.rare(REAL, PROFILE) for t in case.seqlens_k)


def test_selections_are_of_more_keys() -> None:
    assert any(case.topk == 2048 < case.s_kv for case in sparse_prefill.counts(FREE, PROFILE))
    assert any(case.topk == 2048 < case.pages * case.page_size for case in sparse_decode.counts(FREE, PROFILE))
    for supports in (FREE, REAL):
        assert any(case.top_k == 2048 < max(case.seqlens_k) for case in indexer.counts(supports, PROFILE))


def ties_at_the_end_of_a_selection(case: IndexerCase) -> int:
    """How many visible keys of a query have the logit at which its selection ends."""
    inputs = case.build()
    logits = indexer_logits(inputs.q, inputs.k, inputs.weights)
    ties = []
    for row, first, end in zip(logits, inputs.first_key, inputs.end_key, strict=True):
        seen = np.sort(row[first:end])[::-1]
        if len(seen) > case.top_k:
            ties.append(int((seen == seen[case.top_k - 1]).sum()))
    return max(ties)


def test_more_keys_tie_than_a_buffer_holds_or_16_bits_count() -> None:
    some, many = (case for case in indexer.counts(FREE, PROFILE) if case.regime == "integers")
    assert ties_at_the_end_of_a_selection(some) > 1500
    assert 2**16 <= ties_at_the_end_of_a_selection(many) < 2**16 + many.top_k, "more than wrap around to enough"


def test_65600_tokens_are_written_and_2_17_rows_rotated() -> None:
    assert max(case.tokens for case in write_cache.counts(FREE, PROFILE)) == 65_600
    assert max(case.batch * case.s * max(case.heads, 1) for case in rope.counts(FREE, PROFILE)) > 2**17


def sunken(case: DecodeCase) -> float:
    """The largest score of a visible key."""
    inputs = case.build()
    rows = inputs.kv_cache[inputs.block_table[0, 0], : min(case.page_size, case.seqlens[0]), 0]
    scores: float = (inputs.q[0] @ rows.T * inputs.softmax_scale).max()
    return scores


def test_some_queries_see_no_key_of_the_last_page_and_all_scores_are_far_below_zero() -> None:
    cases = [case for case in decode.rare(FREE, PROFILE) if case.regime == "sunken"]
    assert any(sunken(case) < -104 for case in cases)
    for case in cases:
        blind = [n - case.s + 1 <= (n - 1) // case.page_size * case.page_size for n in case.seqlens]
        assert any(blind)
        assert case.causal


def test_the_first_and_the_last_page_of_a_pool_are_used() -> None:
    for supports in (FREE, REAL):
        used: set[int] = set()
        for case in decode.rare(supports, PROFILE):
            inputs, last = case.build(), 0
            for table, count in zip(inputs.block_table, case.pages_needed, strict=True):
                last = len(inputs.kv_cache) - 1
                used |= {int(page) for page in table[:count] if page in (0, last)}
                used |= {-1} if last in table[:count] else set()
        assert {0, -1} <= used


def test_full_and_empty_prefixes_are_mixed() -> None:
    for case in prefill.full_and_empty_prefixes(FREE, PROFILE):
        past = [t - s for s, t in zip(case.seqlens_q, case.seqlens_k, strict=True)]
        assert min(past) == 0 < max(past)


@pytest.mark.parametrize("case", sparse_prefill.rare(FREE, PROFILE), ids=lambda case: str(case.topk))
def test_some_first_tiles_select_nothing(case: Any) -> None:
    inputs = case.build()
    tile = 64 if case.topk > 64 else 16
    selecting = (inputs.entries >= 0) & (inputs.entries < case.s_kv)
    assert (~selecting[:, :tile].any(axis=1) & selecting.any(axis=1)).any()
    assert selecting[:, :tile].any(axis=1).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_model_and_every_scaling_comes_once(dtype: str) -> None:
    gated = Supports(output_gate=("head", "element"))
    layers = every_option(gated, Profile.default(dtype))
    assert {case.model for case in layers} - {"none"} == set(layer_models())
    for cases in (layers, options(FREE, Profile.default(dtype))):
        assert {case.yarn for case in cases} == set(YARN)
        assert {case.longrope for case in cases} == set(LONGROPE)
    assert any((case.kv_lora_rank, case.qk_rope_head_dim) == (512, 64) for case in layers)
    across_4096 = {4094} if dtype == FREE.dtypes[0] else set()
    assert {126, 254, 574, 590, 1022, 4161} | across_4096 == {
        case.prompt for case in long_layers(FREE, Profile.default(dtype))
    }


def test_what_a_subject_does_not_honor_is_not_asked_for() -> None:
    supports = Supports(yarn_options=("truncate",), longrope=False)
    names = {case.yarn for case in options(supports, PROFILE)}
    assert "fractional" in names
    assert not names & {"attention-factor", "softmax-mscale", "beyond-above", "beyond-at", "beyond-within"}
    with pytest.raises(ValueError, match="yarn_options has unknown value 'betas'"):
        Supports(yarn_options=("betas",))
