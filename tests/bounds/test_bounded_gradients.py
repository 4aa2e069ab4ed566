"""The steps of a layer's backward pass: errors of their operands go through them, and their roundings are in the bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.bounds.error_bound import half_ulp
from mla_spec.bounds.profile import Accumulator, Profile, gamma
from mla_spec.bounds.running import Bounded, perhaps_stored, product
from mla_spec.bounds.running_gradients import (
    Gradient,
    added,
    gate_gradients,
    rms_norm_gradients,
    summed_over_heads,
    weight_gradient,
    weight_gradient_by_head,
)
from mla_spec.reference.formats import round_to
from mla_spec.reference.layer_backward import linear_backward, rms_norm_backward
from mla_spec.reference.typing import Array
from tests.bounds import written_out
from tests.bounds.test_bounded import WIDE, integers
from tests.bounds.test_bounded import bounded as numbers_of_many_sizes
from tests.bounds.test_bounded_steps import ROUNDOFF, divided, rms_of
from tests.bounds.written_out import (
    U64,
    Number,
    assert_same,
    dot,
    exact,
    numbers,
    size,
    times,
    total,
)


def bounded(rng: np.random.Generator, *shape: int, error: float = 1e-3) -> Bounded:
    return Bounded(rng.standard_normal(shape), error * rng.uniform(0, 1, shape))


def off_by_its_error(x: Bounded, rng: np.random.Generator) -> Array:
    return x.value + x.error * rng.choice([-1.0, 1.0], x.value.shape)


def without_error(x: Bounded) -> Bounded:
    """The exact numbers, of which in float64 only rounding is left."""
    return Bounded(x.value, 0 * x.error)


def test_errors_of_operands_go_through_rms_norm() -> None:
    """In float64 all that moves the gradients is the error of their operands."""
    rng, worst = np.random.default_rng(0), np.zeros(2)
    profile, weight = Profile.default("float64"), rng.uniform(0.5, 1.5, 5)
    for _ in range(300):
        x, grad = bounded(rng, 2, 3, 5), bounded(rng, 2, 3, 5)
        x_grad, (want, bound) = rms_norm_gradients(x, weight, 1e-6, grad, profile)
        got, got_weight = rms_norm_backward(off_by_its_error(x, rng), weight, 1e-6, off_by_its_error(grad, rng))
        same, (_, rounding) = rms_norm_gradients(without_error(x), weight, 1e-6, without_error(grad), profile)
        exact = rms_norm_backward(x.value, weight, 1e-6, grad.value)
        assert (np.abs(x_grad.value - exact[0]) <= same.error).all()
        assert (np.abs(want - exact[1]) <= rounding.total).all()
        ratio = np.abs(got - x_grad.value) / x_grad.error, np.abs(got_weight - want) / bound.total
        worst = np.maximum(worst, [r.max() for r in ratio])
    assert (worst <= 1).all()
    assert (worst > 0.4).all()


def test_sequences_may_be_stored_before_they_are_added() -> None:
    rng, worst = np.random.default_rng(0), 0.0
    exact = np.zeros(())
    for _ in range(100):
        grad, x = (round_to(rng.uniform(0.5, 2, (3, 4, n)), "bfloat16") for n in (5, 6))
        want, bound = weight_gradient(Bounded(grad, 0 * grad), Bounded(x, 0 * x), Profile.default("bfloat16"))
        np.testing.assert_allclose(want, linear_backward(grad, x))
        total = exact
        for one, row in zip(grad, x, strict=True):
            total = round_to(total + round_to(one.T @ row, "bfloat16"), "bfloat16")
        worst = max(worst, (np.abs(total - want) / bound.total).max())
    assert 0.4 < worst <= 1


def test_weight_gradients_by_head_are_those_of_each_head() -> None:
    rng = np.random.default_rng(0)
    grad, x, shared = bounded(rng, 2, 3, 4, 5), bounded(rng, 2, 3, 4, 6), bounded(rng, 2, 3, 1, 6)
    profile = Profile.default("float32")
    for operand in (x, shared):
        got, bound = weight_gradient_by_head(grad, operand, profile)
        for head in range(4):
            one = operand[..., min(head, operand.value.shape[-2] - 1), :]
            want, of_head = weight_gradient(grad[..., head, :], one, profile)
            np.testing.assert_allclose(got[head], want)
            np.testing.assert_allclose(bound.total[head], of_head.total)
    single, column = grad[..., :1, :1], shared[..., :1]
    got, bound = weight_gradient_by_head(single, column, profile)
    np.testing.assert_allclose(bound.total[0], weight_gradient(single[..., 0, :], column[..., 0, :], profile)[1].total)


def test_heads_may_be_stored_before_they_are_added() -> None:
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(100):
        x = rng.uniform(0.5, 2, (3, 4, 5))
        each = perhaps_stored(Bounded(x, 0 * x), "bfloat16")
        summed = summed_over_heads(each, Profile.default("bfloat16"))
        np.testing.assert_allclose(summed.value, x.sum(axis=1))
        got = round_to(round_to(x, "bfloat16").sum(axis=1), "bfloat16")
        worst = max(worst, (np.abs(got - summed.value) / summed.error).max())
    assert 0.5 < worst <= 1


def test_rounding_of_a_sum_of_two_uses() -> None:
    rng = np.random.default_rng(0)
    a, b = (round_to(rng.uniform(0.5, 2, 500), "bfloat16") for _ in range(2))
    total = added(Bounded(a, 0 * a), Bounded(b, 0 * b), profile=Profile.default("bfloat16"))
    error = np.abs(round_to(a + b, "bfloat16") - (a + b))
    assert (error <= total.error).all()
    assert error.max() > 0.9 * total.error.max() > 0
    carried = added(Bounded(a, a), Bounded(b, b), profile=Profile.default("float64"))
    np.testing.assert_allclose(carried.error, a + b)


@pytest.mark.parametrize("gates", [2, 6])
def test_errors_of_operands_go_through_a_gate(gates: int) -> None:
    """Two heads with three elements each: a gate of each head, or of each element. All that moves the gradients is errors."""
    rng, worst, profile = np.random.default_rng(0), np.zeros(2), Profile.default("float64")
    for _ in range(300):
        out, g, grad = bounded(rng, 4, 6), bounded(rng, 4, gates), bounded(rng, 4, 6)
        want = gate_gradients(out, g, grad, profile)
        moved = [off_by_its_error(x, rng) for x in (out, g, grad)]
        got = gate_backward_of(*moved)
        rounding = gate_gradients(*map(without_error, (out, g, grad)), profile)
        exact = gate_backward_of(out.value, g.value, grad.value)
        for i, (x, y) in enumerate(zip(got, want, strict=True)):
            assert (np.abs(y.value - exact[i]) <= rounding[i].error).all()
            worst[i] = max(worst[i], (np.abs(x - y.value) / y.error).max())
    assert (worst <= 1).all()
    assert (worst > 0.5).all(), worst


def gate_backward_of(out: Array, g: Array, grad: Array) -> tuple[Array, Array]:
    """What autograd gives of out · sigmoid(g) in float64."""
    x, y = (torch.from_numpy(a).requires_grad_() for a in (out, g))
    gate = y.sigmoid().repeat_interleave(out.shape[-1] // g.shape[-1], dim=-1)
    (x * gate).backward(torch.from_numpy(grad))
    assert x.grad is not None
    assert y.grad is not None
    return x.grad.numpy(), y.grad.numpy()


@pytest.mark.parametrize("gates", [2, 6])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_gates_gradient_may_be_stored_at_every_step(dtype: str, gates: int) -> None:
    """y, 1 − y, y (1 − y) and every product rounded to the dtype, with gates that are nearly open and nearly shut too."""
    rng, worst = np.random.default_rng(0), 0.0

    def stored(x: Array) -> Array:
        return round_to(x, dtype)

    for _ in range(50):
        out, grad = stored(rng.standard_normal((2, 50, 6)))
        g = stored(rng.uniform(-9, 9, (50, gates)))
        want = gate_gradients(*(Bounded(x, 0 * x) for x in (out, g, grad)), Profile.default(dtype))
        y = stored(1 / (1 + np.exp(-g)))
        y_grad = stored(stored(grad * out).reshape(50, gates, -1).sum(axis=-1))
        got = stored(grad * np.repeat(y, 6 // gates, axis=-1)), stored(y_grad * stored(y * stored(1 - y)))
        for x, bound in zip(got, want, strict=True):
            ratio = np.abs(x - bound.value) / bound.error
            assert ratio.max() <= 1
            worst = max(worst, ratio.max())
    assert worst > 0.6


def test_terms_of_a_norms_gradient_may_be_stored() -> None:
    """As where the weight multiplies numbers that were rounded before (transformers): each token's term is rounded too."""
    rng, worst, without = np.random.default_rng(0), 0.0, 0.0
    x = np.tile([1.5, -1.5, 1.0, 0.5, 0.5, 0.0], (8, 1))  # its rms is 1, so that x̂ is exact
    for _ in range(200):
        grad = round_to(rng.uniform(0.5, 2, x.shape), "bfloat16")
        want, bound = rms_norm_gradients(
            Bounded(x, 0 * x), np.ones(6), 1e-30, Bounded(grad, 0 * grad), Profile.default("bfloat16")
        )[1]
        got = round_to(round_to(grad * x, "bfloat16").sum(axis=0), "bfloat16")
        error = np.abs(got - want)
        worst = max(worst, (error[:2] / bound.total[:2]).max())
        without = max(without, (error[:2] / half_ulp(np.abs(want[:2]), "bfloat16")).max())
    assert 0.5 < worst <= 1
    assert without > 1


