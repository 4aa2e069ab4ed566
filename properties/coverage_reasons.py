"""Why some laws see no case of some regime, as ``mla-spec coverage`` asks for every empty cell."""

from __future__ import annotations

from mla_spec.judging.law import EVERY_REGIME, Reason

LARGE = ("peaked scores", "huge scores")
OTHER_NUMBERS = ("outlier", "ties", "offset", "sink", "cancelling", "sunken", "negative", "flat scores", *LARGE)
STATISTICS = (
    "test_decode_output_is_unbiased",
    "test_decode_lse_is_unbiased",
    "test_decode_error_is_as_small_as_declared",
)
EXACT = ("test_decode_one_hot_*", "test_decode_two_equal_maxima_*", "test_decode_equal_scores_*")
CHANGED = ("test_layer_uses_weights_*", "test_layer_made_again_*")
CALLED_TWICE = ("test_reset_*", "test_cache_bytes_*", "test_layer_allocates_*", "test_layers_are_independent", *CHANGED)
DECODING = ("test_layer_decode_*", "test_layer_decodes_*", *CALLED_TWICE)

DECODE: tuple[Reason, ...] = (
    Reason(EXACT, OTHER_NUMBERS, "the law sets queries and keys itself, so that some keys lead or all are equal"),
    Reason(EXACT, ("no keys",), "a key must lead"),
    Reason(
        ("test_decode_weighs_*",),
        (*OTHER_NUMBERS, "no keys", "ragged lengths", "several queries"),
        "the law sets the queries and keys of one long sequence itself",
    ),
    Reason(STATISTICS, (*OTHER_NUMBERS, "several queries"), "the few cases are fixed; many independent rows matter"),
    Reason(
        (*STATISTICS, "test_decode_roundings_do_not_add_up"), ("no keys",), "roundings of many weights are looked at"
    ),
    Reason(
        ("test_decode_roundings_do_not_add_up",), LARGE, "few keys would have all the weight, and roundings not spread"
    ),
    Reason(
        ("test_decode_ignores_future_keys", "test_rank_decode_ignores_future_keys"),
        ("one query",),
        "all keys are visible to a single query",
    ),
    Reason(
        ("test_decode_lse_recombines_*", "test_merge_of_decoded_*"), ("several queries",), "parts have no causal mask"
    ),
    Reason(("test_decode_lse_recombines_*", "test_merge_of_decoded_*"), ("no keys",), "there must be keys to divide"),
    Reason(("test_absorbed_equals_explicit",), LARGE, "rounding the folded query moves large scores by more than 1"),
    Reason(
        (
            *("test_merge_of_decoded_*", "test_merge_of_rank_*", "test_chunked_prefill_*"),
            *("test_context_parallel_*", "test_ring_attention_*"),
        ),
        ("huge scores",),
        "the weight exp(lse_part - lse) of a part has the error of LSEs of that size, and no bound means anything",
    ),
    Reason(
        ("test_*_attention_sink", "test_*_equal_sink_*"),
        LARGE,
        "the LSE is not known well enough to be compared with a sink",
    ),
    Reason(("test_prefill_equals_decode",), ("huge scores",), "two results may differ by more than either is worth"),
    Reason(("test_decode_reads_what_*",), ("no keys",), "there must be tokens to write"),
    Reason(
        ("test_decode_memory_*",),
        (*OTHER_NUMBERS, "several queries", "no keys"),
        "memory depends on shapes, not on numbers; the two cases are fixed",
    ),
    Reason(
        ("test_quantised_*",),
        ("huge scores",),
        "rows rounded after dequantising shift scores of that size by more than 1",
        dtypes=("float32", "float16", "bfloat16"),
    ),
)

PREFILL: tuple[Reason, ...] = (
    Reason(
        ("test_prefill_ignores_future_keys", "test_ragged_decode_ignores_future_keys"),
        ("no queries",),
        "there must be a query before the last key",
    ),
    Reason(
        ("test_prefill_in_chunks_*", "test_chunked_prefill_*", "test_ragged_decode_in_chunks_*"),
        ("no keys", "no queries", "fewer keys than queries"),
        "queries are the newest tokens of a sequence whose keys are all there",
    ),
    Reason(("test_ring_attention_*",), ("no keys", "no queries"), "each sequence has tokens to spread over ranks"),
    Reason(("test_ring_attention_*",), ("* keys than queries",), "its tokens are queries and keys alike"),
)

OTHERS: tuple[Reason, ...] = (
    Reason(
        ("test_merge_order_*", "test_merge_is_associative", "test_merge_ignores_*", "test_merge_calls_*"),
        ("one part",),
        "one part has no order, cannot be merged in steps, and is what it gives",
    ),
    Reason(("test_write_cache_skips_*",), ("every token has a slot",), "a token must be skipped"),
    Reason(("test_groups_of_zeros_*",), ("[!z]*",), "the law is about zeros"),
    Reason(
        ("test_latent_codes_*",),
        ("outlier", "rope", "tiny", "huge", "edges"),
        "the law itself scales k_pe, by as much as the dtype's range leaves ordinary rows",
    ),
)

