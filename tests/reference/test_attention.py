"""Softmax attention, against ball arithmetic."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.attention import BoundedAttention, attention_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.reference.attention import attention, heads_to_rows, rows_to_heads, rows_to_lse
from mla_spec.reference.typing import Array

flint = pytest.importorskip("flint", reason="ball arithmetic needs python-flint (the extra 'golden')")

SCALE = 0.375


def operands(seed: int, s: int, t: int, h: int, g: int, d: int = 5, dv: int = 3, lead: tuple[int, ...] = ()) -> Any:
    """(q, k, v) with logits of standard deviation about 4."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((*lead, s, h, d)) * 5
    return q, rng.standard_normal((*lead, t, g, d)), rng.standard_normal((*lead, t, g, dv))


def float64_bound(q: Array, k: Array, v: Array, tile: int = 512, **options: Any) -> BoundedAttention:
    """How far float64 attention may be from the exact one: the suite's own bound, with ``tile`` keys per step."""
    profile = Profile.default("float64", tile=tile)
    return attention_with_bound(q, k, v, softmax_scale=SCALE, profile=profile, **options)


def exact_attention(q: Array, k: Array, v: Array, limits: list[int], scale: float = SCALE) -> tuple[Any, Any]:
    """(out [s][h][dv], lse [h][s]) in 200-bit balls; query i sees keys 0 .. limits[i] - 1."""
    arb = flint.arb
    (s, h, d), (_, g, dv) = q.shape, v.shape
    out = np.empty((s, h, dv), dtype=object)
    lse = np.empty((h, s), dtype=object)
    for i, head in np.ndindex(s, h):
        group = head // (h // g)
        weights = []
        for j in range(limits[i]):
            score = sum((arb(float(q[i, head, x])) * float(k[j, group, x]) for x in range(d)), arb(0)) * scale
            weights.append(score.exp())
        total = sum(weights, arb(0))
        lse[head, i] = total.log()
        for x in range(dv):
            out[i, head, x] = sum((w * float(v[j, group, x]) for j, w in enumerate(weights)), arb(0)) / total
    return out, lse


def deviation(got: Array, exact: Any) -> Array:
    """|got − exact|, rounded up."""
    return np.array([float(abs(x - float(y)).upper()) for x, y in zip(exact.flat, got.flat, strict=True)]).reshape(
        got.shape
    )


@pytest.fixture(autouse=True)
def _precise():
    kept = flint.ctx.prec
    flint.ctx.prec = 200
    yield
    flint.ctx.prec = kept


@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("accurate", [True, False])
def test_attention_is_exact_up_to_its_own_bound(h: int, g: int, causal: bool, accurate: bool) -> None:
    s, t = 3, 7
    q, k, v = operands(1, s, t, h, g)
    out, lse = attention(q, k, v, softmax_scale=SCALE, causal=causal, accurate=accurate)
    exact_out, exact_lse = exact_attention(q, k, v, [5, 6, 7] if causal else [7, 7, 7])
    bound = float64_bound(q, k, v, causal=causal)
    assert out.shape == (s, h, 3)
    assert lse.shape == (h, s)
    assert (deviation(out, exact_out) <= bound.out_error.total).all()
    assert (deviation(lse, exact_lse) <= bound.lse_error.total).all()


def test_attention_over_many_blocks_is_exact_up_to_its_own_bound() -> None:
    q, k, v = operands(2, 2, 700, 2, 1, d=2, dv=2)
    k[40] *= 8  # the maximum, and with it the rescaling, comes early in one head and late in the other
    k[690] *= -8
    exact_out, exact_lse = exact_attention(q, k, v, [699, 700])
    for block_size in (16, 512):
        out, lse = attention(q, k, v, softmax_scale=SCALE, block_size=block_size)
        bound = float64_bound(q, k, v, tile=block_size)
        assert (deviation(out, exact_out) <= bound.out_error.total).all()
        assert (deviation(lse, exact_lse) <= bound.lse_error.total).all()


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 50, 51, 1000])
def test_block_size_does_not_matter(block_size: int) -> None:
    q, k, v = operands(3, 4, 51, 6, 2)
    one_block = attention(q, k, v, softmax_scale=SCALE, block_size=64)
    out, lse = attention(q, k, v, softmax_scale=SCALE, block_size=block_size)
    a, b = float64_bound(q, k, v, tile=64), float64_bound(q, k, v, tile=block_size)
    assert (np.abs(out - one_block[0]) <= a.out_error.total + b.out_error.total).all()
    assert (np.abs(lse - one_block[1]) <= a.lse_error.total + b.lse_error.total).all()


