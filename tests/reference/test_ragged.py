"""Packed queries over pages, against decode of each sequence, prefill over its rows, and the bound of each row alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.profile import Profile, gamma
from mla_spec.bounds.profile_presets import preset
from mla_spec.bounds.ragged import ragged_decode_with_bound
from mla_spec.reference.cache import gather_rows, paged_decode
from mla_spec.reference.formats import FORMATS
from mla_spec.reference.prefill import prefill
from mla_spec.reference.ragged import ragged_decode
from mla_spec.reference.typing import Array

LENGTHS = ((3, 3), (1, 6), (0, 2), (4, 9), (1, 0), (0, 0), (3, 2))
RNG = np.random.default_rng(12)
C, PAGE_SIZE, SCALE = 4, 2, 0.7
CU = np.cumsum([0, *(s for s, _ in LENGTHS)])
KEYS = np.array([t for _, t in LENGTHS])
Q = RNG.standard_normal((int(CU[-1]), 3, C + 2))
TABLE = RNG.permutation(len(LENGTHS) * 5).reshape(len(LENGTHS), 5)
CACHE = RNG.standard_normal((TABLE.size, PAGE_SIZE, 1, C + 2))
CACHE[TABLE[:, -1]] = np.nan  # no sequence has more than four full pages and a half
CACHE[TABLE[3, 4], 0] = 1.0
ORDER = 2 * gamma(64, FORMATS["float64"].unit_roundoff)
"""How much two sums of the same numbers, fewer than 64 and none negative, may differ by their order."""


def called(function: Any, q: Array = Q, **options: Any) -> Any:
    return function(q, CACHE, TABLE, KEYS, CU, head_dim_v=C, softmax_scale=SCALE, **options)


@pytest.mark.parametrize("causal", [True, False])
def test_every_sequence_is_a_decode_of_its_own(causal: bool) -> None:
    out, lse = called(ragged_decode, causal=causal)
    assert out.shape == (len(Q), 3, C)
    assert lse.shape == (3, len(Q))
    for i, (queries, keys) in enumerate(LENGTHS):
        rows = slice(CU[i], CU[i + 1])
        own = (TABLE[i : i + 1], KEYS[i : i + 1])
        want, want_lse = paged_decode(Q[None, rows], CACHE, *own, head_dim_v=C, softmax_scale=SCALE, causal=causal)
        np.testing.assert_array_equal(out[rows], want[0])
        np.testing.assert_array_equal(lse[:, rows], want_lse[0])
        blind = max(0, queries - keys) if causal else queries * (keys == 0)
        assert np.isneginf(lse[:, rows]).all(axis=0).sum() == blind


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_prefill_over_the_rows_of_the_cache(causal: bool) -> None:
    rows = gather_rows(CACHE, TABLE, KEYS)
    packed = np.concatenate([row[:t] for row, t in zip(rows, KEYS, strict=True)])[:, None]
    cu_k = np.cumsum([0, *KEYS])
    want = prefill(Q, packed, packed[..., :C], CU, cu_k, softmax_scale=SCALE, causal=causal)
    for got, expected in zip(called(ragged_decode, causal=causal), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["bf16-flash", "fp32", "fp8-cache"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_bound_of_a_query_is_that_of_a_decode_over_the_keys_that_it_sees(name: str, causal: bool) -> None:
    """A query alone, over the rows of its sequence of which it sees so many, has the same terms."""
    profile = preset(name)
    bounded = called(ragged_decode_with_bound, profile=profile, causal=causal)
    out, lse = called(ragged_decode, causal=causal)
    assert np.abs(bounded.out - out).max() < 16 * np.finfo(float).eps
    np.testing.assert_array_equal(np.isneginf(bounded.lse), np.isneginf(lse))
    rows = gather_rows(CACHE, TABLE, KEYS)[:, :, None]
    for i, (s, t) in enumerate(LENGTHS):
        for j in range(s):
            token = CU[i] + j
            seen = max(0, t - s + 1 + j) if causal else t
            k = rows[i, :t]
            alone = attention_with_bound(
                Q[token : token + 1],
                k,
                k[..., :C],
                softmax_scale=SCALE,
                profile=profile,
                cache_seqlens=seen,
                causal=False,
            )
            for total, want in ((bounded.out_error, alone.out_error), (bounded.lse_error, alone.lse_error)):
                for term, value in want.terms.items():
                    got = total.terms[term]
                    got = got[token] if got.ndim == 3 else got[:, token]
                    np.testing.assert_allclose(got, value[0] if value.ndim == 3 else value[:, 0], rtol=ORDER)


def test_one_scale_of_all_queries_is_that_of_all_sequences() -> None:
    """A query that is rounded with the largest of the whole call is no better known in a sequence of small queries."""
    profile = Profile.default("bfloat16", query="float8_e4m3fn", query_scale="tensor")
    large = Q.copy()
    large[0] *= 1e6
    small, beside = (called(ragged_decode_with_bound, q, profile=profile).out_error.total for q in (Q, large))
    assert (beside[CU[1]] > 10 * small[CU[1]]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": CU + 1}, "cu_seqlens_q must rise from 0 to the number of tokens 12"),
        ({"cu_seqlens_q": CU[[0, 2, 1, -1]]}, "cu_seqlens_q must rise"),
        ({"cu_seqlens_q": CU[[0, -1]]}, "must be of one batch, got 7, 7 and 1 sequences"),
        ({"cache_seqlens": KEYS[:-1]}, "must be of one batch, got 7, 6 and 7 sequences"),
        ({"cache_seqlens": KEYS + 9}, "5 pages of 2 tokens do not hold a sequence of 12"),
    ],
)
def test_offsets_and_lengths_must_fit(changes: dict[str, Any], message: str) -> None:
    given = {"block_table": TABLE, "cache_seqlens": KEYS, "cu_seqlens_q": CU} | changes
    with pytest.raises(ValueError, match=message):
        ragged_decode(Q, CACHE, **given, head_dim_v=C, softmax_scale=SCALE)
