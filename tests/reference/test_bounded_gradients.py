"""The steps of a layer's backward pass: errors of their operands go through them, and their roundings are in the bound."""

from __future__ import annotations

import numpy as np

from mla_spec.reference.bounded import Bounded
from mla_spec.reference.bounded_gradients import (
    added,
    rms_norm_gradients,
    summed_over_heads,
    weight_gradient,
    weight_gradient_by_head,
)
from mla_spec.reference.error_bound import half_ulp
from mla_spec.reference.formats import round_to
from mla_spec.reference.layer_backward import linear_backward, rms_norm_backward
from mla_spec.reference.profile import Profile
from mla_spec.reference.typing import Array


def bounded(rng: np.random.Generator, *shape: int, error: float = 1e-3) -> Bounded:
    return Bounded(rng.standard_normal(shape), error * rng.uniform(0, 1, shape))


def off_by_its_error(x: Bounded, rng: np.random.Generator) -> Array:
    return x.value + x.error * rng.choice([-1.0, 1.0], x.value.shape)


def test_errors_of_operands_go_through_rms_norm() -> None:
    """In float64 all that moves the gradients is the error of their operands."""
    rng, worst = np.random.default_rng(0), np.zeros(2)
    profile, weight = Profile.default("float64"), rng.uniform(0.5, 1.5, 5)
    for _ in range(300):
        x, grad = bounded(rng, 2, 3, 5), bounded(rng, 2, 3, 5)
        x_grad, (want, bound) = rms_norm_gradients(x, weight, 1e-6, grad, profile)
        got, got_weight = rms_norm_backward(off_by_its_error(x, rng), weight, 1e-6, off_by_its_error(grad, rng))
        exact = rms_norm_backward(x.value, weight, 1e-6, grad.value)
        np.testing.assert_allclose(x_grad.value, exact[0], atol=1e-14)
        np.testing.assert_allclose(want, exact[1], atol=1e-14)
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


def test_heads_may_be_stored_before_they_are_added() -> None:
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(100):
        x = rng.uniform(0.5, 2, (3, 4, 5))
        summed = summed_over_heads(Bounded(x, 0 * x), 4, Profile.default("bfloat16"))
        np.testing.assert_allclose(summed.value, x.sum(axis=1))
        got = round_to(round_to(x, "bfloat16").sum(axis=1), "bfloat16")
        worst = max(worst, (np.abs(got - summed.value) / summed.error).max())
    assert 0.5 < worst <= 1


def test_rounding_of_a_sum_of_two_uses() -> None:
    rng = np.random.default_rng(0)
    a, b = (round_to(rng.uniform(0.5, 2, 500), "bfloat16") for _ in range(2))
    total = added(Bounded(a, 0 * a), Bounded(b, 0 * b), Profile.default("bfloat16"))
    error = np.abs(round_to(a + b, "bfloat16") - (a + b))
    assert (error <= total.error).all()
    assert error.max() > 0.9 * total.error.max() > 0
    carried = added(Bounded(a, a), Bounded(b, b), Profile.default("float64"))
    np.testing.assert_allclose(carried.error, a + b)


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