def test_a_running_sum_of_sequences_may_grow_into_the_next_binade() -> None:
    """Roundings up carry it where the distance of neighbours is twice that of the exact sum."""
    step = 2.0**-9 * (1 + 2.0**-7)  # a little more than half the distance of neighbours below 1
    parts = np.array([1 - 10 * 2.0**-9, *[step] * 5, *[2 * step] * 2])
    ones = Bounded(np.ones((8, 1, 1)), np.zeros((8, 1, 1)))
    grad = Bounded(parts[:, None, None], np.zeros((8, 1, 1)))
    want, bound = weight_gradient(grad, ones, Profile.default("bfloat16"))
    running = np.zeros(())
    for part in parts:
        running = round_to(running + part, "bfloat16")
    assert want[0, 0] < 1 < running
    assert running - want[0, 0] <= bound.total[0, 0]


def test_one_projection_back_sums_all_heads_in_any_order() -> None:
    """What cancels within each head may do so at the very end, after sums that are as large as all heads together."""
    low = 0.53 * 2.0**-17  # more than half the distance of neighbours from 64 on
    first = round_to(np.array(1 + low), "float32")
    grads = np.tile([first, -1.0, 1 - first], (1, 127, 1))  # [t, h, n]
    profile, back = Profile.default("float32"), np.ones((127, 3, 1))
    running = np.float32(0)
    for x in grads[0].T.ravel():
        running = np.float32(running + np.float32(x))
    exact_grads = Bounded(grads, 0 * grads)
    whole, apart = (
        summed_over_heads(product("hnc,...thn->...thc", back, exact_grads, profile, terms), profile)
        for terms in (grads.size, None)
    )
    assert whole.value[0, 0] == 0
    assert apart.error[0, 0] < abs(running) <= whole.error[0, 0]


