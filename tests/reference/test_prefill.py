"""Packed sequences, against attention of each alone."""

from __future__ import annotations

import numpy as np
import pytest

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.prefill import prefill_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.reference.attention import attention
from mla_spec.reference.prefill import prefill
from mla_spec.reference.typing import IntArray

LENGTHS = ((3, 3), (2, 6), (0, 2), (4, 2), (1, 0), (0, 0), (1, 1))
CU_Q, CU_K = (np.cumsum([0, *column]) for column in zip(*LENGTHS, strict=True))
RNG = np.random.default_rng(11)
Q, K, V = (RNG.standard_normal(shape) for shape in ((11, 4, 6), (14, 2, 6), (14, 2, 3)))


@pytest.mark.parametrize("causal", [True, False])
def test_every_sequence_attends_to_its_own_keys(causal: bool) -> None:
    out, lse = prefill(Q, K, V, CU_Q, CU_K, softmax_scale=0.7, causal=causal)
    assert out.shape == (11, 4, 3)
    assert lse.shape == (4, 11)
    for i, (queries, keys) in enumerate(LENGTHS):
        rows, cols = slice(CU_Q[i], CU_Q[i + 1]), slice(CU_K[i], CU_K[i + 1])
        want, want_lse = attention(Q[rows], K[cols], V[cols], softmax_scale=0.7, causal=causal)
        np.testing.assert_array_equal(out[rows], want)
        np.testing.assert_array_equal(lse[:, rows], want_lse)
        blind = max(0, queries - keys) if causal else queries * (keys == 0)
        assert np.isneginf(lse[:, rows]).all(axis=0).sum() == blind
        assert not out[rows][:blind].any()


def test_the_last_query_sees_every_key_and_the_first_as_many_fewer() -> None:
    """Bottom-right: with 2 queries and 6 keys the first sees 5."""
    q, k, v = Q[3:5], K[3:9], V[3:9]
    cu = [np.array([0, n]) for n in (2, 6)]
    out, _ = prefill(q, k, v, *cu, softmax_scale=0.7)
    first, _ = prefill(q[:1], k[:5], v[:5], np.array([0, 1]), np.array([0, 5]), softmax_scale=0.7, causal=False)
    last, _ = prefill(q[1:], k, v, np.array([0, 1]), np.array([0, 6]), softmax_scale=0.7, causal=False)
    assert np.abs(out - np.concatenate([first, last])).max() < 16 * np.finfo(float).eps


@pytest.mark.parametrize("causal", [True, False])
def test_the_bound_is_that_of_each_sequence(causal: bool) -> None:
    profile = Profile.default("bfloat16")
    bounded = prefill_with_bound(Q, K, V, CU_Q, CU_K, softmax_scale=0.7, profile=profile, causal=causal)
    out, lse = prefill(Q, K, V, CU_Q, CU_K, softmax_scale=0.7, causal=causal)
    assert np.abs(bounded.out - out).max() < 16 * np.finfo(float).eps
    np.testing.assert_array_equal(np.isneginf(bounded.lse), np.isneginf(lse))
    rows, cols = slice(3, 5), slice(3, 9)
    alone = attention_with_bound(Q[rows], K[cols], V[cols], softmax_scale=0.7, profile=profile, causal=causal)
    for all_rows, want in (
        (bounded.out_error, alone.out_error),
        (bounded.out_error_probable, alone.out_error_probable),
        (bounded.lse_error.map(np.transpose), alone.lse_error.map(np.transpose)),
        (bounded.lse_error_probable.map(np.transpose), alone.lse_error_probable.map(np.transpose)),
    ):
        for name, term in want.terms.items():
            np.testing.assert_array_equal(all_rows.terms[name][rows], term)


def test_one_sequence_is_attention() -> None:
    """Whose queries see all keys up to their own by default."""
    cu = np.array([0, 11])
    bounded = prefill_with_bound(Q, K[:11], V[:11], cu, cu, softmax_scale=0.7, profile=Profile.default("float32"))
    np.testing.assert_allclose(bounded.out, prefill(Q, K[:11], V[:11], cu, cu, softmax_scale=0.7)[0], rtol=1e-13)
    np.testing.assert_allclose(bounded.out[0], np.repeat(V[0], 2, axis=0), rtol=1e-13)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "message"),
    [
        (np.array([1, *CU_Q[1:]]), CU_K, "cu_seqlens_q must rise from 0"),
        (CU_Q, CU_K[:-2], "cu_seqlens_k must rise from 0 to the number of tokens 14"),
        (CU_Q[[0, 2, 1, -1]], CU_K, "cu_seqlens_q must rise"),
        (CU_Q[[0, -1]], CU_K, "must have one length, got 2 and 8"),
        (np.zeros(1, dtype=int), CU_K, "cu_seqlens_q must rise"),
    ],
)
def test_offsets_must_fit(cu_q: IntArray, cu_k: IntArray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefill(Q, K, V, cu_q, cu_k, softmax_scale=0.7)
