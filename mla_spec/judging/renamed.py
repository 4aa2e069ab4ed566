"""Names of laws that were changed: what was written down under an old one still means the law."""

from __future__ import annotations

import warnings

RENAMED = {
    "test_inputs_are_not_modified": "test_decode_does_not_modify_its_inputs",
    "test_output_is_not_aliased": "test_decode_output_is_not_aliased",
    "test_calls_are_independent": "test_decode_calls_are_independent",
    "test_noncontiguous_inputs": "test_decode_reads_strides",
    "test_page_relabelling_changes_nothing": "test_decode_page_relabelling_changes_nothing",
    "test_unused_cache_slots_are_ignored": "test_decode_ignores_unused_cache_slots",
    "test_unused_table_entries_are_ignored": "test_decode_ignores_unused_table_entries",
    "test_future_keys_are_ignored": "test_decode_ignores_future_keys",
    "test_last_key_matters": "test_decode_last_key_matters",
    "test_lse_agrees_with_reference": "test_decode_lse_agrees_with_reference",
    "test_ragged_batch_equals_each_sequence_alone": "test_decode_sequences_are_independent",
    "test_roundings_do_not_add_up": "test_decode_roundings_do_not_add_up",
    "test_lse_recombines_disjoint_parts": "test_decode_lse_recombines_disjoint_parts",
    "test_sequences_share_the_pages_of_a_prefix": "test_decode_sequences_share_the_pages_of_a_prefix",
    "test_rope_of_a_slice": "test_rope_reads_strides",
    "test_absorb_does_not_modify_its_input": "test_absorb_does_not_modify_its_inputs",
    "test_quantised_decode_reads_strides": "test_decode_quantized_reads_strides",
    "test_quantised_decode_does_not_modify_its_inputs": "test_decode_quantized_does_not_modify_its_inputs",
    "test_quantised_decode_calls_are_independent": "test_decode_quantized_calls_are_independent",
    "test_quantised_decode_reaches_beyond_2_31_bytes": "test_decode_quantized_reaches_beyond_2_31_elements",
    "test_dequantize_cache_reaches_beyond_2_31_bytes": "test_dequantize_cache_reaches_beyond_2_31_elements",
    "test_dequantising_calls_are_independent": "test_dequantize_cache_calls_are_independent",
    "test_one_hot_by_the_latent_part": "test_decode_one_hot_by_the_latent_part",
    "test_one_hot_far_below_zero": "test_decode_one_hot_far_below_zero",
    "test_one_hot_by_the_rope_part": "test_decode_one_hot_by_the_rope_part",
    "test_two_equal_maxima_give_their_mean": "test_decode_two_equal_maxima_give_their_mean",
    "test_equal_scores_give_the_mean": "test_decode_equal_scores_give_the_mean",
    "test_one_hot_in_a_long_context": "test_decode_is_exact_at_length",
    "test_decode_one_hot_in_a_long_context": "test_decode_is_exact_at_length",
    "test_output_is_unbiased": "test_decode_output_is_unbiased",
    "test_lse_is_unbiased": "test_decode_lse_is_unbiased",
    "test_error_is_as_small_as_declared": "test_decode_error_is_as_small_as_declared",
}
"""The name of today by the one of an earlier version."""


class RenamedLaw(UserWarning):
    """A law was asked for by the name of an earlier version."""


def current_name(name: str) -> str:
    """The name of today of a law; with a warning where ``name`` is an earlier one."""
    if name not in RENAMED:
        return name
    warnings.warn(RenamedLaw(f"law {name} is now called {RENAMED[name]}"), stacklevel=2)
    return RENAMED[name]
