"""Tokens dealt to ranks, against a list of them, and one rank's decode against attention over its rows."""

from __future__ import annotations

import numpy as np
import pytest

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.context_parallel import rank_decode_with_bound
from mla_spec.bounds.profile_presets import preset
from mla_spec.reference.attention import attention
from mla_spec.reference.cache import gather_rows, paged_decode
from mla_spec.reference.context_parallel import own_tokens, places, rank_decode

RNG = np.random.default_rng(13)
C, PAGE_SIZE, SCALE, S = 3, 2, 0.6, 3
LENGTHS = np.array([11, 2, 0, 6])
Q = RNG.standard_normal((4, S, 2, C + 2))
TABLE = RNG.permutation(24).reshape(4, 6)
CACHE = RNG.standard_normal((24, PAGE_SIZE, 1, C + 2))


@pytest.mark.parametrize("interleave", [1, 2, 5])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_token_is_that_of_one_rank(ranks: int, interleave: int) -> None:
    for length in range(40):
        held = []
        for rank in range(ranks):
            mine = [t for t in range(length) if t // interleave % ranks == rank]
            dealt = {"ranks": ranks, "rank": rank, "interleave": interleave}
            assert own_tokens(np.array(length), **dealt) == len(mine)
            assert places(np.arange(len(mine)), **dealt).tolist() == mine
            held += mine
        assert sorted(held) == list(range(length))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rank", range(3))
def test_a_query_sees_the_tokens_of_the_rank_up_to_its_own_place(rank: int, causal: bool) -> None:
    dealt = {"ranks": 3, "rank": rank, "interleave": 2}
    options = {"head_dim_v": C, "softmax_scale": SCALE, "causal": causal}
    out, lse = rank_decode(Q, CACHE, TABLE, LENGTHS, **options, **dealt)
    bounded = rank_decode_with_bound(Q, CACHE, TABLE, LENGTHS, **options, **dealt, profile=preset("bf16-flash"))
    rows = gather_rows(CACHE, TABLE, np.full(4, 12))[:, :, None]
    most = int(own_tokens(LENGTHS, **dealt).max())
    for b, length in enumerate(LENGTHS):
        for i in range(S):
            end = length - S + 1 + i if causal else length
            seen = sum(t // 2 % 3 == rank for t in range(end))
            k = rows[b, :seen]
            want, want_lse = attention(Q[b, i : i + 1], k, k[..., :C], softmax_scale=SCALE, causal=False)
            np.testing.assert_array_equal(out[b, i], want[0])
            np.testing.assert_array_equal(lse[b, :, i], want_lse[:, 0])
            assert np.abs(bounded.out[b, i] - want[0]).max() < 16 * np.finfo(float).eps
            alone = attention_with_bound(
                Q[b, i : i + 1],
                rows[b, :most],
                rows[b, :most, :, :C],
                softmax_scale=SCALE,
                cache_seqlens=seen,
                causal=False,
                profile=preset("bf16-flash"),
            )
            for name, term in alone.out_error.terms.items():
                np.testing.assert_array_equal(bounded.out_error.terms[name][b, i], term[0])
            for name, term in alone.lse_error.terms.items():
                np.testing.assert_array_equal(bounded.lse_error.terms[name][b, :, i], term[:, 0])


def test_one_rank_is_decode() -> None:
    options = {"head_dim_v": C, "softmax_scale": SCALE}
    want = paged_decode(Q, CACHE, TABLE, LENGTHS, **options)
    got = rank_decode(Q, CACHE, TABLE, LENGTHS, **options, ranks=1, rank=0, interleave=4)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dealt", [(2, 2, 1), (2, -1, 1), (2, 0, 0)])
def test_ranks_must_exist(dealt: tuple[int, int, int]) -> None:
    ranks, rank, interleave = dealt
    with pytest.raises(ValueError, match=r"rank must lie in 0 .* and interleave be positive, got"):
        own_tokens(LENGTHS, ranks=ranks, rank=rank, interleave=interleave)