def test_memory_does_not_grow_with_the_number_of_keys() -> None:
    d = 64

    def peak(t: int) -> int:
        q = np.ones((1, 2, d))
        k = np.broadcast_to(np.ones(d), (t, 1, d))  # one row in memory
        tracemalloc.start()
        out, lse = attention(q, k, k, softmax_scale=SCALE)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (out == 1).all()  # a mean of ones, exact because all weights are 1
        assert (np.abs(lse - (SCALE * d + np.log(t))) <= 2 * np.spacing(lse)).all()
        return used

    peak(2**10)  # what numpy allocates once is no part of the comparison
    block = 512 * d * 8
    assert peak(2**17) <= peak(2**14) + block < 2**14 * d * 8


def test_causal_mask_is_aligned_to_the_last_key() -> None:
    """With values that number the keys and equal scores, the mean tells how many a query sees."""
    s, t = 3, 8
    v = np.arange(t, dtype=float)[:, None, None]  # [t, 1, 1]
    out, lse = attention(np.zeros((s, 2, 4)), np.zeros((t, 1, 4)), v, softmax_scale=1.0)
    seen = np.array([6, 7, 8])
    np.testing.assert_array_equal(out, np.broadcast_to(((seen - 1) / 2)[:, None, None], (s, 2, 1)))
    np.testing.assert_array_equal(lse, np.broadcast_to(np.log(seen), (2, s)))


def test_without_causal_mask_every_query_sees_every_valid_key() -> None:
    v = np.arange(8.0)[:, None, None]
    out, _ = attention(np.zeros((3, 1, 4)), np.zeros((8, 1, 4)), v, softmax_scale=1.0, causal=False, cache_seqlens=5)
    assert (out == 2).all()


def test_causal_mask_is_aligned_to_each_sequences_own_length() -> None:
    v = np.broadcast_to(np.arange(8.0)[:, None, None], (3, 8, 1, 1))
    seqlens = np.array([8, 4, 1])
    out, lse = attention(np.zeros((3, 2, 1, 4)), np.zeros((3, 8, 1, 4)), v, softmax_scale=1.0, cache_seqlens=seqlens)
    assert out[..., 0, 0].tolist() == [[3.0, 3.5], [1.0, 1.5], [0.0, 0.0]]
    assert np.exp(lse[:, 0]).round().tolist() == [[7, 8], [3, 4], [0, 1]]


def test_rows_without_keys_give_zero_and_minus_infinity() -> None:
    q, k, v = operands(4, 3, 6, 2, 2, lead=(2,))
    out, lse = attention(q, k, v, softmax_scale=SCALE, cache_seqlens=np.array([2, 0]))
    assert (out[0, 0] == 0).all()
    assert (lse[0, :, 0] == -np.inf).all()
    assert np.isfinite(lse[0, :, 1:]).all()
    assert (out[0, 1:] != 0).all()
    assert (out[1] == 0).all()
    assert (lse[1] == -np.inf).all()


@pytest.mark.parametrize("causal", [True, False])
def test_no_keys_at_all(causal: bool) -> None:
    q, k, v = operands(5, 3, 0, 2, 2)
    out, lse = attention(q, k, v, softmax_scale=SCALE, causal=causal)
    assert out.shape == (3, 2, 3)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("block_size", [1, 3, 512])
