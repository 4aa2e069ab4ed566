"""The bound of the gradient of a sink: honest backward passes of three styles never exceed it, and a missing factor does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mla_spec.bounds.attention_backward import BackwardAttention
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.running import Bounded, perhaps_stored
from mla_spec.reference.attention import attention, sink_share
from mla_spec.reference.backward import sink_backward
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import TORCH_DTYPES


def sink_case(seed: int, dtype: str) -> tuple[Array, Array, Array, Array, Array]:
    """(q [3, 2, 5], k [3, 2, 5], v [3, 2, 4], out_grad [3, 2, 4], sinks [2] from small to larger than all scores)."""
    rng = np.random.default_rng(seed)
    q, k, v, out_grad = (round_to(rng.standard_normal((3, 2, d)), dtype) for d in (5, 5, 4, 4))
    return q, k, v, out_grad, round_to(rng.uniform(-9, 9, 2), dtype)


def sink_gradients(style: str, q: Array, k: Array, v: Array, out_grad: Array, sinks: Array, dtype: str) -> Array:
    """What each query adds to the gradient of its head's sink [s, h], in float32 with P, dS and outputs stored in ``dtype``."""
    query, key, value, do = (torch.from_numpy(np.swapaxes(x, 0, 1)).float() for x in (q, k, v, out_grad))  # [h, s, ·]
    scores = (query @ key.mT).masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), -torch.inf)
    sink = torch.from_numpy(sinks).float()[:, None].expand(2, 3)  # [h, s]
    lse = scores.logsumexp(dim=-1)
    low = TORCH_DTYPES[dtype]
    if style == "joined":  # the sink is one more score, whose weight is dropped
        p = torch.softmax(torch.cat([scores, sink[..., None]], dim=-1), dim=-1).to(low).float()
        of_p = torch.cat([(do @ value.mT).to(low).float(), torch.zeros(2, 3, 1)], dim=-1)
        each = (p * (of_p - (p * of_p).sum(dim=-1, keepdim=True)))[..., -1]
    elif style == "share":  # the output times a sigmoid, by autograd
        whole = (torch.softmax(scores, dim=-1).to(low).float() @ value).to(low).float()
        leaf = sink.clone().requires_grad_()
        (whole * torch.sigmoid(lse - leaf)[..., None]).backward(do)
        assert leaf.grad is not None
        each = leaf.grad
    else:  # −P_sink Σ dO O, of the output as it was stored
        total = torch.logaddexp(lse, sink)
        out = (torch.exp(scores - total[..., None]) @ value).to(low).float()
        each = -torch.exp(sink - total) * (do * out).sum(dim=-1)
    return each.to(low).double().numpy().T


@pytest.mark.parametrize("style", ["joined", "share", "fused"])
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.03), ("float16", 0.4), ("bfloat16", 0.4)])
def test_gradients_of_sinks_stay_within_the_bound(style: str, dtype: str, least: float) -> None:
    profile, worst = Profile.default(dtype), 0.0
    for seed in range(200):
        q, k, v, out_grad, sinks = sink_case(seed, dtype)
        bound = sink_bound(q, k, v, out_grad, sinks, profile)
        out, lse = attention(q, k, v, softmax_scale=1.0)
        rounding = sink_bound(q, k, v, out_grad, sinks, Profile.default("float64")).error
        exact = sink_backward(out, lse, out_grad, sinks)[2]
        assert (np.abs(bound.value.sum(axis=0) - exact) <= rounding.sum(axis=0)).all()
        ratio = np.abs(sink_gradients(style, q, k, v, out_grad, sinks, dtype) - bound.value) / bound.error
        assert ratio.max() <= 1, seed
        worst = max(worst, ratio.max())
    assert worst > least


def sink_bound(q: Array, k: Array, v: Array, out_grad: Array, sinks: Array, profile: Profile) -> Bounded:
    steps = BackwardAttention.of(q, k, v, softmax_scale=1.0, profile=profile, attn_sink=sinks, sink_joins=True)
    return perhaps_stored(steps.sink_gradient(out_grad, np.zeros_like(out_grad)), profile.dtype)


def test_gradients_of_sinks_without_what_is_subtracted_exceed_the_bound() -> None:
    """D of the output that the sink has not taken its share of, and a share left out, as wrong kernels have them."""
    for seed in range(20):
        q, k, v, out_grad, sinks = sink_case(seed, "bfloat16")
        sinks = np.abs(sinks) / 9
        bound = sink_bound(q, k, v, out_grad, sinks, Profile.default("bfloat16"))
        out, lse = attention(q, k, v, softmax_scale=1.0)
        share = sink_share(lse.T, sinks)
        d = (out * out_grad).sum(axis=-1)
        for wrong in (-(1 - share) * d, -share * d, share * (1 - share) * d, 0 * d):
            assert (np.abs(wrong - bound.value) > bound.error).any(), seed