SPARSE: tuple[Reason, ...] = (
    Reason(("test_sparse_*_sink*",), ("no sink",), "the law is about sinks"),
    Reason(("test_sparse_*_equal_sink_*",), ("infinite sink",), "the law is about a sink that equals the score"),
    Reason(
        ("test_sparse_*_of_nothing", "test_sparse_*_ignores_rows_*", "test_sparse_*_ignores_slots_*"),
        ("all entries valid",),
        "some rows or slots must not be selected",
    ),
    Reason(("test_sparse_*_invalid_entries_*",), ("all entries valid",), "the law is about invalid entries"),
    Reason(
        ("test_sparse_prefill_over_all_keys_*",),
        ("topk_length", "finite sink", "infinite sink"),
        "prefill has none of them",
    ),
    Reason(("test_indexer_rotates_only_*",), ("no rotary embedding",), "the law is about what is rotated"),
    Reason(("test_indexer_ties_*",), ("typical", "ties"), "logits must be exact, as those of integers are"),
    Reason(
        ("test_indexer_ignores_future_*", "test_indexer_sequences_*"),
        ("no keys", "no queries", "fewer keys than queries"),
        "there must be queries, and keys that they see and others that they do not",
    ),
    Reason(("test_indexer_of_rotated_*",), ("ties", "integers"), "rotation leaves neither equal nor whole"),
    Reason(
        ("test_sparse_prefill_attends_to_*", "test_selecting_every_key_*"),
        ("fewer keys than queries",),
        "dense attention over a sequence has a key for every query",
    ),
)

LAYERS: tuple[Reason, ...] = (
    Reason(
        ("test_layer_prefill_*", "test_future_tokens_*", "test_prefill_equals_token_*", "test_shard*", "test_gather*"),
        ("decoded tokens",),
        "the law has no tokens but those of the prompt, or none at all",
    ),
    Reason(("test_every_shard_caches_*",), ("decoded tokens",), "rows of a prompt and decoded ones are alike"),
    Reason(
        (*DECODING, "test_layer_prefill_in_chunks", "test_prefill_equals_token_*", "test_future_tokens_*"),
        ("one token in all", "no decoded token"),
        "the law is about what comes after a first token",
    ),
    Reason(
        ("test_layer_gradients_*", "test_every_weight_*", "test_layer_backward_*", "test_gradients_of_a_batch_*"),
        ("one token in all",),
        "a single key has all the weight whatever its score, and what queries and keys get is 0",
    ),
    Reason(("test_every_shard_caches_*",), ("output gate", "attention sink"), "what is cached does not depend on them"),
    Reason(
        ("test_layer_gradients_*", "test_every_weight_*", "test_layer_backward_*", "test_gradients_of_a_batch_*"),
        ("small hidden states",),
        "rows of the 16-bit cases have a carrier of fixed size, so that the norm's own part of a gradient stays small",
        dtypes=("float16", "bfloat16"),
    ),
    Reason(
        ("test_cache_bytes_are_those_*",),
        ("*",),
        "what a cache takes depends on its width, its format and its tokens; the golden files have none in float64",
    ),
    Reason(
        ("test_shards_*", "test_outputs_of_shards_*", "test_every_shard_*", "test_gather*"),
        ("one rank",),
        "one rank has the whole layer",
    ),
)

OF_ATTENTION = (
    *("test_prefill_gradients_*", "test_prefill_backward_*"),
    *("test_sparse_prefill_gradients_*", "test_sparse_prefill_backward_*", "test_gradients_through_merged_parts_*"),
)

GRADIENTS: tuple[Reason, ...] = (
    Reason(
        OF_ATTENTION,
        (*LARGE, "ties"),
        "softmax subtracts means on the way back; equal keys and decided rows leave gradients that are all error",
    ),
    Reason(
        OF_ATTENTION,
        ("typical", "outlier", "negative"),
        "the worst case of 16 bits says something for values of one size only",
        dtypes=("float16", "bfloat16"),
    ),
    Reason(
        ("test_prefill_gradients_[!o]*", "test_prefill_gradients_of_s*", "test_prefill_backward_*"),
        ("exact",),
        "that regime has its own law",
    ),
    Reason(
        ("test_prefill_gradients_of_exact_steps",),
        ("[!e]*",),
        "every step is exact only for scores of 0 and one sequence's keys that all queries see",
    ),
)

CHOSEN = (*OTHER_NUMBERS, "moderate scores", "zeros", "rope", "no keys", "fewer keys than queries")
OF_SELECTIONS = ("duplicates", "rows that select nothing", "topk_length", "finite sink", "infinite sink")

AT_SIZE: tuple[Reason, ...] = (
    Reason(
        ("test_*_at_production_counts",),
        (
            *(*CHOSEN, *OF_SELECTIONS, "yarn", "longrope", "far positions"),
            *("one part", "LSEs far apart", "LSEs beyond exp", "empty parts", "only empty parts", "packed"),
            *(
                "every token has a slot",
                "no token has a slot",
                "pages of one token",
                "one rank",
                "no keys on this rank",
            ),
        ),
        "the few cases are fixed, and differ in counts; other laws of the operation see other numbers and options",
    ),
    Reason(
        ("test_*_is_exact_at_length",),
        (*CHOSEN, *OF_SELECTIONS, "no queries", "several queries", "invalid entries"),
        "the law sets queries, keys and selections itself, so that the answer is exact",
    ),
    Reason(
        ("test_layer_of_thousands_*",),
        (
            *("one token in all", "no decoded token", "query compression", "small hidden states", "a published model"),
            *("no rotary embedding", "factors on latents", "norm on k_pe", "temperature by position"),
            *("output gate", "attention sink"),
        ),
        "the few cases are fixed, and long; other laws of layers see other options",
    ),
)

ELSEWHERE: tuple[Reason, ...] = (
    Reason(("test_*_cuda_graph",), (EVERY_REGIME,), "needs a CUDA device: mla-spec check --device cuda"),
    Reason(("test_compiled_*",), (EVERY_REGIME,), "asked for by mla-spec check --compile BACKEND"),
    Reason(("test_*_under_load",), (EVERY_REGIME,), "asked for by mla-spec check --production"),
)

REASONS: tuple[Reason, ...] = (*DECODE, *PREFILL, *OTHERS, *SPARSE, *LAYERS, *GRADIENTS, *AT_SIZE, *ELSEWHERE)