def test_logits_of_any_finite_size(block_size: int) -> None:
    """One score of 1e300 wins outright, in any block; the others differ from it by up to 2e300."""
    scores = np.array([-1e300, 3.0, 1e300, -1e300, 0.0])
    v = np.array([10.0, 20.0, 30.0, 40.0, 50.0])[:, None, None]
    for order in ([0, 1, 2, 3, 4], [2, 0, 1, 3, 4], [4, 3, 1, 0, 2]):
        out, lse = attention(
            np.ones((1, 1, 1)),
            scores[order][:, None, None],
            v[order],
            softmax_scale=1.0,
            block_size=block_size,
        )
        assert out.item() == 30.0
        assert lse.item() == 1e300


@pytest.mark.parametrize("size", [1e300, -1e300])
def test_equal_logits_of_any_finite_size_average(size: float) -> None:
    out, lse = attention(np.ones((1, 1, 1)), np.full((4, 1, 1), size), np.arange(4.0)[:, None, None], softmax_scale=1.0)
    assert out.item() == 1.5
    assert lse.item() == size  # log 4 is lost against it


def test_weights_far_below_the_maximum_are_not_lost() -> None:
    # exp(-700) is in reach of float64; the values bring both contributions to one size.
    out, _ = attention(
        np.ones((1, 1, 1)),
        np.array([-700.0, 0.0])[:, None, None],
        np.array([np.exp(700.0), 1.0])[:, None, None],
        softmax_scale=1.0,
    )
    # exp and its inverse carry one rounding each, relative to the result, and the sum and the division two more.
    assert abs(out.item() - 2.0) <= 2 * 4 * 2.0**-52


def test_scale_multiplies_the_scores() -> None:
    q, k, v = operands(6, 2, 5, 2, 1)
    halved = attention(q, k, v, softmax_scale=SCALE / 2)
    # A power of two scales without rounding.
    for a, b in zip(halved, attention(q / 2, k, v, softmax_scale=SCALE), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("g", [1, 2, 3, 6])
def test_groups_share_keys_of_consecutive_heads(g: int) -> None:
    q, k, v = operands(7, 2, 9, 6, g)
    out, lse = attention(q, k, v, softmax_scale=SCALE)
    repeated = np.repeat(k, 6 // g, axis=1), np.repeat(v, 6 // g, axis=1)
    multi_head = attention(q, *repeated, softmax_scale=SCALE)
    bound = float64_bound(q, k, v)
    assert (np.abs(out - multi_head[0]) <= 2 * bound.out_error.total).all()
    assert (np.abs(lse - multi_head[1]) <= 2 * bound.lse_error.total).all()


def test_leading_axes_are_independent_sequences() -> None:
    q, k, v = operands(8, 3, 7, 4, 2, lead=(2, 3))
    seqlens = np.array([[7, 5, 1], [0, 2, 6]])
    out, lse = attention(q, k, v, softmax_scale=SCALE, cache_seqlens=seqlens)
    assert out.shape == (2, 3, 3, 4, 3)
    assert lse.shape == (2, 3, 4, 3)
    bound = float64_bound(q, k, v, cache_seqlens=seqlens)
    for b in np.ndindex(2, 3):
        one = attention(q[b], k[b], v[b], softmax_scale=SCALE, cache_seqlens=int(seqlens[b]))
        assert (np.abs(out[b] - one[0]) <= 2 * bound.out_error.total[b]).all()
        np.testing.assert_array_equal(np.isneginf(lse[b]), np.isneginf(one[1]))
        seen = np.isfinite(one[1])
        assert (np.abs(lse[b][seen] - one[1][seen]) <= 2 * bound.lse_error.total[b][seen]).all()


def test_shared_keys_need_no_copies_for_each_sequence() -> None:
    q, k, v = operands(9, 2, 6, 2, 2)
    many = np.stack([q, 2 * q])
    out, _ = attention(many, k[None], v[None], softmax_scale=SCALE)
    bound = float64_bound(many, np.stack([k, k]), np.stack([v, v]))
    for b in range(2):
        one, _ = attention(many[b], k, v, softmax_scale=SCALE)
        assert (np.abs(out[b] - one) <= 2 * bound.out_error.total[b]).all()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e308])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [2, 512])
