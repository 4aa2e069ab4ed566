"""The laws of a quick check, each with the cases that it begins with: small, and such as kernels are known to get wrong.

A law that is not named here is no part of a quick check.
"""

from __future__ import annotations

from mla_spec.operations.all import CALLED
from mla_spec.properties.cases import CASES, Cases, none
from mla_spec.properties.fixed import (
    decode,
    decode_quantized,
    dequantize_cache,
    dequantize_weight,
    indexer,
    layer,
    merge,
    prefill,
    project_indexer,
    quantize_cache,
    ragged_decode,
    rank_decode,
    rope,
    sparse_decode,
    sparse_prefill,
    write_cache,
)
from mla_spec.properties.hazards import EXCEPTIONS, STATED_ELSEWHERE

HAZARDS = ("does_not_modify_its_inputs", "calls_are_independent", "reads_strides", "writes_all_of_its_outputs")
"""Hazards whose laws are elementary, of every operation."""

_ELEMENTARY: dict[str, Cases] = {
    "test_rope_agrees_with_reference": rope.elementary,
    "test_rope_at_position_zero_is_identity": none,
    "test_absorb_splits_kv_b_proj": decode.ordinary,
    "test_dequantised_weight_is_code_times_scale_of_its_block": dequantize_weight.ordinary,
    "test_prefill_agrees_with_reference": prefill.elementary,
    "test_prefill_lse_agrees_with_reference": prefill.elementary,
    "test_prefill_ignores_future_keys": prefill.causal,
    "test_prefill_gradients_agree_with_reference": none,
    "test_decode_agrees_with_reference": decode.elementary,
    "test_decode_lse_agrees_with_reference": decode.elementary,
    "test_decode_ignores_unused_cache_slots": decode.elementary,
    "test_decode_ignores_unused_table_entries": decode.elementary,
    "test_decode_ignores_future_keys": decode.several_queries,
    "test_ragged_decode_agrees_with_reference": ragged_decode.elementary,
    "test_ragged_decode_lse_agrees_with_reference": ragged_decode.elementary,
    "test_ragged_decode_ignores_future_keys": ragged_decode.several_queries,
    "test_ragged_decode_ignores_unused_cache_slots": ragged_decode.elementary,
    "test_ragged_decode_ignores_unused_table_entries": ragged_decode.elementary,
    "test_merge_agrees_with_reference": merge.elementary,
    "test_merge_lse_agrees_with_reference": merge.elementary,
    "test_merge_ignores_outputs_of_empty_parts": merge.empty_parts,
    "test_merge_calls_are_independent": none,
    "test_rank_decode_agrees_with_reference": rank_decode.ordinary,
    "test_rank_decode_lse_agrees_with_reference": rank_decode.ordinary,
    "test_write_cache_stores_latent_then_rope": write_cache.ordinary,
    "test_write_cache_changes_named_slots_only": write_cache.ordinary,
    "test_write_cache_skips_slot_minus_one": write_cache.ordinary,
    "test_write_cache_reads_strides": write_cache.ordinary,
    "test_codes_are_the_nearest": quantize_cache.elementary,
    "test_dequantised_rows_are_code_times_scale": dequantize_cache.elementary,
    "test_quantised_decode_agrees_with_reference": decode_quantized.elementary,
    "test_sparse_prefill_agrees_with_reference": sparse_prefill.elementary,
    "test_sparse_prefill_statistics_agree_with_reference": sparse_prefill.elementary,
    "test_sparse_prefill_ignores_rows_that_no_index_names": none,
    "test_sparse_decode_agrees_with_reference": sparse_decode.elementary,
    "test_sparse_decode_lse_agrees_with_reference": sparse_decode.elementary,
    "test_sparse_decode_ignores_slots_that_no_index_names": none,
    "test_indexer_queries_agree_with_reference": project_indexer.ordinary,
    "test_indexer_keys_agree_with_reference": project_indexer.ordinary,
    "test_indexer_head_weights_agree_with_reference": project_indexer.ordinary,
    "test_indexer_logits_agree_with_reference": indexer.elementary,
    "test_indexer_selects_the_largest_logits": indexer.elementary,
    "test_layer_stages_agree_with_reference": layer.elementary,
    "test_layer_prefill_agrees_with_reference": layer.elementary,
    "test_layer_decode_agrees_with_reference": layer.elementary,
    "test_layer_prefill_in_chunks": layer.elementary,
    "test_reset_empties_the_cache": layer.elementary,
    "test_cache_bytes_are_exact": layer.elementary,
    "test_layer_gradients_agree_with_reference": none,
}

QUICK: dict[str, Cases] = {
    **_ELEMENTARY,
    **{
        f"test_{operation.name}_{hazard}": CASES[operation.name].ordinary
        for operation in CALLED
        for hazard in HAZARDS
        if (operation.name, hazard) not in STATED_ELSEWHERE | EXCEPTIONS
    },
}
"""By the name of an elementary law, the cases that a quick check of it begins with."""
