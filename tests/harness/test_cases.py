"""Cases are plain data: written, read back, built again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_spec.harness.cases import Case, DecodeCase, LayerCase, RopeCase, parse_case
from mla_spec.harness.contract import DTYPES, Supports
from mla_spec.properties.strategies import decode_cases, layer_cases, rope_cases
from mla_spec.reference.formats import round_to
from mla_spec.reference.profile import Profile

ANY_CASE = st.one_of(
    strategy(Supports(), Profile.default(dtype))
    for dtype in DTYPES
    for strategy in (rope_cases, decode_cases, layer_cases)
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


def test_seeds_give_different_values() -> None:
    one, other = (RopeCase(dtype="float32", seed=seed).vectors(1)[0] for seed in (1, 2))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown kind ''; known are rope, decode, layer"),
        ("prefill:s=1", "unknown kind 'prefill'"),
        ("decode:seqlen=3", "a decode case has no field 'seqlen'"),
        ("decode:s=three", "s cannot be 'three'"),
        ("decode:causal=maybe", "causal cannot be 'maybe'"),
        ("decode:s=1", "dtype"),
    ],
)
def test_an_unreadable_id_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_case(text)
