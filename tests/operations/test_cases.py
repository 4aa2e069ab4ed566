"""Cases are plain data: written, read back, built again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_spec.bounds.profile import Profile
from mla_spec.operations.all import OPERATIONS, parse_case
from mla_spec.operations.case import Case
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.layer import LayerCase
from mla_spec.operations.merge import MergeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.operations.rope import RopeCase
from mla_spec.operations.write_cache import WriteCase
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.layer import layer_cases
from mla_spec.properties.strategies.merge import merge_cases
from mla_spec.properties.strategies.prefill import prefill_cases
from mla_spec.properties.strategies.ragged import ragged_decode_cases
from mla_spec.properties.strategies.rank_decode import rank_decode_cases
from mla_spec.properties.strategies.rope import rope_cases
from mla_spec.properties.strategies.write_cache import write_cases
from mla_spec.reference.formats import round_to
from mla_spec.subjects.supports import DTYPES, Supports

ANY_CASE = st.one_of(
    strategy(Supports(), Profile.default(dtype))
    for dtype in DTYPES
    for strategy in (
        rope_cases,
        decode_cases,
        layer_cases,
        merge_cases,
        prefill_cases,
        ragged_decode_cases,
        rank_decode_cases,
        write_cases,
    )
)


@given(ANY_CASE)
@settings(max_examples=200, deadline=None)
def test_the_id_holds_the_whole_case(case: Case) -> None:
    assert parse_case(case.id) == case


@given(decode_cases(Supports(), Profile.default("bfloat16")))
@settings(max_examples=50, deadline=None)
def test_decode_inputs_are_reproducible_and_representable(case: DecodeCase) -> None:
    first, second = case.build(), case.build()
    for name in ("q", "kv_cache", "block_table", "cache_seqlens"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert np.array_equal(round_to(first.q, "bfloat16"), first.q)
    assert np.array_equal(round_to(first.kv_cache, "bfloat16"), first.kv_cache)


@given(decode_cases(Supports(), Profile.default("float32")))
@settings(max_examples=50, deadline=None)
def test_no_page_serves_two_sequences(case: DecodeCase) -> None:
    table = case.build().block_table
    pages = [page for row, count in zip(table, case.pages_needed, strict=True) for page in row[:count]]
    assert len(set(pages)) == len(pages)


@given(layer_cases(Supports(), Profile.default("float16")))
@settings(max_examples=30, deadline=None)
def test_layer_inputs_are_representable(case: LayerCase) -> None:
    inputs = case.build()
    for value in (*inputs.weights.values(), inputs.hidden):
        assert np.array_equal(round_to(value, "float16"), value)


@given(merge_cases(Supports(), Profile.default("bfloat16")))
@settings(max_examples=50, deadline=None)
def test_merge_inputs_are_representable_and_empty_parts_are_zero(case: MergeCase) -> None:
    inputs = case.build()
    assert np.array_equal(round_to(inputs.outs, "bfloat16"), inputs.outs)
    assert np.array_equal(round_to(inputs.lses, "float32"), inputs.lses)
    empty = np.isneginf(np.swapaxes(inputs.lses, -1, -2))
    assert not inputs.outs[empty].any()
    if case.empty in (0.0, 1.0):
        assert (empty == bool(case.empty)).all()


@given(prefill_cases(Supports(empty_row="unsupported"), Profile.default("float32")))
@settings(max_examples=100, deadline=None)
def test_prefill_rows_have_keys_where_they_must(case: PrefillCase) -> None:
    assert sum(case.seqlens_q) > 0
    assert len(case.build().k) == sum(case.seqlens_k)
    for queries, keys in zip(case.seqlens_q, case.seqlens_k, strict=True):
        assert queries == 0 or keys >= (queries if case.causal else 1)


@given(ragged_decode_cases(Supports(empty_row="unsupported"), Profile.default("bfloat16")))
@settings(max_examples=100, deadline=None)
def test_packed_queries_have_keys_where_they_must(case: RaggedDecodeCase) -> None:
    """Whatever other lengths a hazard asks for."""
    for inputs in (case.build(), *OPERATIONS["ragged_decode"].others(case), OPERATIONS["ragged_decode"].distant(case)):
        assert np.array_equal(round_to(inputs.q, "bfloat16"), inputs.q)
        assert len(inputs.q) == inputs.cu_seqlens_q[-1] > 0
        needed = inputs.queries if case.causal else np.minimum(inputs.queries, 1)
        assert (inputs.cache_seqlens >= needed).all()


@given(write_cases(Supports(), Profile.default("float16")))
@settings(max_examples=100, deadline=None)
def test_slots_are_in_the_pool_and_named_once(case: WriteCase) -> None:
    inputs = case.build()
    slots = inputs.slot_mapping[inputs.slot_mapping != -1]
    assert len(set(slots.tolist())) == len(slots)
    assert ((slots >= 0) & (slots < inputs.kv_cache.shape[0] * case.page_size)).all()
    assert len(inputs.slot_mapping) == len(inputs.latent) == len(inputs.k_pe) == case.tokens


def test_supports_narrows_what_is_drawn() -> None:
    supports = Supports(max_parts=2, prefill_dims=((24, 16),), latent_dims=((16, 8),), empty_row="unsupported")
    profile = Profile.default("float32")

    @given(merge_cases(supports, profile), prefill_cases(supports, profile), write_cases(supports, profile))
    @settings(max_examples=50, deadline=None)
    def drawn(merge: MergeCase, prefill: PrefillCase, write: WriteCase) -> None:
        assert merge.parts <= 2
        assert merge.empty == 0
        assert (prefill.qk_head_dim, prefill.v_head_dim) == (24, 16)
        assert (write.kv_lora_rank, write.qk_rope_head_dim) == (16, 8)

    drawn()


def test_seeds_give_different_values() -> None:
    one, other = (RopeCase(dtype="float32", seed=seed).vectors(1)[0] for seed in (1, 2))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown kind ''; known are rope, decode, "),
        ("attend:s=1", "unknown kind 'attend'"),
        ("prefill:seqlens_q=1+x", "seqlens_q cannot be '1\\+x'"),
        ("merge:lse_mean=much", "lse_mean cannot be 'much'"),
        ("decode:seqlen=3", "a decode case has no field 'seqlen'"),
        ("decode:s=three", "s cannot be 'three'"),
        ("decode:causal=maybe", "causal cannot be 'maybe'"),
        ("decode:s=1", "dtype"),
    ],
)
def test_an_unreadable_id_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_case(text)


def test_a_later_field_stands_in_the_id_only_where_it_says_something() -> None:
    plain = DecodeCase(dtype="float32", seqlens=(3, 5), page_size=2)
    assert "shared_pages" not in plain.id
    shared = DecodeCase(dtype="float32", seqlens=(3, 5), page_size=2, shared_pages=4)
    assert shared.id.endswith(",shared_pages=4")
    assert parse_case(plain.id) == plain
    assert parse_case(shared.id) == shared


def test_shared_pages_come_again_in_other_orders() -> None:
    case = DecodeCase(dtype="float32", seqlens=(40, 41, 64), page_size=8, shared_pages=5)
    inputs = case.build()
    named = [row[:count] for row, count in zip(inputs.block_table, case.pages_needed, strict=True)]
    assert len(np.unique(np.concatenate(named))) == 5
    assert len(inputs.kv_cache) == 8
    assert not np.array_equal(named[0], named[1][:5])
    assert len(np.unique(named[0])) == 5  # no page twice before all have come
