"""Cases of quantised caches are plain data, and hold what their regimes promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.quantised_cache import scale_limits
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import parse_case
from mla_spec.operations.case import Case
from mla_spec.operations.quantised_cache import HEAD_DIM_V, PagesCase, QuantiseCase, groups_of
from mla_spec.operations.quantised_decode import QuantisedDecodeCase
from mla_spec.properties.strategies.quantised_cache import pages_cases, quantise_cases, quantised_decode_cases
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.cache_layout import LAYOUTS, used_bytes
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.quantised_cache import dequantised_cache
from mla_spec.subjects.supports import DTYPES, Supports

QUANTIZED = {"quantize_cache", "dequantize_cache", "decode_quantized"}

ANY_CASE = st.one_of(
    strategy(Supports(), Profile.default(dtype))
    for dtype in DTYPES
    for strategy in (quantise_cases, pages_cases, quantised_decode_cases)
)


@given(ANY_CASE)
@settings(max_examples=100, deadline=None)
def test_the_id_holds_the_whole_case(case: Case) -> None:
    assert parse_case(case.id) == case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_representable_and_reproducible(name: str, dtype: str) -> None:
    for regime in ("typical", "zeros", "outlier", "rope", "tiny", "huge", "edges"):
        case = QuantiseCase(dtype=dtype, format=name, tokens=5, regime=regime)
        inputs = case.build()
        np.testing.assert_array_equal(inputs.rows, case.build().rows)
        for fmt in (dtype, "float32"):
            np.testing.assert_array_equal(round_to(inputs.rows, fmt), inputs.rows)
        assert (inputs.tensor_scale == 1) == bool(LAYOUTS[name].scale)
        assert np.frexp(inputs.tensor_scale)[0] != 0.5 or LAYOUTS[name].scale


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.groups > 1])
def test_regimes_hold_what_they_promise(name: str) -> None:
    layout = LAYOUTS[name]

    def amax(regime: str) -> np.ndarray:
        case = QuantiseCase(dtype="bfloat16", format=name, tokens=64, regime=regime)
        return np.abs(groups_of(case.build().rows, layout)).max(axis=-1)

    zeros = amax("zeros")
    assert 0.3 < (zeros == 0).mean() < 0.8
    assert (zeros == 0).all(axis=-1).any()
    assert amax("typical").max() > 2**8 * amax("typical").min() > 0
    assert (amax("huge") == format_of("bfloat16").max_finite).mean() > 0.5
    assert amax("tiny").max() < 1e-10
    quotients = amax("edges") / format_of(layout.code).max_finite
    powers = np.frexp(quotients)[0] == 0.5
    assert 0.2 < powers.mean() < 0.6


@pytest.mark.parametrize("name", LAYOUTS)
def test_pages_hold_their_rows(name: str) -> None:
    case = PagesCase(dtype="float16", format=name, tokens=7, page_size=3)
    inputs = case.build()
    cache = dequantised_cache(inputs.pages, LAYOUTS[name], 3, tensor_scale=inputs.tensor_scale)
    np.testing.assert_array_equal(cache.reshape(9, -1)[:7], inputs.rows)
    assert np.abs(inputs.rows).max() < format_of("float16").max_finite
    assert (inputs.pages[~used_bytes(LAYOUTS[name], 3, 7)] == 0).all()


@pytest.mark.parametrize("regime", ["typical", "zeros", "rope", "sink"])
@pytest.mark.parametrize("name", HEAD_DIM_V)
def test_decode_pages_hold_the_exact_cache(name: str, regime: str) -> None:
    layout = LAYOUTS[name]
    case = QuantisedDecodeCase(
        dtype="bfloat16", format=name, page_size=4, seqlens=(6, 0, 3), regime=regime, power_of_two=True
    )
    inputs = case.build()
    cache = dequantised_cache(inputs.pages, layout, 4, tensor_scale=inputs.tensor_scale)
    rows, exact = (
        gather_rows(x, inputs.exact.block_table, inputs.exact.cache_seqlens) for x in (cache, inputs.exact.kv_cache)
    )
    np.testing.assert_array_equal(rows, exact)
    held = rows[0]
    assert held.any()
    if layout.scale:
        np.testing.assert_array_equal(round_to(held, "bfloat16"), held)
        groups = groups_of(held, layout)
        zeros = (groups == 0).all(axis=-1)
        assert zeros.any() == (regime == "zeros")
        low, high = scale_limits(held, layout)
        assert len(np.unique(high[~zeros])) > 1 or layout.groups == 1
        assert (low <= high).all()
    if regime == "rope":
        latent, rope = np.abs(held[:, :-64]).mean(), np.abs(held[:, -64:]).mean()
        assert rope > 20 * latent


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^Supports: cache_formats has unknown value 'fp6'; known are fp8_per_tensor, "
    ):
        Supports(cache_formats=("fp8_ds_mla", "fp6"))


class Indexer(TorchAbsorbed):
    supports = Supports(cache_formats=("indexer_fp8",))


def test_only_supported_formats_are_drawn() -> None:
    seen: set[str] = set()
    available = {name: made for name, made in all_laws().items() if not made.unavailable(Options())}
    laws = {name: made for name, made in available.items() if set(made.needs) <= QUANTIZED}
    assert {name for made in laws.values() for name in made.needs} == QUANTIZED
    for made in laws.values():
        options = Options(examples=4, announce=lambda case: seen.add(case.format))
        record = run_law(made, Indexer(), options)
        without_latent = made.needs == ("decode_quantized",) or made.name == "test_latent_codes_do_not_depend_on_k_pe"
        assert record.verdict == ("unsupported" if without_latent else "pass"), record.text()
        if without_latent:
            assert record.message == "supports no format of a latent cache"
    assert seen == {"indexer_fp8"}
