"""Gradients of a merge: against complex-step derivatives, autograd in float64, and attention to all keys."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.reference.attention import attention
from mla_spec.reference.backward import attention_backward
from mla_spec.reference.merge import merge, merge_backward
from mla_spec.reference.typing import Array

STEP = 1e-30
RNG = np.random.default_rng(3)
LSES = {
    "near": [0.3, -1.2, 0.9],
    "far apart": [0.3, -30.0, 5.0],
    "far from 0": [-500.0, -501.0, -500.5],
    "one part": [2.0],
    "empty parts": [-np.inf, 0.5, -np.inf, 1.0],
}


def operands(name: str) -> tuple[Array, Array, Array, Array]:
    """outs [parts, 2, 2, 3], lses [parts, 2, 2], all rows with the same present parts, out_grad and lse_grad."""
    mean = np.array(LSES[name]).reshape(-1, 1, 1)
    lses = mean + 0.5 * RNG.standard_normal((len(mean), 2, 2))
    outs = RNG.standard_normal((len(mean), 2, 2, 3))
    return outs, lses, RNG.standard_normal((2, 2, 3)), RNG.standard_normal((2, 2))


def loss(outs: Any, lses: Any, out_grad: Array, lse_grad: Array) -> Any:
    """Σ dO · out + Σ dlse · lse of numbers that may be complex; parts without keys are left out."""
    total: Any = 0.0
    for s, h in np.ndindex(2, 2):
        present = [i for i in range(len(lses)) if np.isfinite(lses[i, h, s].real)]
        shift = max(lses[i, h, s].real for i in present)
        weights = {i: np.exp(lses[i, h, s] - shift) for i in present}
        mass = sum(weights.values())
        total = total + lse_grad[h, s] * (shift + np.log(mass))
        for i in present:
            total = total + weights[i] / mass * (out_grad[s, h] * outs[i, s, h]).sum()
    return total


def complex_step(function: Callable[[Any], Any], x: Array) -> Array:
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        if np.isfinite(x[index]):
            moved = x.astype(complex)
            moved[index] += 1j * STEP
            gradient[index] = function(moved).imag / STEP
    return gradient


@pytest.mark.parametrize("name", LSES)
def test_gradients_are_complex_step_derivatives(name: str) -> None:
    outs, lses, out_grad, lse_grad = operands(name)
    got = merge_backward(outs, lses, out_grad, lse_grad)
    of_outs = complex_step(lambda x: loss(x, lses.astype(complex), out_grad, lse_grad), outs)
    of_lses = complex_step(lambda x: loss(outs, x, out_grad, lse_grad), lses)
    np.testing.assert_allclose(got[0], of_outs, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(got[1], of_lses, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LSES)
def test_without_a_gradient_of_the_lse_it_is_0(name: str) -> None:
    outs, lses, out_grad, lse_grad = operands(name)
    for got, want in zip(
        merge_backward(outs, lses, out_grad), merge_backward(outs, lses, out_grad, 0 * lse_grad), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", [name for name in LSES if "empty" not in name])
def test_gradients_are_those_of_autograd(name: str) -> None:
    outs, lses, out_grad, lse_grad = operands(name)
    o, x = (torch.tensor(a, requires_grad=True) for a in (outs, lses))
    lse = x.logsumexp(dim=0)
    out = (torch.exp(x - lse).transpose(-1, -2)[..., None] * o).sum(dim=0)
    torch.autograd.backward([out, lse], [torch.tensor(out_grad), torch.tensor(lse_grad)])
    for got, leaf in zip(merge_backward(outs, lses, out_grad, lse_grad), (o, x), strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_parts_without_keys_have_no_gradient_whatever_their_outputs(count: int) -> None:
    outs, lses = np.full((count, 1, 1, 2), np.nan), np.full((count, 1, 1), -np.inf)
    for got in merge_backward(outs, lses, np.ones((1, 1, 2)), np.ones((1, 1))):
        assert len(got) == count
        assert (got == 0).all()


@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 0, 3, 3, 8, 9)])
def test_gradients_through_parts_are_those_of_attention_to_all_keys(cuts: tuple[int, ...]) -> None:
    q, k, v = (RNG.standard_normal((2, t, 4, d)) for t, d in ((5, 6), (9, 6), (9, 3)))
    out_grad, lse_grad = RNG.standard_normal((2, 5, 4, 3)), RNG.standard_normal((2, 4, 5))
    keys = [slice(i, j) for i, j in pairwise(cuts)]
    pieces = [attention(q, k[:, i], v[:, i], softmax_scale=0.7, causal=False) for i in keys]
    outs, lses = (np.stack(x) for x in zip(*pieces, strict=True))
    np.testing.assert_allclose(merge(outs, lses)[0], attention(q, k, v, softmax_scale=0.7, causal=False)[0])
    of_outs, of_lses = merge_backward(outs, lses, out_grad, lse_grad)
    want = attention_backward(q, k, v, out_grad, softmax_scale=0.7, causal=False, lse_grad=lse_grad)
    dq = np.zeros_like(q)
    for n, i in enumerate(keys):
        grads = attention_backward(
            q, k[:, i], v[:, i], of_outs[n], softmax_scale=0.7, causal=False, lse_grad=of_lses[n]
        )
        dq += grads[0]
        for got, whole in zip(grads[1:], want[1:], strict=True):
            np.testing.assert_allclose(got, whole[:, i], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(dq, want[0], rtol=1e-10, atol=1e-13)