def test_rows_past_the_length_are_never_read(garbage: float, causal: bool, block_size: int) -> None:
    q, k, v = operands(10, 2, 9, 4, 2, lead=(3,))
    seqlens = np.array([9, 4, 0])
    dirty_k, dirty_v = k.copy(), v.copy()
    for b, length in enumerate(seqlens):
        dirty_k[b, length:] = garbage
        dirty_v[b, length:] = -garbage
    options: Any = {
        "softmax_scale": SCALE,
        "cache_seqlens": seqlens,
        "causal": causal,
        "block_size": block_size,
    }
    clean = attention(q, k, v, **options)
    dirty = attention(q, dirty_k, dirty_v, **options)
    for a, b in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(a, b)


def test_causal_rows_past_the_last_query_are_never_read() -> None:
    """Key t - 1 is for the last query alone, so garbage in it reaches no other."""
    q, k, v = operands(11, 3, 6, 2, 2)
    clean, _ = attention(q, k, v, softmax_scale=SCALE)
    v[-1] = 1e9
    k[-1] *= -1
    changed, _ = attention(q, k, v, softmax_scale=SCALE)
    np.testing.assert_array_equal(changed[:2], clean[:2])
    assert (changed[2] != clean[2]).all()


def test_nan_in_a_key_that_is_seen_is_not_hidden() -> None:
    q, k, v = operands(12, 2, 4, 1, 1)
    k[1] = np.nan
    out, lse = attention(q, k, v, softmax_scale=SCALE)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (
            (2, 5),
            (4, 1, 5),
            (4, 1, 3),
            "q [..., s, h, d] and k [..., t, g, d] must agree in d, got (2, 5) and (4, 1, 5)",
        ),
        (
            (2, 3, 5),
            (4, 5),
            (4, 1, 3),
            "q [..., s, h, d] and k [..., t, g, d] must agree in d, got (2, 3, 5) and (4, 5)",
        ),
        (
            (2, 3, 5),
            (4, 1, 6),
            (4, 1, 3),
            "q [..., s, h, d] and k [..., t, g, d] must agree in d, got (2, 3, 5) and (4, 1, 6)",
        ),
        (
            (2, 3, 5),
            (4, 2, 5),
            (4, 2, 3),
            "the number of key heads must divide the number of query heads, got 2 and 3",
        ),
        (
            (2, 3, 5),
            (4, 0, 5),
            (4, 0, 3),
            "the number of key heads must divide the number of query heads, got 0 and 3",
        ),
        ((2, 3, 5), (4, 1, 5), (3, 1, 3), "v must be [..., 4, 1, dv] like k, got (3, 1, 3)"),
        ((2, 3, 5), (4, 1, 5), (4, 3, 3), "v must be [..., 4, 1, dv] like k, got (4, 3, 3)"),
        ((2, 3, 5), (4, 1, 5), (4, 3), "v must be [..., 4, 1, dv] like k, got (4, 3)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        attention(np.zeros(q), np.zeros(k), np.zeros(v), softmax_scale=1.0)


@pytest.mark.parametrize("seqlens", [-1, 5, [2, -1], [5, 0]])
def test_lengths_outside_the_keys_are_refused(seqlens: Any) -> None:
    low, high = np.min(seqlens), np.max(seqlens)
    lead = (len(seqlens),) if isinstance(seqlens, list) else ()
    message = f"cache_seqlens must lie in 0 .. 4, got {low} .. {high}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        attention(
            np.zeros((*lead, 2, 1, 5)),
            np.zeros((*lead, 4, 1, 5)),
            np.zeros((*lead, 4, 1, 3)),
            softmax_scale=1.0,
            cache_seqlens=np.array(seqlens) if lead else seqlens,
        )


