"""The gradient of rotary embedding: against complex-step derivatives, and autograd in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.reference.config import RopeConfig, YarnScaling
from mla_spec.reference.rope import apply_rope, rope_backward, rope_cos_sin

FACTOR = YarnScaling(factor=16, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=0.0)
ROPES = [
    RopeConfig(dim=6),
    RopeConfig(dim=6, interleaved=False),
    RopeConfig(dim=6, yarn=FACTOR),
    RopeConfig(dim=6, interleaved=False, yarn=FACTOR),
]
POSITIONS = np.array([0, 3, 4097])
STEP = 1e-30


def rotated(x: Any, rope: RopeConfig) -> Any:
    """x [s, h, r] of numbers of any kind rotated, pair by pair."""
    cos, sin = rope_cos_sin(POSITIONS, rope)
    out = [[[0.0] * rope.dim for _ in row] for row in x]
    for i, head, pair in np.ndindex(len(x), len(x[0]), rope.dim // 2):
        a, b = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + rope.dim // 2)
        c, s = (float(t[i, pair]) * rope.cos_sin_factor for t in (cos, sin))
        out[i][head][a] = x[i][head][a] * c - x[i][head][b] * s
        out[i][head][b] = x[i][head][a] * s + x[i][head][b] * c
    return out


@pytest.mark.parametrize("rope", ROPES)
def test_the_gradient_is_a_complex_step_derivative(rope: RopeConfig) -> None:
    rng = np.random.default_rng(1)
    x, out_grad = rng.standard_normal((2, 3, 2, rope.dim))
    got = rope_backward(out_grad, POSITIONS, rope)
    for index in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[index] += 1j * STEP
        loss = (np.array(rotated(moved, rope)) * out_grad).sum()
        assert got[index] == pytest.approx(loss.imag / STEP, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("rope", ROPES)
def test_the_gradient_is_that_of_autograd(rope: RopeConfig) -> None:
    rng = np.random.default_rng(2)
    x, out_grad = rng.standard_normal((2, 3, 2, rope.dim))
    leaf = torch.tensor(x, requires_grad=True)
    out = torch.stack([torch.stack([torch.stack(head) for head in row]) for row in rotated(leaf, rope)])
    np.testing.assert_allclose(out.detach().numpy(), apply_rope(x, POSITIONS, rope), rtol=0, atol=1e-15 * 16)
    out.backward(torch.tensor(out_grad))  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    np.testing.assert_allclose(rope_backward(out_grad, POSITIONS, rope), leaf.grad.numpy(), rtol=0, atol=1e-15 * 16)


@pytest.mark.parametrize("rope", ROPES)
def test_products_with_the_gradient_are_those_of_the_rotation(rope: RopeConfig) -> None:
    """⟨rope(x), g⟩ = ⟨x, rope_backward(g)⟩ for every x: rotation is linear."""
    rng = np.random.default_rng(3)
    for x, g in rng.standard_normal((8, 2, 3, rope.dim)):
        forward = (apply_rope(x, POSITIONS, rope) * g).sum()
        assert (x * rope_backward(g, POSITIONS, rope)).sum() == pytest.approx(forward, rel=1e-13, abs=1e-13)
