"""The laws of a quick check, each with the cases that it begins with: small, and such as kernels are known to get wrong.

A law that is not named here is no part of a quick check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.all import CALLED
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.indexer import IndexerCase
from mla_spec.operations.layer import LayerCase, layer_models
from mla_spec.operations.merge import MergeCase
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.quantised_cache import PagesCase, QuantiseCase
from mla_spec.operations.quantised_decode import QuantisedDecodeCase, latent_formats
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.operations.rope import RopeCase
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.properties.hazards import EXCEPTIONS, STATED_ELSEWHERE
from mla_spec.properties.strategies import ordinary
from mla_spec.properties.strategies.counts import nearest
from mla_spec.properties.strategies.layer import rotating_layer, supported_models
from mla_spec.properties.strategies.rope import supported_scalings
from mla_spec.properties.strategies.sizes import judgeable_stds
from mla_spec.subjects.supports import Supports

Cases = Callable[[Supports, Profile], list[Any]]

HAZARDS = ("does_not_modify_its_inputs", "calls_are_independent", "reads_strides", "writes_all_of_its_outputs")
"""Hazards whose laws are elementary, of every operation."""


def _empty(supports: Supports) -> bool:
    """Whether rows without keys may occur."""
    return supports.empty_row != "unsupported"


def decode(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """One key; as many queries as keys; ends of pages; an empty sequence; one head; peaked scores."""
    (base,) = ordinary.decode(supports, profile)
    if profile.coarse:
        return [base]
    size, one = base.page_size, nearest(supports.num_heads, 1)
    width = base.kv_lora_rank + base.qk_rope_head_dim
    several = min(2, supports.max_s or 2)
    alone = replace(base, seqlens=(1,), s=1, num_heads=one)
    cases = [
        alone,
        replace(alone, seqlens=(several,), s=several),
        replace(alone, seqlens=(size, size + 1, 2 * size + 1), num_heads=nearest(supports.num_heads, 17)),
        *([replace(alone, seqlens=(3, 0, 17))] if _empty(supports) else []),
        replace(base, seed=1, logit_std=max(judgeable_stds((1.0, 16.0, 64.0), profile, width))),
    ]
    return [*cases, base]


def several_queries(supports: Supports, profile: Profile) -> list[DecodeCase]:
    """Those of ``decode`` with several causal queries."""
    cases = (replace(case, causal=True) for case in decode(supports, profile))
    return [case for case in cases if case.s > 1 and min(case.seqlens) > 0]


def prefill(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """One query and key; a cached prefix beside none; rows without keys; a whole tile and a token; peaked scores."""
    (base,) = ordinary.prefill(supports, profile)
    if profile.coarse:
        return [base]
    one = nearest(supports.num_heads, 1)
    alone = replace(base, seqlens_q=(1,), seqlens_k=(1,), num_heads=one)
    none = [replace(alone, seqlens_q=(2, 3, 1), seqlens_k=(0, 1, 4))] if _empty(supports) else []
    return [
        alone,
        replace(alone, seqlens_q=(2, 2), seqlens_k=(2, 5)),
        *none,
        replace(base, seqlens_q=(17, 3), seqlens_k=(17, 34)),
        replace(base, seed=1, logit_std=max(judgeable_stds((1.0, 16.0, 64.0), profile, base.qk_head_dim))),
        base,
    ]


def causal_prefill(supports: Supports, profile: Profile) -> list[PrefillCase]:
    """Self-attention of two sequences."""
    (base,) = ordinary.prefill(supports, profile)
    return [replace(base, seqlens_q=(2, 17), seqlens_k=(2, 17), causal=True)]


def ragged_decode(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """One query and key; a prompt beside decoded tokens; ends of pages; sequences without queries or keys."""
    (base,) = ordinary.ragged_decode(supports, profile)
    if profile.coarse:
        return [base]
    size = base.page_size
    alone = replace(base, seqlens_q=(1,), seqlens_k=(1,), num_heads=nearest(supports.num_heads, 1))
    none = [replace(alone, seqlens_q=(2, 0, 1), seqlens_k=(0, 3, 2))] if _empty(supports) else []
    return [
        alone,
        replace(alone, seqlens_q=(2, 1), seqlens_k=(2, 2)),
        replace(alone, seqlens_q=(1, 3, 1), seqlens_k=(size, size + 3, 2 * size + 1)),
        *none,
        base,
    ]


def several_packed_queries(supports: Supports, profile: Profile) -> list[RaggedDecodeCase]:
    """Prompts of several tokens, causal."""
    (base,) = ordinary.ragged_decode(supports, profile)
    return [replace(base, causal=True)]


def merge(supports: Supports, profile: Profile) -> list[MergeCase]:
    """One part; parts of which all rows are empty, or some; LSEs far apart."""
    (base,) = ordinary.merge(supports, profile)
    empty = [replace(base, empty=share, num_heads=nearest(supports.num_heads, 1)) for share in (1.0, 0.5)]
    return [replace(base, parts=1), *(empty if _empty(supports) else []), replace(base, lse_std=30.0), base]


def empty_parts(supports: Supports, profile: Profile) -> list[MergeCase]:
    """Those of ``merge`` with empty rows."""
    return [case for case in merge(supports, profile) if case.empty and case.parts > 1]


def _selections(base: Any, supports: Supports) -> list[Any]:
    """One index; rows that select nothing; rows whose first tile does; more indices than keys."""
    unit = supports.topk_multiple
    one, tiles = -(-1 // unit) * unit, -(-33 // unit) * unit
    plain = replace(base, sink="none", with_length=False)
    cases = [replace(plain, topk=one, num_heads=nearest(supports.num_heads, 1))]
    if _empty(supports):
        cases.append(replace(plain, topk=one, invalid=1.0, empty_rows=True))
    return [*cases, replace(plain, seed=1, topk=tiles, invalid=0.9), base]


def sparse_prefill(supports: Supports, profile: Profile) -> list[SparsePrefillCase]:
    """See ``_selections``."""
    return _selections(ordinary.sparse_prefill(supports, profile)[0], supports)


def sparse_decode(supports: Supports, profile: Profile) -> list[SparseDecodeCase]:
    """See ``_selections``."""
    return _selections(ordinary.sparse_decode(supports, profile)[0], supports)


def indexer(supports: Supports, profile: Profile) -> list[IndexerCase]:
    """Fewer keys than are selected, more, and equal logits."""
    (base,) = ordinary.indexer(supports, profile)
    return [replace(base, seqlens_q=(1,), seqlens_k=(1,)), replace(base, regime="ties"), base]


def rope(supports: Supports, profile: Profile) -> list[RopeCase]:
    """Both layouts, near and far positions, every third scaling."""
    (base,) = ordinary.rope(supports, profile)
    cases = [replace(base, layout=layout, start=start) for layout in supports.rope_layouts for start in (0, 4095)]
    scaled = supported_scalings(supports)[:: max(1, len(supported_scalings(supports)) // 3)]
    return [*cases, *(replace(base, start=60, **scaling) for scaling in scaled)]


def quantize_cache(supports: Supports, profile: Profile) -> list[QuantiseCase]:
    """Every format once, with zeros and outliers."""
    return [replace(case, regime=regime) for case in _formats(supports, profile) for regime in ("zeros", "outlier")]


def _formats(supports: Supports, profile: Profile) -> list[QuantiseCase]:
    (base, *_) = ordinary.quantize_cache(supports, profile)
    return [replace(base, format=name) for name in supports.cache_formats]


def dequantize_cache(supports: Supports, profile: Profile) -> list[PagesCase]:
    """Every format once."""
    (base, *_) = ordinary.dequantize_cache(supports, profile)
    return [replace(base, format=name) for name in supports.cache_formats]


def decode_quantized(supports: Supports, profile: Profile) -> list[QuantisedDecodeCase]:
    """Every format of a latent cache once; an empty sequence."""
    base = ordinary.decode_quantized(supports, profile)
    cases = [replace(case, format=name) for case in base for name in latent_formats(supports)]
    return [*cases, *(replace(case, seqlens=(3, 0, 17), s=1) for case in base if _empty(supports))]


def layer(supports: Supports, profile: Profile) -> list[LayerCase]:
    """A small layer, and two of the published models whose options the subject has."""
    (base,) = rotating_layer(supports, profile)
    models = [name for name in ("deepseek-v3", "deepseek-v2-lite") if name in supported_models(supports)]
    return [base, *(replace(base, model=name, **_of_model(name)) for name in models)]


def _of_model(name: str) -> dict[str, Any]:
    """Query compression as the model has it, and enough rotated pairs for its scaling to show."""
    compressed = layer_models()[name].fields["q_lora_rank"] is not None
    return {"q_lora_rank": 5 if compressed else None, "qk_rope_head_dim": 8}


def none(supports: Supports, profile: Profile) -> list[Any]:
    """No case but what is drawn."""
    return []


_ELEMENTARY: dict[str, Cases] = {
    "test_rope_agrees_with_reference": rope,
    "test_rope_at_position_zero_is_identity": none,
    "test_absorb_splits_kv_b_proj": ordinary.decode,
    "test_dequantised_weight_is_code_times_scale_of_its_block": ordinary.dequantize_weight,
    "test_prefill_agrees_with_reference": prefill,
    "test_prefill_lse_agrees_with_reference": prefill,
    "test_prefill_ignores_future_keys": causal_prefill,
    "test_prefill_gradients_agree_with_reference": none,
    "test_decode_agrees_with_reference": decode,
    "test_decode_lse_agrees_with_reference": decode,
    "test_decode_ignores_unused_cache_slots": decode,
    "test_decode_ignores_unused_table_entries": decode,
    "test_decode_ignores_future_keys": several_queries,
    "test_ragged_decode_agrees_with_reference": ragged_decode,
    "test_ragged_decode_lse_agrees_with_reference": ragged_decode,
    "test_ragged_decode_ignores_future_keys": several_packed_queries,
    "test_ragged_decode_ignores_unused_cache_slots": ragged_decode,
    "test_ragged_decode_ignores_unused_table_entries": ragged_decode,
    "test_merge_agrees_with_reference": merge,
    "test_merge_lse_agrees_with_reference": merge,
    "test_merge_ignores_outputs_of_empty_parts": empty_parts,
    "test_merge_calls_are_independent": none,
    "test_rank_decode_agrees_with_reference": ordinary.rank_decode,
    "test_rank_decode_lse_agrees_with_reference": ordinary.rank_decode,
    "test_write_cache_stores_latent_then_rope": ordinary.write_cache,
    "test_write_cache_changes_named_slots_only": ordinary.write_cache,
    "test_write_cache_skips_slot_minus_one": ordinary.write_cache,
    "test_write_cache_reads_strides": ordinary.write_cache,
    "test_codes_are_the_nearest": quantize_cache,
    "test_dequantised_rows_are_code_times_scale": dequantize_cache,
    "test_quantised_decode_agrees_with_reference": decode_quantized,
    "test_sparse_prefill_agrees_with_reference": sparse_prefill,
    "test_sparse_prefill_statistics_agree_with_reference": sparse_prefill,
    "test_sparse_prefill_ignores_rows_that_no_index_names": none,
    "test_sparse_decode_agrees_with_reference": sparse_decode,
    "test_sparse_decode_lse_agrees_with_reference": sparse_decode,
    "test_sparse_decode_ignores_slots_that_no_index_names": none,
    "test_indexer_queries_agree_with_reference": ordinary.project_indexer,
    "test_indexer_keys_agree_with_reference": ordinary.project_indexer,
    "test_indexer_head_weights_agree_with_reference": ordinary.project_indexer,
    "test_indexer_logits_agree_with_reference": indexer,
    "test_indexer_selects_the_largest_logits": indexer,
    "test_layer_stages_agree_with_reference": layer,
    "test_layer_prefill_agrees_with_reference": layer,
    "test_layer_decode_agrees_with_reference": layer,
    "test_layer_prefill_in_chunks": layer,
    "test_reset_empties_the_cache": layer,
    "test_cache_bytes_are_exact": layer,
    "test_layer_gradients_agree_with_reference": none,
}

QUICK: dict[str, Cases] = {
    **_ELEMENTARY,
    **{
        f"test_{operation.name}_{hazard}": ordinary.ORDINARY[operation.name]
        for operation in CALLED
        for hazard in HAZARDS
        if (operation.name, hazard) not in STATED_ELSEWHERE | EXCEPTIONS
    },
}
"""By the name of an elementary law, the cases that a quick check of it begins with."""