def test_rows_of_a_group_are_its_heads_one_after_the_other() -> None:
    x = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)  # [b, s, h, d]
    rows = heads_to_rows(x, 2)
    assert rows.shape == (2, 2, 6, 5)
    np.testing.assert_array_equal(rows[1, 1, 4], x[1, 1, 3])  # group 1, its second head, query 1
    np.testing.assert_array_equal(rows_to_heads(rows, 3, 4), x)
    np.testing.assert_array_equal(rows_to_lse(rows[..., 0], 3, 4), np.swapaxes(x[..., 0], 1, 2))


@pytest.mark.parametrize("block_size", [2, 4, 512])
@pytest.mark.parametrize("window", [1, 3, 6, 100])
def test_a_window_shows_the_last_keys_of_each_query(window: int, block_size: int) -> None:
    """Against attention of each query alone, to a copy of the keys that it sees; the first of five queries sees none."""
    q, k, v = operands(14, 5, 11, 4, 2)
    seqlens = np.array([11, 4])
    options: dict[str, Any] = {"softmax_scale": SCALE, "block_size": block_size}
    both = [np.stack([x, x]) for x in (q, k, v)]
    out, lse = attention(*both, cache_seqlens=seqlens, window=window, **options)
    for b, i in np.ndindex(2, 5):
        end = int(seqlens[b]) - 4 + i
        keys = slice(max(end - window, 0), end)
        want = float64_bound(q[i : i + 1], k[keys], v[keys])
        assert (np.abs(out[b, i] - want.out[0]) <= 2 * want.out_error.total[0]).all()
        same = lse[b, :, i] == want.lse[:, 0]  # also where both are -inf
        with np.errstate(invalid="ignore"):
            near = np.abs(lse[b, :, i] - want.lse[:, 0]) <= 2 * want.lse_error.total[:, 0]
        assert (same | near).all()


def test_keys_before_every_window_are_never_read() -> None:
    q, k, v = operands(15, 2, 9, 2, 1)
    clean = attention(q, k, v, softmax_scale=SCALE, window=3)
    k[:5], v[:5] = np.nan, np.inf  # the first of two queries sees keys 5 .. 7
    for a, b in zip(attention(q, k, v, softmax_scale=SCALE, window=3), clean, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_keys_is_refused(window: int) -> None:
    q, k, v = operands(16, 1, 2, 1, 1)
    with pytest.raises(ValueError, match=f"^window must be at least 1, got {window}$"):
        attention(q, k, v, softmax_scale=SCALE, window=window)


def test_a_sink_is_a_key_of_value_0() -> None:
    """Its score joins the sum that divides, and not the LSE; -inf is no key, and +inf takes all."""
    q, k, v = operands(17, 3, 5, 4, 2)
    without, lse = attention(q, k, v, softmax_scale=SCALE)
    sink = np.array([0.75, -np.inf, np.inf, -2.0])
    out, same = attention(q, k, v, softmax_scale=SCALE, attn_sink=sink)
    np.testing.assert_array_equal(same, lse)
    np.testing.assert_array_equal(out[:, 1], without[:, 1])
    np.testing.assert_array_equal(out[:, 2], 0.0)
    bound = float64_bound(q, k, v, attn_sink=sink).out_error.total
    exact, exact_lse = exact_attention(q, k, v, limits=[3, 4, 5])
    for i, head in [(0, 0), (2, 3)]:
        share = 1 / (1 + (float(sink[head]) - exact_lse[head, i]).exp())
        assert (deviation(out[i, head], exact[i, head] * share) <= bound[i, head]).all()


def test_a_sink_leaves_rows_without_keys_at_0() -> None:
    q, k, v = operands(18, 3, 2, 2, 1)
    out, lse = attention(q, k, v, softmax_scale=SCALE, attn_sink=np.array([-np.inf, 1.0]))
    np.testing.assert_array_equal(out[0], 0.0)
    assert (lse[:, 0] == -np.inf).all()
