"""The sums of one pass from which bounds follow, against the same sums written out; and what makes roundings independent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.attention_sums import CELLS, BoundSums, bound_sums
from mla_spec.bounds.profile import Profile
from mla_spec.reference.attention import SoftmaxBlock, softmax_blocks
from mla_spec.reference.typing import Array

SCALE = 0.375
SEEN = 7
PROFILE = Profile.default("bfloat16")


def operands(seed: int, t: int = 9, h: int = 2, sign: int = 1) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape) for shape in ((1, h, 5), (t, 1, 5), (t, 1, 3)))
    q[:, 1] = sign * q[:, 0]
    return 5 * sign * q, k, v


def blocks(q: Array, k: Array, v: Array, block_size: int) -> Iterator[SoftmaxBlock]:
    return softmax_blocks(q, k, v, softmax_scale=SCALE, cache_seqlens=SEEN, causal=True, block_size=block_size)


def written_out(q: Array, k: Array) -> tuple[Array, Array]:
    """(scores, weights) [h, SEEN]."""
    scores = (q[0] * SCALE) @ k[:SEEN, 0].T
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return scores, p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("block_size", [1, 4, 512])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_are_those_written_out(sign: int, block_size: int) -> None:
    """With -1 the largest magnitude is that of the maximum in one head and of the minimum in the other."""
    q, k, v = operands(13, sign=sign)
    rng = np.random.default_rng(14)
    delta, v_error = rng.uniform(0, 3, (2, 9)), rng.uniform(0, 1, v.shape)
    delta[1, 4] = 320.0  # beyond what expm1 is used for; it hides the other keys of its head
    sums = bound_sums(
        blocks(q, k, v, block_size), lambda b: np.broadcast_to(delta[:, b.keys], b.scores.shape), v_error, 0.25
    )
    scores, p = written_out(q, k)
    assert sign == 1 or (scores.max(-1) == np.abs(scores).max(-1)).tolist() in ([True, False], [False, True])
    x, v, v_error = np.expm1(delta[:, :SEEN]), v[:SEEN, 0], v_error[:SEEN, 0]
    want: dict[str, Any] = {
        "max_score": scores.max(-1),
        "max_abs_score": np.abs(scores).max(-1),
        "lse": np.log(np.exp(scores).sum(-1)),
        "out": p @ v,
        "out_square": p @ v**2,
        "error": (p * x).sum(-1),
        "error_square": (p * x**2).sum(-1),
        "v_error": p @ v_error,
        "v_error_square": p @ v_error**2,
        "weight_square": ((p * (1 + x)) ** 2).sum(-1),
        "value_square": (p * (1 + x)) ** 2 @ (np.abs(v) + v_error) ** 2,
    }
    for name, expected in want.items():
        # Float64 on both sides; exp(2 · 320) inherits hundreds of roundings from its argument.
        np.testing.assert_allclose(getattr(sums, name)[0], expected, rtol=1e-12, atol=1e-12, err_msg=name)
    cells = np.zeros((2, CELLS))
    for head in range(2):
        np.add.at(cells[head], np.floor(scores[head] / 0.25).astype(int) % CELLS, p[head])
    np.testing.assert_allclose(sums.cells[0], cells, atol=1e-12)


def test_an_error_that_overflows_is_infinite_but_not_where_there_is_no_weight() -> None:
    q, k, v = operands(15, sign=-1)
    k[0] *= 1e4  # all the weight in one head, and none in the other
    _, p = written_out(q, k)
    assert set(p[:, 0]) == {1.0, 0.0}

    def error(block: SoftmaxBlock) -> Array:
        return np.where(np.arange(9)[block.keys] == 0, 1e3, 0.5) + 0 * block.scores

    with np.errstate(over="ignore", invalid="ignore"):
        sums = bound_sums(blocks(q, k, v, 512), error, None, None)
    assert (np.isinf(sums.error_square[0]) == (p[:, 0] > 0)).all()
    assert (np.isfinite(sums.error_square[0]) == (p[:, 0] == 0)).all()


def sums_of(k: Array, q: Array) -> BoundSums:
    v = np.ones((len(k), 1, 1))
    zero = softmax_blocks(q, k, v, softmax_scale=1.0, cache_seqlens=None, causal=False, block_size=64)
    return bound_sums(zero, lambda b: 0 * b.scores, None, 2.0**-7)


def test_cells_far_apart_may_share_one_and_the_largest_scores_do() -> None:
    q = np.ones((1, 1, 1))
    k = np.array([0.0, 2.0**-7 * CELLS, 1e300]).reshape(3, 1, 1)
    with np.errstate(invalid="ignore"):
        cells = sums_of(k, q).cells[0, 0]
    assert cells.sum() == 1.0
    assert (cells > 0).sum() == 1


@pytest.mark.parametrize(
    ("keys", "narrower"),
    [
        ("spread", True),
        ("equal", False),  # one key 4096 times: one rounding, 4096 times
        ("within a cell", False),  # all weights round the same way
        ("few", False),  # fewer keys than the tail of the distribution asks for
    ],
)
def test_probable_error_is_narrower_only_where_roundings_spread(keys: str, narrower: bool) -> None:
    rng = np.random.default_rng(16)
    t = 16 if keys == "few" else 4096
    k = rng.standard_normal((t, 1, 8))
    if keys == "equal":
        k[:] = k[0]
    if keys == "within a cell":
        k *= 2.0**-14
    q, v = rng.standard_normal((1, 4, 8)), 2 + rng.standard_normal((t, 1, 3))
    bounded = attention_with_bound(q, k, v, softmax_scale=8**-0.5, profile=PROFILE, probable=True)
    term = "rounding of P to bfloat16"
    worst, probable = bounded.out_error.terms[term], bounded.out_error_probable.terms[term]
    assert (probable <= worst).all()
    assert (probable < 0.5 * worst).all() == narrower
    if not narrower:
        np.testing.assert_array_equal(probable, worst)


@pytest.mark.parametrize(("values", "narrower"), [(10, True), (7, False)])
def test_probable_error_asks_for_eight_distinct_weights(values: int, narrower: bool) -> None:
    """Weights whose scores are 2^-7 apart are neighbours in bfloat16; 4096 distinct keys share a few of them."""
    rng = np.random.default_rng(18)
    k, v = rng.standard_normal((4096, 1, 2)), 2 + rng.standard_normal((4096, 1, 3))
    k[:, 0, 0] = 2.0**-7 * (np.arange(4096) % values + 0.25)
    bounded = attention_with_bound(np.array([[[1.0, 0.0]]]), k, v, softmax_scale=1.0, profile=PROFILE, probable=True)
    term = "rounding of P to bfloat16"
    assert (bounded.out_error_probable.terms[term] < bounded.out_error.terms[term]).all() == narrower


def test_repeated_keys_count_together() -> None:
    """Each key twice: half as many independent roundings, so the probable error is that of the half."""
    rng = np.random.default_rng(17)
    q, k, v = rng.standard_normal((1, 2, 8)), rng.standard_normal((512, 1, 8)), rng.standard_normal((512, 1, 3)) + 2
    once = attention_with_bound(q, k, v, softmax_scale=0.5, profile=PROFILE, probable=True)
    twice = attention_with_bound(
        q, np.repeat(k, 2, 0), np.repeat(v, 2, 0), softmax_scale=0.5, profile=PROFILE, probable=True
    )
    term = "rounding of P to bfloat16"
    ratio = twice.out_error_probable.terms[term] / once.out_error_probable.terms[term]
    np.testing.assert_allclose(ratio, 1.0, rtol=2.0**-7)  # rates that grow with t, and the tail, are not the point here
