"""The paged latent cache: addresses, contents and sizes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.reference.attention import attention
from mla_spec.reference.cache import (
    compared_cache_sizes,
    gather_rows,
    kv_heads_on_ranks,
    latent_cache_size,
    multi_head_cache_size,
    paged_bytes,
    paged_decode,
    reduction,
    slot_mapping,
    write_rows,
)
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.published import published_models
from mla_spec.reference.typing import Array, IntArray

PAGE_SIZE = 4
SEQLENS = np.array([9, 4, 0, 1])
# Pages of a sequence are in no order; entries past its length point anywhere.
BLOCK_TABLE = np.array([[5, 0, 3], [7, -1, 99], [-7, 10**6, -1], [2, 2, 2]])
C, R = 6, 2


def rows_and_cache(unused: float) -> tuple[Array, Array]:
    """(rows [b, t, c+r] in token order, the cache that holds them with ``unused`` in every other slot)."""
    rows = np.random.default_rng(0).standard_normal((4, 9, C + R))
    cache = np.full((8, PAGE_SIZE, 1, C + R), unused)
    for b, length in enumerate(SEQLENS):
        for token in range(length):
            cache[BLOCK_TABLE[b, token // PAGE_SIZE], token % PAGE_SIZE, 0] = rows[b, token]
    return rows, cache


def test_slots_are_page_times_size_plus_row() -> None:
    block_table = np.array([[5, 0, 3], [7, 1, 2]])
    tokens = np.array([[0, 3, 4, 11], [7, 1, 8, 8]])
    assert slot_mapping(block_table, tokens, 4).tolist() == [[20, 23, 0, 15], [7, 29, 8, 8]]
    assert slot_mapping(block_table[0], np.array([5]), 4).tolist() == [1]


def test_slots_of_narrow_tables_do_not_overflow() -> None:
    slots = slot_mapping(np.array([[2**30]], dtype=np.int32), np.array([[63]], dtype=np.int32), 64)
    assert slots.tolist() == [[2**36 + 63]]


def test_written_rows_hold_the_latent_first() -> None:
    cache = np.arange(3 * 2 * 4.0).reshape(3, 2, 1, 4)
    before = cache.copy()
    latent, k_pe = np.array([[100.0, 101], [102, 103], [104, 105]]), np.array([[200.0, 201], [202, 203], [204, 205]])
    written = write_rows(cache, latent, k_pe, np.array([5, -1, 0]))
    expected = before.copy()
    expected[2, 1, 0] = [100, 101, 200, 201]
    expected[0, 0, 0] = [104, 105, 204, 205]
    np.testing.assert_array_equal(written, expected)
    np.testing.assert_array_equal(cache, before)  # the argument is left alone


def test_all_slots_may_be_skipped() -> None:
    cache = np.ones((2, 2, 1, 3))
    np.testing.assert_array_equal(write_rows(cache, np.zeros((2, 2)), np.zeros((2, 1)), np.array([-1, -1])), cache)
    none = np.zeros(0, dtype=int)
    np.testing.assert_array_equal(write_rows(cache, np.zeros((0, 2)), np.zeros((0, 1)), none), cache)


def test_a_slot_is_written_once() -> None:
    with pytest.raises(ValueError, match=r"^slots must be named once, -1 aside$"):
        write_rows(np.zeros((2, 2, 1, 3)), np.zeros((3, 2)), np.zeros((3, 1)), np.array([1, -1, 1]))


@pytest.mark.parametrize(("slots", "got"), [([-2, 0], r"-2 \.\. 0"), ([4], r"4 \.\. 4"), ([0, 7], r"0 \.\. 7")])
def test_slots_outside_the_cache_are_refused(slots: list[int], got: str) -> None:
    n = len(slots)
    with pytest.raises(ValueError, match=rf"^slots must lie in -1 \.\. 3, got {got}$"):
        write_rows(np.zeros((2, 2, 1, 3)), np.zeros((n, 2)), np.zeros((n, 1)), np.array(slots))


@pytest.mark.parametrize("unused", [np.nan, np.inf, 0.0])
def test_gathered_rows_are_in_token_order_and_padded_with_zeros(unused: float) -> None:
    rows, cache = rows_and_cache(unused)
    gathered = gather_rows(cache, BLOCK_TABLE, SEQLENS)
    assert gathered.shape == (4, 9, C + R)
    for b, length in enumerate(SEQLENS):
        np.testing.assert_array_equal(gathered[b, :length], rows[b, :length])
        assert (gathered[b, length:] == 0).all()


def test_gathering_needs_no_more_table_than_the_longest_sequence() -> None:
    rows, cache = rows_and_cache(np.nan)
    gathered = gather_rows(cache, BLOCK_TABLE[1:, :1], SEQLENS[1:])
    assert gathered.shape == (3, 4, C + R)
    np.testing.assert_array_equal(gathered[0], rows[1, :4])
    empty = gather_rows(cache, BLOCK_TABLE[:1, :0], np.array([0]))
    assert empty.shape == (1, 0, C + R)


def test_written_rows_are_gathered_again() -> None:
    rows, expected = rows_and_cache(0.0)
    cache = np.zeros_like(expected)
    for b, length in enumerate(SEQLENS):
        slots = slot_mapping(BLOCK_TABLE[b], np.arange(length), PAGE_SIZE)
        cache = write_rows(cache, rows[b, :length, :C], rows[b, :length, C:], slots)
    np.testing.assert_array_equal(cache, expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s", [1, 3])
def test_paged_decode_is_attention_to_the_rows(s: int, causal: bool) -> None:
    rows, cache = rows_and_cache(np.nan)
    q = np.random.default_rng(1).standard_normal((4, s, 3, C + R)) * 3
    out, lse = paged_decode(q, cache, BLOCK_TABLE, SEQLENS, head_dim_v=C, softmax_scale=0.5, causal=causal)
    assert out.shape == (4, s, 3, C)
    assert lse.shape == (4, 3, s)
    for b, length in enumerate(SEQLENS):
        keys = rows[b, :length, None]  # [t, 1, c+r]
        one = attention(q[b], keys, keys[..., :C], softmax_scale=0.5, causal=causal)
        bound = attention_with_bound(
            q[b],
            keys,
            keys[..., :C],
            softmax_scale=0.5,
            causal=causal,
            profile=Profile.default("float64", tile=512),
        )
        assert (np.abs(out[b] - one[0]) <= 2 * bound.out_error.total).all()
        np.testing.assert_array_equal(np.isneginf(lse[b]), np.isneginf(one[1]))
        seen = np.isfinite(one[1])
        assert (np.abs(lse[b][seen] - one[1][seen]) <= 2 * bound.lse_error.total[seen]).all()


def test_decode_is_causal_unless_told_otherwise() -> None:
    _, cache = rows_and_cache(np.nan)
    q = np.random.default_rng(1).standard_normal((4, 3, 2, C + R))
    out, causal = (
        paged_decode(q, cache, BLOCK_TABLE, SEQLENS, head_dim_v=C, softmax_scale=0.5, **keywords)[0]
        for keywords in ({}, {"causal": True})
    )
    np.testing.assert_array_equal(out, causal)


def test_pages_may_be_relabelled_without_changing_a_bit() -> None:
    _, cache = rows_and_cache(np.nan)
    q = np.random.default_rng(2).standard_normal((4, 2, 3, C + R))

    def decode(kv_cache: Array, block_table: IntArray) -> tuple[Array, Array]:
        return paged_decode(q, kv_cache, block_table, SEQLENS, head_dim_v=C, softmax_scale=0.5)

    label = np.random.default_rng(3).permutation(8)  # page p moves to label[p]
    relabelled = np.empty_like(cache)
    relabelled[label] = cache
    used = np.arange(3) * PAGE_SIZE < SEQLENS[:, None]
    table = np.where(used, label[np.where(used, BLOCK_TABLE, 0)], -1)
    for a, b in zip(decode(relabelled, table), decode(cache, BLOCK_TABLE), strict=True):
        np.testing.assert_array_equal(a, b)


def test_latent_cache_of_deepseek_v3_is_70272_bytes_a_token() -> None:
    model = published_models()["DeepSeek-V3"]
    size = latent_cache_size(model.mla_config())
    assert (size.attention, size.elements) == ("MLA", 576)
    assert model.num_cached_layers == 61
    assert size.bytes_per_token("bfloat16", 61) == 70272
    assert size.bytes_per_token("float16", 61) == 70272
    assert size.bytes_per_token("float32", 61) == 2 * 70272
    assert size.bytes_per_token("bfloat16", 1) == 1152


def test_latent_cache_without_rope_dims_is_the_latent() -> None:
    assert latent_cache_size(MLAConfig.published("GLM-5.3-Flash (glm5_next)")).elements == 512


def test_comparison_with_other_kinds_of_attention() -> None:
    sizes = {size.attention: size.elements for size in compared_cache_sizes(128, 128, 128)}
    # DeepSeek-V2 (arXiv 2405.04434), table 1: 2·n_h·d_h, 2·n_g·d_h and 2·d_h.
    assert sizes == {"MHA": 2 * 128 * 128, "GQA-8": 2 * 8 * 128, "MQA": 2 * 128}
    assert list(sizes) == ["MHA", "GQA-8", "MQA"]
    own = {size.attention: size.elements for size in compared_cache_sizes(128, 192, 128)}
    assert own["MHA"] == 128 * (192 + 128)


def test_groups_that_do_not_divide_the_heads_are_left_out() -> None:
    assert [size.attention for size in compared_cache_sizes(20, 256, 256)] == ["MHA", "MQA"]


def test_sizes_are_exact_integers() -> None:
    size = multi_head_cache_size(8, 192, 128, "GQA-8")
    assert (size.attention, size.elements, size.kv_heads) == ("GQA-8", 8 * 320, 8)
    assert size.bytes_per_token("bfloat16", 10**9) == 8 * 320 * 2 * 10**9
    with pytest.raises(ValueError, match="unknown number format 'int3'"):
        size.bytes_per_token("int3", 1)


def test_reduction_is_exact() -> None:
    assert reduction(576, 2 * 128 * 128) == 1 - Fraction(576, 32768)
    assert reduction(Fraction(1, 3), 1) == Fraction(2, 3)
    # MLA caches as much as GQA with 2.25 groups (DeepSeek-V2, section 2.1.4).
    assert Fraction(576, 2 * 128) == Fraction(9, 4)


def test_paged_bytes_count_whole_pages() -> None:
    assert paged_bytes(np.array([0, 1, 64, 65]), 64, 1152) == (0 + 1 + 1 + 2) * 64 * 1152
    assert paged_bytes(np.array([], dtype=int), 64, 1152) == 0
    many = np.full(3, 2**31 - 1, dtype=np.int32)
    assert paged_bytes(many, 64, 1152) == 3 * 2**31 * 1152


def test_kv_heads_are_divided_among_ranks_or_copied() -> None:
    assert kv_heads_on_ranks(128, 128, 8) == [16] * 8
    assert kv_heads_on_ranks(128, 8, 4) == [2] * 4
    assert kv_heads_on_ranks(128, 8, 16) == [1] * 16
    assert kv_heads_on_ranks(64, 1, 8) == [1] * 8
    assert kv_heads_on_ranks(20, 20, 1) == [20]
    # Ranks of 4 query heads, 3 of which read one KV head: those of a rank read 2 KV heads.
    assert kv_heads_on_ranks(12, 4, 3) == [2, 2, 2]
    assert all(type(heads) is int for heads in kv_heads_on_ranks(128, 8, 16))


@pytest.mark.parametrize("ranks", [0, -1, 3, 256])
def test_ranks_that_do_not_divide_the_heads_are_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"128 heads cannot be divided among {ranks} ranks"):
        kv_heads_on_ranks(128, 8, ranks)


def test_rows_of_layers_without_rotary_embedding_are_shorter() -> None:
    models = published_models()
    assert models["DeepSeek-V3"].latent_rows() == [(61, 576)]
    assert models["Mistral-Large-4-1T-A52B"].latent_rows() == [(54, 576), (18, 512)]
    assert models["Kimi-Linear-48B-A3B"].latent_rows() == [(7, 576)]  # all without, with k_pe as it is
    with pytest.raises(ValueError, match="number of layers is not published"):
        models["GigaChat3-702B / 10B"].latent_rows()
    with pytest.raises(ValueError, match="not MLA"):
        models["DeepSeek-V4-Pro"].latent_rows()