NARROW = Profile.default("bfloat16", linear=Accumulator(order="blocked", block=2))
EXACT = Profile.default("bfloat16", linear=WIDE, norm="float64")
"""For small integers, which cost this profile nothing but what the reference's own arithmetic does."""
REGIMES = [(numbers_of_many_sizes, NARROW), (integers, EXACT)]


@pytest.mark.parametrize(("operands", "profile"), REGIMES)
def test_sum_of_two_uses_written_out(operands: Any, profile: Profile) -> None:
    a, b = operands(0, 3, 4), operands(1, 3, 4)

    def sum_of(x: Number, y: Number) -> Number:
        return written_out.perhaps_stored((x[0] + y[0], x[1] + y[1] + U64 * abs(x[0] + y[0])), "bfloat16")

    want = [[sum_of(x, y) for x, y in zip(*rows, strict=True)] for rows in zip(numbers(a), numbers(b), strict=True)]
    assert_same(added(a, b, profile=profile), want)


@pytest.mark.parametrize(("operands", "profile"), REGIMES)
def test_sum_of_three_uses_written_out(operands: Any, profile: Profile) -> None:
    """The sum of the first two, whichever they are, may be stored: it is no larger than all magnitudes together."""
    uses = [operands(seed, 3, 4) for seed in range(3)]

    def sum_of(*x: Number) -> Number:
        value, largest = sum(a for a, _ in x), sum(size(a) for a in x)
        between = written_out.half_ulp(largest, "bfloat16") + U64 * largest
        return written_out.perhaps_stored((value, sum(e for _, e in x) + between + U64 * abs(value)), "bfloat16")

    rows = zip(*map(numbers, uses), strict=True)
    assert_same(added(*uses, profile=profile), [[sum_of(*x) for x in zip(*row, strict=True)] for row in rows])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_three_uses_may_be_added_in_any_order(order: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    uses = [round_to(rng.uniform(0.5, 2, 2000) * sign, "bfloat16") for sign in (1, 1, -1)]
    total = added(*(Bounded(x, 0 * x) for x in uses), profile=Profile.default("bfloat16"))
    first, second, third = (uses[i] for i in order)
    got = round_to(round_to(first + second, "bfloat16") + third, "bfloat16")
    ratio = np.abs(got - total.value) / total.error
    assert ratio.max() <= 1
    assert ratio.max() > (0.4 if order[0] == 0 else 0.2)


@pytest.mark.parametrize(("operands", "profile"), REGIMES)
def test_sum_over_heads_written_out(operands: Any, profile: Profile) -> None:
    x = operands(2, 3, 4, 5)
    rate = profile.linear.relative_error(4) + gamma(4, U64)
    want = [
        [written_out.perhaps_stored(total([head[i] for head in heads], rate), "bfloat16") for i in range(5)]
        for heads in numbers(x)
    ]
    assert_same(summed_over_heads(x, profile), want)


TERMS = "error of earlier stages, accumulation over tokens", "sequences rounded before they are added"


def over_sequences(parts: list[Number], dtype: str) -> tuple[float, float]:
    """``TERMS`` of the error of a sum, each part and each running sum of which may be stored, before the last rounding."""
    carried, n = sum(error for _, error in parts), len(parts)
    if n == 1:
        return carried, 0.0
    each = [written_out.perhaps_stored(x, dtype) for x in parts]
    largest = sum(size(x) for x in each)
    grown = largest * (1 + ROUNDOFF[dtype]) ** (n - 2)
    sums = (n - 2) * written_out.half_ulp(grown, dtype) + gamma(n, U64) * largest
    return carried, sum(error for _, error in each) - carried + sums


def assert_gradient(got: Gradient, parts: Any, dtype: str) -> None:
    """``parts`` holds the parts of each element of the gradient ``got``, one for each sequence."""
    value, bound = got
    assert [*bound.terms] == [*TERMS, f"rounding to {dtype}"]
    carried, apart, last = bound.terms.values()
    for index in np.ndindex(value.shape):
        of_index = parts(*index)
        terms = over_sequences(of_index, dtype)
        assert (carried[index], apart[index]) == pytest.approx(terms, rel=1e-11, abs=1e-25)
        exact_sum = sum(x for x, _ in of_index)
        assert value[index] == pytest.approx(exact_sum, rel=1e-12, abs=1e-13)
        whole = written_out.perhaps_stored((float(value[index]), float(carried[index] + apart[index])), dtype)[1]
        assert bound.total[index] == pytest.approx(whole, rel=1e-12, abs=0)
        assert bound.total[index] >= whole
        assert last[index] >= 0


@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
@pytest.mark.parametrize(("operands", "profile"), REGIMES)
def test_weight_gradients_written_out(operands: Any, profile: Profile, batch: tuple[int, ...]) -> None:
    """Sums over the tokens of a sequence, in which Γ is that of all tokens."""
    grad, x = operands(3, *batch, 3, 4), operands(4, *batch, 3, 5)
    sequences = int(np.prod(batch))
    rate = profile.linear.relative_error(3 * sequences)
    rows, columns = (numbers(a.reshape(sequences, 3, -1)) for a in (grad, x))

    def parts(o: int, i: int) -> list[Number]:
        return [dot([s[o] for s in a], [s[i] for s in b], rate) for a, b in zip(rows, columns, strict=True)]

    got = weight_gradient(grad, x, profile)
    assert got[0].shape == (4, 5)
    assert_gradient(got, parts, "bfloat16")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
@pytest.mark.parametrize(("operands", "profile"), REGIMES)
def test_weight_gradients_by_head_written_out(
    operands: Any, profile: Profile, batch: tuple[int, ...], shared: bool
) -> None:
    h = 2
    grad, x = operands(5, *batch, 3, h, 4), operands(6, *batch, 3, 1 if shared else h, 5)
    sequences = int(np.prod(batch))
    rate = profile.linear.relative_error(3 * sequences)
    rows, columns = (numbers(a.reshape(sequences, *a.value.shape[-3:])) for a in (grad, x))

    def parts(head: int, o: int, i: int) -> list[Number]:
        of_x = 0 if shared else head
        return [dot([s[head][o] for s in a], [s[of_x][i] for s in b], rate) for a, b in zip(rows, columns, strict=True)]

    got = weight_gradient_by_head(grad, x, profile)
    assert got[0].shape == (h, 4, 5)
    assert_gradient(got, parts, "bfloat16")


class NormGradients:
    """Gradients of y = weight · x / rms(x) at one token, for rows x and ∂y of numbers and exact weights."""

    def __init__(self, x: list[Number], weight: list[float], eps: float, grad: list[Number], profile: Profile) -> None:
        n, u, dtype = len(x), ROUNDOFF[profile.norm], profile.dtype
        rate = gamma(3 * n + 16, u) + gamma(3 * n + 16, U64)
        rms = rms_of(x, eps)

        def unit_of(a: Number) -> Number:
            value, error = a[0] / rms[0], divided(a, rms)
            return written_out.perhaps_stored((value, error + rate * (abs(value) + error)), dtype)

        unit = [unit_of(a) for a in x]
        y = [written_out.perhaps_stored(times(g, exact(w), u), dtype) for g, w in zip(grad, weight, strict=True)]
        along = [times(a, b, 0.0) for a, b in zip(unit, y, strict=True)]
        mean = sum(a for a, _ in along) / n, sum(e for _, e in along) / n
        gauge = sum(size(a) for a in along) / n

        def of_x(a: Number, b: Number) -> Number:
            parallel = times(a, mean, 0.0)
            inner = b[0] - parallel[0], b[1] + parallel[1]
            roundings = rate * (size(b) + size(a) * gauge) / rms[2]
            return written_out.perhaps_stored((inner[0] / rms[0], divided(inner, rms) + roundings), dtype)

        self.of_x = [of_x(a, b) for a, b in zip(unit, y, strict=True)]
        self.of_weight = [written_out.perhaps_stored(times(g, a, u), dtype) for g, a in zip(grad, unit, strict=True)]


def of_rms_two(seed: int, *shape: int) -> Bounded:
    """Exact 2 and -2 in turn: numbers whose rms is 2, so that x/rms is exact too."""
    signs = np.where(np.indices(shape).sum(axis=0) % 2, -2.0, 2.0)
    return Bounded(signs, np.zeros(shape))


@pytest.mark.parametrize(("batch", "n"), [((), 4), ((2,), 4), ((3, 2), 4), ((2,), 1)])
@pytest.mark.parametrize(
    ("operands", "of_x", "eps", "profile"),
    [
        (numbers_of_many_sizes, numbers_of_many_sizes, 1e-2, NARROW),
        (numbers_of_many_sizes, numbers_of_many_sizes, 1e-2, Profile.default("float16", norm="bfloat16")),
        (integers, of_rms_two, 1e-30, EXACT),
    ],
)
def test_gradients_of_a_norm_written_out(
    operands: Any, of_x: Any, eps: float, profile: Profile, batch: tuple[int, ...], n: int
) -> None:
    s, sequences = 3, int(np.prod(batch))
    x, grad, weight = of_x(7, *batch, s, n), operands(8, *batch, s, n), operands(9, n).value
    rows, grads = (numbers(a.reshape(sequences, s, n)) for a in (x, grad))
    steps = [
        [NormGradients(a, weight.tolist(), eps, b, profile) for a, b in zip(*sequence, strict=True)]
        for sequence in zip(rows, grads, strict=True)
    ]
    x_grad, weight_grad = rms_norm_gradients(x, weight, eps, grad, profile)
    assert x_grad.value.shape == x.value.shape
    assert_same(x_grad.reshape(sequences, s, n), [[step.of_x for step in sequence] for sequence in steps])
    rate = profile.linear.relative_error(s * sequences) + gamma(s * n * sequences, U64)

    def parts(i: int) -> list[Number]:
        return [total([step.of_weight[i] for step in sequence], rate) for sequence in steps]

    assert weight_grad[0].shape == (n,)
    assert_gradient(weight_grad, parts, profile.dtype)
